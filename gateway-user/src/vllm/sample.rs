//! One row of `vllm_system_metrics`.

use super::delta::Growth;
use super::names::{Counter, Gauge, Latency};
use super::page::{ByReason, Model};
use crate::ledger::Condition;
use serde::{Serialize, Serializer};
use std::time::Duration;

/// Median and tails of a latency, in microseconds; `None` without observations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percentiles {
    /// Median.
    pub p50_us: Option<u64>,
    /// 95th percentile.
    pub p95_us: Option<u64>,
    /// 99th percentile.
    pub p99_us: Option<u64>,
}

/// Means of latencies, in microseconds; `None` without observations. They are exact, whatever a histogram's buckets are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Means {
    /// In the queue.
    pub queue_us: Option<u64>,
    /// In prefill.
    pub prefill_us: Option<u64>,
    /// Between two tokens of a request.
    pub itl_us: Option<u64>,
}

/// What one upstream said of one model at one scrape, or that the scrape failed. Its JSON form is the row, name for name. Absent values
/// are unknown, not zero.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SystemSample {
    /// Wall clock when the page was there, milliseconds since 1970 (the ticks of the column's type).
    #[serde(rename = "scraped_at")]
    pub scraped_at_ms: i64,
    /// Which gateway scraped.
    pub gateway_id: Box<str>,
    /// The upstream's configured name.
    pub upstream: Box<str>,
    /// `model_name`; empty when the scrape failed.
    pub model: Box<str>,
    /// Whether there is a page.
    pub ok: bool,
    /// Why there is none: a reason from a bounded set, else empty.
    pub error: &'static str,
    /// How the engine was; `None` in rows that nobody judged.
    #[serde(serialize_with = "name_of_condition")]
    pub condition: Option<Condition>,
    /// Why its requests are not billed by what it did for them: a reason from a bounded set, else empty.
    pub unsupported: &'static str,
    /// Prompt tokens, as the engine counts them, that this gateway attributed to requests since its page before; `None` where there is none,
    /// or several models share one server.
    pub attributed_prompt_tokens: Option<u64>,
    /// Generated tokens, likewise.
    pub attributed_completion_tokens: Option<u64>,
    /// How long the scrape took.
    pub scrape_us: u64,
    /// Time since the page that the differences are from; `None` with them.
    pub interval_us: Option<u64>,
    /// How many engines (data-parallel replicas) there are.
    pub engines: u16,
    /// Whether the engines' counters are not comparable with those of the scrape before: they began anew, or an engine came or went.
    pub counter_reset: bool,
    /// Requests in the running batches, summed.
    pub running: Option<f64>,
    /// Requests in the queues, summed.
    pub waiting: Option<f64>,
    /// Share of the KV cache in use, 0 to 1: the mean over the engines.
    pub kv_cache_usage: Option<f64>,
    /// Share of the prompt tokens looked up since the scrape before that the prefix cache had; `None` when none were looked up.
    pub prefix_cache_hit_ratio: Option<f64>,
    /// Preemptions since the engines started.
    pub preemptions_total: Option<u64>,
    /// Prompt tokens since the engines started.
    pub prompt_tokens_total: Option<u64>,
    /// Generated tokens since the engines started.
    pub generation_tokens_total: Option<u64>,
    /// Steps since the engines started, of those from which anything came out.
    pub engine_steps_total: Option<u64>,
    /// Steps since the scrape before.
    pub engine_steps_delta: Option<u64>,
    /// Prompt tokens since the scrape before.
    pub prompt_tokens_delta: Option<u64>,
    /// Generated tokens since the scrape before.
    pub generation_tokens_delta: Option<u64>,
    /// Preemptions since the scrape before; not stored.
    #[serde(skip)]
    pub preemptions_delta: Option<u64>,
    /// Prompt tokens a second.
    pub prompt_tokens_per_second: Option<f64>,
    /// Generated tokens a second.
    pub generation_tokens_per_second: Option<f64>,
    /// Requests that ended since the scrape before, by reason, those with none included; empty when unknown.
    pub request_success: ByReason,
    /// Arrival to first token.
    #[serde(flatten, with = "columns::ttft")]
    pub ttft: Percentiles,
    /// Between two tokens of a request.
    #[serde(flatten, with = "columns::itl")]
    pub itl: Percentiles,
    /// In the queue. vLLM's own buckets begin at 0.3 s here and in the two below: what took less shows as some share of that.
    #[serde(flatten, with = "columns::queue")]
    pub queue: Percentiles,
    /// In prefill.
    #[serde(flatten, with = "columns::prefill")]
    pub prefill: Percentiles,
    /// In decode.
    #[serde(flatten, with = "columns::decode")]
    pub decode: Percentiles,
    /// Means of what the percentiles are of; not stored.
    #[serde(skip)]
    pub means: Means,
}

impl SystemSample {
    /// Fills in what the page says of `model`.
    pub(super) fn describe(&mut self, name: &str, model: &Model) {
        self.ok = true;
        self.condition = Some(match model.gauge_sum(Gauge::Running) {
            Some(running) if running > 0.0 => Condition::Running,
            _ if model.is_asleep() => Condition::Asleep,
            running => Condition::of_scrape(true, running),
        });
        self.model = name.into();
        self.engines = model.engine_count();
        self.running = model.gauge_sum(Gauge::Running);
        self.waiting = model.gauge_sum(Gauge::Waiting);
        self.kv_cache_usage = model.gauge_mean(Gauge::KvCacheUsage);
        self.preemptions_total = model.counter_sum(Counter::Preemptions);
        self.prompt_tokens_total = model.counter_sum(Counter::PromptTokens);
        self.generation_tokens_total = model.counter_sum(Counter::GenerationTokens);
        self.engine_steps_total = model.counter_sum(Counter::Steps);
    }

    /// Fills in what happened within `interval`.
    pub(super) fn compare(&mut self, growth: Growth, interval: Duration) {
        let per_second = |count: Option<u64>| {
            let seconds = interval.as_secs_f64();
            count
                .filter(|_| seconds > 0.0)
                .map(|count| count as f64 / seconds)
        };
        self.interval_us = Some(u64::try_from(interval.as_micros()).unwrap_or(u64::MAX));
        self.prefix_cache_hit_ratio = growth.prefix_cache_hit_ratio();
        self.prompt_tokens_delta = growth.counter(Counter::PromptTokens);
        self.generation_tokens_delta = growth.counter(Counter::GenerationTokens);
        self.engine_steps_delta = growth.counter(Counter::Steps);
        self.preemptions_delta = growth.counter(Counter::Preemptions);
        self.prompt_tokens_per_second = per_second(self.prompt_tokens_delta);
        self.generation_tokens_per_second = per_second(self.generation_tokens_delta);
        self.ttft = percentiles(&growth, Latency::Ttft);
        self.itl = percentiles(&growth, Latency::Itl);
        self.queue = percentiles(&growth, Latency::Queue);
        self.prefill = percentiles(&growth, Latency::Prefill);
        self.decode = percentiles(&growth, Latency::Decode);
        self.means = Means {
            queue_us: growth.mean_us(Latency::Queue),
            prefill_us: growth.mean_us(Latency::Prefill),
            itl_us: growth.mean_us(Latency::Itl),
        };
        self.request_success = growth.success.unwrap_or_default();
    }
}

fn percentiles(growth: &Growth, latency: Latency) -> Percentiles {
    let at = |q| growth.latency(latency).and_then(|buckets| buckets.quantile_us(q));
    Percentiles {
        p50_us: at(0.5),
        p95_us: at(0.95),
        p99_us: at(0.99),
    }
}

fn name_of_condition<S: Serializer>(condition: &Option<Condition>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(condition.map_or("", Condition::name))
}

/// Where samples go. Called on the scrape's own task: it must neither block nor fail.
pub trait SampleSink: Send + Sync {
    /// Takes note of a sample.
    fn record(&self, sample: &SystemSample);
}

/// The columns of [`Percentiles`], by what was measured.
mod columns {
    macro_rules! columns {
        ($($latency:ident: $p50:literal $p95:literal $p99:literal),* $(,)?) => {$(
            pub(super) mod $latency {
                use super::super::Percentiles;
                use serde::{Serializer, ser::SerializeMap};

                pub(in super::super) fn serialize<S: Serializer>(of: &Percentiles, to: S) -> Result<S::Ok, S::Error> {
                    let mut map = to.serialize_map(Some(3))?;
                    map.serialize_entry($p50, &of.p50_us)?;
                    map.serialize_entry($p95, &of.p95_us)?;
                    map.serialize_entry($p99, &of.p99_us)?;
                    map.end()
                }
            }
        )*};
    }
    columns! {
        ttft: "ttft_p50_us" "ttft_p95_us" "ttft_p99_us",
        itl: "itl_p50_us" "itl_p95_us" "itl_p99_us",
        queue: "queue_p50_us" "queue_p95_us" "queue_p99_us",
        prefill: "prefill_p50_us" "prefill_p95_us" "prefill_p99_us",
        decode: "decode_p50_us" "decode_p95_us" "decode_p99_us",
    }
}
