//! A process whose words are watched: waited for, kept, and shown when it goes wrong; and which does end.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::dev::children::{die_with_parent, tail};

/// Lines that are shown when something went wrong: a kernel's panic with what led to it.
const TAIL_LINES: usize = 40;

/// How a process ended by itself.
#[derive(Debug)]
pub struct Ended {
    /// What the system says.
    pub status: ExitStatus,
    /// All that it said, on both outputs.
    pub said: String,
    /// From its start to its end.
    pub took: Duration,
}

/// A running process; gone when this is dropped, and on Linux also when this program is killed.
#[derive(Debug)]
pub struct Watched {
    name: &'static str,
    child: Child,
    lines: Receiver<String>,
    said: String,
    started: Instant,
    limit: Duration,
}

impl Watched {
    /// Starts it as `name`, for messages. May only be called on the main thread, which the process dies with.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &'static str, mut command: Command, limit: Duration) -> Result<Watched> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        die_with_parent(&mut command);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start the {name}: {command:?}"))?;
        let (sender, lines) = channel();
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        pass_on(output.context("its output is a pipe")?, sender.clone());
        pass_on(errors.context("its errors are a pipe")?, sender);
        Ok(Watched {
            name,
            child,
            lines,
            said: String::new(),
            started: Instant::now(),
            limit,
        })
    }

    /// Waits until it says `text`.
    ///
    /// # Errors
    /// When it ends before it has, or its time is over. The end of what it said is in the message.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        while let Some(line) = self.next_line()? {
            if line.contains(text) {
                return Ok(());
            }
        }
        bail!("the {} ended before it said `{text}`; {}", self.name, self.tail())
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When it does not within its time. The end of what it said is in the message.
    pub fn finish(mut self) -> Result<Ended> {
        while self.next_line()?.is_some() {}
        Ok(Ended {
            status: self.child.wait()?,
            said: std::mem::take(&mut self.said),
            took: self.started.elapsed(),
        })
    }

    /// Kills it, so that it gets to know nothing of it. Returns all that it had said.
    ///
    /// # Errors
    /// When it had ended by itself already.
    pub fn kill(mut self) -> Result<String> {
        let ended = self.child.try_wait()?;
        if ended.is_none() {
            self.child.kill()?;
            self.child.wait()?;
        }
        while self.next_line()?.is_some() {}
        if let Some(status) = ended {
            bail!("the {} ended by itself with {status}; {}", self.name, self.tail());
        }
        Ok(std::mem::take(&mut self.said))
    }

    /// The end of what it said, for a message.
    pub fn tail(&self) -> String {
        last_words(&self.said)
    }

    /// The next line; `None` when there will be none.
    fn next_line(&mut self) -> Result<Option<String>> {
        let left = self.limit.saturating_sub(self.started.elapsed());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.said += &line;
                self.said.push('\n');
                Ok(Some(line))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!(
                "the {} was not through within {} s; {}",
                self.name,
                self.limit.as_secs(),
                self.tail()
            ),
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of what a process said, for a message.
pub fn last_words(said: &str) -> String {
    format!("its last words:\n{}", tail(said, TAIL_LINES))
}

/// Hands the lines of a pipe on from a thread, which ends with the pipe.
fn pass_on(pipe: impl Read + Send + 'static, to: Sender<String>) {
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line);
            // Who does not listen any more has let the process go.
            if to.send(text.trim_end_matches(['\r', '\n']).to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Watched {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Watched::start("shell", command, limit).expect("a shell")
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn what_it_said_on_both_outputs_is_kept_without_carriage_returns() {
        let ended = shell("printf 'one\\r\\ntwo\\n'; exit 3", LIMIT).finish();
        let ended = ended.expect("it ends");
        assert_eq!(
            (ended.status.code(), ended.said.as_str()),
            (Some(3), "one\ntwo\n")
        );
        let ended = shell("echo oops >&2", LIMIT).finish().expect("it ends");
        assert_eq!(ended.said, "oops\n");
    }

    #[test]
    fn a_process_that_ends_too_early_shows_its_last_words() {
        let error = shell("echo no disk", LIMIT)
            .wait_for("up")
            .expect_err("it never says so");
        let text = error.to_string();
        assert!(
            text.contains("shell ended before it said `up`") && text.contains("  no disk\n"),
            "{text}"
        );
        let mut early = shell("echo up", LIMIT);
        early.wait_for("up").expect("it says so");
        while early.next_line().expect("it ends").is_some() {}
        early.child.wait().expect("it has ended");
        let text = early.kill().expect_err("there was nothing to kill").to_string();
        assert!(text.contains("ended by itself with exit status: 0"), "{text}");
    }

    #[test]
    fn a_process_that_hangs_is_gone_when_its_time_is_over() {
        let hanging = shell("echo up; exec sleep 600", Duration::from_millis(300));
        let pid = rustix::process::Pid::from_child(&hanging.child);
        let text = hanging.finish().expect_err("it hangs").to_string();
        assert!(
            text.contains("not through within") && text.contains("  up\n"),
            "{text}"
        );
        assert!(rustix::process::test_kill_process(pid).is_err(), "it still runs");
    }

    #[test]
    fn a_process_is_killed_while_it_runs() {
        let mut running = shell("echo up; exec sleep 600", LIMIT);
        running.wait_for("up").expect("it says so");
        assert_eq!(running.kill().expect("it ran"), "up\n");
    }
}
