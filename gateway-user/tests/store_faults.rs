//! What a ClickHouse that fails does to accounting: nothing that does not heal. Rows wait, nothing is lost or counted twice, no request notices, and
//! the log and `/metrics` say what is wrong.

mod support;

use hyper::StatusCode;
use std::sync::Arc;
use std::time::Duration;
use support::front::{Fault, Front};
use support::installed::{ClickHouse, Installed, Running, free_address, load, records};
use support::{Sim, eventually, exchange, post};
use tokio::sync::{Semaphore, watch};
use vllm_gateway::config::{Config, SpoolConfig};
use vllm_gateway::store::sender::{Patience, Sender, client, layout};
use vllm_gateway::store::{Store, WaitCause};

const ROWS: &str = "(SELECT count() FROM request_events FINAL)";
const TWICE: &str = "(SELECT count() - uniqExact(event_id) FROM request_events)";

/// Requests a second while ClickHouse is away, and for how long.
const OUTAGE_RATE: usize = 500;
const OUTAGE_SECONDS: usize = 60;

/// Sends requests as `team`, each of which must succeed.
async fn ask(gateway: &Running, team: &str, count: usize) {
    for _ in 0..count {
        let body = r#"{"model":"tiny","messages":[{"role":"user","content":"a"}],"max_tokens":3}"#;
        let answer = exchange(gateway.clients, &post("/v1/chat/completions", team, body)).await;
        assert!(
            answer.starts_with(b"HTTP/1.1 200"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
}

async fn until_nothing_waits(gateway: &Running) {
    eventually("an empty spool", async || {
        (gateway.metric("gateway_spool_rows", &[]).await == 0.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_is_named_and_passes_without_a_trace_in_the_sums() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let clickhouse = free_address();
    let front = Front::start(clickhouse).await;
    let installed = Installed::with_store(
        "faults",
        sim.addr,
        clickhouse,
        &format!("url: \"http://{}\"", front.addr),
    );
    let _engine = ClickHouse::start(clickhouse, &installed.dir.join("clickhouse"), None);
    let gateway = installed.start();
    ask(&gateway, "before", 1).await;
    installed.until("the first row", ROWS, 1).await;
    let full = "Code: 243. DB::Exception: Cannot reserve 1.00 MiB, not enough space. (NOT_ENOUGH_SPACE) (version 26.5)";
    let busy = "Code: 252. DB::Exception: Too many parts (300). (TOO_MANY_PARTS) (version 26.5)";
    let error = StatusCode::INTERNAL_SERVER_ERROR;
    let faults: [(&str, Fault, &str, &[&str]); 6] = [
        (
            "full",
            Fault::Answer(error, full),
            "disk_full",
            &["code 243 NOT_ENOUGH_SPACE", "free space"],
        ),
        (
            "busy",
            Fault::Answer(error, busy),
            "overloaded",
            &["code 252 TOO_MANY_PARTS", "give it time"],
        ),
        (
            "broken",
            Fault::Answer(error, "oops"),
            "answer",
            &["no exception of ClickHouse", "store.url"],
        ),
        (
            "stranger",
            Fault::Answer(StatusCode::NOT_FOUND, "<html>"),
            "answer",
            &["store.url"],
        ),
        (
            "lost",
            Fault::LoseAnswer,
            "unreachable",
            &["network error", "see that it runs"],
        ),
        ("half", Fault::Half, "unreachable", &["network error"]),
    ];
    let mut rows = 1;
    for (team, fault, cause, words) in faults {
        let label = format!("cause=\"{cause}\"");
        let before = gateway.metric("gateway_store_retries_total", &[&label]).await;
        // The same again and again, until it passes.
        let times = if matches!(fault, Fault::Answer(..)) { 3 } else { 1 };
        (0..times).for_each(|_| front.next(fault.clone()));
        ask(&gateway, team, 8).await;
        rows += 8;
        installed.until(team, ROWS, rows).await;
        assert_eq!(front.left(), 0, "{team}");
        gateway
            .until_metric(
                "gateway_store_retries_total",
                &[&label],
                before + f64::from(times) - 1.0,
            )
            .await;
        gateway.logged(words);
    }
    gateway.logged(&["ClickHouse takes rows again"]);
    installed.until_windows_are_rows().await;
    installed.until("no row to be there twice", TWICE, 0).await;
    gateway
        .until_metric("gateway_store_found_batches_total", &[], 0.0)
        .await;
    gateway
        .until_metric("gateway_store_repaired_batches_total", &[], 0.0)
        .await;
    until_nothing_waits(&gateway).await;
    assert_eq!(gateway.metric("gateway_store_rows_total", &[]).await, rows as f64);
    assert_eq!(gateway.metric("gateway_spool_rows_total", &[]).await, rows as f64);
    for lost in [
        "gateway_spool_dropped_rows_total",
        "gateway_spool_quarantined_rows_total",
    ] {
        assert_eq!(gateway.metric(lost, &[]).await, 0.0, "{lost}");
    }
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_clickhouse_keeps_rows_waiting_and_nobody_else() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let clickhouse = free_address();
    let front = Front::start(clickhouse).await;
    let installed = Installed::with_store(
        "slow",
        sim.addr,
        clickhouse,
        &format!("url: \"http://{}\"", front.addr),
    );
    let _engine = ClickHouse::start(clickhouse, &installed.dir.join("clickhouse"), None);
    let gateway = installed.start();
    gateway.logged(&["the schema is up to date"]);
    let permits = Arc::new(Semaphore::new(0));
    front.next(Fault::Hold(Arc::clone(&permits)));
    ask(&gateway, "slow", 3).await;
    eventually("the insert to be held", async || {
        (front.left() == 0).then_some(())
    })
    .await;
    ask(&gateway, "behind", 5).await;
    gateway.until_metric("gateway_spool_rows", &[], 3.0).await;
    gateway.until_metric("gateway_spool_bytes", &[], 0.0).await;
    gateway
        .until_metric("gateway_spool_oldest_age_seconds", &[], 0.5)
        .await;
    permits.add_permits(1);
    installed.until("all rows", ROWS, 8).await;
    installed.until_windows_are_rows().await;
    assert_eq!(gateway.metric("gateway_store_retries_total", &[]).await, 0.0);
    gateway.stop();
}

/// The sender by itself, so that it need not wait for minutes.
#[tokio::test(flavor = "multi_thread")]
async fn an_insert_that_is_given_up_and_arrives_late_counts_once() {
    let clickhouse = free_address();
    let front = Front::start(clickhouse).await;
    let installed = Installed::with_store("late", clickhouse, clickhouse, "url: none");
    let _engine = ClickHouse::start(clickhouse, &installed.dir.join("clickhouse"), None);
    let spool = SpoolConfig {
        dir: installed.dir.join("spool"),
        seal_after: Duration::from_millis(20),
        ..SpoolConfig::default()
    };
    let store = Store::open(&spool, "gw").expect("a spool");
    let config = Config::parse(
        "test.yaml",
        "upstreams: [{name: a, url: \"http://127.0.0.1:1\", serves: generate}]",
        &|_| None,
    );
    let config = config.expect("a configuration").store;
    let patience = Patience {
        answer: Duration::from_secs(2),
        ..Patience::default()
    };
    let client = client(&config, &format!("http://{}", front.addr));
    let sender = Sender::new(Arc::clone(store.spool()), client, layout(&config)).with_patience(patience);
    let stats = sender.stats();
    let (stop, stopped) = watch::channel(false);
    let sending = tokio::spawn(sender.run(stopped));
    let permits = Arc::new(Semaphore::new(0));
    front.next(Fault::Hold(Arc::clone(&permits)));
    for number in 0..20 {
        let row = format!(
            "{{\"event_id\":\"e-{number}\",\"team_id\":\"a\",\"started_at\":1795355334000000,\"prompt_tokens\":{number}}}"
        );
        drop(store.spool().append(row.as_bytes()).expect("room"));
    }
    eventually("the sender to give up", async || {
        (stats.waits_for(WaitCause::TimedOut) > 0).then_some(())
    })
    .await;
    installed.until("the rows of the second try", ROWS, 20).await;
    permits.add_permits(1);
    // The late one is through when its answer is, of which there is no other sign than that the engine has nothing more to do.
    installed.until("the late insert", "(SELECT count() FROM system.processes WHERE query ILIKE '%INSERT INTO request_events%' AND query NOT ILIKE '%system.processes%')", 0).await;
    installed.until("no row to be there twice", TWICE, 0).await;
    installed.until_windows_are_rows().await;
    stop.send_replace(true);
    drop(store);
    sending.await.expect("no panic").expect("it ends well");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clickhouse_that_is_missing_or_refuses_the_gateway_is_waited_for() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let clickhouse = free_address();
    let store = format!("url: \"http://{clickhouse}\", username: gateway, password: second");
    let mut installed = Installed::with_store("refusing", sim.addr, clickhouse, &store);
    let tables = installed.dir.join("clickhouse");
    let gateway = installed.start();
    ask(&gateway, "early", 2).await;
    gateway.logged(&["onnection refused", "store.url (CLICKHOUSE_URL)"]);
    gateway
        .until_metric("gateway_store_retries_total", &["cause=\"unreachable\""], 0.0)
        .await;

    let engine = ClickHouse::start(clickhouse, &tables, Some("first"));
    gateway
        .until_metric("gateway_store_retries_total", &["cause=\"access_denied\""], 0.0)
        .await;
    gateway.until_metric("gateway_spool_rows", &[], 1.0).await;
    ask(&gateway, "meanwhile", 2).await;
    gateway.stop();
    // Whoever starts it now is told at once.
    let gateway = installed.start();
    let said = gateway.logged(&["CLICKHOUSE_PASSWORD"]).to_string();
    assert!(said.contains("516") && !said.contains("second"), "{said}");
    engine.kill();
    let _engine = ClickHouse::start(clickhouse, &tables, Some("second"));
    installed.parameters = "&user=gateway&password=second".to_owned();
    installed.until("the rows that waited", ROWS, 4).await;
    // Rows that are there can be on their way still, and would be sent again to the new tables.
    until_nothing_waits(&gateway).await;

    installed
        .make("&database=default", "DROP DATABASE vllm_attribution")
        .await;
    ask(&gateway, "after", 1).await;
    installed.until("a new schema, and the row", ROWS, 1).await;
    gateway
        .until_metric("gateway_store_retries_total", &["cause=\"no_schema\""], 0.0)
        .await;
    installed.until_windows_are_rows().await;

    installed
        .make(
            "",
            "INSERT INTO schema_migrations (version, name) VALUES (999, 'later')",
        )
        .await;
    gateway.stop();
    let gateway = installed.start();
    gateway.logged(&["has version 999", "at least as new", "store.database"]);
    gateway
        .until_metric("gateway_store_retries_total", &["cause=\"schema_too_new\""], 0.0)
        .await;
    ask(&gateway, "kept", 1).await;
    gateway.until_metric("gateway_spool_rows", &[], 0.0).await;
    assert_eq!(
        installed.number(ROWS).await,
        Some(1),
        "nothing goes into a schema that is not known"
    );
    gateway.stop();
    installed
        .make("", "DELETE FROM schema_migrations WHERE version = 999")
        .await;
    let gateway = installed.start();
    installed.until("what was kept", ROWS, 2).await;
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_without_clickhouse_under_load_fails_no_request_and_loses_no_row() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let clickhouse = free_address();
    let installed = Installed::with_store(
        "away",
        sim.addr,
        clickhouse,
        &format!("url: \"http://{clickhouse}\""),
    );
    let tables = installed.dir.join("clickhouse");
    let engine = ClickHouse::start(clickhouse, &tables, None);
    let gateway = installed.start();
    ask(&gateway, "before", 1).await;
    installed.until("the first row", ROWS, 1).await;
    engine.kill();
    let (seen, requests) = (installed.dir.join("records"), OUTAGE_RATE * OUTAGE_SECONDS);
    let rate = OUTAGE_RATE.to_string();
    let more = [
        "--rate",
        &rate,
        "--stream-fraction",
        "0.1",
        "--output-tokens",
        "2..8",
    ];
    let mut load = load(gateway.clients, 7, requests, &seen, &more);
    let started = std::time::Instant::now();
    assert!(load.status().expect("it runs").success());
    let took = started.elapsed();
    let failed = records(&seen)
        .iter()
        .filter(|record| record["outcome"] != "ok")
        .count();
    assert_eq!((records(&seen).len(), failed), (requests, 0));
    // Otherwise it was no such load, or no such outage.
    assert!(
        took > Duration::from_secs(OUTAGE_SECONDS as u64 * 9 / 10),
        "{took:?}"
    );
    eprintln!("{requests} requests in {took:?}");
    let waiting = gateway.metric("gateway_spool_bytes", &[]).await;
    assert!(waiting > 1e6, "{waiting} bytes wait");
    let _engine = ClickHouse::start(clickhouse, &tables, None);
    installed.until("every row", ROWS, requests as u64 + 1).await;
    installed.until_windows_are_rows().await;
    installed.until("no row to be there twice", TWICE, 0).await;
    assert_eq!(gateway.metric("gateway_spool_dropped_rows_total", &[]).await, 0.0);
    gateway.stop();
}
