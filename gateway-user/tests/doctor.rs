//! `vllm-gateway doctor` as an operator starts it, before servers that are well, half well, and not there.
//!
//! The tests with ClickHouse need libchdb, which `cargo xtask test` fetches; without it they fail and say so.

mod support;

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Sim, eventually, exchange};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use vllm_gateway::config::StoreConfig;
use vllm_gateway::store::{migrate, sender};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vllm-gateway");

/// A secret that no output may hold.
const PASSWORD: &str = "hunter2-hunter2-hunter2";

/// A directory with a config, removed with this.
struct Place(PathBuf);

impl Place {
    /// `yaml` beside free addresses for the gateway, no store, and a pool that is quickly given up.
    fn new(name: &str, yaml: &str) -> Place {
        let dir = std::env::temp_dir().join(format!("vllm-gateway-doctor-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        std::fs::write(dir.join("config.yaml"), yaml).expect("a file");
        Place(dir)
    }

    /// Before one upstream for text.
    fn before(name: &str, upstream: SocketAddr, more: &str) -> Place {
        Place::new(name, &config(upstream, "127.0.0.1:0", more))
    }

    fn doctor(&self, options: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        command
            .arg("doctor")
            .args(options)
            .current_dir(&self.0)
            .stdin(Stdio::null());
        // The tests' own machine may have a vLLM of its own.
        for (name, _) in std::env::vars().filter(|(name, _)| {
            ["VLLM_", "GATEWAY_", "CLICKHOUSE_", "SPOOL_"]
                .iter()
                .any(|start| name.starts_with(start))
        }) {
            command.env_remove(name);
        }
        let output = command.env("VLLM_API_KEY", PASSWORD).output().expect("it starts");
        for text in [&output.stdout, &output.stderr] {
            let text = String::from_utf8_lossy(text);
            assert!(!text.contains(PASSWORD), "a secret shows: {text}");
            assert!(!text.contains("panicked"), "{text}");
        }
        output
    }

    /// What it found, as JSON.
    fn report(&self, options: &[&str]) -> Report {
        Report::of(&self.doctor(&[&["--format", "json"], options].concat()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// `upstream_idle` comes first, so that `more` may be any further sections.
fn config(upstream: SocketAddr, listen: &str, more: &str) -> String {
    let store = if more.contains("store:") {
        ""
    } else {
        "store: {url: none}\n"
    };
    format!(
        "gateway: {{listen: \"{listen}\", id: gw, secret: {PASSWORD}}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n\
         proxy: {{upstream_idle: 300ms}}\n\
         upstreams:\n  - {{name: chat, url: \"http://{upstream}\", serves: generate}}\n{store}{more}"
    )
}

struct Report {
    value: Value,
    exit_code: Option<i32>,
}

impl Report {
    fn of(output: &Output) -> Report {
        let value = serde_json::from_slice(&output.stdout);
        Report {
            value: value.unwrap_or_else(|error| panic!("{error} in {output:?}")),
            exit_code: output.status.code(),
        }
    }

    /// A line: its state and what was found.
    fn line(&self, group: &str, name: &str) -> (&str, &str) {
        let line = self.find(group, name);
        let line = line.unwrap_or_else(|| panic!("no line {group}, {name} in {:#}", self.value));
        let text = |key: &str| line[key].as_str().expect("text");
        (text("state"), text("found"))
    }

    fn find(&self, group: &str, name: &str) -> Option<&Value> {
        let lines = self.value["checks"].as_array().expect("a list");
        lines
            .iter()
            .find(|line| line["group"] == group && line["name"] == name)
    }

    #[track_caller]
    fn expect(&self, group: &str, name: &str, state: &str, found: &str) {
        let line = self.line(group, name);
        assert!(
            line.0 == state && line.1.contains(found),
            "expected {group}, {name} to be {state} with {found:?}, found {line:?}"
        );
    }

    fn can_run(&self, part: &str) -> bool {
        self.value[part]["can_run"].as_bool().expect("a verdict")
    }
}

/// A port that nobody listens on.
fn free() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("an address")
}

/// Tokens that a server's engine has generated.
async fn generated(addr: SocketAddr) -> f64 {
    let page = exchange(
        addr,
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    )
    .await;
    let page = String::from_utf8(page).expect("text");
    support::metric_sum(&page, "vllm:generation_tokens_total", &[])
}

#[tokio::test]
async fn a_server_that_is_well_is_described_and_its_engine_left_alone() {
    let sim = Sim::start(&["--model", "tiny,alias"]);
    let report = Place::before("well", sim.addr, "").report(&[]);
    for (name, found) in [
        ("reach", &*sim.addr.to_string()),
        ("health", "/health answers 200"),
        ("version", "vLLM 0.32.0"),
        ("models", "tiny, alias"),
        ("families", "15 of the 15 families"),
        ("engines", "tiny: one engine"),
        ("one server", "8 scrapes are of one process"),
        ("keep-alive", "kept longer than 0."),
        ("id headers", "does not come back"),
    ] {
        report.expect("upstream chat", name, "ok", found);
    }
    for name in ["forced usage", "prompt details", "request metrics"] {
        report.expect("upstream chat", name, "unknown", "not tried");
    }
    assert_eq!(generated(sim.addr).await, 0.0);
    report.expect("ports", "clients", "ok", "free");
    assert!(report.can_run("proxy"), "{:#}", report.value);
    if cfg!(target_os = "linux") {
        report.expect(
            "tap",
            "socket",
            "ok",
            &format!("chat: process {} (vllm-sim) listens, in cgroup /", sim.pid()),
        );
        // Whether it may is the machine's affair; that the verdict is what loading said, is ours.
        assert_eq!(report.can_run("tap"), report.line("tap", "probe").0 == "ok");
    }
    let code = if report.can_run("tap") { 0 } else { 10 };
    assert_eq!(report.exit_code, Some(code), "{:#}", report.value);
    assert_eq!(report.value["exit_code"], code);
    assert_eq!(
        report.value["auto_gets"],
        if code == 0 { "proxy+tap" } else { "proxy" }
    );
}

/// As a user that has no capabilities, in case this one has.
#[test]
#[cfg(target_os = "linux")]
fn without_capabilities_the_proxy_can_run_and_the_tap_cannot() {
    use std::os::unix::process::CommandExt;
    let sim = Sim::start(&[]);
    let place = Place::before("nobody", sim.addr, "");
    // The one that cargo built may be where only its owner can go.
    let program = place.0.join("vllm-gateway");
    std::fs::copy(PROGRAM, &program).expect("a copy");
    let mut command = Command::new(program);
    command
        .arg("doctor")
        .args(["--format", "json"])
        .current_dir(&place.0);
    if rustix::process::geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    let report = Report::of(&command.output().expect("it starts"));
    report.expect("kernel", "capabilities", "problem", "CAP_BPF");
    report.expect("tap", "probe", "problem", "needs CAP_BPF");
    assert!(report.can_run("proxy") && !report.can_run("tap"));
    assert_eq!(
        (report.exit_code, &report.value["auto_gets"]),
        (Some(10), &"proxy".into())
    );
}

#[test]
#[cfg(target_os = "linux")]
fn where_no_upstream_is_on_this_machine_there_is_nothing_to_tap() {
    // TEST-NET-1, which no machine has.
    let report = Place::before("elsewhere", "192.0.2.1:8000".parse().expect("an address"), "").report(&[]);
    report.expect("tap", "socket", "warning", "another machine");
    report.expect("tap", "upstreams", "problem", "none of them is on this machine");
    assert!(!report.can_run("tap"));
}

#[tokio::test]
async fn options_are_found_by_what_the_engine_answers() {
    let options = ["--force-usage", "--request-metrics", "--request-id-headers"];
    for (name, with) in [("with", true), ("without", false)] {
        let sim = if with {
            Sim::start(&options)
        } else {
            Sim::start(&["--prompt-tokens-details", "false"])
        };
        let report = Place::before(name, sim.addr, "").report(&["--probe-requests"]);
        let (on, details) = if with { ("on", "ok") } else { ("off", "warning") };
        report.expect("upstream chat", "forced usage", "ok", on);
        report.expect("upstream chat", "request metrics", "ok", on);
        report.expect("upstream chat", "prompt details", details, on);
        let echo = if with { "comes back" } else { "does not come back" };
        report.expect("upstream chat", "id headers", "ok", echo);
        assert_eq!(generated(sim.addr).await, 2.0, "two tokens, as the help says");
    }
}

#[test]
fn an_embedding_server_is_asked_for_an_embedding_and_a_wrong_one_is_told() {
    let (embeds, generates) = (Sim::start(&["--kind", "embed"]), Sim::start(&[]));
    for (name, addr, state) in [
        ("embeds", embeds.addr, "ok"),
        ("generates", generates.addr, "problem"),
    ] {
        let yaml = config(addr, "127.0.0.1:0", "").replace("serves: generate", "serves: embeddings");
        let report = Place::new(name, &yaml).report(&["--probe-requests"]);
        let line = if state == "ok" {
            "embeddings"
        } else {
            "probe requests"
        };
        report.expect(
            "upstream chat",
            line,
            state,
            if state == "ok" { "with its usage" } else { "404" },
        );
    }
}

#[test]
fn a_server_that_is_not_there_is_one_line_and_stops_nothing() {
    let addr = free();
    let report = Place::before("gone", addr, "").report(&[]);
    report.expect(
        "upstream chat",
        "reach",
        "problem",
        &format!("http://{addr}: cannot connect"),
    );
    assert!(report.find("upstream chat", "health").is_none());
    assert!(report.can_run("proxy"));
    let yaml = config(addr, "127.0.0.1:0", "").replace(&addr.to_string(), "no-such-host.invalid:8000");
    let report = Place::new("nowhere", &yaml).report(&[]);
    report.expect(
        "upstream chat",
        "reach",
        "problem",
        "no-such-host.invalid:8000: the name is not known",
    );
}

#[test]
fn models_that_are_configured_and_not_served_are_named() {
    let sim = Sim::start(&["--model", "tiny"]);
    let yaml = config(sim.addr, "127.0.0.1:0", "")
        .replace("serves: generate", "serves: generate, models: [tiny, big]");
    let report = Place::new("models", &yaml).report(&[]);
    report.expect("upstream chat", "models", "problem", "tiny; not served: big");
}

#[test]
fn a_server_that_drops_connections_before_the_pool_does_is_told_with_both_times() {
    let sim = Sim::start(&["--keep-alive", "200ms"]);
    let yaml = config(sim.addr, "127.0.0.1:0", "").replace("300ms", "30s");
    let report = Place::new("keep-alive", &yaml).report(&[]);
    report.expect(
        "upstream chat",
        "keep-alive",
        "warning",
        "the gateway drops them after 30s",
    );
}

/// Answers each connection with what a TLS server says: to a greeting, the beginning of its own; to anything else, an alert.
async fn tls_double() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut first = [0; 1];
            let _ = stream.read_exact(&mut first).await;
            let answer: &[u8] = match first {
                [22] => &[22, 3, 3, 0, 42, 2, 0, 0, 38, 3, 3],
                _ => &[21, 3, 3, 0, 2, 2, 10],
            };
            let _ = stream.write_all(answer).await;
        }
    });
    addr
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_recognised_and_said_to_be_opaque() {
    let addr = tls_double().await;
    let report = Place::before("tls", addr, "").report(&[]);
    report.expect("upstream chat", "TLS", "problem", "it speaks TLS");
    let advice = report.find("upstream chat", "TLS").expect("a line")["advice"]
        .as_str()
        .expect("text");
    assert!(advice.contains("the tap cannot look into TLS"), "{advice}");
}

/// Sends connections to two servers in turn, as a balancer would.
async fn balancer(servers: [SocketAddr; 2]) -> SocketAddr {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let server = servers[TURN.fetch_add(1, Ordering::Relaxed) % 2];
            tokio::spawn(async move {
                let mut server = TcpStream::connect(server).await.expect("it is up");
                // Either may leave first.
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    addr
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_behind_one_address_are_told_apart_from_one() {
    let sims = [Sim::start(&[]), Sim::start(&[])];
    let addr = balancer([sims[0].addr, sims[1].addr]).await;
    let report = Place::before("balanced", addr, "").report(&[]);
    report.expect(
        "upstream chat",
        "one server",
        "problem",
        "2 processes among 8 scrapes",
    );
    assert!(report.can_run("proxy"), "requests are counted all the same");
    let addr = balancer([sims[0].addr, sims[0].addr]).await;
    let report = Place::before("forwarded", addr, "").report(&[]);
    report.expect("upstream chat", "one server", "ok", "one process");
}

#[test]
fn a_port_that_another_program_holds_stops_the_proxy_and_names_it() {
    let (holder, upstream) = (Sim::start(&[]), Sim::start(&[]));
    let yaml = config(upstream.addr, &holder.addr.to_string(), "");
    let place = Place::new("held", &yaml);
    let report = place.report(&[]);
    let found = if cfg!(target_os = "linux") {
        format!("in use by process {} (vllm-sim)", holder.pid())
    } else {
        "in use by another process".to_owned()
    };
    report.expect("ports", "clients", "problem", &found);
    assert!(!report.can_run("proxy"));
    assert!(
        matches!(report.exit_code, Some(11 | 12)),
        "{:?}",
        report.exit_code
    );
    assert_eq!(report.value["auto_gets"], Value::Null);
    let table = place.doctor(&[]);
    assert_eq!(table.status.code(), report.exit_code);
    let text = String::from_utf8(table.stdout).expect("text");
    let last: Vec<&str> = text.lines().rev().take(6).collect();
    assert!(last[0].starts_with("capture: auto would get nothing"), "{text}");
    assert!(
        text.contains("\nproxy: cannot run because ports, clients:"),
        "{text}"
    );
}

/// A program of ours that is ended with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
#[cfg(target_os = "linux")]
async fn beside_a_gateway_that_runs_its_port_and_its_spool_are_no_problem() {
    let sim = Sim::start(&[]);
    let (listen, clickhouse) = (free(), free());
    let more = format!(
        "store: {{url: embedded, embedded_listen: \"{clickhouse}\", password: {PASSWORD}, username: gateway}}\n"
    );
    let place = Place::new("running", &config(sim.addr, &listen.to_string(), &more));
    let mut command = Command::new(PROGRAM);
    command
        .arg("run")
        .current_dir(&place.0)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let gateway = Running(command.spawn().expect("it starts"));
    eventually("the gateway and its engine are up", async || {
        TcpStream::connect(listen).await.ok()?;
        let schema = migrate::found_version(&client(clickhouse, PASSWORD), "vllm_attribution").await;
        schema
            .ok()?
            .filter(|version| *version == migrate::known_version())
    })
    .await;
    let report = place.report(&[]);
    let held = format!("held by a gateway that runs, process {}", gateway.0.id());
    report.expect("ports", "clients", "warning", &held);
    report.expect(
        "spool",
        "in use",
        "warning",
        &format!("process {}", gateway.0.id()),
    );
    report.expect("store", "clickhouse", "ok", "lets gateway in");
    report.expect("store", "schema", "ok", "up to date");
    assert!(report.can_run("proxy"));
}

#[test]
fn the_embedded_engine_is_tried_and_nothing_is_left_of_that() {
    let sim = Sim::start(&[]);
    let more = format!("store: {{url: embedded, embedded_listen: \"{}\"}}\n", free());
    let place = Place::before("embedded", sim.addr, &more);
    let report = place.report(&[]);
    report.expect("store", "engine", "ok", "");
    report.expect("store", "start", "ok", "is ClickHouse");
    let left: Vec<_> = std::fs::read_dir(&place.0)
        .expect("it is there")
        .flatten()
        .collect();
    assert_eq!(left.len(), 1, "the config alone, not {left:?}");
}

/// The embedded engine as a server of its own, with a password.
struct Clickhouse {
    _process: Running,
    addr: SocketAddr,
    _data: Place,
}

impl Clickhouse {
    fn start() -> Clickhouse {
        let data = Place::new("data", "");
        let mut command = Command::new(PROGRAM);
        command.args([
            "embedded-clickhouse",
            "--listen",
            "127.0.0.1:0",
            "--exit-with-stdin",
            "--data-dir",
        ]);
        command
            .arg(data.0.join("tables"))
            .env("CLICKHOUSE_USERNAME", "gateway")
            .env("CLICKHOUSE_PASSWORD", PASSWORD);
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let said = BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line);
        assert!(said.is_ok());
        let addr = line
            .trim()
            .strip_prefix("listening on http://")
            .and_then(|addr| addr.parse().ok());
        Clickhouse {
            _process: Running(process),
            addr: addr.unwrap_or_else(|| panic!("expected `listening on http://ADDRESS`, got {line:?}")),
            _data: data,
        }
    }

    fn place(&self, name: &str, upstream: SocketAddr, password: &str) -> Place {
        let more = format!(
            "store: {{url: \"http://{}\", username: gateway, password: {password}}}\n",
            self.addr
        );
        Place::before(name, upstream, &more)
    }
}

fn client(addr: SocketAddr, password: &str) -> clickhouse::Client {
    let url = format!("http://{addr}");
    clickhouse::Client::default()
        .with_url(url)
        .with_user("gateway")
        .with_password(password)
}

#[tokio::test]
async fn a_clickhouse_is_judged_by_its_answer_its_password_and_its_schema() {
    let (sim, server) = (Sim::start(&[]), Clickhouse::start());
    let report = server.place("wrong", sim.addr, "another-password").report(&[]);
    report.expect(
        "store",
        "clickhouse",
        "problem",
        "refuses the user or the password",
    );
    let place = server.place("right", sim.addr, PASSWORD);
    let report = place.report(&[]);
    report.expect("store", "clickhouse", "ok", "lets gateway in");
    report.expect("store", "schema", "ok", "has none yet");
    let client = client(server.addr, PASSWORD);
    migrate::migrate(&client, &sender::layout(&StoreConfig::default()))
        .await
        .expect("a schema");
    place.report(&[]).expect("store", "schema", "ok", "up to date");
    let newer =
        "INSERT INTO vllm_attribution.schema_migrations (version, name, program) VALUES (99, 'later', '9.9')";
    client.query(newer).execute().await.expect("a row");
    let report = place.report(&[]);
    report.expect("store", "schema", "problem", "has version 99");
    assert!(report.can_run("proxy"), "rows wait in the spool");
}

#[test]
fn a_clickhouse_that_is_down_or_is_none_is_told_and_stops_nothing() {
    let sim = Sim::start(&[]);
    let more = format!("store: {{url: \"http://{}\"}}\n", free());
    let report = Place::before("down", sim.addr, &more).report(&[]);
    report.expect(
        "store",
        "clickhouse",
        "problem",
        "does not answer: Connection refused",
    );
    assert!(report.can_run("proxy"));
    let more = format!("store: {{url: \"http://{}\"}}\n", sim.addr);
    let report = Place::before("no-clickhouse", sim.addr, &more).report(&[]);
    report.expect("store", "clickhouse", "problem", "answers: ");
}

#[test]
fn a_spool_that_cannot_be_written_stops_the_proxy() {
    let sim = Sim::start(&[]);
    let more = format!(
        "store: {{url: \"http://{}\"}}\nspool: {{dir: config.yaml}}\n",
        free()
    );
    let report = Place::before("spool", sim.addr, &more).report(&[]);
    report.expect("spool", "directory", "problem", "config.yaml");
    assert!(!report.can_run("proxy"));
    assert!(
        matches!(report.exit_code, Some(11 | 12)),
        "{:?}",
        report.exit_code
    );
}

#[test]
fn a_config_that_cannot_be_used_is_told_and_exits_78() {
    let output = Place::new("broken", "gateway: {lisden: x}\n").doctor(&[]);
    assert_eq!(output.status.code(), Some(78));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("lisden"));
}
