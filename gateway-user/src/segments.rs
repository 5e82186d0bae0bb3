//! What the ledger is told of a request, as it runs and when it has ended.
//!
//! The bytes tell when what came ([`crate::wire`]), the ledger knows how a run is cut ([`crate::ledger::segment`]); in between are the
//! clocks, and the question which requests ran at all. A stream that tells its tokens as it goes is cut window by window, so that a
//! long one is in each of its windows before that is settled; all others are cut at their end.
//!
//! Promises: the segments of a request sum to the tokens that the engine counted for it, as far as its event tells them. Left out:
//! requests that no engine ran (refused, unreachable, answered with an error before any content, or to a route that costs nothing).

use crate::event::TapTimes;
use crate::ledger::{Cutter, Micros, Point, Run, Slice, Span, Wait, Window, scheduled};
use crate::vllm::{SampleSink, SystemSample};
use crate::wire::At;
use crate::wire::endpoint::Purpose;
use crate::wire::exchange::{Exchange, Facts, Outcome, Tokens};
use crate::wire::progress::Progress;
use foldhash::quality::RandomState;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

/// Cuts one request into segments.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    /// One moment on both clocks: they are laid together once, so that a clock that is set meanwhile tears nothing apart.
    began: (At, Micros),
    /// When it was sent to the upstream that answers; `None` while it was not.
    sent: Option<At>,
    /// When the first window ends that is not cut yet.
    due: At,
    cutter: Cutter,
}

impl Segments {
    /// Of a request whose first byte came at `at`, which by the wall clock is `wall_us` since 1970.
    pub fn begin(at: At, wall_us: i64) -> Segments {
        let wall = Micros(u64::try_from(wall_us).unwrap_or(0));
        let mut segments = Segments {
            began: (at, wall),
            sent: None,
            due: at,
            cutter: Cutter::default(),
        };
        segments.due_after(wall);
        segments
    }

    /// It goes to an upstream now; of several tries the last one ran.
    pub fn sent(&mut self, at: At) {
        self.sent = Some(at);
    }

    /// Whether a window has ended since the last cut.
    pub fn is_due(&self, now: At) -> bool {
        now >= self.due
    }

    /// Cuts what is over of a stream that goes on, if it tells enough.
    pub fn advance(&mut self, exchange: &mut Exchange, now: At, wait: Wait) -> Vec<Slice> {
        self.due_after(self.wall(now));
        let tokens = exchange.tokens_so_far();
        let (Some(sent), true) = (self.sent, is_told(tokens)) else {
            return Vec::new();
        };
        let progress = exchange.progress();
        let Some(run) = self.run(sent, now, progress, tokens, 0, wait) else {
            return Vec::new();
        };
        let slices = self.cutter.cut_finished(&run, self.wall(now));
        if let Some(last) = slices.last() {
            exchange.forget_progress_before(self.moment(last.run.to()));
        }
        slices
    }

    /// Cuts the rest of a request that has ended.
    pub fn finish(mut self, facts: &Facts, tap: Option<TapTimes>, wait: Wait) -> Vec<Slice> {
        let Some(sent) = self.sent.filter(|_| has_run(facts)) else {
            return Vec::new();
        };
        let arrived = tap.map_or(sent, |tap| tap.arrived);
        // What the client took its time to read is not the engine's.
        let ended = match (facts.outcome, tap) {
            (Outcome::Completed, Some(tap)) => tap.ended,
            (Outcome::Completed, None) => facts.last_byte_at,
            _ => facts.ended,
        };
        let wait = Wait {
            told_us: facts.queue_us,
            ..wait
        };
        match self.run(arrived, ended, &facts.progress, facts.tokens, facts.chunks, wait) {
            Some(run) => self.cutter.cut_rest(&run),
            None => Vec::new(),
        }
    }

    fn run(
        &self,
        arrived: At,
        ended: At,
        progress: &Progress,
        tokens: Tokens,
        chunks: u64,
        wait: Wait,
    ) -> Option<Run> {
        let span = Span::new(self.wall(arrived), self.wall(ended));
        let prefilled = progress
            .first_at()
            .map(|at| self.wall(at).clamp(span.from(), span.to()));
        let completion_tokens = tokens.engine_completion.or(tokens.completion).unwrap_or(0);
        let tells = progress.marks().all(|mark| mark.completion_tokens.is_some());
        let point = |mark: crate::wire::progress::Mark| Point {
            at: self.wall(mark.at),
            units: mark
                .completion_tokens
                .filter(|_| tells)
                .unwrap_or(mark.chunks)
                .into(),
        };
        Some(Run {
            span: Span::new(scheduled(span, prefilled, completion_tokens, wait), span.to()),
            prefilled,
            prompt_tokens: tokens.engine_prompt.or(tokens.prompt).unwrap_or(0),
            cached_tokens: tokens.cached.unwrap_or(0),
            completion_tokens,
            points: progress.marks().map(point).collect(),
            units: if tells { completion_tokens } else { chunks },
        })
    }

    fn wall(&self, at: At) -> Micros {
        let (began, wall) = self.began;
        Micros(wall.0.saturating_add(at.micros_since(began)))
    }

    fn moment(&self, wall: Micros) -> At {
        let (began, began_wall) = self.began;
        At(began
            .0
            .saturating_add(wall.0.saturating_sub(began_wall.0).saturating_mul(1_000)))
    }

    fn due_after(&mut self, wall: Micros) {
        self.due = self.moment(Window::at(wall).span().to());
    }
}

/// Whether a stream tells of its tokens while it goes on.
fn is_told(tokens: Tokens) -> bool {
    tokens.prompt.is_some() && tokens.completion.is_some()
}

/// Whether an engine ran the request.
fn has_run(facts: &Facts) -> bool {
    let costs = matches!(facts.endpoint.purpose(), Purpose::Generate | Purpose::Pool);
    let reached = !matches!(
        facts.outcome,
        Outcome::Refused | Outcome::Unreachable | Outcome::GatewayCrash
    );
    let is_error = facts.status.is_some_and(|status| status >= 400);
    costs && reached && !is_error
}

/// How long requests wait at each upstream just now, by what it said between the last two scrapes.
#[derive(Debug, Default)]
pub struct Waits(RwLock<HashMap<Box<str>, Wait, RandomState>>);

impl Waits {
    /// How long they wait and run there, on average; nothing is known before the second scrape.
    pub fn of(&self, upstream: &str) -> Wait {
        let waits = self.0.read().unwrap_or_else(PoisonError::into_inner);
        waits.get(upstream).copied().unwrap_or_default()
    }
}

impl SampleSink for Waits {
    fn record(&self, sample: &SystemSample) {
        let wait = Wait {
            told_us: None,
            queue_us: sample.means.queue_us,
            prefill_us: sample.means.prefill_us,
            token_us: sample.means.itl_us,
        };
        let mut waits = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match waits.get_mut(&sample.upstream) {
            Some(of_upstream) => *of_upstream = wait,
            None => {
                waits.insert(sample.upstream.clone(), wait);
            }
        }
    }
}

#[cfg(test)]
mod tests;
