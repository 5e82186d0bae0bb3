//! What a run amounted to: a table for people, JSON for programs.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use serde::Serialize;

use crate::failure::Outcome;
use crate::histogram::{Figures, Histogram};
use crate::stats::{Stats, TeamStats};
use crate::target::team_name;

/// The whole of a run.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Requests that ended, however: the sum of `by_outcome`.
    pub requests: u64,
    /// Requests that went out whole.
    pub sent: u64,
    /// Requests that ended well.
    pub ok: u64,
    /// Requests that were streamed.
    pub streamed: u64,
    /// Whether the run was ended before its time.
    pub interrupted: bool,
    /// The seed that repeats it.
    pub seed: u64,
    /// From the first request to the end of the last.
    pub duration_s: f64,
    /// Requests that ended in a second.
    pub rate_per_s: f64,
    /// Requests by outcome; every outcome is there.
    pub by_outcome: BTreeMap<&'static str, u64>,
    /// Responses by status.
    pub by_status: BTreeMap<u16, u64>,
    /// Failures by cause.
    pub by_error: BTreeMap<&'static str, u64>,
    /// Requests by endpoint.
    pub by_endpoint: BTreeMap<&'static str, u64>,
    /// Requests and tokens by team; every team is there.
    pub by_team: BTreeMap<String, TeamStats>,
    /// All prompt tokens that usage showed.
    pub prompt_tokens: u64,
    /// All completion tokens that usage showed.
    pub completion_tokens: u64,
    /// Chunks with content.
    pub chunks: u64,
    /// Requests sent a second time since the server had closed an idle connection.
    pub retries: u64,
    /// Connections opened, or tried.
    pub connects: u64,
    /// Bytes written.
    pub bytes_sent: u64,
    /// Bytes read.
    pub bytes_received: u64,
    /// The distributions of times.
    pub latency: Latencies,
}

/// Distributions in microseconds; absent when nothing was measured. In an open loop all but `itl` count from
/// the moment at which a request was due.
#[derive(Debug, Serialize)]
pub struct Latencies {
    /// To the response's first byte.
    pub first_byte: Option<Figures>,
    /// To the first chunk with content, of streams.
    pub ttft: Option<Figures>,
    /// Between chunks with content, of streams.
    pub itl: Option<Figures>,
    /// To the end, of requests that ended well.
    pub e2e: Option<Figures>,
    /// From when a request was due to when the generator began with it: what of the others is its own doing.
    pub lag: Option<Figures>,
}

/// What a summary says besides what was counted.
#[derive(Clone, Copy, Debug)]
pub struct RunFacts {
    /// The seed.
    pub seed: u64,
    /// How many teams there are.
    pub teams: usize,
    /// How long it took.
    pub duration: Duration,
    /// Whether it was ended before its time.
    pub interrupted: bool,
}

impl Summary {
    /// Sums a run up.
    pub fn new(stats: &Stats, facts: RunFacts) -> Self {
        let RunFacts {
            seed,
            teams,
            duration,
            interrupted,
        } = facts;
        let duration_s = duration.as_secs_f64();
        let team = |position: usize| stats.by_team.get(position).copied().unwrap_or_default();
        let by_team: BTreeMap<_, _> = (0..teams)
            .map(|position| (team_name(position), team(position)))
            .collect();
        let mut total = TeamStats::default();
        by_team.values().for_each(|team| total.add(team));
        Self {
            requests: stats.requests,
            sent: stats.sent,
            ok: stats.outcome(Outcome::Ok),
            streamed: stats.streamed,
            interrupted,
            seed,
            duration_s,
            rate_per_s: if duration_s > 0.0 {
                stats.requests as f64 / duration_s
            } else {
                0.0
            },
            by_outcome: Outcome::ALL
                .iter()
                .map(|outcome| (outcome.name(), stats.outcome(*outcome)))
                .collect(),
            by_status: stats.by_status.clone(),
            by_error: stats.by_error.clone(),
            by_endpoint: stats
                .by_endpoint
                .iter()
                .map(|(endpoint, n)| (endpoint.name(), *n))
                .collect(),
            by_team,
            prompt_tokens: total.prompt_tokens,
            completion_tokens: total.completion_tokens,
            chunks: stats.chunks,
            retries: stats.retries,
            connects: stats.connects,
            bytes_sent: stats.bytes_sent,
            bytes_received: stats.bytes_received,
            latency: Latencies {
                first_byte: Histogram::figures(&stats.first_byte),
                ttft: Histogram::figures(&stats.ttft),
                itl: Histogram::figures(&stats.itl),
                e2e: Histogram::figures(&stats.e2e),
                lag: Histogram::figures(&stats.lag),
            },
        }
    }
}

/// A table shows this many teams; the JSON shows all.
const TEAMS_SHOWN: usize = 20;

impl Display for Summary {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let note = if self.interrupted { ", interrupted" } else { "" };
        writeln!(
            f,
            "{} requests in {:.2} s ({:.1}/s): {} sent, {} ok{note}",
            self.requests, self.duration_s, self.rate_per_s, self.sent, self.ok
        )?;
        writeln!(
            f,
            "{} streamed ({} chunks), {} connections, {} retries, {} out, {} in",
            self.streamed,
            self.chunks,
            self.connects,
            self.retries,
            Bytes(self.bytes_sent),
            Bytes(self.bytes_received)
        )?;
        counts(f, "outcome", self.by_outcome.iter().filter(|(_, n)| **n > 0))?;
        counts(f, "status", self.by_status.iter())?;
        counts(f, "error", self.by_error.iter())?;
        counts(f, "endpoint", self.by_endpoint.iter())?;
        self.latency_table(f)?;
        self.team_table(f)
    }
}

impl Summary {
    fn latency_table(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Latencies {
            first_byte,
            ttft,
            itl,
            e2e,
            lag,
        } = &self.latency;
        writeln!(
            f,
            "\n{:<12}{:>10}{:>11}{:>11}{:>11}{:>11}{:>11}",
            "", "count", "mean", "p50", "p95", "p99", "max"
        )?;
        let rows = [
            ("first byte", first_byte),
            ("TTFT", ttft),
            ("ITL", itl),
            ("E2E", e2e),
            ("own lag", lag),
        ];
        for (name, figures) in rows
            .iter()
            .filter_map(|(name, figures)| figures.map(|figures| (name, figures)))
        {
            let Figures {
                count,
                mean_us,
                p50_us,
                p95_us,
                p99_us,
                max_us,
            } = figures;
            write!(f, "{name:<12}{count:>10}")?;
            for micros in [mean_us, p50_us, p95_us, p99_us, max_us] {
                write!(f, "{:>11}", Millis(micros).to_string())?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    fn team_table(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<12}{:>10}{:>10}{:>16}{:>20}",
            "team", "requests", "ok", "prompt tokens", "completion tokens"
        )?;
        let mut teams: Vec<_> = self.by_team.iter().collect();
        // By number, since `team-10` would come before `team-2`.
        teams.sort_by_key(|(name, _)| (name.len(), *name));
        for (name, team) in teams.iter().take(TEAMS_SHOWN) {
            let TeamStats {
                requests,
                ok,
                prompt_tokens,
                completion_tokens,
            } = team;
            writeln!(
                f,
                "{name:<12}{requests:>10}{ok:>10}{prompt_tokens:>16}{completion_tokens:>20}"
            )?;
        }
        if let Some(more) = teams.len().checked_sub(TEAMS_SHOWN).filter(|more| *more > 0) {
            writeln!(f, "and {more} more teams")?;
        }
        let (prompt, completion) = (self.prompt_tokens, self.completion_tokens);
        writeln!(
            f,
            "{:<12}{:>10}{:>10}{prompt:>16}{completion:>20}",
            "all", self.requests, self.ok
        )
    }
}

fn counts<K: Display, V: Display>(
    f: &mut Formatter<'_>,
    title: &str,
    entries: impl Iterator<Item = (K, V)>,
) -> fmt::Result {
    let line: Vec<_> = entries.map(|(key, count)| format!("{key} {count}")).collect();
    if line.is_empty() {
        Ok(())
    } else {
        writeln!(f, "{title:<10}{}", line.join(", "))
    }
}

/// Microseconds, shown as milliseconds.
struct Millis(u64);

impl Display for Millis {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} ms", self.0 / 1000, self.0 % 1000)
    }
}

/// Bytes, shown in the decimal unit that fits.
struct Bytes(u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (mut amount, mut unit) = (self.0 as f64, "B");
        for larger in ["kB", "MB", "GB", "TB"] {
            if amount < 1000.0 {
                break;
            }
            (amount, unit) = (amount / 1000.0, larger);
        }
        let digits = usize::from(unit != "B");
        write!(f, "{amount:.digits$} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        let mut stats = Stats {
            requests: 3,
            sent: 3,
            bytes_received: 123_456,
            ..Stats::default()
        };
        stats.by_outcome[0] = 2;
        stats.by_outcome[2] = 1;
        stats.by_status = [(200, 2), (503, 1)].into();
        stats.by_team = vec![TeamStats {
            requests: 3,
            ok: 2,
            prompt_tokens: 40,
            completion_tokens: 9,
        }];
        stats.e2e.record(1500);
        let facts = RunFacts {
            seed: 7,
            teams: 12,
            duration: Duration::from_secs(2),
            interrupted: false,
        };
        Summary::new(&stats, facts)
    }

    #[test]
    fn the_json_has_every_team_and_outcome_under_stable_names() {
        let json = serde_json::to_value(summary()).expect("JSON");
        assert_eq!(json["sent"], 3);
        assert_eq!(json["by_outcome"]["http_error"], 1);
        assert_eq!(json["by_outcome"]["timeout"], 0);
        assert_eq!(json["by_status"]["503"], 1);
        assert_eq!(json["by_team"]["team-1"]["completion_tokens"], 9);
        assert_eq!(json["by_team"]["team-12"]["requests"], 0);
        assert_eq!(
            (&json["rate_per_s"], &json["prompt_tokens"]),
            (&1.5.into(), &40.into())
        );
        assert_eq!(json["latency"]["e2e"]["p99_us"], 1500);
        assert!(json["latency"]["ttft"].is_null());
    }

    #[test]
    fn the_table_is_aligned_and_sorted_by_number() {
        let text = summary().to_string();
        let position = |name: &str| {
            text.find(&format!("\n{name} "))
                .unwrap_or_else(|| panic!("no {name}: {text}"))
        };
        assert!(position("team-2") < position("team-10"), "{text}");
        assert!(text.contains("1.500 ms") && text.contains("123.5 kB"), "{text}");
        let of_teams: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("team-"))
            .map(str::len)
            .collect();
        assert!(of_teams.iter().all(|length| *length == of_teams[0]), "{text}");
    }
}
