//! Limits of teams, as clients meet them: what is beyond is refused in words that they understand, is booked, and never gets to an upstream.

mod support;

use serde_json::Value;
use std::time::Instant;
use support::upstream::{Talk, Upstream};
use support::{Sim, TestGateway, eventually, exchange, metric_sum, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vllm_gateway::ledger::NanoUsd;
use vllm_gateway::wire::exchange::Outcome;

const CHAT: &str = "/v1/chat/completions";
const ASK: &str =
    r#"{"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "a few words"}]}"#;

/// An answer, taken apart.
struct Answer {
    status: u16,
    head: String,
    body: Value,
}

impl Answer {
    /// The value of a field.
    fn field(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    fn retry_after_s(&self) -> u64 {
        self.field("retry-after")
            .expect("a time")
            .parse()
            .expect("seconds")
    }
}

async fn send(gateway: &TestGateway, request: &[u8]) -> Answer {
    let answer = String::from_utf8(exchange(gateway.addr, request).await).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).expect("a status");
    Answer {
        status: status.parse().expect("a number"),
        body: serde_json::from_str(body).unwrap_or_default(),
        head: head.to_ascii_lowercase(),
    }
}

async fn ask(gateway: &TestGateway, team: &str) -> Answer {
    send(gateway, &post(CHAT, team, ASK)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_team_at_its_limit_is_refused_and_booked_and_nobody_else_notices() {
    let upstream = Upstream::recording().await;
    let more = "limits: {teams: [{team: red, requests_per_minute: 3}]}\n";
    let gateway = TestGateway::before(upstream.addr, None, more);
    for _ in 0..3 {
        assert_eq!(ask(&gateway, "red").await.status, 200);
    }
    let refused = ask(&gateway, "red").await;
    assert_eq!(refused.status, 429, "{}", refused.head);
    let error = &refused.body["error"];
    assert_eq!(error["code"], "rate_limit_exceeded");
    assert_eq!(error["type"], "rate_limit_error");
    let message = error["message"].as_str().expect("a message");
    assert!(
        message.contains("team red") && message.contains("3 a minute"),
        "{message}"
    );
    assert!((1..=20).contains(&refused.retry_after_s()), "{}", refused.head);
    assert_eq!(refused.field("x-ratelimit-limit-requests"), Some("3"));
    assert_eq!(refused.field("x-ratelimit-remaining-requests"), Some("0"));
    assert!(
        refused
            .field("x-ratelimit-reset-requests")
            .expect("a time")
            .ends_with('s')
    );
    assert_eq!(upstream.seen.count(), 3, "nothing of it got there");
    for _ in 0..5 {
        let passed = ask(&gateway, "blue").await;
        assert_eq!(passed.status, 200);
        assert!(!passed.head.contains("x-ratelimit"), "{}", passed.head);
    }
    let events = gateway.events.wait_for(9);
    let booked: Vec<_> = events.iter().filter(|event| event.status_code == 429).collect();
    assert_eq!(booked.len(), 1, "one event for one request");
    assert_eq!(
        (booked[0].outcome, &*booked[0].team_id),
        (Outcome::Refused, "red")
    );
    assert_eq!(&*booked[0].error_type, "requests_per_minute_exceeded");
    assert_eq!(
        (booked[0].prompt_tokens, booked[0].charge, &*booked[0].upstream),
        (None, NanoUsd(0), "")
    );
    let metrics = gateway.metrics().await;
    let of_red = |family: &str, more: &str| {
        metric_sum(
            &metrics,
            family,
            &["team=\"red\"", "limit=\"requests_per_minute\"", more],
        )
    };
    assert_eq!(
        of_red("gateway_limited_requests_total", "action=\"refused\""),
        1.0
    );
    assert_eq!(
        (of_red("gateway_limit", ""), of_red("gateway_limit_used", "")),
        (3.0, 3.0)
    );
    assert_eq!(
        metric_sum(
            &metrics,
            "gateway_refused_total",
            &["requests_per_minute_exceeded"]
        ),
        1.0
    );
    assert_eq!(metric_sum(&metrics, "gateway_limit", &["team=\"blue\""]), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_after_the_time_that_was_told_is_let_in() {
    let upstream = Upstream::recording().await;
    let gateway = TestGateway::before(
        upstream.addr,
        None,
        "limits: {default: {requests_per_minute: 60}}\n",
    );
    let full = eventually("the limit", async || {
        let answer = ask(&gateway, "red").await;
        (answer.status == 429).then_some(answer)
    });
    let full = full.await;
    let (told, told_s) = (Instant::now(), full.retry_after_s());
    assert_eq!(told_s, 1, "one a second: {}", full.head);
    let mut refused_last = told;
    eventually("the next one to be let in", async || {
        let before = Instant::now();
        let answer = ask(&gateway, "red").await;
        if answer.status == 429 {
            refused_last = before;
        }
        (answer.status == 200).then_some(())
    })
    .await;
    assert!(
        (refused_last - told).as_secs() < told_s,
        "refused after the time that it was told to wait"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_is_free_again_when_its_client_has_left() {
    let (upstream, gate) = Upstream::gated().await;
    let more = "limits: {default: {concurrent_requests: 1}}\nproxy: {health_interval: 1h}\n";
    let gateway = TestGateway::before(upstream.addr, None, more);
    let mut client = TcpStream::connect(gateway.addr).await.expect("a connection");
    client
        .write_all(&post(CHAT, "red", ASK))
        .await
        .expect("it is taken");
    eventually("the request at the upstream", async || {
        (upstream.seen.count() == 1).then_some(())
    })
    .await;
    let refused = ask(&gateway, "red").await;
    assert_eq!((refused.status, refused.retry_after_s()), (429, 1));
    assert_eq!(refused.field("x-ratelimit-limit-concurrent-requests"), Some("1"));
    assert_eq!(
        &*gateway.events.wait_for(1)[0].error_type,
        "concurrent_requests_exceeded"
    );
    drop(client);
    let ended = gateway.events.wait_for(2);
    assert_eq!(ended[1].outcome, Outcome::Aborted);
    // Of another connection, which answers at once.
    gate.add_permits(100);
    assert_eq!(ask(&gateway, "red").await.status, 200);
    let metrics = gateway.metrics().await;
    assert_eq!(
        metric_sum(&metrics, "gateway_limit_used", &["concurrent_requests"]),
        0.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_is_free_again_when_the_upstream_has_failed() {
    let broken = Upstream::start(|mut talk: Talk| async move {
        talk.request().await;
        talk.reset();
    });
    let gateway = TestGateway::before(
        broken.await.addr,
        None,
        "limits: {default: {concurrent_requests: 1}}\n",
    );
    for _ in 0..3 {
        let answer = ask(&gateway, "red").await;
        assert!([502, 503].contains(&answer.status), "{}", answer.head);
    }
    let metrics = gateway.metrics().await;
    assert_eq!(metric_sum(&metrics, "gateway_limited_requests_total", &[]), 0.0);
    assert_eq!(
        metric_sum(&metrics, "gateway_limit_used", &["concurrent_requests"]),
        0.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_taken_when_they_are_known_and_a_debt_is_waited_for() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "limits: {default: {tokens_per_minute: 6}}\n");
    assert_eq!(ask(&gateway, "red").await.status, 200);
    let used = gateway.events.wait_for(1)[0].clone();
    let used = used
        .prompt_tokens
        .zip(used.completion_tokens)
        .map(|(prompt, completion)| prompt + completion);
    let used = used.expect("the simulator tells");
    assert!(used > 6, "{used}");
    let refused = ask(&gateway, "red").await;
    assert_eq!(
        (refused.status, refused.field("x-ratelimit-remaining-tokens")),
        (429, Some("0"))
    );
    // The debt, and one more; ten seconds each.
    let told = refused.retry_after_s();
    assert!(
        told <= (used - 6 + 1) * 10 && told > (used - 6) * 10,
        "{told} s for {used} tokens"
    );
    assert_eq!(refused.body["error"]["code"], "rate_limit_exceeded");
    let metrics = gateway.metrics().await;
    assert_eq!(
        metric_sum(&metrics, "gateway_limit_used", &["tokens_per_minute"]),
        used as f64
    );
    assert_eq!(ask(&gateway, "blue").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_runs_is_known_to_use_tokens() {
    let sim = Sim::start(&["--model", "tiny", "--step-base-us", "20000"]);
    let gateway = TestGateway::before(sim.addr, None, "limits: {default: {tokens_per_minute: 40}}\n");
    let ask_long = r#"{"model": "tiny", "max_tokens": 5000, "ignore_eos": true, "stream": true, "messages": [{"role": "user", "content": "go on"}]}"#;
    let mut client = TcpStream::connect(gateway.addr).await.expect("a connection");
    client
        .write_all(&post(CHAT, "red", ask_long))
        .await
        .expect("it is taken");
    let reading = tokio::spawn(async move {
        let mut some = vec![0; 64 * 1024];
        while client.read(&mut some).await.is_ok_and(|read| read > 0) {}
    });
    // Nobody else uses any.
    eventually("more to be used than there is", async || {
        let used = metric_sum(
            &gateway.metrics().await,
            "gateway_limit_used",
            &["tokens_per_minute"],
        );
        (used > 40.0).then_some(())
    })
    .await;
    assert!(gateway.events.now().is_empty(), "the stream has not ended");
    let refused = ask(&gateway, "red").await;
    assert_eq!(
        (refused.status, &refused.body["error"]["code"]),
        (429, &Value::from("rate_limit_exceeded"))
    );
    assert!(!reading.is_finished(), "the stream itself goes on");
    reading.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spent_budget_is_refused_as_a_quota_and_observing_refuses_nothing() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let budget = "budget: {usd: 0.000001, period: day}";
    let more = format!("limits: {{teams: [{{team: red, {budget}}}]}}\n");
    let gateway = TestGateway::before(sim.addr, None, &more);
    assert_eq!(ask(&gateway, "red").await.status, 200);
    let refused = ask(&gateway, "red").await;
    assert_eq!(
        (refused.status, &refused.body["error"]["code"]),
        (429, &Value::from("budget_exceeded"))
    );
    assert_eq!(refused.body["error"]["type"], "insufficient_quota");
    assert!((1..=86_400).contains(&refused.retry_after_s()));
    let charged = gateway.events.wait_for(2)[0].charge.0 as f64 / 1e9;
    let metrics = gateway.metrics().await;
    let labels = ["team=\"red\"", "period=\"day\""];
    assert!((metric_sum(&metrics, "gateway_budget_spent_usd", &labels) - charged).abs() < 1e-12);
    assert_eq!(metric_sum(&metrics, "gateway_budget_usd", &labels), 0.000001);

    let more = format!("limits: {{mode: observe, default: {{requests_per_minute: 2, {budget}}}}}\n");
    let gateway = TestGateway::before(sim.addr, None, &more);
    for _ in 0..6 {
        assert_eq!(ask(&gateway, "red").await.status, 200);
    }
    let metrics = gateway.metrics().await;
    let limited = |labels: &[&str]| metric_sum(&metrics, "gateway_limited_requests_total", labels);
    assert_eq!((limited(&["observed"]), limited(&["refused"])), (5.0, 0.0));
    assert_eq!(limited(&["limit=\"budget\""]), 5.0, "it lasts longest");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_costs_nothing_is_not_limited_and_messages_are_refused_in_their_own_shape() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "limits: {default: {requests_per_minute: 1}}\n");
    assert_eq!(ask(&gateway, "red").await.status, 200);
    for path in ["/v1/models", "/version"] {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nX-Team-ID: red\r\nConnection: close\r\n\r\n");
        assert_eq!(send(&gateway, request.as_bytes()).await.status, 200, "{path}");
    }
    let body = r#"{"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}"#;
    let refused = send(&gateway, &post("/v1/messages", "red", body)).await;
    assert_eq!(
        (refused.status, &refused.body["type"]),
        (429, &Value::from("error"))
    );
    assert_eq!(refused.body["error"]["type"], "rate_limit_error");
    assert!(refused.field("retry-after").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_client_keeps_its_connection_and_the_event_says_which_model_it_wanted() {
    let upstream = Upstream::recording().await;
    let gateway = TestGateway::before(
        upstream.addr,
        None,
        "limits: {default: {requests_per_minute: 1}}\n",
    );
    let open = String::from_utf8(post(CHAT, "red", ASK)).expect("text");
    let open = open.replace("Connection: close\r\n", "");
    let last = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Team-ID: red\r\nConnection: close\r\n\r\n";
    let requests = [open.as_bytes(), open.as_bytes(), last].concat();
    let answers = String::from_utf8(exchange(gateway.addr, &requests).await).expect("text");
    let statuses: Vec<&str> = answers
        .split("HTTP/1.1 ")
        .filter_map(|answer| answer.split(' ').next().filter(|status| !status.is_empty()))
        .collect();
    assert_eq!(statuses, ["200", "429", "200"], "{answers}");
    let refused = gateway.events.wait_for(3)[1].clone();
    assert_eq!((refused.status_code, &*refused.model), (429, "tiny"));
    // A client that would wait for leave to send its body is told at once, and does not send it.
    let expecting = open.replace("Host: a\r\n", "Host: a\r\nExpect: 100-continue\r\n");
    let (head, _) = expecting.split_once("\r\n\r\n").expect("a head");
    let answer =
        String::from_utf8(exchange(gateway.addr, format!("{head}\r\n\r\n").as_bytes()).await).expect("text");
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
}
