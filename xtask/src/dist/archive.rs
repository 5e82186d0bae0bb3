//! One archive: the programs, and what it takes to run them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::PROGRAMS;
use super::build::Target;
use crate::stage::run;

/// What goes in beside the programs: where it is in the repository, and its name in the archive. The schema and the probe are compiled in.
pub const FILES: [(&str, &str); 5] = [
    ("config.yaml", "config.yaml"),
    ("packaging/systemd/vllm-gateway.service", "vllm-gateway.service"),
    ("LICENSE", "LICENSE"),
    ("README.md", "README.md"),
    ("packaging/README.md", "INSTALL.md"),
];

/// Packs what was built for `target` into an archive in `output`, and returns it.
///
/// # Errors
/// When a file is missing, or tar or strip fail.
pub fn pack(root: &Path, target: &Target, programs: &Path, output: &Path) -> Result<PathBuf> {
    let name = format!("vllm-gateway-{}-{}", env!("CARGO_PKG_VERSION"), target.short());
    let staging = output.join("staging");
    let _ = fs::remove_dir_all(&staging);
    let directory = staging.join(&name);
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let copy = |from: &Path, to: &str| {
        fs::copy(from, directory.join(to)).with_context(|| format!("cannot copy {}", from.display()))
    };
    for program in PROGRAMS {
        copy(&programs.join(program), program)?;
    }
    // Names of functions stay, for a stack that somebody reports; lines go, which are most of the size. Another processor's programs need its own tool.
    if target.runs_here() {
        run(Command::new("strip")
            .arg("--strip-debug")
            .args(PROGRAMS.map(|program| directory.join(program))))
        .context("strip comes with the C compiler: Debian: apt-get install binutils")?;
    }
    for (from, to) in FILES {
        copy(&root.join(from), to)?;
    }
    let archive = output.join(format!("{name}.tar.gz"));
    let time = time(root)?;
    run(Command::new("tar")
        .args([
            "--create",
            "--sort=name",
            "--format=ustar",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
        ])
        .args([
            "--mode=go-w,a+rX",
            &format!("--mtime=@{time}"),
            "--use-compress-program=gzip -9 --no-name",
        ])
        .arg("--file")
        .arg(&archive)
        .arg("--directory")
        .arg(&staging)
        .arg(&name))?;
    fs::remove_dir_all(&staging).with_context(|| format!("cannot remove {}", staging.display()))?;
    Ok(archive)
}

/// Seconds since 1970 that all files get: what the usual variable says, else when the commit was made.
fn time(root: &Path) -> Result<u64> {
    if let Ok(said) = env::var("SOURCE_DATE_EPOCH") {
        return said
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH is {said}: expected seconds since 1970"));
    }
    let commit = Command::new("git")
        .args(["log", "-1", "--format=%ct"])
        .current_dir(root)
        .output()
        .context("cannot start git")?;
    ensure!(
        commit.status.success(),
        "no commit to take the time of: set SOURCE_DATE_EPOCH"
    );
    let seconds = String::from_utf8_lossy(&commit.stdout);
    seconds.trim().parse().context("git says no time")
}
