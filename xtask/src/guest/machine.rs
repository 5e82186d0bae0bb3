//! A running guest: what it says, how it ends, and that it does end.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::dev::children::{die_with_parent, tail};

/// What stands before the exit code on the console, and on no line that a kernel or a program writes by itself.
pub const EXIT_MARK: &str = "@@guest-exit ";

/// Lines of the console that are shown when something went wrong: a kernel's panic with what led to it.
const TAIL_LINES: usize = 40;

/// How a guest ended by itself.
#[derive(Debug)]
pub struct Outcome {
    /// What its script ended with.
    pub exit_code: i32,
    /// All that it said.
    pub console: String,
    /// From the start of QEMU to its end.
    pub took: Duration,
}

/// QEMU with a guest in it; gone when this is dropped, and on Linux also when this process is killed.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    lines: Receiver<String>,
    console: String,
    started: Instant,
    limit: Duration,
}

impl Machine {
    /// Starts QEMU, whose standard output is the guest's console. May only be called on the main thread, which the guest dies with.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, limit: Duration) -> Result<Machine> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        die_with_parent(&mut command);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let (sender, lines) = channel();
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        pass_on(output.context("QEMU has a console")?, sender.clone());
        pass_on(errors.context("QEMU has an error output")?, sender);
        Ok(Machine {
            child,
            lines,
            console: String::new(),
            started: Instant::now(),
            limit,
        })
    }

    /// Waits until the guest says `text`; returns that line.
    ///
    /// # Errors
    /// When it ends before it has, or its time is over. The end of the console is in the message.
    pub fn wait_for(&mut self, text: &str) -> Result<String> {
        loop {
            match self.next_line()? {
                Some(line) if line.contains(text) => return Ok(line),
                Some(line) if line.starts_with(EXIT_MARK) => {
                    bail!(
                        "the guest's script ended before it said `{text}`\n{}",
                        self.tail()
                    )
                }
                Some(_) => {}
                None => bail!("the guest ended before it said `{text}`\n{}", self.tail()),
            }
        }
    }

    /// Waits until the guest has ended.
    ///
    /// # Errors
    /// When it does not within its time, or ends without an exit code, as after a panic.
    pub fn finish(mut self) -> Result<Outcome> {
        while self.next_line()?.is_some() {}
        let status = self.child.wait()?;
        let exit_code = exit_code_in(&self.console).with_context(|| {
            format!(
                "the guest ended without an exit code (QEMU: {status})\n{}",
                self.tail()
            )
        })?;
        Ok(Outcome {
            exit_code,
            console: std::mem::take(&mut self.console),
            took: self.started.elapsed(),
        })
    }

    /// Pulls the plug: nothing in the guest gets to know. Returns all that it had said.
    ///
    /// # Errors
    /// When it had ended already.
    pub fn cut(mut self) -> Result<String> {
        if let Some(status) = self.child.try_wait()? {
            while self.next_line()?.is_some() {}
            bail!(
                "the guest had ended before its power was cut ({status})\n{}",
                self.tail()
            );
        }
        self.child.kill()?;
        self.child.wait()?;
        while self.next_line()?.is_some() {}
        Ok(std::mem::take(&mut self.console))
    }

    /// The next line of the console; `None` when there will be none.
    fn next_line(&mut self) -> Result<Option<String>> {
        let left = self.limit.saturating_sub(self.started.elapsed());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.console += &line;
                self.console.push('\n');
                Ok(Some(line))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!(
                "the guest was not through within {} s\n{}",
                self.limit.as_secs(),
                self.tail()
            ),
        }
    }

    fn tail(&self) -> String {
        format!("the end of its console:\n{}", tail(&self.console, TAIL_LINES))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hands the lines of a pipe on from a thread, which ends with the pipe.
fn pass_on(pipe: impl Read + Send + 'static, to: Sender<String>) {
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line);
            // Who does not listen any more has let the machine go.
            if to.send(text.trim_end_matches(['\r', '\n']).to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
}

fn exit_code_in(console: &str) -> Option<i32> {
    let line = console
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix(EXIT_MARK))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Machine {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Machine::start(command, limit).expect("a shell")
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_guest_s_exit_code_is_what_its_script_said_last() {
        let script = "printf 'up\\r\\n@@guest-exit 3\\r\\n[ 2.1] reboot: Power down\\n'";
        let outcome = shell(script, LIMIT).finish().expect("it says how it ended");
        assert_eq!(outcome.exit_code, 3);
        assert_eq!(outcome.console, "up\n@@guest-exit 3\n[ 2.1] reboot: Power down\n");
    }

    #[test]
    fn a_guest_that_panics_has_no_exit_code_and_its_last_words_are_shown() {
        let error = shell("echo Kernel panic; echo no disk >&2", LIMIT)
            .finish()
            .expect_err("it does not say how it ended")
            .to_string();
        assert!(
            error.contains("without an exit code")
                && error.contains("  Kernel panic\n")
                && error.contains("  no disk\n"),
            "{error}"
        );
    }

    #[test]
    fn a_guest_that_hangs_is_killed_when_its_time_is_over() {
        let machine = shell("echo up; exec sleep 600", Duration::from_millis(300));
        let pid = machine.child.id();
        let error = machine.finish().expect_err("it hangs").to_string();
        assert!(
            error.contains("not through within") && error.contains("  up\n"),
            "{error}"
        );
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("not zero");
        assert!(rustix::process::test_kill_process(pid).is_err(), "it still runs");
    }

    #[test]
    fn a_cut_is_made_while_the_guest_runs() {
        let mut machine = shell("echo up; exec sleep 600", LIMIT);
        assert_eq!(machine.wait_for("up").expect("it says so"), "up");
        assert_eq!(machine.cut().expect("it ran"), "up\n");
        let mut machine = shell("echo @@guest-exit 0", LIMIT);
        let error = machine.wait_for("up").expect_err("it never says so").to_string();
        assert!(error.contains("before it said `up`"), "{error}");
    }
}
