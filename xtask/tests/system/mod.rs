//! A system of real programs, as `cargo xtask dev` runs it, on ports of the test's own.
#![allow(dead_code, reason = "no test uses all of it")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

pub const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

/// How long a test waits for what must happen. Far above what it takes, for a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// How far the ports of a system lie from its first.
pub const OFFSETS: [u16; 6] = [0, 1, 80, 123, 1090, 1464];

/// A port base that is free. Below the range from which the system gives ports to other tests (32768 on Linux), and another for
/// each test: no two of the offsets differ by a small multiple of ten.
pub fn port_base(test: u16) -> u16 {
    let start = 10_000 + u16::try_from(std::process::id() % 200).expect("small") * 100 + test * 10;
    let mut bases = (0..20).map(|try_| 10_000 + (start - 10_000 + try_ * 1000) % 20_000);
    bases
        .find(|base| OFFSETS.iter().all(|offset| is_free(base + offset)))
        .expect("one of twenty bases is free")
}

pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("0.0.0.0", port)).is_ok()
}

pub fn dev(base: u16, words: &[&str]) -> Command {
    let mut command = Command::new(XTASK);
    command
        .arg("dev")
        .args(words)
        .args(["--port-base", &base.to_string()]);
    command
}

/// What a page on this machine says, its head included.
pub fn get(port: u16, path: &str, fields: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n{fields}\r\n");
    stream.write_all(request.as_bytes()).expect("it is sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text until it closes");
    answer
}

pub fn target_directory() -> &'static Path {
    let target = Path::new(XTASK).parent().and_then(Path::parent);
    target.expect("xtask stands in a directory of it")
}

/// The command that runs a system. The programs were built by whoever built the tests of all packages; else it builds them.
pub fn up(base: u16, words: &[&str]) -> Command {
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
pub struct System {
    pub xtask: Child,
    stdout: BufReader<ChildStdout>,
    /// Process ids by name.
    pub pids: BTreeMap<String, i32>,
}

impl System {
    /// Starts one with these words, and waits for its table of processes.
    pub fn start(base: u16, words: &[&str]) -> Self {
        System::start_command(up(base, &[&["--for", "10m"], words].concat()), "\nload ")
    }

    /// Starts one with this command, and waits for the row of `last` in its table of processes.
    pub fn start_command(mut command: Command, last: &str) -> Self {
        let mut xtask = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("xtask starts");
        let mut stdout = BufReader::new(xtask.stdout.take().expect("a pipe"));
        let mut text = String::new();
        while !text.contains(last) {
            let read = stdout.read_line(&mut text).expect("text");
            if read == 0 {
                let mut stderr = xtask.stderr.take().expect("a pipe");
                stderr.read_to_string(&mut text).expect("text");
                panic!("it ended before it was up: {text}");
            }
        }
        let pids = pids_in(&text);
        Self { xtask, stdout, pids }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.xtask)
    }

    /// Waits for its end. Returns its exit code, and all that it still had to say.
    pub fn ended(mut self) -> (Option<i32>, String) {
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
pub fn pids_in(stdout: &str) -> BTreeMap<String, i32> {
    let rows = stdout.lines().filter(|line| line.ends_with(".log"));
    rows.map(|row| {
        let words: Vec<_> = row.split_whitespace().collect();
        (words[0].to_owned(), words[2].parse().expect("a process id"))
    })
    .collect()
}

pub fn within_deadline<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}
