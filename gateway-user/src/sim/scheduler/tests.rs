use std::task::{Context, Poll, Waker};

use proptest::prelude::*;

use super::*;
use crate::sim::progress::{Finish, Progress};
use crate::sim::sequence::SeqSpec;
use crate::sim::tokens::Prompt;

const LIMITS: Limits = Limits {
    max_num_seqs: 8,
    max_num_batched_tokens: 64,
    kv_blocks: 64,
    block_size: 4,
    prefix_cache: true,
    lockstep: false,
};

fn prompt(tokens: usize, salt: u64) -> Arc<Prompt> {
    Arc::new(Prompt::new(
        &vec![b'x'; tokens * crate::sim::tokens::TOKEN_BYTES],
        salt,
        LIMITS.block_size,
    ))
}

fn spec(prompt: &Arc<Prompt>, target: u32) -> SeqSpec {
    SeqSpec {
        prompt: Arc::clone(prompt),
        target,
        finish: Finish::Length,
    }
}

struct Bench {
    scheduler: Scheduler,
    now_ns: u64,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Bench {
            scheduler: Scheduler::new(limits, Some(RequestLog::default())),
            now_ns: 1,
        }
    }

    fn submit(&mut self, id: u64, seqs: Vec<SeqSpec>, n: u32, interval: Option<u32>) -> Arc<Progress> {
        let progress = Arc::new(Progress::new(seqs.len(), interval));
        let max_tokens = Some(seqs[0].target);
        self.scheduler.submit(Submission {
            id,
            n,
            max_tokens,
            progress: Arc::clone(&progress),
            arrived_ns: self.now_ns,
            label: Some(Box::new([
                id.to_string(),
                "/v1/completions".to_owned(),
                "sim".to_owned(),
            ])),
            seqs,
        });
        progress
    }

    /// One step that takes a millisecond; false if nothing can run.
    fn step(&mut self) -> Option<StepLoad> {
        let load = self.scheduler.plan(self.now_ns)?;
        self.now_ns += 1_000_000;
        self.scheduler.commit(self.now_ns);
        Some(load)
    }

    /// One step, of which the requests' parts make up the whole.
    fn step_by_request(&mut self) -> Option<StepLoad> {
        let whole = self.scheduler.plan(self.now_ns)?;
        let parts = self.scheduler.planned().map(|(_, load)| load);
        let sum = parts.fold(StepLoad::default(), |sum, part| StepLoad {
            prefill_tokens: sum.prefill_tokens + part.prefill_tokens,
            decodes: sum.decodes + part.decodes,
            context_tokens: sum.context_tokens + part.context_tokens,
        });
        assert_eq!(sum, whole);
        self.now_ns += 1_000_000;
        self.scheduler.commit(self.now_ns);
        Some(whole)
    }

    /// One step: the prompt tokens that it computed, and who decoded.
    fn work(&mut self) -> Option<(u32, u32)> {
        self.step().map(|load| (load.prefill_tokens, load.decodes))
    }

    /// Steps until nothing is left to do.
    fn drain(&mut self) -> usize {
        (0..100_000).take_while(|_| self.step().is_some()).count()
    }

    fn assert_empty(&self) {
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv_usage), (0, 0, 0.0));
        assert!(self.scheduler.requests.is_empty() && self.scheduler.streams == 0);
        assert!(self.scheduler.seqs.iter().all(Option::is_none));
    }
}

#[test]
fn one_request_counts_as_the_captured_one() {
    // The relations of fixture `chat`: 12 tokens in 12 steps, 11 gaps, one of everything else.
    let mut bench = Bench::new(LIMITS);
    bench.submit(1, vec![spec(&prompt(19, 0), 12)], 1, None);
    assert_eq!(bench.drain(), 12);
    let stats = bench.scheduler.stats();
    assert_eq!(
        (
            stats.prefix_queries,
            stats.prompt_tokens,
            stats.prompt_tokens_computed
        ),
        (19, 19, 19)
    );
    assert_eq!(
        (stats.generation_tokens, stats.success_length, stats.success_stop),
        (12, 1, 0)
    );
    assert_eq!(
        (stats.iteration_tokens.count(), stats.iteration_tokens.sum),
        (12, 31.0)
    );
    assert_eq!(
        (
            stats.time_to_first_token.count(),
            stats.inter_token_latency.count()
        ),
        (1, 11)
    );
    assert_eq!(
        (stats.request_params_n.sum, stats.request_params_max_tokens.sum),
        (1.0, 12.0)
    );
    let sum = stats.prefill_time.sum + stats.decode_time.sum;
    assert!((sum - stats.inference_time.sum).abs() < 1e-9);
    bench.assert_empty();
}

#[test]
fn several_choices_prefill_the_prompt_once_each_and_count_as_one_parameter() {
    // Fixture `chat_stream_n2`: prompt counted twice, two successes, but one `n` of 2 and one longest answer.
    let mut bench = Bench::new(LIMITS);
    let prompt = prompt(3, 0);
    bench.submit(1, vec![spec(&prompt, 8), spec(&prompt, 8)], 2, Some(1));
    assert_eq!(bench.drain(), 8);
    let stats = bench.scheduler.stats();
    assert_eq!(
        (stats.prompt_tokens, stats.generation_tokens, stats.success_length),
        (6, 16, 2)
    );
    assert_eq!(
        (stats.request_params_n.count(), stats.request_params_n.sum),
        (1, 2.0)
    );
    assert_eq!(stats.request_max_num_generation_tokens.sum, 8.0);
    assert_eq!(
        (
            stats.request_params_max_tokens.count(),
            stats.request_params_max_tokens.sum
        ),
        (2, 16.0)
    );
}

#[test]
fn pooling_prefills_and_generates_nothing() {
    let mut bench = Bench::new(LIMITS);
    let both = [prompt(6, 1), prompt(6, 2)].map(|prompt| SeqSpec {
        prompt,
        target: 0,
        finish: Finish::Stop,
    });
    bench.submit(1, both.to_vec(), 1, None);
    assert_eq!(bench.drain(), 1);
    let stats = bench.scheduler.stats();
    assert_eq!(
        (stats.prompt_tokens, stats.generation_tokens, stats.success_stop),
        (12, 0, 2)
    );
    assert_eq!(
        (stats.iteration_tokens.count(), stats.iteration_tokens.sum),
        (1, 12.0)
    );
    assert_eq!(
        (stats.inter_token_latency.count(), stats.request_params_n.count()),
        (0, 2)
    );
}

#[test]
fn decodes_go_before_a_long_prompts_chunks_within_the_budget() {
    let mut bench = Bench::new(Limits {
        max_num_batched_tokens: 10,
        ..LIMITS
    });
    bench.submit(1, vec![spec(&prompt(4, 1), 20)], 1, None);
    assert_eq!(bench.work(), Some((4, 0)));
    bench.submit(2, vec![spec(&prompt(25, 2), 2)], 1, None);
    for _ in 0..2 {
        assert_eq!(bench.work(), Some((9, 1)));
    }
    assert_eq!(
        bench.scheduler.stats().prompt_tokens,
        4,
        "a prompt counts when its last chunk is done"
    );
    assert_eq!(bench.work(), Some((7, 1)));
    assert_eq!(bench.scheduler.stats().prompt_tokens, 29);
    assert_eq!(bench.work(), Some((0, 2)));
}

#[test]
fn who_decodes_reads_all_that_it_has_so_far() {
    let mut bench = Bench::new(LIMITS);
    bench.submit(1, vec![spec(&prompt(10, 1), 3)], 1, None);
    bench.submit(2, vec![spec(&prompt(20, 2), 3)], 1, None);
    let read: Vec<u64> = std::iter::from_fn(|| bench.step_by_request())
        .map(|load| load.context_tokens)
        .collect();
    assert_eq!(read, [0, 11 + 21, 12 + 22]);
}

#[test]
fn no_more_sequences_run_than_allowed_and_the_first_come_run_first() {
    let mut bench = Bench::new(Limits {
        max_num_seqs: 2,
        ..LIMITS
    });
    for id in 1..=3 {
        bench.submit(id, vec![spec(&prompt(2, id), 3)], 1, None);
    }
    bench.step();
    let stats = bench.scheduler.stats();
    assert_eq!((stats.running, stats.waiting), (2, 1));
    bench.drain();
    let log = bench.scheduler.log().unwrap().to_json_lines();
    let order: Vec<&str> = log.lines().map(|line| &line[..17]).collect();
    assert_eq!(
        order,
        [
            r#"{"request_id":"1""#,
            r#"{"request_id":"2""#,
            r#"{"request_id":"3""#
        ]
    );
}

#[test]
fn a_repeated_prompt_comes_from_the_cache_but_for_its_last_block() {
    let mut bench = Bench::new(LIMITS);
    for id in 1..=2 {
        bench.submit(id, vec![spec(&prompt(20, 0), 2)], 1, None);
        bench.drain();
    }
    let stats = bench.scheduler.stats();
    // Five blocks of four; the last is computed again, since its last token's output is needed.
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (40, 16));
    assert_eq!(
        (
            stats.prompt_tokens,
            stats.prompt_tokens_cached,
            stats.prompt_tokens_computed
        ),
        (40, 16, 24)
    );
    bench.assert_empty();

    let mut off = Bench::new(Limits {
        prefix_cache: false,
        ..LIMITS
    });
    for id in 1..=2 {
        off.submit(id, vec![spec(&prompt(20, 0), 2)], 1, None);
        off.drain();
    }
    let stats = off.scheduler.stats();
    assert_eq!(
        (
            stats.prefix_queries,
            stats.prefix_hits,
            stats.prompt_tokens_cached
        ),
        (0, 0, 0)
    );
}

#[test]
fn a_full_cache_preempts_the_newest_which_still_ends_as_it_would_have() {
    // Ten blocks of four tokens; each of the two needs seven in the end.
    let mut bench = Bench::new(Limits {
        kv_blocks: 10,
        prefix_cache: false,
        ..LIMITS
    });
    for id in 1..=2 {
        bench.submit(id, vec![spec(&prompt(8, id), 18)], 1, None);
    }
    bench.drain();
    let stats = bench.scheduler.stats();
    assert!(stats.preemptions > 0);
    assert_eq!(
        (stats.prompt_tokens, stats.generation_tokens, stats.success_length),
        (16, 36, 2)
    );
    assert_eq!(stats.request_preemptions.sum, stats.preemptions as f64);
    let log = bench.scheduler.log().unwrap().to_json_lines();
    assert!(
        log.starts_with(r#"{"request_id":"1""#),
        "the older one is never preempted: {log}"
    );
    bench.assert_empty();
}

#[test]
fn an_abort_keeps_what_was_counted_and_ends_nothing() {
    let mut bench = Bench::new(LIMITS);
    bench.submit(1, vec![spec(&prompt(8, 0), 100)], 1, Some(1));
    for _ in 0..5 {
        bench.step();
    }
    // Between plan and commit, as an abort that arrives while the step runs.
    assert!(bench.scheduler.plan(bench.now_ns).is_some());
    bench.scheduler.abort(1, bench.now_ns);
    bench.scheduler.commit(bench.now_ns + 1);
    let stats = bench.scheduler.stats();
    assert_eq!(
        (stats.prompt_tokens, stats.generation_tokens),
        (8, 5),
        "the step under way yields nothing"
    );
    assert_eq!(
        stats.success_length + stats.success_stop + stats.e2e_latency.count(),
        0
    );
    let log = bench.scheduler.log().unwrap().to_json_lines();
    assert!(
        log.contains(r#""completion_tokens":5,"finished_reason":"abort""#),
        "{log}"
    );
    bench.assert_empty();
    bench.scheduler.abort(1, bench.now_ns);
}

#[test]
fn in_lockstep_a_stream_waits_for_its_reader_and_others_do_not() {
    let mut bench = Bench::new(Limits {
        lockstep: true,
        ..LIMITS
    });
    let slow = bench.submit(1, vec![spec(&prompt(2, 1), 3)], 1, Some(1));
    bench.submit(2, vec![spec(&prompt(2, 2), 5)], 1, None);
    bench.drain();
    let stats = bench.scheduler.stats();
    assert_eq!((stats.generation_tokens, stats.running), (1 + 5, 1));
    let take = || slow.poll_take(&mut Context::from_waker(Waker::noop()));
    for (token, finish) in [(1, None), (2, None), (3, Some(Finish::Length))] {
        assert!(matches!(take(), Poll::Ready(Some(delta)) if delta.to == token && delta.finish == finish));
        bench.drain();
    }
    assert_eq!(take(), Poll::Ready(None));
    bench.assert_empty();
}

proptest! {
    /// Whatever comes, goes and is preempted: what the requests were charged is what the engine counted, nothing is
    /// left behind, and every request that was not aborted got all its tokens.
    #[test]
    fn requests_add_up_to_the_counters(
        plans in prop::collection::vec((1usize..60, 0u32..30, 1u32..4, any::<bool>(), 0usize..40, 0u64..4), 1..40),
        kv_blocks in 24u32..80,
        budget in 1u32..80,
        prefix_cache in any::<bool>(),
    ) {
        let mut bench = Bench::new(Limits { kv_blocks, max_num_batched_tokens: budget, prefix_cache, ..LIMITS });
        let (mut prompts, mut answers, mut ended) = (0, 0, 0);
        for (id, (tokens, target, n, aborted, steps, salt)) in (1u64..).zip(plans) {
            let prompt = prompt(tokens, salt);
            bench.submit(id, vec![spec(&prompt, target); n as usize], n, None);
            for _ in 0..steps {
                bench.step();
                let stats = bench.scheduler.stats();
                prop_assert!(stats.kv_usage <= 1.0 && stats.running <= LIMITS.max_num_seqs as u64);
            }
            if aborted {
                bench.scheduler.abort(id, bench.now_ns);
            }
        }
        prop_assert!(bench.drain() < 100_000, "the engine is stuck");
        bench.assert_empty();
        let stats = bench.scheduler.stats();
        for line in bench.scheduler.log().unwrap().to_json_lines().lines() {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            prompts += record["prompt_tokens"].as_u64().unwrap();
            answers += record["completion_tokens"].as_u64().unwrap();
            ended += u64::from(record["finished_reason"] == "length");
        }
        prop_assert_eq!((prompts, answers), (stats.prompt_tokens, stats.generation_tokens));
        prop_assert_eq!(stats.prompt_tokens, stats.prompt_tokens_cached + stats.prompt_tokens_computed);
        prop_assert_eq!(ended, stats.request_params_n.count());
        prop_assert_eq!(stats.success_length, stats.request_prompt_tokens.count());
        prop_assert_eq!(stats.request_generation_tokens.sum <= stats.generation_tokens as f64, true);
    }
}
