//! A gateway's store under `kill -9`: whatever was said to be kept is there afterwards, once.
//!
//! The test starts itself as the process that is killed. That one begins and ends requests on several threads, says on standard output
//! what it was promised (`begun ID`, `kept ID`), and plays the sender: it takes batches away into another directory and acknowledges
//! them. It is killed at a random moment, also in the middle of the recovery from the last kill.

use rand::Rng;
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use vllm_gateway::config::{ByteSize, Fsync, SpoolConfig};
use vllm_gateway::event::{Begin, CapturedBy, Context, EventSink, RequestEvent};
use vllm_gateway::store::Store;
use vllm_gateway::wire::At;
use vllm_gateway::wire::exchange::{Ending, Facts};

const CHILD: &str = "STORE_KILL_CHILD";
const ROUNDS: u32 = 20;
const THREADS: u32 = 3;
/// How long a child may take until its first request begins.
const BEGIN_DEADLINE: Duration = Duration::from_secs(60);
/// A child that nobody kills ends by itself after so many requests a thread.
const REQUESTS_MAX: u32 = 200_000;

#[test]
fn what_was_kept_is_found_once_after_a_kill() {
    if let Some(round) = std::env::var_os(CHILD) {
        let (round, dir) = (
            round.into_string().expect("a number"),
            std::env::var_os("STORE_KILL_DIR"),
        );
        return child(&round, Path::new(&dir.expect("a directory")));
    }
    let dir = std::env::temp_dir().join(format!("vllm-gateway-store-kill-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("delivered")).expect("a directory");
    let (mut begun, mut kept) = (HashSet::new(), HashSet::new());
    for round in 0..ROUNDS {
        for line in killed_child(round, &dir) {
            match line.split_once(' ') {
                Some(("begun", id)) => drop(begun.insert(id.to_owned())),
                Some(("kept", id)) => drop(kept.insert(id.to_owned())),
                // The test runner's own lines.
                _ => {}
            }
        }
    }
    let found = outcomes_on_disk(&dir);
    for id in &kept {
        assert_eq!(
            found.get(id).map(Vec::as_slice),
            Some(&["refused".to_owned()][..]),
            "{id} was kept"
        );
    }
    for id in &begun {
        assert_eq!(found.get(id).map(Vec::len), Some(1), "{id} had begun");
    }
    let crashed = found
        .values()
        .flatten()
        .filter(|outcome| *outcome == "gateway_crash")
        .count();
    assert!(
        kept.len() > ROUNDS as usize && crashed > 0,
        "{} kept, {crashed} crashed: too few to tell",
        kept.len()
    );
    eprintln!(
        "{} begun, {} kept, {crashed} crashed, {} rows in all",
        begun.len(),
        kept.len(),
        found.len()
    );
    std::fs::remove_dir_all(&dir).expect("it was ours");
}

/// Runs a child and kills it. Returns what it said; a last line that was cut is left out.
fn killed_child(round: u32, dir: &Path) -> Vec<String> {
    let program = std::env::current_exe().expect("it runs");
    let mut child = Command::new(program)
        .args([
            "what_was_kept_is_found_once_after_a_kill",
            "--exact",
            "--nocapture",
        ])
        .env(CHILD, round.to_string())
        .env("STORE_KILL_DIR", dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let patience = Duration::from_micros(rand::rng().random_range(2_000..150_000));
    let (begin, begun) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let (mut lines, mut line) = (Vec::new(), String::new());
        while stdout.read_line(&mut line).is_ok_and(|read| read > 0) {
            if line.starts_with("begun ") {
                // Only the first is waited for, if any is.
                let _ = begin.send(());
            }
            lines.extend(line.strip_suffix('\n').map(str::to_owned));
            line.clear();
        }
        lines
    });
    // Every other child is killed while requests are on their way, however slow the machine; the others maybe while they start.
    if round % 2 == 1 {
        begun
            .recv_timeout(BEGIN_DEADLINE)
            .expect("requests begin in time");
    }
    // Not a wait for something to happen: the moment of the kill is what is tried out.
    std::thread::park_timeout(patience);
    child.kill().expect("it can be killed");
    child.wait().expect("it is dead");
    reader.join().expect("it has read everything")
}

/// The outcomes under which each request is booked: in what was taken away, and in what a last recovery finds.
fn outcomes_on_disk(dir: &Path) -> HashMap<String, Vec<String>> {
    let store = Store::open(&config(dir), "gw").expect("it recovers");
    assert_eq!(
        store.spool().stats().torn,
        0,
        "what this process reads, the killed one has written in full or not at all"
    );
    // A batch that was taken away and not acknowledged in time is the same batch.
    let mut batches: HashMap<String, PathBuf> = HashMap::new();
    for batch in store.spool().sealed(usize::MAX) {
        batches.insert(
            batch
                .path
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned(),
            batch.path.clone(),
        );
    }
    for entry in std::fs::read_dir(dir.join("delivered")).expect("it is there") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|kind| kind == "jsonl") {
            batches.insert(
                path.file_name().expect("a name").to_string_lossy().into_owned(),
                path,
            );
        }
    }
    let mut outcomes: HashMap<String, Vec<String>> = HashMap::new();
    for path in batches.values() {
        for line in std::fs::read_to_string(path).expect("it is there").lines() {
            let row: serde_json::Value = serde_json::from_str(line).expect("a JSON object");
            let text = |key: &str| row[key].as_str().expect("a text").to_owned();
            outcomes
                .entry(text("event_id"))
                .or_default()
                .push(text("outcome"));
        }
    }
    outcomes
}

fn config(dir: &Path) -> SpoolConfig {
    SpoolConfig {
        dir: dir.join("spool"),
        segment_bytes: ByteSize::from_kib(64),
        seal_after: Duration::from_millis(20),
        fsync: Fsync::Off,
        ..SpoolConfig::default()
    }
}

fn child(round: &str, dir: &Path) {
    let store = Arc::new(Store::open(&config(dir), "gw").expect("it opens"));
    // Ends with the process.
    drop(std::thread::spawn({
        let (store, to) = (Arc::clone(&store), dir.join("delivered"));
        move || deliver(&store, &to)
    }));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let store = &store;
            scope.spawn(move || {
                // The request of before stays on its way while the next one begins, so that a kill always meets some.
                let mut under_way = None;
                for number in 0..REQUESTS_MAX {
                    let id = format!("gw-{round}-{thread}-{number}");
                    store.began(&begin(&id));
                    say("begun", &id);
                    if let Some(id) = under_way.replace(id) {
                        drop(store.keep(&ended(&id)).expect("there is room"));
                        say("kept", &id);
                    }
                }
            });
        }
    });
}

/// Takes batches away as a sender does: first they are whole elsewhere, then they are acknowledged.
fn deliver(store: &Store, to: &Path) {
    loop {
        // Some are left lying, so that there is always something to recover.
        for batch in store
            .spool()
            .sealed(usize::MAX)
            .iter()
            .filter(|batch| batch.id.sequence % 3 != 0)
        {
            let (tmp, whole) = (
                to.join("unfinished"),
                to.join(batch.path.file_name().expect("a name")),
            );
            std::fs::copy(&batch.path, &tmp).expect("a copy");
            std::fs::rename(&tmp, &whole).expect("it is moved");
            store.spool().acknowledge(batch).expect("it is deleted");
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// One write for each line, so that a line is either there or not.
fn say(what: &str, id: &str) {
    std::io::stdout()
        .write_all(format!("{what} {id}\n").as_bytes())
        .expect("somebody listens");
}

fn begin(event_id: &str) -> Begin<'_> {
    Begin {
        event_id,
        started_at_us: 1_700_000_000_000_000,
        gateway_id: "gw",
        capture: CapturedBy::Proxy,
        team_id: "team-a",
        project: None,
        user_id: None,
        endpoint: "/v1/chat/completions",
        request_id: "r",
        trace_id: None,
        upstream: None,
        model: None,
    }
}

fn ended(event_id: &str) -> RequestEvent {
    let context = Context {
        event_id: event_id.into(),
        started_at_us: 1_700_000_000_000_000,
        gateway_id: "gw".into(),
        team: Some("team-a".into()),
        project: None,
        user: None,
        upstream: None,
        request_id: "r".into(),
        trace_id: None,
        status: None,
        error_type: None,
        gateway_overhead_us: None,
        tap: None,
    };
    RequestEvent::new(
        context,
        Facts::unread(At(0), At(1), Ending::Refused),
        CapturedBy::Proxy,
    )
}
