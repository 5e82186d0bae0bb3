//! `cargo xtask dist`: what is released. For each target an archive with the programs and what it takes to run them, and one file of digests.
//!
//! Two builds, since one cannot be both: the static one (musl) runs on every Linux and in an empty image, and cannot load ClickHouse's engine; the one
//! for glibc has the embedded ClickHouse, and runs where glibc is no older than here. The kernel probe is compiled into either.
//!
//! **Held**: each archive is tried before it is called done: its programs serve a request, from an unpacked copy. The same programs make the same
//! archive: sorted, with the commit's time and no owner. **Left out**: that two machines make the same programs, for which they would have to have the same compiler and linker.

mod archive;
mod build;
mod trial;

use std::env::consts;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{dev, digest};
use build::Target;

/// What is built: all programs of the package.
pub const PROGRAMS: [&str; 3] = ["vllm-gateway", "vllm-sim", "vllm-load"];

/// Options of `cargo xtask dist`.
#[derive(Debug, Args)]
pub struct Options {
    /// What to build for: musl (static), gnu (with the embedded ClickHouse), or a target as Rust names it. Repeatable. Default: both of this machine.
    #[arg(long = "target", value_name = "TARGET")]
    targets: Vec<String>,
}

/// Builds, packs and tries everything in the repository at `root`.
///
/// # Errors
/// When a target cannot be built here, which says what is missing; or when what was built does not run.
pub fn run(root: &Path, options: &Options) -> Result<()> {
    ensure!(
        consts::OS == "linux",
        "releases are made on Linux; on {} `cargo build --release --package gateway-user` makes the programs",
        consts::OS
    );
    let both = ["musl", "gnu"].map(str::to_owned);
    let asked = if options.targets.is_empty() {
        &both[..]
    } else {
        &options.targets
    };
    let targets: Vec<Target> = asked
        .iter()
        .map(|name| Target::named(name))
        .collect::<Result<_>>()?;
    let output = dev::target_directory()?.join("dist");
    fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
    let mut archives = Vec::new();
    for target in &targets {
        println!("── {target}");
        let programs = build::programs(root, target)?;
        let archive = archive::pack(root, target, &programs, &output)?;
        trial::try_out(target, &archive)?;
        archives.push(archive);
    }
    write_digests(&archives, &output)?;
    for archive in &archives {
        println!("{}: {} bytes", archive.display(), fs::metadata(archive)?.len());
    }
    Ok(())
}

/// As `sha256sum --check SHA256SUMS` reads them.
fn write_digests(archives: &[PathBuf], output: &Path) -> Result<()> {
    let mut lines = Vec::new();
    for archive in archives {
        let bytes = fs::read(archive).with_context(|| format!("cannot read {}", archive.display()))?;
        let name = archive
            .file_name()
            .context("an archive has a name")?
            .to_string_lossy();
        lines.push(format!("{}  {name}\n", digest::hex(bytes)));
    }
    lines.sort();
    let path = output.join("SHA256SUMS");
    fs::write(&path, lines.concat()).with_context(|| format!("cannot write {}", path.display()))
}
