//! Real captures of vLLM as the kernel tap sees them: as segments, cut anyhow, sent again, out of order, or lost.
//!
//! What the tap makes of them is held against what [`Connection`] makes of the same bytes in one piece. A new capture is covered by being
//! there.

#[allow(dead_code, reason = "other tests play the captures to a gateway, too")]
mod replay;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replay::Capture;
use std::net::SocketAddr;
use std::sync::LazyLock;
use vllm_gateway::tap::connections::{Connections, Limits, TapWatcher};
use vllm_gateway::tap::segment::Segment;
use vllm_gateway::tap::stats::Stats;
use vllm_gateway::wire::connection::{Closer, Connection, Direction, Watcher};
use vllm_gateway::wire::exchange::{Facts, Outcome};
use vllm_gateway::wire::head::RequestHead;
use vllm_gateway::wire::{At, Piece};

static CAPTURES: LazyLock<Vec<Capture>> = LazyLock::new(Capture::all);

/// All bytes come at one time, so that times are equal too, whatever the cut.
const NOW: At = At(7_000);

/// What a watcher was told: the target of each request, and its facts.
#[derive(Debug, Default)]
struct Notes(Vec<(String, Facts)>);

impl Notes {
    fn told(&self) -> Vec<String> {
        self.0.iter().map(|exchange| format!("{exchange:?}")).collect()
    }
}

impl Watcher for Notes {
    type Tag = String;

    fn began(&mut self, _: At, head: &RequestHead) -> String {
        head.target().to_owned()
    }

    fn ended(&mut self, target: String, facts: Facts) {
        self.0.push((target, facts));
    }
}

impl TapWatcher for Notes {
    type Tag = String;

    fn began(&mut self, _: At, _: SocketAddr, _: SocketAddr, head: &RequestHead) -> String {
        head.target().to_owned()
    }

    fn ended(&mut self, target: String, _: SocketAddr, _: SocketAddr, facts: Facts) {
        self.0.push((target, facts));
    }
}

/// One message after the other, as they went over a connection.
type Talk = Vec<(Direction, Vec<u8>)>;

fn talk(capture: &Capture) -> Talk {
    let (requests, responses) = (capture.requests(), capture.responses());
    assert_eq!(requests.len(), responses.len(), "{}", capture.name);
    let pairs = requests.into_iter().zip(responses);
    pairs
        .flat_map(|(request, response)| [(Direction::ToServer, request), (Direction::ToClient, response)])
        .collect()
}

/// What the bytes say in one piece.
fn expected(talk: &Talk, closer: Closer) -> Notes {
    let (mut connection, mut notes) = (Connection::new(Limits::default().wire), Notes::default());
    for (direction, bytes) in talk {
        connection.feed(*direction, NOW, Piece::Bytes(bytes), &mut notes);
    }
    connection.close(NOW, closer, &mut notes);
    notes
}

/// How a message's bytes come as segments.
#[derive(Clone, Copy, Debug, Default)]
struct Network {
    seed: u64,
    /// How far a segment may fall behind.
    reorder: usize,
    /// One in so many segments comes again.
    again: Option<u32>,
    /// Longest segment.
    len_bytes_max: usize,
}

impl Network {
    /// The places and lengths of a message's segments, as they come.
    fn segments(&self, random: &mut StdRng, len: usize) -> Vec<(usize, usize)> {
        let (mut at, mut cut) = (0, Vec::new());
        while at < len {
            let segment = random.random_range(1..=self.len_bytes_max.min(len - at));
            cut.push((at, segment));
            at += segment;
        }
        let mut ordered: Vec<_> = Vec::new();
        for (index, (at, segment)) in cut.into_iter().enumerate() {
            ordered.push((index + random.random_range(0..=self.reorder), (at, segment)));
            if self.again.is_some_and(|again| random.random_ratio(1, again)) {
                // Sent again, together with bytes before it.
                let before = random.random_range(0..=at.min(200));
                let place = index + random.random_range(0..=self.reorder);
                ordered.push((place, (at - before, segment + before)));
            }
        }
        ordered.sort_by_key(|(place, _)| *place);
        ordered.into_iter().map(|(_, segment)| segment).collect()
    }
}

/// A connection through the tap.
struct Tapped {
    tap: Connections<String>,
    notes: Notes,
    next: [u32; 2],
}

impl Tapped {
    fn connect(isns: [u32; 2]) -> Tapped {
        let mut tapped = Tapped {
            tap: Connections::new(Limits::default()),
            notes: Notes::default(),
            next: isns,
        };
        for direction in [Direction::ToServer, Direction::ToClient] {
            tapped.push(direction, 0, b"", |segment| segment.syn = true);
            tapped.advance(direction, 1);
        }
        tapped
    }

    fn push(
        &mut self,
        direction: Direction,
        offset: usize,
        captured: &[u8],
        change: impl FnOnce(&mut Segment<'_>),
    ) {
        let mut segment = Segment {
            at: NOW,
            client: SocketAddr::from(([10, 0, 0, 1], 40_000)),
            server: SocketAddr::from(([10, 0, 0, 2], 8_000)),
            direction,
            syn: false,
            fin: false,
            rst: false,
            sequence: self.next[direction as usize].wrapping_add(offset as u32),
            len_bytes: captured.len() as u32,
            captured,
        };
        change(&mut segment);
        self.tap.push(&segment, &mut self.notes);
    }

    fn advance(&mut self, direction: Direction, len: usize) {
        let next = &mut self.next[direction as usize];
        *next = next.wrapping_add(len as u32);
    }

    /// A message's segments, but for those that `is_lost` names by their index.
    fn say(
        &mut self,
        direction: Direction,
        bytes: &[u8],
        (network, random): (&Network, &mut StdRng),
        is_lost: impl Fn(usize) -> bool,
    ) {
        for (index, (at, len)) in network.segments(random, bytes.len()).into_iter().enumerate() {
            if !is_lost(index) {
                self.push(direction, at, &bytes[at..at + len], |_| {});
            }
        }
        self.advance(direction, bytes.len());
    }

    fn fin(&mut self, direction: Direction) {
        self.push(direction, 0, b"", |segment| segment.fin = true);
        self.advance(direction, 1);
    }

    /// Both sides end it, this one first.
    fn end(mut self, first: Direction) -> (Notes, Stats) {
        let second = match first {
            Direction::ToServer => Direction::ToClient,
            Direction::ToClient => Direction::ToServer,
        };
        self.fin(first);
        self.fin(second);
        // Longer than anything is waited for.
        self.tap.tick(At(NOW.0 + 2_000_000_000), &mut self.notes);
        assert_eq!(self.tap.stats().live, 0);
        (self.notes, self.tap.stats())
    }
}

fn networks() -> impl Strategy<Value = Network> {
    (
        any::<u64>(),
        0usize..6,
        prop::option::of(1u32..9),
        prop::sample::select(vec![1usize, 7, 100, 1_460, 65_000]),
    )
        .prop_map(|(seed, reorder, again, len_bytes_max)| Network {
            seed,
            reorder,
            again,
            len_bytes_max,
        })
}

/// Numbers that wrap around soon, or any.
fn isns() -> impl Strategy<Value = [u32; 2]> {
    let isn = || prop_oneof![any::<u32>(), u32::MAX - 3_000..=u32::MAX];
    [isn(), isn()]
}

/// Exchanges that are alike in nothing but that they were captured whole.
fn whole_talks() -> Vec<Talk> {
    let captures = CAPTURES.iter().filter(|capture| !capture.is_aborted());
    captures.map(talk).filter(|talk| talk.len() == 2).collect()
}

proptest! {
    // Each case goes through all captures.
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn segments_say_what_their_bytes_do(network in networks(), isns in isns()) {
        for capture in CAPTURES.iter() {
            let talk = talk(capture);
            let (closer, first) = match capture.is_aborted() {
                true => (Closer::Client, Direction::ToServer),
                false => (Closer::Server, Direction::ToClient),
            };
            let (mut tapped, mut random) = (Tapped::connect(isns), StdRng::seed_from_u64(network.seed));
            for (direction, bytes) in &talk {
                tapped.say(*direction, bytes, (&network, &mut random), |_| false);
            }
            let (notes, stats) = tapped.end(first);
            prop_assert_eq!(notes.told(), expected(&talk, closer).told(), "{}", capture.name);
            prop_assert_eq!((stats.opaque_bytes, stats.streams.gap_bytes, stats.incomplete), (0, 0, 0));
        }
    }

}

/// The least of a response that shows whether it is the final one: up to the first digit of its status.
const UP_TO_STATUS: &str = "HTTP/1.1 2";

proptest! {
    #[test]
    fn a_loss_costs_the_exchange_that_it_hits_and_never_makes_facts_up(
        network in networks(),
        isns in isns(),
        which in prop::collection::vec(any::<prop::sample::Index>(), 3),
        (is_request, from, count) in (any::<bool>(), any::<prop::sample::Index>(), 1usize..4),
    ) {
        let talks = whole_talks();
        let chosen: Vec<&Talk> = which.iter().map(|index| index.get(&talks)).collect();
        // Lost are records, not packets: what is missing comes no more, and what comes is in order.
        let network = Network { reorder: 0, again: None, len_bytes_max: network.len_bytes_max.max(100), ..network };
        let (mut tapped, mut random) = (Tapped::connect(isns), StdRng::seed_from_u64(network.seed));
        let mut lost_from_status_on = false;
        for (index, talk) in chosen.iter().enumerate() {
            for (direction, bytes) in *talk {
                let is_hit = index == 1 && (*direction == Direction::ToServer) == is_request;
                let segments = network.segments(&mut random.clone(), bytes.len());
                let first = from.index(segments.len());
                let lost = first..first + count;
                let is_lost = |index: usize| is_hit && lost.contains(&index);
                lost_from_status_on |= !is_request
                    && is_hit
                    && segments[first].0 < UP_TO_STATUS.len()
                    && (first..segments.len()).all(is_lost);
                tapped.say(*direction, bytes, (&network, &mut random), is_lost);
            }
        }
        let (notes, _) = tapped.end(Direction::ToClient);
        let told = notes.told();
        let truth: Vec<Notes> = chosen.iter().map(|talk| expected(talk, Closer::Server)).collect();
        prop_assert_eq!(&told[..1], truth[0].told());
        // What was seen may have begun an interim response, so that the one that is missing may still be to come: nobody can tell.
        if !lost_from_status_on {
            prop_assert_eq!(&told[told.len() - 1..], truth[2].told());
        }
        if let [_, (_, hit), _] = &notes.0[..] {
            let truth = &truth[1].0[0].1;
            if hit.outcome != Outcome::Incomplete {
                prop_assert_eq!((hit.status, hit.outcome), (truth.status, truth.outcome));
                prop_assert_eq!(hit.ttft_us, truth.ttft_us);
                prop_assert_eq!(hit.response_bytes, truth.response_bytes);
                // The answer may come before it shows that the request's end is missing.
                let is_request_whole = hit.request_bytes == truth.request_bytes;
                prop_assert_eq!(hit.request_whole.is_some(), is_request_whole);
            }
            for (told, truth) in [
                (hit.tokens.prompt, truth.tokens.prompt),
                (hit.tokens.completion, truth.tokens.completion),
                (hit.tokens.engine_prompt, truth.tokens.engine_prompt),
                (hit.tokens.cached, truth.tokens.cached),
            ] {
                prop_assert!(told.is_none() || told == truth, "{hit:?}");
            }
        }
        prop_assert!(notes.0.len() == 3 || is_request);
    }

    #[test]
    fn a_connection_taken_up_in_its_middle_is_right_from_the_next_request_on(
        network in networks(),
        isns in isns(),
        which in prop::collection::vec(any::<prop::sample::Index>(), 2),
        missed in any::<prop::sample::Index>(),
    ) {
        let talks = whole_talks();
        let (first, second) = (which[0].get(&talks), which[1].get(&talks));
        let network = Network { reorder: 0, ..network };
        let mut random = StdRng::seed_from_u64(network.seed);
        let mut tapped = Tapped { tap: Connections::new(Limits::default()), notes: Notes::default(), next: isns };
        // From somewhere in the first response on.
        let late = &first[1].1[missed.index(first[1].1.len())..];
        tapped.say(Direction::ToClient, late, (&network, &mut random), |_| false);
        for (direction, bytes) in second {
            tapped.say(*direction, bytes, (&network, &mut random), |_| false);
        }
        let (notes, stats) = tapped.end(Direction::ToClient);
        prop_assert_eq!(notes.told(), expected(second, Closer::Server).told());
        prop_assert_eq!((stats.joined, stats.opaque_bytes), (1, late.len() as u64));
    }
}

#[test]
fn a_thousand_requests_on_one_connection_are_each_right() {
    let talks = whole_talks();
    let network = Network {
        seed: 1,
        reorder: 3,
        again: Some(5),
        len_bytes_max: 1_460,
    };
    let mut random = StdRng::seed_from_u64(network.seed);
    let mut tapped = Tapped::connect([u32::MAX - 100_000, u32::MAX - 200_000]);
    let mut truth = Vec::new();
    for talk in talks.iter().cycle().take(1_000) {
        for (direction, bytes) in talk {
            tapped.say(*direction, bytes, (&network, &mut random), |_| false);
        }
        truth.extend(expected(talk, Closer::Server).told());
    }
    let (notes, stats) = tapped.end(Direction::ToClient);
    assert_eq!(notes.told(), truth);
    assert!(stats.streams.early_segments > 100 && stats.streams.duplicate_bytes > 10_000);
}
