//! The report as CSV (RFC 4180).
//!
//! A line of names, a line for each group, and a line of all, which the first field tells apart (`group` or `total`), since a group may well have no
//! names. Unknown is an empty field; times are whole microseconds.

use super::Report;
use super::column::{COLUMNS, key_names};
use crate::store::figures::Figures;
use std::borrow::Cow;

/// All of it.
pub fn print(report: &Report) -> String {
    let names = key_names(&report.by).chain(COLUMNS.iter().map(|column| column.name));
    let mut text = line(std::iter::once("row").chain(names));
    for group in &report.figures.groups {
        text += &figures_line("group", group.keys.iter().map(String::as_str), &group.figures);
    }
    let no_keys = report.by.iter().map(|_| "");
    text + &figures_line("total", no_keys, &report.figures.total)
}

fn figures_line<'k>(row: &'k str, keys: impl Iterator<Item = &'k str>, figures: &Figures) -> String {
    let names = std::iter::once(row).chain(keys).map(str::to_owned);
    let values = COLUMNS.iter().map(|column| {
        let number = (column.value)(figures).number();
        number.map_or(String::new(), |number| number.to_string())
    });
    line(names.chain(values))
}

fn line(fields: impl Iterator<Item = impl AsRef<str>>) -> String {
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
        assert_eq!(
            lines[2],
            "group,\"a,\"\"b\"\"\",m,12,9,1,1,1,1000,0,250,,1,20040,1000000,,,600000,600001"
        );
        assert_eq!(
            lines[3],
            "total,,,12,9,1,1,1,1000,0,250,,1,20040,1000000,,,600000,600001"
        );
        assert_eq!(lines[4..], [""]);
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
