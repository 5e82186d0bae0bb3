//! On its way out the gateway lets streams in flight finish and takes no new connections.

mod support;

use support::{Sim, TestGateway, eventually, exchange, post};
use tokio::net::TcpStream;
use vllm_gateway::wire::exchange::Outcome;

const STREAMS: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn streams_in_flight_finish_and_new_connections_are_refused() {
    let sim = Sim::start(&["--model", "tiny", "--step-base-us", "10000"]);
    let mut gateway = TestGateway::before(sim.addr, None, "");
    let addr = gateway.addr;
    let body = r#"{"model":"tiny","stream":true,"ignore_eos":true,"max_tokens":100,"messages":[{"role":"user","content":"hi"}]}"#;
    let request = post("/v1/chat/completions", "search", body);
    let streams: Vec<_> = (0..STREAMS)
        .map(|_| {
            let request = request.clone();
            tokio::spawn(async move { exchange(addr, &request).await })
        })
        .collect();
    eventually("all streams to run", async || {
        let text = gateway.metrics().await;
        (support::metric_sum(&text, "gateway_inflight_requests", &[]) == STREAMS as f64).then_some(())
    })
    .await;
    gateway.drain();
    eventually("new connections to be refused", async || {
        TcpStream::connect(addr).await.err()
    })
    .await;
    for stream in streams {
        let response = String::from_utf8(stream.await.expect("no panic")).expect("text");
        assert!(
            response.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"),
            "cut off: {response}"
        );
        assert_eq!(
            response.matches("\"content\":\"").count() - 1,
            100,
            "every token arrived, behind the role"
        );
    }
    let events = gateway.events.clone();
    assert_eq!(gateway.drained(), 0, "nothing had to be cut off");
    let events = events.wait_for(STREAMS);
    assert_eq!(events.len(), STREAMS);
    for event in events {
        assert_eq!(
            (event.outcome, event.completion_tokens),
            (Outcome::Completed, Some(100))
        );
    }
}
