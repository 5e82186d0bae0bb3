//! What each upstream's engine said at the last scrape, and how its token counters compare with the requests that are known.

use crate::vllm::SystemSample;
use crate::wire::At;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// All configured upstreams.
#[derive(Debug, Default)]
pub struct Engines {
    by_upstream: HashMap<Box<str>, Engine>,
}

#[derive(Debug, Default)]
struct Engine {
    /// Tokens of the requests that have ended, as the engine counts them.
    prompt: AtomicU64,
    completion: AtomicU64,
    scraped: Mutex<Scraped>,
}

#[derive(Debug, Default)]
struct Scraped {
    /// When the last page came; `None` before the first.
    at: Option<At>,
    /// The scrape that it is from.
    scraped_at_ms: i64,
    /// Whether there was a page at the last try.
    ok: bool,
    models: BTreeMap<Box<str>, ModelState>,
    compared: Compared,
    /// What was attributed at the last page.
    attributed_at_last: [u64; 2],
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

/// Tokens that an engine has counted, and those of known requests in the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Prompt tokens by the engine's counters.
    pub engine_prompt_tokens: u64,
    /// Generated tokens by the engine's counters.
    pub engine_completion_tokens: u64,
    /// Prompt tokens of requests that have ended.
    pub attributed_prompt_tokens: u64,
    /// Generated tokens of requests that have ended.
    pub attributed_completion_tokens: u64,
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
    /// Its tokens.
    pub compared: Compared,
}

impl Engines {
    /// These, of which nothing is known.
    pub fn of<'n>(upstreams: impl IntoIterator<Item = &'n str>) -> Engines {
        let by_upstream = upstreams.into_iter();
        Engines {
            by_upstream: by_upstream.map(|name| (name.into(), Engine::default())).collect(),
        }
    }

    /// A request at `upstream` had so many tokens. One that went elsewhere is no matter of these.
    pub fn attribute(&self, upstream: &str, prompt: u64, completion: u64) {
        if let Some(engine) = self.by_upstream.get(upstream) {
            engine.prompt.fetch_add(prompt, Ordering::Relaxed);
            engine.completion.fetch_add(completion, Ordering::Relaxed);
        }
    }

    /// Takes in what a scrape gave at `now`: a sample for each model, one after the other.
    pub fn record(&self, sample: &SystemSample, now: At) {
        let Some(engine) = self.by_upstream.get(&sample.upstream) else {
            return;
        };
        let attributed = [
            engine.prompt.load(Ordering::Relaxed),
            engine.completion.load(Ordering::Relaxed),
        ];
        let mut scraped = engine.scraped.lock().unwrap_or_else(PoisonError::into_inner);
        scraped.ok = sample.ok;
        if !sample.ok {
            return;
        }
        if scraped.at.is_none() || scraped.scraped_at_ms != sample.scraped_at_ms {
            scraped.models.clear();
            scraped.at = Some(now);
            scraped.scraped_at_ms = sample.scraped_at_ms;
            let [prompt_before, completion_before] = scraped.attributed_at_last;
            // Where the engine's own growth is not known, as at the first page and after a restart, there is nothing to compare with.
            if sample.prompt_tokens_delta.is_some() {
                scraped.compared.attributed_prompt_tokens += attributed[0] - prompt_before;
                scraped.compared.attributed_completion_tokens += attributed[1] - completion_before;
            }
            scraped.attributed_at_last = attributed;
        }
        scraped.compared.engine_prompt_tokens += sample.prompt_tokens_delta.unwrap_or(0);
        scraped.compared.engine_completion_tokens += sample.generation_tokens_delta.unwrap_or(0);
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
            compared: scraped.compared,
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

    fn sample(at_ms: i64, prompt_delta: Option<u64>, running: f64) -> SystemSample {
        SystemSample {
            scraped_at_ms: at_ms,
            upstream: "chat".into(),
            model: "m".into(),
            ok: true,
            running: Some(running),
            prompt_tokens_delta: prompt_delta,
            generation_tokens_delta: prompt_delta,
            ..SystemSample::default()
        }
    }

    #[test]
    fn tokens_are_compared_over_the_time_that_the_engine_tells_of() {
        let engines = Engines::of(["chat"]);
        engines.attribute("chat", 5, 5);
        engines.record(&sample(1, None, 0.0), At(1));
        engines.attribute("chat", 10, 20);
        engines.attribute("elsewhere", 1_000, 1_000);
        engines.record(&sample(2, Some(12), 3.0), At(2));
        let state = engines.state("chat");
        let expected = Compared {
            engine_prompt_tokens: 12,
            engine_completion_tokens: 12,
            attributed_prompt_tokens: 10,
            attributed_completion_tokens: 20,
        };
        assert_eq!(
            state.compared, expected,
            "what was before the first page is no growth"
        );
        assert_eq!(
            (state.at, state.sum(|model| model.running)),
            (Some(At(2)), Some(3.0))
        );

        engines.attribute("chat", 7, 7);
        engines.record(&sample(3, None, 0.0), At(3));
        assert_eq!(
            engines.state("chat").compared,
            expected,
            "after a restart neither side is known"
        );
    }

    #[test]
    fn a_failed_scrape_says_so_and_leaves_the_last_page() {
        let engines = Engines::of(["chat"]);
        engines.record(&sample(1, None, 2.0), At(1));
        let failed = SystemSample {
            ok: false,
            ..sample(2, None, 0.0)
        };
        engines.record(&failed, At(9));
        let state = engines.state("chat");
        assert!(!state.ok);
        assert_eq!(
            (state.at, state.sum(|model| model.running)),
            (Some(At(1)), Some(2.0))
        );
        assert_eq!(engines.state("unknown"), EngineState::default());
    }
}
