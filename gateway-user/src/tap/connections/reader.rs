//! What one connection's bytes say, and whom it is told.

use super::{TapWatcher, Unreadable};
use crate::tap::stats::Stats;
use crate::tap::table::Peers;
use crate::wire::connection::{Closer, Connection, Direction, Limits, Watcher};
use crate::wire::exchange::{Facts, Outcome};
use crate::wire::head::RequestHead;
use crate::wire::{At, Piece};
use std::collections::BTreeSet;

/// Most ports and protocols of which it is remembered that they were told.
const TOLD_MAX: usize = 256;

/// Reads one connection's bytes in both directions.
#[derive(Debug)]
pub(super) struct Reader<T> {
    /// The client's first bytes are the connection's first.
    is_at_start: bool,
    is_unreadable: bool,
    /// Made when there is something to read.
    wire: Option<Box<Connection<T>>>,
}

impl<T> Reader<T> {
    pub(super) fn new(is_at_start: bool) -> Reader<T> {
        Reader {
            is_at_start,
            is_unreadable: false,
            wire: None,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.wire.as_ref().map_or(0, |wire| wire.in_flight())
    }

    /// Whether a whole request waits.
    pub(super) fn awaits_response(&self) -> bool {
        self.wire.as_ref().is_some_and(|wire| wire.awaits_response())
    }

    pub(super) fn feed<W: TapWatcher<Tag = T>>(
        &mut self,
        direction: Direction,
        at: At,
        piece: Piece<'_>,
        telling: &mut Telling<'_, W>,
    ) {
        if self.is_at_start && direction == Direction::ToServer {
            self.is_at_start = false;
            if let Some(protocol) = recognise(piece) {
                self.is_unreadable = true;
                telling.unreadable(protocol);
            }
        }
        if self.is_unreadable {
            telling.stats.opaque_bytes += piece.len_bytes();
            return;
        }
        let limits = telling.limits;
        let wire = self.wire.get_or_insert_with(|| Box::new(Connection::new(limits)));
        let before = wire.opaque_bytes();
        wire.feed(direction, at, piece, telling);
        telling.stats.opaque_bytes += wire.opaque_bytes() - before;
    }

    pub(super) fn close<W: TapWatcher<Tag = T>>(
        &mut self,
        at: At,
        closer: Closer,
        telling: &mut Telling<'_, W>,
    ) {
        if let Some(wire) = &mut self.wire {
            wire.close(at, closer, telling);
        }
    }
}

/// The protocol that a connection begins with, if it is one that cannot be read.
fn recognise(first: Piece<'_>) -> Option<Unreadable> {
    match first {
        // A handshake record of any version since SSL 3.0.
        Piece::Bytes([0x16, 0x03, ..]) => Some(Unreadable::Tls),
        Piece::Bytes(bytes) if bytes.starts_with(b"PRI * HTTP/2") => Some(Unreadable::Http2),
        _ => None,
    }
}

/// Tells the tap's watcher of one connection's exchanges, and counts them.
pub(super) struct Telling<'a, W> {
    pub(super) watcher: &'a mut W,
    pub(super) peers: Peers,
    pub(super) stats: &'a mut Stats,
    pub(super) told: &'a mut BTreeSet<(u16, Unreadable)>,
    pub(super) limits: Limits,
}

impl<W: TapWatcher> Telling<'_, W> {
    fn unreadable(&mut self, protocol: Unreadable) {
        self.stats.unreadable += 1;
        let server = self.peers.server;
        if self.told.len() < TOLD_MAX && self.told.insert((server.port(), protocol)) {
            self.watcher.unreadable(server, protocol);
        }
    }
}

impl<W: TapWatcher> Watcher for Telling<'_, W> {
    type Tag = W::Tag;

    fn began(&mut self, at: At, head: &RequestHead) -> W::Tag {
        self.stats.began += 1;
        let Peers { client, server } = self.peers;
        self.watcher.began(at, client, server, head)
    }

    fn ended(&mut self, tag: W::Tag, facts: Facts) {
        self.stats.ended += 1;
        self.stats.incomplete += u64::from(facts.outcome == Outcome::Incomplete);
        let Peers { client, server } = self.peers;
        self.watcher.ended(tag, client, server, facts);
    }
}
