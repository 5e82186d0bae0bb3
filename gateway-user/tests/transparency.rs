//! Clients get byte for byte what they would have got without the gateway, upstreams what clients sent, and events what the engine
//! counted: for every real capture, whatever is asked on the client's behalf, and however the bytes are cut.
//!
//! What may differ is written down here, in [`delivered_head`] and [`upstream_head`], and compared exactly. The three captures of a
//! triple are three runs of one request, so `created`, the random ids of tool calls and the run's own timings (`metrics`) differ between
//! them: these values alone are masked, and only where one capture is held against another.

mod replay;
mod support;

use replay::{Capture, Cut, Replay, asked, body, chunks, head, read_message};
use serde_json::Value;
use std::collections::BTreeMap;
use support::{DEADLINE, TestGateway};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vllm_gateway::event::RequestEvent;
use vllm_gateway::wire::exchange::{Outcome, UsageSource};

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

/// Bytes as text, one to one: all captures are UTF-8.
fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Holds bytes against each other, and shows only where they part.
fn assert_same(got: &str, wanted: &str, what: &str) {
    let parts = got
        .bytes()
        .zip(wanted.bytes())
        .position(|(got, wanted)| got != wanted);
    let parts = parts.unwrap_or_else(|| got.len().min(wanted.len()));
    let near = |text: &str| {
        String::from_utf8_lossy(&text.as_bytes()[parts.saturating_sub(150)..text.len().min(parts + 100)])
            .into_owned()
    };
    assert!(
        got == wanted,
        "{what}: at byte {parts}, got\n{:?}\nwanted\n{:?}",
        near(got),
        near(wanted)
    );
}

/// The head that the client gets for the upstream's: as it came, and behind it the request id if the upstream sent none.
fn delivered_head(upstream: &[u8], event: &RequestEvent) -> String {
    let head = text(upstream);
    if head.to_lowercase().contains("\r\nx-request-id: ") {
        return head;
    }
    let fields = head.strip_suffix("\r\n").expect("a blank line");
    format!("{fields}x-request-id: {}\r\n\r\n", event.request_id)
}

/// The head that the upstream gets for the client's. Fields that stay keep order, case and spaces.
fn upstream_head(
    client: &[u8],
    event: &RequestEvent,
    traceparent: &str,
    signed: &str,
    edited: Option<usize>,
) -> String {
    let mut gone = vec!["x-team-id", "x-project", "x-user-id", "x-request-id"];
    if edited.is_some() {
        gone.extend(["content-length", "accept-encoding"]);
    }
    let head = text(client);
    let kept = head
        .strip_suffix("\r\n")
        .expect("a blank line")
        .split_inclusive("\r\n")
        .filter(|line| {
            let name = line.split(':').next().expect("a name").to_lowercase();
            !gone.contains(&name.as_str())
        });
    let mut expected: String = kept.collect();
    if let Some(len) = edited {
        expected += &format!("Content-Length: {len}\r\nAccept-Encoding: identity\r\n");
    }
    expected
        + &format!(
            "X-Request-Id: {}\r\nX-Gateway-Request-Id: {signed}\r\ntraceparent: {traceparent}\r\n\r\n",
            event.request_id
        )
}

/// Holds the upstream's view of a request against the client's.
fn assert_request_kept(name: &str, sent: &[u8], received: &[u8], event: &RequestEvent, edited: bool) {
    let field = |wanted: &str| {
        let lines = text(head(received));
        let value = lines
            .lines()
            .find_map(|line| line.strip_prefix(wanted).map(str::to_owned));
        value.unwrap_or_else(|| panic!("{name}: no {wanted:?} in {lines}"))
    };
    let (signed, traceparent) = (field("X-Gateway-Request-Id: "), field("traceparent: "));
    let mac = signed
        .strip_prefix(&*event.event_id)
        .unwrap_or_else(|| panic!("{name}: {signed} of another event"));
    assert!(
        mac.len() > 16 && mac.starts_with('.'),
        "{name}: {signed} is not signed"
    );
    assert!(
        traceparent.starts_with(&format!("00-{}-", event.trace_id)),
        "{name}: {traceparent}"
    );
    let len = edited.then_some(body(received).len());
    let expected = upstream_head(head(sent), event, &traceparent, &signed, len);
    assert_eq!(text(head(received)), expected, "{name}: the upstream's head");
    if !edited {
        assert_eq!(
            text(body(received)),
            text(body(sent)),
            "{name}: the upstream's body"
        );
    }
}

/// What the document of a response, or the events of a stream, say by the plainest reading.
fn documents(response: &[u8]) -> Vec<Value> {
    let payload = match chunks(body(response)) {
        Some((chunks, _)) if text(head(response)).contains("chunked") => chunks.concat(),
        // A cut-off stream's frames stand between its lines and are no `data`.
        _ => body(response).to_vec(),
    };
    let payload = text(&payload);
    if let Ok(document) = serde_json::from_str(&payload) {
        return vec![document];
    }
    let data = payload.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter_map(|data| serde_json::from_str(data).ok()).collect()
}

fn last<T>(documents: &[Value], of: impl Fn(&Value) -> Option<T>) -> Option<T> {
    documents.iter().filter_map(of).next_back()
}

/// Billed prompt and completion tokens, and cached ones, as the last usage object says.
fn usage(documents: &[Value]) -> Option<(Option<u64>, Option<u64>, Option<u64>)> {
    let usage = last(documents, |document| {
        let places = [&document["usage"], &document["response"]["usage"]];
        places.into_iter().find(|usage| usage.is_object()).cloned()
    })?;
    let first = |names: &[&str]| names.iter().find_map(|name| usage.pointer(name)?.as_u64());
    let beside = first(&["/cache_read_input_tokens"]).unwrap_or(0)
        + first(&["/cache_creation_input_tokens"]).unwrap_or(0);
    Some((
        first(&["/prompt_tokens", "/input_tokens"]).map(|prompt| prompt + beside),
        first(&["/completion_tokens", "/output_tokens"]),
        first(&[
            "/prompt_tokens_details/cached_tokens",
            "/input_tokens_details/cached_tokens",
            "/cache_read_input_tokens",
        ]),
    ))
}

fn finish_reason(documents: &[Value]) -> Option<String> {
    last(documents, |document| {
        let places = [
            "/choices/0/finish_reason",
            "/stop_reason",
            "/delta/stop_reason",
            "/incomplete_details/reason",
            "/response/incomplete_details/reason",
        ];
        places
            .iter()
            .find_map(|place| document.pointer(place)?.as_str().map(str::to_owned))
    })
}

fn model(documents: &[Value], request: &[u8]) -> String {
    let said = last(documents, |document| {
        let places = ["/model", "/response/model", "/message/model"];
        places
            .iter()
            .find_map(|place| document.pointer(place)?.as_str().map(str::to_owned))
    });
    // By the text, since the body that is no JSON names a model too.
    let asked = text(body(request))
        .split_once("\"model\": \"")
        .map(|(_, rest)| rest.split('"').next().unwrap_or_default().to_owned());
    said.or(asked).unwrap_or_default()
}

/// Holds an event against the response that the upstream gave, the request, and the identity in it.
fn assert_event(name: &str, event: &RequestEvent, request: &[u8], upstream: &[u8], aborted: bool) {
    let documents = documents(upstream);
    let request_head = text(head(request));
    let field = |wanted: &str| {
        let value = request_head
            .lines()
            .find_map(|line| line.strip_prefix(wanted)?.strip_prefix(": "));
        value.unwrap_or_default().to_owned()
    };
    let who = [&*event.team_id, &event.project, &event.user_id].map(str::to_owned);
    assert_eq!(
        who,
        [field("X-Team-ID"), field("X-Project"), field("X-User-ID")],
        "{name}"
    );
    let path = request_head.split(' ').nth(1).expect("a target");
    assert_eq!(
        event.endpoint,
        if path == "/v1/nope" { "other" } else { path },
        "{name}"
    );
    let upstream_head = text(head(upstream));
    let status: u16 = upstream_head[9..12].parse().expect("a status");
    let outcome = match status {
        _ if aborted => Outcome::Aborted,
        200 => Outcome::Completed,
        _ => Outcome::ClientError,
    };
    assert_eq!((event.status_code, event.outcome), (status, outcome), "{name}");
    assert_eq!(
        event.stream,
        upstream_head.contains("text/event-stream"),
        "{name}"
    );
    assert_eq!(&*event.model, model(&documents, request), "{name}");
    assert_eq!(
        &*event.finish_reason,
        finish_reason(&documents).unwrap_or_default(),
        "{name}"
    );
    assert_eq!(event.capture, "proxy", "{name}");
    let (billed, source) = match usage(&documents) {
        Some(usage) if aborted => (Some(usage), UsageSource::Continuous),
        Some(usage) => (Some(usage), UsageSource::Reported),
        None if event.stream => (None, UsageSource::Counted),
        None => (None, UsageSource::None),
    };
    let (prompt, completion, cached) = billed.unwrap_or_default();
    assert_eq!(event.usage_source, source, "{name}");
    assert_eq!(
        (event.prompt_tokens, event.completion_tokens, event.cached_tokens),
        (prompt, completion, cached),
        "{name}"
    );
}

/// Holds the engine's tokens of these events against the counters of the capture.
fn assert_engine_tokens(capture: &Capture, events: &[RequestEvent]) -> bool {
    let sum = |of: fn(&RequestEvent) -> Option<u64>| events.iter().map(of).sum::<Option<u64>>();
    let Some(prompt) = sum(|event| event.engine_prompt_tokens) else {
        return false;
    };
    assert_eq!(
        prompt,
        capture.counter("vllm:prompt_tokens_total"),
        "{}",
        capture.name
    );
    let generated = sum(|event| Some(event.engine_completion_tokens.unwrap_or(0)));
    assert_eq!(
        generated,
        Some(capture.counter("vllm:generation_tokens_total")),
        "{}",
        capture.name
    );
    let cached = sum(|event| Some(event.cached_tokens.unwrap_or(0)));
    assert_eq!(
        cached,
        Some(capture.counter("vllm:prompt_tokens_cached_total")),
        "{}",
        capture.name
    );
    true
}

/// A capture's request as a client of the gateway sends it: some captures were made without a team.
fn with_team(request: &[u8]) -> Vec<u8> {
    let mut head = text(head(request));
    if !head.contains("\r\nX-Team-ID: ") {
        head = head.replacen("\r\n\r\n", "\r\nX-Team-ID: search\r\n\r\n", 1);
    }
    [head.as_bytes(), body(request)].concat()
}

/// Blanks out what differs between two runs of one request.
fn masked(event: &str) -> String {
    let mut event = event.to_owned();
    for (key, is_value) in [
        (
            "\"created\":",
            (|next: char| next.is_ascii_digit()) as fn(char) -> bool,
        ),
        ("\"id\":\"chatcmpl-tool-", |next| next.is_ascii_hexdigit()),
        ("\"metrics\":{", |next| next != '}'),
    ] {
        let mut parts = event.split(key);
        let first = parts.next().unwrap_or_default().to_owned();
        event = parts.fold(first, |masked, part| {
            masked + key + "~" + part.trim_start_matches(is_value)
        });
    }
    event
}

/// The chunks of a stream, masked, and told apart by choice where several take turns: whose turn comes first is the engine's whim, but
/// each choice's own chunks are in order.
fn sequences(name: &str, stream: &[u8]) -> BTreeMap<Option<u64>, Vec<String>> {
    let (chunks, _) = chunks(stream).unwrap_or_else(|| panic!("{name}: not a whole stream"));
    let framed = chunks
        .iter()
        .map(|chunk| format!("{:x}\r\n{}\r\n", chunk.len(), text(chunk)));
    assert_same(
        &text(stream),
        &(framed.collect::<String>() + "0\r\n\r\n"),
        &format!("{name}, framing as uvicorn writes it"),
    );
    let mut sequences: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for chunk in chunks {
        let event = text(chunk);
        let json: Option<Value> = event
            .strip_prefix("data: ")
            .and_then(|data| serde_json::from_str(data).ok());
        let index = json
            .and_then(|json| json["choices"][0]["index"].as_u64())
            .filter(|_| name.contains("n2"));
        sequences.entry(index).or_default().push(masked(&event));
    }
    sequences
}

fn assert_same_stream(name: &str, got: &[u8], wanted: &[u8]) {
    let (got, wanted) = (sequences(name, got), sequences(name, wanted));
    assert_eq!(
        wanted.len(),
        if name.contains("n2") { 3 } else { 1 },
        "{name}: the choices, and what belongs to none"
    );
    assert_eq!(
        got.keys().collect::<Vec<_>>(),
        wanted.keys().collect::<Vec<_>>(),
        "{name}"
    );
    for (choice, wanted) in wanted {
        assert!(
            name.contains("n2") || wanted.len() > 5,
            "{name}: a capture without a stream proves nothing"
        );
        // Apart from each other by a byte that no capture has, so that chunk boundaries count.
        assert_same(
            &got[&choice].join("\0"),
            &wanted.join("\0"),
            &format!("{name}, choice {choice:?}"),
        );
    }
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
        assert_same(&text(&got), &expected, &name);
        assert_event(name, &event, &capture.request, &capture.response, true);
        assert_eq!(assert_engine_tokens(&capture, &[event]), name == "abort_stream");
    }
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
