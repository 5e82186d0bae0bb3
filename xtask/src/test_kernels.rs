//! `cargo xtask test-kernels`: our programs on the kernels that others run, under emulation.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::{self, Kernel, Scratch};
use crate::{dev, stage};

/// How long one trial may take, boot included; they take some seconds on a quiet machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Something that must work on every kernel.
struct Trial {
    name: &'static str,
    /// Programs of this build that it needs.
    programs: &'static [&'static str],
    /// Integration tests of `gateway-user` that it runs, by the names of their files. They are programs of these names in the guest.
    tests: &'static [&'static str],
    /// What is run in the guest, as root. It holds when this ends with 0.
    script: &'static str,
}

const TRIALS: [Trial; 3] = [
    Trial {
        name: "the gateway starts, and control groups can be had",
        programs: &["vllm-gateway"],
        tests: &[],
        script: "set -e\n\
                 mount -t cgroup2 none /sys/fs/cgroup\n\
                 test -f /sys/fs/cgroup/cgroup.procs\n\
                 vllm-gateway --version\n",
    },
    Trial {
        name: "what was kept is found after a kill",
        programs: &[],
        tests: &["store_kill"],
        script: "store_kill --nocapture\n",
    },
    Trial {
        name: "the probe is taken by the verifier, and sees what passes",
        programs: &[],
        tests: &["tap_probe"],
        script: "mount -t cgroup2 none /sys/fs/cgroup && tap_probe\n",
    },
];

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
    stage::run(&mut stage::build_programs(root))?;
    let built = dev::target_directory()?.join("debug");
    let scratch = Scratch::new("test-kernels")?;
    for trial in &TRIALS {
        let mut programs: Vec<PathBuf> = trial.programs.iter().map(|name| built.join(name)).collect();
        for test in trial.tests {
            programs.push(test_program(root, test, scratch.path())?);
        }
        for kernel in kernels {
            trial.run(kernel, &programs)?;
        }
    }
    Ok(())
}

impl Trial {
    fn run(&self, kernel: &Kernel, programs: &[PathBuf]) -> Result<()> {
        let outcome = guest::run_in_guest(kernel, programs, self.script, LIMIT)?;
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

/// Builds an integration test and puts it into `directory` under its own name: Cargo's has a hash in it.
fn test_program(root: &Path, name: &str, directory: &Path) -> Result<PathBuf> {
    let mut cargo = stage::cargo(root);
    cargo
        .args([
            "test",
            "--locked",
            "--package",
            "gateway-user",
            "--no-run",
            "--test",
            name,
        ])
        .args(["--quiet", "--message-format", "json"])
        .stderr(Stdio::inherit());
    let output = cargo
        .output()
        .with_context(|| format!("cannot start {cargo:?}"))?;
    ensure!(output.status.success(), "{cargo:?} ended with {}", output.status);
    let built = executable_in(&String::from_utf8_lossy(&output.stdout), name)
        .with_context(|| format!("{cargo:?} built no such test"))?;
    let program = directory.join(name);
    fs::copy(&built, &program).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(program)
}

/// The test's program, in what Cargo says of what it built: one JSON object a line.
fn executable_in(messages: &str, name: &str) -> Option<PathBuf> {
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut tests = messages
        .filter(|message| message["target"]["name"] == name && message["target"]["kind"][0] == "test");
    tests.find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_s_program_is_the_one_of_its_own_name_and_kind() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"store","kind":["lib"]},"executable":null}
not JSON
{"reason":"compiler-artifact","target":{"name":"store","kind":["bin"]},"executable":"/target/debug/store"}
{"reason":"compiler-artifact","target":{"name":"store","kind":["test"]},"executable":"/target/debug/deps/store-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(
            executable_in(messages, "store"),
            Some(PathBuf::from("/target/debug/deps/store-1"))
        );
        assert_eq!(executable_in(messages, "sto"), None);
    }
}
