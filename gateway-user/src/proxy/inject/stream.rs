//! The edit of a response's stream.
//!
//! Blocks of the stream (what stands between two blank lines) are looked at only when they have the one shape that vLLM gives to its
//! chunks: a single line `data: {…}` that ends in LF. Everything else (comments, `[DONE]`, named events, several lines, CRLF, bytes
//! that are no event stream at all) passes as it comes, without being held.

use super::chunk::{Chunk, EVENT_START, finish_reason_shows, put_fingerprint};
use super::learned::{Fingerprint, Known, reports_reasoning};
use memchr::{memchr_iter, memchr2, memmem};

/// Longest event that is held until whole. The longest chunks (many logprobs, a whole tool call at once) have some hundred kB.
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;

/// What an emptied buffer may keep of its memory, since a stream idles between tokens. An ordinary event has 200 to 400 bytes.
const MAX_IDLE_BYTES: usize = 512;

/// What a request's edit makes the upstream add to its stream, and so has to be taken out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strip {
    /// The client asked for the final usage: only the usage on other events goes.
    pub(super) keeps_final: bool,
    /// Only one choice can come.
    pub(super) single_choice: bool,
    /// What was learned before.
    pub(super) known: Known,
}

/// Why the rest of a stream passes unedited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stopped {
    /// An event was longer than 4 MiB.
    EventTooLong,
}

impl Stopped {
    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Stopped::EventTooLong => "event_too_long",
        }
    }
}

/// Takes out of one response's payload what the client did not ask for.
///
/// The caller removes the upstream's framing, pushes payload in whatever pieces it comes, and at the end of each upstream chunk frames
/// what has been appended to `out` as one chunk, or sends nothing when that is empty. So a chunk keeps its place and its events, and a
/// chunk that held only the final usage vanishes.
#[derive(Debug)]
pub struct StreamEditor {
    strip: Strip,
    at: Place,
    /// The beginning of a block that may be an event, as far as it has come.
    partial: Vec<u8>,
    held: Option<Held>,
    lesson: Known,
    stopped: Option<Stopped>,
}

/// Where in the stream the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At the beginning of a block, or within one that looks like an event so far.
    Event,
    /// Within a block that passes.
    Passing(Passing),
    /// Beyond the point where editing was given up.
    Rest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Passing {
    line: Line,
    /// A comment right behind a held event has to stay behind it.
    behind_held: bool,
}

/// What has come of the current line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Nothing,
    CarriageReturn,
    Text,
}

impl Line {
    fn with(self, bytes: &[u8]) -> Line {
        match (self, bytes) {
            (line, b"") => line,
            (Line::Nothing, b"\r") => Line::CarriageReturn,
            _ => Line::Text,
        }
    }
}

/// The event with the `finish_reason`, edited but for the fingerprint, and comments that came behind it.
#[derive(Debug)]
struct Held {
    bytes: Vec<u8>,
    /// Where the fingerprint goes: before the object's closing brace.
    slot: usize,
}

impl StreamEditor {
    /// An editor for the response to a request that was edited that way.
    pub fn new(strip: Strip) -> StreamEditor {
        StreamEditor {
            strip,
            at: Place::Event,
            partial: Vec::new(),
            held: None,
            lesson: Known::default(),
            stopped: None,
        }
    }

    /// Takes the next payload and appends what may go to the client.
    pub fn push(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        let mut rest = payload;
        while !rest.is_empty() {
            rest = match self.at {
                Place::Event => self.read_event(rest, out),
                Place::Passing(passing) => self.pass(passing, rest, out),
                Place::Rest => {
                    out.extend_from_slice(rest);
                    return;
                }
            };
        }
    }

    /// The stream is over, properly or not: appends what was still held.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        self.release_held(out);
        out.append(&mut self.partial);
        self.at = Place::Event;
    }

    /// What the stream has told that was not known when the request was planned; to be [noted](super::Learned::note).
    pub fn lesson(&self) -> Option<&Known> {
        self.strip.known.lacks(&self.lesson).then_some(&self.lesson)
    }

    /// Whether editing was given up, and why.
    pub fn stopped(&self) -> Option<Stopped> {
        self.stopped
    }

    /// Reads on in a block that may be an event; returns what it left over.
    fn read_event<'p>(&mut self, input: &'p [u8], out: &mut Vec<u8>) -> &'p [u8] {
        let start = EVENT_START.get(self.partial.len()..).unwrap_or_default();
        let compared = start.len().min(input.len());
        if input[..compared] != start[..compared] {
            return self.pass_block(input, out);
        }
        let end = match self.end_of_event(input) {
            End::Here(end) => end,
            End::NotYet => {
                self.hold_partial(input, out);
                return &[];
            }
            End::Never => return self.pass_block(input, out),
        };
        let (last, rest) = input.split_at(end);
        if self.partial.is_empty() {
            self.edit(last, out);
            return rest;
        }
        let mut event = std::mem::take(&mut self.partial);
        event.extend_from_slice(last);
        self.edit(&event, out);
        if event.capacity() <= MAX_IDLE_BYTES {
            event.clear();
            self.partial = event;
        }
        rest
    }

    /// Where in `input` the event ends that has begun.
    fn end_of_event(&self, input: &[u8]) -> End {
        let after_line = if self.partial.last() == Some(&b'\n') {
            0
        } else {
            match memchr2(b'\n', b'\r', input) {
                None => return End::NotYet,
                Some(at) if input[at] == b'\r' => return End::Never,
                Some(at) => at + 1,
            }
        };
        match input.get(after_line) {
            None => End::NotYet,
            Some(b'\n') => End::Here(after_line + 1),
            Some(_) => End::Never,
        }
    }

    fn hold_partial(&mut self, input: &[u8], out: &mut Vec<u8>) {
        self.partial.extend_from_slice(input);
        if self.partial.len() > MAX_EVENT_BYTES {
            let partial = std::mem::take(&mut self.partial);
            self.stop(Stopped::EventTooLong, &partial, out);
        }
    }

    fn stop(&mut self, why: Stopped, bytes: &[u8], out: &mut Vec<u8>) {
        self.release_held(out);
        out.extend_from_slice(bytes);
        self.stopped = Some(why);
        self.at = Place::Rest;
    }

    /// The block that has begun is none that could need an edit: all of it passes.
    fn pass_block<'p>(&mut self, input: &'p [u8], out: &mut Vec<u8>) -> &'p [u8] {
        let partial = std::mem::take(&mut self.partial);
        let says_nothing = partial.is_empty() && matches!(input.first(), Some(b':' | b'\n'));
        let passing = Passing {
            line: match partial.last() {
                None | Some(b'\n') => Line::Nothing,
                Some(_) => Line::Text,
            },
            behind_held: says_nothing && self.held.is_some(),
        };
        if !passing.behind_held {
            self.release_held(out);
        }
        out.extend_from_slice(&partial);
        self.pass(passing, input, out)
    }

    /// Passes input up to the end of the block; returns what is left.
    fn pass<'p>(&mut self, mut passing: Passing, input: &'p [u8], out: &mut Vec<u8>) -> &'p [u8] {
        let (mut line_start, mut block_end) = (0, None);
        for at in memchr_iter(b'\n', input) {
            if passing.line.with(&input[line_start..at]) != Line::Text {
                block_end = Some(at + 1);
                break;
            }
            passing.line = Line::Nothing;
            line_start = at + 1;
        }
        let (passes, rest) = input.split_at(block_end.unwrap_or(input.len()));
        match &mut self.held {
            Some(held) if passing.behind_held && held.bytes.len() + passes.len() <= MAX_EVENT_BYTES => {
                held.bytes.extend_from_slice(passes);
            }
            _ => {
                self.release_held(out);
                out.extend_from_slice(passes);
            }
        }
        passing.line = passing.line.with(&input[line_start..]);
        self.at = match block_end {
            Some(_) => Place::Event,
            None => Place::Passing(passing),
        };
        rest
    }

    /// Appends a whole event (`data: {…}`, LF, LF), edited.
    fn edit(&mut self, event: &[u8], out: &mut Vec<u8>) {
        if event.len() > MAX_EVENT_BYTES {
            return self.stop(Stopped::EventTooLong, event, out);
        }
        let may_finish = !self.strip.keeps_final && finish_reason_shows(event);
        let chunk = Some(event)
            .filter(|event| may_finish || memmem::find(event, b"\"usage\"").is_some())
            .and_then(|event| std::str::from_utf8(event).ok())
            .and_then(|event| Chunk::read(event, may_finish));
        let Some(chunk) = chunk else {
            self.release_held(out);
            out.extend_from_slice(event);
            return;
        };
        self.learn(&chunk);
        if chunk.is_final_usage() {
            self.edit_final_usage(&chunk, out);
        } else {
            self.release_held(out);
            self.edit_chunk(&chunk, out);
        }
    }

    fn edit_chunk(&mut self, chunk: &Chunk<'_>, out: &mut Vec<u8>) {
        if !chunk.finishes || chunk.fingerprint.is_some() {
            chunk.write_without_usage(out);
        } else if self.strip.single_choice {
            let mut bytes = Vec::with_capacity(chunk.event.len());
            let slot = chunk.write_without_usage(&mut bytes);
            self.held = Some(Held { bytes, slot });
        } else {
            let start = out.len();
            let slot = start + chunk.write_without_usage(out);
            if let Fingerprint::Text(text) = &self.strip.known.fingerprint {
                put_fingerprint(out, slot, text);
            }
        }
    }

    fn edit_final_usage(&mut self, chunk: &Chunk<'_>, out: &mut Vec<u8>) {
        if self.strip.keeps_final {
            out.extend_from_slice(chunk.event.as_bytes());
            return;
        }
        if let Some(mut held) = self.held.take() {
            if let Some(text) = chunk.fingerprint.filter(|text| *text != "null") {
                put_fingerprint(&mut held.bytes, held.slot, text);
            }
            out.append(&mut held.bytes);
        }
    }

    fn learn(&mut self, chunk: &Chunk<'_>) {
        let is_final = chunk.is_final_usage();
        if is_final || chunk.fingerprint.is_some() {
            self.lesson.fingerprint = Fingerprint::of(chunk.fingerprint);
        }
        if let Some(usage) = chunk.usage
            && (is_final || self.lesson.reports_reasoning.is_none())
        {
            self.lesson.reports_reasoning = Some(reports_reasoning(usage.value));
        }
    }

    /// Sends a held event on its way without having seen its fingerprint: with the one that was learned, if any was.
    fn release_held(&mut self, out: &mut Vec<u8>) {
        if let Some(mut held) = self.held.take() {
            if let Fingerprint::Text(text) = &self.strip.known.fingerprint {
                put_fingerprint(&mut held.bytes, held.slot, text);
            }
            out.append(&mut held.bytes);
        }
    }
}

enum End {
    /// So many bytes on.
    Here(usize),
    NotYet,
    /// This is no event of one line.
    Never,
}

#[cfg(test)]
mod tests;
