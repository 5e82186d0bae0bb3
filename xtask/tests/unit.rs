//! The systemd unit: what it allows is enough. The gateway runs under the unit's user, capabilities, and view of files, without a systemd that was
//! booted; the system calls that it and its helpers make are listed, and held against those that the unit allows.
//!
//! `cargo xtask check-packaging` asks systemd itself whether it takes the unit, and how much that leaves open.
#![cfg(target_os = "linux")]

mod host;
mod packaged;
mod system;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;

use host::{Host, Process, Running, is_clean};
use packaged::{config, engine, program, root, scratch, seconds, string, text};
use system::within_deadline;

const UNIT: &str = "packaging/systemd/vllm-gateway.service";

/// A number that belongs to nobody, as systemd gives one to a service with DynamicUser.
const USER: &str = "61184:61184";

/// The settings by name, each as often as it is there.
fn unit() -> BTreeMap<String, Vec<String>> {
    let mut settings: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let unit = text(UNIT);
    let lines = unit
        .lines()
        .filter(|line| !line.starts_with(['#', '[']) && !line.is_empty());
    for line in lines {
        let (name, value) = line
            .split_once('=')
            .unwrap_or_else(|| panic!("{line}: no setting"));
        settings
            .entry(name.to_owned())
            .or_default()
            .push(value.to_owned());
    }
    settings
}

fn setting(name: &str) -> String {
    let settings = unit();
    match settings.get(name).map(Vec::as_slice) {
        Some([value]) => value.clone(),
        found => panic!("{name} must be there once: {found:?}"),
    }
}

/// The system calls of a set, as this machine's systemd knows it.
fn system_calls(name: &str) -> BTreeSet<String> {
    if !name.starts_with('@') {
        return [name.to_owned()].into();
    }
    let done = Command::new("systemd-analyze")
        .args(["syscall-filter", "--no-pager", name])
        .output()
        .unwrap_or_else(|error| {
            panic!("this test needs systemd-analyze (Debian: apt-get install systemd): {error}")
        });
    assert!(
        done.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    let said = String::from_utf8(done.stdout).expect("text");
    let members = said.lines().skip(1).map(str::trim);
    members
        .filter(|member| !member.is_empty() && !member.starts_with('#'))
        .flat_map(system_calls)
        .collect()
}

/// Those that the unit allows: what is named is added, and taken away behind a tilde, line by line.
fn allowed() -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    for line in &unit()["SystemCallFilter"] {
        let (takes_away, names) = line
            .strip_prefix('~')
            .map_or((false, line.as_str()), |names| (true, names));
        for call in names.split(' ').flat_map(system_calls) {
            if takes_away {
                allowed.remove(&call);
            } else {
                allowed.insert(call);
            }
        }
    }
    allowed
}

/// Those that were made, of strace's table of counts.
fn made(table: &str) -> BTreeSet<String> {
    let rows = table
        .lines()
        .filter(|line| line.starts_with([' ', '1']) && !line.contains('-'));
    let names = rows.filter_map(|row| row.split_whitespace().last());
    names
        .filter(|name| !["syscall", "total"].contains(name))
        .map(str::to_owned)
        .collect()
}

/// Starts what the unit starts, under what it allows, and lists the system calls in a file of its state directory.
fn start(host: &Host, state: &Path) -> Running {
    let start = setting("ExecStart");
    let traced = [
        "strace",
        "--daemonize",
        "--follow-forks",
        "--summary-only",
        "--quiet=all",
        "--output=calls",
    ];
    let capabilities = setting("AmbientCapabilities");
    assert_eq!(setting("CapabilityBoundingSet"), capabilities);
    let [variable] = &unit()["Environment"][..] else {
        panic!("one variable")
    };
    let (variable, value) = variable.split_once('=').expect("NAME=value");
    // `auto` would go on without a probe, and say so where nobody looks.
    let environment = [
        (variable, value),
        ("GATEWAY_CAPTURE", "proxy+tap"),
        ("NO_COLOR", "1"),
    ];
    let (user, group) = USER.split_once(':').expect("user and group");
    let number = |text: &str| text.parse::<u32>().expect("a number");
    chown(state, Some(number(user)), Some(number(group))).expect("the tests run as root");
    let process = Process {
        words: traced
            .into_iter()
            .chain(start.split(' '))
            .map(str::to_owned)
            .collect(),
        environment: environment
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        user: USER.to_owned(),
        working_directory: setting("WorkingDirectory"),
        capabilities: capabilities
            .split(' ')
            .map(|name| name.trim_start_matches("CAP_").to_ascii_lowercase())
            .collect(),
    };
    host.spawn("gateway", &process)
}

fn simulator(host: &Host) -> Running {
    let process = Process {
        words: ["vllm-sim", "--listen=127.0.0.1:8000"]
            .map(str::to_owned)
            .to_vec(),
        user: USER.to_owned(),
        working_directory: "/".to_owned(),
        ..Process::default()
    };
    host.spawn("simulator", &process)
}

fn load(host: &Host) {
    let words = [
        "vllm-load",
        "--url=http://127.0.0.1:8080",
        "--model=sim",
        "--requests=20",
    ];
    let more = ["--endpoints=chat=1", "--no-progress"];
    let process = Process {
        words: words.into_iter().chain(more).map(str::to_owned).collect(),
        user: USER.to_owned(),
        working_directory: "/".to_owned(),
        ..Process::default()
    };
    host.run(&process).expect("all requests are answered");
}

#[test]
fn what_the_unit_allows_is_enough_for_proxy_probe_and_engine() {
    let scratch = scratch("unit");
    let state = scratch.join("state");
    fs::create_dir(&state).expect("a writable directory");
    let version = include_str!("../../gateway-user/src/store/embedded/libchdb.version").trim();
    let mounts = [
        (
            root().join("config.yaml"),
            "/etc/vllm-gateway/config.yaml".to_owned(),
        ),
        (state.clone(), format!("/var/lib/{}", setting("StateDirectory"))),
        (
            engine(),
            format!("/var/cache/vllm-gateway/libchdb/{version}/libchdb.so"),
        ),
    ];
    let programs = ["vllm-gateway", "vllm-sim", "vllm-load"].map(program);
    let host = Host::start(&scratch, &programs, &[], &mounts);
    let _simulator = simulator(&host);
    within_deadline("the simulator is up", || {
        host.page("http://127.0.0.1:8000/health", &[])
    });
    let mut gateway = start(&host, &state);
    within_deadline("the gateway is up", || {
        assert_eq!(
            gateway.has_ended(),
            None,
            "see {}",
            scratch.join("gateway.log").display()
        );
        host.page("http://127.0.0.1:9464/ready", &[])
    });
    load(&host);
    within_deadline(
        "the probe has seen the requests, and their rows are stored",
        || {
            let metrics = host.page("http://127.0.0.1:9464/metrics", &[])?;
            let at_least = |name: &str, least: f64| {
                let lines = metrics.lines().filter(|line| line.starts_with(name));
                let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
                values.sum::<f64>() >= least
            };
            let seen = at_least("gateway_tap_exchanges_total{", 20.0);
            let stored = at_least("gateway_store_rows_total{table=\"request_events\"", 20.0);
            (seen && stored).then_some(())
        },
    );
    gateway.terminate();
    let status = within_deadline("the gateway ends", || gateway.has_ended());
    assert!(is_clean(status), "{status}");
    let made = within_deadline("the system calls are listed", || {
        let table = fs::read_to_string(state.join("calls")).ok()?;
        table.contains("total").then(|| made(&table))
    });
    for call in ["bpf", "capset", "execve"] {
        assert!(
            made.contains(call),
            "{call} was not seen: is the list right? {made:?}"
        );
    }
    let refused: Vec<_> = made.difference(&allowed()).cloned().collect();
    assert!(
        refused.is_empty(),
        "the unit's SystemCallFilter= lets the gateway not make: {refused:?}"
    );
}

#[test]
fn the_unit_fits_the_configuration() {
    let config = config();
    let drain = seconds(string(&config, "/gateway/drain_timeout"));
    assert!(
        seconds(&setting("TimeoutStopSec")) >= drain + 10,
        "it is killed while it drains"
    );
    let connections = config["proxy"]["max_connections"].as_u64().expect("a number");
    let descriptors: u64 = setting("LimitNOFILE").parse().expect("a number");
    assert!(
        descriptors > 2 * connections + 1000,
        "{descriptors} for {connections} connections"
    );
    // The configuration's relative directories are in the one that can be written.
    assert_eq!(
        setting("WorkingDirectory"),
        format!("/var/lib/{}", setting("StateDirectory"))
    );
    for pointer in ["/spool/dir", "/store/embedded_dir"] {
        assert!(string(&config, pointer).starts_with("./"), "{pointer}");
    }
    assert_eq!(
        setting("KillMode"),
        "mixed",
        "the helper that holds the probe is needed while the gateway drains"
    );
    assert_eq!(
        setting("RestartPreventExitStatus"),
        "78",
        "that of a config that cannot be run with"
    );
}
