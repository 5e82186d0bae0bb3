//! Gathers the facts of one request and its response while the bytes pass.
//!
//! Whoever moves the bytes reads heads and framing, and hands payload over with the time at which it came. The facts follow from the
//! bytes alone: the cut makes no difference, except that an event's time is that of the bytes that complete it. Memory is constant;
//! texts are looked at for being empty or not, and never kept.
//!
//! What a server does not say stays unknown. Where a stream breaks off before its final usage, the last usage that it carried counts
//! ([`UsageSource::Continuous`]); where it carried none, or told of the prompt alone, only the number of chunks is known
//! ([`UsageSource::Counted`]), which is no number of tokens, so the count of generated tokens stays empty.

pub use super::facts::*;

use super::endpoint::{Endpoint, Purpose};
use super::head::{RequestHead, ResponseHead};
use super::json::Scanner;
use super::progress::{Mark, Progress};
use super::request::RequestReader;
use super::response::{Draft, Findings, Kind, Place, UsageAt};
use super::sse::{EventReader, Step};
use super::usage::{Running, Spread, Usage};
use super::{At, Piece};

/// How a response's body is read.
#[derive(Clone, Debug)]
enum Body {
    /// Not at all: nothing in it is worth knowing, or a content coding hides it.
    Opaque,
    /// As one document.
    Document,
    /// As events.
    Events(EventReader),
}

/// What is known of tokens so far.
#[derive(Clone, Debug, Default)]
struct Counts {
    /// The final usage. Boxed, as most of an exchange's life there is none.
    reported: Option<Box<Usage>>,
    /// Anthropic's usage at the start, which knows the input only.
    start: Option<Box<Usage>>,
    /// The last usage of each choice.
    running: Running,
}

/// Gathers the [`Facts`] of one exchange while its bytes pass. The caller reads heads and framing and hands over payload.
#[derive(Clone, Debug)]
pub struct Exchange {
    started: At,
    endpoint: Endpoint,
    request: RequestReader,
    request_bytes: u64,
    request_whole: Option<At>,
    status: Option<u16>,
    streamed: bool,
    response_head_us: Option<u64>,
    response_bytes: u64,
    /// Bytes of the response's body are missing.
    has_hole: bool,
    body: Body,
    scanner: Scanner<Place>,
    findings: Findings,
    counts: Counts,
    has_error: bool,
    /// A stream has said that nothing more comes: `[DONE]`, or the last event of its kind. The framing's own end comes later, and OpenAI's clients do not
    /// wait for it: one that leaves now has lost nothing.
    has_said_end: bool,
    ttft_us: Option<u64>,
    /// `None` when the chunk before the next one was not seen, so that the gap between them is unknown.
    last_content_at: Option<At>,
    gaps: Gaps,
    chunks: u64,
    progress: Progress,
    /// When the last byte of the response came; before any has, when the request began.
    last_byte_at: At,
}

impl Exchange {
    /// An exchange whose request began at `at` (the first byte of its head).
    pub fn begin(at: At, head: &RequestHead) -> Exchange {
        Exchange {
            started: at,
            endpoint: Endpoint::classify(head.path()),
            request: RequestReader::new(),
            request_bytes: 0,
            request_whole: None,
            status: None,
            streamed: false,
            response_head_us: None,
            response_bytes: 0,
            has_hole: false,
            body: Body::Opaque,
            scanner: Scanner::new(),
            findings: Findings::default(),
            counts: Counts::default(),
            has_error: false,
            has_said_end: false,
            ttft_us: None,
            last_content_at: None,
            gaps: Gaps::default(),
            chunks: 0,
            progress: Progress::default(),
            last_byte_at: at,
        }
    }

    /// Payload of the request's body.
    pub fn request_body(&mut self, piece: Piece<'_>) {
        self.request_bytes = self.request_bytes.saturating_add(piece.len_bytes());
        self.request.push(piece);
    }

    /// The request is whole: its last byte, seen or not, came at `at`.
    pub fn request_end(&mut self, at: At) {
        self.request_whole.get_or_insert(at);
    }

    /// The request's route.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// What the request asked for, as far as its body has been seen.
    pub fn asked(&self) -> &Asked {
        self.request.asked()
    }

    /// The model, by the response as soon as it names one, else by the request.
    pub fn model(&self) -> Option<&str> {
        self.findings.model.as_deref().or(self.asked().model.as_deref())
    }

    /// A head of the response; interim ones (1xx) count for nothing.
    pub fn response_head(&mut self, at: At, head: &ResponseHead) {
        if head.is_interim() {
            return;
        }
        let status = head.status();
        self.status = Some(status);
        self.last_byte_at = at;
        self.response_head_us = Some(at.micros_since(self.started));
        self.streamed = head.is_event_stream();
        self.findings.is_error_body = status >= 400;
        let tells_tokens = matches!(self.endpoint.purpose(), Purpose::Generate | Purpose::Pool);
        let is_readable = (tells_tokens || status >= 400) && !head.is_encoded();
        self.body = match is_readable {
            false => Body::Opaque,
            true if self.streamed => Body::Events(EventReader::new()),
            true => Body::Document,
        };
    }

    /// Payload of the response's body, framing removed.
    pub fn response_body(&mut self, at: At, piece: Piece<'_>) {
        self.response_bytes = self.response_bytes.saturating_add(piece.len_bytes());
        self.has_hole |= matches!(piece, Piece::Hole(1..));
        self.last_byte_at = at;
        match (&mut self.body, piece) {
            (Body::Opaque, _) => {}
            (Body::Document, Piece::Bytes(bytes)) => self.scanner.push(bytes, &mut self.findings),
            (Body::Document, Piece::Hole(_)) => self.scanner.stop(),
            (Body::Events(_), Piece::Bytes(bytes)) => self.events(at, bytes),
            (Body::Events(events), Piece::Hole(_)) => {
                events.skip_damaged();
                self.scanner.reset();
                self.findings.draft = Draft::default();
                self.counts.running.lose();
                self.last_content_at = None;
            }
        }
    }

    fn events(&mut self, at: At, mut bytes: &[u8]) {
        while let Body::Events(events) = &mut self.body {
            match events.next(&mut bytes) {
                Step::Data(run) => self.scanner.push(run, &mut self.findings),
                Step::Event { is_done_marker } => {
                    self.has_said_end |= is_done_marker;
                    self.end_event(at);
                }
                Step::More => return,
            }
        }
    }

    /// Takes in an event that is whole. One that is no JSON (`[DONE]`, or a broken one) says nothing.
    fn end_event(&mut self, at: At) {
        let is_whole = self.scanner.is_done();
        self.scanner.reset();
        let draft = std::mem::take(&mut self.findings.draft);
        if !is_whole {
            return;
        }
        self.has_error |= draft.has_error();
        self.has_said_end |= draft.is_last();
        self.counts.event(&draft);
        if draft.has_content() {
            self.content(at);
        }
    }

    fn content(&mut self, at: At) {
        if let Some(last) = self.last_content_at {
            self.gaps.add(at.micros_since(last));
        } else if self.chunks == 0 && !self.has_hole {
            self.ttft_us = Some(at.micros_since(self.started));
        }
        self.last_content_at = Some(at);
        self.chunks += 1;
        if self.progress.is_due(at) {
            self.mark(at);
        }
    }

    fn mark(&mut self, at: At) {
        let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        self.progress.mark(Mark {
            at,
            chunks: narrow(self.chunks),
            completion_tokens: self.tokens_so_far().completion.map(narrow),
        });
    }

    /// What a stream that goes on has told of its tokens so far. Nothing is known where it tells at its end only.
    pub fn tokens_so_far(&self) -> Tokens {
        self.counts.running.tokens(self.spread())
    }

    /// How the generated content has come along. The last content is part of it, however new.
    pub fn progress(&mut self) -> &Progress {
        if let Some(last) = self.last_content_at {
            self.mark(last);
        }
        &self.progress
    }

    /// Lets go of what lies before `at`: the reader has taken note of it.
    pub fn forget_progress_before(&mut self, at: At) {
        self.progress.forget_before(at);
    }

    /// Whether chunks with generated content have been seen.
    pub fn has_content(&self) -> bool {
        self.chunks > 0
    }

    /// How it ends when its client has left and no more of the response is read, which by its framing is not whole. See [`Outcome`].
    pub fn ending_without_client(&self) -> Ending {
        match self.has_said_end {
            true => Ending::Complete,
            false => Ending::ClientGone,
        }
    }

    /// Ends the exchange. `status` of a response that the gateway made itself is told with [`Ending::Refused`] and the like by the
    /// caller, who knows it.
    pub fn finish(mut self, at: At, ending: Ending) -> Facts {
        self.take_facts(at, ending)
    }

    /// As [`Exchange::finish`], where it lies: it is large, and to move it takes as long as to read a head. It is of no use afterwards.
    pub(super) fn take_facts(&mut self, at: At, ending: Ending) -> Facts {
        // A stream of which events are missing is no stream that was seen whole. Of a document only values are, and those are empty.
        let is_stream_damaged = self.has_hole && matches!(self.body, Body::Events(_));
        let (is_complete, is_cut) = (ending == Ending::Complete, ending == Ending::Unseen);
        let ending = match ending {
            Ending::Complete if is_stream_damaged => Ending::Unseen,
            ending => ending,
        };
        match &self.body {
            // A server may leave out the last blank line; in a stream that broke off, half an event is no event.
            Body::Events(events) if is_complete && events.has_unfinished_event() => {
                self.end_event(at);
            }
            Body::Document => {
                self.has_error |= self.findings.draft.has_error();
                self.counts.reported = self.findings.draft.usage().map(|(_, usage)| Box::new(usage));
            }
            _ => {}
        }
        self.progress();
        let (tokens, usage_source) = self.tokens(is_cut);
        let asked = self.request.take_asked();
        Facts {
            started: self.started,
            request_whole: self.request_whole,
            ended: at,
            endpoint: self.endpoint,
            model: self.findings.model.take().or_else(|| asked.model.clone()),
            asked,
            streamed: self.streamed,
            status: self.status,
            outcome: Outcome::of(ending, self.status, self.has_error),
            error_type: self.findings.error_type.take(),
            finish_reason: self.findings.finish_reason.take(),
            tokens,
            usage_source,
            ttft_us: self.ttft_us,
            response_head_us: self.response_head_us,
            queue_us: self.findings.queue_us,
            gaps: self.gaps,
            chunks: self.chunks,
            progress: std::mem::take(&mut self.progress),
            last_byte_at: self.last_byte_at,
            request_bytes: self.request_bytes,
            response_bytes: self.response_bytes,
        }
    }

    /// The counts, and where they come from. Where the end was not seen (`is_cut`), the last usage that was may be long out of date.
    fn tokens(&self, is_cut: bool) -> (Tokens, UsageSource) {
        if self.status.is_none_or(|status| status >= 400) {
            return (Tokens::default(), UsageSource::None);
        }
        if let Some(usage) = &self.counts.reported {
            return (usage.tokens(self.choices_per_prompt()), UsageSource::Reported);
        }
        let running = self.counts.running.tokens(self.spread());
        let running = match is_cut {
            true => running.input_only(),
            false => running,
        };
        let started = self.counts.start.as_ref().map(|usage| usage.tokens(Some(1)));
        let known = [Some(running), started].into_iter().flatten();
        match known.into_iter().find(|tokens| *tokens != Tokens::default()) {
            Some(tokens) if tokens.completion.is_some() => (tokens, UsageSource::Continuous),
            // Messages: the prompt was told at the start, what was generated never. Half a usage is not to be billed as a whole one.
            Some(tokens) => (tokens, UsageSource::Counted),
            None if self.chunks > 0 => (Tokens::default(), UsageSource::Counted),
            None => (Tokens::default(), UsageSource::None),
        }
    }

    /// How many choices the engine made of each prompt. Where the request was not seen, the response tells, but for routes that
    /// take several prompts.
    fn choices_per_prompt(&self) -> Option<u32> {
        let choices_seen = u32::try_from(self.findings.last_choice).ok()?.checked_add(1)?;
        // Behind a hole in the response there may have been more of them.
        let choices_seen = Some(choices_seen).filter(|_| !self.has_hole);
        match self.endpoint {
            Endpoint::ChatCompletions
            | Endpoint::ChatBatch
            | Endpoint::Completions
            | Endpoint::Invocations
                if self.request.knows_choices() =>
            {
                Some(self.request.asked().n)
            }
            // Completions do not announce their choices: only a final usage says that no other comes.
            Endpoint::ChatBatch | Endpoint::Completions | Endpoint::Invocations => {
                choices_seen.filter(|seen| *seen == 1 && self.counts.reported.is_some())
            }
            // `n` of the token route lies in its sampling parameters; the response says the same.
            Endpoint::ChatCompletions | Endpoint::Generate => choices_seen,
            _ => Some(1),
        }
    }

    /// How choices divide into prompts, unless what was seen contradicts it.
    fn spread(&self) -> Option<Spread> {
        let choices = self.choices_per_prompt()?;
        let prompts = match self.endpoint {
            Endpoint::Completions | Endpoint::Invocations if !self.request.knows_prompts() => return None,
            Endpoint::Completions | Endpoint::Invocations => self.request.asked().prompts,
            _ => 1,
        };
        let most = u64::from(choices) * u64::from(prompts);
        (self.findings.last_choice < most).then_some(Spread { choices, prompts })
    }
}

impl Counts {
    fn event(&mut self, draft: &Draft) {
        let Some((place, usage)) = draft.usage() else {
            return;
        };
        match place {
            UsageAt::Message => self.start = Some(Box::new(usage.input_only())),
            UsageAt::Response if matches!(draft.kind, Kind::ResponseEnd | Kind::ResponseFailed) => {
                self.reported = Some(Box::new(usage));
            }
            UsageAt::Response => self.running.set(0, usage),
            UsageAt::Top if draft.is_summary() => {
                self.reported = Some(Box::new(usage.with_input_of(self.start.as_deref().copied())));
            }
            UsageAt::Top if draft.choices == 1 => self.running.set(draft.index, usage),
            UsageAt::Top => self.running.set_unplaced(),
        }
    }
}

#[cfg(test)]
mod tests;
