//! `vllm-gateway report` as an operator meets it: the real program, against ClickHouse's own engine with rows whose figures were computed by hand.
//!
//! These tests need libchdb, which `cargo xtask test` fetches; without it they fail and say so.

mod report_support;
mod support;

use report_support::{Installed, layout, text};
use serde_json::{Value, json};
use support::eventually;
use vllm_gateway::config::SpoolConfig;
use vllm_gateway::store::migrate;
use vllm_gateway::store::{Store, Waiting};

/// 2026-11-24T00:00:00Z in microseconds since 1970.
const MIDNIGHT_US: i64 = 1_795_478_400_000_000;

/// The period of most tests.
const DAY: [&str; 4] = ["--from", "2026-11-24", "--to", "2026-11-25"];

/// A completed chat of team `a` that ended `end_s` after midnight, with what `more` says.
fn row(event: &str, end_s: i64, more: Value) -> Value {
    let mut row = json!({
        "event_id": event, "team_id": "a", "project": "p", "user_id": "u", "model": "m", "endpoint": "/v1/chat/completions",
        "duration_us": 2_000_000, "outcome": "completed", "usage_source": "reported"
    });
    let (row_map, more) = (
        row.as_object_mut().expect("an object"),
        more.as_object().expect("an object").clone(),
    );
    row_map.extend(more);
    let duration_us = row_map["duration_us"].as_i64().expect("a number");
    row_map.insert(
        "started_at".to_owned(),
        (MIDNIGHT_US + end_s * 1_000_000 - duration_us).into(),
    );
    row
}

/// The day: three completed chats of `a` (one row twice), an embedding and an unknown route; of `b` an abort, an error, a refusal, a crash.
fn day() -> Vec<Value> {
    let chat = |event: &str, end_s, prompt: u64, ttft_us: u64, duration_us: u64| {
        let more = json!({
            "prompt_tokens": prompt, "cached_tokens": 8, "completion_tokens": 10, "ttft_us": ttft_us, "itl_mean_us": ttft_us / 10,
            "duration_us": duration_us
        });
        row(event, end_s, more)
    };
    let of_b = |event: &str, outcome: &str, more: Value| {
        let mut row = row(event, 3600, more);
        row["team_id"] = "b".into();
        row["outcome"] = outcome.into();
        row
    };
    let in_batch = |batch: &str, mut row: Value| {
        row["batch"] = batch.into();
        row
    };
    vec![
        // Began the day before, and counts where it ended.
        chat("a1", 1, 100, 10_000, 2_000_000),
        chat("a2", 600, 200, 20_000, 3_000_000),
        // In another batch, so that no insert deduplicates it.
        in_batch("again", chat("a2", 600, 200, 20_000, 3_000_000)),
        chat("a3", 700, 300, 30_000, 4_000_000),
        row("a4", 800, json!({"endpoint": "/v1/embeddings", "model": "e", "prompt_tokens": 5, "project": "q", "duration_us": 1000})),
        // A list of models has no tokens, which is not unknown.
        row("a5", 900, json!({"endpoint": "/v1/models", "model": "", "usage_source": "none", "duration_us": 1000})),
        of_b("b1", "aborted", json!({"prompt_tokens": 7, "completion_tokens": 3, "reasoning_tokens": 2, "ttft_us": 40_000})),
        of_b("b2", "server_error", json!({"usage_source": "none"})),
        of_b("b3", "refused", json!({"usage_source": "none"})),
        of_b("b4", "gateway_crash", json!({"usage_source": "none", "duration_us": 0})),
        // The crash of this one was only inferred, and its own row came later.
        of_b("b5", "gateway_crash", json!({"usage_source": "none"})),
        of_b("b5", "completed", json!({"prompt_tokens": 1, "completion_tokens": 1})),
        // The day before, and the day after, to the microsecond.
        row("x1", 0, json!({"duration_us": 1})),
        row("x2", 86_400, json!({"prompt_tokens": 1_000_000})),
    ]
    .into_iter()
    .map(|mut row| {
        if row["event_id"] == "x1" {
            row["started_at"] = (MIDNIGHT_US - 2).into();
        }
        row
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_are_those_computed_by_hand_in_all_three_formats_and_doubled_rows_count_once() {
    let installed = Installed::new("figures").await;
    installed.store(&day()).await;

    let report = installed.json(&DAY);
    let team_a = json!({
        "team": "a", "requests": 5, "ok": 5, "errors": 0, "aborted": 0, "refused": 0,
        "prompt_tokens": 605, "cached_tokens": 24, "completion_tokens": 30, "reasoning_tokens": null, "unknown_token_requests": 0,
        "ttft_p50_us": 20_000, "ttft_p95_us": 30_000, "itl_p50_us": 2_000, "itl_p95_us": 3_000, "e2e_p50_us": 2_000_000, "e2e_p95_us": 4_000_000,
        "charge_nano_usd": 0, "cost_nano_usd": null, "idle_nano_usd": null, "recovery_nano_usd": null, "cost_per_million_tokens_nano_usd": null
    });
    let team_b = json!({
        "team": "b", "requests": 5, "ok": 1, "errors": 2, "aborted": 1, "refused": 1,
        "prompt_tokens": 8, "cached_tokens": null, "completion_tokens": 4, "reasoning_tokens": 2, "unknown_token_requests": 2,
        "ttft_p50_us": 40_000, "ttft_p95_us": 40_000, "itl_p50_us": null, "itl_p95_us": null, "e2e_p50_us": 2_000_000, "e2e_p95_us": 2_000_000,
        "charge_nano_usd": 0, "cost_nano_usd": null, "idle_nano_usd": null, "recovery_nano_usd": null, "cost_per_million_tokens_nano_usd": null
    });
    assert_eq!(report["groups"], json!([team_a, team_b]));
    let total = &report["total"];
    for (name, value) in [
        ("requests", json!(10)),
        ("ok", json!(6)),
        ("errors", json!(2)),
        ("prompt_tokens", json!(613)),
        ("completion_tokens", json!(34)),
        ("unknown_token_requests", json!(2)),
    ] {
        assert_eq!(total[name], value, "{name} of {total}");
    }
    assert_eq!(
        (&report["from"], &report["to"]),
        (&json!("2026-11-24T00:00:00Z"), &json!("2026-11-25T00:00:00Z"))
    );

    let csv = installed.report(&[&DAY[..], &["--format", "csv"]].concat());
    let lines: Vec<String> = text(&csv.stdout).split("\r\n").map(str::to_owned).collect();
    assert_eq!(
        lines[1],
        "group,a,5,5,0,0,0,605,24,30,,0,20000,30000,2000,3000,2000000,4000000,0.000000000,,,,"
    );
    assert_eq!(
        lines[2],
        "group,b,5,1,2,1,1,8,,4,2,2,40000,40000,,,2000000,2000000,0.000000000,,,,"
    );
    assert!(
        lines[3].starts_with("total,,10,6,2,1,1,613,24,34,2,2,"),
        "{lines:?}"
    );
    assert!(
        text(&csv.stderr).starts_with("unknown, for there is no spool in spool"),
        "what they lack stands beside them, and unknown is not none"
    );

    let table = text(&installed.report(&DAY).stdout);
    let words: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let (b, all) = (&words[3], &words[4]);
    assert_eq!(
        b[..],
        [
            "b",
            "5",
            "1",
            "2",
            "1",
            "1",
            "8",
            "-",
            "4",
            "2",
            "2",
            "40.0",
            "40.0",
            "-",
            "-",
            "2000.0",
            "2000.0",
            "0.000000000",
            "-",
            "-",
            "-",
            "-",
            "-"
        ]
    );
    assert_eq!(all[..5], ["=", "all", "10", "6", "2"]);
    assert!(
        table.contains("ended from 2026-11-24T00:00:00Z until before 2026-11-25T00:00:00Z"),
        "{table}"
    );
    assert!(table.contains("worked on them: 2."), "{table}");
    installed.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_of_every_combination_and_days_are_those_of_the_end() {
    let installed = Installed::new("groups").await;
    installed.store(&day()).await;
    // No name that a client chooses can be more than a name.
    let hostile = "'] , (SELECT 1) -- \\ {from_us:Int64} ?";
    installed
        .store(&[row(
            "h",
            950,
            json!({"team_id": hostile, "prompt_tokens": 1, "completion_tokens": 1}),
        )])
        .await;

    let report = installed.json(&[&DAY[..], &["--by", "team,project,endpoint"]].concat());
    let found: Vec<(&str, &str, &str, u64)> = report["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .map(|group| {
            let name = |key: &str| group[key].as_str().expect("a name");
            (
                name("team"),
                name("project"),
                name("endpoint"),
                group["requests"].as_u64().expect("a count"),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            (hostile, "p", "/v1/chat/completions", 1),
            ("a", "p", "/v1/chat/completions", 3),
            ("a", "p", "/v1/models", 1),
            ("a", "q", "/v1/embeddings", 1),
            ("b", "p", "/v1/chat/completions", 5),
        ]
    );
    let days = installed.json(&["--from", "2026-11-23", "--to", "2026-11-26", "--by", "day"]);
    let found: Vec<(&str, u64)> = days["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .map(|group| {
            (
                group["day"].as_str().expect("a day"),
                group["requests"].as_u64().expect("a count"),
            )
        })
        .collect();
    assert_eq!(found, [("2026-11-23", 1), ("2026-11-24", 11), ("2026-11-25", 1)]);
    // An offset moves the bounds: from 00:05 to 00:12 in UTC there are a2 and a3.
    let part = installed.json(&[
        "--from",
        "2026-11-24T01:05:00+01:00",
        "--to",
        "2026-11-24T00:12:00Z",
        "--by",
        "user,model",
    ]);
    assert_eq!(part["groups"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        (&part["groups"][0]["user"], &part["total"]["requests"]),
        (&json!("u"), &json!(2))
    );
    // A period without requests is no error.
    let empty = installed.json(&["--from", "2020-01-01", "--to", "2020-01-02"]);
    assert_eq!(
        (&empty["groups"], &empty["total"]["requests"]),
        (&json!([]), &json!(0))
    );
    assert_eq!(empty["total"]["prompt_tokens"], Value::Null);
    installed.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_in_the_spool_is_said() {
    let installed = Installed::new("spool").await;
    let spool = SpoolConfig {
        dir: installed.dir.join("spool"),
        ..SpoolConfig::default()
    };
    let store = Store::open(&spool, "gw").expect("a spool");
    for event in ["e-1", "e-2", "e-3"] {
        let line = format!("{{\"event_id\":\"{event}\"}}");
        drop(store.spool().append(line.as_bytes()).expect("room"));
    }
    eventually("a batch", async || store.spool().sealed(1).first().cloned()).await;
    let batch = store.spool().sealed(1)[0].clone();
    store
        .spool()
        .quarantine(&batch, &[1], "a reason")
        .expect("it is put aside");
    let waiting = Waiting::below(&spool.dir).expect("it looks").expect("a spool");
    let report = installed.json(&DAY);
    assert_eq!(
        (
            &report["spool"]["rows"],
            &report["spool"]["batches"],
            &report["spool"]["quarantined_rows"]
        ),
        (&json!(2), &json!(waiting.events.batches), &json!(1))
    );
    assert!(
        report["spool"]["oldest_age_s"]
            .as_f64()
            .is_some_and(|age_s| age_s < 600.0),
        "{report}"
    );
    let table = text(&installed.report(&DAY).stdout);
    assert!(
        table.contains("to be stored: 2 (batches: 1,") && table.contains("in quarantine: 1."),
        "{table}"
    );
    drop(store);
    installed.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clickhouse_that_is_down_foreign_or_of_another_version_is_said_with_what_to_do() {
    let mut installed = Installed::bare("down");
    let url = format!("http://{}", installed.addr);
    let (code, said) = installed.refused(&DAY);
    assert_eq!(code, Some(69), "{said}");
    assert!(
        said.contains(&url) && said.contains("refused") && said.contains("vllm-gateway run"),
        "{said}"
    );

    installed.start_engine(None).await;
    let (code, said) = installed.refused(&DAY);
    assert_eq!(code, Some(65), "{said}");
    assert!(
        said.contains("vllm_attribution")
            && said.contains("UNKNOWN_DATABASE")
            && said.contains("CLICKHOUSE_DATABASE"),
        "{said}"
    );

    // Somebody else's database, without our tables.
    installed
        .client()
        .query_raw("CREATE DATABASE vllm_attribution")
        .execute()
        .await
        .expect("it is made");
    let (code, said) = installed.refused(&DAY);
    assert_eq!(code, Some(65), "{said}");
    assert!(said.contains("UNKNOWN_TABLE"), "{said}");

    migrate::migrate(&installed.client(), &layout())
        .await
        .expect("a schema");
    assert_eq!(installed.report(&DAY).status.code(), Some(0));
    let known = migrate::known_version();
    installed
        .run(&format!(
            "ALTER TABLE schema_migrations DELETE WHERE version = {known} SETTINGS mutations_sync = 1"
        ))
        .await;
    let (code, said) = installed.refused(&DAY);
    assert_eq!(code, Some(65), "{said}");
    assert!(
        said.contains(&format!("version {known}")) && said.contains("older than this program"),
        "{said}"
    );
    installed
        .run("INSERT INTO schema_migrations (version, name, program) VALUES (1000, 'later', '9.9.9')")
        .await;
    let (code, said) = installed.refused(&DAY);
    assert_eq!(code, Some(65), "{said}");
    assert!(
        said.contains("found 1000") && said.contains("at least as new"),
        "{said}"
    );
    installed.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_said_and_never_shown() {
    let mut installed = Installed::bare("password");
    installed.start_engine(Some("the right one")).await;
    installed.configure(", username: reader, password: \"hunter2\"");
    let (code, said) = installed.refused(&DAY);
    assert_eq!(code, Some(77), "{said}");
    assert!(
        said.contains("user reader") && said.contains("CLICKHOUSE_PASSWORD") && !said.contains("hunter2"),
        "{said}"
    );
    installed.finish().await;
}

#[test]
fn arguments_that_mean_nothing_are_refused_before_anything_is_asked() {
    let installed = Installed::bare("arguments");
    for (arguments, expected) in [
        (&["--from", "yesterday"][..], "RFC 3339"),
        (&["--from", "2026-11-24T08:00:00"], "offset"),
        (&["--from", "2026-11-25", "--to", "2026-11-24"], "before --to"),
        (&["--to", "2026-11-24"], "--from"),
        (&["--since", "24"], "24"),
        (&["--since", "0s"], "above 0"),
        (&["--since", "1h", "--from", "2026-11-24"], "cannot be used with"),
        (&["--by", "colour"], "endpoint"),
        (&["--format", "pdf"], "csv"),
    ] {
        let (code, said) = installed.refused(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    std::fs::write(installed.dir.join("config.yaml"), "store: {url: none}\n").expect("a file");
    let (code, said) = installed.refused(&[]);
    assert_eq!(code, Some(78), "{said}");
    assert!(
        said.contains("store.url is `none`") && said.contains("CLICKHOUSE_URL"),
        "{said}"
    );
    std::fs::write(installed.dir.join("config.yaml"), "stone: {}\n").expect("a file");
    assert_eq!(installed.refused(&[]).0, Some(78));
}

/// What the engines counted, by their own word: `seconds` after midnight, for one gateway.
fn scrape(gateway: &str, upstream: &str, seconds: i64, more: Value) -> Value {
    let mut row = json!({
        "scraped_at": MIDNIGHT_US / 1000 + seconds * 1000, "gateway_id": gateway, "upstream": upstream, "model": "m", "ok": true,
        "condition": "running"
    });
    let row_map = row.as_object_mut().expect("an object");
    row_map.extend(more.as_object().expect("an object").clone());
    row
}

fn segment(upstream: &str, event: &str, prompt: u64, completion: u64) -> Value {
    json!({
        "window_start": MIDNIGHT_US / 1_000_000 + 15, "upstream": upstream, "event_id": event, "team_id": "a", "project": "", "model": "m",
        "run_start": MIDNIGHT_US + 16_000_000, "run_end": MIDNIGHT_US + 17_000_000, "prompt_tokens": prompt, "cached_tokens": 0,
        "completion_tokens": completion, "kv_token_seconds": 0, "gateway_id": "g1", "batch": event
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_are_held_against_what_all_gateways_booked_with_what_explains_a_gap() {
    let installed = Installed::new("reconciliation").await;
    for table in ["vllm_system_metrics", "request_segments", "ledger_windows"] {
        // As for events: nothing but FINAL may join rows, nor a merge take them away by the day that they are of.
        installed.run(&format!("SYSTEM STOP MERGES {table}")).await;
    }
    let counted = |prompt: u64, completion: u64| json!({"prompt_tokens_delta": prompt, "generation_tokens_delta": completion});
    let failed = json!({"ok": false, "error": "connect", "model": "", "condition": "down"});
    let scrapes = [
        scrape("g1", "chat", 15, json!({})),
        scrape("g1", "chat", 30, counted(60_000, 40_000)),
        scrape("g1", "chat", 45, counted(40_000, 0)),
        scrape("g1", "chat", 60, failed.clone()),
        // A row that was written again, as loading, takes the place of the first.
        scrape("g1", "chat", 60, failed),
        // The same counters, and fewer looks.
        scrape("g2", "chat", 30, counted(60_000, 40_000)),
        // The day after.
        scrape("g1", "chat", 86_400, counted(1_000_000, 1_000_000)),
        scrape(
            "g1",
            "pair",
            30,
            json!({"unsupported": "kv_connector", "prompt_tokens_delta": 5, "generation_tokens_delta": 5}),
        ),
    ];
    for row in &scrapes {
        installed
            .run(&format!(
                "INSERT INTO vllm_system_metrics FORMAT JSONEachRow {row}"
            ))
            .await;
    }
    // One of them twice, in two batches.
    let mut again = segment("chat", "e1", 50_000, 30_000);
    again["batch"] = "again".into();
    for row in [
        segment("chat", "e1", 50_000, 30_000),
        again,
        segment("chat", "e2", 1_000, 1_000),
    ] {
        installed
            .run(&format!("INSERT INTO request_segments FORMAT JSONEachRow {row}"))
            .await;
    }
    let untold = |event: &str, more: Value| {
        let mut row = row(event, 100, more);
        row["upstream"] = "chat".into();
        row["gateway_id"] = "g1".into();
        row
    };
    let events = [
        untold(
            "e1",
            json!({"prompt_tokens": 50_000, "completion_tokens": 30_000}),
        ),
        untold("d1", json!({"capture": "tap", "usage_source": "none"})),
        untold("c1", json!({"prompt_tokens": 3, "usage_source": "counted"})),
        untold("a1", json!({"outcome": "aborted", "usage_source": "none"})),
        untold("r1", json!({"outcome": "client_error", "usage_source": "none"})),
    ];
    installed.store(&events).await;

    let arguments = [&DAY[..], &["--reconciliation"]].concat();
    let report = installed.json(&arguments);
    let chat = json!({
        "upstream": "chat", "engine_prompt_tokens": 100_000, "attributed_prompt_tokens": 51_000, "gap_prompt_tokens": 49_000,
        "engine_completion_tokens": 40_000, "attributed_completion_tokens": 31_000, "gap_completion_tokens": 9_000, "source": "scrapes",
        "gateways": 2, "gap_exceeded": true,
        "likely_causes": ["direct", "usage_off", "aborted_unstreamed", "scrapes_failed"]
    });
    assert_eq!(report["upstreams"][0], chat);
    assert_eq!(report["upstreams"][1]["likely_causes"], json!(["unsupported"]));

    // Once the ledger has computed the window, its word counts: what a later window took back is no gap.
    let window = json!({
        "window_start": MIDNIGHT_US / 1_000_000 + 15, "upstream": "chat", "bill_nano_usd": 1, "busy_us": 1, "segments": 2,
        "prompt_tokens": 51_000, "completion_tokens": 31_000, "engine_prompt_tokens": 61_000, "engine_completion_tokens": 31_500,
        "unattributed_prompt_tokens": 9_000, "unattributed_completion_tokens": 0, "facts": 1, "rules": "", "revision": 1, "state": "settled",
        "gateway_id": "g1"
    });
    installed
        .run(&format!("INSERT INTO ledger_windows FORMAT JSONEachRow {window}"))
        .await;
    let report = installed.json(&arguments);
    let chat = &report["upstreams"][0];
    assert_eq!(
        (
            &chat["source"],
            &chat["engine_prompt_tokens"],
            &chat["gap_prompt_tokens"]
        ),
        (&json!("ledger"), &json!(61_000), &json!(9_000))
    );
    assert_eq!(
        (&chat["gap_exceeded"], &chat["likely_causes"]),
        (&json!(false), &json!([])),
        "9 000 tokens are too few to be told"
    );
    let table = text(&installed.report(&arguments).stdout);
    assert!(
        table.contains("pair: unsupported: its prompts are prefilled"),
        "{table}"
    );
    installed.finish().await;
}
