//! The gateway's program on disks that fail it: full, not to be written to, damaged, or somebody else's. Requests go on in any case, what
//! is lost is counted by cause, what could be kept is kept, and when the disk is well again so is the spool.
#![cfg(target_os = "linux")]

mod support;

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use support::{DEADLINE, Sim, eventually, exchange, metric_sum, post};

/// Smallest files that the configuration allows: some eighty rows each.
const SEGMENT_BYTES: usize = 64 * 1024;

/// The journal's first file, one segment that is filled and two that are ready, and as much again.
const SMALL_DISK: &str = "5m";

/// As root, the gateway runs as this user: permissions do not bind root.
const NOBODY: u32 = 65534;

/// A directory of the test with a gateway's configuration and spool.
struct Place {
    dir: PathBuf,
}

impl Place {
    fn new(name: &str, upstream: SocketAddr) -> Place {
        let dir =
            std::env::temp_dir().join(format!("vllm-gateway-spool-faults-{}-{name}", std::process::id()));
        fs::create_dir_all(dir.join("spool")).expect("a directory");
        // Nobody listens at the store's address, so that rows stay where they are.
        let config = format!(
            "gateway: {{listen: \"127.0.0.1:0\", id: gw}}\nadmin: {{listen: \"127.0.0.1:0\"}}\ncapture: proxy\nlog: {{format: json}}\n\
             upstreams:\n  - {{name: chat, url: \"http://{upstream}\", serves: generate}}\n\
             store: {{url: \"http://127.0.0.1:9\"}}\nspool: {{dir: spool, segment_bytes: 64KiB, seal_after: 100ms}}\n"
        );
        fs::write(dir.join("config.yaml"), config).expect("a file");
        Place { dir }
    }

    fn spool(&self) -> PathBuf {
        self.dir.join("spool")
    }

    /// The gateway's own directory within the spool.
    fn own(&self) -> PathBuf {
        let own = self.spool().join("gw");
        fs::create_dir_all(&own).expect("a directory");
        own
    }

    /// How the gateway is started here.
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"));
        command.args(["run", "--config", "config.yaml"]);
        self.prepared(command)
    }

    /// As [`Place::command`], with a file system in memory over the spool that only the gateway sees, mounted with `options`, and after
    /// `more` commands of a shell. `None`, and a word about it, where this system lets no test mount anything.
    fn command_on(&self, options: &str, more: &str) -> Option<Command> {
        let mut command = Command::new("unshare");
        if is_root() {
            command.arg("--mount");
        } else {
            command.args(["--mount", "--map-root-user"]);
        }
        let allowed = Command::new(command.get_program())
            .args(command.get_args())
            .args(["mount", "-t", "tmpfs", "tmpfs", "/mnt"])
            .output();
        if !allowed.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("left out: no mount of its own can be had here ({allowed:?})");
            return None;
        }
        // `exec`, so that the process that is watched and killed is the gateway.
        let script =
            format!("mount -t tmpfs -o {options} tmpfs spool && {more} exec \"$0\" run --config config.yaml");
        command.args(["sh", "-c", &script, env!("CARGO_BIN_EXE_vllm-gateway")]);
        Some(self.prepared(command))
    }

    fn prepared(&self, mut command: Command) -> Command {
        command
            .current_dir(&self.dir)
            .env_remove("RUST_LOG")
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A running gateway, killed when this is dropped.
struct Running {
    child: Child,
    clients: SocketAddr,
    admin: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let mut child = command.spawn().expect("it starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut said = String::new();
        let (clients, admin) = loop {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("it ended:\n{said}"))
                .expect("text");
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            said += &line;
            said.push('\n');
            let address = |field: &str| entry["fields"][field].as_str().and_then(|text| text.parse().ok());
            if let (Some(clients), Some(admin)) = (address("clients"), address("admin")) {
                break (clients, admin);
            }
        };
        let log = Arc::new(Mutex::new(said));
        let shared = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut log = shared.lock().expect("no panic while it is held");
                *log += &line;
                log.push('\n');
            }
        });
        Running {
            child,
            clients,
            admin,
            log,
        }
    }

    /// The spool as the gateway itself sees it, whatever is mounted there.
    fn own(&self, place: &Place) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(place.spool().strip_prefix("/").expect("an absolute path"))
            .join("gw")
    }

    /// Sends requests, one after the other, which all succeed.
    async fn serve(&self, count: usize) {
        let request = post(
            "/v1/chat/completions",
            "search",
            r#"{"model":"tiny","max_tokens":1,"messages":[]}"#,
        );
        for _ in 0..count {
            let answer = exchange(self.clients, &request).await;
            assert!(
                answer.starts_with(b"HTTP/1.1 200"),
                "{}\n{}",
                String::from_utf8_lossy(&answer),
                self.said()
            );
        }
    }

    async fn metric(&self, family: &str, labels: &[&str]) -> usize {
        let request = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let page = String::from_utf8(exchange(self.admin, request).await).expect("text");
        metric_sum(&page, family, labels) as usize
    }

    async fn taken(&self) -> usize {
        self.metric("gateway_spool_rows_total", &[]).await
    }

    async fn lost(&self, cause: &str) -> usize {
        let label = format!("cause=\"{cause}\"");
        self.metric("gateway_spool_dropped_rows_total", &[&label]).await
    }

    /// Waits until the gateway says this in its log, so many times.
    async fn says(&self, what: &str, times: usize) {
        eventually(what, async || {
            (self.said().matches(what).count() >= times).then_some(())
        })
        .await;
    }

    fn said(&self) -> String {
        self.log.lock().expect("no panic while it is held").clone()
    }

    /// Waits until `rows` rows are in sealed files of `own`; returns the ids of their events, each of which is there once.
    async fn sealed(&self, own: &Path, rows: usize) -> BTreeSet<String> {
        eventually("the rows to be sealed", async || {
            let found = sealed_events(own);
            let ids: BTreeSet<String> = found.iter().cloned().collect();
            assert_eq!(ids.len(), found.len(), "a row is there twice");
            (found.len() == rows).then_some(ids)
        })
        .await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The events in the sealed files of a directory. Every line is a row.
fn sealed_events(own: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for path in files_ending(own, ".jsonl") {
        // It may be sealed, or go, at this moment; then the next look tells.
        for line in fs::read_to_string(path).unwrap_or_default().lines() {
            let row: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
            found.push(row["event_id"].as_str().expect("a name").to_owned());
        }
    }
    found
}

fn files_ending(dir: &Path, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file() && path.to_string_lossy().ends_with(end))
        .collect();
    found.sort();
    found
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What is left on a file system when this is gone: nothing.
fn fill(ballast: &Path) {
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(ballast)
        .expect("a file");
    while file.write_all(&[1; 4096]).is_ok() {}
}

/// Runs a gateway that must refuse to start.
fn refused(mut command: Command) -> (Output, String) {
    let output = command.output().expect("it starts");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    (output, message)
}

fn sim() -> Sim {
    Sim::start(&["--model", "tiny", "--instant"])
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_requests_go_on_and_rows_are_lost_only_when_nothing_is_left_for_them() {
    let sim = sim();
    let place = Place::new("full", sim.addr);
    let Some(command) = place.command_on(&format!("size={SMALL_DISK}"), "") else {
        return;
    };
    let gateway = Running::start(command);
    let own = gateway.own(&place);
    gateway.serve(5).await;
    gateway.sealed(&own, 5).await;
    let ballast = own.with_file_name("ballast");
    fill(&ballast);
    // Each file that is sealed gives back what it did not need, and somebody else takes it at once.
    let mut sent = 5;
    while gateway.lost("disk_full").await == 0 {
        fill(&ballast);
        gateway.serve(10).await;
        sent += 10;
        assert!(sent < 2000, "the disk is not full\n{}", gateway.said());
    }
    gateway.serve(20).await;
    sent += 20;
    gateway.says("takes no more files and new rows are lost", 1).await;
    let (taken, lost) = (gateway.taken().await, gateway.lost("disk_full").await);
    assert_eq!(taken + lost, sent);
    let row_bytes = 1200;
    assert!(
        taken > SEGMENT_BYTES / row_bytes,
        "the last segment was filled before anything was lost: {taken} rows"
    );
    fs::remove_file(&ballast).expect("it is there");
    gateway.says("the spool takes rows again", 1).await;
    gateway.serve(3).await;
    assert_eq!(gateway.taken().await, taken + 3);
    assert_eq!(gateway.lost("disk_full").await, lost);
    gateway.sealed(&own, taken + 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_turns_read_only_loses_rows_by_that_cause_and_heals() {
    let sim = sim();
    let place = Place::new("read-only", sim.addr);
    let own = place.own();
    let mut command = place.command();
    if is_root() {
        // Where the program itself stands, nobody may be allowed to go.
        let program = place.dir.join("vllm-gateway");
        fs::copy(env!("CARGO_BIN_EXE_vllm-gateway"), &program).expect("room");
        command = Command::new(program);
        command.args(["run", "--config", "config.yaml"]);
        command = place.prepared(command);
        command.uid(NOBODY).gid(NOBODY);
        for path in [&place.dir, &place.spool(), &own] {
            chown(path, Some(NOBODY), Some(NOBODY)).expect("root may");
        }
    }
    let gateway = Running::start(command);
    gateway.serve(5).await;
    gateway.sealed(&own, 5).await;
    fs::set_permissions(&own, Permissions::from_mode(0o555)).expect("it is there");
    let mut sent = 5;
    while gateway.lost("read_only").await == 0 {
        gateway.serve(10).await;
        sent += 10;
        assert!(sent < 2000, "nothing is lost\n{}", gateway.said());
    }
    gateway.says("free space or make it writable", 1).await;
    let (taken, lost) = (gateway.taken().await, gateway.lost("read_only").await);
    assert_eq!(taken + lost, sent);
    assert!(gateway.metric("gateway_spool_disk_failures_total", &[]).await > 0);
    fs::set_permissions(&own, Permissions::from_mode(0o755)).expect("it is there");
    gateway.says("the spool takes rows again", 1).await;
    gateway.serve(3).await;
    assert_eq!(gateway.lost("read_only").await, lost);
    gateway.sealed(&own, taken + 3).await;
}

#[test]
fn a_start_that_has_no_room_or_no_right_to_write_says_where_and_what_to_do() {
    let place = Place::new("start", SocketAddr::from(([127, 0, 0, 1], 9)));
    let fillings = [
        ("ro", "", "Read-only file system"),
        (
            "size=64k",
            "head -c 65536 /dev/zero > spool/ballast;",
            "No space left on device",
        ),
        // The directory and the lock have their place; the journal has none.
        ("size=1m", "", "No space left on device"),
    ];
    for (options, more, reason) in fillings {
        let Some(command) = place.command_on(options, more) else {
            return;
        };
        let (_, message) = refused(command);
        for part in ["spool", reason, "spool.dir (SPOOL_DIR)", "room"] {
            assert!(message.contains(part), "`{options}`: no `{part}` in: {message}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_spool_gives_back_every_row_that_is_whole_and_puts_the_rest_aside() {
    let sim = sim();
    let place = Place::new("damaged", sim.addr);
    let own = place.own();
    let row = |batch: &str, event: &str| {
        format!(
            "{{\"batch\":\"gw/000000000001/{batch}\",\"event_id\":\"{event}\",\"outcome\":\"completed\"}}\n"
        )
    };
    let (zeros, page) = ("\0".repeat(100), "\0".repeat(4096));
    let (first, second) = (row("00000001", "gw-1-1"), row("00000001", "gw-1-2"));
    let torn_end = format!("{first}{}{zeros}", &second[..second.len() - 9]);
    fs::write(own.join("gw.000000000001-00000001.open"), torn_end).expect("room");
    let hole = [
        row("00000002", "gw-1-3"),
        page,
        row("00000002", "gw-1-4"),
        row("00000002", "gw-1-5"),
    ]
    .concat();
    fs::write(own.join("gw.000000000001-00000002.jsonl"), hole).expect("room");
    let cut_off = row("00000003", "gw-1-6") + &row("00000003", "gw-1-7").replace("completed\"}\n", "comp");
    fs::write(own.join("gw.000000000001-00000003.jsonl"), cut_off).expect("room");
    fs::write(own.join("gw.000000000001-00000004.jsonl"), "").expect("room");
    let strangers = ["notes.txt", "gw.000000000001-00000005.jsonl.gz"].map(|name| own.join(name));
    strangers
        .iter()
        .for_each(|path| fs::write(path, "mine").expect("room"));
    // It is called as one of ours would be, and cannot be read as one.
    let directory = own.join("gw.000000000001-00000006.jsonl");
    fs::create_dir(&directory).expect("room");
    let gateway = Running::start(place.command());
    let events = gateway.sealed(&own, 5).await;
    let expected = ["gw-1-1", "gw-1-3", "gw-1-4", "gw-1-5", "gw-1-6"].map(str::to_owned);
    assert_eq!(events, BTreeSet::from(expected));
    assert_eq!(gateway.metric("gateway_spool_torn_total", &[]).await, 2);
    assert_eq!(gateway.metric("gateway_spool_foreign_files_total", &[]).await, 3);
    assert_eq!(gateway.metric("gateway_spool_rows", &[]).await, 5);
    let said = gateway.said();
    assert!(
        said.contains("torn rows were put aside") && said.contains("notes.txt"),
        "{said}"
    );
    let aside = files_ending(&own.join("quarantine"), ".jsonl");
    let text: String = aside
        .iter()
        .map(|path| fs::read_to_string(path).expect("text"))
        .collect();
    assert_eq!(text.matches("\"reason\":\"torn\"").count(), 2, "{text}");
    assert!(text.contains("gw-1-2") && text.contains("gw-1-7"), "{text}");
    for path in &strangers {
        assert_eq!(fs::read(path).expect("it is left alone"), b"mine");
    }
    assert!(directory.is_dir());
    gateway.serve(1).await;
    gateway.sealed(&own, 6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_gateway_on_one_spool_is_told_which_process_has_it_and_the_first_goes_on() {
    let sim = sim();
    let place = Place::new("locked", sim.addr);
    let first = Running::start(place.command());
    let started = std::time::Instant::now();
    let (_, message) = refused(place.command());
    assert!(started.elapsed() < DEADLINE);
    for part in [
        format!("process {}", first.child.id()),
        "spool/gw".to_owned(),
        "gateway.id".to_owned(),
        "SPOOL_DIR".to_owned(),
    ] {
        assert!(message.contains(&part), "no `{part}` in: {message}");
    }
    first.serve(2).await;
    first.sealed(&place.own(), 2).await;
}
