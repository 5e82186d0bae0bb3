//! The parts of requests by window, from the real program to ClickHouse's own engine: they sum to what the events say, also after a kill.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;
use support::installed::{Installed, Running, load};
use support::{Sim, eventually};
use vllm_gateway::config::SpoolConfig;
use vllm_gateway::store::{Store, Table};

/// Requests of one load.
const REQUESTS: usize = 300;

/// Loads in which the gateway is killed.
const KILLS: u64 = 3;

/// Streams and others; clients leave in the middle, requests fail.
#[rustfmt::skip] // Options in pairs.
const MIXED: &[&str] = &[
    "--stream-fraction", "0.5", "--abort-fraction", "0.15", "--fail-fraction", "0.05", "--teams", "4", "--concurrency", "16",
    "--prompt-tokens", "4..60", "--output-tokens", "2..32", "--abort-after-ms", "1..60",
];

/// Events whose segments sum to other tokens than the engine counted, and segments without an event. A request that a crash cut off has those
/// of the windows that were over.
const UNEQUAL: &str = "(SELECT count() FROM (SELECT event_id, ifNull(engine_prompt_tokens, 0) AS prompt, \
     least(ifNull(cached_tokens, 0), prompt) AS cached, ifNull(engine_completion_tokens, 0) AS completion FROM request_events FINAL \
     WHERE outcome != 'gateway_crash') AS event FULL JOIN (SELECT event_id, sum(prompt_tokens) AS prompt, sum(cached_tokens) AS cached, \
     sum(completion_tokens) AS completion FROM request_segments FINAL \
     WHERE event_id NOT IN (SELECT event_id FROM request_events FINAL WHERE outcome = 'gateway_crash') GROUP BY event_id) AS part \
     USING event_id WHERE (event.prompt, event.cached, event.completion) != (part.prompt, part.cached, part.completion))";

/// Events of requests that ran and have no segment, and segments of requests that did not run. One that was never sent has no time that
/// the gateway took to send it.
const RAN_OR_NOT: &str = "(SELECT countIf(outcome != 'gateway_crash' AND (event_id IN (SELECT event_id FROM request_segments)) != \
     (gateway_overhead_us IS NOT NULL AND outcome NOT IN ('refused', 'unreachable') AND status_code < 400)) FROM request_events FINAL)";

/// Segments that lie about their window, their request or their batch.
const CROOKED: &str = "(SELECT countIf(toUnixTimestamp(window_start) % 15 != 0 OR run_start > run_end OR run_start < window_start \
     OR run_end > window_start + INTERVAL 15 SECOND OR cached_tokens > prompt_tokens OR kv_token_seconds < 0 OR upstream != 'chat' \
     OR model != 'tiny' OR gateway_id != 'gw' OR NOT startsWith(batch, 'gw~segments/')) FROM request_segments)";

/// Segments that are there twice, even without FINAL.
const TWICE: &str = "(SELECT count() - uniqExact(upstream, window_start, event_id) FROM request_segments)";

/// Waits until ClickHouse has all that the spool has taken in, or found at the start.
async fn until_nothing_waits(gateway: &Running) {
    for table in Table::ALL {
        let label = format!("table=\"{}\"", table.name());
        eventually(&format!("every row of {label}"), async || {
            let (taken, stored, waiting) = (
                gateway.metric("gateway_spool_rows_total", &[&label]).await,
                gateway.metric("gateway_store_rows_total", &[&label]).await,
                gateway.metric("gateway_spool_rows", &[&label]).await,
            );
            (stored >= taken && waiting == 0.0).then_some(())
        })
        .await;
    }
}

async fn check_books(installed: &Installed) {
    for (what, count) in [
        ("unequal sums", UNEQUAL),
        ("requests that ran or not", RAN_OR_NOT),
        ("crooked segments", CROOKED),
        ("segments that are there twice", TWICE),
    ] {
        assert_eq!(installed.number(count).await, Some(0), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_segments_of_every_request_sum_to_what_its_engine_did() {
    let sim = Sim::start(&["--model", "tiny", "--step-base-us", "1000"]);
    let installed = Installed::embedded("segments", sim.addr);
    let gateway = installed.start();
    let seen = installed.dir.join("records");
    let mut load = load(gateway.clients, 1, REQUESTS, &seen, MIXED);
    assert!(load.status().expect("it runs").success());
    installed
        .until(
            "every event",
            "(SELECT count() FROM request_events FINAL)",
            REQUESTS as u64,
        )
        .await;
    until_nothing_waits(&gateway).await;
    check_books(&installed).await;
    let sums = |table: &str, prompt: &str, completion: &str| {
        format!("(SELECT (sum({prompt}), sum({completion})) FROM {table} FINAL)")
    };
    let (segments, events) = (
        sums("request_segments", "prompt_tokens", "completion_tokens"),
        sums(
            "request_events",
            "ifNull(engine_prompt_tokens, 0)",
            "ifNull(engine_completion_tokens, 0)",
        ),
    );
    assert_eq!(installed.number(&format!("{segments} = {events}")).await, Some(1));
    let generated = installed
        .number("(SELECT sum(completion_tokens) FROM request_segments)")
        .await;
    assert!(generated > Some(REQUESTS as u64), "{generated:?}");
    assert_eq!(gateway.metric("gateway_spool_dropped_rows_total", &[]).await, 0.0);
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_when_the_gateway_was_killed_has_its_segments_once() {
    let sim = Sim::start(&["--model", "tiny", "--step-base-us", "1000"]);
    let installed = Installed::embedded("segments-killed", sim.addr);
    for round in 0..KILLS {
        let gateway = installed.start();
        let path = installed.dir.join(format!("records-{round}"));
        let mut load = load(gateway.clients, 10 + round as usize, REQUESTS, &path, MIXED);
        let mut running = load.spawn().expect("it runs");
        // Some are through, and many are not.
        let taken = 40.0 + 20.0 * round as f64;
        gateway
            .until_metric("gateway_spool_rows_total", &["table=\"request_segments\""], taken)
            .await;
        gateway.kill();
        running.kill().expect("our own process");
        running.wait().expect("our own process");
    }
    let gateway = installed.start();
    eventually("ClickHouse", async || {
        installed.number("(SELECT count() FROM request_segments)").await
    })
    .await;
    until_nothing_waits(&gateway).await;
    check_books(&installed).await;
    let of = |condition: &str| format!("(SELECT countIf({condition}) FROM request_events FINAL)");
    let (ended, crashed) = (
        installed.number(&of("outcome != 'gateway_crash'")).await,
        installed.number(&of("outcome = 'gateway_crash'")).await,
    );
    assert!(
        ended > Some(40 * KILLS) && crashed >= Some(KILLS),
        "{ended:?} ended and {crashed:?} crashed: too few to tell"
    );
    assert_eq!(gateway.metric("gateway_spool_torn_total", &[]).await, 0.0);
    gateway.stop();
}

/// The spool of segments of a gateway that does not run, with so many windows of one stream; the one in the middle has a time that is none.
fn spool_segments(dir: &Path, windows: usize) {
    let spool = SpoolConfig {
        dir: dir.join("spool"),
        seal_after: Duration::from_secs(3600),
        ..SpoolConfig::default()
    };
    let store = Store::open(&spool, "gw").expect("a spool");
    for window in 0..windows {
        let start = 1_795_355_325 + 15 * window;
        let run_end = match window == windows / 2 {
            true => "\"never\"".to_owned(),
            false => format!("{start}999999"),
        };
        let row = format!(
            "{{\"window_start\":{start},\"upstream\":\"chat\",\"event_id\":\"e\",\"team_id\":\"a\",\"model\":\"tiny\",\"run_start\":{start}000000,\
             \"run_end\":{run_end},\"prompt_tokens\":1,\"cached_tokens\":0,\"completion_tokens\":2,\"kv_token_seconds\":0.5,\"gateway_id\":\"gw\"}}"
        );
        // Nobody waits for the disk here.
        drop(
            store
                .spool_of(Table::Segments)
                .append(row.as_bytes())
                .expect("room"),
        );
    }
}

fn only_file(dir: &Path, end: &str) -> PathBuf {
    let mut paths = std::fs::read_dir(dir)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").path());
    paths
        .find(|path| path.to_string_lossy().ends_with(end))
        .unwrap_or_else(|| panic!("no {end} in {}", dir.display()))
}

/// One stream has many segments in a batch, which the sender must not take for one another.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_segments_is_told_by_its_windows_and_a_refused_one_is_put_aside() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::embedded("segments-refused", sim.addr);
    let rows = "(SELECT count() FROM request_segments)";
    let own = installed.dir.join("spool/gw/segments");
    spool_segments(&installed.dir, 9);
    let batch = only_file(&own, ".jsonl");
    let text = std::fs::read_to_string(&batch).expect("it is there");
    let gateway = installed.start();
    installed.until("the good ones", rows, 8).await;
    until_nothing_waits(&gateway).await;
    let quarantined = "gateway_spool_quarantined_rows_total";
    assert_eq!(
        gateway.metric(quarantined, &["table=\"request_segments\""]).await,
        1.0
    );
    assert_eq!(
        gateway.metric(quarantined, &["table=\"request_events\""]).await,
        0.0
    );
    let aside = std::fs::read_to_string(only_file(&own.join("quarantine"), ".jsonl")).expect("text");
    assert!(
        aside.lines().count() == 1 && aside.contains("\"never\""),
        "{aside}"
    );
    // Some are lost where they were stored, and the spool comes back from a backup.
    installed
        .make(
            "&lightweight_deletes_sync=2",
            "DELETE FROM request_segments WHERE window_start < toDateTime(1795355325 + 45)",
        )
        .await;
    installed.until("some to be gone", rows, 5).await;
    gateway.stop();
    let good: String = text
        .lines()
        .filter(|line| !line.contains("never"))
        .map(|line| format!("{line}\n"))
        .collect();
    for (found, rows_before) in [
        ("gateway_store_repaired_batches_total", 5),
        ("gateway_store_found_batches_total", 8),
    ] {
        std::fs::write(&batch, &good).expect("a file");
        let gateway = installed.start();
        gateway
            .until_metric(found, &["table=\"request_segments\""], 0.0)
            .await;
        installed
            .until(&format!("all of them after {rows_before}"), rows, 8)
            .await;
        gateway.stop();
    }
}
