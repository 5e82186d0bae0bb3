//! What engines did in each window of a period, and in what time: what weights are fitted to.

use std::collections::BTreeMap;

use clickhouse::Row;
use serde::Deserialize;

use super::Period;
use super::error::ReadError;
use super::reader::FiguresReader;
use crate::ledger::{Micros, Span, Window};

/// What the requests of one upstream had done in a window.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowWork {
    /// Which.
    pub window: Window,
    /// Time in which any of them ran, in microseconds.
    pub busy_us: u64,
    /// Prompt tokens that did not come out of the prefix cache.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Tokens in the KV cache, times seconds.
    pub kv_token_seconds: f64,
    /// Steps of the engine; `None` where it was not scraped on both sides of all of the window, or does not tell.
    pub steps: Option<f64>,
}

/// Of each upstream the windows in which anything ran, in order of time.
pub type WorkByUpstream = BTreeMap<String, Vec<WindowWork>>;

/// A scrape that is earlier or later than this by the clocks of two machines, or for the milliseconds that it is stored in, still covers a window.
const SLACK_US: u64 = 50_000;

impl FiguresReader {
    /// The work of `period`'s windows, of those that begin in it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn work(&self, period: Period) -> Result<WorkByUpstream, ReadError> {
        self.check_schema().await?;
        let rows: Vec<WorkRow> = self.rows(WORK, period).await?;
        let steps: Vec<StepsRow> = self.rows(STEPS, period).await?;
        let steps = by_upstream(&steps);
        let mut work = WorkByUpstream::new();
        for row in rows {
            let window = Window::at(Micros(u64::from(row.window_start_s) * 1_000_000));
            let of_upstream = steps.get(row.upstream.as_str()).map_or(&[][..], Vec::as_slice);
            work.entry(row.upstream).or_default().push(WindowWork {
                window,
                busy_us: row.busy_us,
                prompt_tokens: row.uncached,
                completion_tokens: row.completion,
                kv_token_seconds: row.kv_seconds,
                steps: steps_in(window.span(), of_upstream),
            });
        }
        Ok(work)
    }
}

/// A window's work; the time is that of the union of all runs.
const WORK: &str = "\
    SELECT
        toString(upstream) AS upstream,
        toUInt32(window_start) AS window_start_s,
        toUInt64(intervalLengthSum(toUnixTimestamp64Micro(run_start), toUnixTimestamp64Micro(run_end))) AS busy_us,
        toUInt64(sum(prompt_tokens - least(cached_tokens, prompt_tokens))) AS uncached,
        sum(completion_tokens) AS completion,
        sum(kv_token_seconds) AS kv_seconds
    FROM request_segments FINAL
    WHERE window_start >= fromUnixTimestamp64Micro({from_us:Int64}, 'UTC') AND window_start < fromUnixTimestamp64Micro({to_us:Int64}, 'UTC')
    GROUP BY upstream, window_start
    ORDER BY upstream, window_start";

/// Steps between two scrapes, over all models of an upstream, by the gateway that looked most often. A scrape on which nothing was to be compared has
/// none, and neither has the time before it.
const STEPS: &str = "\
    SELECT
        toString(upstream) AS upstream,
        toString(gateway_id) AS gateway_id,
        toUnixTimestamp64Milli(scraped_at) AS scraped_at_ms,
        assumeNotNull(max(interval_us)) AS between_us,
        assumeNotNull(sum(engine_steps_delta)) AS steps
    FROM vllm_system_metrics FINAL
    WHERE scraped_at >= fromUnixTimestamp64Micro({from_us:Int64} - 120000000, 'UTC')
        AND scraped_at < fromUnixTimestamp64Micro({to_us:Int64} + 120000000, 'UTC')
        AND interval_us IS NOT NULL AND engine_steps_delta IS NOT NULL
    GROUP BY upstream, gateway_id, scraped_at
    ORDER BY upstream, gateway_id, scraped_at";

#[derive(Debug, Row, Deserialize)]
struct WorkRow {
    upstream: String,
    window_start_s: u32,
    busy_us: u64,
    uncached: u64,
    completion: u64,
    kv_seconds: f64,
}

#[derive(Debug, Row, Deserialize)]
struct StepsRow {
    upstream: String,
    gateway_id: String,
    scraped_at_ms: i64,
    between_us: u64,
    steps: u64,
}

/// So many steps in a span.
type Counted = (Span, u64);

fn by_upstream(rows: &[StepsRow]) -> BTreeMap<&str, Vec<Counted>> {
    let mut chosen: BTreeMap<&str, Vec<Counted>> = BTreeMap::new();
    for of_one in
        rows.chunk_by(|one, other| (&one.upstream, &one.gateway_id) == (&other.upstream, &other.gateway_id))
    {
        let counted: Vec<Counted> = of_one
            .iter()
            .map(|row| {
                let at_us = u64::try_from(row.scraped_at_ms).unwrap_or(0) * 1_000;
                let span = Span::new(Micros(at_us.saturating_sub(row.between_us)), Micros(at_us));
                (span, row.steps)
            })
            .collect();
        let best = chosen.entry(&of_one[0].upstream).or_default();
        if counted.len() > best.len() {
            *best = counted;
        }
    }
    chosen
}

/// Steps in a window, evenly spread between two scrapes.
fn steps_in(window: Span, counted: &[Counted]) -> Option<f64> {
    let (mut steps, mut known_us) = (0.0, 0);
    for (span, count) in counted {
        let common_us = span.within(window).len_us();
        if common_us > 0 {
            steps += *count as f64 * common_us as f64 / span.len_us() as f64;
            known_us += common_us;
        }
    }
    (known_us + SLACK_US >= window.len_us()).then_some(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START_US: u64 = 1_780_000_005_000_000;

    fn row(gateway_id: &str, after_s: i64, steps: u64) -> StepsRow {
        StepsRow {
            upstream: "chat".to_owned(),
            gateway_id: gateway_id.to_owned(),
            scraped_at_ms: START_US as i64 / 1_000 + after_s * 1_000,
            between_us: 15_000_000,
            steps,
        }
    }

    #[test]
    fn steps_are_spread_between_scrapes_and_unknown_where_nobody_looked() {
        let rows = [
            row("a", 5, 300),
            row("a", 20, 600),
            row("a", 50, 150),
            row("b", 20, 1),
        ];
        let chosen = by_upstream(&rows);
        let window = |index: u64| Window::at(Micros(START_US + index * 15_000_000)).span();
        let steps = |index| steps_in(window(index), &chosen["chat"]);
        // 5 s at 20 a second, and 10 s at 40.
        assert_eq!(steps(0), Some(500.0));
        assert_eq!(steps(1), None, "from 20 to 35 s nobody knows");
        assert_eq!(steps_in(window(0), &[]), None);
    }
}
