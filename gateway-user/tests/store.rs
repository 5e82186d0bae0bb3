//! From a client's request to rows in ClickHouse's own engine: the real program, stopped as it should be, and killed at any moment.

mod support;

use rand::Rng;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::installed::{ClickHouse, Installed, free_address, load, records};
use support::{Sim, eventually, exchange, post};
use vllm_gateway::config::SpoolConfig;
use vllm_gateway::store::Store;

/// Requests of one load.
const REQUESTS: usize = 400;

/// Rounds of load in which somebody is killed.
const KILLS: usize = 20;

/// Lets some time pass, at most so much. Not a wait for something to happen: the moment of a kill is what is tried out.
fn some_moment(most: Duration) {
    std::thread::park_timeout(most.mul_f64(rand::rng().random_range(0.0..1.0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_is_a_row_and_windows_add_up() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::embedded("whole", sim.addr);
    let gateway = installed.start();
    let seen = installed.dir.join("records");
    let mut load = load(gateway.clients, 1, REQUESTS, &seen, &["--abort-fraction", "0.05"]);
    assert!(load.status().expect("it runs").success());
    installed
        .until(
            "every row",
            "(SELECT count() FROM request_events FINAL)",
            REQUESTS as u64,
        )
        .await;
    installed.until_windows_are_rows().await;
    let mut by_team: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for record in records(&seen).iter().filter(|record| record["outcome"] == "ok") {
        let team = by_team
            .entry(record["team"].as_str().expect("a team").to_owned())
            .or_default();
        team.0 += 1;
    }
    let rows = installed
        .ask(
            "SELECT team_id, countIf(outcome = 'completed') AS ok FROM request_events FINAL GROUP BY team_id",
        )
        .await
        .expect("an answer");
    assert_eq!(rows.len(), by_team.len(), "one row for each team: {rows:?}");
    for row in rows {
        let (ok, team) = (row["ok"].as_u64(), row["team_id"].as_str().expect("a team"));
        assert!(
            ok >= Some(by_team[team].0),
            "{team}: {row} for {:?}",
            by_team[team]
        );
    }
    eventually("a scrape of the simulator", async || {
        let rows = installed
            .number("(SELECT countIf(ok) FROM vllm_system_metrics)")
            .await?;
        (rows > 0).then_some(())
    })
    .await;
    let reconciled = "countIf(ok AND condition IN ('up', 'running') AND unsupported = '' AND attributed_completion_tokens > 0)";
    eventually("a scrape that tells what was attributed", async || {
        let rows = installed
            .number(&format!("(SELECT {reconciled} FROM vllm_system_metrics)"))
            .await?;
        (rows > 0).then_some(())
    })
    .await;
    // What came last is stored when it stops, or waits: a restart finds it.
    exchange(gateway.clients, &post("/v1/chat/completions", "last", "{}")).await;
    gateway.stop();
    let again = installed.start();
    eventually("the last row", async || {
        let rows = installed
            .number("(SELECT count() FROM request_events FINAL WHERE team_id = 'last')")
            .await?;
        (rows == 1).then_some(())
    })
    .await;
    again.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_loses_nothing_that_a_client_saw_end() {
    let sim = Sim::start(&["--model", "tiny", "--step-base-us", "300"]);
    let installed = Installed::embedded("killed", sim.addr);
    let mut seen = Vec::new();
    for round in 0..KILLS {
        let gateway = installed.start();
        let path = installed.dir.join(format!("records-{round}"));
        let mut load = load(
            gateway.clients,
            100 + round,
            REQUESTS,
            &path,
            &["--abort-fraction", "0.05"],
        );
        let mut running = load.spawn().expect("it runs");
        eventually("some requests to be through", async || {
            std::fs::metadata(&path).ok().filter(|file| file.len() > 0)
        })
        .await;
        some_moment(Duration::from_millis(300));
        gateway.kill();
        // Its clients would see nothing but refused connections from now on. On Ctrl-C they write down what they have seen.
        let pid = rustix::process::Pid::from_child(&running);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("our own process");
        running.wait().expect("our own process");
        seen.extend(records(&path));
    }
    let gateway = installed.start();
    all_are_booked_once(&installed, &seen).await;
    let crashed = installed
        .number("(SELECT countIf(outcome = 'gateway_crash') FROM request_events FINAL)")
        .await;
    assert!(
        crashed >= Some(KILLS as u64),
        "eight were in flight at each kill: {crashed:?}"
    );
    installed.until_windows_are_rows().await;
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_clickhouse_loses_nothing_and_counts_nothing_twice() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let clickhouse = free_address();
    let installed = Installed::with_store(
        "engine-killed",
        sim.addr,
        clickhouse,
        &format!("url: \"http://{clickhouse}\""),
    );
    let tables = installed.dir.join("clickhouse");
    let mut engine = ClickHouse::start(clickhouse, &tables, None);
    let gateway = installed.start();
    let stop = Arc::new(AtomicBool::new(false));
    // One small load after the other, until the kills are through.
    let loading = std::thread::spawn({
        let (stop, dir, clients) = (Arc::clone(&stop), installed.dir.clone(), gateway.clients);
        move || {
            let mut seen = Vec::new();
            for seed in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let path = dir.join(format!("records-{seed}"));
                let mut load = load(
                    clients,
                    seed,
                    REQUESTS,
                    &path,
                    &["--rate", "200", "--abort-fraction", "0.02"],
                );
                assert!(load.status().expect("it runs").success());
                seen.extend(records(&path));
            }
            seen
        }
    });
    for round in 0..KILLS {
        let before = installed
            .number("(SELECT count() FROM request_events)")
            .await
            .unwrap_or(0);
        eventually("rows to be stored again", async || {
            let rows = installed.number("(SELECT count() FROM request_events)").await?;
            (rows > before).then_some(())
        })
        .await;
        some_moment(Duration::from_millis(400));
        engine.kill();
        assert_eq!(
            gateway.metric("gateway_spool_dropped_rows_total", &[]).await,
            0.0,
            "round {round}"
        );
        engine = ClickHouse::start(clickhouse, &tables, None);
    }
    stop.store(true, Ordering::Relaxed);
    let seen = loading.join().expect("the loads end well");
    assert!(
        seen.iter()
            .all(|record| record["outcome"] == "ok" || record["outcome"] == "aborted")
    );
    all_are_booked_once(&installed, &seen).await;
    installed.until_windows_are_rows().await;
    assert!(
        gateway
            .metric("gateway_store_retries_total", &["unreachable"])
            .await
            > 0.0
    );
    gateway.stop();
    drop(engine);
}

/// Waits until each request of which a client saw anything has a row, and those that it saw end say so; then there is no row besides.
async fn all_are_booked_once(installed: &Installed, seen: &[Value]) {
    let of_record = |record: &Value| record["request_id"].as_str().expect("an id").to_owned();
    let answered: Vec<(String, bool)> = seen
        .iter()
        .filter(|record| record["bytes_received"].as_u64() > Some(0))
        .map(|record| (of_record(record), record["outcome"] == "ok"))
        .collect();
    assert!(
        answered.len() > KILLS * 20,
        "the kills came too early: {}",
        answered.len()
    );
    let rows = eventually("a row for each end that a client saw", async || {
        let rows = installed
            .ask("SELECT request_id, outcome FROM request_events FINAL WHERE request_id != ''")
            .await?;
        let mut booked: HashMap<String, Vec<String>> = HashMap::new();
        for row in &rows {
            let outcome = row["outcome"].as_str().expect("a text").to_owned();
            booked.entry(of_record(row)).or_default().push(outcome);
        }
        let all = answered.iter().all(|(id, ended)| {
            booked
                .get(id)
                .is_some_and(|outcomes| !ended || outcomes.iter().any(|outcome| outcome == "completed"))
        });
        all.then_some(booked)
    })
    .await;
    for (id, outcomes) in rows {
        assert_eq!(outcomes.len(), 1, "{id}: {outcomes:?}");
    }
    // Even without FINAL: what was sent again was counted first.
    installed
        .until(
            "no row to be there twice",
            "(SELECT count() - uniqExact(event_id) FROM request_events)",
            0,
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_clickhouse_refuses_is_put_aside_and_holds_nobody_up() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::embedded("refused", sim.addr);
    let spool = SpoolConfig {
        dir: installed.dir.join("spool"),
        ..SpoolConfig::default()
    };
    let store = Store::open(&spool, "gw").expect("a spool");
    for row in 0..9 {
        // One row in the middle has a time that is none.
        let started_at = if row == 4 { "\"never\"" } else { "1795355334000000" };
        let line = format!("{{\"event_id\":\"e-{row}\",\"team_id\":\"a\",\"started_at\":{started_at}}}");
        // Nobody waits for the disk here.
        drop(store.spool().append(line.as_bytes()).expect("room"));
    }
    // Sealed with the store, and found by the program at its start.
    drop(store);
    let gateway = installed.start();
    eventually("the good rows", async || {
        let rows = installed
            .number("(SELECT count(DISTINCT event_id) FROM request_events FINAL WHERE team_id = 'a')")
            .await?;
        (rows == 8).then_some(())
    })
    .await;
    // The good ones went in in several parts, and are in windows all the same.
    installed.until_windows_are_rows().await;
    gateway
        .until_metric("gateway_spool_quarantined_rows_total", &[], 0.0)
        .await;
    exchange(gateway.clients, &post("/v1/chat/completions", "behind", "{}")).await;
    eventually("the row behind them", async || {
        let rows = installed
            .number("(SELECT count() FROM request_events FINAL WHERE team_id = 'behind')")
            .await?;
        (rows == 1).then_some(())
    })
    .await;
    gateway.stop();
    let quarantine = std::fs::read_dir(spool.dir.join("gw/quarantine")).expect("a directory");
    let kept: String = quarantine
        .map(|file| std::fs::read_to_string(file.expect("an entry").path()).expect("text"))
        .collect();
    assert!(kept.contains("e-4") && !kept.contains("e-3"), "{kept}");
}

/// A batch of so many rows that ended, in the spool of a gateway that does not run.
fn spooled(dir: &Path, rows: impl Iterator<Item = String>) {
    let spool = SpoolConfig {
        dir: dir.join("spool"),
        ..SpoolConfig::default()
    };
    let store = Store::open(&spool, "gw").expect("a spool");
    for row in rows {
        // Nobody waits for the disk here.
        drop(store.spool().append(row.as_bytes()).expect("room"));
    }
}

fn row(event_id: &str, outcome: &str, seconds: u64) -> String {
    // The middle of a month, some seconds into a window.
    let duration_us = if outcome == "gateway_crash" {
        0
    } else {
        seconds * 1_000_000
    };
    format!(
        "{{\"event_id\":\"{event_id}\",\"started_at\":1795355334000000,\"duration_us\":{duration_us},\"team_id\":\"a\",\"project\":\"p\",\
         \"model\":\"m\",\"outcome\":\"{outcome}\",\"prompt_tokens\":{seconds},\"completion_tokens\":null,\"ttft_us\":{}}}",
        seconds * 1_000
    )
}

fn only_file_ending(dir: &Path, end: &str) -> std::path::PathBuf {
    let files = std::fs::read_dir(dir).expect("a directory");
    let mut paths = files.map(|file| file.expect("an entry").path());
    paths
        .find(|path| path.to_string_lossy().ends_with(end))
        .unwrap_or_else(|| panic!("no {end} in {}", dir.display()))
}

const WINDOWS: &str = "SELECT * FROM request_metrics_15s ORDER BY ALL";
const ROWS: &str = "(SELECT uniqExact(event_id) FROM request_events)";

/// ClickHouse can die between the rows and their windows, and a spool can come back from a backup.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_found_makes_its_windows_whole() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::embedded("found", sim.addr);
    spooled(
        &installed.dir,
        (0..40).map(|at| row(&format!("e-{at}"), "completed", at)),
    );
    let spool = installed.dir.join("spool/gw");
    let batch = only_file_ending(&spool, ".jsonl");
    let text = std::fs::read(&batch).expect("it is there");
    let gateway = installed.start();
    installed.until("the rows", ROWS, 40).await;
    installed.until_windows_are_rows().await;
    let windows = installed.ask(WINDOWS).await.expect("an answer");
    assert!(windows.len() >= 3, "{windows:?}");
    installed.make("", "TRUNCATE TABLE request_metrics").await;
    assert!(installed.ask(WINDOWS).await.expect("an answer").is_empty());
    gateway.stop();
    std::fs::write(&batch, &text).expect("a file");
    let gateway = installed.start();
    gateway
        .until_metric("gateway_store_found_batches_total", &[], 0.0)
        .await;
    // Percentiles too: what is written again is what the view had written.
    assert_eq!(installed.ask(WINDOWS).await.expect("an answer"), windows);
    gateway.stop();
    // Half of its rows are lost too, say with a partition of a table that was not replicated.
    let gateway = installed.start();
    eventually("ClickHouse", async || installed.number("1").await).await;
    installed
        .make(
            "&lightweight_deletes_sync=2",
            "DELETE FROM request_events WHERE duration_us < 20000000",
        )
        .await;
    installed.until("half of the rows", ROWS, 20).await;
    gateway.stop();
    std::fs::write(&batch, &text).expect("a file");
    let gateway = installed.start();
    gateway
        .until_metric("gateway_store_repaired_batches_total", &[], 0.0)
        .await;
    assert_eq!(installed.ask(WINDOWS).await.expect("an answer"), windows);
    installed.until("all rows", ROWS, 40).await;
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_deduplication_does_not_see_changes_no_sum() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::embedded("late-retry", sim.addr);
    let gateway = installed.start();
    gateway.logged(&["the schema is up to date"]);
    for table in ["request_events", "request_metrics"] {
        let narrow = format!("ALTER TABLE {table} MODIFY SETTING non_replicated_deduplication_window = 1");
        installed.make("", &narrow).await;
    }
    let insert = async |batch: &str, rows: &[String]| {
        let rows: Vec<String> = rows
            .iter()
            .map(|row| row.replacen('{', &format!("{{\"batch\":\"gw/{batch}\","), 1))
            .collect();
        let parameters = format!(
            "&insert_deduplication_token=gw/{batch}&deduplicate_blocks_in_dependent_materialized_views=1&async_insert=0"
        );
        let statement = format!(
            "INSERT INTO request_events FORMAT JSONEachRow\n{}\n",
            rows.join("\n")
        );
        installed.make(&parameters, &statement).await;
    };
    let first: Vec<String> = (0..10)
        .map(|at| row(&format!("e-{at}"), "completed", at))
        .collect();
    insert("1", &first).await;
    let windows = installed.ask(WINDOWS).await.expect("an answer");
    insert("1", &first).await;
    assert_eq!(
        installed.number("(SELECT count() FROM request_events)").await,
        Some(10),
        "it is recognised"
    );
    insert("2", &[row("f", "completed", 1).replace("\"a\"", "\"b\"")]).await;
    insert("1", &first).await;
    assert_eq!(
        installed.number("(SELECT count() FROM request_events)").await,
        Some(21),
        "it is not recognised"
    );
    let of_a = "SELECT * FROM request_metrics_15s WHERE team_id = 'a' ORDER BY ALL";
    assert_eq!(installed.ask(of_a).await.expect("an answer"), windows);
    assert_eq!(
        installed
            .number("(SELECT sum(prompt_tokens) FROM request_events FINAL WHERE team_id = 'a')")
            .await,
        Some(45)
    );
    installed.until_windows_are_rows().await;
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_inferred_from_a_crash_is_in_windows_until_the_real_one_comes() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::embedded("inferred", sim.addr);
    // One crash comes before the request's own row, one behind it, and one has none.
    let rounds: [&[(&str, &str)]; 3] = [
        &[
            ("own", "completed"),
            ("first", "gateway_crash"),
            ("lone", "gateway_crash"),
        ],
        &[("own", "gateway_crash"), ("other", "completed")],
        &[("first", "completed")],
    ];
    let errors = ["2", "2", "1"];
    for (round, errors) in rounds.into_iter().zip(errors) {
        spooled(
            &installed.dir,
            round.iter().map(|(event, outcome)| row(event, outcome, 40)),
        );
        let gateway = installed.start();
        gateway
            .until_metric("gateway_store_batches_total", &[], 0.0)
            .await;
        installed.until_windows_are_rows().await;
        let sums = installed
            .ask("SELECT toString(sum(errors)) AS errors FROM request_metrics_15s")
            .await;
        assert_eq!(sums.expect("an answer")[0]["errors"], errors, "{round:?}");
        gateway.stop();
    }
}
