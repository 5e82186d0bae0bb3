//! `cargo xtask dev` as its users meet it: the real programs, on ports of the test's own.
#![cfg(unix)]

mod system;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use system::{OFFSETS, System, dev, is_free, pids_in, port_base, target_directory, up, within_deadline};

/// Whether a process runs. One that has ended and waits for a parent that never asks does not.
fn runs(pid: i32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let is_zombie = state
        .rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'));
    test_kill_process(Pid::from_raw(pid).expect("a process id")).is_ok() && !is_zombie
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
    let system = System::start(base, &["--no-prometheus"]);
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
    let system = System::start(base, &["--no-prometheus"]);
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
    let system = System::start(base, &["--no-prometheus"]);
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
