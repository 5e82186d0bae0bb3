//! Which of vLLM's families means what, under its names of several years.

use std::collections::{BTreeMap, BTreeSet};

use super::exposition;

/// What stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gauge {
    /// Requests in the running batch.
    Running,
    /// Requests in the queue.
    Waiting,
    /// Share of the KV cache in use, 0 to 1.
    KvCacheUsage,
}

/// What has happened since the engine started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Prompt tokens processed.
    PromptTokens,
    /// Tokens generated.
    GenerationTokens,
    /// Requests thrown out of the batch for lack of KV cache.
    Preemptions,
    /// Prompt tokens looked up in the prefix cache.
    PrefixCacheQueries,
    /// Those found there.
    PrefixCacheHits,
    /// Steps of the engine from which anything came out.
    Steps,
}

/// How long something took, as a histogram of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latency {
    /// Arrival to first token.
    Ttft,
    /// Between two tokens of a request.
    Itl,
    /// In the queue.
    Queue,
    /// In prefill.
    Prefill,
    /// In decode.
    Decode,
}

impl Gauge {
    pub(super) const COUNT: usize = Gauge::KvCacheUsage as usize + 1;
}

impl Counter {
    pub(super) const COUNT: usize = Counter::Steps as usize + 1;
}

impl Latency {
    pub(super) const COUNT: usize = Latency::Decode as usize + 1;
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Gauge(Gauge),
    /// With or without `_total`.
    Counter(Counter),
    /// A counter by `finished_reason`.
    RequestSuccess,
    /// Its `_bucket`s are read, and its `_sum`.
    Latency(Latency),
    /// A histogram of which only the `_count` is read.
    CountOf(Counter),
}

/// Which of a family's series a sample is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Series {
    /// The only one of a gauge or a counter.
    Value,
    Bucket,
    Sum,
    Count,
}

impl Family {
    fn has(self, series: Series) -> bool {
        match self {
            Family::Gauge(_) | Family::Counter(_) | Family::RequestSuccess => series == Series::Value,
            Family::Latency(_) => matches!(series, Series::Bucket | Series::Sum),
            Family::CountOf(_) => series == Series::Count,
        }
    }
}

/// Name without `vllm:` and suffixes, meaning, and how many renames ago it was the name.
const NAMES: [(&str, Family, u8); 19] = [
    ("num_requests_running", Family::Gauge(Gauge::Running), 0),
    ("num_requests_waiting", Family::Gauge(Gauge::Waiting), 0),
    ("kv_cache_usage_perc", Family::Gauge(Gauge::KvCacheUsage), 0),
    ("gpu_cache_usage_perc", Family::Gauge(Gauge::KvCacheUsage), 1),
    ("prompt_tokens", Family::Counter(Counter::PromptTokens), 0),
    ("generation_tokens", Family::Counter(Counter::GenerationTokens), 0),
    ("num_preemptions", Family::Counter(Counter::Preemptions), 0),
    (
        "prefix_cache_queries",
        Family::Counter(Counter::PrefixCacheQueries),
        0,
    ),
    (
        "gpu_prefix_cache_queries",
        Family::Counter(Counter::PrefixCacheQueries),
        1,
    ),
    ("prefix_cache_hits", Family::Counter(Counter::PrefixCacheHits), 0),
    (
        "gpu_prefix_cache_hits",
        Family::Counter(Counter::PrefixCacheHits),
        1,
    ),
    ("request_success", Family::RequestSuccess, 0),
    ("time_to_first_token_seconds", Family::Latency(Latency::Ttft), 0),
    ("inter_token_latency_seconds", Family::Latency(Latency::Itl), 0),
    ("time_per_output_token_seconds", Family::Latency(Latency::Itl), 1),
    ("request_queue_time_seconds", Family::Latency(Latency::Queue), 0),
    (
        "request_prefill_time_seconds",
        Family::Latency(Latency::Prefill),
        0,
    ),
    ("request_decode_time_seconds", Family::Latency(Latency::Decode), 0),
    // `_total` is a part of its name.
    ("iteration_tokens_total", Family::CountOf(Counter::Steps), 0),
];

/// The meaning and age of a sample's name.
pub(super) fn meaning(name: &str) -> Option<(Family, Series, u8)> {
    entry(name).map(|(_, family, series, age)| (family, series, age))
}

/// What is known of a sample's name.
fn entry(name: &str) -> Option<(&'static str, Family, Series, u8)> {
    let name = name.strip_prefix(PREFIX)?;
    let of_histogram = [
        ("_bucket", Series::Bucket),
        ("_sum", Series::Sum),
        ("_count", Series::Count),
    ];
    let (base, series) = of_histogram
        .into_iter()
        .find_map(|(suffix, series)| Some((name.strip_suffix(suffix)?, series)))
        .unwrap_or((name.strip_suffix("_total").unwrap_or(name), Series::Value));
    let (known, family, age) = NAMES.iter().find(|(known, ..)| *known == base)?;
    family.has(series).then_some((*known, *family, series, *age))
}

/// Which of the families that this program reads a page has: each under its newest name, and under the name that the page has for it.
/// A page that shows one under both has it under the newest.
pub fn names_in(page: &str) -> BTreeMap<&'static str, &'static str> {
    let mut found = BTreeMap::new();
    let names = exposition::samples(page).flatten().map(|sample| sample.name);
    // A histogram has a dozen samples of one name.
    for name in names.collect::<BTreeSet<_>>() {
        let Some((known, family, _, age)) = entry(name).filter(|(_, _, series, _)| *series != Series::Sum)
        else {
            continue;
        };
        let newest = newest_name(family).unwrap_or(known);
        if age == 0 {
            found.insert(newest, known);
        } else {
            found.entry(newest).or_insert(known);
        }
    }
    found
}

/// The newest names of all families that this program reads.
pub fn newest_names() -> impl Iterator<Item = &'static str> {
    NAMES.iter().filter(|(.., age)| *age == 0).map(|(name, ..)| *name)
}

fn newest_name(family: Family) -> Option<&'static str> {
    let same = |(_, other, age): &&(&str, Family, u8)| *other == family && *age == 0;
    NAMES.iter().find(same).map(|(name, ..)| *name)
}

/// What all of vLLM's names begin with.
pub(super) const PREFIX: &str = "vllm:";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_tells_under_which_names_it_has_a_family() {
        let real = include_str!("../../tests/fixtures/vllm-0.32.0/metrics_after.prom");
        let found = names_in(real);
        assert!(found.iter().all(|(newest, name)| newest == name), "{found:?}");
        assert!(newest_names().all(|name| found.contains_key(name)), "{found:?}");
        let old = names_in(concat!(
            "vllm:gpu_cache_usage_perc{model_name=\"m\"} 0\n",
            "vllm:gpu_prefix_cache_hits_total{model_name=\"m\"} 0\n",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 0\n",
            "vllm:time_to_first_token_seconds_sum{model_name=\"m\"} 0\n",
        ));
        let expected = [
            ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
            ("prefix_cache_hits", "prefix_cache_hits"),
        ];
        assert_eq!(old, expected.into(), "the buckets tell that a histogram is there");
    }
}
