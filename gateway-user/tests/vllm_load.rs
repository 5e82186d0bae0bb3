//! `vllm-load` as a program: its exit codes and its files.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;

use serde_json::Value;

const ANSWER: &str = r#"{"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#;

/// A server for unstreamed requests; it ends with the test's process.
fn serve() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        listener
            .incoming()
            .flatten()
            .for_each(|socket| drop(thread::spawn(|| answer_all(socket))))
    });
    address
}

fn answer_all(mut socket: TcpStream) {
    let response = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{ANSWER}",
        ANSWER.len()
    );
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = socket.read(&mut buffer) {
        seen.extend_from_slice(&buffer[..read]);
        // An unstreamed completion's body has one closing brace, at its end.
        if seen.ends_with(b"}") {
            seen.clear();
            let _ = socket.write_all(response.as_bytes());
        }
    }
}

fn load(address: SocketAddr, more: &[&str]) -> Output {
    let url = format!("http://{address}");
    let base = [
        "--url",
        &url,
        "--model",
        "m",
        "--requests",
        "40",
        "--endpoints",
        "completions",
        "--stream-fraction",
        "0",
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-load"));
    command.args(base).args(more).output().expect("vllm-load starts")
}

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("vllm-load-{}-{name}", std::process::id()))
}

#[test]
fn a_run_ends_well_and_its_files_agree() {
    let (summary_path, records_path) = (temporary("summary.json"), temporary("records.jsonl"));
    let paths = [&summary_path, &records_path].map(|path| path.to_str().expect("UTF-8"));
    let output = load(
        serve(),
        &[
            "--json",
            paths[0],
            "--records",
            paths[1],
            "--teams",
            "2",
            "--seed",
            "9",
        ],
    );
    assert!(output.status.success(), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("40 ok"),
        "{output:?}"
    );

    let read = |path: &PathBuf| std::fs::read_to_string(path).expect("a file");
    let summary: Value = serde_json::from_str(&read(&summary_path)).expect("a summary");
    let records = read(&records_path);
    let records: Vec<Value> = records
        .lines()
        .map(|line| serde_json::from_str(line).expect("a record"))
        .collect();
    for path in [summary_path, records_path] {
        std::fs::remove_file(path).expect("a file to remove");
    }
    let ids: BTreeSet<_> = records
        .iter()
        .map(|record| record["request_id"].as_str().expect("an id"))
        .collect();
    assert!((0..40).all(|index| ids.contains(format!("load-9-{index}").as_str())) && records.len() == 40);
    assert_eq!((&summary["sent"], &summary["ok"]), (&40.into(), &40.into()));
    for team in ["team-1", "team-2"] {
        let of_team = records.iter().filter(|record| record["team"] == team).count();
        assert_eq!(summary["by_team"][team]["requests"], of_team);
        assert_eq!(summary["by_team"][team]["completion_tokens"], of_team * 2);
    }
}

#[test]
fn a_run_against_nobody_fails_and_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    drop(listener);
    let output = load(address, &[]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        message.contains(&format!("cannot connect to {address}")),
        "{message}"
    );
}
