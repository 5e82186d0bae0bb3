//! Requests and their sequences, and what is observed when one ends.

use std::sync::Arc;

use super::kv::Held;
use super::progress::{Finish, Progress, Summary};
use super::scheduler::{Limits, StepLoad};
use super::stats::Stats;
use super::tokens::Prompt;

/// One sequence to run.
#[derive(Debug, Clone)]
pub struct SeqSpec {
    /// What to prefill.
    pub prompt: Arc<Prompt>,
    /// Tokens to generate; none for pooling.
    pub target: u32,
    /// Why it ends there.
    pub finish: Finish,
}

/// One request.
#[derive(Debug)]
pub struct Submission {
    /// Unique.
    pub id: u64,
    /// A sequence for each choice of each prompt.
    pub seqs: Vec<SeqSpec>,
    /// The `n` parameter: sequences of one prompt.
    pub n: u32,
    /// The limit on tokens; none for pooling.
    pub max_tokens: Option<u32>,
    /// Where to report.
    pub progress: Arc<Progress>,
    /// When it arrived, monotonic.
    pub arrived_ns: u64,
    /// For the request log: request id, path, model. None if nothing is logged.
    pub label: Option<Box<[String; 3]>>,
}

#[derive(Debug)]
pub(super) struct Seq {
    pub(super) request: u64,
    pub(super) choice: u32,
    pub(super) spec: SeqSpec,
    pub(super) held: Held,
    pub(super) computed: u32,
    pub(super) generated: u32,
    /// Tokens it computes in the step under way.
    pub(super) scheduled: u32,
    pub(super) cached: Option<u32>,
    pub(super) preemptions: u32,
    pub(super) scheduled_ns: u64,
    pub(super) first_token_ns: u64,
    pub(super) last_token_ns: u64,
}

impl Seq {
    pub(super) fn known(&self) -> u32 {
        self.spec.prompt.tokens + self.generated
    }

    /// What the step under way has to do for it.
    pub(super) fn load(&self) -> StepLoad {
        if self.generated > 0 && self.scheduled == 1 {
            StepLoad {
                decodes: 1,
                context_tokens: self.known().into(),
                ..StepLoad::default()
            }
        } else {
            StepLoad {
                prefill_tokens: self.scheduled,
                ..StepLoad::default()
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) submission: Submission,
    pub(super) slots: Vec<usize>,
    pub(super) unfinished: usize,
    /// For each prompt with several choices: how many have ended, and the longest.
    pub(super) prompts: Vec<(u32, u32)>,
    pub(super) counted_prompt: u64,
    pub(super) counted_completion: u64,
    pub(super) first: FirstSeq,
}

impl Request {
    /// The longest answer to the prompt of `seq` if that was its last choice: vLLM counts these once a prompt.
    pub(super) fn note_choice_end(&mut self, seq: &Seq) -> Option<u32> {
        let n = self.submission.n;
        if n <= 1 {
            return Some(seq.generated);
        }
        let (ended, longest) = self.prompts.get_mut((seq.choice / n) as usize)?;
        *ended += 1;
        *longest = (*longest).max(seq.generated);
        (*ended == n).then_some(*longest)
    }
}

/// Facts of the first choice, kept after its slot is gone.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct FirstSeq {
    pub(super) scheduled_ns: u64,
    pub(super) first_token_ns: u64,
    pub(super) summary: Summary,
}

pub(super) fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

pub(super) fn summary(seq: &Seq, arrived_ns: u64, limits: Limits, now_ns: u64) -> Summary {
    let cached_tokens = seq.cached.unwrap_or(0);
    let full_tokens = seq.spec.prompt.blocks.len() as u32 * limits.block_size;
    Summary {
        cached_tokens,
        created_cache_tokens: if limits.prefix_cache {
            full_tokens.saturating_sub(cached_tokens)
        } else {
            0
        },
        queue_ns: seq.scheduled_ns.saturating_sub(arrived_ns),
        prefill_ns: seq.first_token_ns - seq.scheduled_ns,
        decode_ns: now_ns - seq.first_token_ns,
    }
}

pub(super) fn observe_end(
    stats: &mut Stats,
    seq: &Seq,
    arrived_ns: u64,
    max_tokens: Option<u32>,
    now_ns: u64,
) {
    match seq.spec.finish {
        Finish::Stop => stats.success_stop += 1,
        Finish::Length => stats.success_length += 1,
    }
    let decode_s = seconds(now_ns - seq.first_token_ns);
    let gaps = seq.generated.saturating_sub(1);
    stats
        .request_prompt_tokens
        .observe(f64::from(seq.spec.prompt.tokens));
    stats.request_generation_tokens.observe(f64::from(seq.generated));
    if let Some(max_tokens) = max_tokens {
        stats.request_params_max_tokens.observe(f64::from(max_tokens));
    }
    stats.time_per_output_token.observe(if gaps == 0 {
        0.0
    } else {
        decode_s / f64::from(gaps)
    });
    stats.e2e_latency.observe(seconds(now_ns - arrived_ns));
    stats
        .queue_time
        .observe(seconds(seq.scheduled_ns.saturating_sub(arrived_ns)));
    stats.inference_time.observe(seconds(now_ns - seq.scheduled_ns));
    stats
        .prefill_time
        .observe(seconds(seq.first_token_ns - seq.scheduled_ns));
    stats.decode_time.observe(decode_s);
    stats.request_preemptions.observe(f64::from(seq.preemptions));
    stats
        .prefill_computed_tokens
        .observe(f64::from(seq.spec.prompt.tokens - seq.cached.unwrap_or(0)));
}

pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}
