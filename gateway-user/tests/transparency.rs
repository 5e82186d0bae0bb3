//! Clients get byte for byte what they would have got without the gateway, upstreams what clients sent, and events what the engine
//! counted: for every real capture, whatever is asked on the client's behalf, and however the bytes are cut.
//!
//! What may differ in heads is written down in `replay/heads.rs`, and compared exactly. The three captures of a triple are three runs of
//! one request; what differs between runs is masked (`replay/stream.rs`), and only where one capture is held against another.

mod replay;
mod support;

use replay::event::{assert_engine_tokens, assert_event};
use replay::heads::{assert_request_kept, assert_same, delivered_head, text};
use replay::stream::assert_same_stream;
use replay::{Capture, Cut, Replay, asked, body, head, read_message};
use support::{DEADLINE, TestGateway};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vllm_gateway::event::RequestEvent;

const TRIPLES: [&str; 5] = [
    "triple_chat",
    "triple_chat_n2",
    "triple_completion",
    "triple_logprobs",
    "triple_tool",
];
const VARIANTS: [&str; 3] = ["none", "final", "continuous"];
const MODES: [&str; 4] = ["auto", "continuous", "final", "off"];

/// A client's connection through a gateway to the replay, and what has been seen so far.
struct Path {
    replay: Replay,
    gateway: TestGateway,
    stream: TcpStream,
    unread: Vec<u8>,
    events: usize,
}

impl Path {
    async fn new(inject: &str) -> Path {
        let replay = Replay::start().await;
        let more = format!("usage: {{inject: {inject}}}\n");
        let gateway = TestGateway::before(replay.addr, Some(replay.addr), &more);
        let stream = connect(&gateway).await;
        Path {
            replay,
            gateway,
            stream,
            unread: Vec::new(),
            events: 0,
        }
    }

    /// The next response, as the client sees it.
    async fn response(&mut self) -> Vec<u8> {
        let read = tokio::time::timeout(DEADLINE, read_message(&mut self.stream, &mut self.unread)).await;
        read.expect("a response in time")
            .expect("the connection stays open")
    }

    /// The event of the request that was sent last.
    fn event(&mut self) -> RequestEvent {
        self.events += 1;
        let mut events = self.gateway.events.wait_for(self.events);
        assert_eq!(events.len(), self.events, "one event a request");
        events.pop().expect("an event")
    }

    /// Sends one request on the connection; gives what the client got, what the upstream got, and the event.
    async fn ask(&mut self, request: &[u8]) -> (Vec<u8>, Vec<u8>, RequestEvent) {
        self.stream.write_all(request).await.expect("the gateway listens");
        let response = self.response().await;
        let mut received = self.replay.received();
        assert_eq!(
            received.len(),
            1,
            "one request goes upstream, and the client got {}",
            text(&response)
        );
        (response, received.remove(0), self.event())
    }

    /// The connection carries nothing beyond the responses that were read.
    async fn ends(mut self) {
        self.stream.shutdown().await.expect("the gateway listens");
        let mut rest = std::mem::take(&mut self.unread);
        let read = tokio::time::timeout(DEADLINE, self.stream.read_to_end(&mut rest)).await;
        read.expect("the gateway closes too").expect("no reset");
        assert_eq!(
            String::from_utf8_lossy(&rest),
            "",
            "nothing behind the last response"
        );
        assert_eq!(
            self.gateway.events.now().len(),
            self.events,
            "one event a request"
        );
    }
}

async fn connect(gateway: &TestGateway) -> TcpStream {
    let stream = TcpStream::connect(gateway.addr).await.expect("a connection");
    stream.set_nodelay(true).expect("a socket option");
    stream
}

/// A capture's request as a client of the gateway sends it: some captures were made without a team.
fn with_team(request: &[u8]) -> Vec<u8> {
    let mut head = text(head(request));
    if !head.contains("\r\nX-Team-ID: ") {
        head = head.replacen("\r\n\r\n", "\r\nX-Team-ID: search\r\n\r\n", 1);
    }
    [head.as_bytes(), body(request)].concat()
}

/// What vLLM must be asked when the client asks `variant` under `usage.inject: mode`.
fn asked_upstream(mode: &str, variant: &str) -> &'static str {
    match (mode, variant) {
        ("off", "none") => "none",
        ("off" | "final", "final") | ("final", "none") => "final",
        _ => "continuous",
    }
}

/// The edited body without the edit.
fn unedited(body: &str, variant: &str) -> String {
    const CONTINUOUS: &str = r#","continuous_usage_stats":true"#;
    match variant {
        "none" => {
            let body = body.replacen(CONTINUOUS, "", 1);
            body.replacen(r#","stream_options":{"include_usage":true}"#, "", 1)
        }
        _ => body.replacen(CONTINUOUS, "", 1),
    }
}

/// One request of a triple through the gateway, with all that must hold.
async fn check_triple(path: &mut Path, triple: &str, variant: &str, cut: Cut, upstream_variant: &str) {
    let name = format!("{triple}_{variant} asked as {upstream_variant}, {cut:?}");
    let wanted = Capture::load(&format!("{triple}_{variant}"));
    let served = Capture::load(&format!("{triple}_{upstream_variant}"));
    path.replay.play_triple(triple, cut);
    let (got, received, event) = path.ask(&wanted.request).await;
    assert_eq!(
        asked(&received),
        upstream_variant,
        "{name}: what the upstream was asked"
    );
    let edited = variant != upstream_variant;
    assert_request_kept(&name, &wanted.request, &received, &event, edited);
    assert_eq!(
        unedited(&text(body(&received)), if edited { variant } else { "" }),
        unedited(&text(body(&wanted.request)), ""),
        "{name}"
    );
    assert_eq!(
        text(head(&got)),
        delivered_head(head(&served.response), &event),
        "{name}: the client's head"
    );
    if edited {
        assert_same_stream(&name, body(&got), body(&wanted.response));
    } else {
        assert_same(
            &text(body(&got)),
            &text(body(&served.response)),
            &format!("{name}, nothing was to be edited"),
        );
    }
    assert_event(&name, &event, &wanted.request, &served.response, false);
    let counted = assert_engine_tokens(&served, &[event]);
    assert_eq!(
        counted,
        upstream_variant != "none",
        "{name}: usage tells the engine's tokens"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_get_what_they_asked_for_and_no_more() {
    for mode in MODES {
        let mut path = Path::new(mode).await;
        for triple in TRIPLES {
            for variant in VARIANTS {
                for cut in [Cut::Whole, Cut::Random(1), Cut::Random(2), Cut::Random(3)] {
                    check_triple(&mut path, triple, variant, cut, asked_upstream(mode, variant)).await;
                }
            }
        }
        path.ends().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_come_byte_by_byte_are_edited_the_same() {
    let mut path = Path::new("auto").await;
    for triple in TRIPLES {
        for variant in VARIANTS {
            check_triple(&mut path, triple, variant, Cut::Bytewise, "continuous").await;
        }
    }
    path.ends().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices_pass_untouched_until_the_fingerprint_is_known() {
    for mode in ["auto", "final"] {
        let mut path = Path::new(mode).await;
        let of_final = asked_upstream(mode, "final");
        check_triple(&mut path, "triple_chat_n2", "none", Cut::Whole, "none").await;
        // The untouched stream has shown the fingerprint.
        check_triple(
            &mut path,
            "triple_chat_n2",
            "none",
            Cut::Whole,
            asked_upstream(mode, "none"),
        )
        .await;
        check_triple(&mut path, "triple_chat_n2", "final", Cut::Whole, of_final).await;
        path.ends().await;
        // A client that asks for the final usage itself has its fingerprint there: nothing needs to be known.
        let mut path = Path::new(mode).await;
        check_triple(&mut path, "triple_chat_n2", "final", Cut::Whole, of_final).await;
        path.ends().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_capture_passes_byte_for_byte() {
    for mode in MODES {
        let mut path = Path::new(mode).await;
        let (mut exchanges, mut counted) = (0, 0);
        // `GET /health` is the gateway's own, see below.
        let passing = |capture: &Capture| {
            !capture.name.starts_with("triple_") && !capture.is_aborted() && capture.name != "health"
        };
        for capture in Capture::all().into_iter().filter(passing) {
            let mut cuts = vec![Cut::Whole, Cut::Random(4), Cut::Random(5)];
            if mode == "auto" && capture.response.len() < 4_000 {
                cuts.push(Cut::Bytewise);
            }
            for cut in cuts {
                let events = check_passing(&mut path, &capture, cut).await;
                exchanges += events.len();
                counted += usize::from(assert_engine_tokens(&capture, &events));
            }
        }
        assert!(
            exchanges >= 3 * 28 && counted >= 3 * 16,
            "{exchanges} exchanges, {counted} captures with tokens"
        );
        path.ends().await;
    }
}

/// The exchanges of a capture, one after the other on one connection. The replay ignores `stream_options`, as servers may, so nothing
/// has to be taken out whatever was asked on the client's behalf.
async fn check_passing(path: &mut Path, capture: &Capture, cut: Cut) -> Vec<RequestEvent> {
    path.replay.play(capture, cut);
    let mut events = Vec::new();
    for (request, response) in capture.requests().iter().zip(capture.responses()) {
        let name = format!("{} {cut:?}", capture.name);
        let request = with_team(request);
        let (got, received, event) = path.ask(&request).await;
        let expected = delivered_head(head(&response), &event) + &text(body(&response));
        assert_same(&text(&got), &expected, &name);
        let edited = body(&received) != body(&request);
        assert_request_kept(&name, &request, &received, &event, edited);
        assert_event(&name, &event, &request, &response, false);
        events.push(event);
    }
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_the_client_leaves_are_cut_off_with_the_engines_count() {
    for (name, cut) in [
        ("abort_stream", Cut::Whole),
        ("abort_stream", Cut::Random(6)),
        ("abort_stream_no_usage", Cut::Bytewise),
    ] {
        let mut path = Path::new("auto").await;
        let capture = Capture::load(name);
        path.replay.play(&capture, cut);
        path.stream
            .write_all(&capture.request)
            .await
            .expect("the gateway listens");
        let mut got = Vec::new();
        // All that the upstream sent, and the request id in the head, whose length is always that of 16 bytes in hex.
        let added = "x-request-id: \r\n".len() + 32;
        while got.len() < capture.response.len() + added {
            let read = tokio::time::timeout(DEADLINE, path.stream.read_buf(&mut got)).await;
            assert!(
                read.expect("in time").expect("no reset") > 0,
                "{name}: the gateway ended the stream"
            );
        }
        path.stream.shutdown().await.expect("the gateway listens");
        let event = path.event();
        let expected = delivered_head(head(&capture.response), &event) + &text(body(&capture.response));
        assert_same(&text(&got), &expected, name);
        assert_event(name, &event, &capture.request, &capture.response, true);
        assert_eq!(assert_engine_tokens(&capture, &[event]), name == "abort_stream");
    }
}

/// OpenAI's own client closes the connection once it has read `[DONE]`, often before the chunk that ends the body is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_behind_done_has_all_of_it() {
    const LAST_CHUNK: &str = "0\r\n\r\n";
    let mut path = Path::new("auto").await;
    let mut capture = Capture::load("chat_stream_usage");
    let len = capture.response.len() - LAST_CHUNK.len();
    assert_eq!(text(&capture.response.split_off(len)), LAST_CHUNK);
    capture.about["aborted_by_client"] = true.into();
    path.replay.play(&capture, Cut::Whole);
    path.stream
        .write_all(&capture.request)
        .await
        .expect("the gateway listens");
    let mut got = Vec::new();
    while !got.ends_with(b"data: [DONE]\n\n\r\n") {
        let read = tokio::time::timeout(DEADLINE, path.stream.read_buf(&mut got)).await;
        assert!(
            read.expect("in time").expect("no reset") > 0,
            "the gateway ended the stream"
        );
    }
    path.stream.shutdown().await.expect("the gateway listens");
    let event = path.event();
    let whole = Capture::load("chat_stream_usage");
    assert_event(&whole.name, &event, &whole.request, &whole.response, false);
    assert!(assert_engine_tokens(&whole, &[event]));
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_answered_in_order_on_one_connection() {
    let capture = Capture::load("keepalive_two_requests");
    let (requests, responses) = (capture.requests(), capture.responses());
    assert_eq!((requests.len(), responses.len()), (2, 2));
    for (request_cut, response_cut) in [
        (Cut::Whole, Cut::Whole),
        (Cut::Bytewise, Cut::Whole),
        (Cut::Random(7), Cut::Bytewise),
        (Cut::Random(8), Cut::Random(9)),
    ] {
        let mut path = Path::new("auto").await;
        path.replay.play(&capture, response_cut);
        request_cut
            .write(&mut path.stream, &capture.request)
            .await
            .expect("the gateway listens");
        let got = [path.response().await, path.response().await];
        let events = path.gateway.events.wait_for(2);
        path.events = 2;
        let received = path.replay.received();
        assert_eq!(received.len(), 2);
        for at in 0..2 {
            let name = format!("{request_cut:?} {response_cut:?} {at}");
            let expected = delivered_head(head(&responses[at]), &events[at]) + &text(body(&responses[at]));
            assert_same(&text(&got[at]), &expected, &name);
            assert_request_kept(&name, &requests[at], &received[at], &events[at], at == 1);
            assert_event(&name, &events[at], &requests[at], &responses[at], false);
        }
        assert_eq!(
            events.iter().map(|event| &*event.team_id).collect::<Vec<_>>(),
            ["search", "ads"]
        );
        assert!(assert_engine_tokens(&capture, &events));
        path.ends().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_health_is_answered_by_the_gateway_itself() {
    let mut path = Path::new("auto").await;
    let health = Capture::load("health");
    path.stream
        .write_all(&health.request)
        .await
        .expect("the gateway listens");
    let got = text(&path.response().await);
    assert!(
        got.starts_with("HTTP/1.1 200 OK\r\n") && got.contains("\"chat\":\"up\""),
        "{got}"
    );
    assert_eq!(path.replay.received().len(), 0, "the upstream is not asked");
    // The same connection still carries requests, and nothing was recorded of the one before.
    check_passing(&mut path, &Capture::load("version"), Cut::Whole).await;
    path.ends().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_odd_request_reaches_the_upstream_as_it_was_written() {
    let mut path = Path::new("auto").await;
    let capture = Capture::load("chat");
    // Order, case, spaces, repeated fields, bytes beyond ASCII, spaces in the body: none of the gateway's business.
    let body = "{ \"model\":\t\"tiny\",\"messages\" : [],\r\n \"x\":1e2 }";
    let odd_head = "POST /v1/chat/completions?a=%20b&c HTTP/1.1\r\nhOsT:  vllm.example:8000 \r\nX-Odd:\tone\r\nCookie: a=1\r\n\
                x-odd: two\r\nAUTHORIZATION: Bearer sk-1\r\nAccept-Encoding: gzip, br\r\nX-Note: caf\u{e9}\r\nX-Team-ID: search\r\n\
                Accept: */*\r\nX-Empty:\r\nX-Stainless-Lang: python\r\n";
    let request = format!("{odd_head}Content-Length: {}\r\n\r\n{body}", body.len());
    for cut in [Cut::Whole, Cut::Bytewise, Cut::Random(10)] {
        path.replay.play(&capture, Cut::Whole);
        cut.write(&mut path.stream, request.as_bytes())
            .await
            .expect("the gateway listens");
        let got = path.response().await;
        let (received, event) = (path.replay.received().remove(0), path.event());
        assert_request_kept(&format!("{cut:?}"), request.as_bytes(), &received, &event, false);
        let response = &capture.response;
        assert_eq!(
            text(&got),
            delivered_head(head(response), &event) + &text(replay::body(response))
        );
        assert_eq!(event.endpoint, "/v1/chat/completions");
    }
    path.ends().await;
}
