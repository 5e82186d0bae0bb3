//! Reader of Prometheus' text format (version 0.0.4), as far as a scrape of vLLM needs it.
//!
//! It gives the samples one after the other and never panics. What only OpenMetrics has (exemplars, fractional timestamps, `# EOF`) is
//! stepped over. Timestamps are not returned, `# TYPE` is not believed: what a name means is known beforehand (`families`).
//! A line that breaks the format is told as such, and the next line is read as if nothing had happened: whoever asked decides
//! whether it matters.
//!
//! The format: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use std::borrow::Cow;

/// One sample. Its parts are borrowed from the page.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample<'p> {
    /// Name with all suffixes, such as `_total` or `_bucket`.
    pub name: &'p str,
    /// Names and values of the labels, in the order of the page.
    pub labels: Vec<(&'p str, Cow<'p, str>)>,
    /// May be infinite or NaN.
    pub value: f64,
}

impl Sample<'_> {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| &**value)
    }
}

/// A line that is no sample, no comment and not empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {number} breaks the text format")]
pub struct BadLine<'p> {
    /// Counted from 1.
    pub number: usize,
    /// The line itself. Not part of the message: a page that is not Prometheus' may hold anything.
    pub line: &'p str,
}

/// The samples of `page`.
///
/// The format wants a line end behind the last line too; without one the page was cut off, perhaps within a number, so that the last
/// line is a bad one.
pub fn samples(page: &str) -> impl Iterator<Item = Result<Sample<'_>, BadLine<'_>>> {
    page.split_inclusive('\n')
        .enumerate()
        .filter_map(|(index, line)| {
            let bad = BadLine {
                number: index + 1,
                line,
            };
            let Some(line) = line.strip_suffix('\n') else {
                return (!is_comment(line)).then_some(Err(bad));
            };
            if is_comment(line) {
                None
            } else {
                Some(sample(line).ok_or(bad))
            }
        })
}

fn is_comment(line: &str) -> bool {
    let line = line.trim_ascii();
    line.is_empty() || line.starts_with('#')
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let mut rest = line.trim_ascii();
    let name = take_name(&mut rest, |byte| byte == b':')?;
    let had_blank = skip_blanks(&mut rest);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        labels = take_labels(&mut rest)?;
        skip_blanks(&mut rest);
    } else if !had_blank {
        return None;
    }
    let value = take_number(&mut rest)?;
    // A timestamp or an exemplar may follow, or both.
    if !rest.is_empty() && !rest.starts_with('#') {
        take_number(&mut rest)?;
    }
    (rest.is_empty() || rest.starts_with('#')).then_some(Sample { name, labels, value })
}

/// The labels up to and with the closing brace; a comma may stand before that.
fn take_labels<'p>(rest: &mut &'p str) -> Option<Vec<(&'p str, Cow<'p, str>)>> {
    let mut labels = Vec::new();
    loop {
        skip_blanks(rest);
        if take(rest, '}') {
            return Some(labels);
        }
        let name = take_name(rest, |_| false)?;
        skip_blanks(rest);
        if !take(rest, '=') {
            return None;
        }
        skip_blanks(rest);
        labels.push((name, take_quoted(rest)?));
        skip_blanks(rest);
        if !take(rest, ',') && !rest.starts_with('}') {
            return None;
        }
    }
}

/// A name: letters, digits and `_`, and what `also` allows; no digit first.
fn take_name<'p>(rest: &mut &'p str, also: fn(u8) -> bool) -> Option<&'p str> {
    let holds = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || also(byte);
    let end = rest.bytes().position(|byte| !holds(byte)).unwrap_or(rest.len());
    let (name, after) = rest.split_at(end);
    *rest = after;
    (!name.is_empty() && !name.starts_with(|first: char| first.is_ascii_digit())).then_some(name)
}

/// A label's value: `\\`, `\"` and `\n` are escapes, anything else behind a backslash stands for itself, backslash included.
fn take_quoted<'p>(rest: &mut &'p str) -> Option<Cow<'p, str>> {
    let text = rest.strip_prefix('"')?;
    let mut unescaped: Option<String> = None;
    let mut kept = 0;
    let mut from = 0;
    loop {
        // Both are ASCII, so that every cut is at a character's boundary.
        let at = from + memchr::memchr2(b'"', b'\\', &text.as_bytes()[from..])?;
        if text.as_bytes()[at] == b'"' {
            *rest = &text[at + 1..];
            let tail = &text[kept..at];
            return Some(match unescaped {
                None => Cow::Borrowed(tail),
                Some(before) => Cow::Owned(before + tail),
            });
        }
        let meant = match text.as_bytes().get(at + 1)? {
            b'n' => '\n',
            b'"' => '"',
            b'\\' => '\\',
            _ => {
                from = at + 1;
                continue;
            }
        };
        let so_far = unescaped.get_or_insert_default();
        so_far.push_str(&text[kept..at]);
        so_far.push(meant);
        (kept, from) = (at + 2, at + 2);
    }
}

/// A number and the blanks behind it. Rust's own reading knows `+Inf`, `-Inf` and `NaN` in any case.
fn take_number(rest: &mut &str) -> Option<f64> {
    let end = rest.find([' ', '\t']).unwrap_or(rest.len());
    let number = rest[..end].parse().ok()?;
    *rest = &rest[end..];
    skip_blanks(rest);
    Some(number)
}

fn take(rest: &mut &str, wanted: char) -> bool {
    let after = rest.strip_prefix(wanted);
    *rest = after.unwrap_or(rest);
    after.is_some()
}

/// Steps over blanks; whether there were any.
fn skip_blanks(rest: &mut &str) -> bool {
    let after = rest.trim_start_matches([' ', '\t']);
    let any = after.len() < rest.len();
    *rest = after;
    any
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(line: &str) -> Option<Sample<'_>> {
        sample(line)
    }

    fn labels_of(line: &str) -> Vec<(String, String)> {
        let sample = one(line).unwrap_or_else(|| panic!("{line:?} is a sample"));
        sample
            .labels
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.to_string()))
            .collect()
    }

    fn pairs(labels: &[(&str, &str)]) -> Vec<(String, String)> {
        labels
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn values_of_every_kind() {
        let value = |line| one(line).map(|sample| sample.value);
        assert_eq!(value("a 1"), Some(1.0));
        assert_eq!(value("a\t1.7953552487e+09"), Some(1_795_355_248.7));
        assert_eq!(value("  a{}  -0.5  "), Some(-0.5));
        assert_eq!(value("a{}3 1700000000000"), Some(3.0));
        assert_eq!(value("a +Inf"), Some(f64::INFINITY));
        assert_eq!(value("a -Inf"), Some(f64::NEG_INFINITY));
        assert!(value("a NaN").is_some_and(f64::is_nan));
        assert_eq!(value("a 1\r"), Some(1.0), "lines may end as Windows' do");
    }

    #[test]
    fn what_only_openmetrics_has_is_stepped_over() {
        let bucket = r#"a_bucket{le="1.0"} 7 1520879607.789 # {trace_id="b c",x="}"} 0.67 1520879606.5"#;
        assert_eq!(one(bucket).map(|sample| sample.value), Some(7.0));
        assert_eq!(
            one(r#"a_total 7 # {} 0.67"#).map(|sample| sample.value),
            Some(7.0)
        );
        let page = "# TYPE a counter\n# UNIT a seconds\na_total 7\n# EOF\n";
        assert_eq!(samples(page).collect::<Vec<_>>(), [Ok(one("a_total 7").unwrap())]);
        assert_eq!(samples("a_total 7\n# EOF").filter(Result::is_ok).count(), 1);
    }

    #[test]
    fn label_values_may_hold_anything() {
        let name = r#"a{model_name="org/\"x\" {1,2} = \\ # \n \d é",b=""} 1"#;
        assert_eq!(
            labels_of(name),
            pairs(&[("model_name", "org/\"x\" {1,2} = \\ # \n \\d é"), ("b", "")])
        );
        assert_eq!(
            labels_of(r#"a { b = "1" , c = "2" , } 1"#),
            pairs(&[("b", "1"), ("c", "2")])
        );
        assert_eq!(one(r#"a{b="1",b="2"} 1"#).unwrap().label("b"), Some("1"));
    }

    #[test]
    fn a_line_that_breaks_the_format_is_told_and_the_next_one_read() {
        for bad in [
            "<html>",
            "a",
            "a ",
            "a b",
            "1a 1",
            "a1",
            "a{",
            "a{b} 1",
            "a{b=1} 1",
            "a{b=\"1} 1",
            "a{b=\"1\"",
            "a{b=\"1\"c=\"2\"} 1",
            "a{b=\"\\",
            "a{,} 1",
            "a 1 2 3",
            "a 1 x",
            "{\"a\"} 1",
            "a-b 1",
            "é 1",
            "a 0x1",
        ] {
            let page = format!("{bad}\nnext 1\n");
            let read: Vec<_> = samples(&page).collect();
            let line = &page[..=bad.len()];
            assert_eq!(read[0], Err(BadLine { number: 1, line }), "{bad:?}");
            assert_eq!(read[1].as_ref().map(|sample| sample.name), Ok("next"), "{bad:?}");
        }
    }

    #[test]
    fn a_page_that_was_cut_off_within_a_number_does_not_give_another_number() {
        assert_eq!(
            samples("a 1").collect::<Vec<_>>(),
            [Err(BadLine {
                number: 1,
                line: "a 1"
            })]
        );
        assert_eq!(samples("a 1\n\n").count(), 1);
    }

    proptest! {
        #[test]
        fn never_panics(page in r#"([a-z:_]{1,3}|[{}"=,\\# \n\tNaInf0-9.+-]|\PC){0,60}"#) {
            for sample in samples(&page).flatten() {
                prop_assert!(!sample.name.is_empty());
            }
        }

        /// Whatever a label holds comes back when it was written as the format says.
        #[test]
        fn what_was_written_is_read(
            name in "[a-zA-Z_:][a-zA-Z0-9_:]{0,8}",
            labels in proptest::collection::vec(("[a-zA-Z_][a-zA-Z0-9_]{0,5}", r#"([\\"n{},=# ]|\PC|\n){0,12}"#), 0..4),
            value in proptest::num::f64::ANY,
        ) {
            let escaped = |text: &str| text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
            let written = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
            let line = format!("{name}{{{}}} {value}", written.collect::<Vec<_>>().join(","));
            let read = one(&line).unwrap();
            prop_assert_eq!(read.name, &name);
            prop_assert!(read.value == value || (read.value.is_nan() && value.is_nan()));
            prop_assert_eq!(labels_of(&line), labels);
        }
    }
}
