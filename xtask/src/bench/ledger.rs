//! What the ledger costs, and how good its shares are. Both are examples of the gateway's own package, since only that knows the code in question.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::build_release;
use super::scratch::Scratch;
use crate::stage;

/// What can be chosen of the costs.
#[derive(Debug, clap::Args)]
pub struct CostOptions {
    /// Pairs of measurements, with segments and without.
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// What can be chosen of the trials.
#[derive(Debug, clap::Args)]
pub struct TrialOptions {
    /// What all loads follow from.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Seconds of each load, in virtual time.
    #[arg(long, default_value_t = 900, value_parser = clap::value_parser!(u64).range(60..=36_000))]
    seconds: u64,
}

/// CPU of a request for the ledger's sake, and time to compute a window.
///
/// # Errors
/// When it cannot be built or does not run through.
pub fn cost(root: &Path, options: &CostOptions) -> Result<()> {
    build_release(root, &["--example", "ledger_cost"])?;
    let scratch = Scratch::new()?;
    // Nobody listens there, so that nothing is sent: the spool alone is on the way of a request.
    let config = scratch.path().join("config.yaml");
    let spool = scratch.path().join("spool");
    let text = format!(
        "spool: {{dir: \"{}\"}}\nstore: {{url: \"http://127.0.0.1:9\"}}\n",
        spool.display()
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let mut command = Command::new(root.join("target/release/examples/ledger_cost"));
    command.arg("--config").arg(&config);
    stage::run(command.args(["--rounds", &options.rounds.to_string()]))
}

/// Shares of cost beside what teams took of an engine, in virtual time.
///
/// # Errors
/// When it cannot be built or does not run through.
pub fn allocation(root: &Path, options: &TrialOptions) -> Result<()> {
    build_release(root, &["--example", "allocation"])?;
    let mut command = Command::new(root.join("target/release/examples/allocation"));
    stage::run(command.args([
        "--seed",
        &options.seed.to_string(),
        "--seconds",
        &options.seconds.to_string(),
    ]))
}
