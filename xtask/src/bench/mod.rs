//! `cargo xtask bench`: what takes too long, and depends too much on the machine, to be a test.

mod contender;
mod load;
pub mod process;
mod proxy;
mod report;

use std::path::Path;

use anyhow::Result;
use clap::Subcommand;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// What the gateway costs in the path: CPU for a request and for a streamed chunk, beside nginx as a plain reverse proxy.
    Proxy(proxy::Options),
}

/// Measures in the workspace at `root`.
///
/// # Errors
/// When something cannot be built, installed or started, or when a load did not go through whole.
pub fn run(root: &Path, bench: &Bench) -> Result<()> {
    match bench {
        Bench::Proxy(options) => proxy::run(root, options),
    }
}
