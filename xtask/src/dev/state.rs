//! The directory of one running system: its logs, its data, and a file that says who runs it.
//!
//! Whoever runs the system holds a lock on that file, and the kernel takes the lock away when the process is gone, however it
//! ended. So a process id is believed only while the lock is held, and never one that a stranger has got meanwhile.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::ports::{Ports, USUAL_BASE};

/// The process that supervises the others.
pub const SUPERVISOR: &str = "xtask";

/// The directory.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// One process of the system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is called in logs and tables.
    pub name: String,
    /// Its process id.
    pub pid: i32,
    /// Where it is reached; empty if nowhere.
    pub url: String,
}

impl StateDir {
    /// The one of a system on these ports; nothing is created.
    pub fn of(target: &Path, ports: Ports) -> Self {
        let name = match ports.base() {
            USUAL_BASE => "dev".to_owned(),
            base => format!("dev-{base}"),
        };
        Self {
            path: target.join(name),
        }
    }

    /// A file or directory in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Where a process writes what it has to say.
    pub fn log_of(&self, name: &str) -> PathBuf {
        self.join(&format!("{name}.log"))
    }

    /// Takes the directory for this process.
    ///
    /// # Errors
    /// When another one runs the system, which is named.
    pub fn claim(&self) -> Result<Claim> {
        fs::create_dir_all(&self.path).with_context(|| format!("cannot create {}", self.path.display()))?;
        let path = self.pid_file();
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let entries = self.running()?.unwrap_or_default();
                let pid = supervisor(&entries).map_or("unknown".to_owned(), |pid| pid.to_string());
                bail!(
                    "it runs already (process {pid}): `cargo xtask dev stop` ends it, --port-base runs another beside it"
                );
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let state = self.clone();
        let claim = Claim { file, path, state };
        claim.write(&[])?;
        Ok(claim)
    }

    /// The processes of the system, the supervisor first, or `None` if nobody runs it.
    ///
    /// # Errors
    /// When the file cannot be read or makes no sense.
    pub fn running(&self) -> Result<Option<Vec<Entry>>> {
        let path = self.pid_file();
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.with_context(|| format!("cannot open {}", path.display()))?,
        };
        match file.try_lock_shared() {
            Ok(()) => return Ok(None),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        parse(&text)
            .with_context(|| format!("{} is broken", path.display()))
            .map(Some)
    }

    /// The logs that are there, by the name of who wrote them.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn logs(&self) -> Result<Vec<(String, PathBuf)>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("cannot read {}", self.path.display()))?,
        };
        let mut logs = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if let (Some(name), true) = (path.file_stem(), path.extension().is_some_and(|e| e == "log")) {
                logs.push((name.to_string_lossy().into_owned(), path));
            }
        }
        logs.sort();
        Ok(logs)
    }

    fn pid_file(&self) -> PathBuf {
        self.join("pids")
    }
}

/// The process id of the supervisor.
pub fn supervisor(entries: &[Entry]) -> Option<i32> {
    entries
        .iter()
        .find(|entry| entry.name == SUPERVISOR)
        .map(|entry| entry.pid)
}

/// The right to run a system, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    file: File,
    path: PathBuf,
    state: StateDir,
}

impl Claim {
    /// The directory that was claimed.
    pub fn state(&self) -> &StateDir {
        &self.state
    }

    /// Replaces what is said about the processes, besides this one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, entries: &[Entry]) -> Result<()> {
        let mut text = format!("{SUPERVISOR} {}\n", std::process::id());
        for Entry { name, pid, url } in entries {
            text += &format!("{name} {pid} {url}\n");
        }
        // In place, since the lock belongs to this file and not to one that is renamed over it. Longer before shorter: entries
        // are only ever added, so that a reader never sees the end of an older text.
        let write = || -> std::io::Result<()> {
            let mut file = &self.file;
            file.rewind()?;
            file.write_all(text.as_bytes())?;
            file.set_len(text.len() as u64)
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    let entry = |line: &str| -> Result<Entry> {
        let mut words = line.split(' ');
        let name = words
            .next()
            .filter(|name| !name.is_empty())
            .context("expected a name")?;
        let pid = words.next().context("expected a process id behind the name")?;
        let pid: i32 = pid
            .parse()
            .ok()
            .filter(|pid| *pid > 0)
            .with_context(|| format!("expected a process id, found `{pid}`"))?;
        Ok(Entry {
            name: name.to_owned(),
            pid,
            url: words.next().unwrap_or_default().to_owned(),
        })
    };
    text.lines()
        .map(|line| entry(line).with_context(|| format!("line `{line}`")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(test: &str) -> StateDir {
        let path = std::env::temp_dir().join(format!("xtask-state-{test}-{}", std::process::id()));
        StateDir { path }
    }

    #[test]
    fn a_claim_is_seen_by_others_until_it_ends() {
        let state = state("claim");
        assert_eq!(state.running().expect("nothing there"), None);
        let claim = state.claim().expect("a claim");
        let gateway = Entry {
            name: "gateway".to_owned(),
            pid: 7,
            url: "http://a:1".to_owned(),
        };
        claim.write(std::slice::from_ref(&gateway)).expect("written");
        let running = state.running().expect("readable").expect("running");
        let own = i32::try_from(std::process::id()).expect("a pid");
        assert_eq!((supervisor(&running), &running[1]), (Some(own), &gateway));
        let refused = state.claim().expect_err("it is taken").to_string();
        assert!(refused.contains(&format!("process {own}")), "{refused}");
        drop(claim);
        assert_eq!(
            state.running().expect("readable"),
            None,
            "the file is there, but nobody holds it"
        );
        drop(state.claim().expect("free again"));
        fs::remove_dir_all(state.path).expect("ours");
    }

    #[test]
    fn a_broken_file_is_not_believed() {
        for text in ["gateway", "gateway x", " 12", "gateway 0", "gateway -1"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!(parse("").expect("empty"), []);
        assert_eq!(parse("load 12 \n").expect("without a URL")[0].url, "");
    }

    #[test]
    fn systems_on_other_ports_have_directories_of_their_own() {
        let path = |base| StateDir::of(Path::new("target"), Ports::from_base(base)).path;
        assert_eq!(path(8000), Path::new("target/dev"));
        assert_eq!(path(20_000), Path::new("target/dev-20000"));
    }
}
