//! A reader of the Prometheus text format, as far as the gateway writes it: no exemplars, no timestamps needed.
//!
//! Format: <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>.

use anyhow::{Context, Result, bail};

/// One line of a metrics page.
#[derive(Debug, PartialEq)]
pub struct Sample<'t> {
    /// The family, with `_bucket`, `_sum` or `_count` for a histogram.
    pub name: &'t str,
    labels: Vec<(&'t str, String)>,
    /// The number.
    pub value: f64,
}

impl Sample<'_> {
    /// The value of a label; an absent label and an empty one are the same.
    pub fn label(&self, name: &str) -> &str {
        let found = self.labels.iter().find(|(label, _)| *label == name);
        found.map_or("", |(_, value)| value)
    }
}

/// All samples of a page.
///
/// # Errors
/// Names the first line that is none.
pub fn parse(page: &str) -> Result<Vec<Sample<'_>>> {
    let lines = page.lines().enumerate();
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(index, line)| {
            sample(line).with_context(|| format!("line {} of the metrics: `{line}`", index + 1))
        })
        .collect()
}

fn sample(line: &str) -> Result<Sample<'_>> {
    let name_end = line
        .find(['{', ' '])
        .context("expected a value behind the name")?;
    let (name, rest) = line.split_at(name_end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    // A timestamp may follow the value.
    let value = rest.split_ascii_whitespace().next().context("expected a value")?;
    let value = value
        .parse()
        .with_context(|| format!("expected a number, found `{value}`"))?;
    Ok(Sample { name, labels, value })
}

/// Reads labels up to their closing brace; returns what stands behind it.
fn labels(mut rest: &str) -> Result<(Vec<(&str, String)>, &str)> {
    let mut found = Vec::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(behind) = rest.strip_prefix('}') {
            return Ok((found, behind));
        }
        let (name, behind) = rest.split_once("=\"").context("expected `name=\"`")?;
        let (value, behind) = quoted(behind)?;
        found.push((name, value));
        rest = behind;
    }
}

/// Reads a value whose opening quote has been read; returns what stands behind the closing one.
fn quoted(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped @ ('\\' | '"'))) => value.push(escaped),
                _ => bail!("expected \\n, \\\\ or \\\" in a label's value"),
            },
            _ => value.push(character),
        }
    }
    bail!("expected a closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_labels_and_values_are_read() {
        let page = "# HELP up 1\n# TYPE up gauge\nup 1\nreq_total{team=\"a\",code=\"200\"} 12 1700000000000\n\n\
                    lat_bucket{le=\"+Inf\",} 3e2\n";
        let samples = parse(page).expect("a page");
        let seen: Vec<_> = samples.iter().map(|sample| (sample.name, sample.value)).collect();
        assert_eq!(seen, [("up", 1.0), ("req_total", 12.0), ("lat_bucket", 300.0)]);
        assert_eq!((samples[1].label("team"), samples[1].label("code")), ("a", "200"));
        assert_eq!((samples[0].label("team"), samples[2].label("le")), ("", "+Inf"));
    }

    #[test]
    fn a_team_may_be_named_like_syntax() {
        let samples = parse(r#"r{team="a\"b},c=\\d{",x="1"} 2"#).expect("a page");
        assert_eq!(samples[0].label("team"), r#"a"b},c=\d{"#);
        assert_eq!((samples[0].label("x"), samples[0].value), ("1", 2.0));
    }

    #[test]
    fn a_broken_line_is_named() {
        for line in [
            "up",
            "up{a=\"b} 1",
            "up{a=1} 1",
            "up{a=\"\\x\"} 1",
            "up x",
            "up{a=\"b\"}",
        ] {
            let error = parse(&format!("ok 1\n{line}\n")).expect_err("broken");
            assert!(error.to_string().contains("line 2"), "{line}: {error}");
        }
    }
}
