//! The program as an operator starts it: what it says, and how it exits, when it cannot run.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

/// `EX_CONFIG` of sysexits: a supervisor can tell that starting again will not help.
const EXIT_CONFIG: i32 = 78;

/// Runs the gateway with this configuration, which it must refuse by itself.
fn run(name: &str, yaml: &str) -> (Output, String) {
    let directory = std::env::temp_dir().join(format!("vllm-gateway-program-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory for the test");
    let path = directory.join("config.yaml");
    let mut file = std::fs::File::create(&path).expect("a file for the test");
    file.write_all(yaml.as_bytes()).expect("room for it");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"));
    command
        .args(["run", "--config"])
        .arg(&path)
        // What it makes before it gives up goes with the directory.
        .current_dir(&directory)
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null());
    let output = command.output().expect("the program starts");
    std::fs::remove_dir_all(&directory).expect("it was made above");
    let message = String::from_utf8(output.stderr.clone()).expect("text");
    (output, message)
}

#[test]
fn a_config_that_is_wrong_exits_78_with_one_message_that_names_the_line() {
    let (output, message) = run("wrong", "gateway:\n  listen: 127.0.0.1:0\n  lisden: x\n");
    assert_eq!(output.status.code(), Some(EXIT_CONFIG), "{message}");
    assert!(output.stdout.is_empty());
    assert_eq!(message.matches("lisden").count(), 1, "said once: {message}");
    assert!(message.contains("config.yaml:3"), "{message}");
    assert!(!message.contains("panicked"), "{message}");
}

#[test]
fn a_file_that_is_not_there_exits_78_and_is_named() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"));
    let output = command
        .args(["run", "--config", "/nowhere/config.yaml"])
        .output()
        .expect("the program starts");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(EXIT_CONFIG), "{message}");
    assert!(message.contains("/nowhere/config.yaml"), "{message}");
}

#[test]
fn a_port_that_is_taken_is_named_with_the_setting_that_changes_it() {
    let holder = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let addr = holder.local_addr().expect("an address");
    for (yaml, setting) in [
        (
            format!("gateway: {{listen: \"{addr}\"}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n"),
            "gateway.listen",
        ),
        (
            format!("gateway: {{listen: \"127.0.0.1:0\"}}\nadmin: {{listen: \"{addr}\"}}\n"),
            "admin.listen",
        ),
    ] {
        let (output, message) = run(setting, &yaml);
        assert!(!output.status.success(), "{message}");
        assert!(
            message.contains(&addr.to_string()) && message.contains(setting),
            "{message}"
        );
        assert!(message.contains("is in use by"), "{message}");
        assert!(!message.contains("panicked"), "{message}");
    }
}
