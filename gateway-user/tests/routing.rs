//! Where requests go: replicas, models, limits of an upstream, its health, and connections that leave HTTP.

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::upstream::{Talk, Upstream};
use support::{DEADLINE, TestGateway, eventually, exchange, metric_sum, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use vllm_gateway::wire::exchange::Outcome;

const COMPLETIONS: &str = "/v1/completions";
const TEXT: &str = "serves: generate";
const HELD: &str = "proxy: {health_interval: 1h, connect_timeout: 300ms}\n";

fn asking(model: &str) -> String {
    format!(r#"{{"model":"{model}","prompt":"a"}}"#)
}

async fn ask(gateway: &TestGateway, path: &str, model: &str) -> String {
    let answer = exchange(gateway.addr, &post(path, "t", &asking(model))).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// One entry of `upstreams`.
fn entry(name: &str, addr: SocketAddr, more: &str) -> String {
    format!("  - {{name: {name}, url: \"http://{addr}\", {more}}}\n")
}

/// An address where nobody listens, and nobody can as long as the socket is held.
fn nobody() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .expect("a free port");
    let addr = socket.local_addr().expect("an address");
    (socket, addr)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_refuses_is_unreachable_and_a_replica_takes_over() {
    let (_held, refusing) = nobody();
    let gateway = TestGateway::before(refusing, None, HELD);
    let answer = ask(&gateway, COMPLETIONS, "m").await;
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nretry-after: "),
        "{answer}"
    );
    assert!(answer.contains("\"upstream_unreachable\""), "{answer}");
    let events = gateway.events.wait_for(1);
    assert_eq!(
        (events[0].outcome, events[0].status_code),
        (Outcome::Unreachable, 503)
    );

    let upstream = Upstream::recording().await;
    let yaml = format!(
        "upstreams:\n{}{}{HELD}",
        entry("a", refusing, TEXT),
        entry("b", upstream.addr, TEXT)
    );
    let gateway = TestGateway::start(&yaml);
    for count in 1..=2 {
        let answer = ask(&gateway, COMPLETIONS, "m").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(&*gateway.events.wait_for(count)[count - 1].upstream, "b");
    }
    assert_eq!(upstream.seen.count(), 2);
    let metrics = gateway.metrics().await;
    let up = |upstream: &str| metric_sum(&metrics, "gateway_upstream_up", &[upstream]);
    assert_eq!((up("upstream=\"a\""), up("upstream=\"b\"")), (0.0, 1.0));
    assert_eq!(
        metric_sum(
            &metrics,
            "gateway_upstream_connect_failures_total",
            &["upstream=\"b\""]
        ),
        0.0
    );
}

/// A listener whose queue is full answers no handshake, which is what a dead host looks like.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_does_not_take_connections_is_unreachable_in_time() {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .expect("a free port");
    let listener = socket.listen(1).expect("it listens");
    let addr = listener.local_addr().expect("an address");
    let mut queue = Vec::new();
    let patience = std::time::Duration::from_millis(200);
    while let Ok(connected) = timeout(patience, TcpStream::connect(addr)).await {
        queue.push(connected.expect("room in the queue"));
        assert!(queue.len() < 64, "a queue for one is full by now");
    }
    let gateway = TestGateway::before(addr, None, HELD);
    let answer = ask(&gateway, COMPLETIONS, "m").await;
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"upstream_unreachable\""),
        "{answer}"
    );
    assert_eq!(gateway.events.wait_for(1)[0].outcome, Outcome::Unreachable);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_replica_with_the_fewest_requests_is_chosen_until_all_are_busy() {
    let ((a, gate_a), (b, gate_b)) = (Upstream::gated().await, Upstream::gated().await);
    let cap = "serves: generate, max_connections: 1";
    let yaml = format!(
        "upstreams:\n{}{}{HELD}",
        entry("a", a.addr, cap),
        entry("b", b.addr, cap)
    );
    let gateway = Arc::new(TestGateway::start(&yaml));
    let mut running = Vec::new();
    for upstream in [&a, &b] {
        let asked = Arc::clone(&gateway);
        running.push(tokio::spawn(async move { ask(&asked, COMPLETIONS, "m").await }));
        eventually("a request at each", async || {
            (upstream.seen.count() == 1).then_some(())
        })
        .await;
    }
    let busy = ask(&gateway, COMPLETIONS, "m").await;
    assert!(
        busy.starts_with("HTTP/1.1 503 ") && busy.contains("\"upstream_busy\""),
        "{busy}"
    );
    gate_a.add_permits(1);
    gate_b.add_permits(1);
    for asked in running {
        assert!(asked.await.expect("no panic").starts_with("HTTP/1.1 200 "));
    }
    let events = gateway.events.wait_for(3);
    let outcomes: Vec<_> = events.iter().map(|event| event.outcome).collect();
    assert_eq!(
        outcomes,
        [Outcome::Refused, Outcome::Completed, Outcome::Completed]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_where_its_route_and_its_model_are() {
    let (small, large, vectors) = (
        Upstream::recording().await,
        Upstream::recording().await,
        Upstream::recording().await,
    );
    let yaml = format!(
        "upstreams:\n{}{}{}{HELD}",
        entry("small", small.addr, "serves: generate, models: [s, both]"),
        entry("large", large.addr, "serves: generate, models: [l]"),
        entry("vectors", vectors.addr, "serves: embeddings"),
    );
    let gateway = TestGateway::start(&yaml);
    let routes = [
        (COMPLETIONS, "s", "small", 200),
        ("/v1/chat/completions", "l", "large", 200),
        ("/v1/embeddings", "e", "vectors", 200),
        (COMPLETIONS, "e", "", 404),
        ("/v1/messages", "", "", 404),
    ];
    for (count, (path, model, upstream, status)) in routes.into_iter().enumerate() {
        let answer = ask(&gateway, path, model).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{path} {model}: {answer}"
        );
        let events = gateway.events.wait_for(count + 1);
        assert_eq!(
            (&*events[count].upstream, events[count].status_code),
            (upstream, status),
            "{path} {model}"
        );
        assert_eq!(answer.contains("not_found_error"), status == 404, "{answer}");
    }
    assert_eq!(
        [&small, &large, &vectors].map(|upstream| upstream.seen.count()),
        [1, 1, 1]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_upstreams_and_is_nobodys_request() {
    let upstream = Upstream::recording().await;
    let gateway = TestGateway::before(upstream.addr, None, "proxy: {health_interval: 20ms}\n");
    let health = async || {
        let answer = exchange(
            gateway.addr,
            b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        )
        .await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    for (ill, line, state) in [
        (false, "200 OK", "up"),
        (true, "503 Service Unavailable", "down"),
        (false, "200 OK", "up"),
    ] {
        upstream.seen.ill.store(ill, Ordering::Relaxed);
        let answer = eventually("the state to be seen", async || {
            Some(health().await).filter(|answer| answer.starts_with(&format!("HTTP/1.1 {line}\r\n")))
        })
        .await;
        assert!(
            answer.ends_with('}') && answer.contains(&format!("\"chat\":\"{state}\"")),
            "{answer}"
        );
    }
    assert_eq!(gateway.events.now().len(), 0, "a load balancer has no team");
    assert_eq!(upstream.seen.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_passes_both_ways_and_is_one_event() {
    let upstream = Upstream::start(|mut talk: Talk| async move {
        let request = talk.request().await.unwrap_or_default();
        assert!(
            request.contains("\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"),
            "{request}"
        );
        talk.send(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello",
        )
        .await;
        // Frames are bytes like any others to a tunnel, as long as they look like nothing else.
        let frame = talk.head().await.unwrap_or_default();
        talk.send(format!("echo of {frame}")).await;
        talk.until_half_closed().await;
    })
    .await;
    let gateway = TestGateway::before(upstream.addr, None, HELD);
    let mut client = TcpStream::connect(gateway.addr).await.expect("a connection");
    let request = "GET /v1/realtime HTTP/1.1\r\nHost: a\r\nX-Team-ID: t\r\nConnection: keep-alive, Upgrade\r\n\
                   Upgrade: websocket\r\nSec-WebSocket-Key: k\r\nSec-WebSocket-Version: 13\r\n\r\n";
    client.write_all(request.as_bytes()).await.expect("it is taken");
    let mut received = Vec::new();
    for (sent, wanted) in [
        ("", "\r\n\r\nhello"),
        ("\0frame\r\n\r\n", "echo of \0frame\r\n\r\n"),
    ] {
        client.write_all(sent.as_bytes()).await.expect("it is taken");
        while !String::from_utf8_lossy(&received).ends_with(wanted) {
            let read = timeout(DEADLINE, client.read_buf(&mut received))
                .await
                .expect("in time");
            assert!(read.expect("an open connection") > 0, "{wanted:?} never came");
        }
    }
    let received = String::from_utf8_lossy(&received).into_owned();
    assert!(
        received.starts_with("HTTP/1.1 101 Switching Protocols\r\n"),
        "{received}"
    );
    assert!(
        received.contains("\r\nconnection: upgrade\r\nupgrade: websocket\r\n"),
        "{received}"
    );
    drop(client);
    let events = gateway.events.wait_for(1);
    let event = &events[0];
    assert_eq!(
        (event.endpoint, event.status_code, event.outcome),
        ("/v1/realtime", 101, Outcome::Completed)
    );
    let bytes = (event.request_bytes, event.response_bytes);
    assert_eq!(
        bytes,
        (
            "\0frame\r\n\r\n".len() as u64,
            "helloecho of \0frame\r\n\r\n".len() as u64
        )
    );
}
