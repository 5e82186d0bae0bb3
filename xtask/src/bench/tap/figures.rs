//! Figures, what they should be, and whether they are.

use std::fmt::{self, Display, Formatter};
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::bench::report::{Range, write_json};

/// What a figure's median should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

struct Figure {
    name: String,
    range: Range,
    decimals: usize,
    target: Option<Target>,
}

/// All figures of a run, in the order in which they were found.
#[derive(Default)]
pub struct Figures(Vec<Figure>);

impl Target {
    /// Whether it is met; a figure that is none (NaN) meets nothing.
    pub fn holds(self, value: f64) -> bool {
        match self {
            Target::AtLeast(bound) => value >= bound,
            Target::AtMost(bound) => value <= bound,
        }
    }
}

impl Display for Target {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Target::AtLeast(bound) => write!(f, ">= {bound}"),
            Target::AtMost(bound) => write!(f, "<= {bound}"),
        }
    }
}

impl Figures {
    /// Adds one that was measured several times.
    pub fn add(
        &mut self,
        name: &str,
        values: impl Iterator<Item = f64>,
        decimals: usize,
        target: Option<Target>,
    ) {
        self.0.push(Figure {
            name: name.to_owned(),
            range: Range::of(values),
            decimals,
            target,
        });
    }

    /// Adds one that there is once.
    pub fn add_one(&mut self, name: &str, value: f64, decimals: usize, target: Option<Target>) {
        self.add(name, std::iter::once(value), decimals, target);
    }

    /// Writes all of it as JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let figures: Vec<_> = self.0.iter().map(Figure::json).collect();
        write_json(file, &json!({ "figures": figures }))
    }
}

impl Figure {
    fn holds(&self) -> Option<bool> {
        self.target.map(|target| target.holds(self.range.median))
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "value": self.range.json(),
            "target": self.target.map(|target| target.to_string()),
            "holds": self.holds(),
        })
    }
}

impl Display for Figures {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let head = ["median", "min", "max", "target"];
        let [median, min, max, target] = head;
        writeln!(f, "{:<46}{median:>10}{min:>10}{max:>10}{target:>12}  holds", "")?;
        for figure in &self.0 {
            let Figure {
                name,
                range,
                decimals,
                target,
            } = figure;
            let Range { median, min, max } = range;
            let target = target.map(|target| target.to_string()).unwrap_or_default();
            let holds = match figure.holds() {
                Some(true) => "  yes",
                Some(false) => "  no",
                None => "",
            };
            let numbers = format!("{median:>10.decimals$}{min:>10.decimals$}{max:>10.decimals$}");
            writeln!(
                f,
                "{}",
                format!("{name:<46}{numbers}{target:>12}{holds}").trim_end()
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_meets_its_target_up_to_the_bound_and_no_number_meets_none() {
        assert!(Target::AtLeast(0.9).holds(0.9) && !Target::AtLeast(0.9).holds(0.89));
        assert!(Target::AtMost(0.0).holds(0.0) && !Target::AtMost(0.0).holds(1.0));
        assert!(!Target::AtLeast(0.9).holds(f64::NAN) && !Target::AtMost(0.9).holds(f64::NAN));
    }

    #[test]
    fn the_table_and_the_json_say_what_holds() {
        let mut figures = Figures::default();
        figures.add(
            "throughput",
            [0.8, 0.95, 0.97].into_iter(),
            2,
            Some(Target::AtLeast(0.9)),
        );
        figures.add_one("lost", 3.0, 0, Some(Target::AtMost(0.0)));
        figures.add_one("records", 7.0, 0, None);
        let table = figures.to_string();
        let line = |name: &str| {
            table
                .lines()
                .find(|line| line.starts_with(name))
                .expect("its line")
        };
        assert!(line("throughput").ends_with(">= 0.9  yes"), "{table}");
        assert!(line("lost").ends_with("<= 0  no"), "{table}");
        assert!(line("records").ends_with('7'), "{table}");
        let json: Vec<_> = figures.0.iter().map(Figure::json).collect();
        assert_eq!(json[0]["value"]["median"], 0.95);
        assert_eq!(
            (json[0]["holds"].as_bool(), json[1]["holds"].as_bool()),
            (Some(true), Some(false))
        );
        assert!(json[2]["holds"].is_null());
    }
}
