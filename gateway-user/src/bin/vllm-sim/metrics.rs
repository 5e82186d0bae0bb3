//! `/metrics` as vLLM's Prometheus client writes it: families, help texts, labels in alphabetical order, and the
//! `_created` gauge behind every counter and histogram.
//!
//! Families about Python itself are left out, and so are `http_*`, which count the frontend, not the engine.

use std::fmt::Write as _;

use crate::engine::{Histogram, Stats};
use crate::options::Options;

const FLOPS: &str = "(for Model Flops Utilization calculations).";
const CACHED_BY_SOURCE: &str = "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), \
    host (offloaded to DRAM), disk, p2p (transferred from another vLLM instance) or external_unspecified. Counted at \
    admission; sums to vllm:prefix_cache_hits + vllm:external_prefix_cache_hits.";
const WAITING_BY_REASON: &str = "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for \
    scheduling capacity; 'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). \
    Sum of all reasons equals vllm:num_requests_waiting.";
const SLEEP_STATE: &str = "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; \
    weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.";
const EXTERNAL: &str = "from KV connector cross-instance cache sharing, in terms of number of";

/// The whole page.
pub fn render(stats: &Stats, options: &Options, started_s: f64, sleep_level: u8) -> String {
    let mut page = Page {
        out: String::with_capacity(64 * 1024),
        model: label_value(&options.models[0]),
        started_s,
        is_disaggregated: options.disaggregated,
    };
    page.process();
    page.gauges(stats, sleep_level);
    page.cache_counters(stats);
    page.token_counters(stats);
    page.request_counters(stats);
    page.request_histograms(stats);
    page.time_histograms(stats);
    page.cache_config(options);
    page.out
}

/// The engine's token totals, as `/sim/totals` gives them.
pub fn totals(stats: &Stats) -> String {
    format!(
        r#"{{"prompt_tokens":{},"prompt_tokens_cached":{},"generation_tokens":{},"requests_stop":{},"requests_length":{},"preemptions":{},"rejected":{},"running":{},"waiting":{}}}"#,
        stats.prompt_tokens,
        stats.prompt_tokens_cached,
        stats.generation_tokens,
        stats.success_stop,
        stats.success_length,
        stats.preemptions,
        stats.rejected,
        stats.running,
        stats.waiting
    )
}

/// A label and the value of each of its series.
type Series<'a> = (&'a str, &'a [(&'a str, f64)]);

struct Page {
    out: String,
    model: String,
    started_s: f64,
    is_disaggregated: bool,
}

impl Page {
    fn process(&mut self) {
        let name = "process_start_time_seconds";
        self.family(
            name,
            "Start time of the process since unix epoch in seconds.",
            "gauge",
        );
        let started = number(self.started_s);
        self.line(&format!("{name} {started}"));
    }

    fn gauges(&mut self, stats: &Stats, sleep_level: u8) {
        for (name, unit) in [
            ("flops", "floating point operations"),
            ("read_bytes", "bytes read from memory"),
            ("write_bytes", "bytes written to memory"),
        ] {
            let help = format!("Estimated number of {unit} per GPU {FLOPS}");
            self.counter(&format!("estimated_{name}_per_gpu"), &help, 0);
        }
        self.gauge(
            "num_requests_running",
            "Number of requests in model execution batches.",
            stats.running as f64,
        );
        self.gauge(
            "num_requests_waiting",
            "Number of requests waiting to be processed.",
            stats.waiting as f64,
        );
        let waiting = [("capacity", stats.waiting as f64), ("deferred", 0.0)];
        self.series(
            "num_requests_waiting_by_reason",
            WAITING_BY_REASON,
            "gauge",
            ("reason", &waiting),
        );
        let is_at = |level| f64::from(u8::from(sleep_level == level));
        let awake = [
            ("awake", is_at(0)),
            ("weights_offloaded", is_at(1)),
            ("discard_all", is_at(2)),
        ];
        self.series(
            "engine_sleep_state",
            SLEEP_STATE,
            "gauge",
            ("sleep_state", &awake),
        );
        self.gauge(
            "kv_cache_usage_perc",
            "KV-cache usage. 1 means 100 percent usage.",
            stats.kv_usage,
        );
    }

    fn cache_counters(&mut self, stats: &Stats) {
        let queries = "in terms of number of queried";
        let hits = "in terms of number of cached";
        self.counter(
            "prefix_cache_queries",
            &format!("Prefix cache queries, {queries} tokens."),
            stats.prefix_queries,
        );
        self.counter(
            "prefix_cache_hits",
            &format!("Prefix cache hits, {hits} tokens."),
            stats.prefix_hits,
        );
        let help = format!("External prefix cache queries {EXTERNAL} queried tokens.");
        self.counter("external_prefix_cache_queries", &help, 0);
        let help = format!("External prefix cache hits {EXTERNAL} cached tokens.");
        self.counter("external_prefix_cache_hits", &help, 0);
        self.counter(
            "mm_cache_queries",
            &format!("Multi-modal cache queries, {queries} items."),
            0,
        );
        self.counter(
            "mm_cache_hits",
            &format!("Multi-modal cache hits, {hits} items."),
            0,
        );
    }

    fn token_counters(&mut self, stats: &Stats) {
        self.counter(
            "num_preemptions",
            "Cumulative number of preemption from the engine.",
            stats.preemptions,
        );
        self.counter(
            "prompt_tokens",
            "Number of prefill tokens processed.",
            stats.prompt_tokens,
        );
        let computed = stats.prompt_tokens_computed as f64;
        let (here, elsewhere) = match self.is_disaggregated {
            true => (0.0, computed),
            false => (computed, 0.0),
        };
        let sources = [
            ("local_compute", here),
            ("local_cache_hit", stats.prompt_tokens_cached as f64),
            ("external_kv_transfer", elsewhere),
        ];
        self.series(
            "prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            "counter",
            ("source", &sources),
        );
        let help = "Number of cached prompt tokens (local + external).";
        self.counter("prompt_tokens_cached", help, stats.prompt_tokens_cached);
        let tiers = ["device", "host", "p2p", "disk", "external_unspecified"];
        let tiers = tiers.map(|tier| match tier {
            "device" => (tier, stats.prefix_hits as f64),
            "p2p" => (tier, elsewhere),
            _ => (tier, 0.0),
        });
        self.series(
            "prompt_tokens_cached_by_source",
            CACHED_BY_SOURCE,
            "counter",
            ("source", &tiers),
        );
        self.counter(
            "generation_tokens",
            "Number of generation tokens processed.",
            stats.generation_tokens,
        );
        if self.is_disaggregated {
            self.counter(
                "nixl_num_failed_transfers",
                "Number of failed NIXL KV Cache transfers.",
                0,
            );
        }
    }

    fn request_counters(&mut self, stats: &Stats) {
        let reasons = [
            ("stop", stats.success_stop as f64),
            ("length", stats.success_length as f64),
            ("abort", 0.0),
            ("error", 0.0),
            ("repetition", 0.0),
        ];
        let help = "Count of successfully processed requests.";
        self.series("request_success", help, "counter", ("finished_reason", &reasons));
        let rejections = [
            ("max_num_queued_reqs", stats.rejected as f64),
            ("max_num_queued_tokens", 0.0),
        ];
        let help = "Number of admission attempts rejected by a queue limit, by reason.";
        self.series("admission_rejections", help, "counter", ("reason", &rejections));
    }

    fn request_histograms(&mut self, stats: &Stats) {
        let prefill = "Number of prefill tokens processed.";
        self.histogram("request_prompt_tokens", prefill, &stats.request_prompt_tokens);
        let generation = "Number of generation tokens processed.";
        self.histogram(
            "request_generation_tokens",
            generation,
            &stats.request_generation_tokens,
        );
        let step = "Histogram of number of tokens per engine_step.";
        self.histogram("iteration_tokens_total", step, &stats.iteration_tokens);
        let longest = "Histogram of maximum number of requested generation tokens.";
        self.histogram(
            "request_max_num_generation_tokens",
            longest,
            &stats.request_max_num_generation_tokens,
        );
        self.histogram(
            "request_params_n",
            "Histogram of the n request parameter.",
            &stats.request_params_n,
        );
        let max = "Histogram of the max_tokens request parameter.";
        self.histogram("request_params_max_tokens", max, &stats.request_params_max_tokens);
    }

    fn time_histograms(&mut self, stats: &Stats) {
        let first = "Histogram of time to first token in seconds.";
        self.histogram("time_to_first_token_seconds", first, &stats.time_to_first_token);
        let between = "Histogram of inter-token latency in seconds.";
        self.histogram("inter_token_latency_seconds", between, &stats.inter_token_latency);
        let mean = "Histogram of time_per_output_token_seconds per request.";
        self.histogram(
            "request_time_per_output_token_seconds",
            mean,
            &stats.time_per_output_token,
        );
        let all = "Histogram of e2e request latency in seconds.";
        self.histogram("e2e_request_latency_seconds", all, &stats.e2e_latency);
        for (phase, name, histogram) in [
            ("WAITING", "queue", &stats.queue_time),
            ("RUNNING", "inference", &stats.inference_time),
            ("PREFILL", "prefill", &stats.prefill_time),
            ("DECODE", "decode", &stats.decode_time),
        ] {
            let help = format!("Histogram of time spent in {phase} phase for request.");
            self.histogram(&format!("request_{name}_time_seconds"), &help, histogram);
        }
        let preempted = "Histogram of the number of times a request was preempted.";
        self.histogram("request_num_preemptions", preempted, &stats.request_preemptions);
        let computed = "Histogram of new KV tokens computed during prefill (excluding cached tokens).";
        self.histogram(
            "request_prefill_kv_computed_tokens",
            computed,
            &stats.prefill_computed_tokens,
        );
    }

    fn cache_config(&mut self, options: &Options) {
        self.family(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            "gauge",
        );
        let python_bool = if options.no_prefix_cache { "False" } else { "True" };
        self.line(&format!(
            r#"vllm:cache_config_info{{block_size="{}",cache_dtype="auto",enable_prefix_caching="{python_bool}",engine="0",gpu_memory_utilization="0.92",kv_cache_size_tokens="{}",num_gpu_blocks="{}",prefix_caching_hash_algo="sha256"}} 1.0"#,
            options.block_size,
            u64::from(options.kv_blocks) * u64::from(options.block_size),
            options.kv_blocks,
        ));
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(&format!("vllm:{name}"), help, "gauge");
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(&format!("vllm:{name}_total"), help, "counter");
        self.sample(&format!("{name}_total"), &[], value as f64);
        self.created(name, help, &[]);
    }

    fn series(&mut self, name: &str, help: &str, kind: &str, (label, values): Series<'_>) {
        let full = if kind == "counter" {
            format!("{name}_total")
        } else {
            name.to_owned()
        };
        self.family(&format!("vllm:{full}"), help, kind);
        for (value, number) in values {
            self.sample(&full, &[(label, value)], *number);
        }
        if kind == "counter" {
            let labels: Vec<_> = values.iter().map(|(value, _)| (label, *value)).collect();
            self.created(name, help, &labels);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(&format!("vllm:{name}"), help, "histogram");
        let bounds = histogram
            .bounds
            .iter()
            .map(|bound| number(*bound))
            .chain(["+Inf".to_owned()]);
        let mut below = 0;
        for (bound, count) in bounds.zip(&histogram.counts) {
            below += count;
            self.sample(&format!("{name}_bucket"), &[("le", &bound)], below as f64);
        }
        self.sample(&format!("{name}_count"), &[], histogram.count() as f64);
        self.sample(&format!("{name}_sum"), &[], histogram.sum);
        self.created(name, help, &[]);
    }

    /// The `_created` family; with `series` one sample for each.
    fn created(&mut self, name: &str, help: &str, series: &[(&str, &str)]) {
        let name = format!("{name}_created");
        self.family(&format!("vllm:{name}"), help, "gauge");
        let started_s = self.started_s;
        if series.is_empty() {
            self.sample(&name, &[], started_s);
        }
        for pair in series {
            self.sample(&name, &[*pair], started_s);
        }
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) {
        self.line(&format!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, extra: &[(&str, &str)], value: f64) {
        let model = std::mem::take(&mut self.model);
        let mut labels = vec![("model_name", model.as_str())];
        // The rejections are the frontend's, which knows no engine.
        if !name.starts_with("admission_rejections") {
            labels.push(("engine", "0"));
        }
        labels.extend_from_slice(extra);
        labels.sort_unstable();
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        let line = format!("vllm:{name}{{{}}} {}", labels.join(","), number(value));
        self.model = model;
        self.line(&line);
    }

    fn line(&mut self, line: &str) {
        // Writing into a String cannot fail.
        let _ = writeln!(self.out, "{line}");
    }
}

/// A number as Python's client prints it: always a float, with an exponent from a million on.
fn number(value: f64) -> String {
    let plain = format!("{value:?}");
    match plain.find('.') {
        Some(dot) if value > 0.0 && dot > 6 => {
            let digits = format!("{}.{}{}", &plain[..1], &plain[1..dot], &plain[dot + 1..]);
            format!("{}e+0{}", digits.trim_end_matches(['0', '.']), dot - 1)
        }
        _ => plain,
    }
}

fn label_value(raw: &str) -> String {
    raw.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    const REAL: &str = include_str!("../../../tests/fixtures/vllm-0.32.0/metrics_under_load.prom");

    /// The page's `vllm:` lines without values and without what the model is called.
    fn skeleton(page: &str) -> Vec<String> {
        page.lines()
            .filter(|line| line.contains("vllm:") && !line.starts_with("vllm:cache_config_info"))
            .map(|line| match line.starts_with('#') {
                true => line.to_owned(),
                false => line
                    .rsplit_once(' ')
                    .unwrap()
                    .0
                    .replace("model_name=\"tiny\"", "model_name=\"sim\""),
            })
            .collect()
    }

    #[test]
    fn every_engine_family_is_there_as_the_real_server_has_it() {
        let options = Options::try_parse_from(["vllm-sim"]).unwrap();
        let ours = skeleton(&render(&Stats::default(), &options, 1.0, 0));
        let real = skeleton(REAL);
        for (ours, real) in ours.iter().zip(&real) {
            assert_eq!(ours, real);
        }
        assert_eq!(ours.len(), real.len());
    }

    #[test]
    fn numbers_look_like_pythons() {
        for (value, text) in [
            (24.0, "24.0"),
            (0.001, "0.001"),
            (1_795_355_248.79, "1.79535524879e+09"),
            (4_869_513_216.0, "4.869513216e+09"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
