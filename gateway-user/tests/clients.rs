//! The official Python clients of OpenAI and Anthropic work through the gateway unmodified, and the events say what the clients saw.
//!
//! `clients.py` holds the checks; this runs it, with the versions of `clients.requirements.txt`, in a virtual environment that is made
//! once under the target directory. Without Python or the registry the test fails: to leave it out on purpose, set
//! `VLLM_GATEWAY_SKIP_PYTHON=1`.

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use support::{Sim, TestGateway};
use vllm_gateway::event::RequestEvent;

const SKIP: &str = "VLLM_GATEWAY_SKIP_PYTHON";

/// Fewest checks that `clients.py` must have made: if it ends early, that shows.
const CHECKS_MIN: usize = 18;

#[test]
fn official_clients_work_unmodified_and_are_recorded_as_they_saw_it() {
    if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
        eprintln!("not run: {SKIP}=1");
        return;
    }
    let python = environment();
    let chat = Sim::start(&["--model", "tiny", "--step-base-us", "2000"]);
    let embed = Sim::start(&["--model", "tiny-embed", "--kind", "embed"]);
    let gateway = TestGateway::before(chat.addr, Some(embed.addr), "");
    let strict = TestGateway::start(&format!(
        "upstreams:\n  - {{name: chat, url: \"http://{}\", serves: generate, models: [tiny]}}\n  \
         - {{name: dead, url: \"http://127.0.0.1:1\", serves: generate, models: [dead]}}\n",
        chat.addr
    ));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients.py");
    let mut command = Command::new(python);
    command.arg(script).args([gateway.url(), strict.url()]);
    // A proxy of the site is for the registry, not for this machine.
    for proxy in [
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ] {
        command.env_remove(proxy);
    }
    let printed = run(&mut command, "the checks of tests/clients.py");
    let checks = printed.lines().filter(|line| line.starts_with("ok ")).count();
    assert!(
        checks >= CHECKS_MIN && printed.ends_with(&format!("done {checks}\n")),
        "{printed}"
    );
    let expected = printed.lines().filter_map(|line| line.strip_prefix("event "));
    let expected: Vec<Value> = expected
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    eprintln!("{checks} checks, {} events expected", expected.len());
    assert_recorded(
        events_once_there_are(expected.len(), &gateway, &strict),
        &expected,
    );
}

/// The events of both gateways. The stream that was broken off last may still be ending.
fn events_once_there_are(count: usize, gateway: &TestGateway, strict: &TestGateway) -> Vec<RequestEvent> {
    let fewest = count - strict.events.now().len();
    let mut events = gateway.events.wait_for(fewest);
    events.extend(strict.events.now());
    events
}

/// Each expected event is there, and no other.
fn assert_recorded(events: Vec<RequestEvent>, expected: &[Value]) {
    let mut events: Vec<Value> = events
        .iter()
        .map(|event| serde_json::to_value(event).expect("a row"))
        .collect();
    for wanted in expected {
        let at = events.iter().position(|event| fits(event, wanted));
        let same_project = || {
            events
                .iter()
                .filter(|event| event["project"] == wanted["project"])
                .collect::<Vec<_>>()
        };
        let at = at.unwrap_or_else(|| {
            panic!(
                "no event fits\n{wanted}\nThose of the project:\n{:#?}",
                same_project()
            )
        });
        events.swap_remove(at);
    }
    assert!(events.is_empty(), "events that no client caused: {events:#?}");
}

fn fits(event: &Value, wanted: &Value) -> bool {
    wanted
        .as_object()
        .expect("an object")
        .iter()
        .all(|(field, wanted)| match field.strip_suffix("_between") {
            Some(field) => {
                let bound = |at: usize| wanted[at].as_u64().expect("a bound");
                event[field]
                    .as_u64()
                    .is_some_and(|value| (bound(0)..=bound(1)).contains(&value))
            }
            None => {
                assert!(event.get(field).is_some(), "an event has no field {field}");
                event[field] == *wanted
            }
        })
}

/// The interpreter of an environment with the pinned clients; made if it is not there or has other versions.
fn environment() -> PathBuf {
    let pins = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients.requirements.txt");
    let wanted = std::fs::read_to_string(&pins).expect("the pins");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the target directory");
    let folder = target.join("python-clients");
    let needs = |what: &str| {
        format!("{what} (this test needs python3 with venv, and its registry; {SKIP}=1 leaves it out)")
    };
    let (marker, python) = (folder.join("installed.txt"), folder.join("bin/python"));
    if std::fs::read_to_string(&marker).is_ok_and(|installed| installed == wanted) {
        return python;
    }
    run(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&folder),
        &needs("making a virtual environment"),
    );
    let install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--timeout",
        "30",
        "--retries",
        "2",
        "-r",
    ];
    run(
        Command::new(&python).args(install).arg(&pins),
        &needs("installing the clients"),
    );
    std::fs::write(&marker, wanted).expect("the target directory can be written");
    python
}

/// Runs a command to its end; its standard output.
fn run(command: &mut Command, what: &str) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{what}: {command:?} could not be started: {error}"));
    let Output {
        status,
        stdout,
        stderr,
    } = output;
    let stdout = String::from_utf8(stdout).expect("text");
    assert!(
        status.success(),
        "{what}: {status}\n{stdout}\n{}",
        String::from_utf8_lossy(&stderr)
    );
    stdout
}
