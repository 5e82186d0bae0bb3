//! What the scrape of the upstreams shows: whether it works, and vLLM's own state per upstream and model.
//!
//! A series says what is known now. That of a model that is gone, of an upstream whose scrape fails, and of a value that became unknown
//! is removed; a counter that comes back begins at the growth since the last good scrape, which Prometheus takes for a restart
//! and adds up rightly. Models are bounded by the reader of the page ([`crate::vllm::page::MODELS_MAX`] an upstream).

use super::families::Maker;
use crate::ledger::Condition;
use crate::vllm::SystemSample;
use crate::vllm::page::Unsupported;
use crate::vllm::scrape::ScrapeError;
use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGauge, Opts, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(super) struct ScrapeFamilies {
    success: prometheus::IntGaugeVec,
    duration: GaugeVec,
    failures: IntCounterVec,
    resets: IntCounterVec,
    running: GaugeVec,
    waiting: GaugeVec,
    kv_cache_usage: GaugeVec,
    prefix_cache_hit_ratio: GaugeVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    preemptions: IntCounterVec,
    request_success: IntCounterVec,
    condition: prometheus::IntGaugeVec,
    unsupported: prometheus::IntGaugeVec,
}

impl ScrapeFamilies {
    #[rustfmt::skip] // A table: one family a line reads better than five lines each.
    pub(super) fn registered_by(of: &Maker<'_>) -> Result<ScrapeFamilies> {
        let float = |name: &str, help: &str, labels: &[&str]| of.keep(GaugeVec::new(Opts::new(name, help), labels)?);
        let model = &["upstream", "model"];
        Ok(ScrapeFamilies {
            success: of.gauge("gateway_scrape_success", "1 if the last scrape of the upstream's own metrics gave a page.", &["upstream"])?,
            duration: float("gateway_scrape_duration_seconds", "How long the last scrape of the upstream's own metrics took.", &["upstream"])?,
            failures: of.counter("gateway_scrape_failures_total", "Scrapes of the upstream's own metrics that gave no page, by reason.", &["upstream", "reason"])?,
            resets: of.counter("gateway_scrape_resets_total", "Scrapes whose counters did not follow from the scrape before: a restart, or several processes behind one address.", &["upstream"])?,
            running: float("gateway_vllm_requests_running", "Requests in the running batches of the model's engines.", model)?,
            waiting: float("gateway_vllm_requests_waiting", "Requests in the queues of the model's engines.", model)?,
            kv_cache_usage: float("gateway_vllm_kv_cache_usage_ratio", "Share of the KV cache in use, mean over the model's engines.", model)?,
            prefix_cache_hit_ratio: float("gateway_vllm_prefix_cache_hit_ratio", "Share of the prompt tokens looked up between the last two scrapes that the prefix cache had.", model)?,
            prompt_tokens: of.counter("gateway_vllm_prompt_tokens_total", "Prompt tokens that the engines processed since the gateway first saw them.", model)?,
            generation_tokens: of.counter("gateway_vllm_generation_tokens_total", "Tokens that the engines generated since the gateway first saw them.", model)?,
            preemptions: of.counter("gateway_vllm_preemptions_total", "Preemptions since the gateway first saw the engines.", model)?,
            request_success: of.counter("gateway_vllm_request_success_total", "Requests that the engines finished since the gateway first saw them, by reason.", &["upstream", "model", "reason"])?,
            condition: of.gauge("gateway_upstream_condition", "1 for how the upstream was at the last scrape: down, scaled_to_zero, asleep, loading, up or running.", &["upstream", "condition"])?,
            unsupported: of.gauge("gateway_upstream_unsupported", "1 while requests to the upstream are not billed by what it did for them, by reason: kv_connector or external_kv (prompts are prefilled on another server).", &["upstream", "reason"])?,
        })
    }

    fn gauges(&self) -> [&GaugeVec; 4] {
        [
            &self.running,
            &self.waiting,
            &self.kv_cache_usage,
            &self.prefix_cache_hit_ratio,
        ]
    }

    fn counters(&self) -> [&IntCounterVec; 3] {
        [&self.prompt_tokens, &self.generation_tokens, &self.preemptions]
    }
}

/// The metrics of one upstream's scrape. There is one for each upstream, since it remembers which series it made.
pub struct ScrapeMetrics {
    families: Arc<super::Families>,
    upstream: Box<str>,
    success: IntGauge,
    duration: prometheus::Gauge,
    resets: IntCounter,
    /// Models that have series, and their reasons of `request_success`.
    shown: BTreeMap<Box<str>, BTreeSet<Box<str>>>,
}

impl ScrapeMetrics {
    pub(super) fn of(families: Arc<super::Families>, upstream: &str) -> ScrapeMetrics {
        let of = &families.scrape;
        // From 0, so that the first failure shows as a growth.
        for reason in ScrapeError::REASONS {
            of.failures.with_label_values(&[upstream, reason]);
        }
        ScrapeMetrics {
            upstream: upstream.into(),
            success: of.success.with_label_values(&[upstream]),
            duration: of.duration.with_label_values(&[upstream]),
            resets: of.resets.with_label_values(&[upstream]),
            families,
            shown: BTreeMap::new(),
        }
    }

    /// Shows all samples of one scrape, and no longer what they do not have.
    pub fn record(&mut self, samples: &[SystemSample]) {
        self.success.set(samples.iter().all(|sample| sample.ok).into());
        if let Some(sample) = samples.first() {
            self.duration.set(sample.scrape_us as f64 / 1e6);
        }
        self.resets
            .inc_by(samples.iter().any(|sample| sample.counter_reset).into());
        self.show_state(samples);
        for sample in samples.iter().filter(|sample| !sample.ok) {
            self.families
                .scrape
                .failures
                .with_label_values(&[&*self.upstream, sample.error])
                .inc();
        }
        let mut gone = std::mem::take(&mut self.shown);
        for sample in samples.iter().filter(|sample| sample.ok) {
            let mut reasons = gone.remove(&sample.model).unwrap_or_default();
            self.show(sample);
            reasons.extend(sample.request_success.keys().cloned());
            self.shown.insert(sample.model.clone(), reasons);
        }
        gone.iter()
            .for_each(|(model, reasons)| self.remove(model, reasons));
    }

    /// How the server is: of several models the busiest says it.
    fn show_state(&self, samples: &[SystemSample]) {
        let of = &self.families.scrape;
        let condition = samples.iter().filter_map(|sample| sample.condition).max();
        for known in Condition::ALL {
            let gauge = of.condition.with_label_values(&[&*self.upstream, known.name()]);
            gauge.set((condition == Some(known)).into());
        }
        // A server that cannot be asked is as it was.
        if samples.iter().any(|sample| sample.ok) {
            for reason in Unsupported::ALL {
                let is_so = samples.iter().any(|sample| sample.unsupported == reason.name());
                let gauge = of
                    .unsupported
                    .with_label_values(&[&*self.upstream, reason.name()]);
                gauge.set(is_so.into());
            }
        }
    }

    fn show(&self, sample: &SystemSample) {
        let labels = [&*self.upstream, &*sample.model];
        let values = [
            sample.running,
            sample.waiting,
            sample.kv_cache_usage,
            sample.prefix_cache_hit_ratio,
        ];
        for (gauge, value) in self.families.scrape.gauges().into_iter().zip(values) {
            match value {
                Some(value) => gauge.with_label_values(&labels).set(value),
                None => drop(gauge.remove_label_values(&labels)),
            }
        }
        let totals = [
            sample.prompt_tokens_total,
            sample.generation_tokens_total,
            sample.preemptions_total,
        ];
        let deltas = [
            sample.prompt_tokens_delta,
            sample.generation_tokens_delta,
            sample.preemptions_delta,
        ];
        for (counter, (total, delta)) in self
            .families
            .scrape
            .counters()
            .into_iter()
            .zip(totals.into_iter().zip(deltas))
        {
            // A counter that the server has is shown from the first scrape on, at 0: its growth is only known at the second.
            if total.is_some() {
                counter.with_label_values(&labels).inc_by(delta.unwrap_or(0));
            }
        }
        for (reason, count) in &sample.request_success {
            let labels = [&*self.upstream, &*sample.model, reason];
            self.families
                .scrape
                .request_success
                .with_label_values(&labels)
                .inc_by(*count);
        }
    }

    /// Takes a model's series away. One that was never made cannot be removed, and need not be.
    fn remove(&self, model: &str, reasons: &BTreeSet<Box<str>>) {
        let (families, labels) = (&self.families.scrape, [&*self.upstream, model]);
        families
            .gauges()
            .into_iter()
            .for_each(|gauge| drop(gauge.remove_label_values(&labels)));
        families
            .counters()
            .into_iter()
            .for_each(|counter| drop(counter.remove_label_values(&labels)));
        for reason in reasons {
            drop(
                families
                    .request_success
                    .remove_label_values(&[&*self.upstream, model, reason]),
            );
        }
    }
}
