//! `cargo xtask test`: everything that must hold before a change is merged, from a fresh clone on.
//!
//! The tests run last and nothing is printed after them, so that the last line is their own result.

use std::path::Path;

use anyhow::Result;

use crate::stage::{self, Stages};
use crate::{clickhouse, dashboards, guest, packaging, power_cut, test_kernels, tools};

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
    let tests = ["test", "--workspace", "--locked", "--lib", "--bins", "--tests"];
    stages.command("build tests", &mut cargo(&[&tests[..], &["--no-run"]].concat()))?;
    // Before the others, and not with them: else the last line would be the result of the documentation's examples.
    stages.command(
        "doc tests",
        &mut cargo(&["test", "--workspace", "--locked", "--doc"]),
    )?;
    let kernels = guest::kernels()?;
    if let Some(oldest) = kernels.first() {
        stages.time("kernels", || test_kernels::on(&kernels, root))?;
        stages.time("power cut", || power_cut::with(oldest, root))?;
    }
    println!("\n{stages}\n── tests (their seconds are in their own results)");
    stage::run(&mut cargo(&tests))
}
