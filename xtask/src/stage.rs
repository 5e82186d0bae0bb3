//! Commands that run one after another, and how long each took.

use std::env;
use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The stages so far.
#[derive(Debug, Default)]
pub struct Stages {
    done: Vec<(&'static str, Duration, bool)>,
}

impl Stages {
    /// Does one stage and keeps its time, whether it succeeds or not.
    pub fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("── {name}");
        let started = Instant::now();
        let result = work();
        self.done.push((name, started.elapsed(), false));
        self.named(name, result)
    }

    /// Keeps the time of a stage that ran beside others, and says how it ended.
    pub fn beside(
        &mut self,
        name: &'static str,
        took: Duration,
        report: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        println!("── {name}");
        self.done.push((name, took, true));
        let result = report();
        self.named(name, result)
    }

    fn named<T>(&self, name: &str, result: Result<T>) -> Result<T> {
        result.with_context(|| format!("stage `{name}` failed; seconds until then:\n{self}"))
    }

    /// Does a stage that is one command.
    pub fn command(&mut self, name: &'static str, command: &mut Command) -> Result<()> {
        self.time(name, || run(command))
    }
}

impl Display for Stages {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (name, duration, beside) in &self.done {
            let beside = if *beside { ", beside others" } else { "" };
            writeln!(f, "{name:<16}{:>8.1} s{beside}", duration.as_secs_f64())?;
        }
        Ok(())
    }
}

/// Cargo in the workspace at `root`: the one that runs us, so that a `+toolchain` on the command line holds for all that it starts.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    // What Cargo tells us of ourselves is none of the other Cargo's business: build scripts that watch such variables would run again, and all
    // that is built on them would be compiled again, each time that `cargo` and `cargo xtask` take turns.
    for (name, _) in env::vars_os().filter(|(name, _)| tells_of_a_package(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command
}

/// The command that builds the gateway's programs as the tests have them: for an integration test, Cargo builds all programs of its package. `cargo
/// build` would build them, the library and much below it once more, since tests turn on features of dependencies.
pub fn build_programs(root: &Path) -> Command {
    let mut command = cargo(root);
    command.args(["test", "--workspace", "--locked", "--no-run", "--test", "program"]);
    command
}

fn tells_of_a_package(variable: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"]
        .iter()
        .any(|prefix| variable.starts_with(prefix))
        || variable == "CARGO_PRIMARY_PACKAGE"
}

/// Runs a command to its end; its output goes where ours goes.
///
/// # Errors
/// When it cannot be started, or does not succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let status = command
        .status()
        .with_context(|| format!("cannot start {shown}"))?;
    ensure!(status.success(), "{shown} ended with {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_stage_is_named_and_its_time_is_kept() {
        let mut stages = Stages::default();
        stages
            .command("good", &mut Command::new("true"))
            .expect("`true` succeeds");
        let error = stages
            .command("bad", &mut Command::new("false"))
            .expect_err("`false` fails");
        let text = format!("{error:#}");
        assert!(
            text.contains("`bad`") && text.contains("good") && text.contains("exit status: 1"),
            "{text}"
        );
        assert_eq!(stages.done.len(), 2);
    }

    #[test]
    fn a_command_that_is_not_there_is_named() {
        let error = run(&mut Command::new("no-such-command-anywhere")).expect_err("nothing to run");
        assert!(error.to_string().contains("no-such-command-anywhere"), "{error}");
    }
}
