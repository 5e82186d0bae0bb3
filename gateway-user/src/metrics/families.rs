//! Every family of metrics: its name, help, labels and buckets, in one place.
//!
//! Names and buckets of `gen_ai_server_*` are those of OpenTelemetry's conventions for generative AI, in Prometheus form.

use super::catalogue::Catalogue;
use super::gaps::GapHistograms;
use super::process::Process;
use super::reconciliation::ReconciliationFamilies;
use super::scrape::ScrapeFamilies;
use prometheus::core::Collector;
use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec,
};
use prometheus::{Opts, Result};

/// `gen_ai.server.request.duration`.
const DURATION_BUCKETS: &[f64] = &[
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
];

/// `gen_ai.server.time_to_first_token`, which ends at 10 s; a queue on a busy cluster does not, hence the last three.
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    60.0,
];

/// `gen_ai.server.time_per_output_token`.
const PER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];

/// What the gateway adds is tens of microseconds on a good day; the upper end shows the bad ones (a body that trickles in).
const OVERHEAD_BUCKETS: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5,
    1.0,
];

/// All families, registered.
pub(super) struct Families {
    pub(super) requests: IntCounterVec,
    pub(super) duration: HistogramVec,
    pub(super) ttft: HistogramVec,
    pub(super) per_token: HistogramVec,
    pub(super) gaps: GapHistograms,
    pub(super) tokens: IntCounterVec,
    pub(super) engine_tokens: IntCounterVec,
    pub(super) charge: CounterVec,
    pub(super) request_body: IntCounterVec,
    pub(super) response_body: IntCounterVec,
    pub(super) inflight: IntGaugeVec,
    pub(super) overhead: Histogram,
    pub(super) usage_source: IntCounterVec,
    pub(super) refused: IntCounterVec,
    pub(super) injection: IntCounterVec,
    pub(super) client_connections: IntGauge,
    pub(super) upstream_up: IntGaugeVec,
    pub(super) upstream_inflight: IntGaugeVec,
    pub(super) upstream_connections: IntGaugeVec,
    pub(super) upstream_connect_failures: IntCounterVec,
    pub(super) upstream_retries: IntCounterVec,
    pub(super) scrape: ScrapeFamilies,
    pub(super) reconciliation: ReconciliationFamilies,
    pub(super) build_info: GaugeVec,
    pub(super) capture: GaugeVec,
    pub(super) start_time: Gauge,
}

impl Families {
    #[rustfmt::skip] // A table: one family a line reads better than five lines each.
    pub(super) fn registered_in(registry: &Catalogue) -> Result<Families> {
        let of = Maker { registry };
        registry.register(Box::new(Process::new()?))?;
        Ok(Families {
            requests: of.counter("gateway_requests_total", "Requests that have ended, by how (outcome) and by the status code that the client got.", &["team", "model", "endpoint", "status", "outcome"])?,
            duration: of.histogram("gen_ai_server_request_duration_seconds", "From the first byte of the request to the end of its response.", &["team", "model", "endpoint", "outcome"], DURATION_BUCKETS)?,
            ttft: of.histogram("gen_ai_server_time_to_first_token_seconds", "From the start of a streamed request to its first chunk with generated content (text, reasoning or a tool call).", &["team", "model", "endpoint"], TTFT_BUCKETS)?,
            per_token: of.histogram("gen_ai_server_time_per_output_token_seconds", "Time per generated token after the first, of completed streams.", &["team", "model", "endpoint"], PER_TOKEN_BUCKETS)?,
            gaps: of.keep(GapHistograms::new()?)?,
            tokens: of.counter("gateway_tokens_total", "Billed tokens, by type: prompt (the cached ones included), cached, completion (the reasoning ones included).", &["team", "model", "type"])?,
            engine_tokens: of.counter("gateway_engine_tokens_total", "Tokens as the engine's own counters have them, by type: prompt, completion. A prompt is counted once for each choice of n.", &["team", "model", "type"])?,
            charge: of.keep(CounterVec::new(Opts::new("gateway_charge_usd_total", "What requests are charged by the rate card, in US dollars. Bills are made of stored rows, to the nano-USD."), &["team", "model"])?)?,
            request_body: of.counter("gateway_request_body_bytes_total", "Bytes of the bodies of requests.", &["team"])?,
            response_body: of.counter("gateway_response_body_bytes_total", "Bytes of the bodies of responses.", &["team"])?,
            inflight: of.gauge("gateway_inflight_requests", "Requests that have begun and not ended.", &["team"])?,
            overhead: of.keep(Histogram::with_opts(HistogramOpts::new("gateway_request_overhead_seconds", "Time that the gateway itself added before the first byte went upstream.").buckets(OVERHEAD_BUCKETS.to_vec()))?)?,
            usage_source: of.counter("gateway_usage_source_total", "Billable requests that reached an engine, by where their token counts come from.", &["source"])?,
            refused: of.counter("gateway_refused_total", "Requests that the gateway answered by itself, by reason.", &["reason"])?,
            injection: of.counter("gateway_injection_total", "Request bodies by what became of asking for usage on the client's behalf: edited, or why not.", &["result"])?,
            client_connections: of.keep(IntGauge::new("gateway_client_connections", "Open connections of clients.")?)?,
            upstream_up: of.gauge("gateway_upstream_up", "1 while the upstream is taken to be healthy.", &["upstream"])?,
            upstream_inflight: of.gauge("gateway_upstream_inflight", "Requests that the upstream is working on for this gateway.", &["upstream"])?,
            upstream_connections: of.gauge("gateway_upstream_connections", "Open connections to the upstream, by state: idle (in the pool) or active (with a request).", &["upstream", "state"])?,
            upstream_connect_failures: of.counter("gateway_upstream_connect_failures_total", "Connections to the upstream that could not be made.", &["upstream"])?,
            upstream_retries: of.counter("gateway_upstream_retries_total", "Requests sent again, by why the first try failed.", &["upstream", "reason"])?,
            scrape: ScrapeFamilies::registered_by(&of)?,
            reconciliation: ReconciliationFamilies::registered_by(&of)?,
            build_info: of.keep(GaugeVec::new(Opts::new("gateway_build_info", "1; the labels say which build runs."), &["version", "revision"])?)?,
            capture: of.keep(GaugeVec::new(Opts::new("gateway_capture_info", "1; the label says where requests are seen: proxy, proxy+tap or tap."), &["mode"])?)?,
            start_time: of.keep(Gauge::new("gateway_start_time_seconds", "When the gateway started, in seconds since 1970.")?)?,
        })
    }
}

/// Makes families and registers them.
pub(super) struct Maker<'r> {
    registry: &'r Catalogue,
}

impl Maker<'_> {
    pub(super) fn keep<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C> {
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    pub(super) fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
        self.keep(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec> {
        self.keep(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn histogram(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> Result<HistogramVec> {
        self.keep(HistogramVec::new(
            HistogramOpts::new(name, help).buckets(buckets.to_vec()),
            labels,
        )?)
    }
}
