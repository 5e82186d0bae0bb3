//! The gateway's memory does not grow with the size of what passes, and little with the number of those who wait.
//!
//! It runs as a process of its own here; what is resident is read from `/proc`. Only Linux tells.
#![cfg(target_os = "linux")]

mod child;
mod support;

use child::{ChildGateway, Play, Upstream, chat, digest_of_stream, head, read_past, send};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::{DEADLINE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use vllm_gateway::wire::body::{BodyReader, Step};
use vllm_gateway::wire::head::Framing;

const MB: u64 = 1_000_000;

/// How far the process may grow while something of any size passes.
const PASSING_BYTES_MAX: u64 = 20 * MB;

/// Streams that wait at once.
const IDLE_STREAMS: usize = 3_000;

/// What one of them may take. Measured: 8 kB; nginx takes 18 kB, a proxy on hyper 34 kB. Holding the prompts of this test would be 16 kB.
const IDLE_STREAM_BYTES_MAX: u64 = 14_000;

/// What may be held for a client that does not read.
const SLOW_READER_BYTES_MAX: u64 = 5 * MB;

#[tokio::test(flavor = "multi_thread")]
async fn a_large_body_and_a_long_stream_pass_without_being_held() {
    const EVENTS: u64 = 200_000;
    let upstream = Upstream::start().await;
    let gateway = ChildGateway::start("passing", upstream.addr);
    let before = warm(&gateway).await;
    for chunked in [false, true] {
        gateway.reset_peak();
        upload(&gateway, &upstream, chunked).await;
        report("a body of 100 MB", before, gateway.peak());
        assert!(
            gateway.peak() < before + PASSING_BYTES_MAX,
            "{} from {before}",
            gateway.peak()
        );
    }

    gateway.reset_peak();
    let client = send(
        gateway.addr,
        &chat(
            Play::Stream {
                events: EVENTS,
                text_bytes: 8,
            },
            100,
        ),
    )
    .await;
    assert_eq!(
        digest_of_response(client).await,
        digest_of_stream(EVENTS, 8),
        "every event, in order"
    );
    report("200,000 chunks", before, gateway.peak());
    assert!(
        gateway.peak() < before + PASSING_BYTES_MAX,
        "{} from {before}",
        gateway.peak()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_waits_costs_kilobytes() {
    // Both ends of each connection, but for the gateway's, are in this process.
    raise_own_descriptor_limit(3 * IDLE_STREAMS as u64);
    let upstream = Upstream::start().await;
    let gateway = ChildGateway::start("idle", upstream.addr);
    let before = warm(&gateway).await;
    let streams = open_idle(&gateway, IDLE_STREAMS).await;
    assert_eq!(upstream.deeds.silent.load(Ordering::Relaxed), IDLE_STREAMS);
    let after = gateway.resident();
    report("3,000 idle streams", before, after);
    let each = after.saturating_sub(before) / IDLE_STREAMS as u64;
    println!("{each} bytes a stream");
    assert!(each <= IDLE_STREAM_BYTES_MAX, "an idle stream takes {each} bytes");
    drop(streams);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_up_the_upstream_and_nobody_else() {
    const EVENTS: u64 = 50_000;
    const TEXT_BYTES: usize = 4_000;
    let upstream = Upstream::start().await;
    let gateway = ChildGateway::start("slow", upstream.addr);
    let before = warm(&gateway).await;
    gateway.reset_peak();
    let slow = send(
        gateway.addr,
        &chat(
            Play::Stream {
                events: EVENTS,
                text_bytes: TEXT_BYTES,
            },
            100,
        ),
    )
    .await;
    let stalled_at = stalled(&upstream).await;
    assert!(
        stalled_at < EVENTS * TEXT_BYTES as u64 / 2,
        "{stalled_at} bytes were taken for a client that reads none"
    );
    report("a client that does not read", before, gateway.peak());
    assert!(
        gateway.peak() < before + SLOW_READER_BYTES_MAX,
        "{} from {before}",
        gateway.peak()
    );

    for _ in 0..20 {
        let other = send(
            gateway.addr,
            &chat(
                Play::Stream {
                    events: 100,
                    text_bytes: 8,
                },
                100,
            ),
        )
        .await;
        assert_eq!(digest_of_response(other).await, digest_of_stream(100, 8));
    }
    assert_eq!(
        digest_of_response(slow).await,
        digest_of_stream(EVENTS, TEXT_BYTES),
        "it gets everything intact"
    );
    report("200 MB for a slow client", before, gateway.peak());
    assert!(
        gateway.peak() < before + SLOW_READER_BYTES_MAX,
        "{} from {before}",
        gateway.peak()
    );
}

/// Has the gateway do each thing once, so that what is allocated once is not taken for growth. Returns what is resident then.
async fn warm(gateway: &ChildGateway) -> u64 {
    for _ in 0..20 {
        let client = send(
            gateway.addr,
            &chat(
                Play::Stream {
                    events: 50,
                    text_bytes: 8,
                },
                100,
            ),
        )
        .await;
        assert_eq!(digest_of_response(client).await, digest_of_stream(50, 8));
    }
    gateway.resident()
}

/// Sends a body of 100 MB, and sees that all of it arrives.
async fn upload(gateway: &ChildGateway, upstream: &Upstream, chunked: bool) {
    const PIECES: usize = 100;
    let received = || upstream.deeds.received_bytes.load(Ordering::Relaxed);
    let before = received();
    let piece = vec![b'x'; 1_000_000];
    let (path, length) = (
        "/v1/audio/transcriptions",
        (!chunked).then_some(PIECES * piece.len()),
    );
    let mut client = send(gateway.addr, head(path, Play::Document, length).as_bytes()).await;
    for _ in 0..PIECES {
        let (size, end) = if chunked {
            (format!("{:x}\r\n", piece.len()), "\r\n")
        } else {
            (String::new(), "")
        };
        for part in [size.as_bytes(), &piece, end.as_bytes()] {
            client.write_all(part).await.expect("the body is taken");
        }
    }
    if chunked {
        client.write_all(b"0\r\n\r\n").await.expect("the body is taken");
    }
    let answer = read_past(&mut client, b"\r\n\r\n{}").await;
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    assert_eq!(received() - before, (PIECES * piece.len()) as u64);
}

/// Opens streams, a few at a time, until each has had its first chunk.
async fn open_idle(gateway: &ChildGateway, count: usize) -> Vec<TcpStream> {
    const AT_ONCE: usize = 50;
    let (addr, permits) = (gateway.addr, Arc::new(Semaphore::new(AT_ONCE)));
    let opening: Vec<_> = (0..count)
        .map(|_| {
            let permits = Arc::clone(&permits);
            tokio::spawn(async move {
                let _permit = permits.acquire().await.expect("nobody closes it");
                // A prompt of a usual length: it must not be held for as long as its answer takes.
                let mut client = send(addr, &chat(Play::Silence, 8_000)).await;
                read_past(&mut client, b"\"content\":").await;
                client
            })
        })
        .collect();
    let mut streams = Vec::new();
    for stream in opening {
        streams.push(stream.await.expect("it opens"));
    }
    streams
}

/// Waits until the upstream gets rid of nothing more; returns how much it got rid of.
async fn stalled(upstream: &Upstream) -> u64 {
    const STILL_TICKS: u32 = 30;
    let (mut last, mut still) = (0, 0);
    eventually("the upstream to be held up", async || {
        let now = upstream.deeds.sent_bytes.load(Ordering::Relaxed);
        still = if now == last { still + 1 } else { 0 };
        last = now;
        (now > 0 && still >= STILL_TICKS).then_some(now)
    })
    .await
}

/// Reads a chunked response to its end, and digests its payload.
async fn digest_of_response(mut client: TcpStream) -> [u8; 32] {
    let seen = read_past(&mut client, b"\r\n\r\n").await;
    let head_end = memchr::memmem::find(&seen, b"\r\n\r\n").expect("just read") + 4;
    assert!(
        seen.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&seen[..head_end])
    );
    let (mut body, mut digest) = (BodyReader::new(Framing::Chunked), Sha256::new());
    let (mut buffer, mut len) = (seen[head_end..].to_vec(), seen.len() - head_end);
    loop {
        let mut input = &buffer[..len];
        loop {
            match body.next(&mut input).expect("chunks") {
                Step::Data(payload) => digest.update(payload),
                Step::More => break,
                Step::End => return digest.finalize().into(),
            }
        }
        buffer.resize(256 * 1024, 0);
        let read = tokio::time::timeout(DEADLINE, client.read(&mut buffer)).await;
        len = read.expect("it goes on").expect("no reset");
        assert!(len > 0, "the response broke off");
    }
}

fn raise_own_descriptor_limit(needed: u64) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )
    .expect("the hard limit is allowed");
    assert!(
        maximum.is_none_or(|most| most >= needed),
        "this test needs {needed} descriptors; raise `ulimit -Hn`"
    );
}

fn report(what: &str, before: u64, after: u64) {
    println!("{what}: {before} bytes resident before, {after} at most");
}
