//! The connections that the tap follows, and the exchanges on them.
//!
//! [`Connections`] takes segments of all connections as they come and tells a [`TapWatcher`] of every exchange: once when its request's head
//! is whole, and once at its end. A connection is known by its addresses and the numbers it began with; a SYN with other numbers, or
//! numbers far from its own, are those of a new connection at the same addresses. One that is first seen in its middle is followed from its next request.
//!
//! How exchanges end that their framing does not:
//! * A client that ends its bytes (FIN) has left, as for uvicorn and for the proxy. What the server still sends is read, for its last usage, until
//!   the server closes too or [`Limits::drain`] has passed; then the exchange ends as [`Closer::Client`] says. A response that comes whole until then is
//!   a whole response: see [`Outcome`](crate::wire::exchange::Outcome).
//! * A server's FIN ends what runs until it, and cuts off what does not. A reset is its sender's doing.
//! * One of which nothing more is seen ends unseen.
//!
//! Memory is bounded: by [`Limits::connections`], what [`stream`](super::stream) may hold back, and what
//! [`wire`](crate::wire::connection) may. A connection between two requests costs a few hundred bytes.

use super::segment::Segment;
use super::stats::{GiveUp, Retired, Stats};
use super::stream::{Pool, Stream, StreamLimits};
use super::table::{Peers, Table};
use crate::wire::At;
use crate::wire::connection::{self, Closer, Direction};
use crate::wire::exchange::Facts;
use crate::wire::head::RequestHead;
use reader::{Reader, Telling};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

mod reader;

/// A protocol that the tap cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unreadable {
    /// The connection begins with a ClientHello.
    Tls,
    /// The connection begins with HTTP/2's preface.
    Http2,
}

/// Whoever wants to know of exchanges.
pub trait TapWatcher {
    /// What the watcher keeps beside an exchange.
    type Tag;

    /// A request's head is whole; `at` is the time of its first byte.
    fn began(&mut self, at: At, client: SocketAddr, server: SocketAddr, head: &RequestHead) -> Self::Tag;

    /// An exchange has ended. Each that began ends exactly once, at the latest with [`Connections::stop`].
    fn ended(&mut self, tag: Self::Tag, client: SocketAddr, server: SocketAddr, facts: Facts);

    /// A connection to `server` speaks what cannot be read. Told once for each port and protocol, so that it can be said once.
    fn unreadable(&mut self, server: SocketAddr, protocol: Unreadable) {
        let _ = (server, protocol);
    }
}

/// What may be held, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections that are followed. At one more, the one goes that was idle for longest.
    pub connections: usize,
    /// How long a connection without a request may be silent. One that goes on later is followed again from its next request.
    pub idle: Duration,
    /// How long a connection may be silent while a request waits: an unstreamed answer takes minutes.
    pub silent: Duration,
    /// How long a response is still read whose client has left: as long as the proxy does (`proxy.abort_drain`), so that both book the same.
    pub drain: Duration,
    /// What reassembly may hold.
    pub streams: StreamLimits,
    /// What one connection's reader may hold.
    pub wire: connection::Limits,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            // Some 20 MB when all are idle.
            connections: 65_536,
            idle: Duration::from_secs(300),
            silent: Duration::from_secs(3_600),
            // The default of `proxy.abort_drain`.
            drain: Duration::from_millis(200),
            streams: StreamLimits::default(),
            wire: connection::Limits::default(),
        }
    }
}

/// How many idle connections are passed over for one without a request, when there are too many.
const CROWDED_LOOK: usize = 64;

/// One connection.
#[derive(Debug)]
struct Followed<T> {
    requests: Stream,
    responses: Stream,
    reader: Reader<T>,
    /// When a segment of it came last.
    last_at: At,
    client_left: Option<At>,
    server_left: bool,
}

impl<T> Followed<T> {
    fn new(at: At, is_from_start: bool) -> Followed<T> {
        Followed {
            requests: Stream::new(Direction::ToServer),
            responses: Stream::new(Direction::ToClient),
            reader: Reader::new(is_from_start),
            last_at: at,
            client_left: None,
            server_left: false,
        }
    }

    fn stream(&mut self, direction: Direction) -> &mut Stream {
        match direction {
            Direction::ToServer => &mut self.requests,
            Direction::ToClient => &mut self.responses,
        }
    }

    /// Whether time alone can change something.
    fn waits(&self) -> bool {
        let drains = self.client_left.is_some() && self.reader.in_flight() > 0;
        drains || self.requests.waits() || self.responses.waits()
    }

    fn parts(&mut self, direction: Direction) -> (&mut Stream, &mut Reader<T>) {
        match direction {
            Direction::ToServer => (&mut self.requests, &mut self.reader),
            Direction::ToClient => (&mut self.responses, &mut self.reader),
        }
    }

    /// Takes a segment in that belongs to this connection and does not break it off.
    fn push<W: TapWatcher<Tag = T>>(
        &mut self,
        segment: &Segment<'_>,
        pool: &mut Pool,
        telling: &mut Telling<'_, W>,
    ) {
        self.overtake(segment, pool, telling);
        let direction = segment.direction;
        let (stream, reader) = self.parts(direction);
        let pushed = stream.push(segment, pool, &mut |at, piece| {
            reader.feed(direction, at, piece, telling);
        });
        debug_assert_eq!(pushed, Ok(()), "whoever gives a segment has looked whose it is");
        self.lapse(segment.at, pool, telling);
        self.note_ends(pool, telling);
    }

    /// Who has something new to say has what came before from the other side, and where a record of that is still waited for it is lost. A
    /// client asks again when it has its response; a server answers when it has the request, unless it answers an earlier one.
    fn overtake<W: TapWatcher<Tag = T>>(
        &mut self,
        segment: &Segment<'_>,
        pool: &mut Pool,
        telling: &mut Telling<'_, W>,
    ) {
        let (other, waits) = match segment.direction {
            Direction::ToServer => (Direction::ToClient, self.responses.waits()),
            Direction::ToClient => (
                Direction::ToServer,
                self.requests.waits() && !self.reader.awaits_response(),
            ),
        };
        if waits && segment.len_bytes > 0 && self.stream(segment.direction).is_news(segment) {
            self.give_up(other, GiveUp::Overtaken, pool, telling);
        }
    }

    fn give_up<W: TapWatcher<Tag = T>>(
        &mut self,
        direction: Direction,
        cause: GiveUp,
        pool: &mut Pool,
        telling: &mut Telling<'_, W>,
    ) {
        let (stream, reader) = self.parts(direction);
        stream.give_up(cause, pool, &mut |at, piece| {
            reader.feed(direction, at, piece, telling);
        });
    }

    fn lapse<W: TapWatcher<Tag = T>>(&mut self, now: At, pool: &mut Pool, telling: &mut Telling<'_, W>) {
        for direction in [Direction::ToServer, Direction::ToClient] {
            let (stream, reader) = self.parts(direction);
            stream.lapse(now, pool, &mut |at, piece| {
                reader.feed(direction, at, piece, telling);
            });
        }
    }

    /// Sees whether a side has ended its bytes.
    fn note_ends<W: TapWatcher<Tag = T>>(&mut self, pool: &mut Pool, telling: &mut Telling<'_, W>) {
        if let Some(at) = self.requests.ended().filter(|_| self.client_left.is_none()) {
            self.client_left = Some(at);
            if self.server_left {
                // A request that came behind the server's end.
                self.reader.close(at, Closer::Server, telling);
            }
        }
        if let Some(at) = self.responses.ended().filter(|_| !self.server_left) {
            self.server_left = true;
            self.close(at, Closer::Server, pool, telling);
        }
    }

    /// Nothing more is to come: ends every exchange that has not.
    fn close<W: TapWatcher<Tag = T>>(
        &mut self,
        at: At,
        closer: Closer,
        pool: &mut Pool,
        telling: &mut Telling<'_, W>,
    ) {
        for direction in [Direction::ToServer, Direction::ToClient] {
            self.give_up(direction, GiveUp::Closed, pool, telling);
        }
        let left = self.client_left.or_else(|| self.requests.ended());
        self.client_left = left;
        // As for the proxy, what the server sent behind a client that left still belongs to its request, and closes it.
        match left.filter(|left| *left <= at) {
            Some(left) => {
                let ended = left.max(self.responses.last_at());
                self.reader.close(ended, Closer::Client, telling);
            }
            None => self.reader.close(at, closer, telling),
        }
    }

    /// Gives up what has waited for too long.
    fn tick<W: TapWatcher<Tag = T>>(
        &mut self,
        now: At,
        drain: Duration,
        pool: &mut Pool,
        telling: &mut Telling<'_, W>,
    ) {
        self.lapse(now, pool, telling);
        self.note_ends(pool, telling);
        self.drop_client(now, drain, pool, telling);
    }

    /// Ends what runs of a client that left so long ago that nothing of it counts any more.
    fn drop_client<W: TapWatcher<Tag = T>>(
        &mut self,
        now: At,
        drain: Duration,
        pool: &mut Pool,
        telling: &mut Telling<'_, W>,
    ) {
        let is_over = self.client_left.is_some_and(|left| is_past(left, drain, now));
        if is_over && self.reader.in_flight() > 0 {
            self.close(now, Closer::Client, pool, telling);
        }
    }

    fn has_ended(&self) -> bool {
        self.server_left && self.client_left.is_some()
    }
}

/// Whether that long has passed since `since`.
fn is_past(since: At, duration: Duration, now: At) -> bool {
    u128::from(now.0.saturating_sub(since.0)) >= duration.as_nanos()
}

/// All connections that the tap follows.
#[derive(Debug)]
pub struct Connections<T> {
    limits: Limits,
    table: Table<Followed<T>>,
    /// Those that time alone can change.
    waiting: BTreeSet<u32>,
    pool: Pool,
    stats: Stats,
    told: BTreeSet<(u16, Unreadable)>,
}

impl<T> Connections<T> {
    /// None yet.
    pub fn new(limits: Limits) -> Connections<T> {
        Connections {
            table: Table::new(),
            waiting: BTreeSet::new(),
            pool: Pool {
                limits: limits.streams,
                ..Pool::default()
            },
            stats: Stats::default(),
            told: BTreeSet::new(),
            limits,
        }
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        Stats {
            live: self.table.len(),
            streams: self.pool.stats,
            ..self.stats
        }
    }

    /// A segment of any connection.
    pub fn push<W: TapWatcher<Tag = T>>(&mut self, segment: &Segment<'_>, watcher: &mut W) {
        self.stats.segments += 1;
        let peers = Peers {
            client: segment.client,
            server: segment.server,
        };
        let mut found = self.table.find(&peers);
        if let Some(slot) = found.filter(|slot| self.is_anothers(*slot, segment)) {
            let retire = (Retired::Superseded, Closer::Unknown);
            self.retire(slot, segment.at, retire, watcher);
            found = None;
        }
        let followed = found.or_else(|| self.open(peers, segment, watcher));
        let Some(slot) = followed.filter(|slot| !self.is_forged(*slot, segment)) else {
            self.stats.stray_segments += 1;
            return;
        };
        self.table.touch(slot);
        if segment.rst {
            let closer = match segment.direction {
                Direction::ToServer => Closer::Client,
                Direction::ToClient => Closer::Server,
            };
            self.retire(slot, segment.at, (Retired::Reset, closer), watcher);
            return;
        }
        let drain = self.limits.drain;
        self.visit(slot, watcher, |followed, pool, telling| {
            followed.last_at = segment.at;
            followed.drop_client(segment.at, drain, pool, telling);
            followed.push(segment, pool, telling);
        });
    }

    /// Whether a connection at the same addresses is not the one that the segment belongs to.
    fn is_anothers(&mut self, slot: u32, segment: &Segment<'_>) -> bool {
        let Some((_, followed)) = self.table.get_mut(slot) else {
            return true;
        };
        let stream = followed.stream(segment.direction);
        match segment.syn {
            true => !stream.begin(segment.sequence),
            false => !stream.is_near(segment) && !segment.rst,
        }
    }

    /// Whether it is a reset that lies far outside of the window: no kernel heeds one.
    fn is_forged(&mut self, slot: u32, segment: &Segment<'_>) -> bool {
        let followed = self.table.get_mut(slot).filter(|_| segment.rst);
        followed.is_some_and(|(_, followed)| !followed.stream(segment.direction).is_near(segment))
    }

    /// Begins to follow the connection of this segment. What ends one begins none: nothing could follow on it, and it may be the echo of one
    /// that has just ended.
    fn open<W: TapWatcher<Tag = T>>(
        &mut self,
        peers: Peers,
        segment: &Segment<'_>,
        watcher: &mut W,
    ) -> Option<u32> {
        let is_useful = segment.syn || segment.len_bytes > 0;
        if !is_useful || segment.fin || segment.rst {
            return None;
        }
        while self.table.len() >= self.limits.connections.max(1) {
            let slot = self.most_idle()?;
            let retire = (Retired::Crowded, Closer::Unknown);
            self.retire(slot, segment.at, retire, watcher);
        }
        let count = match segment.syn {
            true => &mut self.stats.opened,
            false => &mut self.stats.joined,
        };
        *count += 1;
        let mut followed = Followed::new(segment.at, segment.syn);
        if segment.syn {
            followed.stream(segment.direction).begin(segment.sequence);
        }
        Some(self.table.insert(peers, followed))
    }

    /// The connection that is missed least.
    fn most_idle(&mut self) -> Option<u32> {
        let oldest = self.table.oldest()?;
        let mut next = Some(oldest);
        for _ in 0..CROWDED_LOOK {
            let Some(slot) = next else { break };
            let (_, followed) = self.table.get_mut(slot)?;
            if followed.reader.in_flight() == 0 {
                return Some(slot);
            }
            next = self.table.newer(slot);
        }
        Some(oldest)
    }

    /// Does something with a connection, and sees what has become of it.
    fn visit<W: TapWatcher<Tag = T>>(
        &mut self,
        slot: u32,
        watcher: &mut W,
        act: impl FnOnce(&mut Followed<T>, &mut Pool, &mut Telling<'_, W>),
    ) {
        let Some((peers, followed)) = self.table.get_mut(slot) else {
            return;
        };
        let mut telling = Telling {
            watcher,
            peers: *peers,
            stats: &mut self.stats,
            told: &mut self.told,
            limits: self.limits.wire,
        };
        act(followed, &mut self.pool, &mut telling);
        let (has_ended, waits) = (followed.has_ended(), followed.waits());
        if has_ended {
            self.forget(slot, Retired::Finished);
        } else if waits {
            self.waiting.insert(slot);
        } else if !self.waiting.is_empty() {
            self.waiting.remove(&slot);
        }
    }

    /// Stops following a connection, and ends its exchanges.
    fn retire<W: TapWatcher<Tag = T>>(
        &mut self,
        slot: u32,
        at: At,
        (cause, closer): (Retired, Closer),
        watcher: &mut W,
    ) {
        self.visit(slot, watcher, |followed, pool, telling| {
            followed.close(at, closer, pool, telling);
        });
        self.forget(slot, cause);
    }

    fn forget(&mut self, slot: u32, cause: Retired) {
        if self.table.remove(slot).is_some() {
            self.stats.retired[cause as usize] += 1;
            self.waiting.remove(&slot);
        }
    }

    /// Time has passed. Call it a few times a second, with the time up to which all segments were pushed.
    pub fn tick<W: TapWatcher<Tag = T>>(&mut self, now: At, watcher: &mut W) {
        let drain = self.limits.drain;
        self.visit_waiting(watcher, |followed, pool, telling| {
            followed.tick(now, drain, pool, telling);
        });
        let mut next = self.table.oldest();
        while let Some(slot) = next {
            next = self.table.newer(slot);
            let Some((_, followed)) = self.table.get_mut(slot) else {
                return;
            };
            let (last_at, is_busy) = (followed.last_at, followed.reader.in_flight() > 0);
            if !is_past(last_at, self.limits.idle, now) {
                return;
            }
            if !is_busy || is_past(last_at, self.limits.silent, now) {
                self.retire(slot, now, (Retired::Idle, Closer::Unknown), watcher);
            }
        }
    }

    /// Records were lost on their way here: what is missing will hardly come.
    pub fn records_lost<W: TapWatcher<Tag = T>>(&mut self, watcher: &mut W) {
        self.visit_waiting(watcher, |followed, pool, telling| {
            for direction in [Direction::ToServer, Direction::ToClient] {
                followed.give_up(direction, GiveUp::Told, pool, telling);
            }
            followed.note_ends(pool, telling);
        });
    }

    fn visit_waiting<W: TapWatcher<Tag = T>>(
        &mut self,
        watcher: &mut W,
        mut act: impl FnMut(&mut Followed<T>, &mut Pool, &mut Telling<'_, W>),
    ) {
        let mut next = self.waiting.first().copied();
        while let Some(slot) = next {
            self.visit(slot, watcher, &mut act);
            next = self.waiting.range(slot + 1..).next().copied();
        }
    }

    /// Watching ends, and with it every exchange that has not.
    pub fn stop<W: TapWatcher<Tag = T>>(&mut self, at: At, watcher: &mut W) {
        while let Some(slot) = self.table.oldest() {
            self.retire(slot, at, (Retired::Stopped, Closer::Unknown), watcher);
        }
    }
}

#[cfg(test)]
mod tests;
