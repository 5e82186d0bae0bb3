//! What the gateway booked against what the simulated engine counted, and the states of engines that it tells apart.

mod support;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use support::{Sim, TestGateway, eventually, exchange, metric_sum, post};
use vllm_gateway::config::Config;
use vllm_gateway::ledger::Condition;
use vllm_gateway::metrics::{Limits, Metrics};
use vllm_gateway::vllm::scrape::Scraper;
use vllm_gateway::vllm::{SampleSink, SystemSample};

const TOKENS: u64 = 8;

fn chat(model: &str, more: &str) -> Vec<u8> {
    let body = format!(
        r#"{{"model":"{model}","ignore_eos":true,"max_tokens":{TOKENS},"messages":[{{"role":"user","content":"hi"}}]{more}}}"#
    );
    post("/v1/chat/completions", "search", &body)
}

fn upstream(addr: SocketAddr, more: &str) -> String {
    format!(
        "upstreams:\n  - {{name: chat, url: \"http://{addr}\", serves: generate{more}}}\nvllm: {{scrape_interval: 20ms}}\n"
    )
}

async fn ask(addr: SocketAddr, request: &[u8]) {
    let response = exchange(addr, request).await;
    let text = String::from_utf8_lossy(&response);
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
}

/// Waits until `family` has `value` with all of `labels`; returns the page.
async fn until(gateway: &TestGateway, family: &str, labels: &[&str], value: f64) -> String {
    eventually(&format!("{family}{labels:?} to be {value}"), async || {
        let text = gateway.metrics().await;
        (text.contains(family) && metric_sum(&text, family, labels) == value).then_some(text)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_through_is_accounted_for_and_what_went_past_is_a_gap_with_a_likely_cause() {
    let sim = Sim::start(&["--model", "tiny"]);
    let yaml = upstream(sim.addr, "")
        + "ledger: {settle_after: 200ms}\nreconciliation: {gap_tokens: 20, gap_share: 0.05, window: 1h}\n";
    let gateway = TestGateway::start(&yaml);
    until(&gateway, "gateway_scrape_success", &[], 1.0).await;
    for more in ["", r#","stream":true"#, r#","n":2"#] {
        ask(gateway.addr, &chat("tiny", more)).await;
    }
    let completion = ["type=\"completion\""];
    let prompt = ["type=\"prompt\""];
    let engine = "gateway_reconciliation_engine_tokens_total";
    let attributed = "gateway_reconciliation_attributed_tokens_total";
    until(&gateway, engine, &completion, (4 * TOKENS) as f64).await;
    let text = until(&gateway, attributed, &completion, (4 * TOKENS) as f64).await;
    assert!(metric_sum(&text, attributed, &prompt) > 0.0);
    assert_eq!(
        metric_sum(&text, attributed, &prompt),
        metric_sum(&text, engine, &prompt)
    );
    assert_eq!(metric_sum(&text, "gateway_reconciliation_gap_exceeded", &[]), 0.0);

    for _ in 0..10 {
        ask(sim.addr, &chat("tiny", "")).await;
    }
    let exceeded = "gateway_reconciliation_gap_exceeded";
    let text = until(&gateway, exceeded, &completion, 1.0).await;
    assert!(metric_sum(&text, "gateway_reconciliation_gap_tokens", &completion) > 20.0);
    let cause = |cause: &str| {
        metric_sum(
            &text,
            "gateway_reconciliation_gap_cause",
            &[&format!("cause=\"{cause}\"")],
        )
    };
    assert_eq!(
        (cause("direct_unseen"), cause("direct"), cause("unexplained")),
        (1.0, 0.0, 0.0)
    );
    until(
        &gateway,
        "gateway_reconciliation_gap_tokens",
        &completion,
        (10 * TOKENS) as f64,
    )
    .await;
}

#[derive(Default)]
struct Kept(Mutex<Vec<SystemSample>>);

impl SampleSink for Kept {
    fn record(&self, sample: &SystemSample) {
        self.0
            .lock()
            .expect("no panic while rows are held")
            .push(sample.clone());
    }
}

#[tokio::test]
async fn a_server_that_loads_its_model_is_down_until_it_says_since_when_it_was_there() {
    let sim = Sim::start(&["--model", "tiny", "--load-time", "2s"]);
    let config = Config::parse("test.yaml", &upstream(sim.addr, ""), &|_| None).expect("a config");
    let metrics = Metrics::new(Limits::default()).expect("families do not clash");
    let kept = Arc::new(Kept::default());
    let sinks = vec![Arc::clone(&kept) as Arc<dyn SampleSink>];
    let mut scraper = Scraper::new("gw", &config.upstreams[0], metrics.scrape("chat"), sinks);
    eventually("the model to be loaded", async || {
        let samples = scraper.scrape().await;
        samples[0].ok.then_some(())
    })
    .await;
    let rows = kept.0.lock().expect("no panic while rows are held").clone();
    let of = |condition: Condition| -> Vec<i64> {
        let such = rows.iter().filter(|row| row.condition == Some(condition));
        such.map(|row| row.scraped_at_ms).collect()
    };
    assert!(
        !of(Condition::Down).is_empty(),
        "connections are refused while it loads"
    );
    assert_eq!(
        of(Condition::Down),
        of(Condition::Loading),
        "each is written again, under its own key"
    );
    assert_eq!(of(Condition::Up).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_sleeps_or_is_scaled_to_zero_is_not_down() {
    let sim = Sim::start(&["--model", "tiny", "--dev-mode"]);
    let gateway = TestGateway::start(&upstream(sim.addr, ", scale_to_zero: true"));
    let is = async |condition: &str| {
        let label = format!("condition=\"{condition}\"");
        until(&gateway, "gateway_upstream_condition", &[&label], 1.0).await;
    };
    is("up").await;
    ask(sim.addr, &post("/sleep?level=2", "ops", "")).await;
    is("asleep").await;
    ask(sim.addr, &post("/wake_up", "ops", "")).await;
    is("up").await;
    drop(sim);
    is("scaled_to_zero").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_to_half_of_a_disaggregated_pair_are_events_without_segments() {
    let sim = Sim::start(&["--model", "tiny", "--disaggregated"]);
    let gateway = TestGateway::start(&upstream(sim.addr, ""));
    let reason = ["reason=\"kv_connector\""];
    until(&gateway, "gateway_upstream_unsupported", &reason, 1.0).await;
    ask(gateway.addr, &chat("tiny", "")).await;
    let events = gateway.events.wait_for(1);
    assert_eq!(
        events[0].completion_tokens,
        Some(TOKENS),
        "what it used is known all the same"
    );
    assert!(
        gateway.events.segments().is_empty(),
        "nobody is billed as if this server had prefilled"
    );

    let cache = TestGateway::start(&upstream(sim.addr, ", external_kv_is_cache: true"));
    let text = until(&cache, "gateway_scrape_success", &[], 1.0).await;
    assert_eq!(metric_sum(&text, "gateway_upstream_unsupported", &[]), 0.0);
    ask(cache.addr, &chat("tiny", "")).await;
    cache.events.wait_for(1);
    assert!(!cache.events.segments().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_billed_by_its_name_and_reconciled_by_its_base_model() {
    let sim = Sim::start(&["--model", "tiny", "--lora", "poet"]);
    let gateway = TestGateway::start(&upstream(sim.addr, ""));
    until(&gateway, "gateway_scrape_success", &[], 1.0).await;
    ask(gateway.addr, &chat("poet", "")).await;
    let event = gateway.events.wait_for(1).remove(0);
    assert_eq!(
        (&*event.model, event.base_model.as_deref()),
        ("poet", Some("tiny"))
    );
    let row = serde_json::to_value(&event).expect("JSON");
    assert_eq!(
        (&row["model"], &row["base_model"]),
        (&"poet".into(), &"tiny".into())
    );
    let completion = ["type=\"completion\""];
    let attributed = "gateway_reconciliation_attributed_tokens_total";
    until(&gateway, attributed, &completion, TOKENS as f64).await;
    until(
        &gateway,
        "gateway_reconciliation_engine_tokens_total",
        &completion,
        TOKENS as f64,
    )
    .await;
}
