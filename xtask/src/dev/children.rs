//! The processes that are supervised: started, watched, stopped.
//!
//! None of them survives: an orderly end stops each with the signal it understands and waits for it; a panic or an error kills
//! them; and on Linux the kernel kills them when this process is gone without having done either. Elsewhere only the first two
//! hold.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::state::{Entry, StateDir};
use crate::http;

/// How often processes and signals are looked at: unnoticeable for a person, and nothing for a processor.
const TICK: Duration = Duration::from_millis(100);

/// Lines of a log that are shown when its process has died: the reason and what led to it.
const TAIL_LINES: usize = 20;

/// A program to run.
#[derive(Debug)]
pub struct Service {
    /// What it is called in logs and tables.
    pub name: &'static str,
    /// The program with its arguments and environment.
    pub command: Command,
    /// Where it is reached; empty if nowhere.
    pub url: String,
    /// How one knows that it works.
    pub ready: Ready,
    /// What asks it to end in good order.
    pub stop_signal: Signal,
    /// How long it may take for that, before it is killed.
    pub grace: Duration,
}

/// How one knows that a program works.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// The port to ask.
    pub port: u16,
    /// The page that must answer 200.
    pub path: &'static str,
    /// What that page must say.
    pub says: fn(&str) -> bool,
    /// How long that may take.
    pub within: Duration,
}

/// Set by SIGINT and SIGTERM.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Catches both signals from now on.
    ///
    /// # Errors
    /// When the system does not allow it.
    pub fn catch() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&flag)).context("cannot catch signals")?;
        }
        Ok(Self(flag))
    }

    /// Whether one has come since the last call.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// What was waited for has come.
    Done,
    /// The user wants to stop.
    Interrupted,
}

/// Everything that runs, in the order in which it was started.
#[derive(Debug)]
pub struct Children {
    state: StateDir,
    interrupt: Interrupt,
    running: Vec<Running>,
}

#[derive(Debug)]
struct Running {
    service: Service,
    child: Child,
    log: PathBuf,
}

impl Children {
    /// Nothing runs yet.
    pub fn new(state: StateDir, interrupt: Interrupt) -> Self {
        Self {
            state,
            interrupt,
            running: Vec::new(),
        }
    }

    /// Starts a program; its output goes to its log.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, mut service: Service) -> Result<()> {
        let log = self.state.log_of(service.name);
        let output = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        service
            .command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C goes to all processes of the terminal's group; these are to be stopped in order, and once.
            .process_group(0);
        die_with_parent(&mut service.command);
        let child = service
            .command
            .spawn()
            .with_context(|| format!("cannot start {}: {:?}", service.name, service.command))?;
        self.running.push(Running { service, child, log });
        Ok(())
    }

    /// Waits until the program that was started last is ready.
    ///
    /// # Errors
    /// When it is not in time, or a process dies. The end of its log is in the message.
    pub fn wait_until_ready(&mut self) -> Result<Waited> {
        let started = Instant::now();
        loop {
            let Some(last) = self.running.last() else {
                return Ok(Waited::Done);
            };
            let Ready {
                port,
                path,
                says,
                within,
            } = last.service.ready;
            let answer = http::get(port, path);
            if answer.as_ref().is_ok_and(|page| says(page)) {
                return Ok(Waited::Done);
            }
            if started.elapsed() > within {
                let why = answer
                    .err()
                    .map_or("it does not say so".to_owned(), |error| format!("{error:#}"));
                let (name, tail) = (last.service.name, last.tail());
                bail!(
                    "{name} was not ready within {} s: {why}\n{tail}",
                    within.as_secs()
                );
            }
            if self.tick()? == Waited::Interrupted {
                return Ok(Waited::Interrupted);
            }
        }
    }

    /// Waits until then.
    ///
    /// # Errors
    /// When a process dies. The end of its log is in the message.
    pub fn wait_until(&mut self, then: Option<Instant>) -> Result<Waited> {
        while then.is_none_or(|then| Instant::now() < then) {
            if self.tick()? == Waited::Interrupted {
                return Ok(Waited::Interrupted);
            }
        }
        Ok(Waited::Done)
    }

    fn tick(&mut self) -> Result<Waited> {
        if self.interrupt.take() {
            return Ok(Waited::Interrupted);
        }
        for running in &mut self.running {
            if let Some(status) = running.child.try_wait()? {
                let (name, pid) = (running.service.name, running.child.id());
                bail!("{name} (process {pid}) ended with {status}\n{}", running.tail());
            }
        }
        thread::sleep(TICK);
        Ok(Waited::Done)
    }

    /// What runs, for the table and the file of process ids.
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |running: &Running| Entry {
            name: running.service.name.to_owned(),
            pid: running.child.id().cast_signed(),
            url: running.service.url.clone(),
        };
        self.running.iter().map(entry).collect()
    }

    /// Stops all, last started first, so that nobody loses whom it talks to. A signal meanwhile kills those that are left.
    ///
    /// # Errors
    /// When a process cannot be waited for.
    pub fn stop(&mut self) -> Result<()> {
        while let Some(running) = self.running.last_mut() {
            running.stop(&self.interrupt)?;
            self.running.pop();
        }
        Ok(())
    }
}

impl Drop for Children {
    /// On the way out of an error, when nobody has stopped them.
    fn drop(&mut self) {
        for running in &mut self.running {
            // An error means that it has gone already.
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}

impl Running {
    fn stop(&mut self, interrupt: &Interrupt) -> Result<()> {
        let Service {
            name,
            stop_signal,
            grace,
            ..
        } = self.service;
        let started = Instant::now();
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        // Not reaped yet, so that the pid is still this process's; a failure can only mean that it ends by itself.
        let _ = kill_process(Pid::from_child(&self.child), stop_signal);
        while self.child.try_wait()?.is_none() {
            let hurried = interrupt.take();
            if hurried || started.elapsed() > grace {
                let why = if hurried {
                    "you are in a hurry"
                } else {
                    "it took too long"
                };
                println!("killing {name}: {why}");
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            thread::sleep(TICK);
        }
        println!("stopped {name:<12}{:>6.1} s", started.elapsed().as_secs_f64());
        Ok(())
    }

    fn tail(&self) -> String {
        let log = self.log.display();
        match fs::read(&self.log) {
            Ok(bytes) => format!(
                "the end of {log}:\n{}",
                tail(&String::from_utf8_lossy(&bytes), TAIL_LINES)
            ),
            Err(error) => format!("{log} cannot be read: {error}"),
        }
    }
}

/// The last lines of a text, indented.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    last.iter().map(|line| format!("  {line}\n")).collect()
}

/// Has the kernel kill the command's process when this one is gone.
///
/// The kernel means the *thread* that starts it: only the main thread may, since it lives as long as the process.
#[cfg(target_os = "linux")]
pub fn die_with_parent(command: &mut Command) {
    use rustix::io::Errno;
    use rustix::process::{getpid, getppid, set_parent_process_death_signal};

    let parent = getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the question; then there is nobody left to send the signal.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(Errno::SRCH.into())
        }
    };
    // SAFETY: between fork and exec the closure makes two system calls; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(ask);
    }
}

#[cfg(not(target_os = "linux"))]
pub fn die_with_parent(_: &mut Command) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(name: &'static str, script: &str) -> Service {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Service {
            name,
            command,
            url: String::new(),
            ready: Ready {
                port: 1,
                path: "/",
                says: |_| true,
                within: Duration::from_secs(60),
            },
            stop_signal: Signal::TERM,
            grace: Duration::from_secs(20),
        }
    }

    fn children(test: &str) -> Children {
        let target = std::env::temp_dir().join(format!("xtask-children-{test}-{}", std::process::id()));
        let state = StateDir::of(&target, super::super::ports::Ports::from_base(8000));
        drop(state.claim().expect("a directory"));
        Children::new(state, Interrupt(Arc::default()))
    }

    fn exists(pid: i32) -> bool {
        let pid = Pid::from_raw(pid).expect("not zero");
        rustix::process::test_kill_process(pid).is_ok()
    }

    #[test]
    fn a_process_that_dies_is_named_with_its_status_and_its_last_words() {
        let mut children = children("dies");
        children.start(shell("good", "sleep 60")).expect("a shell");
        children
            .start(shell("bad", "echo no luck >&2; exit 3"))
            .expect("a shell");
        let error = children.wait_until(None).expect_err("one dies").to_string();
        assert!(
            error.starts_with("bad (process ") && error.contains("exit status: 3"),
            "{error}"
        );
        assert!(error.contains("\n  no luck\n"), "{error}");
    }

    #[test]
    fn all_are_stopped_even_the_stubborn_one() {
        let mut children = children("stubborn");
        children.start(shell("polite", "sleep 60")).expect("a shell");
        let mut stubborn = shell("stubborn", "trap '' TERM; echo up; while :; do sleep 1; done");
        stubborn.grace = Duration::from_millis(1);
        children.start(stubborn).expect("a shell");
        let pids: Vec<_> = children.entries().iter().map(|entry| entry.pid).collect();
        assert!(pids.iter().all(|pid| exists(*pid)), "{pids:?}");
        children.stop().expect("they can be waited for");
        assert!(
            children.entries().is_empty() && !pids.iter().any(|pid| exists(*pid)),
            "{pids:?}"
        );
    }

    #[test]
    fn an_interrupt_ends_a_wait_once() {
        let mut children = children("interrupt");
        children.interrupt.0.store(true, Ordering::Relaxed);
        assert_eq!(
            children.wait_until(None).expect("nothing died"),
            Waited::Interrupted
        );
        assert!(!children.interrupt.take());
        assert_eq!(
            children.wait_until(Some(Instant::now())).expect("nothing died"),
            Waited::Done
        );
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "  b\n  c\n");
        assert_eq!(tail("", 2), "");
    }
}
