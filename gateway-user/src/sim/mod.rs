//! An engine that is not there: vLLM's continuous batching as a state machine without a clock or any I/O.
//!
//! `vllm-sim` puts a server in front of it and lets its steps take their time. Trials of the ledger drive it by a clock of their own, in which minutes
//! pass in milliseconds and everything comes out the same each time.
//!
//! * [`Scheduler`] plans steps and counts what they did; [`StepCost`] says how long each takes.
//! * [`Progress`] is what a request sees of it, [`Stats`] what `/metrics` shows, [`RequestLog`] what each request used.
//! * [`tokens`] stands in for a tokenizer and a model.

mod kv;
mod log;
mod progress;
mod scheduler;
mod sequence;
mod stats;
pub mod tokens;

use std::time::Duration;

pub use self::log::{LOG_REQUESTS_MAX, Record, RequestLog};
pub use self::progress::{Delta, Finish, Progress, Summary};
pub use self::scheduler::{Limits, Scheduler, StepLoad};
pub use self::sequence::{SeqSpec, Submission};
pub use self::stats::{Histogram, SIZE_BOUNDS, Stats};

/// How long a step takes.
#[derive(Debug, Clone, Copy)]
pub struct StepCost {
    /// Whatever is in it.
    pub base_us: f64,
    /// For each prompt token.
    pub prefill_us_per_token: f64,
    /// For each decoding sequence.
    pub decode_us_per_seq: f64,
    /// For each token that these read in the KV cache.
    pub read_us_per_token: f64,
}

impl StepCost {
    /// The time of a step with this load.
    pub fn of(&self, load: StepLoad) -> Duration {
        let us = self.base_us
            + self.prefill_us_per_token * f64::from(load.prefill_tokens)
            + self.decode_us_per_seq * f64::from(load.decodes)
            // Far fewer than 2^53.
            + self.read_us_per_token * load.context_tokens as f64;
        Duration::from_secs_f64(us / 1e6)
    }
}
