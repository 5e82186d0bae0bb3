//! What a whole page of `/metrics` says of each model's engines.
//!
//! A family that the page does not have stays `None`: unknown, and not zero. When a server shows a family under an old and a new name
//! at the same time, as it does in the releases around a rename, only the newest counts, so that nothing is summed twice. What is no
//! finite number (or, for a counter, negative) counts as not there.

use std::collections::BTreeMap;

use super::exposition::{self, Sample};
use super::names::{Counter, Family, Gauge, Latency, PREFIX, Series, meaning};

/// Most models kept of one page, in the order of the page. Each costs some dozen series in the gateway's own metrics; a server
/// has one, or a few names for one.
pub const MODELS_MAX: usize = 200;

/// Longest model or engine name that is kept. Names in use are file paths at worst.
const NAME_BYTES_MAX: usize = 1024;

/// Most reasons of `request_success` kept apart, since they become labels; vLLM has five.
const REASONS_MAX: usize = 16;

/// The reason under which those past [`REASONS_MAX`] are summed.
const REASON_OTHER: &str = "__other__";

/// Why a page cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// It is no Prometheus text, or a line about vLLM is broken.
    #[error(
        "expected Prometheus' text format, found a page that breaks it in line {line}; check what answers at /metrics"
    )]
    NotPrometheus {
        /// The first offending line, counted from 1; 0 for a page that is no UTF-8 or empty.
        line: usize,
    },
    /// It is Prometheus text that says nothing of any model.
    #[error(
        "expected families named `vllm:…` with the label `model_name`, found none; check that the upstream is a vLLM server"
    )]
    NotVllm,
}

/// What one page of `/metrics` says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// When the server's process started, in seconds since 1970.
    pub process_start_s: Option<f64>,
    /// By `model_name`.
    pub models: BTreeMap<Box<str>, Model>,
    /// Samples of vLLM's that were left out for a limit of this module.
    pub left_out: u64,
}

/// What a page says of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    /// By the label `engine`; empty for servers that have none.
    pub engines: BTreeMap<Box<str>, Engine>,
}

/// What a page says of one engine: of one replica in data-parallel serving.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Engine {
    gauges: [Option<Newest<f64>>; Gauge::COUNT],
    counters: [Option<Newest<u64>>; Counter::COUNT],
    success: Option<Newest<ByReason>>,
    latencies: [Option<Newest<Buckets>>; Latency::COUNT],
    sums_us: [Option<Newest<u64>>; Latency::COUNT],
    /// Whether it is awake, where the server can be put to sleep.
    awake: Option<bool>,
    transfers: Transfers,
}

/// What tells of KV caches that come from other servers. vLLM has counted these since different versions, and not all connectors fill them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Transfers {
    /// Whether there is a family of NIXL's, the connector between prefill and decode servers: it is there from the start, with 0 in it.
    has_nixl: bool,
    /// Prompt tokens that no prefill of this server's made, nor its own prefix cache had.
    external: u64,
    /// Those of them, by tier, that came from another server or from nobody knows where; `None` for servers that do not tell tiers.
    from_others: Option<u64>,
}

/// Why the requests of a server cannot be billed by what it did for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// It has a connector that is there to hand prefilled prompts over (NIXL).
    KvConnector,
    /// Prompt tokens came to it prefilled.
    ExternalKv,
}

impl Unsupported {
    /// Every one.
    pub const ALL: [Unsupported; 2] = [Unsupported::KvConnector, Unsupported::ExternalKv];

    /// The name in metrics and rows.
    pub fn name(self) -> &'static str {
        match self {
            Unsupported::KvConnector => "kv_connector",
            Unsupported::ExternalKv => "external_kv",
        }
    }
}

/// Requests by why they ended.
pub type ByReason = BTreeMap<Box<str>, u64>;

/// What is said under the newest of a family's names seen so far.
#[derive(Clone, Debug, PartialEq)]
struct Newest<T> {
    age: u8,
    value: T,
}

/// A histogram: upper bound in seconds and how many observations were at most that, ascending by bound.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Buckets(pub Vec<(f64, u64)>);

impl Page {
    /// Reads a page.
    ///
    /// A broken line about something else than vLLM is passed over: a server may expose what its plugins add.
    ///
    /// # Errors
    /// [`PageError`].
    pub fn read(page: &[u8]) -> Result<Page, PageError> {
        let text = std::str::from_utf8(page).map_err(|_| PageError::NotPrometheus { line: 0 })?;
        let mut read = Page::default();
        let (mut any, mut first_bad) = (false, 0);
        for sample in exposition::samples(text) {
            match sample {
                Ok(sample) => {
                    any = true;
                    read.add(&sample);
                }
                Err(bad) if bad.line.trim_ascii_start().starts_with(PREFIX) => {
                    return Err(PageError::NotPrometheus { line: bad.number });
                }
                Err(bad) if first_bad == 0 => first_bad = bad.number,
                Err(_) => {}
            }
        }
        if !any {
            return Err(PageError::NotPrometheus { line: first_bad });
        }
        if read.models.is_empty() {
            return Err(PageError::NotVllm);
        }
        let engines = read
            .models
            .values_mut()
            .flat_map(|model| model.engines.values_mut());
        engines
            .flat_map(|engine| engine.latencies.iter_mut().flatten())
            .for_each(|latency| latency.value.tidy());
        Ok(read)
    }

    fn add(&mut self, sample: &Sample<'_>) {
        if sample.name == "process_start_time_seconds" && sample.value.is_finite() {
            self.process_start_s = Some(sample.value);
        }
        let said = Said::of(sample);
        if said.is_none() {
            return;
        }
        let Some(model) = sample.label("model_name") else {
            return;
        };
        let engine = sample.label("engine").unwrap_or_default();
        let is_full = self.models.len() >= MODELS_MAX && !self.models.contains_key(model);
        if is_full || model.len() > NAME_BYTES_MAX || engine.len() > NAME_BYTES_MAX {
            self.left_out += 1;
            return;
        }
        let engines = &mut self.models.entry(model.into()).or_default().engines;
        let engine = engines.entry(engine.into()).or_default();
        match said {
            Some(Said::Family(family, series, age)) => engine.add(family, series, age, sample),
            Some(Said::State(state)) => engine.add_state(state, sample.value),
            None => {}
        }
    }

    /// The one model that all requests to the server run on; `None` when it names several.
    ///
    /// vLLM labels everything with the base model, also what was done for an adapter.
    pub fn only_model(&self) -> Option<&str> {
        let mut names = self.models.keys();
        match (names.next(), names.next()) {
            (Some(name), None) => Some(name),
            _ => None,
        }
    }

    /// Why its requests cannot be billed, if they cannot.
    pub fn unsupported(&self) -> Option<Unsupported> {
        let engines = self.models.values().flat_map(|model| model.engines.values());
        let has = |of: fn(&Transfers) -> bool| engines.clone().any(|engine| of(&engine.transfers));
        if has(|transfers| transfers.has_nixl) {
            Some(Unsupported::KvConnector)
        } else if has(|transfers| transfers.from_others.unwrap_or(transfers.external) > 0) {
            Some(Unsupported::ExternalKv)
        } else {
            None
        }
    }
}

/// What one sample is about.
#[derive(Clone, Copy)]
enum Said {
    /// A family, and how many renames ago it was named so.
    Family(Family, Series, u8),
    /// The kind of server that this is, and the state that it is in: of which older servers say nothing, and miss nothing.
    State(State),
}

#[derive(Clone, Copy)]
enum State {
    /// `engine_sleep_state{sleep_state="awake"}`, 1 or 0.
    Awake,
    Nixl,
    /// `prompt_tokens_by_source{source="external_kv_transfer"}`.
    External,
    /// A tier of `prompt_tokens_cached_by_source`, and whether it is not the server's own.
    Tier {
        is_foreign: bool,
    },
}

impl Said {
    fn of(sample: &Sample<'_>) -> Option<Said> {
        if let Some((family, series, age)) = meaning(sample.name) {
            return Some(Said::Family(family, series, age));
        }
        let name = sample.name.strip_prefix(PREFIX)?;
        let label_is = |label: &str, wanted: &str| sample.label(label) == Some(wanted);
        let state = match name.strip_suffix("_total").unwrap_or(name) {
            "engine_sleep_state" if label_is("sleep_state", "awake") => State::Awake,
            "prompt_tokens_by_source" if label_is("source", "external_kv_transfer") => State::External,
            "prompt_tokens_cached_by_source" => State::Tier {
                // `device`, `host` and `disk` are caches of the server's own.
                is_foreign: label_is("source", "p2p") || label_is("source", "external_unspecified"),
            },
            name if name.starts_with("nixl_") => State::Nixl,
            _ => return None,
        };
        Some(Said::State(state))
    }
}

impl Engine {
    fn add(&mut self, family: Family, series: Series, age: u8, sample: &Sample<'_>) {
        match family {
            Family::Gauge(gauge) if sample.value.is_finite() => {
                at_age(&mut self.gauges[gauge as usize], age, |sum| *sum += sample.value);
            }
            Family::Gauge(_) => {}
            Family::Counter(counter) | Family::CountOf(counter) => {
                if let Some(count) = count(sample.value) {
                    at_age(&mut self.counters[counter as usize], age, |sum| {
                        *sum = sum.saturating_add(count)
                    });
                }
            }
            Family::RequestSuccess => {
                let reason = sample.label("finished_reason").unwrap_or(REASON_OTHER);
                if let Some(count) = count(sample.value) {
                    at_age(&mut self.success, age, |success| {
                        add_reason(success, reason, count)
                    });
                }
            }
            Family::Latency(latency) if series == Series::Sum => {
                if let Some(us) = count(sample.value * 1e6) {
                    at_age(&mut self.sums_us[latency as usize], age, |sum| {
                        *sum = sum.saturating_add(us)
                    });
                }
            }
            Family::Latency(latency) => {
                let bound_s = sample.label("le").and_then(|le| le.parse::<f64>().ok());
                if let (Some(bound_s), Some(count)) =
                    (bound_s.filter(|bound| !bound.is_nan()), count(sample.value))
                {
                    at_age(&mut self.latencies[latency as usize], age, |buckets| {
                        buckets.0.push((bound_s, count))
                    });
                }
            }
        }
    }

    fn add_state(&mut self, state: State, value: f64) {
        let transfers = &mut self.transfers;
        match state {
            State::Awake if value.is_finite() => self.awake = Some(value > 0.0),
            State::Awake => {}
            State::Nixl => transfers.has_nixl = true,
            State::External => {
                transfers.external = transfers.external.saturating_add(count(value).unwrap_or(0))
            }
            State::Tier { is_foreign } => {
                let tokens = count(value).filter(|_| is_foreign).unwrap_or(0);
                let sum = transfers.from_others.get_or_insert(0);
                *sum = sum.saturating_add(tokens);
            }
        }
    }

    /// What a gauge stands at.
    pub fn gauge(&self, gauge: Gauge) -> Option<f64> {
        self.gauges[gauge as usize].as_ref().map(|newest| newest.value)
    }

    /// What a counter stands at.
    pub fn counter(&self, counter: Counter) -> Option<u64> {
        self.counters[counter as usize]
            .as_ref()
            .map(|newest| newest.value)
    }

    /// Requests that have ended, by reason.
    pub fn success(&self) -> Option<&ByReason> {
        self.success.as_ref().map(|newest| &newest.value)
    }

    /// A histogram.
    pub fn latency(&self, latency: Latency) -> Option<&Buckets> {
        self.latencies[latency as usize]
            .as_ref()
            .map(|newest| &newest.value)
    }

    pub(super) fn counters(&self) -> [Option<u64>; Counter::COUNT] {
        self.counters
            .each_ref()
            .map(|counter| counter.as_ref().map(|newest| newest.value))
    }

    /// What the observations of each histogram sum to, in microseconds.
    pub(super) fn sums_us(&self) -> [Option<u64>; Latency::COUNT] {
        self.sums_us
            .each_ref()
            .map(|sum| sum.as_ref().map(|newest| newest.value))
    }

    pub(super) fn latencies(&self) -> [Option<&Buckets>; Latency::COUNT] {
        self.latencies
            .each_ref()
            .map(|latency| latency.as_ref().map(|newest| &newest.value))
    }
}

/// Changes what a family says, unless a newer name has said it; what older names said is forgotten.
fn at_age<T: Default>(slot: &mut Option<Newest<T>>, age: u8, change: impl FnOnce(&mut T)) {
    match slot {
        Some(known) if known.age < age => {}
        Some(known) if known.age == age => change(&mut known.value),
        _ => {
            let mut value = T::default();
            change(&mut value);
            *slot = Some(Newest { age, value });
        }
    }
}

/// A counter's value. Whole numbers are exact up to 2^53, which is what the text's floats can hold anyway.
fn count(value: f64) -> Option<u64> {
    (value.is_finite() && value >= 0.0).then_some(value.round() as u64)
}

/// Adds to a reason, or to [`REASON_OTHER`] when there are too many.
pub(super) fn add_reason(success: &mut ByReason, reason: &str, count: u64) {
    let is_full = success.len() >= REASONS_MAX && !success.contains_key(reason);
    let sum = success
        .entry(if is_full { REASON_OTHER } else { reason }.into())
        .or_default();
    *sum = sum.saturating_add(count);
}

impl Model {
    /// Sum of a gauge over the engines that have it.
    pub fn gauge_sum(&self, gauge: Gauge) -> Option<f64> {
        self.engines
            .values()
            .filter_map(|engine| engine.gauge(gauge))
            .reduce(|sum, value| sum + value)
    }

    /// Mean of a gauge over the engines that have it, each with the same weight.
    pub fn gauge_mean(&self, gauge: Gauge) -> Option<f64> {
        let having = self
            .engines
            .values()
            .filter(|engine| engine.gauge(gauge).is_some())
            .count();
        self.gauge_sum(gauge).map(|sum| sum / having as f64)
    }

    /// Sum of a counter over the engines that have it.
    pub fn counter_sum(&self, counter: Counter) -> Option<u64> {
        self.engines
            .values()
            .filter_map(|engine| engine.counter(counter))
            .reduce(u64::saturating_add)
    }

    /// Whether all of its engines sleep: they have left the GPU to others, on purpose, and run nothing until they are woken.
    pub fn is_asleep(&self) -> bool {
        let mut awake = self.engines.values().map(|engine| engine.awake);
        !self.engines.is_empty() && awake.all(|awake| awake == Some(false))
    }

    /// How many engines serve the model.
    pub fn engine_count(&self) -> u16 {
        let named = self.engines.keys().filter(|name| !name.is_empty()).count();
        // A server without the label has one engine that does not say its name.
        u16::try_from(named.max(usize::from(!self.engines.is_empty()))).unwrap_or(u16::MAX)
    }
}

impl Buckets {
    /// Sorts by bound, and sums what several series say of one bound.
    fn tidy(&mut self) {
        self.0.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        self.0.dedup_by(|(bound_s, count), (kept_bound_s, kept)| {
            let same = bound_s == kept_bound_s;
            *kept = if same { kept.saturating_add(*count) } else { *kept };
            same
        });
    }

    /// Whether two histograms have the same bounds, so that they can be compared or summed.
    pub(super) fn has_bounds_of(&self, other: &Buckets) -> bool {
        self.0
            .iter()
            .map(|(bound_s, _)| bound_s)
            .eq(other.0.iter().map(|(bound_s, _)| bound_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(page: &str) -> Model {
        let page = Page::read(page.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
        page.models.get("m").cloned().unwrap_or_default()
    }

    #[test]
    fn a_family_that_is_not_there_is_unknown() {
        let model = model(
            "vllm:num_requests_running{model_name=\"m\"} 0\nvllm:prompt_tokens{model_name=\"m\"} NaN\n",
        );
        assert_eq!(model.gauge_sum(Gauge::Running), Some(0.0));
        assert_eq!(model.gauge_sum(Gauge::Waiting), None);
        assert_eq!(model.gauge_mean(Gauge::KvCacheUsage), None);
        assert_eq!(
            model.counter_sum(Counter::PromptTokens),
            None,
            "no number is no count"
        );
        assert_eq!(model.engines[""].success(), None);
        assert_eq!(model.engines[""].latency(Latency::Ttft), None);
        assert_eq!(model.engine_count(), 1);
    }

    #[test]
    fn old_names_mean_the_same() {
        let model = model(concat!(
            "vllm:gpu_cache_usage_perc{model_name=\"m\"} 0.25\n",
            "vllm:prompt_tokens{model_name=\"m\"} 7\n",
            "vllm:gpu_prefix_cache_hits_total{model_name=\"m\"} 2\n",
            "vllm:gpu_prefix_cache_queries_total{model_name=\"m\"} 3\n",
            "vllm:time_per_output_token_seconds_bucket{le=\"+Inf\",model_name=\"m\"} 5\n",
            "vllm:time_per_output_token_seconds_bucket{le=\"0.1\",model_name=\"m\"} 4\n",
        ));
        assert_eq!(model.gauge_mean(Gauge::KvCacheUsage), Some(0.25));
        assert_eq!(model.counter_sum(Counter::PromptTokens), Some(7));
        assert_eq!(model.counter_sum(Counter::PrefixCacheHits), Some(2));
        assert_eq!(model.counter_sum(Counter::PrefixCacheQueries), Some(3));
        let buckets = Buckets(vec![(0.1, 4), (f64::INFINITY, 5)]);
        assert_eq!(
            model.engines[""].latency(Latency::Itl),
            Some(&buckets),
            "sorted by bound"
        );
    }

    /// Around a rename vLLM shows both; summing them would double the cache's use and every gap between tokens.
    #[test]
    fn of_an_old_and_a_new_name_the_new_one_counts_in_either_order() {
        let lines = [
            "vllm:gpu_cache_usage_perc{model_name=\"m\"} 0.3\n",
            "vllm:kv_cache_usage_perc{model_name=\"m\"} 0.4\n",
        ];
        let old = "vllm:time_per_output_token_seconds_bucket{le=\"+Inf\",model_name=\"m\"} 5\n";
        let new = "vllm:inter_token_latency_seconds_bucket{le=\"+Inf\",model_name=\"m\"} 6\n";
        for page in [
            format!("{}{}{old}{new}", lines[0], lines[1]),
            format!("{}{}{new}{old}", lines[1], lines[0]),
        ] {
            let model = model(&page);
            assert_eq!(model.gauge_mean(Gauge::KvCacheUsage), Some(0.4));
            assert_eq!(
                model.engines[""].latency(Latency::Itl),
                Some(&Buckets(vec![(f64::INFINITY, 6)]))
            );
        }
    }

    #[test]
    fn engines_are_summed_and_the_cache_is_averaged() {
        let model = model(concat!(
            "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3\n",
            "vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 5\n",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.2\n",
            "vllm:kv_cache_usage_perc{engine=\"1\",model_name=\"m\"} 0.6\n",
            "vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 10\n",
            "vllm:generation_tokens_total{engine=\"1\",model_name=\"m\"} 1.5e+01\n",
        ));
        assert_eq!(model.engine_count(), 2);
        assert_eq!(model.gauge_sum(Gauge::Running), Some(8.0));
        assert_eq!(model.gauge_mean(Gauge::KvCacheUsage), Some(0.4));
        assert_eq!(model.counter_sum(Counter::GenerationTokens), Some(25));
    }

    #[test]
    fn a_server_sleeps_when_none_of_its_engines_is_awake() {
        let states = |states: &[&str]| {
            let line = |(engine, value): (usize, &&str)| {
                format!(
                    "vllm:engine_sleep_state{{engine=\"{engine}\",model_name=\"m\",sleep_state=\"awake\"}} {value}\n\
                     vllm:engine_sleep_state{{engine=\"{engine}\",model_name=\"m\",sleep_state=\"discard_all\"}} 1\n"
                )
            };
            model(&states.iter().enumerate().map(line).collect::<String>()).is_asleep()
        };
        assert!(states(&["0.0"]) && states(&["0.0", "0"]));
        assert!(!states(&["1.0"]) && !states(&["0.0", "1.0"]) && !states(&["NaN"]));
        let untold = model("vllm:num_requests_running{model_name=\"m\"} 0\n");
        assert!(!untold.is_asleep(), "a server that does not say is awake");
    }

    #[test]
    fn prefill_elsewhere_is_told_from_caches_of_the_servers_own() {
        let real = include_str!("../../tests/fixtures/vllm-0.32.0/metrics_after.prom");
        let unsupported = |page: &str| Page::read(page.as_bytes()).unwrap().unsupported();
        let with = |series: &str, value: &str| {
            let (series, value) = (format!("{series}\"}} 0.0\n"), format!("{series}\"}} {value}\n"));
            assert!(real.contains(&series), "{series}");
            real.replace(&series, &value)
        };
        assert_eq!(unsupported(real), None);
        let tier = |tier: &str| {
            with(
                &format!(
                    "vllm:prompt_tokens_cached_by_source_total{{engine=\"0\",model_name=\"tiny\",source=\"{tier}"
                ),
                "7.0",
            )
        };
        let external = "vllm:prompt_tokens_by_source_total{engine=\"0\",model_name=\"tiny\",source=\"external_kv_transfer";
        for (page, expected) in [
            (tier("p2p"), Some(Unsupported::ExternalKv)),
            (tier("external_unspecified"), Some(Unsupported::ExternalKv)),
            (tier("host"), None),
            (tier("disk"), None),
            (with(external, "7.0"), None),
            // A server that tells no tiers.
            (
                with(external, "7.0").replace("vllm:prompt_tokens_cached_by_source", "vllm:other"),
                Some(Unsupported::ExternalKv),
            ),
            (
                format!("{real}vllm:nixl_xfer_time_seconds_count{{engine=\"0\",model_name=\"tiny\"}} 0.0\n"),
                Some(Unsupported::KvConnector),
            ),
        ] {
            assert_eq!(unsupported(&page), expected);
        }
    }

    #[test]
    fn a_server_with_one_model_has_one_base_model() {
        let page = |models: &[&str]| {
            let line = |model: &&str| format!("vllm:num_requests_running{{model_name=\"{model}\"}} 1\n");
            Page::read(models.iter().map(line).collect::<String>().as_bytes()).unwrap()
        };
        assert_eq!(page(&["a"]).only_model(), Some("a"));
        assert_eq!(page(&["a", "b"]).only_model(), None);
    }

    #[test]
    fn names_that_only_look_alike_are_not_taken() {
        let model = model(concat!(
            "vllm:num_requests_running{model_name=\"m\"} 1\n",
            "vllm:prompt_tokens_created{model_name=\"m\"} 1.7e+09\n",
            "vllm:prompt_tokens_bucket{le=\"1\",model_name=\"m\"} 9\n",
            "vllm:request_prompt_tokens_sum{model_name=\"m\"} 9\n",
            "vllm:prompt_tokens_cached_total{model_name=\"m\"} 9\n",
            "vllm:time_to_first_token_seconds{le=\"1\",model_name=\"m\"} 9\n",
            "prompt_tokens_total{model_name=\"m\"} 9\n",
        ));
        assert_eq!(model.counter_sum(Counter::PromptTokens), None);
        assert_eq!(model.engines[""].latency(Latency::Ttft), None);
    }

    #[test]
    fn what_is_no_page_of_vllms_is_refused() {
        let refused = |page: &[u8]| Page::read(page).unwrap_err();
        assert_eq!(
            refused(b"<html>\n<body>busy</body>\n</html>\n"),
            PageError::NotPrometheus { line: 1 }
        );
        assert_eq!(refused(b""), PageError::NotPrometheus { line: 0 });
        assert_eq!(refused(b"\x1f\x8b\x08\xff"), PageError::NotPrometheus { line: 0 });
        assert_eq!(refused(b"up 1\n"), PageError::NotVllm);
        let cut =
            b"vllm:num_requests_running{model_name=\"m\"} 1\nvllm:prompt_tokens_total{model_name=\"m\"} 17";
        assert_eq!(
            refused(cut),
            PageError::NotPrometheus { line: 2 },
            "17 may have been 1780"
        );
        let odd = "{\"a.plugin\"} 1\nvllm:num_requests_running{model_name=\"m\"} 1\n";
        assert_eq!(
            model(odd).gauge_sum(Gauge::Running),
            Some(1.0),
            "a stranger's line harms nobody"
        );
    }

    #[test]
    fn models_and_reasons_are_bounded() {
        let line = |model: usize| format!("vllm:num_requests_running{{model_name=\"m{model:04}\"}} 1\n");
        let page: String = (0..MODELS_MAX + 5).chain([0]).map(line).collect();
        let page = Page::read(page.as_bytes()).unwrap();
        assert_eq!((page.models.len(), page.left_out), (MODELS_MAX, 5));
        assert_eq!(
            page.models["m0000"].gauge_sum(Gauge::Running),
            Some(2.0),
            "a known model goes on"
        );

        let line = |reason: usize| {
            format!("vllm:request_success{{finished_reason=\"r{reason}\",model_name=\"m\"}} 1\n")
        };
        let model = model(&(0..REASONS_MAX + 5).map(line).collect::<String>());
        let success = model.engines[""].success().unwrap();
        assert_eq!((success.len(), success[REASON_OTHER]), (REASONS_MAX + 1, 5));
    }

    proptest! {
        #[test]
        fn never_panics(page in proptest::collection::vec(any::<u8>(), 0..300)) {
            drop(Page::read(&page));
        }

        /// A real page with bytes overwritten is read or refused.
        #[test]
        fn a_damaged_page_never_panics(damage in proptest::collection::vec((any::<proptest::sample::Index>(), 32u8..127), 1..40)) {
            let mut page = include_bytes!("../../tests/fixtures/vllm-0.32.0/metrics_after.prom").to_vec();
            for (at, byte) in damage {
                let at = at.index(page.len());
                page[at] = byte;
            }
            drop(Page::read(&page));
        }
    }
}
