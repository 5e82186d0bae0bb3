//! The gateway as an operator runs it, with its store: the program, a configuration file, a spool, and ClickHouse.

use super::{DEADLINE, eventually, exchange, metric_sum, spawn_listening};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};

/// What the rows of each window add up to, and what the windows say: both as one sorted list, so that they can be compared.
pub const WINDOWS_ARE_ROWS: &str = "(SELECT groupArray(window) FROM (SELECT (window_start, team_id, project, model, requests, errors, aborts, refused, \
     prompt_tokens, cached_tokens, completion_tokens, engine_prompt_tokens, engine_completion_tokens, charge_nano_usd) AS window \
     FROM request_metrics_15s ORDER BY window)) = \
     (SELECT groupArray(window) FROM (SELECT (toStartOfInterval(toDateTime(ended_at, 'UTC'), INTERVAL 15 SECOND), team_id, project, model, count(), \
     countIf(outcome IN ('client_error', 'server_error', 'truncated', 'unreachable', 'timed_out', 'gateway_crash')), countIf(outcome = 'aborted'), \
     countIf(outcome = 'refused'), sum(ifNull(prompt_tokens, 0)), sum(ifNull(cached_tokens, 0)), sum(ifNull(completion_tokens, 0)), \
     sum(ifNull(engine_prompt_tokens, 0)), sum(ifNull(engine_completion_tokens, 0)), sum(charge_nano_usd)) AS window FROM request_events FINAL \
     GROUP BY toStartOfInterval(toDateTime(ended_at, 'UTC'), INTERVAL 15 SECOND), team_id, project, model ORDER BY window))";

/// A gateway that can be started again and again. Its directory outlives it.
pub struct Installed {
    /// Where everything of it is.
    pub dir: PathBuf,
    /// Where ClickHouse is asked.
    pub clickhouse: SocketAddr,
    /// Further parameters of each question, such as `&user=a`.
    pub parameters: String,
}

/// A gateway that runs.
pub struct Running {
    child: Child,
    /// Where clients connect.
    pub clients: SocketAddr,
    /// Where operators connect.
    pub admin: SocketAddr,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    entries: Mutex<Vec<Value>>,
    arrived: Condvar,
}

/// An address that is free now.
pub fn free_address() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("an address")
}

impl Installed {
    /// With the embedded engine.
    pub fn embedded(name: &str, upstream: SocketAddr) -> Installed {
        let clickhouse = free_address();
        let store = format!("url: embedded, embedded_listen: \"{clickhouse}\", embedded_dir: clickhouse");
        Installed::with_store(name, upstream, clickhouse, &store)
    }

    /// With this section `store`, whose tables are asked at `clickhouse`.
    pub fn with_store(name: &str, upstream: SocketAddr, clickhouse: SocketAddr, store: &str) -> Installed {
        let dir = std::env::temp_dir().join(format!("vllm-gateway-store-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let config = format!(
            "gateway: {{listen: \"127.0.0.1:0\", id: gw}}\nadmin: {{listen: \"127.0.0.1:0\"}}\nlog: {{format: json}}\n\
             upstreams:\n  - {{name: chat, url: \"http://{upstream}\", serves: generate}}\n\
             vllm: {{scrape_interval: 1s}}\nspool: {{dir: spool, seal_after: 200ms}}\nstore: {{{store}}}\n"
        );
        std::fs::write(dir.join("config.yaml"), config).expect("a file");
        Installed {
            dir,
            clickhouse,
            parameters: String::new(),
        }
    }

    /// Adds to its configuration (YAML).
    pub fn configure(&self, more: &str) {
        let file = self.dir.join("config.yaml");
        let config = std::fs::read_to_string(&file).expect("its configuration");
        std::fs::write(&file, config + more).expect("a file");
    }

    /// Starts it.
    pub fn start(&self) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"))
            .args(["run", "--config", "config.yaml"])
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let log = Arc::new(Log::default());
        std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                let mut line = String::new();
                while stderr.read_line(&mut line).is_ok_and(|read| read > 0) {
                    let entry = serde_json::from_str(&line).unwrap_or_else(|_| line.as_str().into());
                    log.entries.lock().expect("no panic while it is held").push(entry);
                    log.arrived.notify_all();
                    line.clear();
                }
            }
        });
        let started = log.wait_for("the start", |entry| entry["fields"]["clients"].is_string());
        let address = |name: &str| {
            started["fields"][name]
                .as_str()
                .and_then(|addr| addr.parse().ok())
        };
        let (clients, admin) = (address("clients"), address("admin"));
        Running {
            child,
            clients: clients.expect("an address"),
            admin: admin.expect("an address"),
            log,
        }
    }

    /// The rows of a query, as JSON objects; `None` while ClickHouse does not answer.
    pub async fn ask(&self, query: &str) -> Option<Vec<Value>> {
        let answer = self.post("", &format!("{query} FORMAT JSONEachRow")).await?;
        // Chunk sizes stand on lines of their own, and rows are objects.
        let rows = answer.lines().filter(|line| line.starts_with('{'));
        Some(
            rows.map(|row| serde_json::from_str(row).expect("a row"))
                .collect(),
        )
    }

    /// Makes ClickHouse do something; `parameters` are of the URL, such as `&async_insert=0`.
    pub async fn make(&self, parameters: &str, statement: &str) {
        self.post(parameters, statement)
            .await
            .unwrap_or_else(|| panic!("ClickHouse does not take {statement}"));
    }

    async fn post(&self, parameters: &str, body: &str) -> Option<String> {
        let request = format!(
            "POST /?database=vllm_attribution&output_format_json_quote_64bit_integers=0{}{parameters} HTTP/1.1\r\nHost: a\r\n\
             Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
            self.parameters,
            body.len()
        );
        tokio::net::TcpStream::connect(self.clickhouse).await.ok()?;
        let answer = exchange(self.clickhouse, request.as_bytes()).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        if !answer.starts_with("HTTP/1.1 200") {
            eprintln!("{}", answer.lines().last().unwrap_or_default());
            return None;
        }
        Some(answer)
    }

    /// What an expression is, as a number.
    pub async fn number(&self, expression: &str) -> Option<u64> {
        self.ask(&format!("SELECT toUInt64({expression}) AS n"))
            .await?
            .first()?["n"]
            .as_u64()
    }

    /// Waits until an expression has this value.
    pub async fn until(&self, what: &str, expression: &str, value: u64) {
        let mut last = None;
        eventually(what, async || {
            last = self.number(expression).await.or(last);
            (last == Some(value)).then_some(())
        })
        .await;
    }

    /// Waits until windows are what rows are, to the unit. Rows may still be on their way, and an insert is seen in the rows a moment before it
    /// is in the windows.
    pub async fn until_windows_are_rows(&self) {
        self.until("windows to hold what rows hold", WINDOWS_ARE_ROWS, 1)
            .await;
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Running {
    /// As nobody should stop it.
    pub fn kill(mut self) {
        self.child.kill().expect("our own process");
        self.child.wait().expect("our own process");
    }

    /// As an operator stops it.
    pub fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("our own process");
        assert!(self.child.wait().expect("our own process").success());
    }

    /// Waits for an entry of its log whose text holds all of `words`.
    pub fn logged(&self, words: &[&str]) -> Value {
        self.log.wait_for(&format!("{words:?} in the log"), |entry| {
            let text = entry.to_string();
            words.iter().all(|word| text.contains(word))
        })
    }

    /// A metric, summed over the series that have all of `labels`.
    pub async fn metric(&self, family: &str, labels: &[&str]) -> f64 {
        let request = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let answer = exchange(self.admin, request).await;
        let text = String::from_utf8(answer).expect("text");
        assert!(text.contains(&format!("# TYPE {family} ")), "no family {family}");
        metric_sum(&text, family, labels)
    }

    /// Waits until a metric is above a number.
    pub async fn until_metric(&self, family: &str, labels: &[&str], above: f64) {
        eventually(&format!("{family}{labels:?} above {above}"), async || {
            (self.metric(family, labels).await > above).then_some(())
        })
        .await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Log {
    fn wait_for(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let entries = self.entries.lock().expect("no panic while it is held");
        let missing = |entries: &mut Vec<Value>| !entries.iter().any(&is_it);
        let (entries, _) = self
            .arrived
            .wait_timeout_while(entries, DEADLINE, missing)
            .expect("no panic while it is held");
        let found = entries.iter().find(|entry| is_it(entry));
        found.cloned().unwrap_or_else(|| {
            let all: Vec<String> = entries.iter().map(ToString::to_string).collect();
            panic!("waited {DEADLINE:?} for {what}; the log:\n{}", all.join("\n"))
        })
    }
}

/// ClickHouse as a process of its own, as the gateway starts it too, or the operator of a server does.
pub struct ClickHouse {
    child: Child,
    /// Where it listens.
    pub addr: SocketAddr,
}

impl ClickHouse {
    /// Starts it at `addr` with the tables in `dir`, and waits until it answers. `password` is of its user `gateway`.
    pub fn start(addr: SocketAddr, dir: &Path, password: Option<&str>) -> ClickHouse {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"));
        command
            .args(["embedded-clickhouse", "--listen", &addr.to_string(), "--data-dir"])
            .arg(dir);
        if let Some(password) = password {
            command.envs([
                ("CLICKHOUSE_USERNAME", "gateway"),
                ("CLICKHOUSE_PASSWORD", password),
            ]);
        }
        let (child, addr) = spawn_listening(command);
        ClickHouse { child, addr }
    }

    /// `kill -9`.
    pub fn kill(self) {
        drop(self);
    }
}

impl Drop for ClickHouse {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A load of `requests` on `gateway`, whose records go to a file; `more` are further options.
pub fn load(gateway: SocketAddr, seed: usize, requests: usize, records: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-load"));
    let (url, requests, seed) = (
        format!("http://{gateway}"),
        requests.to_string(),
        seed.to_string(),
    );
    command
        .args([
            "--url",
            &url,
            "--model",
            "tiny",
            "--requests",
            &requests,
            "--seed",
            &seed,
        ])
        .args([
            "--endpoints",
            "chat=2,completions=1",
            "--no-progress",
            "--records",
        ])
        .arg(records)
        .args(more)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// What the clients of a load have seen.
pub fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("the load generator's records");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a record"))
        .collect()
}
