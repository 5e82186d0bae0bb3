//! What a gateway takes requests to have waited, where the server does not tell it of each: by what its pages say of all of them.

use std::sync::Arc;

use vllm_gateway::ledger::{Micros, Wait, Window};
use vllm_gateway::segments::Waits;
use vllm_gateway::sim::Histogram;
use vllm_gateway::vllm::{Means, SampleSink, SystemSample};

use super::books::run_of;
use super::mix::Mix;
use super::{Engine, Lived, Look, Ran};

/// What was known of the waits when each request was cut for the first time, in the order of the requests.
pub fn waits(ran: &Ran) -> Vec<Wait> {
    let waits = Arc::new(Waits::default());
    let mut known = vec![Wait::default(); ran.requests.len()];
    let mut order: Vec<usize> = (0..ran.requests.len()).collect();
    order.sort_unstable_by_key(|index| cut_at(&ran.requests[*index]));
    let mut looks = ran.looks.windows(2).peekable();
    for index in order {
        let now = cut_at(&ran.requests[index]);
        while let Some(pair) = looks.next_if(|pair| pair[1].at <= now) {
            waits.record(&sample(&pair[0], &pair[1]));
        }
        known[index] = waits.of("chat");
    }
    known
}

/// A stream is cut at the first edge of a window after its first token, all others at their end.
fn cut_at(lived: &Lived) -> Micros {
    if lived.request.is_streamed {
        lived.ended.min(Window::at(lived.first_token).span().to())
    } else {
        lived.ended
    }
}

/// What a scrape makes of two pages.
fn sample(before: &Look, now: &Look) -> SystemSample {
    let mean_us = |of: fn(&Look) -> &Histogram| {
        let count = of(now).count() - of(before).count();
        (count > 0).then(|| ((of(now).sum - of(before).sum) * 1e6 / count as f64) as u64)
    };
    SystemSample {
        upstream: "chat".into(),
        ok: true,
        running: Some(now.stats.running as f64),
        waiting: Some(now.stats.waiting as f64),
        means: Means {
            queue_us: mean_us(|look| &look.stats.queue_time),
            prefill_us: mean_us(|look| &look.stats.prefill_time),
            itl_us: mean_us(|look| &look.stats.inter_token_latency),
        },
        ..SystemSample::default()
    }
}

/// By how much the estimated starts of the runs are off, in seconds, in ascending order.
pub fn errors_s(ran: &Ran, waits: &[Wait]) -> Vec<f64> {
    let off = ran.requests.iter().zip(waits).map(|(lived, wait)| {
        let start = run_of(lived, *wait).span.from();
        start.0.abs_diff(lived.scheduled.0) as f64 / 1e6
    });
    let mut off: Vec<f64> = off.collect();
    off.sort_unstable_by(f64::total_cmp);
    off
}

/// How long requests waited, on average.
pub fn mean_wait_s(ran: &Ran) -> f64 {
    let waits = ran
        .requests
        .iter()
        .map(|lived| (lived.scheduled.0 - lived.arrived.0) as f64 / 1e6);
    waits.sum::<f64>() / ran.requests.len() as f64
}

/// How many times its rates a mix has to send to give the engine twice the work that it can do: a load that comes all at once takes the time that
/// its work takes.
pub fn twice_what_it_can_bear(engine: &Engine, mix: &Mix, seed: u64) -> f64 {
    const SECONDS: u64 = 300;
    let mut load = mix.load(seed, SECONDS, 1.0, |_| true);
    load.iter_mut().for_each(|request| request.at_ns = 0);
    2.0 * SECONDS as f64 / (engine.run(&load).busy_us / 1e6)
}
