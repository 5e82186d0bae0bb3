//! What each upstream's engine said at the last scrape.

use crate::vllm::SystemSample;
use crate::wire::At;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

/// All configured upstreams.
#[derive(Debug, Default)]
pub struct Engines {
    by_upstream: HashMap<Box<str>, Engine>,
}

#[derive(Debug, Default)]
struct Engine {
    scraped: Mutex<Scraped>,
}

#[derive(Debug, Default)]
struct Scraped {
    /// When the last page came; `None` before the first.
    at: Option<At>,
    /// The scrape that it is from.
    scraped_at_ms: i64,
    /// The last try.
    tried_at_ms: i64,
    /// Whether there was a page then.
    ok: bool,
    models: BTreeMap<Box<str>, ModelState>,
}

/// What an engine says of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelState {
    /// Requests in the running batch.
    pub running: Option<f64>,
    /// Requests in the queue.
    pub waiting: Option<f64>,
    /// Share of the KV cache in use.
    pub kv_cache_usage: Option<f64>,
}

/// What is known of an engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineState {
    /// When its last page came.
    pub at: Option<At>,
    /// Whether there was a page at the last try.
    pub ok: bool,
    /// Each model of that page.
    pub models: BTreeMap<Box<str>, ModelState>,
}

impl Engines {
    /// These, of which nothing is known.
    pub fn of<'n>(upstreams: impl IntoIterator<Item = &'n str>) -> Engines {
        let by_upstream = upstreams.into_iter();
        Engines {
            by_upstream: by_upstream.map(|name| (name.into(), Engine::default())).collect(),
        }
    }

    /// Takes in what a scrape gave at `now`: a sample for each model, one after the other.
    pub fn record(&self, sample: &SystemSample, now: At) {
        let Some(engine) = self.by_upstream.get(&sample.upstream) else {
            return;
        };
        let mut scraped = engine.scraped.lock().unwrap_or_else(PoisonError::into_inner);
        // A scrape that failed is told again when it is known why; by then there are newer ones.
        if sample.scraped_at_ms < scraped.tried_at_ms {
            return;
        }
        scraped.tried_at_ms = sample.scraped_at_ms;
        scraped.ok = sample.ok;
        if !sample.ok {
            return;
        }
        if scraped.at.is_none() || scraped.scraped_at_ms != sample.scraped_at_ms {
            scraped.models.clear();
            scraped.at = Some(now);
            scraped.scraped_at_ms = sample.scraped_at_ms;
        }
        let state = ModelState {
            running: sample.running,
            waiting: sample.waiting,
            kv_cache_usage: sample.kv_cache_usage,
        };
        scraped.models.insert(sample.model.clone(), state);
    }

    /// What is known of an upstream's engine.
    pub fn state(&self, upstream: &str) -> EngineState {
        let Some(engine) = self.by_upstream.get(upstream) else {
            return EngineState::default();
        };
        let scraped = engine.scraped.lock().unwrap_or_else(PoisonError::into_inner);
        EngineState {
            at: scraped.at,
            ok: scraped.ok,
            models: scraped.models.clone(),
        }
    }
}

impl EngineState {
    /// The sum over all models of what is known.
    pub fn sum(&self, of: fn(&ModelState) -> Option<f64>) -> Option<f64> {
        self.models
            .values()
            .filter_map(of)
            .reduce(|sum, value| sum + value)
    }

    /// The highest over all models: they share the memory of one server.
    pub fn kv_cache_usage_max(&self) -> Option<f64> {
        let usages = self.models.values().filter_map(|model| model.kv_cache_usage);
        usages.reduce(f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: i64, model: &str, running: f64) -> SystemSample {
        SystemSample {
            scraped_at_ms: at_ms,
            upstream: "chat".into(),
            model: model.into(),
            ok: true,
            running: Some(running),
            ..SystemSample::default()
        }
    }

    #[test]
    fn the_models_are_those_of_the_last_page() {
        let engines = Engines::of(["chat"]);
        engines.record(&sample(1, "gone", 9.0), At(1));
        engines.record(&sample(2, "a", 1.0), At(2));
        engines.record(&sample(2, "b", 2.0), At(2));
        let state = engines.state("chat");
        assert_eq!(
            (state.at, state.sum(|model| model.running)),
            (Some(At(2)), Some(3.0))
        );
        assert_eq!(
            state.models.keys().map(|name| &**name).collect::<Vec<_>>(),
            ["a", "b"]
        );
    }

    #[test]
    fn a_failed_scrape_says_so_and_leaves_the_last_page() {
        let engines = Engines::of(["chat"]);
        engines.record(&sample(1, "m", 2.0), At(1));
        let failed = SystemSample {
            ok: false,
            ..sample(2, "m", 0.0)
        };
        engines.record(&failed, At(9));
        let state = engines.state("chat");
        assert!(!state.ok);
        assert_eq!(
            (state.at, state.sum(|model| model.running)),
            (Some(At(1)), Some(2.0))
        );
        assert_eq!(engines.state("unknown"), EngineState::default());

        engines.record(&sample(3, "m", 4.0), At(10));
        engines.record(&failed, At(11));
        assert!(engines.state("chat").ok, "what is told again is no news");
    }
}
