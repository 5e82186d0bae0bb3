//! A command that runs beside others, since it mostly waits, or since they leave a processor idle. Nothing of its output is lost, and nothing is
//! mixed with another's: it is printed whole when the command is waited for.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio, id};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, setpriority_process};

use crate::stage::Stages;

/// Well behind the usual 0, and not at the very end (19), so that it gets on.
const NICENESS: i32 = 10;

/// What runs. It is killed when nobody waits for it any more.
#[derive(Debug)]
pub struct Beside {
    name: &'static str,
    child: Child,
    output: PathBuf,
    started: Instant,
}

impl Beside {
    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &'static str, command: &mut Command) -> Result<Self> {
        let output = std::env::temp_dir().join(format!("xtask-{}-{}", id(), name.replace(' ', "-")));
        let file = File::create(&output).with_context(|| format!("cannot create {}", output.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        println!("── {name} begins, beside what follows");
        Ok(Self {
            name,
            child,
            output,
            started: Instant::now(),
        })
    }

    /// Has it give way to whatever else wants to compute; so will all that it starts from now on. A mere wish: it fails for who is further
    /// behind already, and stays there.
    pub fn behind(self) -> Self {
        let _ = setpriority_process(Some(Pid::from_child(&self.child)), NICENESS);
        self
    }

    /// Waits for its end, prints what it said, and adds its time to `stages`.
    ///
    /// # Errors
    /// When it did not succeed.
    pub fn finish(mut self, stages: &mut Stages) -> Result<()> {
        let status = self.child.wait()?;
        let took = self.started.elapsed();
        let said =
            fs::read(&self.output).with_context(|| format!("cannot read {}", self.output.display()))?;
        stages.beside(self.name, took, || {
            io::stdout().write_all(&said)?;
            ensure!(status.success(), "it ended with {status}; what it said is above");
            Ok(())
        })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Errors mean that it has ended, and that the file is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.output);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn its_end_is_that_of_the_stage() {
        let mut stages = Stages::default();
        let good = Beside::start("good one", &mut shell("echo out; echo err >&2")).expect("a shell");
        let output = good.output.clone();
        good.finish(&mut stages).expect("it succeeds");
        assert!(!output.exists());
        let bad = Beside::start("bad one", &mut shell("exit 3")).expect("a shell");
        let error = format!("{:#}", bad.finish(&mut stages).expect_err("it fails"));
        assert!(
            error.contains("`bad one`") && error.contains("exit status: 3"),
            "{error}"
        );
        assert!(stages.to_string().contains("good one"), "{stages}");
    }

    #[test]
    fn who_gives_way_has_the_lower_priority() {
        let endless = Beside::start("humble one", &mut shell("exec sleep 600")).expect("a shell");
        let endless = endless.behind();
        let pid = Pid::from_child(&endless.child);
        let niceness = rustix::process::getpriority_process(Some(pid)).expect("it runs");
        assert_eq!(niceness, NICENESS);
    }

    #[test]
    fn whoever_is_not_waited_for_is_gone() {
        let endless = Beside::start("endless one", &mut shell("exec sleep 600")).expect("a shell");
        let pid = Pid::from_child(&endless.child);
        drop(endless);
        assert!(rustix::process::test_kill_process(pid).is_err());
    }
}
