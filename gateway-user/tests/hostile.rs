//! Ambiguous and hostile requests: each is answered properly, recorded once, and never becomes two at the upstream.

mod hostile_cases;
mod support;

use hostile_cases::{Case, Ending, Gateway, SMUGGLED, all};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::net::SocketAddr;
use support::upstream::Upstream;
use support::{DEADLINE, TestGateway};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use vllm_gateway::event::RequestEvent;
use vllm_gateway::wire::exchange::Outcome;

/// Only what never arrives whole waits for these; an hour between health checks keeps them out of the way.
const LIMITS: &str = "health_interval: 1h, head_timeout: 500ms, client_write_timeout: 500ms";

/// Mutated streams a run; most take as long as the gateway waits for what never comes, 50 ms.
const CASES: u32 = 200;

/// Sent where a connection must have been kept.
const PROBE: &str = "GET /probe HTTP/1.1\r\nHost: a\r\nX-Team-ID: probe\r\nConnection: close\r\n\r\n";

/// What a client was sent in answer to one request.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hostile_request_is_answered_recorded_and_contained() {
    let upstream = Upstream::recording().await;
    let start = |more: &str| {
        let yaml = format!("proxy: {{{LIMITS}{more}}}\n");
        TestGateway::before(upstream.addr, Some(upstream.addr), &yaml)
    };
    let plain = start("");
    let small = start(", max_body: 1KiB, inspect_max: 1KiB");
    let inspecting = start(", on_uninspectable: reject");
    let cases = all();
    assert!(cases.len() >= 60, "the table has shrunk to {}", cases.len());
    let mut failures = Vec::new();
    for case in &cases {
        let gateway = match case.gateway {
            Gateway::Plain => &plain,
            Gateway::Small => &small,
            Gateway::Inspecting => &inspecting,
        };
        if let Err(wrong) = check(case, gateway, &upstream).await {
            failures.push(format!("{}: {wrong}", case.name));
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {} cases:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

/// Plays one case and compares all that can be seen of it: by the client, by the upstream, and in the events.
async fn check(case: &Case, gateway: &TestGateway, upstream: &Upstream) -> Result<(), String> {
    upstream.seen.take();
    let events_before = gateway.events.now().len();
    let received = play(case, gateway.addr).await?;
    let mut answers = answers(&received, &case.bytes)?;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    let mut expected = case.statuses.clone();
    expected.extend((case.ending == Ending::Kept).then_some(200));
    expect("statuses", &statuses, &expected)?;
    if case.ending == Ending::Kept {
        answers.pop();
    }
    for answer in &answers {
        well_formed(case, answer)?;
    }
    let mut final_answers: Vec<u16> = statuses.iter().copied().filter(|status| *status >= 200).collect();
    final_answers.extend((case.ending == Ending::ClientLeaves).then_some(0));
    let events = gateway.events.wait_for(events_before + final_answers.len());
    let events = &events[events_before..];
    let recorded: Vec<u16> = events.iter().map(|event| event.status_code).collect();
    expect("statuses of events", &recorded, &final_answers)?;
    fair_events(case, events)?;
    contained(case, &upstream.seen.take())
}

/// Sends a case and reads until the gateway closes the connection; where it must not, a last request says that it may.
async fn play(case: &Case, addr: SocketAddr) -> Result<Vec<u8>, String> {
    let mut stream = TcpStream::connect(addr)
        .await
        .map_err(|error| error.to_string())?;
    let mut bytes = case.bytes.clone();
    if case.ending == Ending::Kept {
        bytes.extend_from_slice(PROBE.as_bytes());
    }
    let (mut reader, mut writer) = stream.split();
    let send = async {
        // A refusal may come, and the connection end, before all is sent.
        let _ = writer.write_all(&bytes).await;
        if case.ending == Ending::ClientLeaves {
            let _ = writer.shutdown().await;
        }
    };
    let mut received = Vec::new();
    let receive = async {
        // A reset behind the answers is how some refusals end.
        let _ = reader.read_to_end(&mut received).await;
    };
    let both = async { tokio::join!(send, receive) };
    timeout(DEADLINE, both)
        .await
        .map_err(|_| "the gateway never closed the connection".to_owned())?;
    Ok(received)
}

/// Divides what a client received. Every answer but the last has a length; a `HEAD` has no body.
fn answers(mut bytes: &[u8], request: &[u8]) -> Result<Vec<Answer>, String> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let whole = String::from_utf8_lossy(bytes);
        let end = memchr::memmem::find(bytes, b"\r\n\r\n").ok_or_else(|| format!("half a head: {whole}"))?;
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        bytes = &bytes[end + 4..];
        let status = head
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.ok_or_else(|| format!("no status line: {head}"))?;
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        let is_bodiless = status < 200 || (answers.is_empty() && request.starts_with(b"HEAD "));
        let length = if is_bodiless {
            0
        } else {
            length.unwrap_or(bytes.len())
        };
        let body = bytes
            .get(..length)
            .ok_or_else(|| format!("half a body: {whole}"))?;
        answers.push(Answer {
            status,
            head,
            body: String::from_utf8_lossy(body).into_owned(),
        });
        bytes = &bytes[length..];
    }
    Ok(answers)
}

/// A refusal has the shape in which the client's library looks for it.
fn well_formed(case: &Case, answer: &Answer) -> Result<(), String> {
    if answer.status < 400 {
        let is_chunked = answer.head.contains("transfer-encoding");
        return if is_chunked {
            Err(format!("chunks for HTTP/1.0: {}", answer.head))
        } else {
            Ok(())
        };
    }
    if case.bytes.starts_with(b"HEAD ") {
        return expect("body of HEAD", &answer.body.as_str(), &"");
    }
    let body: serde_json::Value =
        serde_json::from_str(&answer.body).map_err(|error| format!("{error} in {:?}", answer.body))?;
    let message = body["error"]["message"].as_str().unwrap_or_default();
    if message.len() < 20 {
        return Err(format!("no message in {body}"));
    }
    let is_anthropic = case.bytes.starts_with(b"POST /v1/messages ");
    expect("Anthropic's shape", &(body["type"] == "error"), &is_anthropic)?;
    let code = body["error"]["code"].as_str().unwrap_or_default();
    if !case.code.is_empty() {
        expect("code", &code, &case.code)?;
    }
    let says_close = answer.head.contains("connection: close");
    let must_close = case.ending != Ending::Kept;
    expect("announced end", &says_close, &must_close)
}

/// No case is charged to anybody but its own team.
fn fair_events(case: &Case, events: &[RequestEvent]) -> Result<(), String> {
    let smuggled_is_real = case.forwarded.contains(&"GET /smuggled");
    for event in events {
        let fair = matches!(&*event.team_id, "" | "t" | "probe")
            || (smuggled_is_real && &*event.team_id == "mallory");
        if !fair {
            return Err(format!("charged to {}", event.team_id));
        }
        if case.ending == Ending::ClientLeaves {
            expect("outcome", &event.outcome, &Outcome::Aborted)?;
        }
    }
    Ok(())
}

/// The upstream saw what it should, and nothing besides.
fn contained(case: &Case, requests: &[String]) -> Result<(), String> {
    let mut expected: Vec<String> = case.forwarded.iter().map(|line| (*line).to_owned()).collect();
    expected.extend((case.ending == Ending::Kept).then(|| "GET /probe".to_owned()));
    let seen: Vec<String> = requests
        .iter()
        .map(|request| request.split(' ').take(2).collect::<Vec<_>>().join(" "))
        .collect();
    expect("requests at the upstream", &seen, &expected)?;
    let first = requests
        .first()
        .map(|request| request.to_ascii_lowercase())
        .unwrap_or_default();
    if !case.forwarded.is_empty() && !first.contains(case.has) {
        return Err(format!("{:?} is missing in {first}", case.has));
    }
    if !case.lacks.is_empty() && first.contains(case.lacks) {
        return Err(format!("{:?} has come through: {first}", case.lacks));
    }
    Ok(())
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, expected: &T) -> Result<(), String> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what}: expected {expected:?}, found {found:?}"))
    }
}

/// One change of a byte stream.
#[derive(Clone, Debug)]
enum Mutation {
    Flip(prop::sample::Index, u8),
    Insert(prop::sample::Index, u8),
    Delete(prop::sample::Index),
    RepeatLine(prop::sample::Index),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Mutation::Flip(at, bits) => {
                let at = at.index(bytes.len());
                bytes[at] ^= bits;
            }
            Mutation::Insert(at, byte) => bytes.insert(at.index(bytes.len()), *byte),
            Mutation::Delete(at) => drop(bytes.remove(at.index(bytes.len()))),
            Mutation::RepeatLine(at) => {
                let lines: Vec<Vec<u8>> = bytes
                    .split_inclusive(|byte| *byte == b'\n')
                    .map(<[u8]>::to_vec)
                    .collect();
                let at = at.index(lines.len());
                *bytes = [&lines[..=at], &lines[at..]].concat().concat();
            }
        }
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<prop::sample::Index>;
    let odd = prop::sample::select(&b"\r\n\t :,;0159afx-\0\x7f\xff"[..]);
    prop_oneof![
        (at(), 1u8..).prop_map(|(at, bits)| Mutation::Flip(at, bits)),
        (at(), odd).prop_map(|(at, byte)| Mutation::Insert(at, byte)),
        at().prop_map(Mutation::Delete),
        at().prop_map(Mutation::RepeatLine),
    ]
}

/// How many requests a strict reader finds in `bytes`: it stops at the first doubt, and never counts what stands in a body.
fn strict_count(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let Some(rest) = strict_request(bytes) {
        count += 1;
        bytes = rest;
    }
    count
}

/// What follows the first request; `None` when there is none that a strict reader accepts.
fn strict_request(bytes: &[u8]) -> Option<&[u8]> {
    let start = bytes.iter().position(|byte| !b"\r\n".contains(byte))?;
    let bytes = &bytes[start..];
    let end = memchr::memmem::find(bytes, b"\r\n\r\n")?;
    // Header values may hold bytes beyond ASCII; as Latin-1 each is one character.
    let head: String = bytes[..end].iter().map(|byte| char::from(*byte)).collect();
    let mut rest = &bytes[end + 4..];
    let mut lines = head.split("\r\n");
    let words: Vec<&str> = lines.next()?.split(' ').collect();
    let fields: Option<Vec<(String, &str)>> = lines.map(strict_field).collect();
    let fields = fields?;
    let all = |name: &str| {
        fields
            .iter()
            .filter(|field| field.0 == name)
            .map(|field| field.1)
            .collect::<Vec<_>>()
    };
    let is_clean = !head
        .replace("\r\n", "")
        .contains(|c: char| c.is_control() && c != '\t' && c < '\u{80}');
    if words.len() != 3 || !words[2].starts_with("HTTP/1.") || !is_clean {
        return None;
    }
    let lengths_and_codings = (all("content-length"), all("transfer-encoding"));
    if all("x-team-id").len() != 1 {
        // Its request is not for the upstream; where no body has to be skipped, the next one may be.
        let is_bodiless = lengths_and_codings == (Vec::new(), Vec::new());
        return if is_bodiless { strict_request(rest) } else { None };
    }
    match (&lengths_and_codings.0[..], &lengths_and_codings.1[..]) {
        ([], []) => {}
        ([length], []) => rest = rest.get(length.parse::<usize>().ok()?..)?,
        ([], [_]) => rest = strict_chunks(rest)?,
        _ => return None,
    }
    Some(rest)
}

fn strict_field(line: &str) -> Option<(String, &str)> {
    let (name, value) = line.split_once(':')?;
    let is_token = !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_graphic() && !"()<>@,;:\\\"/[]?={}".contains(c));
    is_token.then(|| (name.to_ascii_lowercase(), value.trim_matches([' ', '\t'])))
}

fn strict_chunks(mut bytes: &[u8]) -> Option<&[u8]> {
    loop {
        let line_end = memchr::memmem::find(bytes, b"\r\n")?;
        // An extension may hold whatever it likes but a line end.
        let size = bytes[..line_end].split(|byte| *byte == b';').next()?;
        let size = std::str::from_utf8(size).ok()?;
        if !size.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let size = usize::from_str_radix(size, 16).ok()?;
        bytes = &bytes[line_end + 2..];
        if size == 0 {
            // Trailers end in an empty line.
            let empty = if bytes.starts_with(b"\r\n") {
                2
            } else {
                memchr::memmem::find(bytes, b"\r\n\r\n")? + 4
            };
            return Some(&bytes[empty..]);
        }
        bytes = bytes.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

#[test]
fn the_strict_reader_finds_what_is_there() {
    let (stream, requests) = valid_stream();
    assert_eq!(strict_count(&stream), requests);
    assert_eq!(strict_count(&stream[..stream.len() - 1]), requests - 1);
    assert_eq!(
        strict_count(b"POST / HTTP/1.1\r\nX-Team-ID: t\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc"),
        0
    );
}

/// A request with a length and one in chunks, each with a request as its body, and both once more.
fn valid_stream() -> (Vec<u8>, usize) {
    let with_length = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Team-ID: t\r\nContent-Length: {}\r\n\r\n{SMUGGLED}",
        SMUGGLED.len()
    );
    let in_chunks = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Team-ID: t\r\nTransfer-Encoding: chunked\r\n\r\n\
         {:x};a=b\r\n{SMUGGLED}\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n",
        SMUGGLED.len()
    );
    (format!("{with_length}{in_chunks}").repeat(2).into_bytes(), 4)
}

#[test]
fn no_mutation_makes_more_requests_than_there_are() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime");
    let upstream = runtime.block_on(Upstream::recording());
    let limits = "health_interval: 1h, head_timeout: 50ms, client_write_timeout: 50ms, idle_timeout: 50ms";
    let gateway = TestGateway::before(upstream.addr, None, &format!("proxy: {{{limits}}}\n"));
    let config = Config {
        cases: CASES,
        max_shrink_iters: 64,
        failure_persistence: None,
        ..Config::default()
    };
    let mutations = prop::collection::vec(mutation(), 0..4);
    let outcome = TestRunner::new(config).run(&mutations, |mutations| {
        let (mut bytes, _) = valid_stream();
        mutations.iter().for_each(|mutation| mutation.apply(&mut bytes));
        let text = String::from_utf8_lossy(&bytes).into_owned();
        upstream.seen.take();
        let events_before = gateway.events.now().len();
        let received = runtime.block_on(send_and_read(gateway.addr, &bytes));
        let received = received.map_err(TestCaseError::fail)?;
        let answers = answers(&received, &bytes).map_err(TestCaseError::fail)?;
        let answered = answers.iter().filter(|answer| answer.status >= 200).count();
        let events = gateway.events.wait_for(events_before + answered).len() - events_before;
        prop_assert_eq!(events, answered, "events and answers of {:?}", &text);
        let (seen, most) = (upstream.seen.count(), strict_count(&bytes));
        prop_assert!(
            seen <= most,
            "{} requests at the upstream, {} in {:?}",
            seen,
            most,
            &text
        );
        if mutations.is_empty() {
            prop_assert_eq!((seen, answered), (4, 4), "the stream as it is");
        }
        Ok(())
    });
    outcome.expect("no mutation does");
    assert_eq!(gateway.drained(), 0, "no connection is left hanging");
}

async fn send_and_read(addr: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut stream = TcpStream::connect(addr)
        .await
        .map_err(|error| error.to_string())?;
    let mut received = Vec::new();
    let talk = async {
        let _ = stream.write_all(bytes).await;
        let _ = stream.read_to_end(&mut received).await;
    };
    timeout(DEADLINE, talk)
        .await
        .map_err(|_| "the gateway hangs".to_owned())?;
    Ok(received)
}
