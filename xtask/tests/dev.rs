//! `cargo xtask dev` as its users meet it: the real programs, on ports of the test's own.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

/// How long a test waits for what must happen. Far above what it takes, for a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// How far the ports of a system lie from its first.
const OFFSETS: [u16; 6] = [0, 1, 80, 123, 1090, 1464];

/// A port base that is free. Below the range from which the system gives ports to other tests (32768 on Linux), and another for
/// each test: no two of the offsets differ by a small multiple of ten.
fn port_base(test: u16) -> u16 {
    let start = 10_000 + u16::try_from(std::process::id() % 200).expect("small") * 100 + test * 10;
    let mut bases = (0..20).map(|try_| 10_000 + (start - 10_000 + try_ * 1000) % 20_000);
    bases
        .find(|base| OFFSETS.iter().all(|offset| is_free(base + offset)))
        .expect("one of twenty bases is free")
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("0.0.0.0", port)).is_ok()
}

fn dev(base: u16, words: &[&str]) -> Command {
    let mut command = Command::new(XTASK);
    command
        .arg("dev")
        .args(words)
        .args(["--port-base", &base.to_string()]);
    command
}

fn target_directory() -> &'static Path {
    let target = Path::new(XTASK).parent().and_then(Path::parent);
    target.expect("xtask stands in a directory of it")
}

/// The command that runs a system. The programs were built by whoever built the tests of all packages; else it builds them.
fn up(base: u16, words: &[&str]) -> Command {
    let mut command = dev(base, words);
    let target = target_directory();
    let programs = ["vllm-gateway", "vllm-sim", "vllm-load"];
    if programs
        .iter()
        .all(|name| target.join("debug").join(name).exists())
    {
        command.arg("--no-build");
    }
    command
}

/// A system that runs until the test ends it.
struct System {
    xtask: Child,
    stdout: BufReader<ChildStdout>,
    /// Process ids by name.
    pids: BTreeMap<String, i32>,
}

impl System {
    /// Starts one and waits for its table of processes.
    fn start(base: u16) -> Self {
        let mut command = up(base, &["--no-prometheus", "--for", "10m"]);
        let mut xtask = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("xtask starts");
        let mut stdout = BufReader::new(xtask.stdout.take().expect("a pipe"));
        let mut text = String::new();
        while !text.contains("\nload ") {
            let read = stdout.read_line(&mut text).expect("text");
            assert!(read > 0, "it ended before it was up: {text}");
        }
        let pids = pids_in(&text);
        Self { xtask, stdout, pids }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.xtask)
    }

    /// Waits for its end. Returns its exit code, and all that it still had to say.
    fn ended(mut self) -> (Option<i32>, String) {
        let status = within_deadline("xtask ends", || self.xtask.try_wait().expect("a child"));
        let mut text = String::new();
        self.stdout.read_to_string(&mut text).expect("text");
        let mut stderr = self.xtask.stderr.take().expect("a pipe");
        stderr.read_to_string(&mut text).expect("text");
        (status.code(), text)
    }
}

impl Drop for System {
    /// When the test has failed before its end.
    fn drop(&mut self) {
        if let Ok(None) = self.xtask.try_wait() {
            let _ = kill_process(self.pid(), Signal::TERM);
            let _ = self.xtask.wait();
        }
    }
}

/// The rows of the table of processes: name, URL, process id, log.
fn pids_in(stdout: &str) -> BTreeMap<String, i32> {
    let rows = stdout.lines().filter(|line| line.ends_with(".log"));
    rows.map(|row| {
        let words: Vec<_> = row.split_whitespace().collect();
        (words[0].to_owned(), words[2].parse().expect("a process id"))
    })
    .collect()
}

/// Whether a process runs. One that has ended and waits for a parent that never asks does not.
fn runs(pid: i32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let is_zombie = state
        .rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'));
    test_kill_process(Pid::from_raw(pid).expect("a process id")).is_ok() && !is_zombie
}

fn within_deadline<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// Looks for processes and ports, and then removes the directory that is meant to stay.
fn assert_nothing_is_left(base: u16, pids: &BTreeMap<String, i32>) {
    assert!(pids.len() >= 4, "the table names all processes: {pids:?}");
    for (name, pid) in pids {
        within_deadline(&format!("{name} ({pid}) is gone"), || (!runs(*pid)).then_some(()));
    }
    for offset in OFFSETS {
        assert!(is_free(base + offset), "port {} is still taken", base + offset);
    }
    let status = dev(base, &["status"]).output().expect("xtask starts");
    assert_eq!(status.status.code(), Some(1), "{}", text_of(&status));
    let state = target_directory().join(format!("dev-{base}"));
    fs::remove_dir_all(state).expect("logs and pids stay when the system has gone");
}

fn text_of(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|bytes| String::from_utf8_lossy(bytes))
        .concat()
}

#[test]
fn a_short_run_shows_five_teams_and_leaves_nothing_behind() {
    let base = port_base(0);
    // With Prometheus where it is installed; a test installs nothing.
    let has_prometheus = Command::new("prometheus").arg("--version").output().is_ok();
    let mut command = up(base, &["--for", "5s"]);
    if !has_prometheus {
        command.arg("--no-prometheus");
    }
    let output = command.stdin(Stdio::null()).output().expect("xtask starts");
    let text = text_of(&output);
    assert!(output.status.success(), "{text}");
    for team in ["team-1", "team-2", "team-3", "team-4", "team-5"] {
        let row = text.lines().find(|line| line.starts_with(&format!("{team} ")));
        let row = row.unwrap_or_else(|| panic!("no {team} in {text}"));
        let ok: u64 = row
            .split_whitespace()
            .nth(2)
            .expect("a column")
            .parse()
            .expect("a number");
        assert!(ok > 0, "{text}");
    }
    let pids = pids_in(&text);
    assert_eq!(pids.contains_key("prometheus"), has_prometheus, "{text}");
    let logs = dev(base, &["logs", "load"]).output().expect("xtask starts");
    assert!(
        text_of(&logs).contains("team-5"),
        "the summary of vllm-load: {}",
        text_of(&logs)
    );
    assert_nothing_is_left(base, &pids);
}

#[test]
fn it_can_be_stopped_from_elsewhere() {
    let base = port_base(1);
    let system = System::start(base);
    let status = dev(base, &["status"]).output().expect("xtask starts");
    assert_eq!(pids_in(&text_of(&status)), system.pids, "{}", text_of(&status));
    let second = up(base, &["--no-prometheus"]).output().expect("xtask starts");
    assert_eq!(second.status.code(), Some(1));
    let who = format!("runs already (process {})", system.xtask.id());
    assert!(text_of(&second).contains(&who), "{}", text_of(&second));
    let stop = dev(base, &["stop"]).output().expect("xtask starts");
    assert!(stop.status.success(), "{}", text_of(&stop));
    let pids = system.pids.clone();
    let (code, text) = system.ended();
    assert_eq!(code, Some(0), "{text}");
    assert_nothing_is_left(base, &pids);
}

#[test]
fn a_process_that_dies_takes_the_others_along_and_is_named() {
    let base = port_base(2);
    let system = System::start(base);
    let victim = Pid::from_raw(system.pids["sim-embed"]).expect("a process id");
    kill_process(victim, Signal::KILL).expect("it runs");
    let pids = system.pids.clone();
    let (code, text) = system.ended();
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("sim-embed (process ") && text.contains("signal: 9"),
        "{text}"
    );
    assert_nothing_is_left(base, &pids);
}

#[test]
#[cfg(target_os = "linux")]
fn nothing_outlives_a_killed_supervisor() {
    let base = port_base(3);
    let system = System::start(base);
    kill_process(system.pid(), Signal::KILL).expect("it runs");
    let pids = system.pids.clone();
    let (code, text) = system.ended();
    assert_eq!(code, None, "{text}");
    // Nobody waits for the processes here, and a killed one shows as ended while its last thread still closes its sockets.
    within_deadline("the ports are free", || {
        OFFSETS.iter().all(|offset| is_free(base + offset)).then_some(())
    });
    assert_nothing_is_left(base, &pids);
}
