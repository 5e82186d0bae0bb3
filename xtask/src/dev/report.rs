//! What each team got, computed from the gateway's own metrics page.
//!
//! Percentiles are estimated as Prometheus does: linear within the bucket they fall into.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use anyhow::Result;

use super::samples::{self, Sample};

/// A table by team.
#[derive(Debug, Default)]
pub struct Report {
    teams: BTreeMap<String, Row>,
}

/// The counts of a team, or of all.
#[derive(Clone, Debug, Default)]
struct Row {
    requests: u64,
    completed: u64,
    aborted: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
}

impl Report {
    /// Reads a metrics page of the gateway.
    ///
    /// # Errors
    /// When it is none.
    pub fn of(page: &str) -> Result<Self> {
        let mut report = Self::default();
        for sample in samples::parse(page)? {
            if !sample.label("team").is_empty() {
                let team = sample.label("team").to_owned();
                report.teams.entry(team).or_default().add(&sample);
            }
        }
        Ok(report)
    }

    /// How many requests have ended.
    pub fn requests(&self) -> u64 {
        self.teams.values().map(|row| row.requests).sum()
    }
}

impl Row {
    fn add(&mut self, sample: &Sample<'_>) {
        // The gateway counts in whole numbers, and 2^53 requests are far away.
        let count = sample.value as u64;
        let bound_s = || sample.label("le").parse().unwrap_or(f64::INFINITY);
        match (sample.name, sample.label("type"), sample.label("outcome")) {
            ("gateway_requests_total", _, outcome) => {
                self.requests += count;
                match outcome {
                    "completed" => self.completed += count,
                    "aborted" => self.aborted += count,
                    _ => {}
                }
            }
            ("gateway_tokens_total", "prompt", _) => self.prompt_tokens += count,
            ("gateway_tokens_total", "completion", _) => self.completion_tokens += count,
            ("gen_ai_server_time_to_first_token_seconds_bucket", ..) => self.ttft.add(bound_s(), count),
            ("gateway_inter_token_latency_seconds_bucket", ..) => self.itl.add(bound_s(), count),
            // A request that was given up says nothing of how long one takes.
            ("gen_ai_server_request_duration_seconds_bucket", _, "completed") => {
                self.e2e.add(bound_s(), count)
            }
            _ => {}
        }
    }

    fn merge(mut self, other: &Self) -> Self {
        self.requests += other.requests;
        self.completed += other.completed;
        self.aborted += other.aborted;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.ttft.merge(&other.ttft);
        self.itl.merge(&other.itl);
        self.e2e.merge(&other.e2e);
        self
    }

    fn line(&self, name: &str) -> String {
        let errors = self.requests.saturating_sub(self.completed + self.aborted);
        format!(
            "{name:<16}{:>9}{:>9}{errors:>8}{:>9}{:>11}{:>12}{:>10}{:>10}{:>10}{:>10}",
            self.requests,
            self.completed,
            self.aborted,
            self.prompt_tokens,
            self.completion_tokens,
            self.ttft.quantile_ms(0.5),
            self.ttft.quantile_ms(0.95),
            self.itl.quantile_ms(0.95),
            self.e2e.quantile_ms(0.95),
        )
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<16}{:>9}{:>9}{:>8}{:>9}{:>11}{:>12}{:>10}{:>10}{:>10}{:>10}",
            "team",
            "requests",
            "ok",
            "errors",
            "aborted",
            "prompt",
            "completion",
            "TTFT p50",
            "TTFT p95",
            "ITL p95",
            "E2E p95"
        )?;
        writeln!(
            f,
            "{:<16}{:>9}{:>9}{:>8}{:>9}{:>11}{:>12}{:>10}{:>10}{:>10}{:>10}",
            "", "", "", "", "", "tokens", "tokens", "ms", "ms", "ms", "ms"
        )?;
        for (team, row) in &self.teams {
            writeln!(f, "{}", row.line(team))?;
        }
        let all = self.teams.values().fold(Row::default(), Row::merge);
        writeln!(f, "{}", all.line("= all"))
    }
}

/// Cumulative counts by upper bound; the bounds' bits order as the bounds do, since none is negative.
#[derive(Clone, Debug, Default)]
struct Histogram {
    buckets: BTreeMap<u64, u64>,
}

impl Histogram {
    fn add(&mut self, bound_s: f64, count: u64) {
        *self.buckets.entry(bound_s.to_bits()).or_default() += count;
    }

    fn merge(&mut self, other: &Self) {
        for (bound, count) in &other.buckets {
            *self.buckets.entry(*bound).or_default() += count;
        }
    }

    /// The quantile in milliseconds for a table; `-` without any observation, `>` the last bound beyond it.
    fn quantile_ms(&self, quantile: f64) -> String {
        match self.quantile_s(quantile) {
            None => "-".to_owned(),
            Some(Quantile::Within(seconds)) => format!("{:.1}", seconds * 1e3),
            Some(Quantile::Beyond(seconds)) => format!(">{:.0}", seconds * 1e3),
        }
    }

    fn quantile_s(&self, quantile: f64) -> Option<Quantile> {
        let total = *self.buckets.values().last()?;
        if total == 0 {
            return None;
        }
        let rank = quantile * total as f64;
        let (mut lower_s, mut below) = (0.0, 0);
        for (bound, count) in &self.buckets {
            let upper_s = f64::from_bits(*bound);
            if upper_s.is_infinite() {
                break;
            }
            if *count as f64 >= rank && *count > below {
                let share = (rank - below as f64) / (count - below) as f64;
                return Some(Quantile::Within(lower_s + (upper_s - lower_s) * share));
            }
            (lower_s, below) = (upper_s, *count);
        }
        Some(Quantile::Beyond(lower_s))
    }
}

/// Where a quantile lies, in seconds.
#[derive(Debug, PartialEq)]
enum Quantile {
    /// Here, as far as the buckets tell.
    Within(f64),
    /// Somewhere above the last finite bound.
    Beyond(f64),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(buckets: &[(f64, u64)]) -> Histogram {
        let mut histogram = Histogram::default();
        buckets
            .iter()
            .for_each(|(bound, count)| histogram.add(*bound, *count));
        histogram
    }

    #[test]
    fn quantiles_are_those_of_prometheus() {
        let latencies = histogram(&[(0.1, 10), (0.2, 10), (0.4, 30), (f64::INFINITY, 40)]);
        let within = |quantile| match latencies.quantile_s(quantile) {
            Some(Quantile::Within(seconds)) => seconds,
            other => panic!("expected a place within the buckets, found {other:?}"),
        };
        assert!((within(0.25) - 0.1).abs() < 1e-9, "the end of the first bucket");
        assert!(
            (within(0.5) - 0.3).abs() < 1e-9,
            "the middle of the third; the second is empty"
        );
        assert_eq!(latencies.quantile_s(0.95), Some(Quantile::Beyond(0.4)));
        assert_eq!(latencies.quantile_ms(0.95), ">400");
    }

    #[test]
    fn without_observations_there_is_no_quantile() {
        assert_eq!(histogram(&[]).quantile_s(0.5), None);
        assert_eq!(histogram(&[(1.0, 0), (f64::INFINITY, 0)]).quantile_ms(0.5), "-");
    }

    const PAGE: &str = r#"
gateway_requests_total{endpoint="/v1/chat/completions",model="m",outcome="completed",status="200",team="a"} 7
gateway_requests_total{endpoint="/v1/embeddings",model="e",outcome="completed",status="200",team="a"} 1
gateway_requests_total{endpoint="/v1/chat/completions",model="m",outcome="aborted",status="200",team="a"} 2
gateway_requests_total{endpoint="/v1/chat/completions",model="m",outcome="server_error",status="500",team="b"} 3
gateway_tokens_total{model="m",team="a",type="prompt"} 100
gateway_tokens_total{model="e",team="a",type="prompt"} 11
gateway_tokens_total{model="m",team="a",type="cached"} 64
gateway_tokens_total{model="m",team="a",type="completion"} 50
gen_ai_server_request_duration_seconds_bucket{model="m",outcome="completed",team="a",le="1"} 8
gen_ai_server_request_duration_seconds_bucket{model="m",outcome="completed",team="a",le="+Inf"} 8
gen_ai_server_request_duration_seconds_bucket{model="m",outcome="aborted",team="a",le="1"} 0
gen_ai_server_request_duration_seconds_bucket{model="m",outcome="aborted",team="a",le="+Inf"} 2
gateway_upstream_up{upstream="chat"} 1
"#;

    #[test]
    fn a_page_becomes_a_table_by_team() {
        let report = Report::of(PAGE).expect("a page");
        assert_eq!(report.requests(), 13);
        let text = report.to_string();
        let rows: Vec<Vec<&str>> = text
            .lines()
            .skip(2)
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            rows[0],
            ["a", "10", "8", "0", "2", "111", "50", "-", "-", "-", "950.0"]
        );
        assert_eq!(rows[1], ["b", "3", "0", "3", "0", "0", "0", "-", "-", "-", "-"]);
        assert_eq!(rows[2][..7], ["=", "all", "13", "8", "3", "2", "111"]);
        assert_eq!(rows.len(), 3, "no row for what has no team");
    }
}
