//! `cargo xtask test`: everything that must hold before a change is merged, from a fresh clone on.
//!
//! The tests run last and nothing is printed after them, so that the last line is their own result.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::beside::Beside;
use crate::check_targets::{self, Compiler};
use crate::stage::{self, Stages};
use crate::{clickhouse, dashboards, guest, packaging, power_cut, test_kernels, tools};

/// Integration tests that take a minute and more, in which they mostly wait: for something to give up, or to be noticed. Each has programs, ports and a
/// store of its own. Not among them is `bill_live`, which waits as long: it compares times to some per cent, and was seen to fail on a machine
/// that did much else.
const WAITING: [&str; 2] = ["store_faults", "dashboards_live"];

/// Runs the test of a bill in real time for so many minutes.
///
/// # Errors
/// When it fails, or what it needs cannot be had.
pub fn bill(root: &Path, minutes: u64) -> Result<()> {
    clickhouse::get()?;
    let mut command = stage::cargo(root);
    command.args([
        "test",
        "--locked",
        "--package",
        "gateway-user",
        "--test",
        "bill_live",
        "--",
        "--nocapture",
    ]);
    stage::run(command.env("VLLM_GATEWAY_BILL_SECONDS", (60 * minutes).to_string()))
}

/// Runs all stages in the workspace at `root`.
///
/// # Errors
/// At the first stage that fails.
pub fn run(root: &Path) -> Result<()> {
    let cargo = |arguments: &[&str]| {
        let mut command = stage::cargo(root);
        command.args(arguments);
        command
    };
    let mut stages = Stages::default();
    stages.time("tools", || tools::ensure_installed(&tools::FOR_TESTS))?;
    // Now, since what is installed beside something else would have to take turns with it.
    let compiler = stages.time("compilers", Compiler::find)?;
    stages.time("clickhouse", clickhouse::get)?;
    stages.time("dashboards", || dashboards::check(root))?;
    stages.time("packaging", || {
        packaging::check(root, &packaging::Options::default())
    })?;
    stages.command("format", &mut cargo(&["fmt", "--all", "--check"]))?;
    let clippy = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ];
    stages.command("clippy", &mut cargo(&clippy))?;
    let doc = ["doc", "--workspace", "--no-deps", "--locked"];
    stages.command("doc", cargo(&doc).env("RUSTDOCFLAGS", "-Dwarnings"))?;
    let build = [
        "test",
        "--workspace",
        "--locked",
        "--lib",
        "--bins",
        "--tests",
        "--no-run",
    ];
    stages.command("build tests", &mut cargo(&build))?;
    // Before the others, and not with them: else the last line would be the result of the documentation's examples.
    stages.command(
        "doc tests",
        &mut cargo(&["test", "--workspace", "--locked", "--doc"]),
    )?;
    // A guest has one processor, and tests that wait take none: this takes what they leave.
    let targets = Beside::start("other targets", &mut check_targets::command(compiler, root)?)?.behind();
    let kernels = guest::kernels()?;
    if let Some(oldest) = kernels.first() {
        stages.time("kernels", || test_kernels::on(&kernels, root))?;
        stages.time("power cut", || power_cut::with(oldest, root))?;
    }
    let others = wait_together(root, &mut stages)?;
    targets.finish(&mut stages)?;
    println!("\n{stages}\n── tests (their seconds are in their own results)");
    let rest = ["test", "--workspace", "--locked", "--lib", "--bins"];
    stage::run(cargo(&rest).args(others.iter().flat_map(|name| ["--test", name])))
}

/// Runs the tests that mostly wait, all at once, and returns the names of the others.
fn wait_together(root: &Path, stages: &mut Stages) -> Result<Vec<String>> {
    let mut others = integration_tests(root)?;
    let mut running = Vec::new();
    for name in WAITING {
        let before = others.len();
        others.retain(|other| other != name);
        ensure!(others.len() < before, "there is no integration test `{name}`");
        let mut command = stage::cargo(root);
        // With the features of the whole workspace, as it was built.
        command.args(["test", "--workspace", "--locked", "--test", name]);
        running.push(Beside::start(name, &mut command)?);
    }
    for test in running {
        test.finish(stages)?;
    }
    Ok(others)
}

/// The names of all integration tests of the workspace.
fn integration_tests(root: &Path) -> Result<Vec<String>> {
    let mut metadata = stage::cargo(root);
    metadata.args(["metadata", "--no-deps", "--locked", "--format-version", "1"]);
    let output = metadata
        .output()
        .with_context(|| format!("cannot start {metadata:?}"))?;
    ensure!(
        output.status.success(),
        "{metadata:?} ended with {}:\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(tests_in(&serde_json::from_slice(&output.stdout)?))
}

fn tests_in(metadata: &Value) -> Vec<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages = list(&metadata["packages"]);
    let targets = packages.iter().flat_map(|package| list(&package["targets"]));
    let tests = targets.filter(|target| target["kind"][0] == "test");
    tests
        .filter_map(|target| target["name"].as_str().map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_integration_test_is_found_and_those_that_wait_are_among_them() {
        let found = integration_tests(crate::workspace_root().expect("a workspace")).expect("cargo");
        for name in ["attribution", "scripts"].iter().chain(&WAITING) {
            assert_eq!(
                found.iter().filter(|test| test == name).count(),
                1,
                "{name}: {found:?}"
            );
        }
        let mut files = 0;
        for package in ["gateway-user", "gateway-common", "xtask"] {
            let directory = crate::workspace_root()
                .expect("a workspace")
                .join(package)
                .join("tests");
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            files += entries
                .filter(|entry| entry.path().extension().is_some_and(|end| end == "rs"))
                .count();
        }
        assert_eq!(found.len(), files);
    }
}
