//! What the observer makes of real captures of vLLM, however their bytes are cut.
//!
//! Every capture in `fixtures/` is read through [`Connection`], and its facts are held against what a naive reading of the whole
//! response says, against the engine's own counters, and against themselves in every other cut. A new capture is covered by being
//! there.

use proptest::prelude::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use vllm_gateway::wire::connection::{Closer, Connection, Direction, Limits, Watcher};
use vllm_gateway::wire::endpoint::Endpoint;
use vllm_gateway::wire::exchange::{Facts, Outcome, UsageSource};
use vllm_gateway::wire::head::RequestHead;
use vllm_gateway::wire::{At, Piece};

struct Fixture {
    name: String,
    request: Vec<u8>,
    response: Vec<u8>,
    about: Value,
}

impl Fixture {
    fn load(json: &Path) -> Fixture {
        let read = |extension| std::fs::read(json.with_extension(extension)).unwrap();
        Fixture {
            name: json.file_stem().unwrap().to_string_lossy().into_owned(),
            request: read("request"),
            response: read("response"),
            about: serde_json::from_slice(&read("json")).unwrap(),
        }
    }

    /// How much one of vLLM's counters moved, over all its labels.
    fn counter(&self, name: &str) -> u64 {
        let prefix = format!("{name}{{");
        let deltas = self.about["metrics_delta"].as_object().unwrap().iter();
        let series = deltas.filter(|(key, _)| key.starts_with(&prefix));
        series.map(|(_, delta)| delta.as_f64().unwrap() as u64).sum()
    }

    /// The reads of the capture: time and length of each.
    fn reads(&self) -> Vec<(At, usize)> {
        let reads = self.about["reads_ms_offset_length"].as_array().unwrap().iter();
        let at = |ms: &Value| At((ms.as_f64().unwrap() * 1e6) as u64);
        reads
            .map(|read| (at(&read[0]), read[2].as_u64().unwrap() as usize))
            .collect()
    }

    /// When the byte at this offset of the response came.
    fn time_of(&self, offset: usize) -> At {
        let mut end = 0;
        let found = self.reads().into_iter().find(|(_, len)| {
            end += len;
            offset < end
        });
        found
            .unwrap_or_else(|| panic!("{}: no read holds byte {offset}", self.name))
            .0
    }
}

fn fixtures() -> Vec<Fixture> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vllm-0.32.0");
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut captures: Vec<_> = entries
        .filter(|path| path.extension().is_some_and(|ext| ext == "json"))
        .collect();
    captures.sort();
    assert!(captures.len() >= 40, "the captures are not where they should be");
    captures.iter().map(|path| Fixture::load(path)).collect()
}

fn fixture(name: &str) -> Fixture {
    fixtures()
        .into_iter()
        .find(|fixture| fixture.name == name)
        .unwrap()
}

/// Keeps what a connection tells: the team of each request beside its facts.
#[derive(Default)]
struct Notes(Vec<(Option<String>, Facts)>);

impl Watcher for Notes {
    type Tag = Option<String>;

    fn began(&mut self, _at: At, head: &RequestHead) -> Option<String> {
        head.fields()
            .get("x-team-id")
            .map(|team| String::from_utf8_lossy(team).into_owned())
    }

    fn ended(&mut self, team: Option<String>, facts: Facts) {
        self.0.push((team, facts));
    }
}

/// Reads a capture whose response comes in these pieces at these times.
fn observe(fixture: &Fixture, reads: &[(At, usize)]) -> Vec<(Option<String>, Facts)> {
    let (mut connection, mut notes) = (Connection::new(Limits::default()), Notes::default());
    connection.feed(
        Direction::ToServer,
        At(0),
        Piece::Bytes(&fixture.request),
        &mut notes,
    );
    let mut rest = &fixture.response[..];
    for (at, len) in reads {
        let (piece, after) = rest.split_at((*len).min(rest.len()));
        connection.feed(Direction::ToClient, *at, Piece::Bytes(piece), &mut notes);
        rest = after;
    }
    assert!(rest.is_empty(), "{}: not all was fed", fixture.name);
    let was_aborted = fixture.about["aborted_by_client"].as_bool().unwrap();
    let closer = if was_aborted {
        Closer::Client
    } else {
        Closer::Server
    };
    assert_eq!(connection.in_flight() > 0, was_aborted, "{}", fixture.name);
    connection.close(At(u64::MAX), closer, &mut notes);
    assert_eq!(connection.opaque_bytes(), 0, "{}", fixture.name);
    notes.0
}

/// What must not depend on the cut. All bytes come at one time here, so that times are equal too.
fn invariant(observed: &[(Option<String>, Facts)]) -> String {
    format!("{observed:?}")
}

fn cut_at(fixture: &Fixture, lens: &[usize]) -> String {
    let reads: Vec<_> = lens.iter().map(|len| (At(7_000), *len)).collect();
    invariant(&observe(fixture, &reads))
}

/// One event of a stream, and the offset in the response of the byte that completed it.
struct Event {
    document: Option<Value>,
    complete_at: usize,
}

/// The bodies of all responses in a capture, each byte with its offset, by the plainest reading that works on whole buffers.
fn bodies(response: &[u8]) -> Vec<(String, Vec<(u8, usize)>)> {
    let find = |from: usize, what: &[u8]| {
        let at = response[from..]
            .windows(what.len())
            .position(|window| window == what);
        at.map(|at| from + at)
    };
    let (mut found, mut at) = (Vec::new(), 0);
    while at < response.len() {
        let end = find(at, b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8_lossy(&response[at..end]).to_lowercase();
        at = end;
        let mut body = Vec::new();
        let take = |from: usize, len: usize, body: &mut Vec<(u8, usize)>| {
            let to = (from + len).min(response.len());
            body.extend((from..to).map(|offset| (response[offset], offset)));
            to
        };
        if let Some(length) = head.split("content-length: ").nth(1) {
            at = take(at, length.lines().next().unwrap().parse().unwrap(), &mut body);
        } else {
            while let Some(line_end) = find(at, b"\r\n") {
                let size = std::str::from_utf8(&response[at..line_end]).unwrap();
                let size = usize::from_str_radix(size, 16).unwrap();
                at = take(line_end + 2, size, &mut body) + 2;
                if size == 0 {
                    break;
                }
            }
        }
        found.push((head, body));
    }
    found
}

fn events(body: &[(u8, usize)]) -> Vec<Event> {
    let (mut events, mut from) = (Vec::new(), 0);
    for at in 1..body.len() {
        if body[at].0 == b'\n' && body[at - 1].0 == b'\n' {
            let text: Vec<u8> = body[from..at].iter().map(|(byte, _)| *byte).collect();
            let text = String::from_utf8(text).unwrap();
            let data: Vec<&str> = text
                .lines()
                .filter_map(|line| line.strip_prefix("data: "))
                .collect();
            events.push(Event {
                document: serde_json::from_str(&data.join("\n")).ok(),
                complete_at: body[at].1,
            });
            from = at + 1;
        }
    }
    events
}

fn has_content(event: &Value) -> bool {
    let said = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    let choice = &event["choices"][0];
    let delta = &choice["delta"];
    let kind = event["type"].as_str().unwrap_or_default();
    said(&choice["text"])
        || said(&delta["content"])
        || said(&delta["reasoning"])
        || delta["tool_calls"]
            .as_array()
            .is_some_and(|calls| !calls.is_empty())
        || (kind.starts_with("response.") && kind.ends_with(".delta") && said(&event["delta"]))
        || (kind == "content_block_delta" && said(&event["delta"]["text"]))
}

/// Every document of a response: the events of a stream, or the one that the body is.
fn documents(head: &str, body: &[(u8, usize)]) -> Vec<Event> {
    if head.contains("text/event-stream") {
        return events(body);
    }
    let text: Vec<u8> = body.iter().map(|(byte, _)| *byte).collect();
    vec![Event {
        document: serde_json::from_slice(&text).ok(),
        complete_at: body.last().map_or(0, |(_, offset)| *offset),
    }]
}

/// The last usage object of a response.
fn usage(documents: &[Event]) -> Option<Value> {
    let mut usages = documents.iter().filter_map(|event| {
        let document = event.document.as_ref()?;
        let places = [&document["usage"], &document["response"]["usage"]];
        places.into_iter().find(|usage| usage.is_object()).cloned()
    });
    usages.next_back()
}

#[test]
fn billed_tokens_are_those_of_the_usage_object() {
    let mut reported = 0;
    for fixture in fixtures() {
        let observed = observe(&fixture, &fixture.reads());
        let parts = bodies(&fixture.response);
        assert_eq!(observed.len(), parts.len(), "{}", fixture.name);
        for ((_, facts), (head, body)) in observed.iter().zip(&parts) {
            let Some(usage) = usage(&documents(head, body)).filter(|_| facts.outcome == Outcome::Completed)
            else {
                continue;
            };
            let count = |names: [&str; 2]| names.iter().find_map(|name| usage[*name].as_u64());
            assert_eq!(facts.usage_source, UsageSource::Reported, "{}", fixture.name);
            assert_eq!(
                facts.tokens.prompt,
                count(["prompt_tokens", "input_tokens"]),
                "{}",
                fixture.name
            );
            assert_eq!(
                facts.tokens.completion,
                count(["completion_tokens", "output_tokens"]),
                "{}",
                fixture.name
            );
            let details = ["prompt_tokens_details", "input_tokens_details"];
            let cached = details
                .iter()
                .find_map(|details| usage[*details]["cached_tokens"].as_u64());
            let cached = cached.or(usage["cache_read_input_tokens"].as_u64());
            assert_eq!(facts.tokens.cached, cached, "{}", fixture.name);
            reported += 1;
        }
    }
    assert!(reported >= 25, "only {reported} captures had usage");
}

#[test]
fn engine_tokens_are_those_of_the_engines_counters() {
    let mut compared = 0;
    for fixture in fixtures() {
        let observed = observe(&fixture, &fixture.reads());
        if observed.iter().any(|(_, facts)| facts.tokens.prompt.is_none()) {
            continue;
        }
        let sum =
            |of: fn(&Facts) -> Option<u64>| observed.iter().filter_map(|(_, facts)| of(facts)).sum::<u64>();
        let (prompt, generated) = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total");
        let name = &fixture.name;
        assert_eq!(
            sum(|facts| facts.tokens.engine_prompt),
            fixture.counter(prompt),
            "{name}"
        );
        assert_eq!(
            sum(|facts| facts.tokens.engine_completion),
            fixture.counter(generated),
            "{name}"
        );
        assert_eq!(
            sum(|facts| facts.tokens.cached),
            fixture.counter("vllm:prompt_tokens_cached_total"),
            "{name}"
        );
        compared += 1;
    }
    assert!(compared >= 25, "only {compared} captures had tokens");
}

#[test]
fn the_first_token_is_timed_by_the_read_that_completes_it() {
    let mut timed = 0;
    for fixture in fixtures() {
        let observed = observe(&fixture, &fixture.reads());
        for ((_, facts), (head, body)) in observed.iter().zip(bodies(&fixture.response)) {
            let is_stream = head.contains("text/event-stream");
            assert_eq!(facts.streamed, is_stream, "{}", fixture.name);
            let documents = if is_stream { events(&body) } else { Vec::new() };
            let contents = documents
                .iter()
                .filter(|event| event.document.as_ref().is_some_and(has_content));
            let times: Vec<At> = contents.map(|event| fixture.time_of(event.complete_at)).collect();
            let first = times.first().map(|first| first.micros_since(At(0)));
            assert_eq!(facts.ttft_us, first, "{}", fixture.name);
            assert_eq!(facts.chunks, times.len() as u64, "{}", fixture.name);
            let gaps: Vec<u64> = times
                .windows(2)
                .map(|pair| pair[1].micros_since(pair[0]))
                .collect();
            assert_eq!(facts.gaps.count, gaps.len() as u64, "{}", fixture.name);
            assert_eq!(facts.gaps.sum_us, gaps.iter().sum::<u64>(), "{}", fixture.name);
            assert_eq!(
                facts.gaps.max_us,
                gaps.iter().max().copied().unwrap_or(0),
                "{}",
                fixture.name
            );
            timed += usize::from(first.is_some());
        }
    }
    assert!(timed >= 20, "only {timed} streams had a first token");
}

#[test]
fn what_the_documents_say_is_found() {
    for fixture in fixtures() {
        let observed = observe(&fixture, &fixture.reads());
        for ((_, facts), (head, body)) in observed.iter().zip(bodies(&fixture.response)) {
            let status: u16 = head[9..12].parse().unwrap();
            assert_eq!(facts.status, Some(status), "{}", fixture.name);
            if facts.tokens.prompt.is_none() {
                continue;
            }
            let all = documents(&head, &body);
            let all: Vec<&Value> = all.iter().filter_map(|event| event.document.as_ref()).collect();
            let last = |of: &dyn Fn(&Value) -> Option<String>| {
                all.iter().filter_map(|document| of(document)).next_back()
            };
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let model = last(&|document| {
                let places = [
                    &document["model"],
                    &document["response"]["model"],
                    &document["message"]["model"],
                ];
                places.into_iter().find_map(text)
            });
            assert_eq!(facts.model.as_deref(), model.as_deref(), "{}", fixture.name);
            let reason = last(&|document| {
                let places = [
                    &document["choices"][0]["finish_reason"],
                    &document["stop_reason"],
                    &document["delta"]["stop_reason"],
                    &document["incomplete_details"]["reason"],
                    &document["response"]["incomplete_details"]["reason"],
                ];
                places.into_iter().find_map(text)
            });
            assert_eq!(
                facts.finish_reason.as_deref(),
                reason.as_deref(),
                "{}",
                fixture.name
            );
            let queue_us = last(&|document| {
                let queue_ms = document["metrics"]["queue_time_ms"].as_f64()?;
                Some(format!("{:.0}", queue_ms * 1_000.0))
            });
            assert_eq!(
                facts.queue_us.map(|us| us.to_string()),
                queue_us,
                "{}",
                fixture.name
            );
        }
    }
}

#[test]
fn no_cut_changes_the_facts() {
    for fixture in fixtures() {
        let len = fixture.response.len();
        let whole = cut_at(&fixture, &[len]);
        // The largest capture is cut in its head and where its usage stands, and at a stride in between.
        let stride = if len > 20_000 { 97 } else { 1 };
        for at in (0..=len).filter(|at| at % stride == 0 || *at < 300 || len - at < 600) {
            assert_eq!(
                cut_at(&fixture, &[at, len - at]),
                whole,
                "{} cut at {at}",
                fixture.name
            );
        }
        assert_eq!(
            cut_at(&fixture, &vec![1; len]),
            whole,
            "{} byte by byte",
            fixture.name
        );
    }
}

#[test]
fn no_cut_of_the_request_changes_the_facts() {
    for fixture in fixtures() {
        let whole = cut_at(&fixture, &[fixture.response.len()]);
        let (mut connection, mut notes) = (Connection::new(Limits::default()), Notes::default());
        for byte in &fixture.request {
            let piece = Piece::Bytes(std::slice::from_ref(byte));
            connection.feed(Direction::ToServer, At(0), piece, &mut notes);
        }
        connection.feed(
            Direction::ToClient,
            At(7_000),
            Piece::Bytes(&fixture.response),
            &mut notes,
        );
        let was_aborted = fixture.about["aborted_by_client"].as_bool().unwrap();
        let closer = if was_aborted {
            Closer::Client
        } else {
            Closer::Server
        };
        connection.close(At(u64::MAX), closer, &mut notes);
        assert_eq!(invariant(&notes.0), whole, "{}", fixture.name);
    }
}

#[test]
fn a_stream_that_the_client_left_has_the_tokens_that_the_engine_counted() {
    let fixture = fixture("abort_stream");
    let (_, facts) = observe(&fixture, &fixture.reads()).remove(0);
    assert_eq!(
        (facts.outcome, facts.usage_source),
        (Outcome::Aborted, UsageSource::Continuous)
    );
    assert_eq!(
        (facts.tokens.prompt, facts.tokens.completion),
        (Some(19), Some(18))
    );
}

#[test]
fn without_usage_chunks_are_no_tokens() {
    for name in [
        "abort_stream_no_usage",
        "chat_stream_no_usage",
        "triple_chat_n2_none",
    ] {
        let fixture = fixture(name);
        let (_, facts) = observe(&fixture, &fixture.reads()).remove(0);
        assert_eq!(facts.usage_source, UsageSource::Counted, "{name}");
        assert_eq!(facts.tokens, Default::default(), "{name}");
        assert!(facts.chunks > 0, "{name}");
    }
}

#[test]
fn pipelined_requests_are_two_exchanges_of_two_teams() {
    let fixture = fixture("keepalive_two_requests");
    let observed = observe(&fixture, &fixture.reads());
    let teams: Vec<_> = observed.iter().map(|(team, _)| team.as_deref()).collect();
    assert_eq!(teams, [Some("search"), Some("ads")]);
    let completion: Vec<_> = observed
        .iter()
        .map(|(_, facts)| facts.tokens.completion)
        .collect();
    assert_eq!(completion, [Some(3), Some(4)]);
    assert!(
        observed
            .iter()
            .all(|(_, facts)| facts.endpoint == Endpoint::ChatCompletions)
    );
    assert_eq!(
        observed
            .iter()
            .map(|(_, facts)| facts.streamed)
            .collect::<Vec<_>>(),
        [false, true]
    );
}

#[test]
fn errors_are_told_by_type_and_never_by_message() {
    let error = |name: &str| {
        let fixture = fixture(name);
        let (_, facts) = observe(&fixture, &fixture.reads()).remove(0);
        assert_eq!(facts.tokens, Default::default(), "{name}");
        (
            facts.status.unwrap(),
            facts.outcome,
            facts.error_type.as_deref().map(str::to_owned),
        )
    };
    let client = |status, name: &str| (status, Outcome::ClientError, Some(name.to_owned()));
    assert_eq!(error("error_bad_json"), client(400, "Bad_Request"));
    assert_eq!(error("error_too_long"), client(400, "BadRequestError"));
    assert_eq!(error("error_unknown_model"), client(404, "NotFoundError"));
    assert_eq!(error("error_unknown_path"), (404, Outcome::ClientError, None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_cuts_change_nothing(which in any::<prop::sample::Index>(), cuts in prop::collection::vec(1usize..400, 1..400)) {
        let all = fixtures();
        let fixture = &all[which.index(all.len())];
        let len = fixture.response.len();
        let whole = cut_at(fixture, &[len]);
        let mut cuts = cuts;
        cuts.push(len);
        prop_assert_eq!(cut_at(fixture, &cuts), whole);
    }
}
