//! What is packaged, as the programs that it is for understand it.
#![allow(dead_code, reason = "no test uses all of it")]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

pub const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask stands in the workspace")
}

pub fn text(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// YAML as JSON, which has one way to be looked into.
pub fn yaml(text: &str) -> Value {
    serde_yaml::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

/// Several documents.
pub fn documents(text: &str) -> Vec<Value> {
    let of_document = |document| serde::Deserialize::deserialize(document).expect("YAML");
    let all = serde_yaml::Deserializer::from_str(text).map(of_document);
    all.filter(|document: &Value| !document.is_null()).collect()
}

pub fn string<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("no text at {pointer} of {value}"))
}

pub fn list<'v>(value: &'v Value, pointer: &str) -> &'v [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// Texts of a list.
pub fn words(value: &Value, pointer: &str) -> Vec<String> {
    list(value, pointer)
        .iter()
        .map(|word| word.as_str().expect("text").to_owned())
        .collect()
}

/// A program that was built with the tests of all packages.
pub fn program(name: &str) -> PathBuf {
    let directory = Path::new(XTASK).parent().expect("xtask stands in a directory");
    let program = directory.join(name);
    assert!(
        program.exists(),
        "{} is missing: cargo build --package gateway-user --bins",
        program.display()
    );
    program
}

/// What `vllm-gateway check-config` says of a file, with these variables and no others.
pub fn check_config(file: &Path, environment: &BTreeMap<String, String>) -> Output {
    Command::new(program("vllm-gateway"))
        .args(["check-config", "--config"])
        .arg(file)
        .env_clear()
        .envs(environment)
        .output()
        .expect("vllm-gateway starts")
}

/// The shipped configuration.
pub fn config() -> Value {
    yaml(&text("config.yaml"))
}

/// Checks what is packaged, and returns the directory with what Compose and Helm made of it. Each test has its own, since tests run at one time.
pub fn understood(test: &str, environment: &[(&str, &str)]) -> PathBuf {
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("packaging-{test}"));
    let done = Command::new(XTASK)
        .args(["check-packaging", "--output"])
        .arg(&output)
        .envs(environment.iter().copied())
        .output()
        .expect("xtask starts");
    assert!(
        done.status.success(),
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    output
}

/// One stage of the Dockerfile, with what it has from the stage before.
#[derive(Clone, Debug, Default)]
pub struct Stage {
    pub environment: BTreeMap<String, String>,
    pub user: String,
    pub working_directory: String,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub health_check: Vec<String>,
    pub ports: Vec<u16>,
    /// What is copied into it: sources in the repository or another stage, and where to.
    pub copies: Vec<(Vec<String>, String)>,
}

/// The stages of the Dockerfile by name. It knows the instructions that this Dockerfile has, in the form that it has them in.
pub fn stages() -> BTreeMap<String, Stage> {
    let mut stages = BTreeMap::new();
    let mut current = String::new();
    for line in instructions(&text("Dockerfile")) {
        let (instruction, rest) = line.split_once(' ').expect("an instruction has arguments");
        if instruction == "FROM" {
            let (base, name) = rest.split_once(" AS ").expect("each stage has a name");
            current = name.to_owned();
            let stage: Stage = stages.get(base).cloned().unwrap_or_default();
            stages.insert(current.clone(), stage);
            continue;
        }
        let Some(stage) = stages.get_mut(&current) else {
            assert_eq!(instruction, "ARG", "nothing else stands before the first stage");
            continue;
        };
        match instruction {
            "ENV" => stage.environment.extend([pair(rest)]),
            "USER" => rest.clone_into(&mut stage.user),
            "WORKDIR" => rest.clone_into(&mut stage.working_directory),
            "ENTRYPOINT" => stage.entrypoint = words(&yaml(rest), ""),
            "CMD" => stage.command = words(&yaml(rest), ""),
            "HEALTHCHECK" => {
                let (_, command) = rest.split_once("CMD ").expect("it has a command");
                stage.health_check = words(&yaml(command), "");
            }
            "EXPOSE" => stage
                .ports
                .extend(rest.split(' ').map(|port| port.parse::<u16>().expect("a port"))),
            "COPY" => {
                let mut words: Vec<_> = rest.split_whitespace().map(str::to_owned).collect();
                words.retain(|word| !word.starts_with("--"));
                let target = words.pop().expect("a target");
                stage.copies.push((words, target));
            }
            "RUN" => {}
            _ => panic!("{instruction}: this test does not know it"),
        }
    }
    stages
}

/// The instructions, each on one line.
fn instructions(dockerfile: &str) -> Vec<String> {
    let lines = dockerfile
        .lines()
        .filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty());
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    joined.lines().map(str::to_owned).collect()
}

fn pair(text: &str) -> (String, String) {
    let (name, value) = text.split_once('=').expect("NAME=value");
    (name.to_owned(), value.to_owned())
}

/// Seconds of a time such as `45s`.
pub fn seconds(time: &str) -> u64 {
    let number = time
        .strip_suffix('s')
        .unwrap_or_else(|| panic!("{time}: in seconds"));
    number.parse().unwrap_or_else(|_| panic!("{time}: in seconds"))
}

/// ClickHouse's engine, which `cargo xtask get-clickhouse` fetches.
pub fn engine() -> PathBuf {
    let version = include_str!("../../../gateway-user/src/store/embedded/libchdb.version").trim();
    let cache = env::var_os("XDG_CACHE_HOME").map_or_else(
        || Path::new(&env::var_os("HOME").expect("a home")).join(".cache"),
        PathBuf::from,
    );
    let library = cache.join(format!("vllm-gateway/libchdb/{version}/libchdb.so"));
    assert!(
        library.exists(),
        "cargo xtask get-clickhouse: {}",
        library.display()
    );
    library
}

/// A directory that holds nothing of an earlier run.
pub fn scratch(test: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("a writable directory");
    directory
}
