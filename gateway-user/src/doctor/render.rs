//! The report as text.

use super::{Report, Verdict};
use crate::config::Capture;
use std::fmt::Write;

/// Where lines are broken: a terminal's usual width with room for a mail's quotation marks.
const WIDTH: usize = 118;

/// For people: a line a check, what to do about it below, and at the end what it means.
pub(super) fn table(report: &Report) -> String {
    let wide = |text: fn(&super::Check) -> &str| {
        let lengths = report.checks.iter().map(|check| text(check).chars().count());
        lengths.max().unwrap_or(0)
    };
    let group_width = wide(|check| &check.group);
    let name_width = wide(|check| check.name);
    let indent = "problem".len() + group_width + name_width + 6;
    let mut out = String::new();
    for check in &report.checks {
        let head = format!(
            "{:7}  {:group_width$}  {:name_width$}  ",
            check.state.as_str(),
            check.group,
            check.name
        );
        push_wrapped(&mut out, &head, indent, &check.found);
        if !check.advice.is_empty() {
            push_wrapped(&mut out, &format!("{:indent$}→ ", ""), indent + 2, &check.advice);
        }
    }
    out.push('\n');
    verdict(&mut out, "proxy: ", &report.proxy);
    verdict(&mut out, "tap:   ", &report.tap);
    let _ = writeln!(
        out,
        "capture: auto would get {}{}",
        auto(report),
        configured(report)
    );
    out
}

/// One JSON object, on lines of its own.
pub(super) fn json(report: &Report) -> String {
    // Texts, numbers and lists: there is nothing in it that JSON cannot say.
    let mut text = serde_json::to_string_pretty(report).unwrap_or_default();
    text.push('\n');
    text
}

fn verdict(out: &mut String, head: &str, verdict: &Verdict) {
    match verdict.because.split_first() {
        None => {
            let _ = writeln!(out, "{head}can run");
        }
        Some((first, rest)) => {
            push_wrapped(out, &format!("{head}cannot run because "), head.len() + 2, first);
            for reason in rest {
                push_wrapped(
                    out,
                    &format!("{:1$}and because ", "", head.len()),
                    head.len() + 2,
                    reason,
                );
            }
        }
    }
}

fn auto(report: &Report) -> String {
    report.auto_gets.map_or_else(
        || "nothing: a gateway needs the proxy unless it is told to do without".to_owned(),
        |mode| mode.to_string(),
    )
}

fn configured(report: &Report) -> String {
    match report.capture {
        Capture::Auto => String::new(),
        other => format!(" (configured is {other})"),
    }
}

/// Writes `text` behind `head`, broken at spaces; what follows the first line is indented. A word that is too long stays whole.
fn push_wrapped(out: &mut String, head: &str, indent: usize, text: &str) {
    out.push_str(head);
    let mut at = head.chars().count();
    for (index, word) in text.split(' ').enumerate() {
        let length = word.chars().count();
        if index > 0 {
            if at + 1 + length > WIDTH {
                let _ = write!(out, "\n{:indent$}", "");
                at = indent;
            } else {
                out.push(' ');
                at += 1;
            }
        }
        out.push_str(word);
        at += length;
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Part};
    use super::*;

    fn report() -> Report {
        let checks = vec![
            Check::ok("host", "clock", "2026-01-01T00:00:00Z"),
            Check::problem("upstream chat", "reach", "refused ".repeat(20).trim_end())
                .advise("start it")
                .stops(Part::Tap),
        ];
        Report::new(checks, Capture::Tap)
    }

    #[test]
    fn a_line_has_state_found_and_advice_and_the_end_says_what_it_means() {
        let text = table(&report());
        assert!(
            text.starts_with(
                "ok       host           clock  2026-01-01T00:00:00Z\nproblem  upstream chat  reach  refused"
            ),
            "{text}"
        );
        assert!(
            text.contains("\n                               → start it\n"),
            "{text}"
        );
        assert!(
            text.ends_with("\ncapture: auto would get proxy (configured is tap)\n"),
            "{text}"
        );
        assert!(
            text.contains("\nproxy: can run\ntap:   cannot run because upstream chat, reach: refused"),
            "{text}"
        );
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
    }

    #[test]
    fn json_has_the_same() {
        let value: serde_json::Value = serde_json::from_str(&json(&report())).unwrap();
        assert_eq!(value["checks"][1]["state"], "problem");
        assert_eq!(value["checks"][1]["stops"], "tap");
        assert_eq!(value["proxy"]["can_run"], true);
        assert_eq!(value["tap"]["can_run"], false);
        assert_eq!(
            (&value["capture"], &value["auto_gets"], &value["exit_code"]),
            (&"tap".into(), &"proxy".into(), &10.into())
        );
    }
}
