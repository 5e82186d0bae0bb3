//! From a client's request to rows in ClickHouse's own engine: the real program, stopped as it should be, and killed at any moment.

mod support;

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use support::{Sim, eventually, exchange, post};
use vllm_gateway::config::SpoolConfig;
use vllm_gateway::store::Store;

/// Requests of one load.
const REQUESTS: usize = 400;

/// Rounds of load in which the gateway is killed.
const KILLS: usize = 5;

/// A gateway as an operator runs it: spool, embedded engine and all. Its directory outlives it.
struct Installed {
    dir: PathBuf,
    clickhouse: SocketAddr,
}

struct Running {
    child: Child,
    clients: SocketAddr,
}

impl Installed {
    fn new(name: &str, upstream: SocketAddr) -> Installed {
        let dir = std::env::temp_dir().join(format!("vllm-gateway-store-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        // Free now, and the engine keeps it over its restarts.
        let clickhouse = TcpListener::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .expect("a port");
        let config = format!(
            "gateway: {{listen: \"127.0.0.1:0\", id: gw}}\nadmin: {{listen: \"127.0.0.1:0\"}}\nlog: {{format: json}}\n\
             upstreams:\n  - {{name: chat, url: \"http://{upstream}\", serves: generate}}\n\
             vllm: {{scrape_interval: 1s}}\nspool: {{dir: spool, seal_after: 200ms}}\n\
             store: {{url: embedded, embedded_listen: \"{clickhouse}\", embedded_dir: clickhouse}}\n"
        );
        std::fs::write(dir.join("config.yaml"), config).expect("a file");
        Installed { dir, clickhouse }
    }

    fn start(&self) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"))
            .args(["run", "--config", "config.yaml"])
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut said = String::new();
        let clients = loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).expect("text") > 0, "it ended:\n{said}");
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(addr) = entry["fields"]["clients"].as_str() {
                break addr.parse().expect("an address");
            }
            said += &line;
        };
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::stderr()));
        Running { child, clients }
    }

    /// The rows of a query, as JSON objects; `None` while the engine does not answer.
    async fn ask(&self, query: &str) -> Option<Vec<Value>> {
        let body = format!("{query} FORMAT JSONEachRow");
        let request = format!(
            "POST /?database=vllm_attribution&output_format_json_quote_64bit_integers=0 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        tokio::net::TcpStream::connect(self.clickhouse).await.ok()?;
        let answer =
            String::from_utf8_lossy(&exchange(self.clickhouse, request.as_bytes()).await).into_owned();
        if !answer.starts_with("HTTP/1.1 200") {
            return None;
        }
        // Chunk sizes stand on lines of their own, and rows are objects.
        let rows = answer.lines().filter(|line| line.starts_with('{'));
        Some(
            rows.map(|row| serde_json::from_str(row).expect("a row"))
                .collect(),
        )
    }

    async fn number(&self, query: &str) -> Option<u64> {
        self.ask(&format!("SELECT toUInt64({query}) AS n"))
            .await?
            .first()?["n"]
            .as_u64()
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Running {
    fn kill(mut self) {
        self.child.kill().expect("our own process");
        self.child.wait().expect("our own process");
    }

    /// As an operator stops it.
    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("our own process");
        assert!(self.child.wait().expect("our own process").success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn load(gateway: SocketAddr, seed: usize, records: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-load"));
    command
        .args([
            "--url",
            &format!("http://{gateway}"),
            "--model",
            "tiny",
            "--requests",
            &REQUESTS.to_string(),
        ])
        .args([
            "--concurrency",
            "8",
            "--seed",
            &seed.to_string(),
            "--endpoints",
            "chat=2,completions=1",
        ])
        .args(["--abort-fraction", "0.05", "--no-progress", "--records"])
        .arg(records)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("the load generator's records");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a record"))
        .collect()
}

const ROLLED_UP: &str =
    "(SELECT (sum(requests), sum(prompt_tokens), sum(completion_tokens)) FROM request_metrics_15s)";
const RAW: &str = "(SELECT (count(), sum(ifNull(prompt_tokens, 0)), sum(ifNull(completion_tokens, 0))) FROM request_events FINAL)";

#[tokio::test(flavor = "multi_thread")]
async fn every_request_is_a_row_and_windows_add_up() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::new("whole", sim.addr);
    let gateway = installed.start();
    let seen = installed.dir.join("records");
    assert!(
        load(gateway.clients, 1, &seen)
            .status()
            .expect("it runs")
            .success()
    );
    eventually("every row", async || {
        let rows = installed
            .number("(SELECT count() FROM request_events FINAL)")
            .await?;
        (rows == REQUESTS as u64).then_some(())
    })
    .await;
    eventually("windows to hold what rows hold", async || {
        let equal = installed.number(&format!("{ROLLED_UP} = {RAW}")).await?;
        (equal == 1).then_some(())
    })
    .await;
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
    let installed = Installed::new("killed", sim.addr);
    let mut ended = Vec::new();
    for round in 0..KILLS {
        let gateway = installed.start();
        let seen = installed.dir.join(format!("records-{round}"));
        let mut running = load(gateway.clients, 100 + round, &seen)
            .spawn()
            .expect("it runs");
        // Somewhere in the load, and at another place each time.
        let enough = 20 + 60 * round;
        eventually("some requests to be through", async || {
            let lines = std::fs::read_to_string(&seen).map_or(0, |text| text.lines().count());
            (lines >= enough).then_some(())
        })
        .await;
        gateway.kill();
        // Its clients see refused connections from now on, and are soon done.
        running.wait().expect("our own process");
        ended.extend(
            records(&seen)
                .into_iter()
                .filter(|record| record["outcome"] == "ok"),
        );
    }
    let gateway = installed.start();
    let ids: Vec<&str> = ended
        .iter()
        .map(|record| record["request_id"].as_str().expect("an id"))
        .collect();
    assert!(ids.len() > KILLS * 20, "the kills came too early: {}", ids.len());
    let list = ids
        .iter()
        .map(|id| format!("'{id}'"))
        .collect::<Vec<_>>()
        .join(",");
    eventually("a row for each end that a client saw", async || {
        let rows = installed
            .number(&format!("(SELECT count(DISTINCT request_id) FROM request_events FINAL WHERE request_id IN ({list}) AND outcome = 'completed')"))
            .await?;
        (rows == ids.len() as u64).then_some(())
    })
    .await;
    let twice = installed
        .number("(SELECT count() - count(DISTINCT event_id) FROM request_events FINAL)")
        .await;
    assert_eq!(twice, Some(0), "no request has two rows");
    let crashed = installed
        .number("(SELECT countIf(outcome = 'gateway_crash') FROM request_events FINAL)")
        .await;
    assert!(crashed > Some(0), "eight were in flight at each kill");
    // Rows of other requests may still be on their way, and an insert is seen in the rows a moment before it is in the windows.
    eventually("windows to hold what rows hold, over all kills", async || {
        let equal = installed.number(&format!("{ROLLED_UP} = {RAW}")).await?;
        (equal == 1).then_some(())
    })
    .await;
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_clickhouse_refuses_is_put_aside_and_holds_nobody_up() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::new("refused", sim.addr);
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
