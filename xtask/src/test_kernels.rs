//! `cargo xtask test-kernels`: our programs on the kernels that others run, under emulation.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::guest::{self, Kernel};
use crate::{dev, stage};

/// How long one trial may take, boot included; they take some seconds on a quiet machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Something that must work on every kernel.
struct Trial {
    name: &'static str,
    /// Programs of this build that it needs, below Cargo's `target/debug`.
    programs: &'static [&'static str],
    /// What is run in the guest, as root. It holds when this ends with 0.
    script: &'static str,
}

const TRIALS: [Trial; 1] = [Trial {
    name: "the gateway starts, and control groups can be had",
    programs: &["vllm-gateway"],
    script: "set -e\n\
             mount -t cgroup2 none /sys/fs/cgroup\n\
             test -f /sys/fs/cgroup/cgroup.procs\n\
             vllm-gateway --version\n",
}];

/// Runs every trial on every kernel, after building the programs.
///
/// # Errors
/// When no guest can run here, or a trial fails; the guest's console is in the message.
pub fn run(root: &Path) -> Result<()> {
    let kernels = guest::kernels()?;
    ensure!(!kernels.is_empty(), "no guest can run here; the reason is above");
    on(&kernels, root)
}

/// As [`run`], on these kernels.
///
/// # Errors
/// As above.
pub fn on(kernels: &[Kernel], root: &Path) -> Result<()> {
    stage::run(stage::cargo(root).args(["build", "--locked", "--package", "gateway-user", "--bins"]))?;
    let programs = dev::target_directory()?.join("debug");
    for kernel in kernels {
        for trial in &TRIALS {
            trial.run(kernel, &programs)?;
        }
    }
    Ok(())
}

impl Trial {
    fn run(&self, kernel: &Kernel, directory: &Path) -> Result<()> {
        let programs: Vec<PathBuf> = self.programs.iter().map(|name| directory.join(name)).collect();
        let outcome = guest::run_in_guest(kernel, &programs, self.script, LIMIT)?;
        let (name, release) = (self.name, &kernel.release);
        ensure!(
            outcome.exit_code == 0,
            "on {release}, `{name}` ended with {}; the guest said:\n{}",
            outcome.exit_code,
            outcome.console
        );
        println!("{release:<28} {name:<52}{:>6.1} s", outcome.took.as_secs_f64());
        Ok(())
    }
}
