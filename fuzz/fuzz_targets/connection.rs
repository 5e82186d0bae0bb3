//! Any bytes in both directions of a connection: the observer must neither panic nor lose an exchange.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vllm_gateway::wire::connection::{Closer, Connection, Direction, Limits, Watcher};
use vllm_gateway::wire::exchange::Facts;
use vllm_gateway::wire::head::RequestHead;
use vllm_gateway::wire::{At, Piece};

#[derive(Default)]
struct Count {
    began: usize,
    ended: usize,
}

impl Watcher for Count {
    type Tag = ();

    fn began(&mut self, _: At, _: &RequestHead) {
        self.began += 1;
    }

    fn ended(&mut self, (): (), _: Facts) {
        self.ended += 1;
    }
}

// Each run of bytes is preceded by one byte: direction, hole or bytes, and length.
fuzz_target!(|data: &[u8]| {
    let (mut connection, mut count, mut rest, mut time) = (Connection::new(Limits::default()), Count::default(), data, 0);
    while let [control, tail @ ..] = rest {
        let (piece, after) = tail.split_at(tail.len().min(usize::from(control >> 2) * 4));
        let direction = if control & 1 == 0 { Direction::ToServer } else { Direction::ToClient };
        let piece = if control & 2 == 0 { Piece::Bytes(piece) } else { Piece::Hole(piece.len() as u64) };
        time += 1_000;
        connection.feed(direction, At(time), piece, &mut count);
        rest = after;
    }
    connection.close(At(time), Closer::Unknown, &mut count);
    assert_eq!(count.began, count.ended, "every exchange that began ends once");
});
