//! What clients and events see when upstreams and clients fail: every failure is told, none passes for success, each is one event.

mod support;

use std::sync::Arc;
use support::upstream::{Talk, Upstream};
use support::{DEADLINE, Sim, TestGateway, eventually, exchange, metric_sum, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;
use vllm_gateway::event::RequestEvent;
use vllm_gateway::wire::exchange::Outcome;

/// No checks besides those at the start: what these tests see of an upstream comes from requests.
const LIMITS: &str = "proxy: {health_interval: 1h}\n";

/// Limits that run out within a test that waits for them.
const IMPATIENT: &str = "proxy: {health_interval: 1h, response_head_timeout: 300ms, stream_idle_timeout: 300ms, \
                         head_timeout: 300ms, client_write_timeout: 300ms}\n";

const COMPLETIONS: &str = "/v1/completions";
const BODY: &str = r#"{"model":"m","prompt":"a"}"#;

/// What an upstream does once it has said its part.
#[derive(Clone, Copy)]
enum Then {
    Close,
    Reset,
    /// Nothing at all, until the gateway has had enough.
    Hold,
}

/// An answer, and what the client and the event make of it.
struct Fault {
    name: &'static str,
    method: &'static str,
    answer: &'static [u8],
    then: Then,
    /// How the client's bytes begin and end.
    begins: &'static str,
    ends: &'static [u8],
    status: u16,
    outcome: Outcome,
    error_type: &'static str,
}

/// How a refusal of the gateway's own ends, for an upstream's failure.
const OWN_END: &[u8] = b"\"type\":\"api_error\"}}";

const NO_ANSWER: Fault = Fault {
    name: "closed before the answer",
    method: "POST",
    answer: b"",
    then: Then::Close,
    begins: "HTTP/1.1 502 ",
    ends: OWN_END,
    status: 502,
    outcome: Outcome::Truncated,
    error_type: "upstream_closed",
};

const BAD: Fault = Fault {
    error_type: "upstream_bad_response",
    ..NO_ANSWER
};

const BROKEN: Fault = Fault {
    begins: "HTTP/1.1 200 OK\r\n",
    status: 200,
    ..NO_ANSWER
};

const GOOD: Fault = Fault {
    outcome: Outcome::Completed,
    error_type: "",
    ..BROKEN
};

/// Each of them once; those that wait for a limit are in [`SILENT`].
const FAULTS: &[Fault] = &[
    NO_ANSWER,
    Fault { name: "reset before the answer", then: Then::Reset, ..NO_ANSWER },
    Fault { name: "half a head", answer: b"HTTP/1.1 200 OK\r\nconte", ..NO_ANSWER },
    Fault { name: "only an interim head", answer: b"HTTP/1.1 100 Continue\r\n\r\n", ..NO_ANSWER },
    Fault { name: "no HTTP", answer: b"hello\r\n\r\n", ..BAD },
    Fault { name: "HTTP/2", answer: b"\0\0\x12\x04\0\0\0\0\0", ..BAD },
    Fault { name: "two lengths", answer: b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na", ..BAD },
    Fault { name: "a status that is none", answer: b"HTTP/1.1 042 OK\r\n\r\n", ..BAD },
    Fault {
        name: "an upgrade that nobody asked for",
        answer: b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        ..BAD
    },
    Fault {
        name: "a malformed chunk right away",
        answer: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        ..BAD
    },
    Fault {
        name: "closed within a length",
        answer: b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello",
        ends: b"\r\n\r\nhello",
        ..BROKEN
    },
    Fault {
        name: "closed between chunks",
        answer: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        ends: b"5\r\nhello\r\n",
        ..BROKEN
    },
    Fault {
        name: "closed within a chunk",
        answer: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\nhello",
        ends: b"ff\r\nhello",
        ..BROKEN
    },
    Fault {
        name: "an error of the server",
        answer: b"HTTP/1.1 500 No\r\ncontent-length: 40\r\n\r\n{\"error\":{\"type\":\"InternalServerError\"}}",
        begins: "HTTP/1.1 500 No\r\n",
        ends: b"InternalServerError\"}}",
        status: 500,
        outcome: Outcome::ServerError,
        error_type: "InternalServerError",
        ..BROKEN
    },
    Fault {
        name: "an error in mid-stream",
        answer: b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {\"choices\":[{\"index\":0,\"text\":\"a\"}]}\n\n\
                  data: {\"error\":{\"type\":\"EngineDead\"}}\n\ndata: [DONE]\n\n",
        ends: b"data: [DONE]\n\n",
        outcome: Outcome::ServerError,
        error_type: "EngineDead",
        ..BROKEN
    },
    Fault {
        name: "an early hint, with the answer at its heels",
        answer: b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        begins: "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n",
        ends: b"\r\n\r\n{}",
        ..GOOD
    },
    Fault {
        name: "a second 100 stays here",
        answer: b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        ends: b"\r\n\r\n{}",
        ..GOOD
    },
    Fault {
        name: "an answer to HEAD has no body",
        method: "HEAD",
        answer: b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n",
        ends: b"connection: close\r\n\r\n",
        ..GOOD
    },
    Fault {
        name: "204 has no body",
        answer: b"HTTP/1.1 204 No Content\r\n\r\n",
        begins: "HTTP/1.1 204 No Content\r\n",
        ends: b"connection: close\r\n\r\n",
        status: 204,
        ..GOOD
    },
    Fault {
        name: "304 has no body",
        answer: b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n",
        begins: "HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n",
        ends: b"connection: close\r\n\r\n",
        status: 304,
        ..GOOD
    },
    Fault {
        name: "a body until the connection ends",
        answer: b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nhello",
        ends: b"connection: close\r\n\r\nhello",
        ..GOOD
    },
    Fault {
        name: "an old server",
        answer: b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        ends: b"\r\n\r\nhello",
        ..GOOD
    },
    Fault {
        name: "trailers",
        answer: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nchecksum: 1\r\n\r\n",
        ends: b"\r\n\r\n5;a=b\r\nhello\r\n0\r\nchecksum: 1\r\n\r\n",
        ..GOOD
    },
    Fault {
        name: "an encoded stream of events",
        answer: b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ncontent-length: 10\r\n\r\n\x1f\x8bdata: \n\n",
        ends: b"\r\n\r\n\x1f\x8bdata: \n\n",
        ..GOOD
    },
];

const SILENT: &[Fault] = &[
    Fault {
        name: "silent before the answer",
        then: Then::Hold,
        begins: "HTTP/1.1 504 ",
        status: 504,
        outcome: Outcome::TimedOut,
        error_type: "upstream_timeout",
        ..NO_ANSWER
    },
    Fault {
        name: "silent between chunks",
        answer: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        then: Then::Hold,
        ends: b"5\r\nhello\r\n",
        outcome: Outcome::TimedOut,
        error_type: "upstream_silent",
        ..BROKEN
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn whatever_an_upstream_answers_the_client_and_the_event_are_told() {
    for (faults, limits) in [(FAULTS, LIMITS), (SILENT, IMPATIENT)] {
        let upstream = Upstream::start(move |mut talk| async move {
            let Some(request) = talk.request().await else {
                return;
            };
            let number = request
                .split("x-fault: ")
                .nth(1)
                .and_then(|rest| rest.lines().next());
            let fault = &faults[number
                .and_then(|number| number.parse::<usize>().ok())
                .expect("a fault")];
            talk.send(fault.answer).await;
            match fault.then {
                Then::Close => {}
                Then::Reset => talk.reset(),
                Then::Hold => talk.until_half_closed().await,
            }
        })
        .await;
        let gateway = TestGateway::before(upstream.addr, None, limits);
        for (number, fault) in faults.iter().enumerate() {
            check(fault, number, &gateway).await;
        }
        assert_eq!(upstream.seen.count(), faults.len(), "none was sent twice");
        finish(gateway, faults.len());
    }
}

async fn check(fault: &Fault, number: usize, gateway: &TestGateway) {
    let request = format!(
        "{} {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nX-Team-ID: t\r\nx-fault: {number}\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{BODY}",
        fault.method,
        BODY.len()
    );
    let received = exchange(gateway.addr, request.as_bytes()).await;
    let shown = text(&received);
    assert!(
        shown.starts_with(fault.begins) && received.ends_with(fault.ends),
        "{}: {shown}",
        fault.name
    );
    if fault.ends == OWN_END {
        assert!(
            shown.contains(&format!("\"code\":\"{}\"", fault.error_type)),
            "{}: {shown}",
            fault.name
        );
    }
    let events = gateway.events.wait_for(number + 1);
    let event = &events[number];
    let found = (event.status_code, event.outcome, &*event.error_type);
    assert_eq!(
        found,
        (fault.status, fault.outcome, fault.error_type),
        "{}",
        fault.name
    );
    assert_eq!(
        (&*event.team_id, &*event.upstream),
        ("t", "chat"),
        "{}",
        fault.name
    );
}

/// Drains the gateway; there must be `count` events then, and no more.
fn finish(gateway: TestGateway, count: usize) -> Vec<RequestEvent> {
    let events = Arc::clone(&gateway.events);
    events.wait_for(count);
    gateway.drained();
    let events = events.now();
    assert_eq!(events.len(), count, "one event a request: {events:?}");
    events
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn connect(gateway: &TestGateway, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(gateway.addr).await.expect("a connection");
    stream.write_all(bytes).await.expect("the request is taken");
    stream
}

/// Reads until `wanted` has come.
async fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut received = Vec::new();
    while !text(&received).contains(wanted) {
        let read = timeout(DEADLINE, stream.read_buf(&mut received))
            .await
            .expect("in time");
        assert!(
            read.expect("an open connection") > 0,
            "{wanted:?} never came: {}",
            text(&received)
        );
    }
    text(&received)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_lasts_until_the_end_of_the_connection_does_not_end_well_when_it_is_cut() {
    for (old_client, head) in [(false, ""), (true, "transfer-encoding: chunked\r\n")] {
        let go = Arc::new(Notify::new());
        let wait = Arc::clone(&go);
        let upstream = Upstream::start(move |mut talk: Talk| {
            let wait = Arc::clone(&wait);
            async move {
                talk.request().await;
                talk.send(format!("HTTP/1.1 200 OK\r\n{head}\r\n5\r\nhello\r\n"))
                    .await;
                wait.notified().await;
                talk.reset();
            }
        })
        .await;
        let gateway = TestGateway::before(upstream.addr, None, LIMITS);
        let version = if old_client { "1.0" } else { "1.1" };
        let request = format!("GET /v1/models HTTP/{version}\r\nHost: a\r\nX-Team-ID: t\r\n\r\n");
        let mut client = connect(&gateway, request.as_bytes()).await;
        read_until(&mut client, "hello").await;
        go.notify_one();
        let mut rest = Vec::new();
        let ended = timeout(DEADLINE, client.read_to_end(&mut rest))
            .await
            .expect("in time");
        assert!(
            ended.is_err(),
            "an orderly end would pass the part off as the whole"
        );
        let events = finish(gateway, 1);
        assert_eq!(
            (events[0].outcome, &*events[0].error_type),
            (Outcome::Truncated, "upstream_closed")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_chunk_in_mid_stream_breaks_the_connection_off() {
    let go = Arc::new(Notify::new());
    let wait = Arc::clone(&go);
    let upstream = Upstream::start(move |mut talk: Talk| {
        let wait = Arc::clone(&wait);
        async move {
            talk.request().await;
            talk.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
                .await;
            wait.notified().await;
            talk.send("-1\r\nworld\r\n0\r\n\r\n").await;
            talk.until_half_closed().await;
        }
    })
    .await;
    let gateway = TestGateway::before(upstream.addr, None, LIMITS);
    let mut client = connect(&gateway, &post(COMPLETIONS, "t", BODY)).await;
    read_until(&mut client, "hello\r\n").await;
    go.notify_one();
    let mut rest = Vec::new();
    // Whether the end is orderly does not matter: the last chunk is missing.
    let _ = timeout(DEADLINE, client.read_to_end(&mut rest))
        .await
        .expect("in time");
    assert_eq!(text(&rest), "");
    let events = finish(gateway, 1);
    assert_eq!(
        (events[0].outcome, &*events[0].error_type),
        (Outcome::Truncated, "upstream_bad_framing")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_on_an_idle_connection_that_was_closed_is_sent_again_unless_an_answer_had_begun() {
    for (begun, status, retries) in [
        ("", 200, 1.0),
        ("HTTP/1.1 103 Wait\r\n\r\n", 502, 0.0),
        ("HTTP/1", 502, 0.0),
    ] {
        let upstream = Upstream::start(move |mut talk: Talk| async move {
            let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
            talk.request().await;
            talk.send(ok).await;
            // The first connection dies of its second request.
            if talk.turn == 0 && talk.request().await.is_some() {
                talk.send(begun).await;
            } else {
                talk.until_half_closed().await;
            }
        })
        .await;
        let gateway = TestGateway::before(upstream.addr, None, LIMITS);
        let first = text(&exchange(gateway.addr, &post(COMPLETIONS, "t", BODY)).await);
        assert!(first.starts_with("HTTP/1.1 200 "), "{first}");
        let second = text(&exchange(gateway.addr, &post(COMPLETIONS, "t", BODY)).await);
        assert!(
            second.contains(&format!("HTTP/1.1 {status} ")),
            "{begun:?}: {second}"
        );
        let metrics = gateway.metrics().await;
        assert_eq!(
            metric_sum(
                &metrics,
                "gateway_upstream_retries_total",
                &["idle_connection_closed"]
            ),
            retries
        );
        assert_eq!(finish(gateway, 2)[1].status_code, status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_request_along() {
    let upstream = Upstream::start(|mut talk: Talk| async move {
        let request = talk.request().await.unwrap_or_default();
        if request.contains("/v1/chat") {
            talk.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
                .await;
        }
        talk.until_half_closed().await;
    })
    .await;
    let gateway = TestGateway::before(upstream.addr, None, LIMITS);
    let waiting = post(COMPLETIONS, "t", BODY);
    let streaming = post("/v1/chat/completions", "t", BODY);
    let ahead = post(COMPLETIONS, "t", BODY);
    let cases = [
        (waiting.clone(), "", 0),
        (streaming.clone(), "hello", 200),
        ([waiting, ahead.clone()].concat(), "", 0),
        ([streaming, ahead].concat(), "hello", 200),
    ];
    for (count, (bytes, first, status)) in cases.into_iter().enumerate() {
        let mut client = connect(&gateway, &bytes).await;
        eventually("the request at the upstream", async || {
            (upstream.seen.count() > count).then_some(())
        })
        .await;
        read_until(&mut client, first).await;
        drop(client);
        let half_closed = &upstream.seen.half_closed;
        let told = async || (half_closed.load(std::sync::atomic::Ordering::Relaxed) > count).then_some(());
        eventually("the upstream to be told", told).await;
        let events = gateway.events.wait_for(count + 1);
        assert_eq!(
            (events[count].outcome, events[count].status_code),
            (Outcome::Aborted, status)
        );
    }
    finish(gateway, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_is_told_so() {
    let upstream = Upstream::recording().await;
    let gateway = TestGateway::before(upstream.addr, None, IMPATIENT);
    let whole = post(COMPLETIONS, "t", BODY);
    for (count, bytes) in [&whole[..20], &whole[..whole.len() - 1]].into_iter().enumerate() {
        let answer = text(&exchange(gateway.addr, bytes).await);
        assert!(
            answer.starts_with("HTTP/1.1 408 ") && answer.contains("\"slow_request\""),
            "{answer}"
        );
        let events = gateway.events.wait_for(count + 1);
        assert_eq!(
            (events[count].outcome, events[count].status_code),
            (Outcome::TimedOut, 408)
        );
    }
    assert_eq!(upstream.seen.count(), 0, "half a request is nobody's");
    finish(gateway, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_comes_before_the_end_of_the_body_is_passed_on() {
    let upstream = Upstream::start(|mut talk: Talk| async move {
        talk.head().await;
        talk.send("HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\n{}")
            .await;
        talk.until_half_closed().await;
    })
    .await;
    let gateway = TestGateway::before(upstream.addr, None, LIMITS);
    // More than is held, and more than the buffers between here and the upstream take.
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nX-Team-ID: t\r\nContent-Length: {}\r\n\r\n",
        64 << 20
    );
    let mut client = connect(&gateway, head.as_bytes()).await;
    client.write_all(&vec![b'x'; 1 << 20]).await.expect("it is taken");
    let answer = read_until(&mut client, "{}").await;
    assert!(
        answer.starts_with("HTTP/1.1 413 Too Large\r\n") && answer.contains("connection: close"),
        "{answer}"
    );
    drop(client);
    assert_eq!(finish(gateway, 1)[0].outcome, Outcome::ClientError);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_outlives_the_grace_is_recorded() {
    let upstream = Upstream::start(|mut talk: Talk| async move {
        talk.request().await;
        talk.until_half_closed().await;
    })
    .await;
    let yaml = format!("{LIMITS}gateway: {{drain_timeout: 200ms}}\n");
    let gateway = TestGateway::before(upstream.addr, None, &yaml);
    let mut client = connect(&gateway, &post(COMPLETIONS, "t", BODY)).await;
    eventually("the request at the upstream", async || {
        (upstream.seen.count() == 1).then_some(())
    })
    .await;
    let events = Arc::clone(&gateway.events);
    assert_eq!(gateway.drained(), 1, "one request was cut off");
    let mut rest = Vec::new();
    let _ = timeout(DEADLINE, client.read_to_end(&mut rest))
        .await
        .expect("the client is let go");
    let events = events.now();
    assert_eq!(
        (events.len(), &*events[0].error_type, &*events[0].team_id),
        (1, "gateway_shutdown", "t")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simulators_faults_are_booked_as_what_they_are() {
    let sim = Sim::start(&["--model", "tiny"]);
    let gateway = TestGateway::before(sim.addr, None, LIMITS);
    let body = r#"{"model":"tiny","stream":true,"ignore_eos":true,"max_tokens":20,"messages":[{"role":"user","content":"hi"}]}"#;
    let faults = [
        ("status=503", 503, Outcome::ServerError),
        ("close-after=4", 200, Outcome::Truncated),
        ("malformed", 200, Outcome::Completed),
        ("error-event", 200, Outcome::ServerError),
    ];
    for (count, (fault, status, outcome)) in faults.into_iter().enumerate() {
        let request = text(&post("/v1/chat/completions", "t", body));
        let request = request.replacen("\r\n", &format!("\r\nX-Sim-Fault: {fault}\r\n"), 1);
        let answer = text(&exchange(gateway.addr, request.as_bytes()).await);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{fault}: {answer}"
        );
        let is_cut = status == 200 && !answer.ends_with("0\r\n\r\n");
        assert_eq!(is_cut, outcome == Outcome::Truncated, "{fault}: {answer}");
        let events = gateway.events.wait_for(count + 1);
        assert_eq!(
            (events[count].status_code, events[count].outcome),
            (status, outcome),
            "{fault}"
        );
        assert_eq!(
            !events[count].error_type.is_empty(),
            outcome != Outcome::Completed,
            "{fault}"
        );
    }
    finish(gateway, faults.len());
}
