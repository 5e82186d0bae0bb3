//! What engines counted against what requests are known to have used, as metrics.

use super::families::Maker;
use crate::ledger::{Cause, Gap, Totals};
use prometheus::{Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Result};
use std::sync::Arc;

/// The label values of `type`, in the order of every pair here.
const TYPES: [&str; 2] = ["prompt", "completion"];

pub(super) struct ReconciliationFamilies {
    engine: IntCounterVec,
    attributed: IntCounterVec,
    uncompared: IntCounterVec,
    gap: IntGaugeVec,
    ratio: GaugeVec,
    exceeded: IntGaugeVec,
    cause: IntGaugeVec,
}

impl ReconciliationFamilies {
    #[rustfmt::skip] // A table: one family a line reads better than five lines each.
    pub(super) fn registered_by(of: &Maker<'_>) -> Result<ReconciliationFamilies> {
        let by_type = &["upstream", "type"];
        Ok(ReconciliationFamilies {
            engine: of.counter("gateway_reconciliation_engine_tokens_total", "Tokens that the upstream's engine counted between scrapes that could be compared.", by_type)?,
            attributed: of.counter("gateway_reconciliation_attributed_tokens_total", "Tokens that this gateway attributed to requests in the same intervals, as the engine counts them.", by_type)?,
            uncompared: of.counter("gateway_reconciliation_uncompared_tokens_total", "Tokens that this gateway attributed in intervals whose counters could not be compared: a restart, or several processes behind one address.", by_type)?,
            gap: of.gauge("gateway_reconciliation_gap_tokens", "Tokens that the engine counted in the time looked back on and no known request used; what comes late takes them back until ledger.settle_after.", by_type)?,
            ratio: of.keep(GaugeVec::new(Opts::new("gateway_reconciliation_ratio", "Attributed tokens per token that the engine counted in the time looked back on."), by_type)?)?,
            exceeded: of.gauge("gateway_reconciliation_gap_exceeded", "1 while the gap is beyond its bound (reconciliation.gap_share, gap_tokens).", by_type)?,
            cause: of.gauge("gateway_reconciliation_gap_cause", "1 for each likely cause of a gap beyond its bound.", &["upstream", "cause"])?,
        })
    }
}

/// What they say of one upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReconciliationFigures {
    /// Counted by the engine since the start, where that can be compared.
    pub engine: Totals,
    /// Attributed to requests in the same intervals.
    pub attributed: Totals,
    /// Counted and not attributed, in the time looked back on.
    pub gap: Totals,
    /// Whether that is beyond its bound.
    pub is_exceeded: bool,
    /// What it may come from; empty unless it is.
    pub causes: Vec<&'static str>,
}

/// The metrics of one upstream's reconciliation.
pub struct ReconciliationMetrics {
    families: Arc<super::Families>,
    upstream: Box<str>,
    engine: [IntCounter; 2],
    attributed: [IntCounter; 2],
    uncompared: [IntCounter; 2],
    gap: [IntGauge; 2],
    exceeded: [IntGauge; 2],
    causes: [IntGauge; Cause::ALL.len()],
}

impl ReconciliationMetrics {
    pub(super) fn of(families: Arc<super::Families>, upstream: &str) -> ReconciliationMetrics {
        let of = &families.reconciliation;
        let counters = |family: &IntCounterVec| TYPES.map(|kind| family.with_label_values(&[upstream, kind]));
        let gauges = |family: &IntGaugeVec| TYPES.map(|kind| family.with_label_values(&[upstream, kind]));
        ReconciliationMetrics {
            upstream: upstream.into(),
            engine: counters(&of.engine),
            attributed: counters(&of.attributed),
            uncompared: counters(&of.uncompared),
            gap: gauges(&of.gap),
            exceeded: gauges(&of.exceeded),
            causes: Cause::ALL.map(|cause| of.cause.with_label_values(&[upstream, cause.name()])),
            families,
        }
    }

    /// What was told so far.
    pub fn figures(&self) -> ReconciliationFigures {
        let totals = |[prompt_tokens, completion_tokens]: [u64; 2]| Totals {
            prompt_tokens,
            completion_tokens,
        };
        let counters = |pair: &[IntCounter; 2]| totals(pair.each_ref().map(IntCounter::get));
        let gap = self
            .gap
            .each_ref()
            .map(|gauge| u64::try_from(gauge.get()).unwrap_or(0));
        let causes = Cause::ALL.iter().zip(&self.causes);
        ReconciliationFigures {
            engine: counters(&self.engine),
            attributed: counters(&self.attributed),
            gap: totals(gap),
            is_exceeded: self.exceeded.iter().any(|gauge| gauge.get() > 0),
            causes: causes
                .filter(|(_, gauge)| gauge.get() > 0)
                .map(|(cause, _)| cause.name())
                .collect(),
        }
    }

    /// An interval of which both sides are known.
    pub fn compared(&self, counted: Totals, attributed: Totals) {
        add(&self.engine, counted);
        add(&self.attributed, attributed);
    }

    /// One of which only this gateway's is.
    pub fn not_compared(&self, attributed: Totals) {
        add(&self.uncompared, attributed);
    }

    /// How things stand.
    pub fn judged(&self, gap: &Gap, prompt_exceeded: bool, completion_exceeded: bool, causes: &[Cause]) {
        for (gauge, tokens) in self.gap.iter().zip(pair(gap.tokens)) {
            gauge.set(i64::try_from(tokens).unwrap_or(i64::MAX));
        }
        self.exceeded[0].set(prompt_exceeded.into());
        self.exceeded[1].set(completion_exceeded.into());
        let both = pair(gap.counted).into_iter().zip(pair(gap.attributed));
        for (kind, (counted, attributed)) in TYPES.into_iter().zip(both) {
            let labels = [&*self.upstream, kind];
            let ratio = &self.families.reconciliation.ratio;
            // Where nothing was counted there is nothing to divide by, and no word of it.
            if counted > 0 {
                let gauge: Gauge = ratio.with_label_values(&labels);
                gauge.set(attributed as f64 / counted as f64);
            } else {
                drop(ratio.remove_label_values(&labels));
            }
        }
        for (gauge, cause) in self.causes.iter().zip(Cause::ALL) {
            gauge.set(causes.contains(&cause).into());
        }
    }
}

fn pair(totals: Totals) -> [u64; 2] {
    [totals.prompt_tokens, totals.completion_tokens]
}

fn add(counters: &[IntCounter; 2], totals: Totals) {
    for (counter, tokens) in counters.iter().zip(pair(totals)) {
        counter.inc_by(tokens);
    }
}
