//! The facts of a response do not depend on how its bytes were cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vllm_gateway::wire::exchange::{Ending, Exchange, Facts};
use vllm_gateway::wire::head::{RequestHead, ResponseHead};
use vllm_gateway::wire::{At, Piece};

const REQUEST: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";

fn facts(body: &[u8], cut: usize) -> Option<Facts> {
    let (request, _) = RequestHead::parse(REQUEST, 1024).ok()??;
    let (response, _) = ResponseHead::parse(RESPONSE, 1024, "POST").ok()??;
    let mut exchange = Exchange::begin(At(0), &request);
    exchange.request_body(Piece::Bytes(b"{}"));
    exchange.response_head(At(2), &response);
    for piece in body.chunks(cut.max(1)) {
        exchange.response_body(At(3_000), Piece::Bytes(piece));
    }
    Some(exchange.finish(At(4_000), Ending::Complete))
}

fuzz_target!(|data: &[u8]| {
    let whole = facts(data, data.len());
    for cut in [1, 2, 3, 7, 64] {
        assert_eq!(format!("{whole:?}"), format!("{:?}", facts(data, cut)));
    }
});
