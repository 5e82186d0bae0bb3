//! The scheduler: vLLM's continuous batching as a state machine without a clock.
//!
//! A step is `plan` (who computes how many tokens), then the time it takes, then `commit` (tokens come out and are
//! counted). What is aborted in between yields nothing, as in vLLM. Within the token budget the running sequences
//! come first, in the order they were admitted, so decodes go before a long prompt's next chunk; then the waiting
//! ones, first come first served. When the KV cache is full the newest running sequence is preempted: its blocks
//! are freed and everything it had, answer included, is computed again.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::kv::{Held, KvPool};
use super::log::{Record, RequestLog};
use super::sequence::{FirstSeq, Request, Seq, Submission, observe_end, reason, seconds, summary};
use super::stats::Stats;

/// What bounds a step and the whole.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most running sequences.
    pub max_num_seqs: usize,
    /// Most tokens a step.
    pub max_num_batched_tokens: u32,
    /// KV blocks.
    pub kv_blocks: u32,
    /// Tokens a block.
    pub block_size: u32,
    /// Whether prefixes are shared.
    pub prefix_cache: bool,
    /// A stream gets no further token before its last chunk was taken (steps that take no time would otherwise
    /// outrun every reader).
    pub lockstep: bool,
}

/// What a planned step has to do, which decides how long it takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepLoad {
    /// Prompt tokens computed.
    pub prefill_tokens: u32,
    /// Sequences that decode.
    pub decodes: u32,
    /// Tokens that these have in the KV cache, which decoding reads.
    pub context_tokens: u64,
}

/// All sequences, and everything counted about them.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    kv: KvPool,
    requests: HashMap<u64, Request>,
    seqs: Vec<Option<Seq>>,
    free_slots: Vec<usize>,
    running: Vec<usize>,
    waiting: VecDeque<usize>,
    /// How many of `requests` are streamed.
    streams: usize,
    stats: Stats,
    log: Option<RequestLog>,
}

impl Scheduler {
    /// An idle engine; with `log` it remembers what each request used.
    pub fn new(limits: Limits, log: Option<RequestLog>) -> Self {
        Scheduler {
            kv: KvPool::new(limits.kv_blocks, limits.prefix_cache),
            limits,
            requests: HashMap::new(),
            seqs: Vec::new(),
            free_slots: Vec::new(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            streams: 0,
            stats: Stats::default(),
            log,
        }
    }

    /// Queues a request.
    pub fn submit(&mut self, submission: Submission) {
        let id = submission.id;
        let slots: Vec<usize> = (0..submission.seqs.len())
            .map(|choice| {
                let seq = Seq {
                    request: id,
                    choice: choice as u32,
                    spec: submission.seqs[choice].clone(),
                    held: Held::default(),
                    computed: 0,
                    generated: 0,
                    scheduled: 0,
                    cached: None,
                    preemptions: 0,
                    scheduled_ns: 0,
                    first_token_ns: 0,
                    last_token_ns: 0,
                };
                let slot = self.free_slots.pop().unwrap_or_else(|| {
                    self.seqs.push(None);
                    self.seqs.len() - 1
                });
                self.seqs[slot] = Some(seq);
                self.waiting.push_back(slot);
                slot
            })
            .collect();
        self.streams += usize::from(submission.progress.streamed());
        let prompts = if submission.n > 1 {
            slots.len() / submission.n as usize
        } else {
            0
        };
        let request = Request {
            unfinished: slots.len(),
            slots,
            submission,
            prompts: vec![(0, 0); prompts],
            counted_prompt: 0,
            counted_completion: 0,
            first: FirstSeq::default(),
        };
        self.requests.insert(id, request);
    }

    /// Forgets a request whose client has gone: what was counted stays, its end is not counted.
    pub fn abort(&mut self, id: u64, now_ns: u64) {
        let Some(request) = self.remove(id) else { return };
        for &slot in &request.slots {
            let is_own = self.seqs[slot].as_ref().is_some_and(|seq| seq.request == id);
            if is_own {
                self.free(slot);
            }
        }
        let seqs = &self.seqs;
        self.running.retain(|&slot| seqs[slot].is_some());
        self.waiting.retain(|&slot| seqs[slot].is_some());
        self.record(&request, "abort", now_ns);
    }

    /// Decides what the next step computes; none if nothing can run.
    pub fn plan(&mut self, now_ns: u64) -> Option<StepLoad> {
        let mut budget = self.limits.max_num_batched_tokens;
        let mut load = StepLoad::default();
        let preempted = self.plan_running(&mut budget, &mut load);
        if !preempted {
            self.admit(&mut budget, &mut load, now_ns);
        }
        (load != StepLoad::default()).then_some(load)
    }

    fn plan_running(&mut self, budget: &mut u32, load: &mut StepLoad) -> bool {
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() && *budget > 0 {
            let slot = self.running[at];
            if self.held_back(slot) {
                at += 1;
                continue;
            }
            while !self.schedule(slot, budget, load) {
                preempted = true;
                // The last one is the newest; it may be `slot` itself.
                let Some(victim) = self.running.pop() else { break };
                self.preempt(victim);
                if victim == slot {
                    break;
                }
            }
            at += 1;
        }
        preempted
    }

    fn held_back(&self, slot: usize) -> bool {
        if !self.limits.lockstep {
            return false;
        }
        let Some(seq) = &self.seqs[slot] else { return false };
        let request = self.requests.get(&seq.request);
        request.is_some_and(|request| {
            let progress = &request.submission.progress;
            progress.streamed() && progress.untaken(seq.choice)
        })
    }

    /// Gives a sequence its share of the step; false if the KV cache has no room for it.
    fn schedule(&mut self, slot: usize, budget: &mut u32, load: &mut StepLoad) -> bool {
        let Some(seq) = self.seqs[slot].as_mut() else {
            return true;
        };
        let chunk = (seq.known() - seq.computed).min(*budget);
        let blocks = (seq.computed + chunk).div_ceil(self.limits.block_size);
        if !self.kv.grow(&mut seq.held, blocks) {
            return false;
        }
        seq.scheduled = chunk;
        *budget -= chunk;
        let of_seq = seq.load();
        load.prefill_tokens += of_seq.prefill_tokens;
        load.decodes += of_seq.decodes;
        load.context_tokens += of_seq.context_tokens;
        true
    }

    /// Sends a sequence that has no share of this step yet back to the head of the queue.
    fn preempt(&mut self, slot: usize) {
        let Some(seq) = self.seqs[slot].as_mut() else {
            return;
        };
        seq.computed = 0;
        seq.preemptions += 1;
        self.kv.release(&mut seq.held);
        self.stats.preemptions += 1;
        self.waiting.push_front(slot);
    }

    fn admit(&mut self, budget: &mut u32, load: &mut StepLoad, now_ns: u64) {
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs {
            let Some(&slot) = self.waiting.front() else { break };
            let Some(seq) = self.seqs[slot].as_mut() else {
                break;
            };
            let prompt = Arc::clone(&seq.spec.prompt);
            // The last token is always computed, since its output is what is wanted.
            let reusable = ((prompt.tokens - 1) / self.limits.block_size) as usize;
            let blocks = &prompt.blocks[..reusable.min(prompt.blocks.len())];
            let found = self.kv.take_prefix(blocks, &mut seq.held) * self.limits.block_size;
            seq.computed = found;
            if !self.schedule(slot, budget, load) {
                if let Some(seq) = self.seqs[slot].as_mut() {
                    seq.computed = 0;
                    self.kv.release(&mut seq.held);
                }
                break;
            }
            self.note_admission(slot, found, now_ns);
            self.waiting.pop_front();
            self.running.push(slot);
        }
    }

    /// Counts the cache lookup of a sequence's first admission (vLLM keeps those after a preemption apart).
    fn note_admission(&mut self, slot: usize, found: u32, now_ns: u64) {
        let Some(seq) = self.seqs[slot].as_mut() else {
            return;
        };
        if seq.cached.is_some() {
            return;
        }
        seq.cached = Some(found);
        seq.scheduled_ns = now_ns;
        if self.kv.shares() {
            self.stats.prefix_queries += u64::from(seq.spec.prompt.tokens);
            self.stats.prefix_hits += u64::from(found);
        }
        if seq.choice == 0
            && let Some(request) = self.requests.get_mut(&seq.request)
        {
            request.first.scheduled_ns = now_ns;
        }
    }

    /// What the planned step has to do for each request, by its id. A request with several choices comes once for each that is in the step.
    pub fn planned(&self) -> impl Iterator<Item = (u64, StepLoad)> {
        let seqs = self.running.iter().filter_map(|slot| self.seqs[*slot].as_ref());
        seqs.filter(|seq| seq.scheduled > 0)
            .map(|seq| (seq.request, seq.load()))
    }

    /// Ends the step: tokens come out, are counted, and are reported.
    pub fn commit(&mut self, now_ns: u64) {
        let mut step_tokens = 0;
        let mut any_output = false;
        let mut finished = false;
        for at in 0..self.running.len() {
            let slot = self.running[at];
            let Some(output) = self.advance(slot, now_ns) else {
                continue;
            };
            any_output = true;
            step_tokens += output.tokens;
            if output.ended {
                finished = true;
                self.finish(slot, now_ns);
            }
        }
        if finished {
            let seqs = &self.seqs;
            self.running.retain(|&slot| seqs[slot].is_some());
        }
        if any_output {
            self.stats.iteration_tokens.observe(f64::from(step_tokens));
        }
    }

    /// Ends a sequence's share of the step; what came out of it, if it has computed all that it knew.
    fn advance(&mut self, slot: usize, now_ns: u64) -> Option<Output> {
        let seq = self.seqs[slot].as_mut()?;
        let chunk = std::mem::take(&mut seq.scheduled);
        if chunk == 0 {
            return None;
        }
        seq.computed += chunk;
        if seq.last_token_ns == 0 {
            let full = (seq.computed / self.limits.block_size) as usize;
            let blocks = &seq.spec.prompt.blocks;
            self.kv.publish(&mut seq.held, &blocks[..full.min(blocks.len())]);
        }
        if seq.computed < seq.known() {
            return None;
        }
        let request = self.requests.get_mut(&seq.request)?;
        let mut tokens = count_prompt_or_gap(&mut self.stats, seq, request, now_ns);
        seq.last_token_ns = now_ns;
        if seq.spec.target > 0 {
            seq.generated += 1;
            tokens += 1;
            self.stats.generation_tokens += 1;
            request.counted_completion += 1;
        }
        let ended = seq.generated >= seq.spec.target;
        if !ended && request.submission.progress.streamed() {
            request
                .submission
                .progress
                .report(seq.choice, seq.generated, None, None);
        }
        Some(Output { tokens, ended })
    }

    fn finish(&mut self, slot: usize, now_ns: u64) {
        let Some(seq) = self.free(slot) else { return };
        let Some(request) = self.requests.get_mut(&seq.request) else {
            return;
        };
        let arrived_ns = request.submission.arrived_ns;
        observe_end(
            &mut self.stats,
            &seq,
            arrived_ns,
            request.submission.max_tokens,
            now_ns,
        );
        if seq.choice == 0 {
            request.first.summary = summary(&seq, arrived_ns, self.limits, now_ns);
        }
        if let Some(longest) = request.note_choice_end(&seq) {
            self.stats
                .request_params_n
                .observe(f64::from(request.submission.n));
            self.stats
                .request_max_num_generation_tokens
                .observe(f64::from(longest));
        }
        request.unfinished -= 1;
        let done = request.unfinished == 0;
        let progress = &request.submission.progress;
        let end = done.then_some(request.first.summary);
        progress.report(seq.choice, seq.generated, Some(seq.spec.finish), end);
        if done && let Some(request) = self.remove(seq.request) {
            self.record(&request, reason(seq.spec.finish), now_ns);
        }
    }

    fn remove(&mut self, id: u64) -> Option<Request> {
        let request = self.requests.remove(&id)?;
        self.streams -= usize::from(request.submission.progress.streamed());
        Some(request)
    }

    fn free(&mut self, slot: usize) -> Option<Seq> {
        let mut seq = self.seqs[slot].take()?;
        self.kv.release(&mut seq.held);
        self.free_slots.push(slot);
        Some(seq)
    }

    fn record(&mut self, request: &Request, finished_reason: &'static str, now_ns: u64) {
        let (Some(log), Some(label)) = (&mut self.log, &request.submission.label) else {
            return;
        };
        log.push(Record {
            label: (**label).clone(),
            prompt_tokens: request.counted_prompt,
            completion_tokens: request.counted_completion,
            finished_reason,
            arrived_ns: request.submission.arrived_ns,
            scheduled_ns: request.first.scheduled_ns,
            first_token_ns: request.first.first_token_ns,
            ended_ns: now_ns,
        });
    }

    /// Whether a stream runs, whose reader must get a turn between two steps.
    pub fn has_streams(&self) -> bool {
        self.streams > 0
    }

    /// Counts a request that was turned away.
    pub fn note_rejection(&mut self) {
        self.stats.rejected += 1;
    }

    /// The counters, with the gauges as of now.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats.clone();
        stats.running = self.running.len() as u64;
        stats.waiting = self.waiting.len() as u64;
        stats.kv_usage = self.kv.usage();
        stats
    }

    /// The request log, if one is kept.
    pub fn log(&self) -> Option<&RequestLog> {
        self.log.as_ref()
    }
}

struct Output {
    tokens: u32,
    ended: bool,
}

/// With a first token the prompt counts, as a whole, and returns the tokens computed for it; with any other the gap
/// since the last one does.
fn count_prompt_or_gap(stats: &mut Stats, seq: &mut Seq, request: &mut Request, now_ns: u64) -> u32 {
    if seq.last_token_ns != 0 {
        stats
            .inter_token_latency
            .observe(seconds(now_ns - seq.last_token_ns));
        return 0;
    }
    let (all, cached) = (seq.spec.prompt.tokens, seq.cached.unwrap_or(0));
    stats.prompt_tokens += u64::from(all);
    stats.prompt_tokens_cached += u64::from(cached);
    stats.prompt_tokens_computed += u64::from(all - cached);
    stats
        .time_to_first_token
        .observe(seconds(now_ns - request.submission.arrived_ns));
    request.counted_prompt += u64::from(all);
    seq.first_token_ns = now_ns;
    if seq.choice == 0 {
        request.first.first_token_ns = now_ns;
    }
    all - cached
}

#[cfg(test)]
mod tests;
