//! One TCP connection's two byte streams, read as exchanges.
//!
//! For whoever sees raw wire bytes (the kernel tap, and tests): [`Connection`] finds heads and bodies in both directions, pairs
//! responses with requests (pipelined ones too) and feeds an [`Exchange`] for each. It promises constant memory: heads are held
//! up to a limit until they are whole, bodies never, and [`Limits::in_flight`] requests may wait for their responses.
//!
//! Where bytes are missing or make no sense, nothing is guessed. A hole inside payload costs what the payload would have said; any
//! other ends the exchange that was hit as [`Ending::Unseen`], and the direction waits for a piece that begins with a head: a request
//! line, or `HTTP/1.` while a request waits. A connection that is first seen in its middle starts in the same way. What passes meanwhile
//! (TLS, another protocol) is counted as opaque.
//!
//! Behind missing bytes a response goes to the request that waits only where no other could be meant: one request waits, and the response
//! begins right behind the hole, or nothing but a client's next request tells that the last one is over. That a client waits for
//! its response before it asks again is taken for granted there; one that pipelines can make a lost response look like its successor.

use super::body::{BodyReader, Step};
use super::exchange::{Ending, Exchange, Facts};
use super::head::{RequestHead, ResponseHead};
use super::{At, Piece};
use memchr::memmem::Finder;
use std::collections::VecDeque;
use std::sync::LazyLock;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client.
    ToServer,
    /// From the server.
    ToClient,
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closer {
    /// The client.
    Client,
    /// The server.
    Server,
    /// Nobody that is known: watching ended.
    Unknown,
}

/// What one connection may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest head, in bytes. A longer one is not read.
    pub head_bytes: usize,
    /// Most requests that wait for their responses. With more, pairing is given up for all of them.
    pub in_flight: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            // uvicorn's own limit for a head.
            head_bytes: 64 * 1024,
            // No client of an LLM pipelines deeply: each request takes seconds.
            in_flight: 64,
        }
    }
}

/// Whoever wants to know of a connection's exchanges.
pub trait Watcher {
    /// What the watcher keeps beside an exchange, for instance who it is for.
    type Tag;

    /// A request's head is whole; `at` is the time of its first byte.
    fn began(&mut self, at: At, head: &RequestHead) -> Self::Tag;

    /// An exchange has ended. Each that began ends exactly once, at the latest when the connection is closed.
    fn ended(&mut self, tag: Self::Tag, facts: Facts);
}

#[derive(Debug)]
enum Reading {
    /// Bytes are opaque until some begin with a head.
    Seeking,
    /// The next byte belongs to a head.
    Head,
    Body(BodyReader),
    /// The protocol was changed: no HTTP any more.
    Upgraded,
}

/// What ends a head. Made once, since making it takes as long as finding it.
static BLANK_LINE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\r\n\r\n"));

/// Where the head ends that `bytes` begin with.
fn head_end(bytes: &[u8]) -> Option<usize> {
    BLANK_LINE.find(bytes).map(|at| at + 4)
}

/// These bytes are no head.
struct NoHead;

/// One direction.
#[derive(Debug)]
struct Side {
    reading: Reading,
    /// A head that is not whole yet.
    head: Vec<u8>,
    /// When its first byte came.
    head_at: At,
}

impl Side {
    fn new() -> Side {
        Side {
            reading: Reading::Seeking,
            head: Vec::new(),
            head_at: At::default(),
        }
    }

    fn seek(&mut self) {
        self.reading = Reading::Seeking;
        self.head = Vec::new();
    }

    /// While a head is sought, forgets what looked like the start of one and is none together with `input`, which may begin with one itself.
    /// How many bytes that were.
    fn forget_unless(&mut self, may_begin: fn(&[u8]) -> bool, input: &[u8]) -> u64 {
        // Longer than any method with the byte behind its space, and than `HTTP/1.`: beyond that it is settled.
        const UNSETTLED_BYTES_MAX: usize = 16;
        let held = self.head.len();
        if !matches!(self.reading, Reading::Seeking) || held == 0 || held > UNSETTLED_BYTES_MAX {
            return 0;
        }
        let mut start = [0; 2 * UNSETTLED_BYTES_MAX];
        let more = input.len().min(UNSETTLED_BYTES_MAX);
        start[..held].copy_from_slice(&self.head);
        start[held..held + more].copy_from_slice(&input[..more]);
        if may_begin(&start[..held + more]) {
            return 0;
        }
        self.head = Vec::new();
        held as u64
    }

    /// How many bytes of a hole are payload for certain.
    fn take_hole(&mut self, len: u64) -> u64 {
        match &mut self.reading {
            Reading::Body(body) => body.hole(len).unwrap_or(0),
            Reading::Upgraded => len,
            Reading::Seeking | Reading::Head => 0,
        }
    }

    /// The head that comes next, once it is whole. What cannot be one is left to whoever asks: in `input`, and in what was gathered.
    fn next_head<H>(
        &mut self,
        at: At,
        input: &mut &[u8],
        limit: usize,
        may_begin: fn(&[u8]) -> bool,
        parse: impl FnOnce(&[u8]) -> Option<H>,
    ) -> Result<Option<H>, NoHead> {
        let unread = *input;
        if let Some(head) = self.whole_head(at, input, limit) {
            let parsed = Some(head).filter(|head| may_begin(head)).and_then(parse);
            if parsed.is_none() {
                *input = unread;
            }
            return parsed.map(Some).ok_or(NoHead);
        }
        let is_whole = self.gather(at, input, limit);
        if !may_begin(&self.head) {
            return Err(NoHead);
        }
        if !is_whole {
            return Ok(None);
        }
        let head = parse(&self.head).ok_or(NoHead)?;
        // An idle connection keeps no buffer.
        self.head = Vec::new();
        Ok(Some(head))
    }

    /// A head that lies whole at the start of `input`, as most do, and is no longer than the limit: it need not be gathered.
    fn whole_head<'i>(&mut self, at: At, input: &mut &'i [u8], limit: usize) -> Option<&'i [u8]> {
        if !self.head.is_empty() {
            return None;
        }
        let (head, rest) = input.split_at(head_end(&input[..input.len().min(limit)])?);
        self.head_at = at;
        *input = rest;
        Some(head)
    }

    /// Takes bytes of a head, up to the blank line that ends it, and no more than the limit. Whether there is something to parse.
    fn gather(&mut self, at: At, input: &mut &[u8], limit: usize) -> bool {
        if self.head.is_empty() {
            self.head_at = at;
        }
        // The blank line may lie across the cut.
        let from = self.head.len().saturating_sub(3);
        let room = limit.saturating_sub(self.head.len()).min(input.len());
        let held = self.head.len();
        self.head.extend_from_slice(&input[..room]);
        let end = head_end(&self.head[from..]).map(|end| from + end);
        if let Some(end) = end {
            self.head.truncate(end);
        }
        *input = &input[self.head.len() - held..];
        end.is_some() || self.head.len() >= limit
    }
}

/// An exchange that waits for its response or for the response's end.
#[derive(Debug)]
struct InFlight<T> {
    exchange: Exchange,
    tag: T,
    is_head_request: bool,
    /// Something was missed, so that the facts may be those of another request.
    is_uncertain: bool,
}

/// What may have become of the responses to the requests that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    None,
    /// Bytes that are no head passed while they waited: the end of an older response, or of theirs.
    Passed,
    /// A hole did. The next byte tells whether a response begins behind it.
    Missing,
}

/// Reads one connection.
#[derive(Debug)]
pub struct Connection<T> {
    limits: Limits,
    requests: Side,
    responses: Side,
    /// Each in a place of its own: they are large, and a deque of them would have room for several, which it took longer to get and to give back
    /// than to read a small response.
    in_flight: VecDeque<Box<InFlight<T>>>,
    /// Whether the request whose body is being read is the last of `in_flight` (it may have been answered early).
    reads_last: bool,
    doubt: Doubt,
    opaque_bytes: u64,
}

impl<T> Connection<T> {
    /// A connection of which nothing has been seen yet, be it from its beginning or not.
    pub fn new(limits: Limits) -> Connection<T> {
        Connection {
            limits,
            requests: Side::new(),
            responses: Side::new(),
            in_flight: VecDeque::new(),
            reads_last: false,
            doubt: Doubt::None,
            opaque_bytes: 0,
        }
    }

    /// Bytes that belong to no exchange.
    pub fn opaque_bytes(&self) -> u64 {
        self.opaque_bytes
    }

    /// How many exchanges have begun and not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a request waits of which the last byte has come.
    pub fn awaits_response(&self) -> bool {
        let is_reading = self.reads_last && matches!(self.requests.reading, Reading::Body(_));
        self.in_flight.len() > usize::from(is_reading)
    }

    /// Bytes of one direction, or the length of a gap, in the order of their sequence numbers.
    pub fn feed<W>(&mut self, direction: Direction, at: At, piece: Piece<'_>, watcher: &mut W)
    where
        W: Watcher<Tag = T>,
    {
        match (direction, piece) {
            (Direction::ToServer, Piece::Bytes(bytes)) => self.client_bytes(at, bytes, watcher),
            (Direction::ToServer, Piece::Hole(len)) => self.client_hole(at, len),
            (Direction::ToClient, Piece::Bytes(bytes)) => self.server_bytes(at, bytes, watcher),
            (Direction::ToClient, Piece::Hole(len)) => self.server_hole(at, len, watcher),
        }
    }

    /// The connection has ended, and with it every exchange that has not.
    pub fn close<W: Watcher<Tag = T>>(&mut self, at: At, closer: Closer, watcher: &mut W) {
        let ends_here = match &self.responses.reading {
            Reading::Body(body) => body.ends_at_close() && closer == Closer::Server,
            Reading::Upgraded => closer != Closer::Unknown,
            _ => false,
        };
        if ends_here {
            self.end_first(at, Ending::Complete, watcher);
        }
        while let Some(first) = self.in_flight.front() {
            let ending = match closer {
                Closer::Client => first.exchange.ending_without_client(),
                Closer::Server => Ending::UpstreamClosed,
                Closer::Unknown => Ending::Unseen,
            };
            self.end_first(at, ending, watcher);
        }
        self.requests.seek();
        self.responses.seek();
        self.doubt = Doubt::None;
    }

    fn client_bytes<W: Watcher<Tag = T>>(&mut self, at: At, mut input: &[u8], watcher: &mut W) {
        while !input.is_empty() {
            match &mut self.requests.reading {
                Reading::Upgraded => {
                    self.request_payload(Piece::Bytes(input));
                    return;
                }
                Reading::Body(body) => match body.next(&mut input) {
                    Ok(Step::Data(data)) => self.request_payload(Piece::Bytes(data)),
                    Ok(Step::More) => return,
                    // Settled below.
                    Ok(Step::End) => {}
                    Err(_) => return self.lose_requests(input),
                },
                Reading::Head | Reading::Seeking => {
                    if !self.request_head(at, &mut input, watcher) {
                        return self.lose_requests(input);
                    }
                }
            }
            self.settle_requests(at);
        }
    }

    /// A body that needs no further byte is over, so that a head that begins the next piece is expected.
    fn settle_requests(&mut self, at: At) {
        if !matches!(&self.requests.reading, Reading::Body(body) if body.is_done()) {
            return;
        }
        self.requests.reading = Reading::Head;
        if let Some(last) = self.in_flight.back_mut().filter(|_| self.reads_last) {
            last.exchange.request_end(at);
        }
    }

    /// Reads on in a request's head. False when these bytes are none.
    fn request_head<W: Watcher<Tag = T>>(&mut self, at: At, input: &mut &[u8], watcher: &mut W) -> bool {
        let side = &mut self.requests;
        let is_found_anew = matches!(side.reading, Reading::Seeking);
        let may_begin = match is_found_anew {
            true => may_begin_known_request,
            false => may_begin_request,
        };
        self.opaque_bytes += side.forget_unless(may_begin, input);
        let limit = self.limits.head_bytes;
        let parse = |bytes: &[u8]| RequestHead::parse(bytes, limit).ok().flatten();
        let (head, _) = match side.next_head(at, input, limit, may_begin, parse) {
            Ok(Some(head)) => head,
            Ok(None) => return true,
            Err(NoHead) => return false,
        };
        let head_at = side.head_at;
        side.reading = Reading::Body(BodyReader::new(head.framing()));
        if self.in_flight.len() >= self.limits.in_flight {
            self.give_up(at, watcher);
            return false;
        }
        // The client asks again, so the response to its last request is over, unseen. Which one is, is open if it asked ahead.
        let asked_ahead = self.doubt != Doubt::None && self.in_flight.len() > 1;
        if self.doubt != Doubt::None {
            self.give_up(at, watcher);
        }
        // Found anew while others wait: requests in between may have been missed, and then responses would be paired wrongly.
        let is_uncertain = is_found_anew && !self.in_flight.is_empty();
        if is_uncertain {
            self.in_flight
                .iter_mut()
                .for_each(|waiting| waiting.is_uncertain = true);
        }
        self.in_flight.push_back(Box::new(InFlight {
            exchange: Exchange::begin(head_at, &head),
            tag: watcher.began(head_at, &head),
            is_head_request: head.method() == "HEAD",
            is_uncertain: is_uncertain || asked_ahead,
        }));
        self.reads_last = true;
        true
    }

    fn request_payload(&mut self, piece: Piece<'_>) {
        match self.in_flight.back_mut() {
            Some(last) if self.reads_last => last.exchange.request_body(piece),
            _ => self.opaque_bytes += piece.len_bytes(),
        }
    }

    fn client_hole(&mut self, at: At, len: u64) {
        let payload = self.requests.take_hole(len);
        if payload > 0 {
            self.request_payload(Piece::Hole(payload));
            self.settle_requests(at);
        }
        if len > payload {
            self.opaque_bytes += len - payload;
            self.lose_requests(&[]);
        }
    }

    /// The requests cannot be followed any further, up to the next head.
    fn lose_requests(&mut self, rest: &[u8]) {
        let is_inside = matches!(self.requests.reading, Reading::Body(_)) && self.reads_last;
        if let Some(last) = self.in_flight.back_mut().filter(|_| is_inside) {
            last.is_uncertain = true;
        }
        self.reads_last = false;
        self.opaque_bytes += (self.requests.head.len() + rest.len()) as u64;
        self.requests.seek();
    }

    fn server_bytes<W: Watcher<Tag = T>>(&mut self, at: At, mut input: &[u8], watcher: &mut W) {
        while !input.is_empty() {
            match &mut self.responses.reading {
                Reading::Upgraded => {
                    self.response_payload(at, Piece::Bytes(input));
                    return;
                }
                Reading::Body(body) => match body.next(&mut input) {
                    Ok(Step::Data(data)) => self.response_payload(at, Piece::Bytes(data)),
                    Ok(Step::More) => return,
                    Ok(Step::End) => {}
                    Err(_) => return self.lose_responses(at, input, watcher),
                },
                Reading::Head | Reading::Seeking => {
                    if !self.response_head(at, &mut input, watcher) {
                        return self.lose_responses(at, input, watcher);
                    }
                }
            }
            self.settle_responses(at, watcher);
        }
    }

    /// A body that needs no further byte is over, and with it the exchange.
    fn settle_responses<W: Watcher<Tag = T>>(&mut self, at: At, watcher: &mut W) {
        if matches!(&self.responses.reading, Reading::Body(body) if body.is_done()) {
            self.responses.reading = Reading::Head;
            self.end_first(at, Ending::Complete, watcher);
        }
    }

    /// Reads on in a response's head. False when these bytes are none, or nobody waits for one.
    fn response_head<W: Watcher<Tag = T>>(&mut self, at: At, input: &mut &[u8], watcher: &mut W) -> bool {
        if self.doubt != Doubt::None && may_begin_response(input) && self.in_flight.len() > 1 {
            // Any of them could be meant.
            self.give_up(at, watcher);
        }
        let Some(first) = self.in_flight.front_mut() else {
            return false;
        };
        let side = &mut self.responses;
        self.opaque_bytes += side.forget_unless(may_begin_response, input);
        let limit = self.limits.head_bytes;
        let method = if first.is_head_request { "HEAD" } else { "GET" };
        let parse = |bytes: &[u8]| ResponseHead::parse(bytes, limit, method).ok().flatten();
        let (head, _) = match side.next_head(at, input, limit, may_begin_response, parse) {
            Ok(Some(head)) => head,
            Ok(None) => return true,
            Err(NoHead) => return false,
        };
        self.doubt = Doubt::None;
        first.exchange.response_head(at, &head);
        side.reading = if head.is_interim() {
            Reading::Head
        } else if head.status() == 101 {
            self.requests.reading = Reading::Upgraded;
            Reading::Upgraded
        } else {
            Reading::Body(BodyReader::new(head.framing()))
        };
        true
    }

    fn response_payload(&mut self, at: At, piece: Piece<'_>) {
        match self.in_flight.front_mut() {
            Some(first) => first.exchange.response_body(at, piece),
            None => self.opaque_bytes += piece.len_bytes(),
        }
    }

    fn server_hole<W: Watcher<Tag = T>>(&mut self, at: At, len: u64, watcher: &mut W) {
        let payload = self.responses.take_hole(len);
        if payload > 0 {
            self.response_payload(at, Piece::Hole(payload));
            self.settle_responses(at, watcher);
        }
        if len == payload {
            return;
        }
        self.opaque_bytes += len - payload + self.responses.head.len() as u64;
        let has_begun = matches!(self.responses.reading, Reading::Body(_));
        if has_begun || begins_final_response(&self.responses.head) {
            self.end_first(at, Ending::Unseen, watcher);
        }
        self.responses.seek();
        if !self.in_flight.is_empty() {
            self.doubt = Doubt::Missing;
        }
    }

    /// The responses cannot be followed any further. Nobody can tell which of the waiting requests the next one answers.
    fn lose_responses<W: Watcher<Tag = T>>(&mut self, at: At, rest: &[u8], watcher: &mut W) {
        self.opaque_bytes += (self.responses.head.len() + rest.len()) as u64;
        // While seeking, requests that came since may well be answered by the head that is sought, unless it lies in a hole.
        let is_seeking = matches!(self.responses.reading, Reading::Seeking);
        if !is_seeking || self.doubt == Doubt::Missing {
            self.give_up(at, watcher);
        } else if !self.in_flight.is_empty() {
            self.doubt = Doubt::Passed;
        }
        self.responses.seek();
    }

    /// Ends all that wait, since pairing has failed.
    fn give_up<W: Watcher<Tag = T>>(&mut self, at: At, watcher: &mut W) {
        while !self.in_flight.is_empty() {
            self.end_first(at, Ending::Unseen, watcher);
        }
        self.doubt = Doubt::None;
        self.responses.seek();
    }

    fn end_first<W: Watcher<Tag = T>>(&mut self, at: At, ending: Ending, watcher: &mut W) {
        let Some(mut first) = self.in_flight.pop_front() else {
            return;
        };
        if self.in_flight.is_empty() {
            self.reads_last = false;
            // An idle connection keeps no room for exchanges.
            self.in_flight = VecDeque::new();
        }
        let ending = if first.is_uncertain {
            Ending::Unseen
        } else {
            ending
        };
        let facts = first.exchange.take_facts(at, ending);
        watcher.ended(first.tag, facts);
    }
}

/// Whether bytes could be the start of a request: a method, a space, and a path or a URL.
fn may_begin_request(bytes: &[u8]) -> bool {
    // The longest method that a client of vLLM has reason to send is OPTIONS.
    const MAX_METHOD_BYTES: usize = 7;
    let method_len = bytes.iter().take_while(|byte| byte.is_ascii_uppercase()).count();
    match &bytes[method_len..] {
        _ if method_len > MAX_METHOD_BYTES => false,
        [] | [b' '] => true,
        [b' ', first, ..] => method_len >= 3 && (*first == b'/' || first.eq_ignore_ascii_case(&b'h')),
        _ => false,
    }
}

/// Whether bytes could be the start of a request with a usual method. Where a head is sought among other bytes, a word and a slash are not enough.
fn may_begin_known_request(bytes: &[u8]) -> bool {
    const STARTS: [&[u8]; 7] = [
        b"GET ",
        b"POST ",
        b"HEAD ",
        b"OPTIONS ",
        b"PUT ",
        b"DELETE ",
        b"PATCH ",
    ];
    let begins = |start: &&[u8]| {
        let shorter = bytes.len().min(start.len());
        bytes[..shorter] == start[..shorter]
    };
    STARTS.iter().any(begins) && may_begin_request(bytes)
}

/// Whether bytes could be the start of a response.
fn may_begin_response(bytes: &[u8]) -> bool {
    const START: &[u8] = b"HTTP/1.";
    let shorter = bytes.len().min(START.len());
    bytes[..shorter] == START[..shorter]
}

/// Whether bytes are the start of a response that is not an interim one.
fn begins_final_response(bytes: &[u8]) -> bool {
    may_begin_response(bytes) && matches!(bytes.get("HTTP/1.1 ".len()), Some(b'2'..=b'5'))
}

#[cfg(test)]
mod tests;
