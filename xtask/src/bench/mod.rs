//! `cargo xtask bench`: what takes too long, and depends too much on the machine, to be a test.

mod contender;
mod ledger;
mod load;
pub mod process;
mod proxy;
mod report;
pub mod scratch;
mod store;
mod tap;

use std::path::Path;

use anyhow::Result;
use clap::Subcommand;

use crate::stage;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// What the gateway costs in the path: CPU for a request and for a streamed chunk, beside nginx as a plain reverse proxy.
    Proxy(proxy::Options),
    /// What storing costs: events a second through spool and insert, memory under load, and latency without ClickHouse.
    Store(store::Options),
    /// How good the ledger's shares are, beside what teams really take of an engine, and what its estimates of waits do to them.
    Allocation(ledger::TrialOptions),
    /// What the ledger costs: CPU for a request, and time to compute a window.
    Ledger(ledger::CostOptions),
    /// What the kernel tap costs: a server whose port it watches, and itself for a record; and whether it loses any.
    Tap(tap::Options),
}

/// Measures in the workspace at `root`.
///
/// # Errors
/// When something cannot be built, installed or started, or when a load did not go through whole.
pub fn run(root: &Path, bench: &Bench) -> Result<()> {
    match bench {
        Bench::Proxy(options) => proxy::run(root, options),
        Bench::Store(options) => store::run(root, options),
        Bench::Allocation(options) => ledger::allocation(root, options),
        Bench::Ledger(options) => ledger::cost(root, options),
        Bench::Tap(options) => tap::run(root, options),
    }
}

/// Builds the optimised programs; `more` names what else of that package.
fn build_release(root: &Path, more: &[&str]) -> Result<()> {
    let mut command = stage::cargo(root);
    command.args([
        "build",
        "--locked",
        "--release",
        "--package",
        "gateway-user",
        "--bins",
    ]);
    stage::run(command.args(more))
}
