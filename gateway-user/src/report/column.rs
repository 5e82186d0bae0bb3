//! The figures of a line, in their order: one list for all formats.

use super::amount;
use super::line::Line;
use crate::store::figures::{Dimension, Figures};

/// One figure of a line.
pub struct Column {
    /// Its name in JSON, with its unit; [`Column::csv_name`] is that of CSV.
    pub name: &'static str,
    /// Its head in a table: two lines, the second its unit there.
    pub head: [&'static str; 2],
    /// Which reports have it.
    pub shown: Shown,
    /// Where it comes from.
    pub value: fn(&Line) -> Value,
}

/// Which reports have a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// All.
    Always,
    /// All but bills, which have no use for it.
    NotInBills,
    /// Tables, for what the others have in a column already.
    InTables,
    /// Tables only where a line has some of it, all others always.
    WhereThereIsSome,
    /// Those that are told what the invoice says.
    WithInvoice,
}

/// A figure; unknown is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number of requests or tokens.
    Count(Option<u64>),
    /// A time in microseconds.
    Micros(Option<u64>),
    /// An amount of money.
    NanoUsd(Option<i64>),
    /// A part of a whole.
    Part(Option<(i64, i64)>),
}

impl Value {
    /// The bare number, in the unit of the column's name; a part has none.
    pub fn number(self) -> Option<i128> {
        match self {
            Value::Count(number) | Value::Micros(number) => number.map(i128::from),
            Value::NanoUsd(number) => number.map(i128::from),
            Value::Part(_) => None,
        }
    }

    /// As CSV has it: money in dollars, to the last place; unknown is empty.
    pub fn exact(self) -> String {
        match self {
            Value::NanoUsd(amount) => amount.map_or_else(String::new, amount::exact),
            other => other
                .number()
                .map_or_else(String::new, |number| number.to_string()),
        }
    }

    /// As a table shows it: times in milliseconds, money with so many places, parts in percent.
    pub fn shown(self, places: usize) -> String {
        let known = match self {
            Value::Count(count) => count.map(|count| count.to_string()),
            Value::Micros(micros) => micros.map(|micros| format!("{:.1}", micros as f64 / 1e3)),
            Value::NanoUsd(amount) => amount.map(|amount| amount::rounded(amount, places)),
            Value::Part(part) => part
                .filter(|(_, whole)| *whole != 0)
                .map(|(part, whole)| format!("{:.1}", part as f64 / whole as f64 * 100.0)),
        };
        known.unwrap_or_else(|| "-".to_owned())
    }

    /// How much money it is, whichever way.
    pub fn magnitude(self) -> u64 {
        match self {
            Value::NanoUsd(Some(amount)) => amount.unsigned_abs(),
            _ => 0,
        }
    }
}

impl Column {
    /// Whether its amounts are for something, and add up to nothing.
    pub fn is_a_rate(&self) -> bool {
        self.name.contains("_per_")
    }

    /// Its name in CSV, where money is in dollars.
    pub fn csv_name(&self) -> String {
        self.name.replace("_nano_usd", "_usd")
    }
}

const fn column(
    name: &'static str,
    head: [&'static str; 2],
    shown: Shown,
    value: fn(&Line) -> Value,
) -> Column {
    Column {
        name,
        head,
        shown,
        value,
    }
}

fn count(line: &Line, of: impl Fn(&Figures) -> Option<u64>) -> Value {
    Value::Count(line.figures.as_ref().and_then(of))
}

fn micros(line: &Line, of: impl Fn(&Figures) -> Option<u64>) -> Value {
    Value::Micros(line.figures.as_ref().and_then(of))
}

/// Every figure.
pub const COLUMNS: &[Column] = {
    use Shown::{Always, InTables, NotInBills, WhereThereIsSome, WithInvoice};
    &[
        column("requests", ["requests", ""], Always, |l| {
            count(l, |f| Some(f.requests))
        }),
        column("ok", ["ok", ""], NotInBills, |l| count(l, |f| Some(f.ok))),
        column("errors", ["errors", ""], NotInBills, |l| {
            count(l, |f| Some(f.errors))
        }),
        column("aborted", ["aborted", ""], NotInBills, |l| {
            count(l, |f| Some(f.aborted))
        }),
        column("refused", ["refused", ""], NotInBills, |l| {
            count(l, |f| Some(f.refused))
        }),
        column("prompt_tokens", ["prompt", "tokens"], Always, |l| {
            count(l, |f| f.prompt_tokens)
        }),
        column("cached_tokens", ["cached", "tokens"], Always, |l| {
            count(l, |f| f.cached_tokens)
        }),
        column("completion_tokens", ["completion", "tokens"], Always, |l| {
            count(l, |f| f.completion_tokens)
        }),
        column("reasoning_tokens", ["reasoning", "tokens"], NotInBills, |l| {
            count(l, |f| f.reasoning_tokens)
        }),
        column("unknown_token_requests", ["unknown", "requests"], Always, |l| {
            count(l, |f| Some(f.unknown_token_requests))
        }),
        column("ttft_p50_us", ["TTFT p50", "ms"], NotInBills, |l| {
            micros(l, |f| f.ttft.p50_us)
        }),
        column("ttft_p95_us", ["TTFT p95", "ms"], NotInBills, |l| {
            micros(l, |f| f.ttft.p95_us)
        }),
        column("itl_p50_us", ["ITL p50", "ms"], NotInBills, |l| {
            micros(l, |f| f.itl.p50_us)
        }),
        column("itl_p95_us", ["ITL p95", "ms"], NotInBills, |l| {
            micros(l, |f| f.itl.p95_us)
        }),
        column("e2e_p50_us", ["E2E p50", "ms"], NotInBills, |l| {
            micros(l, |f| f.e2e.p50_us)
        }),
        column("e2e_p95_us", ["E2E p95", "ms"], NotInBills, |l| {
            micros(l, |f| f.e2e.p95_us)
        }),
        column("charge_nano_usd", ["charge", "USD"], Always, |l| {
            Value::NanoUsd(l.charge_nano_usd())
        }),
        column("cost_nano_usd", ["cost", "USD"], Always, |l| {
            Value::NanoUsd(l.cost_nano_usd())
        }),
        column("cost_share", ["of the", "bill %"], InTables, |l| {
            Value::Part(l.cost_nano_usd().zip(l.bill_nano_usd))
        }),
        column("idle_nano_usd", ["of it", "idle"], WhereThereIsSome, |l| {
            Value::NanoUsd(l.cost.and_then(|cost| cost.idle_nano_usd))
        }),
        column("recovery_nano_usd", ["over/under", "USD"], Always, |l| {
            Value::NanoUsd(l.recovery_nano_usd())
        }),
        column("recovery_share", ["of the", "cost %"], InTables, |l| {
            Value::Part(l.recovery_nano_usd().zip(l.cost_nano_usd()))
        }),
        column(
            "cost_per_million_tokens_nano_usd",
            ["USD per", "1M tokens"],
            Always,
            |l| Value::NanoUsd(l.cost_per_million_nano_usd()),
        ),
        column("actual_nano_usd", ["invoice", "USD"], WithInvoice, |l| {
            Value::NanoUsd(l.actual_nano_usd)
        }),
    ]
};

/// The names of what lines are grouped by.
pub fn key_names(by: &[Dimension]) -> impl Iterator<Item = &'static str> {
    by.iter().map(|dimension| dimension.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_columns_have_one_name() {
        for name in [|column: &Column| column.name.to_owned(), Column::csv_name] {
            let names: BTreeSet<_> = COLUMNS.iter().map(name).collect();
            assert_eq!(names.len(), COLUMNS.len());
        }
    }

    #[test]
    fn unknown_is_not_zero_and_times_are_in_milliseconds() {
        assert_eq!(Value::Count(None).shown(2), "-");
        assert_eq!(Value::Count(Some(0)).shown(2), "0");
        assert_eq!(Value::Micros(Some(20_040)).shown(2), "20.0");
        assert_eq!(Value::Micros(None).number(), None);
        assert_eq!(
            (Value::NanoUsd(None).shown(2), Value::NanoUsd(None).exact()),
            ("-".to_owned(), String::new())
        );
        assert_eq!(Value::NanoUsd(Some(-1_500_000_000)).shown(2), "-1.50");
        assert_eq!(Value::NanoUsd(Some(1)).exact(), "0.000000001");
        assert_eq!(
            (
                Value::Part(Some((1, 0))).shown(0),
                Value::Part(Some((-1, 8))).shown(0)
            ),
            ("-".to_owned(), "-12.5".to_owned())
        );
    }
}
