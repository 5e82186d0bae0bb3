//! The JSON of the API: one struct an object, one field a key. `docs/API.md` says what each means; a test compares the two.
//!
//! Units stand in names. What is unknown, or not for the asker to see, is `null`.

use super::recent::{RequestRow, as_objects};
use serde::Serialize;
use std::sync::Arc;

/// The version of all shapes. A field may be added under the same one; whatever else changes gets a new one.
pub const VERSION: u32 = 1;

/// What every document begins with.
#[derive(Clone, Debug, Serialize)]
pub struct Head {
    /// [`VERSION`].
    pub version: u32,
    /// Wall clock.
    pub at_us: i64,
    /// Whose figures these are: `admin`, or `team:NAME`.
    pub scope: String,
}

/// `/api/teams`.
#[derive(Clone, Debug, Serialize)]
pub struct Teams {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub head: Head,
    /// What rates and percentiles are of.
    pub window_s: u64,
    /// By name.
    pub teams: Vec<TeamRow>,
}

/// `/api/upstreams`.
#[derive(Clone, Debug, Serialize)]
pub struct UpstreamList {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub head: Head,
    /// In the order of the configuration.
    pub upstreams: Vec<UpstreamRow>,
}

/// `/api/requests`.
#[derive(Clone, Debug, Serialize)]
pub struct Requests {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub head: Head,
    /// Newest first.
    #[serde(serialize_with = "as_objects")]
    pub requests: Vec<Arc<RequestRow>>,
}

/// `/api/reconciliation`.
#[derive(Clone, Debug, Serialize)]
pub struct ReconciliationPage {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub head: Head,
    /// The figures.
    pub reconciliation: Reconciliation,
}

/// One event of `/api/live`.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub head: Head,
    /// The gateway itself.
    pub gateway: GatewayRow,
    /// What rates and percentiles are of.
    pub window_s: u64,
    /// By name.
    pub teams: Vec<TeamRow>,
    /// In the order of the configuration.
    pub upstreams: Vec<UpstreamRow>,
    /// Those since the event before, newest first.
    #[serde(serialize_with = "as_objects")]
    pub requests: Vec<Arc<RequestRow>>,
    /// `null` in the scope of a team.
    pub reconciliation: Option<Reconciliation>,
}

/// The gateway itself.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct GatewayRow {
    pub gateway_version: &'static str,
    pub gateway_id: String,
    pub uptime_s: u64,
    pub capture: &'static str,
    pub clients: Option<String>,
    pub team_header: String,
    pub teamless: &'static str,
    pub is_draining: bool,
}

/// A team's last minute, and its totals since the start.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct TeamRow {
    pub team: String,
    pub in_flight: i64,
    pub requests_per_second: f64,
    pub errors: u64,
    pub aborted: u64,
    pub refused: u64,
    pub ttft_p50_us: Option<u64>,
    pub ttft_p95_us: Option<u64>,
    pub itl_p95_us: Option<u64>,
    pub prompt_tokens_per_second: f64,
    pub completion_tokens_per_second: f64,
    pub charge_usd_per_hour: f64,
    pub requests_by_second: Vec<u64>,
    pub requests_total: u64,
    pub errors_total: u64,
    pub prompt_tokens_total: u64,
    pub cached_tokens_total: u64,
    pub completion_tokens_total: u64,
    pub engine_prompt_tokens_total: u64,
    pub engine_completion_tokens_total: u64,
    pub charge_nano_usd_total: u64,
    pub budget: Option<BudgetRow>,
    pub limits: Option<LimitsRow>,
}

/// A team's budget in the running day or month.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct BudgetRow {
    pub usd: f64,
    pub spent_usd: f64,
    pub period: &'static str,
    pub resets_in_s: u64,
    pub limited_total: u64,
}

/// How a team stands with its limits; what is not limited is `null`.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct LimitsRow {
    pub requests_per_minute: Option<LimitRow>,
    pub tokens_per_minute: Option<LimitRow>,
    pub concurrent_requests: Option<LimitRow>,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct LimitRow {
    pub limit: u64,
    pub used: u64,
    pub limited_total: u64,
}

/// An upstream.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct UpstreamRow {
    pub upstream: String,
    pub url: Option<String>,
    pub serves: &'static str,
    pub up: bool,
    pub condition: &'static str,
    pub in_flight: Option<u64>,
    pub running: Option<f64>,
    pub waiting: Option<f64>,
    pub kv_cache_usage: Option<f64>,
    pub busy_share: Option<f64>,
    pub models: Option<Vec<String>>,
    pub scrape_ok: Option<bool>,
    pub scrape_age_s: Option<f64>,
}

/// Whether what was counted adds up, and what was lost on the way.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct Reconciliation {
    pub engines: Vec<EngineRow>,
    pub tap: Option<TapRow>,
    pub store: Option<StoreRow>,
    pub costs: Option<Vec<CostRow>>,
}

/// An engine's tokens, and those of known requests in the same time: what the metrics of the reconciliation say.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct EngineRow {
    pub upstream: String,
    pub engine_prompt_tokens: u64,
    pub engine_completion_tokens: u64,
    pub attributed_prompt_tokens: u64,
    pub attributed_completion_tokens: u64,
    pub gap_prompt_tokens: u64,
    pub gap_completion_tokens: u64,
    pub gap_exceeded: bool,
    pub likely_causes: Vec<&'static str>,
}

/// What an upstream's last hour cost, by what it was for: what `gateway_ledger_cost_usd` says.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct CostRow {
    pub upstream: String,
    pub from_us: u64,
    pub to_us: u64,
    pub teams_nano_usd: u64,
    pub idle_nano_usd: u64,
    pub unattributed_nano_usd: u64,
    pub loading_nano_usd: u64,
    pub down_nano_usd: u64,
    pub scaled_to_zero_nano_usd: u64,
}

/// What the kernel probe saw.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct TapRow {
    pub is_in_place: bool,
    pub own_exchanges: u64,
    pub direct_exchanges: u64,
    pub foreign_exchanges: u64,
    pub incomplete_exchanges: u64,
    pub forged_ids: u64,
    pub lost_records: u64,
}

/// Rows on their way to ClickHouse.
#[derive(Clone, Debug, Serialize)]
#[allow(
    missing_docs,
    reason = "docs/API.md has them, and a test that none is missing"
)]
pub struct StoreRow {
    pub waiting_rows: u64,
    pub waiting_bytes: u64,
    pub oldest_age_s: f64,
    pub stored_rows: u64,
    pub dropped_rows: u64,
    pub quarantined_rows: u64,
    pub disk_failures: u64,
}
