//! What the engines counted in a period against what the requests of all gateways are known to have used, and what may explain a difference.
//!
//! The ledger's windows say it to the token, where they are computed and the engine's counters were seen on both sides. Of upstreams that have none
//! the scrapes and the segments are summed: these differ at the edges of the period by what ran there.

use super::Period;
use super::error::ReadError;
use super::reader::{FiguresReader, endpoints_of};
use crate::ledger::{Evidence, Totals};
use crate::wire::endpoint::Purpose;
use clickhouse::Row;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Of scrapes whose counters began anew: so many, and half of all, are no restarts.
const RESETS_OF_SEVERAL: u64 = 3;

/// What is known of one upstream in a period.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Its configured name.
    pub upstream: String,
    /// What its engine counted; `None` where its counters were never seen twice.
    pub counted: Option<Totals>,
    /// What requests are known to have used, of the same time.
    pub attributed: Totals,
    /// What is left; by the ledger what no later window took back, else the difference.
    pub gap: Totals,
    /// Whether that is by the ledger's windows.
    pub by_ledger: bool,
    /// How many gateways told of it.
    pub gateways: u64,
    /// What may explain it. All gateways of the store are in the figures, so that none of them is a cause.
    pub evidence: Evidence,
}

#[derive(Debug, Row, Deserialize)]
struct WindowsRow {
    upstream: String,
    counted_prompt: u64,
    counted_completion: u64,
    prompt: u64,
    completion: u64,
    gap_prompt: u64,
    gap_completion: u64,
}

#[derive(Debug, Row, Deserialize)]
struct ScrapesRow {
    upstream: String,
    gateway: String,
    prompt: Option<u64>,
    completion: Option<u64>,
    pages: u64,
    failures: u64,
    resets: u64,
    unsupported: u64,
}

#[derive(Debug, Row, Deserialize)]
struct SegmentsRow {
    upstream: String,
    prompt: u64,
    completion: u64,
}

#[derive(Debug, Row, Deserialize)]
struct EventsRow {
    upstream: String,
    gateways: Vec<String>,
    tapped: u64,
    direct: u64,
    counted: u64,
    aborted: u64,
    untold: u64,
}

const WINDOWS: &str = "
    SELECT toString(upstream) AS upstream,
        sum(ifNull(engine_prompt_tokens, 0)) AS counted_prompt, sum(ifNull(engine_completion_tokens, 0)) AS counted_completion,
        sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion,
        sum(unattributed_prompt_tokens) AS gap_prompt, sum(unattributed_completion_tokens) AS gap_completion
    FROM ledger_windows FINAL
    WHERE window_start >= fromUnixTimestamp64Micro({from_us:Int64}, 'UTC') AND window_start < fromUnixTimestamp64Micro({to_us:Int64}, 'UTC')
        AND engine_prompt_tokens IS NOT NULL AND engine_completion_tokens IS NOT NULL
    GROUP BY upstream";

/// Each gateway scrapes for itself, so that its sums are of the same counters as those of the others.
const SCRAPES: &str = "
    SELECT toString(upstream) AS upstream, toString(gateway_id) AS gateway,
        sum(prompt_tokens_delta) AS prompt, sum(generation_tokens_delta) AS completion,
        countIf(ok) AS pages, countIf(NOT ok) AS failures, countIf(counter_reset) AS resets, countIf(unsupported != '') AS unsupported
    FROM vllm_system_metrics FINAL
    WHERE scraped_at >= fromUnixTimestamp64Micro({from_us:Int64}, 'UTC') AND scraped_at < fromUnixTimestamp64Micro({to_us:Int64}, 'UTC')
    GROUP BY upstream, gateway";

const SEGMENTS: &str = "
    SELECT toString(upstream) AS upstream, sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion
    FROM request_segments FINAL
    WHERE window_start >= fromUnixTimestamp64Micro({from_us:Int64}, 'UTC') AND window_start < fromUnixTimestamp64Micro({to_us:Int64}, 'UTC')
    GROUP BY upstream";

/// Which requests are told apart is as in `tally.rs`.
const EVENTS: &str = "
    WITH (SELECT max(duration_us) FROM request_events WHERE started_at < fromUnixTimestamp64Micro({to_us:Int64}, 'UTC')) AS longest_us
    SELECT toString(upstream) AS upstream, arrayMap(id -> toString(id), groupUniqArray(gateway_id)) AS gateways,
        countIf(capture IN ('tap', 'proxy+tap')) AS tapped,
        countIf(is_untold AND capture = 'tap') AS direct,
        countIf(is_untold AND capture != 'tap' AND usage_source = 'counted') AS counted,
        countIf(is_untold AND capture != 'tap' AND usage_source != 'counted' AND outcome = 'aborted' AND NOT stream) AS aborted,
        countIf(is_untold AND capture != 'tap' AND usage_source != 'counted' AND NOT (outcome = 'aborted' AND NOT stream)) AS untold
    FROM
    (
        SELECT *,
            coalesce(engine_prompt_tokens, prompt_tokens) IS NULL AS no_prompt,
            coalesce(engine_completion_tokens, completion_tokens) IS NULL AS no_completion,
            outcome NOT IN ('refused', 'unreachable', 'client_error')
                AND ((has({generating:Array(String)}, toString(endpoint)) AND (no_prompt OR no_completion))
                    OR (has({pooling:Array(String)}, toString(endpoint)) AND no_prompt)) AS is_untold
        FROM request_events FINAL
        WHERE ended_at >= fromUnixTimestamp64Micro({from_us:Int64}, 'UTC') AND ended_at < fromUnixTimestamp64Micro({to_us:Int64}, 'UTC')
            AND started_at >= fromUnixTimestamp64Micro({from_us:Int64} - toInt64(longest_us), 'UTC')
            AND started_at < fromUnixTimestamp64Micro({to_us:Int64}, 'UTC')
            AND upstream != ''
    )
    GROUP BY upstream";

impl FiguresReader {
    /// What is known of each upstream in `period`, by name.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn reconciliation(&self, period: Period) -> Result<Vec<Reconciled>, ReadError> {
        self.check_schema().await?;
        let windows: Vec<WindowsRow> = self.rows(WINDOWS, period).await?;
        let scrapes: Vec<ScrapesRow> = self.rows(SCRAPES, period).await?;
        let segments: Vec<SegmentsRow> = self.rows(SEGMENTS, period).await?;
        let generating = endpoints_of(Purpose::Generate);
        let pooling = endpoints_of(Purpose::Pool);
        let parameters = [("generating", generating), ("pooling", pooling)];
        let events: Vec<EventsRow> = self.rows_with(EVENTS, period, parameters).await?;
        Ok(joined(windows, scrapes, segments, events))
    }
}

#[derive(Default)]
struct Found {
    reconciled: Reconciled,
    gateways: Vec<String>,
    pages: u64,
}

fn joined(
    windows: Vec<WindowsRow>,
    scrapes: Vec<ScrapesRow>,
    segments: Vec<SegmentsRow>,
    events: Vec<EventsRow>,
) -> Vec<Reconciled> {
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    for row in segments {
        found.entry(row.upstream).or_default().reconciled.attributed = totals(row.prompt, row.completion);
    }
    for row in scrapes {
        let of = found.entry(row.upstream).or_default();
        let reconciled = &mut of.reconciled;
        if row.prompt.is_some() || row.completion.is_some() {
            // Who looked longest saw most.
            let seen = totals(row.prompt.unwrap_or(0), row.completion.unwrap_or(0));
            let so_far = reconciled.counted.unwrap_or_default();
            reconciled.counted = Some(totals(
                seen.prompt_tokens.max(so_far.prompt_tokens),
                seen.completion_tokens.max(so_far.completion_tokens),
            ));
        }
        let evidence = &mut reconciled.evidence;
        evidence.is_unsupported |= row.unsupported > 0;
        evidence.failures = evidence.failures.max(row.failures);
        evidence.resets = evidence.resets.max(row.resets);
        of.pages = of.pages.max(row.pages);
        of.gateways.push(row.gateway);
    }
    for row in events {
        let of = found.entry(row.upstream).or_default();
        of.gateways.extend(row.gateways);
        let evidence = &mut of.reconciled.evidence;
        evidence.is_tapped = row.tapped > 0;
        evidence.direct = row.direct;
        evidence.counted = row.counted;
        evidence.aborted = row.aborted;
        evidence.untold = row.untold;
    }
    let difference = |of: &mut Found| {
        let reconciled = &mut of.reconciled;
        let counted = reconciled.counted.unwrap_or_default();
        reconciled.gap = counted.since(reconciled.attributed);
    };
    found.values_mut().for_each(difference);
    for row in windows {
        let reconciled = &mut found.entry(row.upstream).or_default().reconciled;
        reconciled.counted = Some(totals(row.counted_prompt, row.counted_completion));
        reconciled.attributed = totals(row.prompt, row.completion);
        reconciled.gap = totals(row.gap_prompt, row.gap_completion);
        reconciled.by_ledger = true;
    }
    found.into_iter().map(finished).collect()
}

fn finished((upstream, mut of): (String, Found)) -> Reconciled {
    of.gateways.sort_unstable();
    of.gateways.dedup();
    let resets = of.reconciled.evidence.resets;
    of.reconciled.evidence.is_shared_address = resets >= RESETS_OF_SEVERAL && resets * 2 >= of.pages;
    Reconciled {
        upstream,
        gateways: of.gateways.len() as u64,
        ..of.reconciled
    }
}

fn totals(prompt_tokens: u64, completion_tokens: u64) -> Totals {
    Totals {
        prompt_tokens,
        completion_tokens,
    }
}
