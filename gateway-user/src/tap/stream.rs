//! One direction of a TCP connection, put in order.
//!
//! A [`Stream`] takes segments as they come (again, out of order, overlapping, captured in part or not at all) and hands on every byte of the
//! sequence once, in order: as bytes where they were seen, as a hole of exact length where they were not. Of bytes that come twice the first
//! count, as for a receiver. Bytes on their turn are handed on as they lie in the segment, without a copy; only what comes
//! ahead of its turn is held back, until the gap before it is filled or given up. What may be held is bounded for each stream and in all,
//! what does not come in time is given up, and so is what cannot come any more ([`GiveUp`]).
//!
//! **Times.** They never go back within a stream, and are those that phases of a request are measured by:
//! * A request's byte counts from when the server could read it. Behind a gap that was filled that is when the gap was; behind one that was given
//!   up (the server has the bytes, only their record is lost) it is when the byte itself came.
//! * A response's byte counts from when the server sent it, held back or not. A byte whose own record was lost, seen when it was sent again,
//!   had been sent at the latest when what stands behind it was.

use super::held::{self, Held, Part};
use super::segment::Segment;
use super::stats::{GiveUp, StreamStats};
use crate::wire::connection::Direction;
use crate::wire::{At, Piece};
use std::time::Duration;

/// How far from its turn a segment may lie and still belong to the stream. Far more than the few megabytes that kernels allow to be on the way, and
/// far less than the sequence space, so that a stream with other numbers is taken for what it is: another connection.
const WINDOW_BYTES: u64 = 64 << 20;

/// Positions count on where sequence numbers wrap around. They begin here, so that none lies below 0.
const ORIGIN: u64 = 1 << 32;

/// How much may be held back, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// What one stream may hold, with what holding it costs.
    pub held_bytes: usize,
    /// What all streams together may.
    pub held_bytes_total: usize,
    /// How long bytes of a request wait for what is missing before them.
    pub request_patience: Duration,
    /// How long bytes of a response do.
    pub response_patience: Duration,
}

impl Default for StreamLimits {
    fn default() -> StreamLimits {
        StreamLimits {
            // More than the window of most connections across a data centre.
            held_bytes: 256 * 1024,
            held_bytes_total: 32 << 20,
            // Long enough for a first retransmission, which comes after 200 ms and a round trip.
            request_patience: Duration::from_secs(1),
            // A server's kernel sends in order: what is missing here is a lost record, not a late packet.
            response_patience: Duration::from_millis(50),
        }
    }
}

/// What all streams share.
#[derive(Debug, Default)]
pub struct Pool {
    /// What they may hold.
    pub limits: StreamLimits,
    /// What they count.
    pub stats: StreamStats,
}

/// The segment cannot belong to this stream: its numbers are those of another connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfWindow;

#[derive(Clone, Copy, Debug)]
struct Fin {
    position: u64,
    at: At,
}

/// One direction of a connection.
#[derive(Debug)]
pub struct Stream {
    direction: Direction,
    /// Sequence number of the first payload byte that was expected or seen.
    first: Option<u32>,
    /// Position of the byte whose turn it is.
    next: u64,
    fin: Option<Fin>,
    /// Time of what was handed on last.
    last_at: At,
    held: Held,
}

/// A segment's payload at its place.
#[derive(Clone, Copy)]
struct Payload<'a> {
    start: u64,
    end: u64,
    captured: &'a [u8],
    at: At,
}

impl Stream {
    /// A stream of which nothing was seen yet.
    pub fn new(direction: Direction) -> Stream {
        Stream {
            direction,
            first: None,
            next: ORIGIN,
            fin: None,
            last_at: At::default(),
            held: Held::default(),
        }
    }

    /// Takes note of a SYN with this number. False when it is that of another connection.
    pub fn begin(&mut self, isn: u32) -> bool {
        let first = isn.wrapping_add(1);
        if self.first.is_none() {
            self.start_at(first);
        }
        self.first == Some(first)
    }

    fn start_at(&mut self, first: u32) {
        self.first = Some(first);
        self.next = ORIGIN + u64::from(first);
    }

    /// When the sender ended it, if all before that was handed on.
    pub fn ended(&self) -> Option<At> {
        let fin = self.fin.filter(|fin| fin.position <= self.next)?;
        Some(fin.at.max(self.last_at))
    }

    /// Time of what was handed on last.
    pub fn last_at(&self) -> At {
        self.last_at
    }

    /// Whether something waits for bytes before it.
    pub fn waits(&self) -> bool {
        self.waits_since().is_some()
    }

    fn waits_since(&self) -> Option<At> {
        let fin = self.fin.filter(|fin| fin.position > self.next).map(|fin| fin.at);
        [self.held.oldest(), fin].into_iter().flatten().min()
    }

    /// Whether the segment can belong to this stream and brings what has not been handed on.
    pub fn is_news(&self, segment: &Segment<'_>) -> bool {
        let start = self.position(segment.payload_sequence());
        start.is_ok_and(|start| start + u64::from(segment.len_bytes) > self.next)
    }

    /// Whether the segment can belong to this stream.
    pub fn is_near(&self, segment: &Segment<'_>) -> bool {
        self.position(segment.payload_sequence()).is_ok()
    }

    fn position(&self, sequence: u32) -> Result<u64, OutOfWindow> {
        if self.first.is_none() {
            return Ok(ORIGIN + u64::from(sequence));
        }
        let ahead = i64::from(sequence.wrapping_sub(self.next as u32).cast_signed());
        if ahead.unsigned_abs() > WINDOW_BYTES {
            return Err(OutOfWindow);
        }
        Ok(self.next.wrapping_add_signed(ahead))
    }

    /// Takes a segment in, and hands on what its turn has come for.
    ///
    /// # Errors
    /// When the segment is another connection's; nothing was changed then.
    pub fn push(
        &mut self,
        segment: &Segment<'_>,
        pool: &mut Pool,
        deliver: &mut impl FnMut(At, Piece<'_>),
    ) -> Result<(), OutOfWindow> {
        let start = self.position(segment.payload_sequence())?;
        if self.first.is_none() {
            self.start_at(segment.payload_sequence());
        }
        let end = start + u64::from(segment.len_bytes);
        if segment.fin && self.fin.is_none() {
            self.fin = Some(Fin {
                position: end,
                at: segment.at,
            });
        }
        // Nothing comes behind the end that the sender has named.
        let end = self.fin.map_or(end, |fin| end.min(fin.position));
        let captured = segment.captured;
        let payload = Payload {
            start,
            end: end.max(start),
            captured: &captured[..captured.len().min(end.saturating_sub(start) as usize)],
            at: segment.at,
        };
        let dropped = u64::from(segment.len_bytes) - (payload.end - payload.start);
        pool.stats.duplicate_bytes += dropped;
        self.take(payload, pool, deliver);
        Ok(())
    }

    fn take(&mut self, payload: Payload<'_>, pool: &mut Pool, deliver: &mut impl FnMut(At, Piece<'_>)) {
        let Payload { start, end, .. } = payload;
        if start == end {
            return;
        }
        if start > self.next {
            if let Some(cause) = self.lacks_room(&payload, pool) {
                self.give_up_to(start, cause, pool, deliver);
            } else {
                pool.stats.early_segments += 1;
                self.hold(payload, pool);
                self.shed(pool, deliver);
                return;
            }
        }
        pool.stats.duplicate_bytes += end.min(self.next).saturating_sub(start);
        if end <= self.next {
            return;
        }
        if self.held.first().is_none_or(|run| end <= run.start) {
            self.pass(payload, pool, deliver);
        } else {
            self.hold(payload, pool);
        }
        self.drain(pool, deliver);
    }

    /// Hands on what lies in the segment.
    fn pass(&mut self, payload: Payload<'_>, pool: &mut Pool, deliver: &mut impl FnMut(At, Piece<'_>)) {
        let behind = self.held.first().map(|run| run.at);
        let at = match (self.direction, behind) {
            (Direction::ToClient, Some(behind)) => payload.at.min(behind),
            _ => payload.at,
        };
        let known = (self.next - payload.start) as usize;
        if let Some(bytes @ [_, ..]) = payload.captured.get(known..) {
            self.hand_on(at, Piece::Bytes(bytes), pool, deliver);
        }
        if payload.end > self.next {
            let unseen = payload.end - self.next;
            pool.stats.uncaptured_bytes += unseen;
            self.hand_on(at, Piece::Hole(unseen), pool, deliver);
        }
    }

    fn hand_on(
        &mut self,
        at: At,
        piece: Piece<'_>,
        pool: &mut Pool,
        deliver: &mut impl FnMut(At, Piece<'_>),
    ) {
        self.last_at = self.last_at.max(at);
        self.next += piece.len_bytes();
        pool.stats.bytes += piece.len_bytes();
        deliver(self.last_at, piece);
    }

    /// Why the payload cannot be held back, if it cannot.
    fn lacks_room(&self, payload: &Payload<'_>, pool: &Pool) -> Option<GiveUp> {
        // Captured and uncaptured bytes are a run each, and what is cut out of an unseen run leaves one more.
        let more = 2 * held::cost_bytes(&[]) + held::cost_bytes(payload.captured);
        if self.held.cost_bytes() + more > pool.limits.held_bytes {
            Some(GiveUp::ConnectionFull)
        } else if pool.stats.held_bytes + more > pool.limits.held_bytes_total {
            Some(GiveUp::TotalFull)
        } else {
            None
        }
    }

    fn hold(&mut self, payload: Payload<'_>, pool: &mut Pool) {
        let start = payload.start.max(self.next);
        let seen_end = (payload.start + payload.captured.len() as u64).max(start);
        let before = self.held.cost_bytes();
        let no_later = self.direction == Direction::ToClient;
        let unseen = Part {
            start: seen_end,
            end: payload.end,
            seen: None,
        };
        let seen = Part {
            start,
            end: seen_end,
            seen: payload.captured.get((start - payload.start) as usize..),
        };
        // What stands behind is put in first, since the time of what stands before it may depend on it.
        for part in [unseen, seen] {
            self.held.insert(part, payload.at, no_later);
        }
        pool.stats.held_bytes = pool.stats.held_bytes - before + self.held.cost_bytes();
    }

    /// Gives up gaps while more is held than may be: a segment that fits between many runs makes many more of them.
    fn shed(&mut self, pool: &mut Pool, deliver: &mut impl FnMut(At, Piece<'_>)) {
        while let Some(position) = self.first_waiting() {
            let cause = if self.held.cost_bytes() > pool.limits.held_bytes {
                GiveUp::ConnectionFull
            } else if pool.stats.held_bytes > pool.limits.held_bytes_total {
                GiveUp::TotalFull
            } else {
                return;
            };
            self.give_up_first(position, cause, pool, deliver);
        }
    }

    /// Hands on what was held back and has its turn now.
    fn drain(&mut self, pool: &mut Pool, deliver: &mut impl FnMut(At, Piece<'_>)) {
        let before = self.held.cost_bytes();
        if before == 0 {
            return;
        }
        while let Some(run) = self.held.take(self.next) {
            match &run.seen {
                Some(bytes) => self.hand_on(run.at, Piece::Bytes(bytes), pool, deliver),
                None => {
                    pool.stats.uncaptured_bytes += run.end - run.start;
                    self.hand_on(run.at, Piece::Hole(run.end - run.start), pool, deliver);
                }
            }
        }
        pool.stats.held_bytes = pool.stats.held_bytes - before + self.held.cost_bytes();
        self.held.settle();
    }

    /// Gives up every gap before `position`, and one that reaches it.
    fn give_up_to(
        &mut self,
        position: u64,
        cause: GiveUp,
        pool: &mut Pool,
        deliver: &mut impl FnMut(At, Piece<'_>),
    ) {
        while self.next < position {
            self.give_up_first(position, cause, pool, deliver);
        }
    }

    /// Gives up the first gap, as far as `position`.
    fn give_up_first(
        &mut self,
        position: u64,
        cause: GiveUp,
        pool: &mut Pool,
        deliver: &mut impl FnMut(At, Piece<'_>),
    ) {
        let run = self.held.first().filter(|run| run.start <= position);
        let (stop, at) = run.map_or((position, self.last_at), |run| (run.start, run.at));
        let missing = stop - self.next;
        pool.stats.gaps[cause as usize] += 1;
        pool.stats.gap_bytes += missing;
        self.hand_on(at, Piece::Hole(missing), pool, deliver);
        self.drain(pool, deliver);
    }

    /// Gives up all that is waited for.
    pub fn give_up(&mut self, cause: GiveUp, pool: &mut Pool, deliver: &mut impl FnMut(At, Piece<'_>)) {
        while let Some(position) = self.first_waiting() {
            self.give_up_first(position, cause, pool, deliver);
        }
    }

    /// Gives up what has not come in time.
    pub fn lapse(&mut self, now: At, pool: &mut Pool, deliver: &mut impl FnMut(At, Piece<'_>)) {
        let patience = match self.direction {
            Direction::ToServer => pool.limits.request_patience,
            Direction::ToClient => pool.limits.response_patience,
        };
        while let Some(since) = self.waits_since()
            && u128::from(now.0.saturating_sub(since.0)) >= patience.as_nanos()
            && let Some(position) = self.first_waiting()
        {
            self.give_up_first(position, GiveUp::TimedOut, pool, deliver);
        }
    }

    /// Where the first thing stands that waits.
    fn first_waiting(&self) -> Option<u64> {
        let fin = self.fin.map(|fin| fin.position).filter(|end| *end > self.next);
        self.held.first().map(|run| run.start).or(fin)
    }
}

#[cfg(test)]
mod tests;
