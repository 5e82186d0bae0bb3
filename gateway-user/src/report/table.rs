//! The report for people: as wide as its content, and below it what a reader must know to read it.

use super::Report;
use super::amount;
use super::column::{Column, key_names};
use super::line::{Line, Whose};
use crate::command::time;

/// What stands for an empty name.
const NO_NAME: &str = "(none)";

/// What stands for the name of all groups together.
const ALL: &str = "= all";

/// Between two columns.
const GAP: &str = "  ";

/// All of it.
pub fn print(report: &Report) -> String {
    let columns: Vec<&Column> = report.columns(true).collect();
    let heads = [0, 1].map(|row| {
        let keys = key_names(&report.by).map(|name| if row == 0 { name } else { "" });
        let figures = columns.iter().map(|column| column.head[row]);
        keys.chain(figures).map(str::to_owned).collect()
    });
    let places: Vec<usize> = columns
        .iter()
        .map(|column| places_of(column, &columns, &report.lines))
        .collect();
    let figures = |line: &Line| {
        let values = columns.iter().zip(&places);
        values
            .map(|(column, places)| (column.value)(line).shown(*places))
            .collect::<Vec<_>>()
    };
    let lines = report
        .lines
        .iter()
        .map(|line| [names(&line.whose, report.by.len()), figures(line)].concat());
    let rows: Vec<Vec<String>> = heads.into_iter().chain(lines).collect();
    aligned(&rows, report.by.len()) + &footnotes(report)
}

/// All amounts of a table end in one place, so that they can be compared and added; those for a million tokens in one of their own.
fn places_of(column: &Column, columns: &[&Column], lines: &[Line]) -> usize {
    let beside = columns
        .iter()
        .filter(|other| other.is_a_rate() == column.is_a_rate());
    let values = beside.flat_map(|other| lines.iter().map(|line| (other.value)(line).magnitude()));
    amount::places_for(values.max().unwrap_or_default())
}

fn names(whose: &Whose, keys: usize) -> Vec<String> {
    let first = match whose {
        Whose::Group(names) => return names.iter().map(|name| shown_key(name)).collect(),
        Whose::Nobody(name) => name,
        Whose::Total => ALL,
    };
    let mut names = vec![String::new(); keys];
    if let Some(name) = names.first_mut() {
        *name = first.to_owned();
    }
    names
}

/// A name as a terminal may show it: clients choose models and teams, and none of them may move the cursor.
pub(super) fn shown_key(key: &str) -> String {
    if key.is_empty() {
        return NO_NAME.to_owned();
    }
    key.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// Names to the left, figures to the right.
pub(super) fn aligned(lines: &[Vec<String>], keys: usize) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let widest = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns)
        .map(|column| widest(column).unwrap_or_default())
        .collect();
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(&widths).enumerate();
        let cells: Vec<String> = cells
            .map(|(at, (cell, width))| {
                if at < keys {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        text += cells.join(GAP).trim_end();
        text.push('\n');
    }
    text
}

fn footnotes(report: &Report) -> String {
    let total = report.lines.iter().find(|line| line.whose == Whose::Total);
    let unknown = total
        .and_then(|line| line.figures.as_ref())
        .map_or(0, |figures| figures.unknown_token_requests);
    format!(
        "\nRequests that ended from {} until before {}; costs of the windows that began then.\n\
         With unknown tokens, although an engine may have worked on them: {unknown}. They add nothing to the sums; `-` is unknown.\n\
         Not in these figures: {}.\n\
         {}",
        time::format(report.period.from_us()),
        time::format(report.period.to_us()),
        report.lacks(),
        report.explained(),
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn every_group_has_a_line_the_total_the_last_and_unknown_is_a_dash() {
        let text = print(&report());
        let lines: Vec<&str> = text.lines().collect();
        let words = |at: usize| lines[at].split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(0)[..4], ["team", "model", "requests", "ok"]);
        assert_eq!(
            words(3),
            [
                "a,\"b\"", "m", "12", "9", "1", "1", "1", "1000", "0", "250", "-", "1", "20.0", "1000.0",
                "-", "-", "600.0", "600.0", "2.0000", "1.0000", "100.0", "0.2500", "1.0000", "100.0",
                "0.500000"
            ]
        );
        assert_eq!((words(4)[0], words(4)[18]), ("__down__", "0.0000"));
        assert_eq!(words(5)[..3], ["=", "all", "12"]);
        assert!(
            lines[0].len() == lines[5].len(),
            "figures end where their heads do:\n{text}"
        );
        assert!(text.contains("worked on them: 1."), "{text}");
        assert!(
            text.contains("Not in these figures: rows that wait in spool"),
            "{text}"
        );
    }

    #[test]
    fn a_name_that_a_client_chose_moves_no_cursor() {
        let text = print(&report());
        assert!(!text.contains('\u{1b}'), "{text}");
        assert!(text.contains("(none)") && text.contains("\\u{1b}[2J"), "{text}");
    }
}
