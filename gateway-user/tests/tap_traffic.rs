//! The tap as a whole, on this machine's kernel: what the probe sees of real traffic, and what is booked of it.
//!
//! Nothing here is skipped: where the probe cannot be loaded, the tests fail.
#![cfg(target_os = "linux")]

#[allow(dead_code, reason = "the sums over embeddings are not used here")]
mod books;
#[allow(dead_code, reason = "only the player is used here")]
mod replay;
mod support;

use books::{Books, Row, Trial, Work};
use replay::{Capture, Cut, Replay};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use support::upstream::{Talk, Upstream};
use support::{Sim, TestGateway, exchange, metric_sum};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use vllm_gateway::config::Config;
use vllm_gateway::event::{CapturedBy, RequestEvent};
use vllm_gateway::tap::Tap;
use vllm_gateway::wire::connection::Direction;
use vllm_gateway::wire::exchange::{Outcome, UsageSource};

/// Everything that the one server behind the tap answers, with clients that leave and requests that fail.
#[rustfmt::skip] // Options in pairs.
const MIXED_LOAD: &[&str] = &[
    "--endpoints", "chat=5,completions=3,responses=1,messages=1", "--stream-fraction", "0.33",
    "--abort-fraction", "0.05", "--fail-fraction", "0.02", "--include-usage-fraction", "0",
    "--teams", "5", "--projects", "3", "--users", "11", "--concurrency", "24",
    "--prompt-tokens", "4..60", "--output-tokens", "2..24", "--abort-after-ms", "1..30",
];

/// Steps of some milliseconds: slow enough that a client can leave a request that runs.
#[rustfmt::skip]
const TIMED: &[&str] = &["--model", "tiny", "--step-base-us", "2000", "--prefill-us-per-token", "10", "--decode-us-per-seq", "10"];

/// The same with usage on every chunk, whatever the request says.
#[rustfmt::skip]
const FORCED: &[&str] = &["--force-usage", "--step-base-us", "2000", "--prefill-us-per-token", "10", "--decode-us-per-seq", "10"];

#[tokio::test(flavor = "multi_thread")]
async fn direct_traffic_is_booked_request_by_request_with_the_tokens_of_the_engine() {
    let trial = Trial {
        seed: 41,
        requests: 2_000,
        load: MIXED_LOAD,
        sim: FORCED,
        yaml: "capture: tap\n",
    };
    let books = Books::keep(&trial).await;
    assert_eq!(books.rows.len(), 2_000);
    let mut teams: BTreeMap<&str, [Work; 2]> = BTreeMap::new();
    for row in books.rows.values() {
        check_direct(row);
        if row.event.outcome == Outcome::Completed {
            assert_eq!(row.event.usage_source, UsageSource::Reported, "{row:?}");
            assert_eq!(row.booked(), row.work, "{row:?}");
            let [booked, work] = teams.entry(&row.seen.team).or_default();
            *booked += row.booked();
            *work += row.work;
        }
    }
    assert_eq!(teams.len(), 5);
    for (team, [booked, work]) in teams {
        assert!(
            booked == work && work.completion > 0,
            "{team}: {booked:?} of {work:?}"
        );
    }
    assert!(books.ended(Outcome::Completed).count() > 1_800);
    let direct = metric_sum(
        &books.metrics,
        "gateway_tap_exchanges_total",
        &["whose=\"direct\""],
    );
    assert_eq!(direct, 2_000.0);
    for nothing in [
        "gateway_tap_lost_records_total",
        "gateway_tap_malformed_packets_total",
    ] {
        assert_eq!(metric_sum(&books.metrics, nothing, &[]), 0.0, "{nothing}");
    }
}

/// Who asked, and what came of it, as the client has it.
fn check_direct(row: &Row) {
    let Row { seen, event, .. } = row;
    assert_eq!(
        (&*event.team_id, &*event.upstream, event.capture),
        (&*seen.team, "chat", CapturedBy::Tap),
        "{row:?}"
    );
    let (project, user) = (seen.project.as_deref(), seen.user.as_deref());
    assert_eq!(
        (&*event.project, &*event.user_id),
        (project.unwrap_or_default(), user.unwrap_or_default()),
        "{row:?}"
    );
    let ends: &[Outcome] = match seen.outcome.as_str() {
        "ok" => &[Outcome::Completed],
        "http_error" => &[Outcome::ServerError],
        // A client that leaves may have been sent everything already.
        "aborted" => &[Outcome::Aborted, Outcome::Completed],
        other => panic!("no request was to end as {other}: {row:?}"),
    };
    assert!(ends.contains(&event.outcome), "{row:?}");
    if let Some(status) = seen.status {
        assert_eq!(event.status_code, status, "{row:?}");
    }
    if seen.outcome == "ok" && seen.stream {
        assert_eq!(event.chunks, seen.chunks, "{row:?}");
    }
    assert_eq!(event.tap_duration_us, Some(event.duration_us), "{row:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_usage_nothing_is_guessed() {
    let trial = Trial {
        seed: 42,
        requests: 300,
        load: &[
            "--endpoints",
            "chat=1,completions=1",
            "--stream-fraction",
            "0.5",
            "--include-usage-fraction",
            "0",
            "--concurrency",
            "16",
        ],
        sim: &["--instant"],
        yaml: "capture: tap\n",
    };
    let books = Books::keep(&trial).await;
    let streams = books.rows.values().filter(|row| row.seen.stream);
    for row in streams.clone() {
        let event = &row.event;
        assert_eq!(
            (event.outcome, event.usage_source),
            (Outcome::Completed, UsageSource::None),
            "{row:?}"
        );
        let tokens = [
            event.prompt_tokens,
            event.completion_tokens,
            event.engine_prompt_tokens,
            event.engine_completion_tokens,
        ];
        assert_eq!(tokens, [None; 4], "{row:?}");
        assert!(event.chunks > 0 && event.ttft_us.is_some(), "{row:?}");
    }
    assert!(streams.count() > 100);
    let whole = books.rows.values().filter(|row| !row.seen.stream);
    for row in whole {
        assert_eq!(
            (row.booked(), row.event.usage_source),
            (row.work, UsageSource::Reported),
            "{row:?}"
        );
    }
}

/// A system call on a socket: the bytes of its direction that it moved, and `CLOCK_MONOTONIC` around it.
#[derive(Clone, Copy, Debug, serde::Deserialize)]
struct Call {
    offset: u64,
    len: u64,
    before_ns: u64,
    after_ns: u64,
}

fn now_ns() -> u64 {
    vllm_gateway::clock::now().0
}

/// The call that moved the byte at `offset`.
fn call_of(calls: &[Call], offset: u64) -> Call {
    let found = calls
        .iter()
        .find(|call| (call.offset..call.offset + call.len).contains(&offset));
    *found.unwrap_or_else(|| panic!("nobody moved byte {offset}"))
}

/// Where the probe saw a run of payload, and when.
#[derive(Debug)]
struct Sighting {
    at_ns: u64,
    offset: u64,
    len: u64,
}

#[tokio::test(flavor = "multi_thread")]
async fn kernel_times_lie_between_the_readings_of_the_two_ends() {
    let sim = Sim::start(&[
        "--model",
        "tiny",
        "--introspect",
        "--log-sockets",
        "--step-base-us",
        "1000",
    ]);
    let yaml = format!(
        "tap: {{reattach: false}}\nupstreams: [{{name: chat, url: \"{}\", serves: generate}}]\n",
        sim.url()
    );
    let config = Config::parse("test.yaml", &yaml, &|_| None).expect("it is valid");
    let tap = Tap::attach(&config, std::process::Command::new("nothing")).expect("the probe loads");
    let mut source = tap.into_source(&config);
    let mut client = TcpStream::connect(sim.addr).expect("a connection");
    client.set_nodelay(true).expect("a socket option");
    let own = client.local_addr().expect("an address");
    let mut written: Vec<Call> = Vec::new();
    for _ in 0..30 {
        let request = String::from_utf8(chat("t", true))
            .expect("text")
            .replace("Connection: close\r\n", "");
        let before_ns = now_ns();
        client.write_all(request.as_bytes()).expect("it is sent");
        let (after_ns, len) = (now_ns(), request.len() as u64);
        let offset = written.last().map_or(0, |call| call.offset + call.len);
        written.push(Call {
            offset,
            len,
            before_ns,
            after_ns,
        });
        let mut response = Vec::new();
        while !response.ends_with(b"0\r\n\r\n") {
            let mut buffer = [0; 4096];
            let read = client.read(&mut buffer).expect("the response");
            assert!(read > 0, "{}", String::from_utf8_lossy(&response));
            response.extend_from_slice(&buffer[..read]);
        }
    }
    let (mut arrived, mut left, mut began) = (Vec::new(), Vec::new(), [None; 2]);
    while source.drain(64, &mut |segment| {
        if segment.client != own {
            return;
        }
        let (direction, seen) = match segment.direction {
            Direction::ToServer => (0, &mut arrived),
            Direction::ToClient => (1, &mut left),
        };
        if segment.syn {
            began[direction] = Some(segment.payload_sequence());
        } else if segment.len_bytes > 0 {
            let first: u32 = began[direction].expect("the handshake comes first");
            seen.push(Sighting {
                at_ns: segment.at.0,
                offset: u64::from(segment.sequence.wrapping_sub(first)),
                len: u64::from(segment.len_bytes),
            });
        }
    }) == 64
    {}
    let log = String::from_utf8(
        exchange(
            sim.addr,
            b"GET /sim/sockets HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n",
        )
        .await,
    )
    .expect("text");
    let of = |op: &str| -> Vec<Call> {
        let lines = log
            .lines()
            .filter(|line| line.contains(&format!("\"client\":\"{own}\",\"op\":\"{op}\"")));
        lines
            .map(|line| serde_json::from_str(line).expect("a call"))
            .collect()
    };
    let (reads, writes) = (of("read"), of("write"));
    assert!(
        arrived.len() >= 30 && left.len() >= 150,
        "{} {}",
        arrived.len(),
        left.len()
    );
    for seen in &arrived {
        let (sent, read) = (
            call_of(&written, seen.offset),
            call_of(&reads, seen.offset + seen.len - 1),
        );
        assert!(
            (sent.before_ns..=read.after_ns).contains(&seen.at_ns),
            "{seen:?} {sent:?} {read:?}"
        );
    }
    for seen in &left {
        let write = call_of(&writes, seen.offset + seen.len - 1);
        assert!(
            (write.before_ns..=write.after_ns).contains(&seen.at_ns),
            "{seen:?} {write:?}"
        );
    }
}

/// What both paths must agree on.
fn essence(event: &RequestEvent) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        [
            event.prompt_tokens,
            event.cached_tokens,
            event.completion_tokens,
            event.reasoning_tokens,
        ],
        [event.engine_prompt_tokens, event.engine_completion_tokens],
        (event.status_code, event.outcome, event.finish_reason.clone()),
        (event.model.clone(), event.endpoint),
        (
            event.team_id.clone(),
            event.project.clone(),
            event.user_id.clone(),
        ),
        (event.stream, event.chunks),
    )
}

/// The default.
const ABORT_DRAIN: &str = "200ms";

/// A proxy and, with another secret, a tap before the same server: to the tap the proxy's requests are a stranger's, and so direct.
fn proxy_and_tap(server: SocketAddr, abort_drain: &str) -> (TestGateway, TestGateway) {
    let upstream =
        |name, serves| format!("  - {{name: {name}, url: \"http://{server}\", serves: {serves}}}\n");
    let upstream = format!(
        "proxy: {{abort_drain: {abort_drain}}}\nupstreams:\n{}{}",
        upstream("chat", "generate"),
        upstream("embed", "embeddings")
    );
    let tap = TestGateway::tapping(&format!("{upstream}capture: tap\n"));
    let proxy = TestGateway::start(&format!(
        "{upstream}capture: proxy\nidentity: {{forward_headers: true}}\n"
    ));
    (proxy, tap)
}

/// Holds each event of the proxy that reached the server against that of the tap.
fn compare(proxied: &[RequestEvent], tapped: &[RequestEvent]) {
    let mut by_id: BTreeMap<&str, &RequestEvent> = BTreeMap::new();
    for event in tapped {
        let twice = by_id.insert(&event.request_id, event);
        assert!(twice.is_none(), "two events of {}", event.request_id);
    }
    for event in proxied {
        let same = by_id
            .remove(&*event.request_id)
            .unwrap_or_else(|| panic!("the tap has not seen {event:?}"));
        assert_eq!(
            essence(same),
            essence(event),
            "{} {:?}",
            event.request_id,
            event.outcome
        );
    }
    assert!(by_id.is_empty(), "only the tap has {by_id:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_and_tap_book_the_same_of_the_same_traffic() {
    let sim = Sim::start(TIMED);
    let (proxy, tap) = proxy_and_tap(sim.addr, ABORT_DRAIN);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vllm-load"))
        .args([
            "--url",
            &proxy.url(),
            "--model",
            "tiny",
            "--no-progress",
            "--seed",
            "43",
            "--requests",
            "800",
        ])
        .args(MIXED_LOAD)
        .output()
        .expect("the load generator starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let proxied = proxy.events.wait_for(800);
    let tapped = tap.events.wait_for(800);
    compare(&proxied, &tapped);
    let aborted = proxied
        .iter()
        .filter(|event| event.outcome == Outcome::Aborted)
        .count();
    assert!(aborted > 5, "clients were to leave, {aborted} did");
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_and_tap_book_the_same_of_every_capture() {
    let replay = Replay::start().await;
    let (proxy, tap) = proxy_and_tap(replay.addr, ABORT_DRAIN);
    let mut count = 0;
    for (index, capture) in Capture::all().iter().enumerate() {
        // How an answer to a client that leaves ends depends on when it leaves; that has a test of its own.
        // The gateway answers health checks itself.
        if capture.is_aborted() || capture.name == "health" {
            continue;
        }
        for cut in [Cut::Whole, Cut::Random(index as u64)] {
            replay.play(capture, cut);
            for request in capture.requests() {
                let request = named(&request, &format!("replay-{count}"));
                count += 1;
                exchange(proxy.addr, &request).await;
            }
        }
    }
    assert!(count > 80, "{count}");
    let proxied = proxy.events.wait_for(count);
    let tapped = tap.events.wait_for(count);
    compare(&proxied, &tapped);
}

/// A client that leaves, and what its server does about it.
struct Leaving {
    /// What the client has read when it leaves.
    before: String,
    /// What the server sends when it has been told.
    behind: String,
    outcome: Outcome,
    status_code: u16,
    chunks: u64,
}

impl Leaving {
    fn cases() -> Vec<Leaving> {
        let whole = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
        let failed = "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n";
        let done = chunk("data: [DONE]\n\n");
        let stream = |tokens: usize| STREAM_HEAD.to_owned() + &token("a").repeat(tokens);
        let case = |before: String, behind: String, (outcome, status_code, chunks)| Leaving {
            before,
            behind,
            outcome,
            status_code,
            chunks,
        };
        vec![
            case(String::new(), whole.into(), (Outcome::Completed, 200, 0)),
            case(String::new(), failed.into(), (Outcome::ServerError, 500, 0)),
            case(String::new(), stream(2) + &end(2), (Outcome::Completed, 200, 2)),
            case(stream(1), token("a") + &end(2), (Outcome::Completed, 200, 2)),
            case(stream(1), done, (Outcome::Completed, 200, 1)),
            case(
                stream(2) + &end(2)[..40],
                end(2)[40..].into(),
                (Outcome::Completed, 200, 2),
            ),
            case(stream(1), token("a"), (Outcome::Aborted, 200, 2)),
            case(stream(1), String::new(), (Outcome::Aborted, 200, 1)),
            case(String::new(), stream(1), (Outcome::Aborted, 200, 1)),
            case(String::new(), whole[..40].into(), (Outcome::Aborted, 0, 0)),
            case(String::new(), String::new(), (Outcome::Aborted, 0, 0)),
        ]
    }
}

/// What a server sends behind its client's end comes in that order on every run: the server waits for the end.
#[tokio::test(flavor = "multi_thread")]
async fn proxy_and_tap_book_the_same_of_a_client_that_leaves_before_the_last_byte() {
    let server = Upstream::start(|mut talk: Talk| async move {
        let request = talk.request().await.unwrap_or_default();
        let Leaving { before, behind, .. } = &Leaving::cases()[number_of(&request)];
        talk.send(before).await;
        talk.until_half_closed().await;
        talk.send(behind).await;
    })
    .await;
    // Longer than any machine is too busy to take a byte out of a socket.
    let (proxy, tap) = proxy_and_tap(server.addr, "30s");
    let cases = Leaving::cases();
    for (number, case) in cases.iter().enumerate() {
        leave(&proxy, &server, number, &case.before).await;
        proxy.events.wait_for(number + 1);
    }
    let proxied = proxy.events.wait_for(cases.len());
    compare(&proxied, &tap.events.wait_for(cases.len()));
    for (event, case) in proxied.iter().zip(&cases) {
        assert_eq!(
            (event.outcome, event.status_code, event.chunks),
            (case.outcome, case.status_code, case.chunks),
            "{event:?}"
        );
    }
}

/// A server that goes on for longer than a client that left is waited for has been left, whatever it still sends.
#[tokio::test(flavor = "multi_thread")]
async fn proxy_and_tap_book_the_same_of_an_answer_that_comes_too_late() {
    let given_up = Arc::new(Notify::new());
    let waited = Arc::clone(&given_up);
    let server = Upstream::start(move |mut talk: Talk| {
        let waited = Arc::clone(&waited);
        async move {
            talk.request().await;
            talk.send(STREAM_HEAD.to_owned() + &token("a")).await;
            talk.until_half_closed().await;
            waited.notified().await;
            talk.send(token("a") + &end(2)).await;
        }
    })
    .await;
    let (proxy, tap) = proxy_and_tap(server.addr, "50ms");
    leave(&proxy, &server, 0, &(STREAM_HEAD.to_owned() + &token("a"))).await;
    let proxied = proxy.events.wait_for(1);
    given_up.notify_one();
    compare(&proxied, &tap.events.wait_for(1));
    assert_eq!((proxied[0].outcome, proxied[0].chunks), (Outcome::Aborted, 1));
}

/// Has a client leave the request of that number once the server has it and the tokens of `sent` have come.
async fn leave(proxy: &TestGateway, server: &Upstream, number: usize, sent: &str) {
    let mut client = tokio::net::TcpStream::connect(proxy.addr)
        .await
        .expect("a connection");
    let body = r#"{"model":"m","stream":true,"messages":[]}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: v\r\nX-Team-ID: leaves\r\nX-Request-Id: leaves-{number}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    client
        .write_all(request.as_bytes())
        .await
        .expect("the request is taken");
    support::eventually("the request at the server", async || {
        (server.seen.count() > number).then_some(())
    })
    .await;
    let tokens = |text: &str| text.matches("\"content\"").count();
    let mut seen = Vec::new();
    while tokens(&String::from_utf8_lossy(&seen)) < tokens(sent) {
        let read = tokio::time::timeout(support::DEADLINE, client.read_buf(&mut seen)).await;
        assert!(read.expect("in time").expect("no reset") > 0, "the stream ended");
    }
}

fn number_of(request: &str) -> usize {
    let (_, rest) = request.split_once("leaves-").expect("the request's id");
    let digits = rest.split(|other: char| !other.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).expect("a number")
}

/// The request with a team, an id of its own, and the connection's end behind it.
fn named(request: &[u8], id: &str) -> Vec<u8> {
    let (head, body) = (replay::head(request), replay::body(request));
    let head = String::from_utf8(head.to_vec()).expect("text");
    let kept = head.trim_end().split("\r\n").filter(|line| {
        let name = line.split(':').next().expect("a name").to_ascii_lowercase();
        ![
            "x-team-id",
            "x-request-id",
            "connection",
            "x-project",
            "x-user-id",
        ]
        .contains(&name.as_str())
    });
    let head = kept.collect::<Vec<_>>().join("\r\n");
    let head = format!("{head}\r\nX-Team-ID: replay\r\nX-Request-Id: {id}\r\nConnection: close\r\n\r\n");
    [head.as_bytes(), body].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn with_both_each_event_has_both_clocks_and_there_is_one() {
    let sim = Sim::start(TIMED);
    let upstream = format!(
        "upstreams: [{{name: chat, url: \"{}\", serves: generate}}]\n",
        sim.url()
    );
    let gateway = TestGateway::tapping(&format!("{upstream}capture: proxy+tap\n"));
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vllm-load"))
        .args([
            "--url",
            &gateway.url(),
            "--model",
            "tiny",
            "--no-progress",
            "--seed",
            "44",
            "--requests",
            "400",
        ])
        .args([
            "--endpoints",
            "chat=1,completions=1",
            "--stream-fraction",
            "0.33",
            "--concurrency",
            "16",
            "--output-tokens",
            "2..24",
        ])
        .output()
        .expect("the load generator starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let events = gateway.events.wait_for(400);
    for event in &events {
        assert_eq!(
            (event.outcome, event.capture),
            (Outcome::Completed, CapturedBy::ProxyAndTap),
            "{event:?}"
        );
        let engine_us = event.tap_duration_us.expect("the kernel's time");
        assert!(
            engine_us <= event.duration_us,
            "the server's part is a part: {event:?}"
        );
        assert_eq!(event.tap_ttft_us.is_some(), event.ttft_us.is_some(), "{event:?}");
        let overhead_us = event.gateway_overhead_us.expect("what the gateway added");
        assert!(overhead_us + engine_us <= event.duration_us, "{event:?}");
    }
    let metrics = gateway.metrics().await;
    let exchanges = |whose: &str| {
        metric_sum(
            &metrics,
            "gateway_tap_exchanges_total",
            &[&format!("whose=\"{whose}\"")],
        )
    };
    assert_eq!(
        (exchanges("own"), exchanges("direct"), exchanges("late")),
        (400.0, 0.0, 0.0)
    );
    assert_eq!(gateway.events.now().len(), 400);
    // The same request past the gateway is direct traffic, and one event more.
    exchange(sim.addr, &chat("direct", false)).await;
    let events = gateway.events.wait_for(401);
    assert_eq!(
        (&*events[400].team_id, events[400].capture),
        ("direct", CapturedBy::Tap)
    );
}

fn chat(team: &str, stream: bool) -> Vec<u8> {
    support::post(
        "/v1/chat/completions",
        team,
        &format!(
            "{{\"model\":\"tiny\",\"stream\":{stream},\"max_tokens\":4,\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}]}}"
        ),
    )
}

/// One connection whose both ends the test holds, with a tap beside the server.
struct Wire {
    gateway: TestGateway,
    listener: TcpListener,
}

impl Wire {
    fn on(address: &str) -> Wire {
        let listener = TcpListener::bind((address, 0)).expect("a port");
        let addr = listener.local_addr().expect("an address");
        let yaml =
            format!("capture: tap\nupstreams: [{{name: chat, url: \"http://{addr}\", serves: generate}}]\n");
        Wire {
            gateway: TestGateway::tapping(&yaml),
            listener,
        }
    }

    fn connect(&self) -> (TcpStream, TcpStream) {
        let client =
            TcpStream::connect(self.listener.local_addr().expect("an address")).expect("a connection");
        let own = client.local_addr().expect("an address");
        // The gateway's own health checks and scrapes come here too.
        let mut accepted = std::iter::repeat_with(|| self.listener.accept().expect("a connection"));
        let (server, _) = accepted.find(|(_, peer)| *peer == own).expect("it is there");
        for end in [&client, &server] {
            end.set_nodelay(true).expect("a socket option");
            end.set_read_timeout(Some(support::DEADLINE)).expect("a timeout");
        }
        (client, server)
    }

    /// The event that comes next.
    fn event(&self, number: usize) -> RequestEvent {
        self.gateway.events.wait_for(number + 1)[number].clone()
    }
}

fn request(team: &str) -> Vec<u8> {
    let body = "{\"model\":\"m\",\"stream\":true,\"messages\":[]}";
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: v\r\nX-Team-ID: {team}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

fn chunk(payload: &str) -> String {
    format!("{:x}\r\n{payload}\r\n", payload.len())
}

fn token(text: &str) -> String {
    chunk(&format!(
        "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}]}}\n\n"
    ))
}

/// The end of a stream of so many tokens.
fn end(tokens: usize) -> String {
    let usage = format!(
        "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"model\":\"m\",\"choices\":[],\"usage\":{{\"prompt_tokens\":7,\"completion_tokens\":{tokens},\"total_tokens\":{}}}}}\n\n",
        7 + tokens
    );
    chunk(&usage) + &chunk("data: [DONE]\n\n") + "0\r\n\r\n"
}

fn read(stream: &mut TcpStream, len: usize) {
    stream.read_exact(&mut vec![0; len]).expect("all of it");
}

fn assert_stream(event: &RequestEvent, team: &str, tokens: u64) {
    assert_eq!(
        (
            &*event.team_id,
            event.outcome,
            event.chunks,
            event.completion_tokens
        ),
        (team, Outcome::Completed, tokens, Some(tokens)),
        "{event:?}"
    );
}

/// Answers one request on the connection, in pieces.
fn answer(client: &mut TcpStream, server: &mut TcpStream, team: &str, pieces: &[&[u8]]) {
    let request = request(team);
    client.write_all(&request).expect("it is sent");
    read(server, request.len());
    let len = pieces.iter().map(|piece| piece.len()).sum();
    let mut client = client.try_clone().expect("a clone");
    let reader = std::thread::spawn(move || read(&mut client, len));
    for piece in pieces {
        server.write_all(piece).expect("it is sent");
    }
    reader.join().expect("all of it");
}

#[test]
fn a_thousand_requests_on_one_connection() {
    for address in ["127.0.0.1", "::1"] {
        let wire = Wire::on(address);
        let (mut client, mut server) = wire.connect();
        let response = STREAM_HEAD.to_owned() + &token("a") + &end(1);
        for n in 0..1_000 {
            answer(
                &mut client,
                &mut server,
                &format!("team-{n}"),
                &[response.as_bytes()],
            );
        }
        let events = wire.gateway.events.wait_for(1_000);
        for (n, event) in events.iter().enumerate() {
            assert_stream(event, &format!("team-{n}"), 1);
        }
    }
}

#[test]
fn a_response_comes_in_bytes_or_in_a_megabyte() {
    let wire = Wire::on("127.0.0.1");
    let (mut client, mut server) = wire.connect();
    let response = STREAM_HEAD.to_owned() + &token("a") + &token("b") + &end(2);
    // Head and first chunk in one write, then each byte in one of its own.
    let bytes: Vec<&[u8]> = response.as_bytes().chunks(1).collect();
    answer(&mut client, &mut server, "bytewise", &bytes);
    assert_stream(&wire.event(0), "bytewise", 2);
    answer(&mut client, &mut server, "one-write", &[response.as_bytes()]);
    assert_stream(&wire.event(1), "one-write", 2);
    let large = "x".repeat(1 << 20);
    let response = STREAM_HEAD.to_owned() + &token("a") + &token(&large) + &token("c") + &end(3);
    answer(&mut client, &mut server, "megabyte", &[response.as_bytes()]);
    let event = wire.event(2);
    assert_stream(&event, "megabyte", 3);
    assert!(event.response_bytes > 1 << 20, "{event:?}");
}

#[test]
fn a_slow_reader_gets_coalesced_events_and_each_is_seen() {
    let wire = Wire::on("127.0.0.1");
    let (mut client, mut server) = wire.connect();
    let request = request("slow");
    client.write_all(&request).expect("it is sent");
    read(&mut server, request.len());
    // Nobody reads, so that the socket's buffer fills with events that leave together later.
    let event = token(&"y".repeat(200));
    server.set_nonblocking(true).expect("a socket option");
    server.write_all(STREAM_HEAD.as_bytes()).expect("it is sent");
    let (mut events, mut len) = (0, STREAM_HEAD.len());
    let mut rest: &[u8] = event.as_bytes();
    loop {
        match server.write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        if rest.is_empty() {
            (rest, events, len) = (event.as_bytes(), events + 1, len + event.len());
        }
    }
    server.set_nonblocking(false).expect("a socket option");
    let last = [rest, end(events + 1).as_bytes()].concat();
    let total = len + event.len() + end(events + 1).len();
    let reader = std::thread::spawn(move || read(&mut client, total));
    server.write_all(&last).expect("it is sent");
    reader.join().expect("all of it");
    assert!(events > 500, "{events}");
    assert_stream(&wire.event(0), "slow", events as u64 + 1);
}

#[test]
fn pipelined_requests_are_paired_with_their_responses() {
    let wire = Wire::on("127.0.0.1");
    let (mut client, mut server) = wire.connect();
    let requests = [request("first"), request("second"), request("third")].concat();
    client.write_all(&requests).expect("they are sent");
    read(&mut server, requests.len());
    for tokens in 1..=3 {
        let response = STREAM_HEAD.to_owned() + &token("a").repeat(tokens) + &end(tokens);
        server.write_all(response.as_bytes()).expect("it is sent");
        read(&mut client, response.len());
    }
    for (n, team) in ["first", "second", "third"].into_iter().enumerate() {
        assert_stream(&wire.event(n), team, n as u64 + 1);
    }
}

#[test]
fn a_client_that_leaves_has_aborted_and_what_it_had_used_is_known() {
    let wire = Wire::on("127.0.0.1");
    let (mut client, mut server) = wire.connect();
    let request = request("leaves");
    client.write_all(&request).expect("it is sent");
    read(&mut server, request.len());
    let running = |count: usize| {
        chunk(&format!(
            "data: {{\"id\":\"c\",\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"a\"}},\"finish_reason\":null}}],\
             \"usage\":{{\"prompt_tokens\":7,\"completion_tokens\":{count},\"total_tokens\":{}}}}}\n\n",
            7 + count
        ))
    };
    let sent = STREAM_HEAD.to_owned() + &running(1) + &running(2);
    server.write_all(sent.as_bytes()).expect("it is sent");
    read(&mut client, sent.len());
    client.shutdown(Shutdown::Write).expect("it leaves");
    assert_eq!(server.read(&mut [0]).expect("the end"), 0);
    server.write_all(running(3).as_bytes()).expect("it is sent");
    drop(server);
    let event = wire.event(0);
    assert_eq!(
        (event.outcome, event.usage_source, event.completion_tokens),
        (Outcome::Aborted, UsageSource::Continuous, Some(3)),
        "{event:?}"
    );
}

#[test]
fn a_tap_that_comes_in_the_middle_sees_the_next_request() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let addr = listener.local_addr().expect("an address");
    let mut client = TcpStream::connect(addr).expect("a connection");
    let (mut server, _) = listener.accept().expect("a connection");
    let before = request("before");
    client.write_all(&before).expect("it is sent");
    read(&mut server, before.len());
    let half = STREAM_HEAD.to_owned() + &token("a");
    server.write_all(half.as_bytes()).expect("it is sent");
    let yaml =
        format!("capture: tap\nupstreams: [{{name: chat, url: \"http://{addr}\", serves: generate}}]\n");
    let wire = Wire {
        gateway: TestGateway::tapping(&yaml),
        listener,
    };
    let rest = token("b") + &end(2);
    server.write_all(rest.as_bytes()).expect("it is sent");
    read(&mut client, half.len() + rest.len());
    let response = STREAM_HEAD.to_owned() + &token("a") + &end(1);
    answer(&mut client, &mut server, "after", &[response.as_bytes()]);
    assert_stream(&wire.event(0), "after", 1);
    assert_eq!(
        wire.gateway.events.now().len(),
        1,
        "nothing is invented of the request before"
    );
}

#[test]
fn another_protocol_is_counted_and_the_next_connection_is_read() {
    let wire = Wire::on("127.0.0.1");
    let (mut client, mut server) = wire.connect();
    // The beginning of a TLS ClientHello (RFC 8446, sections 4.1.2 and 5.1), and noise.
    let hello = [&[22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3][..], &[7; 194]].concat();
    client.write_all(&hello).expect("it is sent");
    read(&mut server, hello.len());
    server.write_all(&[9; 300]).expect("it is sent");
    read(&mut client, 300);
    drop((client, server));
    let (mut client, mut server) = wire.connect();
    let response = STREAM_HEAD.to_owned() + &token("a") + &end(1);
    answer(&mut client, &mut server, "reads-on", &[response.as_bytes()]);
    assert_stream(&wire.event(0), "reads-on", 1);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let metrics = runtime.block_on(wire.gateway.metrics());
    assert_eq!(
        metric_sum(&metrics, "gateway_tap_unreadable_connections_total", &[]),
        1.0
    );
    assert!(metric_sum(&metrics, "gateway_tap_opaque_bytes_total", &[]) >= 205.0);
}

#[test]
fn requests_under_way_when_the_gateway_ends_have_their_event() {
    let wire = Wire::on("127.0.0.1");
    let (mut client, mut server) = wire.connect();
    let request = request("cut-off");
    client.write_all(&request).expect("it is sent");
    read(&mut server, request.len());
    let events = std::sync::Arc::clone(&wire.gateway.events);
    wire.gateway.drained();
    let events = events.now();
    assert_eq!(events.len(), 1);
    assert_eq!(
        (&*events[0].team_id, events[0].outcome),
        ("cut-off", Outcome::Incomplete)
    );
}

#[test]
fn a_port_that_is_not_watched_is_not_seen() {
    let wire = Wire::on("127.0.0.1");
    let other = Wire::on("127.0.0.1");
    let (mut client, mut server) = other.connect();
    let response = STREAM_HEAD.to_owned() + &token("a") + &end(1);
    answer(&mut client, &mut server, "elsewhere", &[response.as_bytes()]);
    assert_stream(&other.event(0), "elsewhere", 1);
    let (mut client, mut server) = wire.connect();
    answer(&mut client, &mut server, "here", &[response.as_bytes()]);
    assert_stream(&wire.event(0), "here", 1);
    assert_eq!(
        (wire.gateway.events.now().len(), other.gateway.events.now().len()),
        (1, 1)
    );
}

#[test]
fn idle_connections_cost_nothing_that_grows() {
    let wire = Wire::on("127.0.0.1");
    let response = STREAM_HEAD.to_owned() + &token("a") + &end(1);
    for _ in 0..200 {
        let (mut client, mut server) = wire.connect();
        answer(&mut client, &mut server, "once", &[response.as_bytes()]);
    }
    wire.gateway.events.wait_for(200);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(support::eventually(
        "closed connections to be forgotten",
        async || {
            let metrics = wire.gateway.metrics().await;
            (metric_sum(&metrics, "gateway_tap_connections", &[]) == 0.0).then_some(())
        },
    ));
}

/// With a probe a gap need not be guessed at: it saw who else was there.
#[tokio::test(flavor = "multi_thread")]
async fn requests_of_another_gateway_and_past_all_gateways_are_named_as_causes_of_a_gap() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let yaml = |id: &str, capture: &str| {
        format!(
            "gateway: {{id: {id}, secret: 0123456789abcdef0123456789abcdef}}\ncapture: {capture}\n\
             upstreams: [{{name: chat, url: \"{}\", serves: generate}}]\nvllm: {{scrape_interval: 20ms}}\n\
             ledger: {{settle_after: 200ms}}\nreconciliation: {{gap_tokens: 20}}\n",
            sim.url()
        )
    };
    let gateway = TestGateway::tapping(&yaml("one", "proxy+tap"));
    let other = TestGateway::start(&yaml("two", "proxy"));
    let cause_is = async |cause: &str| {
        let label = format!("cause=\"{cause}\"");
        let text = gateway.metrics().await;
        metric_sum(&text, "gateway_reconciliation_gap_cause", &[&label]) == 1.0
    };
    support::eventually("the first scrape", async || {
        let text = gateway.metrics().await;
        (metric_sum(&text, "gateway_scrape_success", &[]) == 1.0).then_some(())
    })
    .await;
    let body = r#"{"model":"tiny","ignore_eos":true,"max_tokens":40,"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
    let request = support::post("/v1/chat/completions", "a", body);
    exchange(other.addr, &request).await;
    support::eventually("the other gateway to be named", async || {
        cause_is("other_gateway").await.then_some(())
    })
    .await;
    assert!(!cause_is("direct").await && !cause_is("direct_unseen").await);
    exchange(sim.addr, &request).await;
    support::eventually("the direct request to be named", async || {
        cause_is("direct").await.then_some(())
    })
    .await;
    assert!(
        cause_is("other_gateway").await,
        "it is looked back on for an hour"
    );
}
