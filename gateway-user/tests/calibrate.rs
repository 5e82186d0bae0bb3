//! `vllm-gateway calibrate` as an operator meets it: the real program, against ClickHouse's own engine with the segments and scrapes of a simulated engine whose
//! costs are known.
//!
//! This test needs libchdb, which `cargo xtask test` fetches; without it it fails and says so.

mod support;
#[allow(dead_code, reason = "the bench uses the rest")]
mod trials;

use clickhouse::Client;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use trials::books::{segments, told};
use trials::mix::Mix;
use trials::truth::Trial;
use trials::{Engine, Ran};
use vllm_gateway::ledger::segment::kv_token_seconds;
use vllm_gateway::store::embedded::{EmbeddedOptions, EmbeddedServer};
use vllm_gateway::store::migrate::{self, Layout};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vllm-gateway");

fn calibrate(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .args(["calibrate", "--config", "config.yaml"])
        .args(arguments);
    command
        .current_dir(dir)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

fn lines(rows: impl Iterator<Item = Value>) -> String {
    rows.map(|row| format!("{row}\n")).collect()
}

/// The rows that a gateway would have stored of a trial: of its requests, and of two scrapes a window.
fn rows(ran: &Ran) -> (String, String) {
    let segments = segments(ran, &told).into_iter().flat_map(|(window, of_window)| {
        of_window.into_iter().map(move |segment| {
            json!({
                "window_start": window.start().0 / 1_000_000, "upstream": "chat", "event_id": segment.event_id, "team_id": "t",
                "run_start": segment.run.from().0, "run_end": segment.run.to().0, "prompt_tokens": segment.work.prompt_tokens,
                "cached_tokens": segment.work.cached_tokens, "completion_tokens": segment.work.completion_tokens,
                "kv_token_seconds": kv_token_seconds(segment.work.kv_token_us), "gateway_id": "gw"
            })
        })
    });
    let scrapes = ran.looks.windows(2).map(|pair| {
        let count = |at: usize| pair[at].stats.iteration_tokens.count();
        json!({
            "scraped_at": pair[1].at.0 / 1_000, "gateway_id": "gw", "upstream": "chat", "model": "m", "ok": true,
            "interval_us": pair[1].at.0 - pair[0].at.0, "engine_steps_total": count(1), "engine_steps_delta": count(1) - count(0)
        })
    });
    (lines(segments), lines(scrapes))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_costs_of_an_engine_are_found_in_what_was_stored_of_its_requests() {
    let dir = std::env::temp_dir().join(format!("vllm-gateway-calibrate-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let addr = TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a port");
    let config = format!("store: {{url: embedded, embedded_listen: \"{addr}\"}}\n");
    std::fs::write(dir.join("config.yaml"), config).expect("a file");
    let options = EmbeddedOptions {
        program: PROGRAM.into(),
        listen: addr,
        data_dir: dir.join("clickhouse"),
        libchdb: None,
        user: None,
        password: None,
    };
    let engine = EmbeddedServer::spawn(options, &|name| std::env::var_os(name)).expect("the engine starts");
    engine.ready(support::DEADLINE).await.expect("the engine answers");
    let client = Client::default().with_url(format!("http://{addr}"));
    let layout = Layout {
        database: "vllm_attribution".to_owned(),
        cluster: None,
        // The rows are of a day that will be long ago. Twenty-seven years on is still a date that ClickHouse's `DateTime` holds, which ends in 2106.
        raw_ttl_days: 10_000,
        ledger_ttl_days: 10_000,
    };
    migrate::migrate(&client, &layout).await.expect("a schema");

    let simulated = Engine::h100();
    let mix = Mix::all()
        .into_iter()
        .find(|mix| mix.name == "prefill-heavy and chat");
    let trial = Trial {
        engine: &simulated,
        mix: &mix.expect("a mix of that name"),
        seed: 8,
        seconds: 3_600,
        factor: 1.0,
    };
    let (segments, scrapes) = rows(&trial.run());
    let client = client.with_database("vllm_attribution");
    for (table, rows) in [("request_segments", segments), ("vllm_system_metrics", scrapes)] {
        let insert = client.query_raw(&format!("INSERT INTO {table} FORMAT JSONEachRow {rows}"));
        insert
            .execute()
            .await
            .unwrap_or_else(|error| panic!("{table}: {error}"));
    }

    let day = ["--from", "2026-01-01", "--to", "2026-01-02"];
    let output = calibrate(&dir, &[&day[..], &["--format", "json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{errors}{}",
        String::from_utf8_lossy(&output.stdout)
    );
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let chat = &found["upstreams"]["chat"];
    for (part, us) in [
        ("prompt_token", simulated.cost.prefill_us_per_token),
        ("step", simulated.cost.base_us),
    ] {
        let seconds = chat["estimates"][part]["seconds"].as_f64().expect("a number");
        assert!((seconds * 1e6 / us - 1.0).abs() < 0.1, "{part}: {chat:#}");
        assert_eq!(chat["estimates"][part]["trusted"], true, "{chat:#}");
    }
    assert_eq!(chat["weights"]["prompt"], 1.0);
    assert!(
        chat["theta"]
            .as_f64()
            .is_some_and(|theta| (0.4..0.8).contains(&theta)),
        "{chat:#}"
    );
    let embeddings = found["upstreams"]["embeddings"]["error"]
        .as_str()
        .expect("nothing ran there");
    assert!(embeddings.contains("found 0"), "{embeddings}");

    let text = String::from_utf8(calibrate(&dir, &day).stdout).expect("text");
    assert!(
        text.contains("    weights:\n      prompt: 1\n      completion: "),
        "{text}"
    );
    let short = calibrate(
        &dir,
        &["--from", "2026-01-01T00:10:00Z", "--to", "2026-01-01T00:20:00Z"],
    );
    assert_eq!(short.status.code(), Some(1));
    let text = String::from_utf8(short.stdout).expect("text");
    assert!(
        text.contains("expected at least 40 whole minutes in which requests ran, found 10"),
        "{text}"
    );
    engine.stop().await;
    std::fs::remove_dir_all(&dir).expect("it is there");
}
