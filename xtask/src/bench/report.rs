//! What was measured, as a table for people and JSON for programs.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// One measurement of one proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// CPU time of the proxy for a request or a chunk, in microseconds.
    pub cpu_us_per_unit: f64,
    /// Requests or chunks in a second.
    pub units_per_s: f64,
    /// The most memory that the proxy has had resident so far.
    pub rss_max_bytes: u64,
}

/// A comparison under one load.
#[derive(Clone, Debug)]
pub struct Measured {
    /// `request` or `chunk`.
    pub unit: &'static str,
    /// Who was compared with whom.
    pub names: [&'static str; 2],
    /// Both samples of every round.
    pub samples: Vec<[Sample; 2]>,
}

/// All comparisons of a run.
#[derive(Clone, Debug, Default)]
pub struct Report(Vec<Measured>);

/// Median, least and most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Sample {
    /// The sample on one line.
    pub fn line(&self, unit: &str) -> String {
        let Sample {
            cpu_us_per_unit,
            units_per_s,
            ..
        } = self;
        format!(
            "{cpu_us_per_unit:>7.2} µs CPU a {unit}  {units_per_s:>8.0} {unit}s/s  {:>6.1} MiB",
            self.rss_max_mib()
        )
    }

    fn rss_max_mib(&self) -> f64 {
        self.rss_max_bytes as f64 / f64::from(1 << 20)
    }
}

impl Range {
    /// Of these values; without any, all are NaN.
    pub fn of(values: impl Iterator<Item = f64>) -> Range {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |position: usize| values.get(position).copied().unwrap_or(f64::NAN);
        let (low, high) = (at(values.len().saturating_sub(1) / 2), at(values.len() / 2));
        Range {
            median: (low + high) / 2.0,
            min: at(0),
            max: at(values.len().saturating_sub(1)),
        }
    }

    /// As JSON.
    pub fn json(self) -> Value {
        json!({"median": self.median, "min": self.min, "max": self.max})
    }
}

impl Measured {
    fn of(&self, who: usize, value: impl Fn(&Sample) -> f64) -> Range {
        Range::of(self.samples.iter().map(|pair| value(&pair[who])))
    }

    /// First to second, of neighbours.
    fn ratio(&self, value: impl Fn(&Sample) -> f64) -> Range {
        Range::of(self.samples.iter().map(|pair| value(&pair[0]) / value(&pair[1])))
    }

    fn json(&self) -> Value {
        let one = |who: usize| {
            json!({
                "name": self.names[who],
                "cpu_us": self.of(who, |sample| sample.cpu_us_per_unit).json(),
                "per_s": self.of(who, |sample| sample.units_per_s).json(),
                "rss_max_bytes": self.of(who, |sample| sample.rss_max_bytes as f64).max,
            })
        };
        json!({
            "unit": self.unit,
            "rounds": self.samples.len(),
            "proxies": [one(0), one(1)],
            "cpu_ratio": self.ratio(|sample| sample.cpu_us_per_unit).json(),
            "throughput_ratio": self.ratio(|sample| sample.units_per_s).json(),
        })
    }
}

impl Report {
    /// Adds a comparison.
    pub fn add(&mut self, measured: Measured) {
        self.0.push(measured);
    }

    /// Writes all of it as JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let loads: Vec<_> = self.0.iter().map(Measured::json).collect();
        write_json(file, &json!({ "loads": loads }))
    }
}

/// Writes a file, and the directory that it is in.
///
/// # Errors
/// When it cannot be written.
pub fn write_json(file: &Path, value: &Value) -> Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let text = serde_json::to_string_pretty(value)?;
    fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}

/// The slope of the straight line with the least squares, in units of the second for one of the first.
pub fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let joint: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let spread: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    joint / spread
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<34}{:>10}{:>10}{:>10}", "", "median", "min", "max")?;
        for measured in &self.0 {
            let unit = measured.unit;
            let mut row = |name: &str, figure: &str, range: Range, decimals: usize| {
                let Range { median, min, max } = range;
                let label = format!("{name:<17}{figure}");
                writeln!(
                    f,
                    "{label:<34}{median:>10.decimals$}{min:>10.decimals$}{max:>10.decimals$}"
                )
            };
            for (who, name) in measured.names.into_iter().enumerate() {
                row(
                    name,
                    &format!("CPU µs/{unit}"),
                    measured.of(who, |sample| sample.cpu_us_per_unit),
                    2,
                )?;
            }
            row(
                "ratio",
                &format!("CPU/{unit}"),
                measured.ratio(|sample| sample.cpu_us_per_unit),
                2,
            )?;
            for (who, name) in measured.names.into_iter().enumerate() {
                row(
                    name,
                    &format!("{unit}s/s"),
                    measured.of(who, |sample| sample.units_per_s),
                    0,
                )?;
            }
            for (who, name) in measured.names.into_iter().enumerate() {
                row(name, "peak RSS MiB", measured.of(who, Sample::rss_max_mib), 1)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(cpu_us_per_unit: f64) -> Sample {
        Sample {
            cpu_us_per_unit,
            units_per_s: 10.0,
            rss_max_bytes: 3 << 20,
        }
    }

    #[test]
    fn a_ratio_is_of_neighbours() {
        let samples = vec![
            [sample(2.0), sample(1.0)],
            [sample(40.0), sample(10.0)],
            [sample(9.0), sample(3.0)],
        ];
        let measured = Measured {
            unit: "request",
            names: ["a", "b"],
            samples,
        };
        let ratio = measured.ratio(|sample| sample.cpu_us_per_unit);
        assert_eq!(
            ratio,
            Range {
                median: 3.0,
                min: 2.0,
                max: 4.0
            }
        );
        let json = measured.json();
        assert_eq!(json["cpu_ratio"]["median"], 3.0);
        assert_eq!(
            json["proxies"][0]["cpu_us"],
            json!({"median": 9.0, "min": 2.0, "max": 40.0})
        );
        let table = Report(vec![measured]).to_string();
        assert!(
            table.contains("a                CPU µs/request") && table.contains("40.00"),
            "{table}"
        );
    }

    #[test]
    fn the_median_of_two_lies_between_them() {
        assert_eq!(
            Range::of([3.0, 1.0].into_iter()),
            Range {
                median: 2.0,
                min: 1.0,
                max: 3.0
            }
        );
    }

    #[test]
    fn a_slope_is_found_under_noise_that_cancels_out() {
        assert!((slope(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) - 2.0).abs() < 1e-12);
        assert!(slope(&[(0.0, 1.0), (1.0, 2.0), (2.0, 2.0), (3.0, 1.0)]).abs() < 1e-12);
    }
}
