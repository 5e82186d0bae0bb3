//! `cargo xtask check-packaging`: what people are given to run the gateway with, held against the programs that will read it.
//!
//! | what | is read by |
//! |---|---|
//! | `Dockerfile` | hadolint |
//! | `docker-compose.yml` | Docker Compose itself, which needs no engine to read it |
//! | `packaging/helm/` | Helm, for each set of values; then Kubernetes' schemas and the Prometheus operator's types |
//! | `packaging/systemd/` | `systemd-analyze`, which also rates how much the unit leaves open |
//!
//! What they made of it is left in a directory, for tests that go on from there. Nothing is started here, and nothing is asked of a cluster or an
//! engine: an image cannot be built here.

mod chart;
mod checkers;
mod unit;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::dev;
use crate::stage::run;
use checkers::Checkers;

/// Options of `cargo xtask check-packaging`.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Where to leave what Compose and Helm made of the files. Default: `check-packaging` in Cargo's target directory.
    #[arg(long, value_name = "DIRECTORY")]
    output: Option<PathBuf>,
}

/// Checks everything in the repository at `root`.
///
/// # Errors
/// At the first file that is not what its reader takes, which says why; or when a checker cannot be had.
pub fn check(root: &Path, options: &Options) -> Result<()> {
    if !Checkers::exist_here() {
        println!("packaging is not checked here: its checkers are for Linux on x86-64");
        return Ok(());
    }
    let output = match &options.output {
        Some(output) => output.clone(),
        None => dev::target_directory()?.join("check-packaging"),
    };
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let checkers = Checkers::fetched(root)?;
    run(checkers.hadolint().arg(root.join("Dockerfile")))
        .context("hadolint finds fault with the Dockerfile")?;
    compose(root, &checkers, &output)?;
    let charts = chart::check(root, &checkers, &output)?;
    unit::check(root)?;
    println!("packaging is as its readers want it: Dockerfile, Compose, {charts} sets of values, systemd");
    Ok(())
}

/// Lets Compose read the file, and leaves what it understood in `compose.json`, with the services of all profiles.
fn compose(root: &Path, checkers: &Checkers, output: &Path) -> Result<()> {
    let mut command = checkers.compose();
    command
        .current_dir(root)
        // What a developer has in `.env` is not what is shipped.
        .args([
            "--env-file",
            "/dev/null",
            "--profile",
            "*",
            "config",
            "--format",
            "json",
        ]);
    let done = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !done.status.success() {
        bail!(
            "Compose refuses docker-compose.yml:\n{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
    let path = output.join("compose.json");
    fs::write(&path, done.stdout).with_context(|| format!("cannot write {}", path.display()))
}
