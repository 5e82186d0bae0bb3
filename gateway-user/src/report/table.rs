//! The report for people: as wide as its content, and below it what a reader must know to read it.

use super::Report;
use super::column::{COLUMNS, key_names};
use super::time;
use crate::store::figures::Figures;

/// What stands for an empty name.
const NO_NAME: &str = "(none)";

/// What stands for the name of all groups together.
const ALL: &str = "= all";

/// Between two columns.
const GAP: &str = "  ";

/// All of it.
pub fn print(report: &Report) -> String {
    let keys = report.by.len();
    let mut lines = vec![
        head(key_names(&report.by), 0),
        head(report.by.iter().map(|_| ""), 1),
    ];
    for group in &report.figures.groups {
        let names = group.keys.iter().map(|key| shown_key(key));
        lines.push(line(names.collect(), &group.figures));
    }
    let mut all = vec![String::new(); keys];
    if let Some(first) = all.first_mut() {
        *first = ALL.to_owned();
    }
    lines.push(line(all, &report.figures.total));
    aligned(&lines, keys) + &footnotes(report)
}

fn head(keys: impl Iterator<Item = &'static str>, row: usize) -> Vec<String> {
    let figures = COLUMNS.iter().map(|column| column.head[row]);
    keys.chain(figures).map(str::to_owned).collect()
}

fn line(mut cells: Vec<String>, figures: &Figures) -> Vec<String> {
    cells.extend(COLUMNS.iter().map(|column| (column.value)(figures).shown()));
    cells
}

/// A name as a terminal may show it: clients choose models and teams, and none of them may move the cursor.
fn shown_key(key: &str) -> String {
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
fn aligned(lines: &[Vec<String>], keys: usize) -> String {
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
    format!(
        "\nRequests that ended from {} until before {}.\n\
         With unknown tokens, although an engine may have worked on them: {}. They add nothing to the sums; `-` is unknown.\n\
         Not in these figures: {}.\n",
        time::format(report.period.from_us()),
        time::format(report.period.to_us()),
        report.figures.total.unknown_token_requests,
        report.lacks()
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
                "-", "-", "600.0", "600.0"
            ]
        );
        assert_eq!(words(4)[..3], ["=", "all", "12"]);
        assert!(
            lines[0].len() == lines[4].len(),
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
