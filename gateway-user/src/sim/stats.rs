//! What the engine counts: the numbers behind `/metrics`, without their names.

/// Bucket bounds of request sizes, as vLLM builds them for a context of a few thousand tokens.
pub const SIZE_BOUNDS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0,
];
const STEP_BOUNDS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const N_BOUNDS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const PREEMPTION_BOUNDS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];
const TTFT_BOUNDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_TIME_BOUNDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_TIME_BOUNDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// A Prometheus histogram.
#[derive(Debug, Clone)]
pub struct Histogram {
    /// Upper bounds, +Inf left out.
    pub bounds: &'static [f64],
    /// Observations a bucket (not cumulative); the last one is +Inf.
    pub counts: Vec<u64>,
    /// Sum of all observations.
    pub sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Histogram {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    /// Adds one observation.
    pub fn observe(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }

    /// Number of observations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Every counter, gauge and histogram of the engine.
#[derive(Debug, Clone)]
#[allow(
    missing_docs,
    reason = "each has the name of vLLM's family, which says what it counts"
)]
pub struct Stats {
    pub running: u64,
    pub waiting: u64,
    pub kv_usage: f64,
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preemptions: u64,
    pub prompt_tokens: u64,
    pub prompt_tokens_computed: u64,
    pub prompt_tokens_cached: u64,
    pub generation_tokens: u64,
    pub success_stop: u64,
    pub success_length: u64,
    /// Requests turned away because the queue was full.
    pub rejected: u64,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    pub iteration_tokens: Histogram,
    pub request_max_num_generation_tokens: Histogram,
    pub request_params_n: Histogram,
    pub request_params_max_tokens: Histogram,
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    pub time_per_output_token: Histogram,
    pub e2e_latency: Histogram,
    pub queue_time: Histogram,
    pub inference_time: Histogram,
    pub prefill_time: Histogram,
    pub decode_time: Histogram,
    pub request_preemptions: Histogram,
    pub prefill_computed_tokens: Histogram,
}

impl Default for Stats {
    fn default() -> Self {
        Stats {
            running: 0,
            waiting: 0,
            kv_usage: 0.0,
            prefix_queries: 0,
            prefix_hits: 0,
            preemptions: 0,
            prompt_tokens: 0,
            prompt_tokens_computed: 0,
            prompt_tokens_cached: 0,
            generation_tokens: 0,
            success_stop: 0,
            success_length: 0,
            rejected: 0,
            request_prompt_tokens: Histogram::new(SIZE_BOUNDS),
            request_generation_tokens: Histogram::new(SIZE_BOUNDS),
            iteration_tokens: Histogram::new(STEP_BOUNDS),
            request_max_num_generation_tokens: Histogram::new(SIZE_BOUNDS),
            request_params_n: Histogram::new(N_BOUNDS),
            request_params_max_tokens: Histogram::new(SIZE_BOUNDS),
            time_to_first_token: Histogram::new(TTFT_BOUNDS),
            inter_token_latency: Histogram::new(TOKEN_TIME_BOUNDS),
            time_per_output_token: Histogram::new(TOKEN_TIME_BOUNDS),
            e2e_latency: Histogram::new(REQUEST_TIME_BOUNDS),
            queue_time: Histogram::new(REQUEST_TIME_BOUNDS),
            inference_time: Histogram::new(REQUEST_TIME_BOUNDS),
            prefill_time: Histogram::new(REQUEST_TIME_BOUNDS),
            decode_time: Histogram::new(REQUEST_TIME_BOUNDS),
            request_preemptions: Histogram::new(PREEMPTION_BOUNDS),
            prefill_computed_tokens: Histogram::new(SIZE_BOUNDS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_own_bucket() {
        let mut histogram = Histogram::new(N_BOUNDS);
        for value in [0.0, 1.0, 1.5, 20.0, 21.0] {
            histogram.observe(value);
        }
        assert_eq!(histogram.counts, [2, 1, 0, 0, 1, 1]);
        assert_eq!((histogram.count(), histogram.sum), (5, 43.5));
    }
}
