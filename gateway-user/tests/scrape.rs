//! What the gateway reads at an upstream's own `/metrics`, against what the simulated engine says it did.

mod support;

use serde_json::Value;
use support::{Sim, TestGateway, eventually, exchange, metric_sum, post};
use vllm_gateway::config::Config;
use vllm_gateway::metrics::{Limits, Metrics};
use vllm_gateway::vllm::SystemSample;
use vllm_gateway::vllm::scrape::Scraper;

const REQUESTS: u64 = 5;
const TOKENS: u64 = 8;

fn scraper(sim: &Sim) -> Scraper {
    let yaml = format!(
        "upstreams:\n  - {{name: chat, url: \"{}\", serves: generate}}\n",
        sim.url()
    );
    let config = Config::parse("test.yaml", &yaml, &|_| None).unwrap_or_else(|error| panic!("{error}"));
    let metrics = Metrics::new(Limits::default()).expect("families do not clash");
    Scraper::new("gw", &config.upstreams[0], metrics.scrape("chat"), Vec::new())
}

async fn scrape(scraper: &mut Scraper) -> SystemSample {
    let [sample] = <[_; 1]>::try_from(scraper.scrape().await).expect("one model, one sample");
    assert_eq!((&*sample.model, sample.error, sample.engines), ("tiny", "", 1));
    sample
}

/// One of the engine's own totals.
async fn total(sim: &Sim, name: &str) -> u64 {
    let request = b"GET /sim/totals HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let response = String::from_utf8(exchange(sim.addr, request).await).expect("text");
    let (_, body) = response.split_once("\r\n\r\n").expect("a head and a body");
    let totals: Value = serde_json::from_str(body).expect("JSON");
    totals[name]
        .as_u64()
        .unwrap_or_else(|| panic!("no {name} in {body}"))
}

fn chat() -> Vec<u8> {
    let body = format!(
        r#"{{"model":"tiny","ignore_eos":true,"max_tokens":{TOKENS},"messages":[{{"role":"user","content":"hi"}}]}}"#
    );
    post("/v1/chat/completions", "search", &body)
}

#[tokio::test]
async fn the_difference_of_two_scrapes_is_what_the_engine_did_between_them() {
    let sim = Sim::start(&["--model", "tiny", "--introspect"]);
    let mut scraper = scraper(&sim);
    exchange(sim.addr, &chat()).await;
    let first = scrape(&mut scraper).await;
    let prompt_before = total(&sim, "prompt_tokens").await;
    assert_eq!(first.prompt_tokens_total, Some(prompt_before));
    assert_eq!(
        (first.generation_tokens_total, first.generation_tokens_delta),
        (Some(TOKENS), None)
    );
    for _ in 0..REQUESTS {
        let response = exchange(sim.addr, &chat()).await;
        assert!(
            response.starts_with(b"HTTP/1.1 200 "),
            "{}",
            String::from_utf8_lossy(&response)
        );
    }
    let second = scrape(&mut scraper).await;
    assert!(!second.counter_reset);
    assert_eq!(
        second.prompt_tokens_delta,
        Some(total(&sim, "prompt_tokens").await - prompt_before)
    );
    assert!(second.prompt_tokens_delta.is_some_and(|tokens| tokens > 0));
    assert_eq!(second.generation_tokens_delta, Some(REQUESTS * TOKENS));
    assert_eq!(second.request_success["length"], REQUESTS);
    assert_eq!(second.request_success.values().sum::<u64>(), REQUESTS);
    for latency in [
        second.ttft,
        second.itl,
        second.queue,
        second.prefill,
        second.decode,
    ] {
        let [p50_us, p95_us, p99_us] = [latency.p50_us, latency.p95_us, latency.p99_us];
        assert!(
            p50_us.is_some() && p50_us <= p95_us && p95_us <= p99_us,
            "{latency:?}"
        );
    }
    let idle = scrape(&mut scraper).await;
    assert_eq!((idle.generation_tokens_delta, idle.ttft.p50_us), (Some(0), None));
    assert_eq!((idle.running, idle.waiting), (Some(0.0), Some(0.0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_shows_what_its_upstreams_say_and_nothing_of_one_that_is_gone() {
    let sim = Sim::start(&["--model", "tiny"]);
    let gateway = TestGateway::before(sim.addr, None, "vllm: {scrape_interval: 50ms}\n");
    let tiny = ["upstream=\"chat\"", "model=\"tiny\""];
    eventually("the first scrape", async || {
        let text = gateway.metrics().await;
        text.contains("gateway_vllm_generation_tokens_total{")
            .then_some(())
    })
    .await;
    exchange(gateway.addr, &chat()).await;
    let text = eventually("the tokens to show", async || {
        let text = gateway.metrics().await;
        (metric_sum(&text, "gateway_vllm_generation_tokens_total", &tiny) == TOKENS as f64).then_some(text)
    })
    .await;
    assert_eq!(
        metric_sum(&text, "gateway_scrape_success", &["upstream=\"chat\""]),
        1.0
    );
    let ended = ["reason=\"length\"", tiny[0], tiny[1]];
    assert_eq!(
        metric_sum(&text, "gateway_vllm_request_success_total", &ended),
        1.0
    );
    drop(sim);
    // A page of the gateway's is not read at one instant, hence all of it together.
    eventually(
        "the failed scrape to show, and the server's own figures to go",
        async || {
            let text = gateway.metrics().await;
            let failed = metric_sum(&text, "gateway_scrape_failures_total", &["reason=\"connect\""]) >= 1.0;
            let success = metric_sum(&text, "gateway_scrape_success", &["upstream=\"chat\""]);
            (failed && success == 0.0 && !text.contains("gateway_vllm_")).then_some(())
        },
    )
    .await;
}
