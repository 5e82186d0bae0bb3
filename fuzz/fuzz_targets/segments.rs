//! Any segments of a few connections, in any order: what is handed on must lie within bounds, and every exchange must end once.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::net::SocketAddr;
use std::time::Duration;
use vllm_gateway::tap::connections::{Connections, Limits, TapWatcher};
use vllm_gateway::tap::segment::Segment;
use vllm_gateway::tap::stream::StreamLimits;
use vllm_gateway::wire::At;
use vllm_gateway::wire::connection::Direction;
use vllm_gateway::wire::exchange::Facts;
use vllm_gateway::wire::head::RequestHead;

#[derive(Default)]
struct Count {
    began: usize,
    ended: usize,
}

impl TapWatcher for Count {
    type Tag = ();

    fn began(&mut self, _: At, _: SocketAddr, _: SocketAddr, _: &RequestHead) {
        self.began += 1;
    }

    fn ended(&mut self, (): (), _: SocketAddr, _: SocketAddr, _: Facts) {
        self.ended += 1;
    }
}

const HELD_BYTES_MAX: usize = 2_000;
const CONNECTIONS_MAX: usize = 3;

// Each segment is preceded by three bytes: which connection, direction and flags; by how much its place and its true length differ from what would
// follow; and how much of the data it captured.
fuzz_target!(|data: &[u8]| {
    let limits = Limits {
        connections: CONNECTIONS_MAX,
        streams: StreamLimits { held_bytes: 1_000, held_bytes_total: HELD_BYTES_MAX, ..StreamLimits::default() },
        drain: Duration::from_millis(5),
        idle: Duration::from_millis(200),
        ..Limits::default()
    };
    let (mut tap, mut count, mut rest, mut now) = (Connections::new(limits), Count::default(), data, 0);
    let mut next = [[u32::MAX - 50; 2]; 4];
    while let [control, place, len, tail @ ..] = rest {
        let (captured, after) = tail.split_at(tail.len().min(usize::from(*len) * 4));
        let port = usize::from(control & 3);
        let direction = if control & 4 == 0 { Direction::ToServer } else { Direction::ToClient };
        let due = &mut next[port][direction as usize];
        // The upper half moves back, the rest ahead; 0 is in order and captured whole.
        let (back, unseen) = (u32::from(place >> 4), u32::from(place & 7));
        let flags = control >> 3;
        now += 3_000_000;
        tap.push(
            &Segment {
                at: At(now),
                client: SocketAddr::from(([10, 0, 0, 1], port as u16)),
                server: SocketAddr::from(([10, 0, 0, 2], 8_000)),
                direction,
                syn: flags == 1,
                fin: flags == 2,
                rst: flags == 3,
                sequence: if flags == 4 { due.wrapping_mul(77) } else { due.wrapping_sub(back) },
                len_bytes: captured.len() as u32 + unseen,
                captured,
            },
            &mut count,
        );
        *due = due.wrapping_add(captured.len() as u32 + unseen + u32::from(place & 8));
        if flags == 5 {
            tap.tick(At(now), &mut count);
        }
        if flags == 6 {
            tap.records_lost(&mut count);
        }
        let stats = tap.stats();
        assert!(stats.live <= CONNECTIONS_MAX && stats.streams.held_bytes <= HELD_BYTES_MAX);
        rest = after;
    }
    tap.stop(At(now), &mut count);
    assert_eq!(count.began, count.ended, "every exchange that began ends once");
    assert_eq!(tap.stats().streams.held_bytes, 0, "what is not followed holds nothing");
});
