//! Holds what one upstream's engine counted against what was booked of it, at each look at its counters.
//!
//! What a difference is, and what it may come from, is the ledger's to say ([`crate::ledger::reconcile`]); here are the readings: what the engine
//! counted since the look before, what this gateway attributed meanwhile, what was seen that may explain a difference. Metrics show all of it, and
//! the log has a line when a gap goes beyond its bound, changes its likely causes, or is closed.
//!
//! Promises: intervals in which the counters cannot be compared (a restart, several processes behind one address) count on neither side, and what
//! was attributed in them is counted apart. Left out: what other gateways attributed, which only the store knows.

use crate::config::Config;
use crate::correlate::Beside;
use crate::ledger::{Cause, Evidence, Gap, History, Interval, Micros, Totals, likely_causes};
use crate::metrics::ReconciliationMetrics;
use crate::tally::Tally;
use crate::vllm::SystemSample;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What a gap must be to be told.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// A part of what the engine counted, in millionths.
    pub share_millionths: u32,
    /// And tokens, more than these.
    pub tokens: u64,
    /// How long ago it must have opened: what comes late takes it back until then.
    pub settle_after: Duration,
    /// How far is looked back besides.
    pub window: Duration,
}

impl Bounds {
    /// Those of a configuration.
    pub fn of(config: &Config) -> Bounds {
        Bounds {
            share_millionths: config.reconciliation.gap_share.get(),
            tokens: config.reconciliation.gap_tokens.into(),
            settle_after: config.ledger.settle_after,
            window: config.reconciliation.window,
        }
    }

    fn are_exceeded(&self, gap: u64, counted: u64) -> bool {
        gap > self.tokens
            && u128::from(gap) * 1_000_000 > u128::from(counted) * u128::from(self.share_millionths)
    }
}

/// What a look at the counters gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No page.
    Failed,
    /// A page, with what the engine counted since the page before.
    Page {
        /// `None` at the first page, after a restart, or where that is no word of one engine.
        counted: Option<Totals>,
        /// Whether the counters began anew.
        is_reset: bool,
        /// Whether several processes answer in turn.
        is_shared_address: bool,
        /// Whether its requests are not attributed.
        is_unsupported: bool,
    },
}

impl Outcome {
    /// By the samples of one page, which are of all of its models.
    pub fn of(samples: &[SystemSample], is_shared_address: bool, is_unsupported: bool) -> Outcome {
        let sum = |of: fn(&SystemSample) -> Option<u64>| {
            samples
                .iter()
                .map(of)
                .try_fold(0_u64, |sum, delta| Some(sum.saturating_add(delta?)))
        };
        let prompt_tokens = sum(|sample| sample.prompt_tokens_delta);
        // A server that has no such counter generates nothing.
        let completion_tokens = sum(|sample| match sample.generation_tokens_total {
            None => Some(0),
            Some(_) => sample.generation_tokens_delta,
        });
        let counted = prompt_tokens
            .zip(completion_tokens)
            .filter(|_| !is_shared_address);
        Outcome::Page {
            counted: counted.map(|(prompt_tokens, completion_tokens)| Totals {
                prompt_tokens,
                completion_tokens,
            }),
            is_reset: samples.iter().any(|sample| sample.counter_reset),
            is_shared_address,
            is_unsupported,
        }
    }
}

/// What was booked up to some look.
#[derive(Clone, Copy, Debug)]
struct Reading {
    attributed: Totals,
    evidence: Evidence,
}

/// Reconciles one upstream.
pub struct Reconciler {
    upstream: Box<str>,
    tally: Arc<Tally>,
    beside: Option<Arc<dyn Beside>>,
    bounds: Bounds,
    metrics: ReconciliationMetrics,
    started: Instant,
    /// At the last page.
    before: Option<Reading>,
    failures: u64,
    history: History,
    /// What was last told; empty while all is well.
    told: Vec<Cause>,
}

impl Reconciler {
    /// Of `upstream`, of which `tally` was booked. `beside` is the kernel's view, where there is one.
    pub fn new(
        upstream: &str,
        tally: Arc<Tally>,
        beside: Option<Arc<dyn Beside>>,
        bounds: Bounds,
        metrics: ReconciliationMetrics,
    ) -> Reconciler {
        Reconciler {
            upstream: upstream.into(),
            tally,
            beside,
            bounds,
            metrics,
            started: Instant::now(),
            before: None,
            failures: 0,
            history: History::default(),
            told: Vec::new(),
        }
    }

    /// Takes note of a look at the counters; returns what was attributed since the last page, if there was one before this.
    pub fn look(&mut self, at: Instant, outcome: Outcome) -> Option<Totals> {
        let Outcome::Page {
            counted,
            is_reset,
            is_shared_address,
            is_unsupported,
        } = outcome
        else {
            self.failures += 1;
            return None;
        };
        let now = Reading {
            attributed: self.tally.attributed(),
            evidence: self.tally.evidence(),
        };
        let before = self.before.replace(now);
        let failures = std::mem::take(&mut self.failures);
        let attributed = now.attributed.since(before?.attributed);
        let evidence = Evidence {
            is_unsupported,
            is_shared_address,
            is_tapped: self.is_tapped(),
            resets: is_reset.into(),
            failures,
            ..requests_since(&now.evidence, &before?.evidence)
        };
        match counted {
            Some(counted) => self.metrics.compared(counted, attributed),
            None => self.metrics.not_compared(attributed),
        }
        let at_us = micros(at.saturating_duration_since(self.started));
        let settle_us = micros(self.bounds.settle_after);
        let interval = Interval {
            at: Micros(at_us),
            counted: counted.unwrap_or_default(),
            attributed: counted.map_or(Totals::default(), |_| attributed),
            evidence,
        };
        let kept_us = settle_us.saturating_add(micros(self.bounds.window));
        self.history.add(interval, Micros(at_us.saturating_sub(kept_us)));
        self.judge(at_us.checked_sub(settle_us), &evidence);
        Some(attributed)
    }

    /// Holds the history against the bounds; `settled_us` is `None` while nothing can be old enough.
    fn judge(&mut self, settled_us: Option<u64>, latest: &Evidence) {
        let gap = match settled_us {
            Some(settled_us) => self.history.gap(Micros(settled_us)),
            None => Gap {
                tokens: Totals::default(),
                ..self.history.gap(Micros(0))
            },
        };
        let (tokens, counted) = (gap.tokens, gap.counted);
        let prompt = self
            .bounds
            .are_exceeded(tokens.prompt_tokens, counted.prompt_tokens);
        let completion = self
            .bounds
            .are_exceeded(tokens.completion_tokens, counted.completion_tokens);
        // What the server is now counts, not what it was.
        let evidence = Evidence {
            is_unsupported: latest.is_unsupported,
            is_shared_address: latest.is_shared_address,
            is_tapped: latest.is_tapped,
            ..self.history.evidence()
        };
        // Counters that cannot be compared show no gap, and are none the better for that.
        let causes = if prompt || completion || evidence.is_shared_address {
            likely_causes(&evidence)
        } else {
            Vec::new()
        };
        self.metrics.judged(&gap, prompt, completion, &causes);
        self.tell(causes, &gap);
    }

    fn tell(&mut self, causes: Vec<Cause>, gap: &Gap) {
        if causes == self.told {
            return;
        }
        let upstream = &*self.upstream;
        match causes.first() {
            None => tracing::info!(upstream, "the engine's counters are accounted for again"),
            Some(first) => {
                let names: Vec<&str> = causes.iter().map(|cause| cause.name()).collect();
                tracing::warn!(
                    upstream,
                    prompt_tokens = gap.tokens.prompt_tokens,
                    of_prompt_tokens = gap.counted.prompt_tokens,
                    completion_tokens = gap.tokens.completion_tokens,
                    of_completion_tokens = gap.counted.completion_tokens,
                    causes = names.join(", "),
                    "the engine counted tokens that no known request used: {}",
                    first.advice()
                );
            }
        }
        self.told = causes;
    }

    fn is_tapped(&self) -> bool {
        self.beside
            .as_ref()
            .is_some_and(|beside| beside.covers(&self.upstream))
    }
}

fn requests_since(now: &Evidence, before: &Evidence) -> Evidence {
    Evidence {
        foreign: now.foreign.saturating_sub(before.foreign),
        direct: now.direct.saturating_sub(before.direct),
        counted: now.counted.saturating_sub(before.counted),
        aborted: now.aborted.saturating_sub(before.aborted),
        untold: now.untold.saturating_sub(before.untold),
        ..Evidence::default()
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Slice, Span, Window, Work};
    use crate::metrics::{Limits, Metrics};

    const MINUTE: Duration = Duration::from_secs(60);

    struct Trial {
        reconciler: Reconciler,
        tally: Arc<Tally>,
        metrics: Metrics,
        at: Instant,
    }

    impl Trial {
        fn new() -> Trial {
            let metrics = Metrics::new(Limits::default()).unwrap();
            let bounds = Bounds {
                share_millionths: 50_000,
                tokens: 100,
                settle_after: 3 * MINUTE,
                window: 60 * MINUTE,
            };
            let tally = Arc::<Tally>::default();
            let reconciler = Reconciler::new(
                "chat",
                Arc::clone(&tally),
                None,
                bounds,
                metrics.reconciliation("chat"),
            );
            let at = reconciler.started;
            Trial {
                reconciler,
                tally,
                metrics,
                at,
            }
        }

        /// A minute passes in which the engine generates and the gateway attributes so many tokens.
        fn minute(&mut self, counted: Option<u64>, attributed: u64) -> Option<Totals> {
            self.attribute(attributed);
            let counted = counted.map(|completion_tokens| Totals {
                prompt_tokens: 0,
                completion_tokens,
            });
            self.page(counted, false)
        }

        fn attribute(&self, completion_tokens: u64) {
            let work = Work {
                completion_tokens,
                ..Work::default()
            };
            let slice = Slice {
                window: Window::at(Micros(0)),
                run: Span::new(Micros(0), Micros(1)),
                work,
            };
            self.tally.attribute(&[slice]);
        }

        fn page(&mut self, counted: Option<Totals>, is_shared_address: bool) -> Option<Totals> {
            self.at += MINUTE;
            let page = Outcome::Page {
                counted,
                is_reset: counted.is_none(),
                is_shared_address,
                is_unsupported: false,
            };
            self.reconciler.look(self.at, page)
        }

        fn value(&self, series: &str) -> Option<f64> {
            let text = self.metrics.encode().unwrap();
            let found = text
                .lines()
                .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
            found.parse().ok()
        }

        fn of(&self, family: &str) -> Option<f64> {
            self.value(&format!(
                "gateway_reconciliation_{family}{{type=\"completion\",upstream=\"chat\"}}"
            ))
        }

        fn has_cause(&self, cause: Cause) -> bool {
            let series = format!(
                "gateway_reconciliation_gap_cause{{cause=\"{}\",upstream=\"chat\"}}",
                cause.name()
            );
            self.value(&series) == Some(1.0)
        }
    }

    #[test]
    fn a_gap_is_told_when_nothing_has_taken_it_back_for_long_enough() {
        let mut trial = Trial::new();
        assert_eq!(
            trial.minute(None, 7),
            None,
            "before the first page nothing is known"
        );
        let attributed = trial.minute(Some(1_000), 400).unwrap();
        assert_eq!(attributed.completion_tokens, 400);
        for _ in 0..2 {
            trial.minute(Some(1_000), 1_000);
            assert_eq!(trial.of("gap_exceeded"), Some(0.0), "it may yet be told");
        }
        trial.minute(Some(1_000), 1_000);
        assert_eq!(
            (trial.of("gap_tokens"), trial.of("gap_exceeded")),
            (Some(600.0), Some(1.0))
        );
        assert_eq!(trial.of("ratio"), Some(3_400.0 / 4_000.0));
        assert!(trial.has_cause(Cause::DirectUnseen) && !trial.has_cause(Cause::Direct));
        // What was late after all closes it.
        trial.minute(Some(0), 600);
        assert_eq!(
            (trial.of("gap_tokens"), trial.of("gap_exceeded")),
            (Some(0.0), Some(0.0))
        );
        assert!(!trial.has_cause(Cause::DirectUnseen));
        assert_eq!(
            (
                trial.of("engine_tokens_total"),
                trial.of("attributed_tokens_total")
            ),
            (Some(4_000.0), Some(4_000.0))
        );
    }

    #[test]
    fn a_small_share_is_no_gap_and_neither_are_few_tokens() {
        let mut trial = Trial::new();
        trial.minute(None, 0);
        for _ in 0..5 {
            trial.minute(Some(10_000), 9_600);
        }
        assert_eq!(
            (trial.of("gap_tokens"), trial.of("gap_exceeded")),
            (Some(800.0), Some(0.0))
        );
        let mut trial = Trial::new();
        trial.minute(None, 0);
        trial.minute(Some(100), 0);
        for _ in 0..4 {
            trial.minute(Some(0), 0);
        }
        assert_eq!(
            (trial.of("gap_tokens"), trial.of("gap_exceeded")),
            (Some(100.0), Some(0.0))
        );
    }

    #[test]
    fn intervals_that_cannot_be_compared_count_on_neither_side() {
        let mut trial = Trial::new();
        trial.minute(None, 0);
        trial.minute(Some(500), 500);
        trial.attribute(30);
        assert_eq!(trial.reconciler.look(trial.at, Outcome::Failed), None);
        let across = trial.minute(None, 40).unwrap();
        assert_eq!(
            across.completion_tokens, 70,
            "what failed scrapes did not see comes with the next"
        );
        assert_eq!(trial.of("uncompared_tokens_total"), Some(70.0));
        assert_eq!(
            (
                trial.of("engine_tokens_total"),
                trial.of("attributed_tokens_total")
            ),
            (Some(500.0), Some(500.0))
        );
        // The restart is named where there is a gap.
        trial.minute(Some(900), 0);
        for _ in 0..3 {
            trial.minute(Some(0), 0);
        }
        assert!(trial.has_cause(Cause::CounterReset) && trial.has_cause(Cause::ScrapesFailed));
        assert_eq!(
            trial.reconciler.told[0],
            Cause::DirectUnseen,
            "it explains but a few tokens"
        );
    }

    #[test]
    fn what_cannot_be_compared_at_all_is_told_at_once() {
        let mut trial = Trial::new();
        trial.page(None, true);
        trial.page(None, true);
        assert!(trial.has_cause(Cause::SharedAddress));
        assert_eq!(trial.of("gap_exceeded"), Some(0.0));
    }

    #[test]
    fn requests_whose_tokens_nobody_told_are_named_while_they_are_looked_back_on() {
        let mut trial = Trial::new();
        trial.minute(None, 0);
        trial.tally.foreign();
        trial.minute(Some(1_000), 0);
        for _ in 0..3 {
            trial.minute(Some(0), 0);
        }
        assert_eq!(trial.reconciler.told, [Cause::OtherGateway]);
        // The window is an hour, and three minutes are waited for besides.
        for _ in 0..64 {
            trial.minute(Some(1_000), 1_000);
        }
        assert_eq!(
            (trial.of("gap_tokens"), trial.of("gap_exceeded")),
            (Some(0.0), Some(0.0))
        );
        assert!(trial.reconciler.told.is_empty());
    }

    #[test]
    fn counts_of_a_page_are_of_all_of_its_models_or_unknown() {
        let sample = |prompt: Option<u64>, generated: Option<u64>| SystemSample {
            prompt_tokens_delta: prompt,
            generation_tokens_delta: generated,
            generation_tokens_total: Some(9),
            ..SystemSample::default()
        };
        let counted = |samples: &[SystemSample], shared| match Outcome::of(samples, shared, false) {
            Outcome::Page { counted, .. } => counted,
            Outcome::Failed => None,
        };
        let both = [sample(Some(1), Some(2)), sample(Some(3), Some(4))];
        let expected = Totals {
            prompt_tokens: 4,
            completion_tokens: 6,
        };
        assert_eq!(counted(&both, false), Some(expected));
        assert_eq!(counted(&both, true), None);
        assert_eq!(counted(&[both[0].clone(), sample(Some(1), None)], false), None);
        let pooling = SystemSample {
            generation_tokens_total: None,
            ..sample(Some(5), None)
        };
        assert_eq!(
            counted(&[pooling], false).map(|totals| (totals.prompt_tokens, totals.completion_tokens)),
            Some((5, 0))
        );
    }
}
