//! Finds the cgroup whose sockets are to be watched.

use super::error::TapError;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where cgroup2 is mounted.
///
/// # Errors
/// [`TapError::NoCgroup2`].
pub fn mount_point() -> Result<PathBuf, TapError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_in(&mounts).ok_or(TapError::NoCgroup2)
}

/// The first mount of cgroup2 in a table of mounts. Its columns (proc_pid_mountinfo(5)): id, parent, device, root, mount point,
/// options, optional ones, a hyphen, type of file system, source, its options.
fn mount_in(table: &str) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_cgroup2 = file_system.split(' ').next() == Some("cgroup2");
        let point = mount.split(' ').nth(4)?;
        is_cgroup2.then(|| PathBuf::from(unescape(point)))
    };
    table.lines().find_map(of_line)
}

/// Spaces and such in paths are written as a backslash and three octal digits.
fn unescape(text: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\');
        let code = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    std::ffi::OsString::from_vec(bytes)
}

/// A cgroup, held open: the name of one that has gone can come back for another.
#[derive(Debug)]
pub struct Cgroup {
    pub(super) directory: OwnedFd,
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Opens the cgroup with this directory.
    ///
    /// # Errors
    /// [`TapError::Cgroup`].
    pub fn open(path: &Path) -> Result<Cgroup, TapError> {
        let failed = |source| TapError::Cgroup {
            path: path.to_owned(),
            source,
        };
        let directory = File::open(path).map_err(failed)?;
        let id = directory.metadata().map_err(failed)?.ino();
        Ok(Cgroup {
            directory: directory.into(),
            path: path.to_owned(),
            id,
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its number, which no other cgroup has had since the system started.
    pub fn id(&self) -> u64 {
        self.id
    }
}
