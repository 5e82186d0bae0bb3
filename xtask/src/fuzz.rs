//! `cargo xtask fuzz`: random and mutated bytes against whatever reads the network. Outside `cargo xtask test`: it needs a nightly compiler, and
//! it is never done.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use clap::Args;

use crate::stage::run as run_command;

/// Every target, one file each in `fuzz/fuzz_targets/`.
const TARGETS: [&str; 4] = ["connection", "cuts", "inject", "segments"];

/// Real traffic to start from.
const CAPTURES: &str = "gateway-user/tests/fixtures/vllm-0.32.0";

/// What to fuzz.
#[derive(Debug, Args)]
pub struct Options {
    /// One target; without it all of them, one after the other.
    target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Runs the targets in the workspace at `root`.
///
/// # Errors
/// When a target finds something, or cannot be built.
pub fn run(root: &Path, options: &Options) -> Result<()> {
    let chosen: Vec<&str> = match &options.target {
        Some(name) => TARGETS.into_iter().filter(|target| target == name).collect(),
        None => TARGETS.to_vec(),
    };
    ensure!(
        !chosen.is_empty(),
        "expected one of {TARGETS:?}, found {:?}",
        options.target
    );
    let installed = Command::new("cargo")
        .args(["fuzz", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if !installed.success() {
        run_command(Command::new("cargo").args(["install", "cargo-fuzz", "--locked"]))?;
    }
    for target in chosen {
        let corpus = root.join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&corpus)?;
        let limit = format!("-max_total_time={}", options.seconds);
        let mut fuzz = Command::new("cargo");
        fuzz.current_dir(root)
            .args(["+nightly", "fuzz", "run", target])
            .arg(&corpus)
            .arg(root.join(CAPTURES));
        run_command(fuzz.args(["--", &limit]))?;
    }
    Ok(())
}
