//! The report as CSV (RFC 4180).
//!
//! A line of names, a line for each group, the ledger's lines that nobody has, and a line of all, which the first field tells apart (`group`, the line's
//! name, or `total`), since a group may well have no names. Unknown is an empty field; times are whole microseconds, money is in USD with all nine
//! places.

use super::Report;
use super::column::{Column, key_names};
use super::line::{Line, Whose};
use std::borrow::Cow;

/// All of it.
pub fn print(report: &Report) -> String {
    let columns: Vec<&Column> = report.columns(false).collect();
    let names = key_names(&report.by).map(str::to_owned);
    let names = names.chain(columns.iter().map(|column| column.csv_name()));
    let head = line(std::iter::once("row".to_owned()).chain(names));
    let lines = report
        .lines
        .iter()
        .map(|of| figures_line(of, report.by.len(), &columns));
    head + &lines.collect::<String>()
}

fn figures_line(of: &Line, keys: usize, columns: &[&Column]) -> String {
    let no_keys = || vec![String::new(); keys];
    let (row, keys) = match &of.whose {
        Whose::Group(keys) => ("group", keys.clone()),
        Whose::Nobody(name) => (name.as_str(), no_keys()),
        Whose::Total => ("total", no_keys()),
    };
    let values = columns.iter().map(|column| (column.value)(of).exact());
    line(std::iter::once(row.to_owned()).chain(keys).chain(values))
}

/// Fields as a line.
pub(super) fn line(fields: impl Iterator<Item = impl AsRef<str>>) -> String {
    let fields: Vec<String> = fields.map(|field| quoted(field.as_ref()).into_owned()).collect();
    fields.join(",") + "\r\n"
}

fn quoted(field: &str) -> Cow<'_, str> {
    if field.contains(['"', ',', '\r', '\n']) {
        Cow::Owned(format!("\"{}\"", field.replace('"', "\"\"")))
    } else {
        Cow::Borrowed(field)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn groups_and_the_total_can_be_told_apart_and_unknown_is_empty() {
        let text = print(&report());
        let lines: Vec<_> = text.split("\r\n").collect();
        assert!(
            lines[0].starts_with("row,team,model,requests,ok,errors,aborted,refused,prompt_tokens,"),
            "{text}"
        );
        assert!(
            lines[0].ends_with(",charge_usd,cost_usd,idle_usd,recovery_usd,cost_per_million_tokens_usd"),
            "{text}"
        );
        assert_eq!(
            lines[2],
            "group,\"a,\"\"b\"\"\",m,12,9,1,1,1,1000,0,250,,1,20040,1000000,,,600000,600001,2.000000001,1.000000000,0.250000000,1.000000001,0.500000000"
        );
        assert_eq!(lines[3], "__down__,,,,,,,,,,,,,,,,,,,,0.000000007,,,");
        assert_eq!(
            lines[4],
            "total,,,12,9,1,1,1,1000,0,250,,1,20040,1000000,,,600000,600001,2.000000001,1.000000007,0.250000000,0.999999994,0.500000004"
        );
        assert_eq!(lines[5..], [""]);
    }

    /// A reader as RFC 4180 describes it, for one line.
    fn read(line: &str) -> Vec<String> {
        let mut rest = line.strip_suffix("\r\n").expect("a line end");
        let mut fields = Vec::new();
        loop {
            let field = if let Some(mut inner) = rest.strip_prefix('"') {
                let mut field = String::new();
                loop {
                    let (before, behind) = inner.split_once('"').expect("a closing quote");
                    field += before;
                    match behind.strip_prefix('"') {
                        Some(more) => {
                            field.push('"');
                            inner = more;
                        }
                        None => {
                            rest = behind;
                            break field;
                        }
                    }
                }
            } else {
                let end = rest.find(',').unwrap_or(rest.len());
                let (field, behind) = rest.split_at(end);
                rest = behind;
                field.to_owned()
            };
            fields.push(field);
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => return fields,
            }
        }
    }

    proptest! {
        #[test]
        fn any_name_comes_back_out(fields in prop::collection::vec("[a-z\",\r\n é]{0,8}", 1..5)) {
            let text = line(fields.iter());
            prop_assert_eq!(read(&text), fields);
        }
    }
}
