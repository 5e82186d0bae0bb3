//! Streams against the plainest model of one: an array of positions, each known or not.

use super::*;
use proptest::prelude::*;
use std::net::SocketAddr;

/// The byte at a position of every stream in these tests.
fn byte(offset: usize) -> u8 {
    (offset * 31 % 251) as u8
}

fn bytes(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len).map(byte).collect()
}

/// A segment by its place in the stream.
#[derive(Clone, Copy, Debug)]
struct Sent {
    offset: usize,
    len: usize,
    captured: usize,
    at: u64,
}

/// A stream, and what it has handed on: for each position its time and its byte, if that was seen.
struct Rig {
    stream: Stream,
    pool: Pool,
    first: u32,
    got: Vec<(u64, Option<u8>)>,
}

impl Rig {
    fn new(direction: Direction, isn: u32) -> Rig {
        let limits = StreamLimits {
            request_patience: Duration::from_secs(1_000),
            response_patience: Duration::from_secs(1_000),
            ..StreamLimits::default()
        };
        Rig {
            stream: Stream::new(direction),
            pool: Pool {
                limits,
                ..Pool::default()
            },
            first: isn.wrapping_add(1),
            got: Vec::new(),
        }
    }

    fn begun(direction: Direction, isn: u32) -> Rig {
        let mut rig = Rig::new(direction, isn);
        assert!(rig.stream.begin(isn));
        rig
    }

    fn send(&mut self, sent: Sent) -> &mut Rig {
        self.send_with(sent, false, false)
    }

    fn send_with(&mut self, sent: Sent, syn: bool, fin: bool) -> &mut Rig {
        let captured = bytes(sent.offset, sent.captured.min(sent.len));
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 1));
        let segment = Segment {
            at: At(sent.at),
            client: anywhere,
            server: anywhere,
            direction: self.stream.direction,
            syn,
            fin,
            rst: false,
            sequence: self
                .first
                .wrapping_add(sent.offset as u32)
                .wrapping_sub(u32::from(syn)),
            len_bytes: sent.len as u32,
            captured: &captured,
        };
        let mut got = Vec::new();
        let deliver = &mut |at, piece: Piece<'_>| got.extend(flat(at, piece));
        self.stream.push(&segment, &mut self.pool, deliver).unwrap();
        self.got.extend(got);
        self
    }

    fn lapse(&mut self, now: u64) -> &mut Rig {
        let mut got = Vec::new();
        let deliver = &mut |at, piece: Piece<'_>| got.extend(flat(at, piece));
        self.stream.lapse(At(now), &mut self.pool, deliver);
        self.got.extend(got);
        self
    }

    fn give_up(&mut self) -> &mut Rig {
        let mut got = Vec::new();
        let deliver = &mut |at, piece: Piece<'_>| got.extend(flat(at, piece));
        self.stream.give_up(GiveUp::Closed, &mut self.pool, deliver);
        self.got.extend(got);
        self
    }

    /// Lengths of the runs of seen and unseen bytes, a run of unseen ones below 0.
    fn shape(&self) -> Vec<i64> {
        let mut shape: Vec<i64> = Vec::new();
        for (_, seen) in &self.got {
            let step = if seen.is_some() { 1 } else { -1 };
            match shape.last_mut() {
                Some(last) if last.signum() == step => *last += step,
                _ => shape.push(step),
            }
        }
        shape
    }

    fn times(&self) -> Vec<u64> {
        let mut times: Vec<u64> = self.got.iter().map(|(at, _)| *at).collect();
        times.dedup();
        times
    }
}

fn flat(At(at): At, piece: Piece<'_>) -> Vec<(u64, Option<u8>)> {
    match piece {
        Piece::Bytes(bytes) => bytes.iter().map(|byte| (at, Some(*byte))).collect(),
        Piece::Hole(len) => vec![(at, None); len as usize],
    }
}

fn whole(offset: usize, len: usize, at: u64) -> Sent {
    let captured = len;
    Sent {
        offset,
        len,
        captured,
        at,
    }
}

fn prefix(offset: usize, len: usize, captured: usize, at: u64) -> Sent {
    Sent {
        offset,
        len,
        captured,
        at,
    }
}

#[test]
fn a_captured_prefix_leaves_a_hole_of_known_length() {
    let mut rig = Rig::begun(Direction::ToServer, 7);
    rig.send(prefix(0, 100, 10, 1)).send(whole(100, 5, 2));
    assert_eq!(rig.shape(), [10, -90, 5]);
    assert_eq!(rig.pool.stats.uncaptured_bytes, 90);
    // Sent again and captured in full: too late for what was handed on.
    rig.send(whole(0, 105, 3));
    assert_eq!((rig.got.len(), rig.pool.stats.duplicate_bytes), (105, 105));
    // But not while it is held back.
    rig.send(prefix(110, 20, 4, 4))
        .send(whole(110, 10, 5))
        .send(whole(105, 5, 6));
    assert_eq!(rig.shape(), [10, -90, 20, -10]);
}

#[test]
fn a_requests_bytes_count_from_when_they_could_be_read() {
    let mut rig = Rig::begun(Direction::ToServer, 7);
    rig.send(whole(10, 10, 5)).send(whole(0, 10, 8));
    assert_eq!(rig.times(), [8], "both could be read once the first were there");
    rig.send(whole(30, 10, 20)).give_up();
    assert_eq!(
        rig.times(),
        [8, 20],
        "the server has what only the record of was lost"
    );
}

#[test]
fn a_responses_bytes_count_from_when_they_were_sent() {
    let mut rig = Rig::begun(Direction::ToClient, 7);
    rig.send(whole(0, 10, 1));
    rig.send(whole(20, 10, 5))
        .send(whole(30, 10, 6))
        .send(whole(10, 10, 90));
    assert_eq!(
        rig.times(),
        [1, 5, 6],
        "what was sent again had gone out before the rest"
    );
}

#[test]
fn what_does_not_come_in_time_is_given_up() {
    let mut rig = Rig::begun(Direction::ToServer, 7);
    rig.pool.limits.request_patience = Duration::from_nanos(10);
    rig.send(whole(5, 5, 100)).send(whole(20, 5, 105)).lapse(109);
    assert_eq!(rig.shape(), [0; 0]);
    rig.lapse(110);
    assert_eq!(rig.shape(), [-5, 5], "the second gap was noticed later");
    rig.lapse(115);
    assert_eq!(rig.shape(), [-5, 5, -10, 5]);
    let stats = rig.pool.stats;
    assert_eq!(
        (stats.gaps(GiveUp::TimedOut), stats.gap_bytes, stats.held_bytes),
        (2, 15, 0)
    );
    // The end waits like bytes do.
    rig.send_with(whole(30, 0, 120), false, true).lapse(129);
    assert_eq!((rig.stream.waits(), rig.stream.ended()), (true, None));
    rig.lapse(130);
    assert_eq!((rig.stream.waits(), rig.stream.ended()), (false, Some(At(120))));
    assert_eq!(rig.shape(), [-5, 5, -10, 5, -5]);
}

#[test]
fn a_full_stream_gives_up_and_goes_on() {
    for (is_total, cause) in [(false, GiveUp::ConnectionFull), (true, GiveUp::TotalFull)] {
        let mut rig = Rig::begun(Direction::ToServer, 7);
        let limit = 8 * held::cost_bytes(&[]);
        match is_total {
            true => rig.pool.limits.held_bytes_total = limit,
            false => rig.pool.limits.held_bytes = limit,
        }
        for index in 0..20 {
            rig.send(whole(10 + 4 * index, 4, index as u64));
            assert!(rig.pool.stats.held_bytes <= limit);
        }
        assert_eq!(rig.shape(), [-10, 80]);
        assert_eq!((rig.pool.stats.gaps(cause), rig.pool.stats.held_bytes), (1, 0));
    }
}

#[test]
fn a_syn_may_carry_bytes_and_come_again() {
    let mut rig = Rig::begun(Direction::ToServer, u32::MAX);
    rig.send_with(whole(0, 3, 1), true, false);
    assert_eq!(rig.shape(), [3]);
    assert!(rig.stream.begin(u32::MAX), "sent again");
    assert!(!rig.stream.begin(5), "another connection's");
}

#[test]
fn nothing_comes_behind_the_end() {
    let mut rig = Rig::begun(Direction::ToClient, 7);
    rig.send_with(whole(5, 5, 2), false, true)
        .send(whole(8, 9, 3))
        .send(whole(12, 9, 3));
    assert_eq!(rig.stream.ended(), None);
    rig.send(whole(0, 5, 4));
    assert_eq!((rig.shape(), rig.stream.ended()), (vec![10], Some(At(2))));
    assert!(!rig.stream.waits());
}

#[test]
fn numbers_far_from_its_own_are_anothers() {
    let mut rig = Rig::begun(Direction::ToServer, 7);
    rig.send(whole(0, 9, 1));
    for far in [1 << 27, 1 << 31, u32::MAX - (1 << 27)] {
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 1));
        let segment = Segment {
            at: At(2),
            client: anywhere,
            server: anywhere,
            direction: Direction::ToServer,
            syn: false,
            fin: false,
            rst: false,
            sequence: far,
            len_bytes: 1,
            captured: b"x",
        };
        assert!(!rig.stream.is_near(&segment) && !rig.stream.is_news(&segment));
        let pushed = rig.stream.push(&segment, &mut rig.pool, &mut |_, _| {});
        assert_eq!(pushed, Err(OutOfWindow), "{far}");
    }
}

const LEN: usize = 400;

/// What a stream without limits must hand on, position by position.
struct Model {
    direction: Direction,
    /// Time and whether it was seen, of each position that is known.
    known: Vec<Option<(u64, bool)>>,
    next: usize,
    last_at: u64,
    out: Vec<(u64, Option<u8>)>,
}

impl Model {
    fn send(&mut self, sent: Sent) {
        for offset in (sent.offset.max(self.next)..sent.offset + sent.len).rev() {
            let is_seen = offset < sent.offset + sent.captured.min(sent.len);
            let behind = self.known[offset + 1..].iter().flatten().next();
            let at = match behind {
                Some((behind, _)) if self.direction == Direction::ToClient => sent.at.min(*behind),
                _ => sent.at,
            };
            self.known[offset] = match self.known[offset] {
                None => Some((at, is_seen)),
                Some((at, was_seen)) => Some((at, was_seen || is_seen)),
            };
        }
        while let Some((at, is_seen)) = self.known[self.next] {
            self.last_at = self.last_at.max(at);
            self.out.push((self.last_at, is_seen.then(|| byte(self.next))));
            self.next += 1;
        }
    }
}

fn directions() -> impl Strategy<Value = Direction> {
    prop::sample::select(vec![Direction::ToServer, Direction::ToClient])
}

/// Any number, and often one that wraps around in the middle of a test.
fn isns() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), u32::MAX - LEN as u32..=u32::MAX]
}

/// Segments anywhere, of any length, captured in any part, as they come.
fn chaos() -> impl Strategy<Value = Vec<Sent>> {
    let one = (
        0..LEN - 60,
        0usize..60,
        prop_oneof![Just(99usize), 0usize..60],
        0u64..20,
    );
    prop::collection::vec(one, 0..80).prop_map(|all| {
        let mut now = 0;
        let sent = all.into_iter().map(|(offset, len, captured, later)| {
            now += later;
            prefix(offset, len, captured, now)
        });
        sent.collect()
    })
}

/// Bytes in order, cut, with some sent again, some swapped with a neighbour not far off, and some lost.
fn traffic() -> impl Strategy<Value = Vec<Sent>> {
    prop::collection::vec(
        (1usize..30, 0usize..4, 0usize..3, any::<prop::sample::Index>()),
        1..40,
    )
    .prop_map(|cuts| {
        let (mut offset, mut queue) = (0, Vec::new());
        for (len, swap, copies, _) in &cuts {
            let len = (*len).min(LEN - offset);
            let place = queue.len().saturating_sub(*swap);
            for _ in 0..*copies {
                queue.insert(place, whole(offset, len, 0));
            }
            offset += len;
        }
        queue.iter_mut().zip(1..).for_each(|(sent, at)| sent.at = at);
        queue
    })
}

proptest! {
    #[test]
    fn without_limits_a_stream_is_its_model(
        sent in prop_oneof![chaos(), traffic()],
        direction in directions(),
        isn in isns(),
        from_start: bool,
    ) {
        let mut rig = Rig::new(direction, isn);
        let first = sent.first().map_or(0, |sent| sent.offset);
        let next = if from_start { 0 } else { first };
        let mut model = Model { direction, known: vec![None; LEN + 1], next, last_at: 0, out: Vec::new() };
        if from_start {
            rig.stream.begin(isn);
        }
        for sent in sent {
            rig.send(sent);
            model.send(sent);
            prop_assert_eq!(&rig.got, &model.out);
            let is_waiting = model.known[model.next..].iter().any(Option::is_some);
            prop_assert_eq!(rig.stream.waits(), is_waiting);
        }
        rig.give_up();
        prop_assert!(!rig.stream.waits());
        prop_assert_eq!(rig.pool.stats.held_bytes, 0);
        // What was given up is a hole exactly where nothing is known.
        for (offset, (_, seen)) in rig.got.iter().enumerate().skip(model.out.len()) {
            let known = model.known[next + offset].is_some_and(|(_, is_seen)| is_seen);
            prop_assert_eq!(*seen, known.then(|| byte(next + offset)));
        }
    }

    #[test]
    fn with_limits_bytes_are_right_or_holes_in_order_and_nothing_else(
        sent in prop_oneof![chaos(), traffic()],
        direction in directions(),
        isn in isns(),
        held_bytes in 0usize..1_500,
        is_total: bool,
        patience in 1u64..200,
        fin: bool,
    ) {
        let mut rig = Rig::begun(direction, isn);
        match is_total {
            true => rig.pool.limits.held_bytes_total = held_bytes,
            false => rig.pool.limits.held_bytes = held_bytes,
        }
        rig.pool.limits.request_patience = Duration::from_nanos(patience);
        rig.pool.limits.response_patience = Duration::from_nanos(patience);
        let sent: Vec<Sent> = sent.into_iter().filter(|sent| sent.len > 0).collect();
        let end = sent.iter().map(|sent| sent.offset + sent.len).max().unwrap_or(0);
        for sent in &sent {
            let is_last = sent.offset + sent.len == end;
            rig.send_with(*sent, false, fin && is_last).lapse(sent.at);
            prop_assert!(rig.pool.stats.held_bytes <= held_bytes);
            prop_assert_eq!(rig.pool.stats.held_bytes, rig.stream.held.cost_bytes());
        }
        rig.give_up();
        prop_assert_eq!(rig.got.len(), end);
        prop_assert_eq!(rig.pool.stats.bytes, end as u64);
        for (offset, (_, seen)) in rig.got.iter().enumerate() {
            prop_assert!(seen.is_none_or(|seen| seen == byte(offset)));
        }
        prop_assert!(rig.got.is_sorted_by_key(|(at, _)| *at));
        prop_assert_eq!(rig.stream.ended().is_some(), fin && !sent.is_empty());
        let missing = rig.got.iter().filter(|(_, seen)| seen.is_none()).count() as u64;
        prop_assert_eq!(rig.pool.stats.gap_bytes + rig.pool.stats.uncaptured_bytes, missing);
    }

    #[test]
    fn in_order_nothing_is_held_or_copied(cuts in prop::collection::vec(1usize..50, 1..20), isn in isns()) {
        let mut rig = Rig::begun(Direction::ToClient, isn);
        let mut offset = 0;
        for len in cuts {
            rig.send(whole(offset, len, offset as u64));
            offset += len;
            prop_assert_eq!(rig.got.len(), offset);
        }
        prop_assert_eq!(rig.pool.stats.early_segments, 0);
    }
}
