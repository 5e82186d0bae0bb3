//! The promise of the whole program: every request ends in one event, and the tokens of the events are those of the engine.
//!
//! The load generator plays the clients, the simulator counts what its engine does, and the gateway stands between them. Each test
//! compares the three books request by request, and then their sums.

mod books;
mod support;

use books::{Books, Row, Trial, Work, of_team};
use std::collections::BTreeMap;
use support::{Sim, TestGateway, exchange, metric_sum};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vllm_gateway::event::{CapturedBy, RequestEvent};
use vllm_gateway::wire::exchange::{Outcome, UsageSource};

/// Every kind of request that is billed, from several teams, projects and users.
const MIX: &str = "chat=5,completions=3,embeddings=1,responses=1,messages=1";

#[rustfmt::skip] // Options in pairs.
const INSTANT_LOAD: &[&str] = &[
    "--endpoints", MIX, "--stream-fraction", "0.33", "--abort-fraction", "0.05", "--fail-fraction", "0.02",
    "--teams", "7", "--projects", "3", "--users", "11", "--concurrency", "48",
    "--prompt-tokens", "4..60", "--output-tokens", "2..24", "--abort-after-ms", "1..8",
];

/// Steps of some milliseconds, so that clients leave requests that wait, prefill or generate.
#[rustfmt::skip]
const TIMED_SIM: &[&str] = &["--step-base-us", "4000", "--prefill-us-per-token", "20", "--decode-us-per-seq", "10"];

/// The same with usage on every chunk, whatever the request says.
#[rustfmt::skip]
const FORCED_SIM: &[&str] = &[
    "--force-usage", "--step-base-us", "4000", "--prefill-us-per-token", "20", "--decode-us-per-seq", "10",
];

#[rustfmt::skip]
const TIMED_LOAD: &[&str] = &[
    "--endpoints", MIX, "--stream-fraction", "0.5", "--abort-fraction", "0.4", "--fail-fraction", "0.02",
    "--teams", "4", "--concurrency", "48", "--prompt-tokens", "4..60", "--output-tokens", "2..32",
    "--abort-after-ms", "1..100",
];

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_requests_are_ten_thousand_events_with_the_tokens_of_the_engine() {
    let trial = Trial {
        seed: 1,
        requests: 10_000,
        load: INSTANT_LOAD,
        sim: &["--instant"],
        yaml: "",
    };
    let books = Books::keep(&trial).await;
    assert_eq!(books.rows.len(), 10_000);
    check(&books, UsageSource::Continuous);
    let failed = books.ended(Outcome::ServerError).count();
    assert!((100..400).contains(&failed), "2 % were to fail, {failed} did");
    assert!(books.ended(Outcome::Completed).count() > 9_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_running_requests_are_booked_to_within_a_step() {
    let trial = Trial {
        seed: 2,
        requests: 800,
        load: TIMED_LOAD,
        sim: TIMED_SIM,
        yaml: "",
    };
    let books = Books::keep(&trial).await;
    check(&books, UsageSource::Continuous);
    let continuous = books
        .ended(Outcome::Aborted)
        .filter(|row| row.event.usage_source == UsageSource::Continuous);
    assert!(continuous.count() > 50);
    let aborted = |stream| {
        books
            .ended(Outcome::Aborted)
            .filter(|row| row.seen.stream == stream)
            .count()
    };
    assert!(
        aborted(true) > 50 && aborted(false) > 50,
        "{} streams and {} others",
        aborted(true),
        aborted(false)
    );
    let burnt: Work = books
        .ended(Outcome::Aborted)
        .filter(|row| !row.seen.stream)
        .map(|row| row.work)
        .sum();
    assert!(
        burnt.completion > 0,
        "some were left while the engine worked for them"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_forces_usage_needs_no_injection() {
    let trial = Trial {
        seed: 3,
        requests: 600,
        load: TIMED_LOAD,
        sim: FORCED_SIM,
        yaml: "usage: {inject: off}\ngateway: {runtime: per_core}\n",
    };
    let books = Books::keep(&trial).await;
    check(&books, UsageSource::Continuous);
    assert_eq!(
        metric_sum(&books.metrics, "gateway_injection_total", &["result=\"edited\""]),
        0.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn with_final_usage_alone_aborted_streams_are_counted_and_not_billed() {
    let trial = Trial {
        seed: 4,
        requests: 600,
        load: TIMED_LOAD,
        sim: TIMED_SIM,
        yaml: "usage: {inject: final}\n",
    };
    let books = Books::keep(&trial).await;
    check(&books, UsageSource::Counted);
    let counted = books
        .ended(Outcome::Aborted)
        .filter(|row| row.event.usage_source == UsageSource::Counted);
    assert!(counted.count() > 50);
}

/// One request of the test's own, to be closed after the response.
fn request(id: &str, path: &str, body: &str) -> Vec<u8> {
    let more = format!("X-Request-Id: {id}\r\nContent-Type: application/json\r\nConnection: close");
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: a\r\nX-Team-ID: search\r\n{more}\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Requests with several choices or prompts: id, path, body without the model, and how many times the engine runs each prompt.
#[rustfmt::skip] // A table.
const SEVERAL: &[(&str, &str, &str, u64)] = &[
    // The first stream tells the fingerprint, without which streams with several choices are not edited.
    ("first", CHAT, r#""messages":[{"role":"user","content":"hello"}],"max_tokens":3,"ignore_eos":true,"stream":true"#, 1),
    ("chat-n3", CHAT, r#""messages":[{"role":"user","content":"hello there"}],"n":3,"max_tokens":5,"ignore_eos":true"#, 3),
    ("chat-n2-stream", CHAT, r#""messages":[{"role":"user","content":"a word"}],"n":2,"max_tokens":7,"ignore_eos":true,"stream":true"#, 2),
    ("first-completion", COMPLETIONS, r#""prompt":"hello","max_tokens":3,"ignore_eos":true,"stream":true"#, 1),
    ("two-prompts", COMPLETIONS, r#""prompt":["one more","and two"],"max_tokens":5,"ignore_eos":true"#, 1),
    ("two-prompts-stream", COMPLETIONS, r#""prompt":["three","and four more"],"max_tokens":6,"ignore_eos":true,"stream":true"#, 1),
    ("two-prompts-n2", COMPLETIONS, r#""prompt":["five is","six"],"n":2,"max_tokens":4,"ignore_eos":true"#, 2),
    ("two-prompts-n2-stream", COMPLETIONS, r#""prompt":["seven","eight of them"],"n":2,"max_tokens":4,"ignore_eos":true,"stream":true"#, 2),
];

#[tokio::test(flavor = "multi_thread")]
async fn several_choices_and_prompts_are_billed_once_and_reconciled_as_often_as_they_ran() {
    let sim = Sim::start(&["--model", "tiny", "--introspect", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "");
    for (at, (id, path, body, _)) in SEVERAL.iter().enumerate() {
        let body = format!(r#"{{"model":"tiny",{body}}}"#);
        let response = exchange(gateway.addr, &request(id, path, &body)).await;
        assert!(
            response.starts_with(b"HTTP/1.1 200"),
            "{id}: {}",
            String::from_utf8_lossy(&response)
        );
        gateway.events.wait_for(at + 1);
    }
    books::idle(sim.addr).await;
    let works = books::work_by_request(sim.addr).await;
    let events = gateway.events.now();
    assert_eq!(events.len(), SEVERAL.len());
    for (event, (id, _, _, times)) in events.iter().zip(SEVERAL) {
        let work = works[*id];
        assert_eq!(
            (&*event.request_id, event.usage_source),
            (*id, UsageSource::Reported)
        );
        assert_eq!(event.engine_prompt_tokens, Some(work.prompt), "{id}");
        assert_eq!(event.engine_completion_tokens, Some(work.completion), "{id}");
        assert_eq!(
            event.prompt_tokens.map(|billed| billed * times),
            Some(work.prompt),
            "{id}"
        );
        assert_eq!(event.completion_tokens, Some(work.completion), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_two_choices_that_its_client_left_is_booked_to_within_a_step_of_each() {
    let sim = Sim::start(&["--model", "tiny", "--introspect", "--step-base-us", "3000"]);
    let gateway = TestGateway::before(sim.addr, None, "");
    let body = |n: u32, tokens: u32| {
        format!(
            r#"{{"model":"tiny","messages":[{{"role":"user","content":"go on"}}],"n":{n},"max_tokens":{tokens},"ignore_eos":true,"stream":true}}"#
        )
    };
    exchange(gateway.addr, &request("first", CHAT, &body(1, 2))).await;
    let mut client = TcpStream::connect(gateway.addr).await.expect("a connection");
    client
        .write_all(&request("left", CHAT, &body(2, 2_000)))
        .await
        .expect("the request is taken");
    let mut seen = Vec::new();
    while seen.windows(9).filter(|window| window == b"\"content\"").count() < 20 {
        assert!(
            client.read_buf(&mut seen).await.expect("a stream") > 0,
            "the stream ended"
        );
    }
    drop(client);
    let event = gateway.events.wait_for(2).remove(1);
    books::idle(sim.addr).await;
    let work = books::work_by_request(sim.addr).await["left"];
    assert_eq!(
        (event.outcome, event.usage_source),
        (Outcome::Aborted, UsageSource::Continuous)
    );
    assert_eq!(event.engine_prompt_tokens, Some(work.prompt));
    assert_eq!(event.prompt_tokens, Some(work.prompt / 2));
    let missed = work
        .completion
        .checked_sub(event.engine_completion_tokens.expect("a count"));
    assert!(missed.is_some_and(|missed| missed <= 2), "{event:?} {work:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_that_comes_when_its_client_has_just_left_is_booked_as_one() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let gateway = TestGateway::before(addr, None, "proxy: {health_interval: 1h}\n");
    let body = r#"{"model":"tiny","messages":[]}"#;
    let mut client = TcpStream::connect(gateway.addr).await.expect("a connection");
    client
        .write_all(&request("late", CHAT, body))
        .await
        .expect("the request is taken");
    let mut upstream = loop {
        let (mut upstream, _) = listener.accept().await.expect("a connection");
        let mut head = [0; 4];
        // The first health check comes this way too; it gets no answer.
        if upstream.read_exact(&mut head).await.is_ok() && &head == b"POST" {
            break upstream;
        }
    };
    drop(client);
    // The gateway's half-close is the end of what it sends.
    upstream
        .read_to_end(&mut Vec::new())
        .await
        .expect("the gateway half-closes");
    let answer = r#"{"choices":[{"index":0}],"usage":{"prompt_tokens":5,"completion_tokens":2}}"#;
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        answer.len()
    );
    upstream
        .write_all((head + answer).as_bytes())
        .await
        .expect("the gateway still reads");
    let event = gateway.events.wait_for(1).remove(0);
    assert_eq!((event.outcome, event.status_code), (Outcome::Completed, 200));
    assert_eq!(
        (event.usage_source, event.engine_completion_tokens),
        (UsageSource::Reported, Some(2))
    );
}

/// All that must hold of any trial. `aborted` is what the tokens of aborted chat and completion streams come from.
fn check(books: &Books, aborted: UsageSource) {
    books.check_segments();
    for row in books.rows.values() {
        check_label(row);
        match row.event.outcome {
            Outcome::Completed => check_completed(row),
            Outcome::ServerError => check_failed(row),
            Outcome::Aborted if row.seen.stream => check_aborted_stream(row, aborted),
            Outcome::Aborted => check_aborted(row),
            other => panic!("no request was to end as {other:?}: {row:?}"),
        }
    }
    tally(books);
    check_teams(books);
    check_surplus(books);
    check_metrics(books);
}

/// Shows what the trial came to, for whoever runs it with `--nocapture`.
fn tally(books: &Books) {
    let mut tally: BTreeMap<String, (u64, Work)> = BTreeMap::new();
    for row in books.rows.values() {
        let Row { seen, event, .. } = row;
        let (outcome, source) = (event.outcome.name(), event.usage_source.name());
        let kind = format!(
            "{outcome} {} by {source}",
            if seen.stream { "streamed" } else { "whole" }
        );
        let (count, missed) = tally.entry(kind).or_default();
        *count += 1;
        missed.prompt += row.work.prompt.abs_diff(row.booked().prompt);
        missed.completion += row.work.completion.abs_diff(row.booked().completion);
    }
    for (kind, (count, missed)) in tally {
        println!("{count} {kind}; tokens of the engine without a booking: {missed:?}");
    }
    println!("the engines counted {:?}", books.engines);
}

/// Who asked, for what, and what came of it, as the client has it.
fn check_label(row: &Row) {
    let Row { seen, event, .. } = row;
    let path = match seen.endpoint.as_str() {
        "chat" => "/v1/chat/completions",
        "completions" => "/v1/completions",
        "embeddings" => "/v1/embeddings",
        "responses" => "/v1/responses",
        "messages" => "/v1/messages",
        other => panic!("no endpoint of this test: {other}"),
    };
    assert_eq!(
        (&*event.team_id, event.endpoint, event.capture),
        (&*seen.team, path, CapturedBy::Proxy),
        "{row:?}"
    );
    assert_eq!(
        &*event.project,
        seen.project.as_deref().unwrap_or_default(),
        "{row:?}"
    );
    assert_eq!(
        &*event.user_id,
        seen.user.as_deref().unwrap_or_default(),
        "{row:?}"
    );
    let (model, upstream) = match path {
        "/v1/embeddings" => (books::MODELS[1], "embed"),
        _ => (books::MODELS[0], "chat"),
    };
    assert_eq!((&*event.model, &*event.upstream), (model, upstream), "{row:?}");
    let ends: &[Outcome] = match seen.outcome.as_str() {
        "ok" => &[Outcome::Completed],
        "http_error" => &[Outcome::ServerError],
        // A client that leaves may have been sent everything already, or just then: whatever it was, with its status.
        "aborted" => match event.status_code {
            200 => &[Outcome::Aborted, Outcome::Completed],
            500.. => &[Outcome::Aborted, Outcome::ServerError],
            _ => &[Outcome::Aborted],
        },
        other => panic!("no request was to end as {other}: {row:?}"),
    };
    assert!(ends.contains(&event.outcome), "{row:?}");
    if let Some(status) = seen.status {
        assert_eq!(event.status_code, status, "{row:?}");
    }
    // An error, or a response whose head never came, is no stream, whatever was asked for.
    let streams = seen.stream && event.status_code == 200;
    assert_eq!(event.stream, streams, "{row:?}");
}

/// Exact, and nothing else than what the client was told.
fn check_completed(row: &Row) {
    let Row { seen, event, work } = row;
    assert_eq!(
        (event.status_code, event.usage_source),
        (200, UsageSource::Reported),
        "{row:?}"
    );
    assert_eq!(
        (row.booked(), event.engine_prompt_tokens.is_some()),
        (*work, true),
        "{row:?}"
    );
    assert!(
        work.prompt > 0 && (work.completion > 0 || seen.endpoint == "embeddings"),
        "{row:?}"
    );
    // With one choice to one prompt the engine's counts are what is billed.
    assert_eq!(event.prompt_tokens, event.engine_prompt_tokens, "{row:?}");
    assert_eq!(event.completion_tokens, event.engine_completion_tokens, "{row:?}");
    if seen.outcome == "ok" {
        let told = [seen.prompt_tokens, seen.completion_tokens];
        let booked = [event.prompt_tokens, event.completion_tokens];
        assert!(
            told.iter()
                .zip(booked)
                .all(|(told, booked)| told.is_none() || *told == booked),
            "{row:?}"
        );
        assert!(!seen.stream || event.chunks == seen.chunks, "{row:?}");
    }
}

fn check_failed(row: &Row) {
    assert_eq!(
        (row.event.status_code, row.event.usage_source),
        (500, UsageSource::None),
        "{row:?}"
    );
    assert_eq!(
        (row.booked(), row.work),
        (Work::default(), Work::default()),
        "{row:?}"
    );
}

/// A stream whose client left: to within one engine step where the server tells as it goes, else unknown.
fn check_aborted_stream(row: &Row, expected: UsageSource) {
    let Row { seen, event, work } = row;
    assert!(
        event.chunks >= seen.chunks,
        "the client cannot have taken more than passed: {row:?}"
    );
    assert!(event.ttft_us.is_some() == (event.chunks > 0), "{row:?}");
    let tells_as_it_goes =
        matches!(&*seen.endpoint, "chat" | "completions") && expected == UsageSource::Continuous;
    if event.usage_source == UsageSource::Reported {
        // Its last chunk was on its way when the client left.
        assert_eq!(row.booked(), *work, "{row:?}");
    } else if event.chunks == 0 {
        assert_eq!(
            (event.usage_source, row.booked().completion),
            (UsageSource::None, 0),
            "{row:?}"
        );
    } else if tells_as_it_goes {
        assert_eq!(event.usage_source, UsageSource::Continuous, "{row:?}");
        assert_eq!(event.engine_prompt_tokens, Some(work.prompt), "{row:?}");
        let missed = work.completion.checked_sub(row.booked().completion);
        assert!(
            missed.is_some_and(|missed| missed <= 1),
            "more than one step apart: {row:?}"
        );
    } else {
        assert_eq!(
            (event.usage_source, event.completion_tokens),
            (UsageSource::Counted, None),
            "{row:?}"
        );
        assert_eq!(event.engine_completion_tokens, None, "{row:?}");
        assert!(
            event
                .engine_prompt_tokens
                .is_none_or(|prompt| prompt == work.prompt),
            "{row:?}"
        );
    }
}

/// Without a response there is nothing to go by. One that was on its way when the client left tells all, and is then exact.
fn check_aborted(row: &Row) {
    match row.event.usage_source {
        UsageSource::Reported => assert_eq!(row.booked(), row.work, "{row:?}"),
        source => assert_eq!(
            (source, row.booked()),
            (UsageSource::None, Work::default()),
            "{row:?}"
        ),
    }
}

/// Each team's completed requests, in sum, as the engines have them.
fn check_teams(books: &Books) {
    let mut teams: BTreeMap<&str, [Work; 2]> = BTreeMap::new();
    for row in books.ended(Outcome::Completed) {
        let [booked, work] = teams.entry(&row.seen.team).or_default();
        *booked += row.booked();
        *work += row.work;
    }
    assert!(teams.len() >= 4, "{:?}", teams.keys());
    for (team, [booked, work]) in teams {
        assert_eq!(booked, work, "{team}");
        assert!(work.prompt > 0 && work.completion > 0, "{team}");
    }
}

/// What the engines' own counters have beyond the events is what requests without usage, and last steps, used; no token more.
fn check_surplus(books: &Books) {
    let logged: Work = books.rows.values().map(|row| row.work).sum();
    assert_eq!(logged, books.engines, "the simulator contradicts itself");
    let billed: Work = books
        .rows
        .values()
        .filter(|row| row.is_billable())
        .map(Row::booked)
        .sum();
    let unknown: Work = books
        .rows
        .values()
        .filter(|row| !row.is_billable())
        .map(|row| row.work)
        .sum();
    let last_steps: u64 = books
        .rows
        .values()
        .filter(|row| row.event.usage_source == UsageSource::Continuous)
        .map(|row| row.work.completion - row.booked().completion)
        .sum();
    assert_eq!(books.engines.prompt - billed.prompt, unknown.prompt);
    assert_eq!(
        books.engines.completion - billed.completion,
        unknown.completion + last_steps
    );
}

/// Prometheus has the same sums, team by team.
fn check_metrics(books: &Books) {
    let mut teams: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    books
        .rows
        .values()
        .for_each(|row| teams.entry(&row.event.team_id).or_default().push(row));
    for (team, rows) in teams {
        let sum = |family, label| of_team(&books.metrics, family, team, label);
        let billable = || rows.iter().filter(|row| row.is_billable());
        let count = |outcome| rows.iter().filter(|row| row.event.outcome == outcome).count() as u64;
        assert_eq!(sum("gateway_requests_total", ""), rows.len() as u64, "{team}");
        for outcome in [Outcome::Completed, Outcome::Aborted, Outcome::ServerError] {
            let label = format!("outcome=\"{}\"", outcome.name());
            assert_eq!(
                of_team(&books.metrics, "gateway_requests_total", team, &label),
                count(outcome),
                "{team}"
            );
        }
        let engine: Work = billable().map(|row| row.booked()).sum();
        assert_eq!(
            sum("gateway_engine_tokens_total", "type=\"prompt\""),
            engine.prompt,
            "{team}"
        );
        assert_eq!(
            sum("gateway_engine_tokens_total", "type=\"completion\""),
            engine.completion,
            "{team}"
        );
        let tokens =
            |of: fn(&RequestEvent) -> Option<u64>| billable().filter_map(|row| of(&row.event)).sum::<u64>();
        assert_eq!(
            sum("gateway_tokens_total", "type=\"prompt\""),
            tokens(|event| event.prompt_tokens),
            "{team}"
        );
        assert_eq!(
            sum("gateway_tokens_total", "type=\"completion\""),
            tokens(|event| event.completion_tokens),
            "{team}"
        );
        assert_eq!(sum("gateway_inflight_requests", ""), 0, "{team}");
    }
    let by_source = |source: UsageSource| {
        metric_sum(
            &books.metrics,
            "gateway_usage_source_total",
            &[&format!("source=\"{}\"", source.name())],
        )
    };
    for source in [
        UsageSource::Reported,
        UsageSource::Continuous,
        UsageSource::Counted,
    ] {
        let count = books
            .rows
            .values()
            .filter(|row| row.event.usage_source == source)
            .count();
        assert_eq!(by_source(source), count as f64, "{source:?}");
    }
}
