//! `vllm-gateway report --reconciliation`: what the engines counted against what requests are known to have used, a line for each upstream, with what
//! may explain a difference.

use super::Format;
use crate::command::time;
use crate::config::ReconciliationConfig;
use crate::ledger::{Cause, Totals, likely_causes};
use crate::store::figures::{Period, Reconciled};
use serde_json::{Value, json};

/// The columns, in all formats.
const COLUMNS: [&str; 11] = [
    "upstream",
    "engine_prompt_tokens",
    "attributed_prompt_tokens",
    "gap_prompt_tokens",
    "engine_completion_tokens",
    "attributed_completion_tokens",
    "gap_completion_tokens",
    "source",
    "gateways",
    "gap_exceeded",
    "likely_causes",
];

/// Between two columns of the table.
const GAP: &str = "  ";

/// One upstream, as it is printed.
struct Line<'a> {
    of: &'a Reconciled,
    is_exceeded: bool,
    causes: Vec<Cause>,
}

/// All of it.
pub(super) fn print(
    period: Period,
    found: &[Reconciled],
    bounds: &ReconciliationConfig,
    format: Format,
) -> String {
    let lines: Vec<Line<'_>> = found.iter().map(|of| Line::new(of, bounds)).collect();
    match format {
        Format::Table => table(period, &lines),
        // FOCUS has no columns for it, and was refused.
        Format::Csv | Format::Focus => csv(&lines),
        Format::Json => json(period, &lines),
    }
}

impl<'a> Line<'a> {
    fn new(of: &'a Reconciled, bounds: &ReconciliationConfig) -> Line<'a> {
        let is_beyond = |gap: u64, counted: u64| {
            gap > bounds.gap_tokens.into()
                && u128::from(gap) * 1_000_000 > u128::from(counted) * u128::from(bounds.gap_share.get())
        };
        let counted = of.counted.unwrap_or_default();
        let is_exceeded = is_beyond(of.gap.prompt_tokens, counted.prompt_tokens)
            || is_beyond(of.gap.completion_tokens, counted.completion_tokens);
        // What cannot be compared shows no gap, and is none the better for that.
        let is_doubtful = of.evidence.is_shared_address || of.evidence.is_unsupported;
        let causes = if is_exceeded || is_doubtful {
            likely_causes(&of.evidence)
        } else {
            Vec::new()
        };
        Line {
            of,
            is_exceeded,
            causes,
        }
    }

    /// In the order of the columns; `None` is unknown.
    fn cells(&self) -> [Value; COLUMNS.len()] {
        let of = self.of;
        let counted = |field: fn(Totals) -> u64| json!(of.counted.map(field));
        let (prompt, completion) = (
            |totals: Totals| totals.prompt_tokens,
            |totals: Totals| totals.completion_tokens,
        );
        let names: Vec<&str> = self.causes.iter().map(|cause| cause.name()).collect();
        [
            json!(of.upstream),
            counted(prompt),
            json!(prompt(of.attributed)),
            json!(prompt(of.gap)),
            counted(completion),
            json!(completion(of.attributed)),
            json!(completion(of.gap)),
            json!(if of.by_ledger { "ledger" } else { "scrapes" }),
            json!(of.gateways),
            json!(self.is_exceeded),
            json!(names),
        ]
    }

    fn shown(&self) -> Vec<String> {
        let show = |value: Value| match value {
            Value::Null => "-".to_owned(),
            Value::Bool(is_so) => if is_so { "yes" } else { "no" }.to_owned(),
            Value::String(text) => text.chars().flat_map(shown_char).collect(),
            Value::Array(names) => {
                let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
                names.join(" ")
            }
            number => number.to_string(),
        };
        self.cells().into_iter().map(show).collect()
    }
}

/// A name as a terminal may show it.
fn shown_char(c: char) -> impl Iterator<Item = char> {
    let escaped = c.is_control().then(|| c.escape_default());
    let plain = escaped.is_none().then_some(c);
    escaped.into_iter().flatten().chain(plain)
}

fn table(period: Period, lines: &[Line<'_>]) -> String {
    let head = COLUMNS.map(|column| column.replace('_', " "));
    let rows: Vec<Vec<String>> = std::iter::once(head.to_vec())
        .chain(lines.iter().map(Line::shown))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..COLUMNS.len()).filter_map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text += cells.join(GAP).trim_end();
        text.push('\n');
    }
    let (from, to) = (time::format(period.from_us()), time::format(period.to_us()));
    text += &format!("\nfrom {from} to {to}; tokens as the engines count them\n");
    for line in lines {
        for cause in &line.causes {
            let name: String = line.of.upstream.chars().flat_map(shown_char).collect();
            text += &format!("{name}: {}: {}\n", cause.name(), cause.advice());
        }
    }
    text
}

/// RFC 4180: every text in quotes.
fn csv(lines: &[Line<'_>]) -> String {
    let mut text = COLUMNS.join(",") + "\r\n";
    for line in lines {
        let cell = |value: Value| match value {
            Value::Null => String::new(),
            Value::String(name) => quoted(&name),
            Value::Array(names) => {
                let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
                quoted(&names.join(" "))
            }
            other => other.to_string(),
        };
        let cells = line.cells().map(cell);
        text += &cells.join(",");
        text += "\r\n";
    }
    text
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

fn json(period: Period, lines: &[Line<'_>]) -> String {
    let object = |line: &Line<'_>| -> Value {
        let cells = COLUMNS.into_iter().map(str::to_owned).zip(line.cells());
        Value::Object(cells.collect())
    };
    let document = json!({
        "from": time::format(period.from_us()),
        "to": time::format(period.to_us()),
        "upstreams": lines.iter().map(object).collect::<Vec<_>>(),
    });
    format!("{document:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Evidence;

    fn found() -> Vec<Reconciled> {
        let totals = |prompt_tokens, completion_tokens| Totals {
            prompt_tokens,
            completion_tokens,
        };
        let chat = Reconciled {
            upstream: "chat".to_owned(),
            counted: Some(totals(1_000_000, 500_000)),
            attributed: totals(900_000, 499_000),
            gap: totals(100_000, 1_000),
            by_ledger: true,
            gateways: 2,
            evidence: Evidence {
                direct: 3,
                is_tapped: true,
                ..Evidence::default()
            },
        };
        let unseen = Reconciled {
            upstream: "a\"b\u{1b}".to_owned(),
            attributed: totals(7, 0),
            ..Reconciled::default()
        };
        vec![chat, unseen]
    }

    fn printed(format: Format) -> String {
        let period = Period::new(1_764_547_200_000_000, 1_764_550_800_000_000).expect("an hour");
        print(period, &found(), &ReconciliationConfig::default(), format)
    }

    #[test]
    fn a_gap_beyond_its_bound_has_its_causes_and_what_to_do() {
        let text = printed(Format::Table);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("chat") && lines[1].ends_with("yes           direct"),
            "{text}"
        );
        assert!(
            lines[2].starts_with("a\"b\\u{1b}") && lines[2].contains(" - ") && lines[2].ends_with("no"),
            "{text}"
        );
        assert!(text.contains("\nchat: direct: requests go there past"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn the_other_formats_say_the_same() {
        let csv = printed(Format::Csv);
        assert!(
            csv.contains(
                "\r\n\"chat\",1000000,900000,100000,500000,499000,1000,\"ledger\",2,true,\"direct\"\r\n"
            ),
            "{csv}"
        );
        assert!(
            csv.contains("\r\n\"a\"\"b\u{1b}\",,7,0,,0,0,\"scrapes\",0,false,\"\"\r\n"),
            "{csv}"
        );
        let json: Value = serde_json::from_str(&printed(Format::Json)).expect("JSON");
        assert_eq!(json["upstreams"][0]["likely_causes"], json!(["direct"]));
        assert_eq!(json["upstreams"][1]["engine_prompt_tokens"], Value::Null);
        assert_eq!(json["from"], "2025-12-01T00:00:00Z");
    }
}
