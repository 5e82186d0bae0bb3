//! What the engine tells a connection: how far each choice has come.
//!
//! A connection that is slower than the engine finds several tokens at once, as vLLM's output collector gives
//! them, so nothing queues up however slow the reader is: a choice takes two counters.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model had said all.
    Stop,
    /// The limit on tokens was reached.
    Length,
}

/// New tokens of one choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta {
    /// Which choice.
    pub choice: u32,
    /// First new token.
    pub from: u32,
    /// One past the last new token, which is the choice's count so far.
    pub to: u32,
    /// Set with the last tokens.
    pub finish: Option<Finish>,
}

/// What is known once a request has ended (of its first choice, as vLLM reports it).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Summary {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
    /// Prompt tokens that the request added to the prefix cache.
    pub created_cache_tokens: u32,
    /// Arrival to scheduling.
    pub queue_ns: u64,
    /// Scheduling to first token.
    pub prefill_ns: u64,
    /// First token to last token.
    pub decode_ns: u64,
}

/// The state of one request, shared by the engine and the connection that waits for it.
#[derive(Debug)]
pub struct Progress {
    inner: Mutex<Inner>,
    /// Tokens that make a chunk; none for a request that is answered as a whole.
    interval: Option<u32>,
}

#[derive(Debug)]
struct Inner {
    choices: Vec<Choice>,
    summary: Option<Summary>,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Choice {
    generated: u32,
    taken: u32,
    finish: Option<Finish>,
    closed: bool,
}

impl Choice {
    /// vLLM's rule: the first token at once, then whole intervals, and whatever is left at the end.
    fn ready(&self, interval: u32) -> bool {
        if self.closed {
            return false;
        }
        let fresh = self.generated - self.taken;
        self.finish.is_some() || (fresh > 0 && (self.taken == 0 || fresh >= interval))
    }
}

impl Progress {
    /// A request with `choices` choices, streamed in chunks of `interval` tokens or answered as a whole.
    pub fn new(choices: usize, interval: Option<u32>) -> Self {
        let inner = Inner {
            choices: vec![Choice::default(); choices],
            summary: None,
            waker: None,
        };
        Progress {
            inner: Mutex::new(inner),
            interval,
        }
    }

    /// Whether the connection takes tokens as they come.
    pub fn streamed(&self) -> bool {
        self.interval.is_some()
    }

    /// Whether tokens of `choice` wait to be taken.
    pub fn untaken(&self, choice: u32) -> bool {
        let inner = self.lock();
        let choice = inner.choices.get(choice as usize);
        self.interval
            .is_some_and(|interval| choice.is_some_and(|choice| choice.ready(interval)))
    }

    /// The engine's report; wakes the connection if there is something for it.
    pub fn report(&self, choice: u32, generated: u32, finish: Option<Finish>, summary: Option<Summary>) {
        let waker = {
            let mut inner = self.lock();
            let mut wake = summary.is_some();
            if let Some(choice) = inner.choices.get_mut(choice as usize) {
                choice.generated = generated;
                choice.finish = finish;
                wake |= self.interval.is_some_and(|interval| choice.ready(interval));
            }
            inner.summary = inner.summary.or(summary);
            if wake { inner.waker.take() } else { None }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes the next chunk's worth of tokens; none after the last choice has finished.
    pub fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Option<Delta>> {
        let mut inner = self.lock();
        let interval = self.interval.unwrap_or(1);
        for (index, choice) in inner.choices.iter_mut().enumerate() {
            if choice.ready(interval) {
                let delta = Delta {
                    choice: index as u32,
                    from: choice.taken,
                    to: choice.generated,
                    finish: choice.finish,
                };
                choice.taken = choice.generated;
                choice.closed = choice.finish.is_some();
                return Poll::Ready(Some(delta));
            }
        }
        if inner.choices.iter().all(|choice| choice.closed) {
            return Poll::Ready(None);
        }
        inner.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Waits for the end of all choices.
    pub fn poll_done(&self, cx: &mut Context<'_>) -> Poll<(Vec<(u32, Finish)>, Summary)> {
        let mut inner = self.lock();
        let Some(summary) = inner.summary else {
            inner.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let ends = inner
            .choices
            .iter()
            .map(|choice| (choice.generated, choice.finish.unwrap_or(Finish::Stop)))
            .collect();
        Poll::Ready((ends, summary))
    }

    /// The summary of a request that has ended.
    pub fn summary(&self) -> Summary {
        self.lock().summary.unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock half way through a change: counters are plain stores.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(progress: &Progress) -> Poll<Option<Delta>> {
        progress.poll_take(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn chunks_follow_the_interval_and_end_with_the_rest() {
        let progress = Progress::new(1, Some(3));
        let mut seen = Vec::new();
        for generated in 1..=8 {
            let last = generated == 8;
            progress.report(
                0,
                generated,
                last.then_some(Finish::Length),
                last.then(Summary::default),
            );
            if let Poll::Ready(Some(delta)) = take(&progress) {
                seen.push((delta.from, delta.to, delta.finish));
            }
        }
        assert_eq!(
            seen,
            [
                (0, 1, None),
                (1, 4, None),
                (4, 7, None),
                (7, 8, Some(Finish::Length))
            ]
        );
        assert_eq!(take(&progress), Poll::Ready(None));
    }

    #[test]
    fn a_slow_reader_gets_everything_at_once() {
        let progress = Progress::new(2, Some(1));
        progress.report(1, 5, None, None);
        progress.report(1, 6, None, None);
        assert_eq!(
            take(&progress),
            Poll::Ready(Some(Delta {
                choice: 1,
                from: 0,
                to: 6,
                finish: None
            }))
        );
        assert_eq!(take(&progress), Poll::Pending);
    }
}
