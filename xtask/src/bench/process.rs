//! Programs that run while something is measured, and what Linux says of their CPU time and memory.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// `utime` and `stime` are given in these; Linux shows every program 100 a second, whatever the kernel's own tick.
const TICKS_PER_SECOND: u64 = 100;

/// How long a program may take until it listens, on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Time between two looks at whether it listens.
const START_POLL: Duration = Duration::from_millis(20);

/// A program that listens; stopped when this is dropped.
#[derive(Debug)]
pub struct Server {
    name: &'static str,
    child: Child,
    addr: SocketAddr,
}

impl Server {
    /// Starts it and waits until it listens on `addr`.
    ///
    /// # Errors
    /// When it cannot be started, ends at once, or does not listen in time.
    pub fn start(name: &'static str, mut command: Command, addr: SocketAddr) -> Result<Server> {
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let mut server = Server { name, child, addr };
        let deadline = Instant::now() + START_DEADLINE;
        while TcpStream::connect(addr).is_err() {
            server.check_alive()?;
            ensure!(
                Instant::now() < deadline,
                "{name} did not listen on {addr} within {} s",
                START_DEADLINE.as_secs()
            );
            thread::sleep(START_POLL);
        }
        Ok(server)
    }

    /// The cgroups that BPF programs of its hang on, by number, each once.
    ///
    /// # Errors
    /// When `/proc` cannot be read: it takes Linux, and root.
    pub fn attached_to(&self) -> Result<Vec<u64>> {
        let directory = format!("/proc/{}/fdinfo", self.child.id());
        let mut ids = Vec::new();
        for file in fs::read_dir(&directory).with_context(|| format!("cannot read {directory}"))? {
            // A descriptor may have been closed meanwhile.
            let Ok(described) = fs::read_to_string(file?.path()) else {
                continue;
            };
            ids.extend(cgroup_of_link(&described));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// # Errors
    /// When it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended with {status}; its own message is above", self.name),
        }
    }

    /// CPU time of all its threads so far, user and system.
    ///
    /// # Errors
    /// When `/proc` cannot be read: it takes Linux.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(&self.child)
    }

    /// The most memory that it has had resident.
    ///
    /// # Errors
    /// When `/proc` cannot be read: it takes Linux.
    pub fn rss_max_bytes(&self) -> Result<u64> {
        self.status_bytes("VmHWM:")
    }

    /// The memory that it has resident now.
    ///
    /// # Errors
    /// When `/proc` cannot be read: it takes Linux.
    pub fn rss_bytes(&self) -> Result<u64> {
        self.status_bytes("VmRSS:")
    }

    fn status_bytes(&self, key: &str) -> Result<u64> {
        let status = proc_file(&self.child, "status")?;
        bytes_of(&status, key)
            .with_context(|| format!("expected a line `{key} … kB` in /proc/PID/status, found none"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself, which is what is wanted here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that ends with this, whatever happens.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU time of all threads of a program so far, user and system.
///
/// # Errors
/// When `/proc` cannot be read: it takes Linux.
pub fn cpu_time(child: &Child) -> Result<Duration> {
    let stat = proc_file(child, "stat")?;
    cpu_time_of(&stat).with_context(|| format!("expected a line of /proc/PID/stat, found `{}`", stat.trim()))
}

fn proc_file(child: &Child, name: &str) -> Result<String> {
    let path = format!("/proc/{}/{name}", child.id());
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}: the measurement takes Linux"))
}

/// An address on loopback that nobody listens on.
///
/// # Errors
/// When the system has no free port.
pub fn free_addr() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on 127.0.0.1")?;
    Ok(listener.local_addr()?)
}

/// Fields 14 and 15 of `stat`. The second is the program's name, in which anything may stand.
fn cpu_time_of(stat: &str) -> Option<Duration> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * (1000 / TICKS_PER_SECOND)))
}

/// The cgroup of a descriptor's link, if it is one to a cgroup.
fn cgroup_of_link(described: &str) -> Option<u64> {
    let id = described
        .lines()
        .find_map(|line| line.strip_prefix("cgroup_id:"))?;
    id.trim().parse().ok()
}

fn bytes_of(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20 0 3 0 99 1 2";
        assert_eq!(cpu_time_of(stat), Some(Duration::from_millis(1750)));
        assert_eq!(cpu_time_of("12 (a) S 1"), None);
    }

    #[test]
    fn a_link_says_to_which_cgroup() {
        let link =
            "pos:\t0\nlink_type:\tcgroup\nlink_id:\t9\nprog_id:\t11\ncgroup_id:\t4711\nattach_type:\t1\n";
        assert_eq!(cgroup_of_link(link), Some(4711));
        assert_eq!(cgroup_of_link("pos:\t0\nflags:\t02\n"), None);
    }

    #[test]
    fn memory_is_in_bytes() {
        let status = "VmPeak:\t 99 kB\nVmHWM:\t    3584 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(bytes_of(status, "VmHWM:"), Some(3_670_016));
        assert_eq!(bytes_of(status, "VmRSS:"), Some(1024));
        assert_eq!(bytes_of("VmPeak:\t 99 kB\n", "VmHWM:"), None);
    }

    #[test]
    fn a_program_that_ends_at_once_is_reported_and_not_waited_for() {
        let addr = free_addr().expect("a port");
        let error = Server::start("false", Command::new("false"), addr).expect_err("it does not listen");
        assert!(
            error.to_string().contains("false has ended with exit status: 1"),
            "{error}"
        );
    }
}
