//! A cgroup for the server that is measured.
//!
//! systemd, Docker and Kubernetes give every service one, and the tap by default watches the one whose socket listens. A server that a bench
//! starts would be in the cgroup of the shell, nearly always the root, with the load and everything else: the probe would see each packet
//! of loopback twice, once more at the client's end, which on a server of its own is on another machine or in another container.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use anyhow::{Context, Result};

/// A cgroup of cgroup2; gone when this is dropped, if nothing runs in it any more.
#[derive(Debug)]
pub struct Cgroup {
    directory: PathBuf,
    id: u64,
}

impl Cgroup {
    /// One for `name`, right below the root.
    ///
    /// # Errors
    /// When cgroup2 is not mounted, or the directory cannot be made: it takes root, which the tap does as well.
    pub fn make(name: &str) -> Result<Cgroup> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("the tap takes Linux")?;
        let mount =
            mounted(&mounts).context("expected a mount of cgroup2 in /proc/self/mountinfo, found none")?;
        let directory = Path::new(mount).join(format!("vllm-gateway-bench-{}-{name}", process::id()));
        fs::create_dir(&directory)
            .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
        let id = fs::metadata(&directory)?.ino();
        Ok(Cgroup { directory, id })
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// `command`, which moves here before it begins: a socket stays in the cgroup in which it was made.
    pub fn within(&self, command: &Command) -> Command {
        let mut moved = Command::new("sh");
        moved
            .args(["-c", "echo 0 > \"$0\" && exec \"$@\""])
            .arg(self.directory.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            moved.env(name, value.unwrap_or(OsStr::new("")));
        }
        moved
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was killed is gone from it once it was waited for, which its owner has done.
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Where a table of mounts has cgroup2.
fn mounted(table: &str) -> Option<&str> {
    table.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        file_system
            .starts_with("cgroup2 ")
            .then(|| mount.split(' ').nth(4))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_beside_the_old_hierarchies() {
        let table = "30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n\
                     32 30 0:28 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n\
                     31 30 0:27 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(mounted(table), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mounted("30 23 0:26 / / rw - ext4 /dev/sda rw\n"), None);
    }
}
