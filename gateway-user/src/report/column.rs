//! The figures of a line, in their order: one list for all formats.

use crate::store::figures::{Dimension, Figures};

/// One figure of a line.
pub struct Column {
    /// Its name in CSV and JSON, with its unit.
    pub name: &'static str,
    /// Its head in a table: two lines, the second its unit there.
    pub head: [&'static str; 2],
    /// Where it comes from.
    pub value: fn(&Figures) -> Value,
}

/// A figure; unknown is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number of requests or tokens.
    Count(Option<u64>),
    /// A time in microseconds.
    Micros(Option<u64>),
}

impl Value {
    /// The bare number, in the unit of the column's name.
    pub fn number(self) -> Option<u64> {
        match self {
            Value::Count(number) | Value::Micros(number) => number,
        }
    }

    /// As a table shows it: times in milliseconds.
    pub fn shown(self) -> String {
        match self {
            Value::Count(Some(count)) => count.to_string(),
            Value::Micros(Some(micros)) => format!("{:.1}", micros as f64 / 1e3),
            Value::Count(None) | Value::Micros(None) => "-".to_owned(),
        }
    }
}

const fn column(name: &'static str, head: [&'static str; 2], value: fn(&Figures) -> Value) -> Column {
    Column { name, head, value }
}

/// Every figure.
pub const COLUMNS: &[Column] = &[
    column("requests", ["requests", ""], |f| Value::Count(Some(f.requests))),
    column("ok", ["ok", ""], |f| Value::Count(Some(f.ok))),
    column("errors", ["errors", ""], |f| Value::Count(Some(f.errors))),
    column("aborted", ["aborted", ""], |f| Value::Count(Some(f.aborted))),
    column("refused", ["refused", ""], |f| Value::Count(Some(f.refused))),
    column("prompt_tokens", ["prompt", "tokens"], |f| {
        Value::Count(f.prompt_tokens)
    }),
    column("cached_tokens", ["cached", "tokens"], |f| {
        Value::Count(f.cached_tokens)
    }),
    column("completion_tokens", ["completion", "tokens"], |f| {
        Value::Count(f.completion_tokens)
    }),
    column("reasoning_tokens", ["reasoning", "tokens"], |f| {
        Value::Count(f.reasoning_tokens)
    }),
    column("unknown_token_requests", ["unknown", "requests"], |f| {
        Value::Count(Some(f.unknown_token_requests))
    }),
    column("ttft_p50_us", ["TTFT p50", "ms"], |f| {
        Value::Micros(f.ttft.p50_us)
    }),
    column("ttft_p95_us", ["TTFT p95", "ms"], |f| {
        Value::Micros(f.ttft.p95_us)
    }),
    column("itl_p50_us", ["ITL p50", "ms"], |f| Value::Micros(f.itl.p50_us)),
    column("itl_p95_us", ["ITL p95", "ms"], |f| Value::Micros(f.itl.p95_us)),
    column("e2e_p50_us", ["E2E p50", "ms"], |f| Value::Micros(f.e2e.p50_us)),
    column("e2e_p95_us", ["E2E p95", "ms"], |f| Value::Micros(f.e2e.p95_us)),
];

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
        let names: BTreeSet<_> = COLUMNS.iter().map(|column| column.name).collect();
        assert_eq!(names.len(), COLUMNS.len());
    }

    #[test]
    fn unknown_is_not_zero_and_times_are_in_milliseconds() {
        assert_eq!(Value::Count(None).shown(), "-");
        assert_eq!(Value::Count(Some(0)).shown(), "0");
        assert_eq!(Value::Micros(Some(20_040)).shown(), "20.0");
        assert_eq!(Value::Micros(None).number(), None);
    }
}
