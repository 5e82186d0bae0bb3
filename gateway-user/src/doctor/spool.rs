//! The spool, and what the gateway needs of a directory: room, and files that can be mapped and locked.

use super::{Check, Part, State};
use crate::config::{ByteSize, SpoolConfig};
use crate::store::spool::directory;
use crate::store::spool::segment::Segment;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

/// Where the directory is set.
const SETTING: &str = "spool.dir (SPOOL_DIR)";

/// Size of the file that is made to try a directory.
const TRIED_BYTES: usize = 64 * 1024;

pub(super) fn checks(config: &SpoolConfig, gateway: &str) -> Vec<Check> {
    let directory = directory_check("spool", &config.dir, SETTING);
    let mut checks = vec![match directory.state {
        // Without a spool the gateway does not start: it would lose what it promises to keep.
        State::Problem => directory.stops(Part::Proxy),
        _ => directory,
    }];
    if let Some(holder) = directory::user_of(&config.dir.join(gateway)) {
        checks.push(
            Check::warning("spool", "in use", format!("{holder} uses it as gateway {gateway}")).advise(
                "nothing to do if that gateway is to go on running; a second one needs another name (gateway.id) or directory (SPOOL_DIR)",
            ),
        );
    }
    checks.push(room(config));
    checks
}

/// Makes a file in it as the spool does, reserved and mapped, and locks it; what is missing of the directory would be made there too.
pub(super) fn directory_check(group: &str, dir: &Path, setting: &str) -> Check {
    let place = existing(dir);
    let made = if place == dir { "" } else { ", made at start" };
    match try_directory(&place) {
        Ok(()) => match volatile(&place) {
            None => Check::ok(
                group,
                "directory",
                format!(
                    "{}{made}: writable, files can be mapped and locked",
                    dir.display()
                ),
            ),
            Some(what) => Check::warning(
                group,
                "directory",
                format!("{}{made} is in {what}", dir.display()),
            )
            .advise(format!(
                "what waits there must outlive a restart: mount a volume there, or set {setting}"
            )),
        },
        Err(error) => Check::problem(group, "directory", format!("{}{made}: {error}", dir.display())).advise(
            format!("set {setting} to a directory on a local disk that this user may write to"),
        ),
    }
}

/// The nearest directory above that is there.
fn existing(dir: &Path) -> PathBuf {
    let named = dir.ancestors().find(|place| place.exists());
    match named {
        // A relative path ends in the empty one, which is the current directory.
        Some(place) if !place.as_os_str().is_empty() => place.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn try_directory(dir: &Path) -> Result<(), String> {
    let path = dir.join(format!(".doctor-{}", std::process::id()));
    let tried = Segment::create(&path, TRIED_BYTES)
        .map_err(|error| format!("no file can be made and mapped there: {error}"))
        .and_then(|_| try_lock(&path).map_err(|error| format!("files cannot be locked there: {error}")));
    // If it could not be made, it is not there.
    let _ = fs::remove_file(&path);
    tried
}

/// Two descriptors of one file must not both have its lock.
fn try_lock(path: &Path) -> io::Result<()> {
    let open = || File::options().read(true).write(true).open(path);
    let (first, second) = (open()?, open()?);
    first.try_lock().map_err(io::Error::from)?;
    match second.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(()),
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Err(io::Error::other("a second lock was given beside the first one")),
    }
}

/// A file system that a restart of the container, or of the machine, empties.
#[cfg(target_os = "linux")]
fn volatile(dir: &Path) -> Option<&'static str> {
    // The magic numbers of linux/magic.h.
    match rustix::fs::statfs(dir).ok()?.f_type as u32 {
        0x794c_7630 => Some("a container's own layer (overlayfs), which is gone with the container"),
        0x0102_1994 => Some("memory (tmpfs), which is gone with the machine's next start"),
        _ => None,
    }
}

#[cfg(not(target_os = "linux"))]
fn volatile(_: &Path) -> Option<&'static str> {
    None
}

/// Whether what may wait fits on the disk, beside what waits already.
fn room(config: &SpoolConfig) -> Check {
    let free_bytes = match rustix::fs::statvfs(existing(&config.dir)) {
        Ok(found) => found.f_bavail.saturating_mul(found.f_frsize),
        Err(error) => {
            return Check::unknown("spool", "room", format!("the file system does not say: {error}"));
        }
    };
    let waiting_bytes = waiting(&config.dir);
    let found = format!(
        "{} free, {} wait already; spool.max_bytes is {}",
        rounded(free_bytes),
        rounded(waiting_bytes),
        config.max_bytes
    );
    if free_bytes.saturating_add(waiting_bytes) < config.max_bytes.bytes() {
        return Check::warning("spool", "room", found).advise(
            "in a long outage of ClickHouse the disk would be full before the spool is, and rows be lost: lower spool.max_bytes, or give it room",
        );
    }
    Check::ok("spool", "room", found)
}

/// Bytes of all gateways' files.
fn waiting(dir: &Path) -> u64 {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    entries(dir)
        .flat_map(|gateway| entries(&gateway.path()).collect::<Vec<_>>())
        .filter_map(|file| file.metadata().ok().filter(fs::Metadata::is_file))
        .map(|file| file.len())
        .sum()
}

/// In the largest unit of which there is at least one, rounded down.
fn rounded(bytes: u64) -> ByteSize {
    let unit = [40, 30, 20, 10]
        .into_iter()
        .find(|shift| bytes >> shift > 0)
        .unwrap_or(0);
    ByteSize::from_bytes(bytes >> unit << unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::spool::directory::DirLock;

    /// A directory that is removed with this.
    struct Scratch(PathBuf);

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn config(dir: &Path) -> SpoolConfig {
        SpoolConfig {
            dir: dir.to_owned(),
            ..SpoolConfig::default()
        }
    }

    fn scratch(name: &str) -> Scratch {
        let dir =
            std::env::temp_dir().join(format!("vllm-gateway-doctor-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    #[test]
    fn a_directory_that_works_is_left_as_it_was() {
        let dir = scratch("works");
        let missing = dir.0.join("spool/deeper");
        let check = directory_check("spool", &missing, SETTING);
        assert!(matches!(check.state, State::Ok | State::Warning), "{check:?}");
        assert!(check.found.contains("made at start"), "{check:?}");
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_file_in_its_place_stops_the_proxy() {
        let dir = scratch("file");
        let file = dir.0.join("spool");
        fs::write(&file, "").unwrap();
        let check = &checks(&config(&file), "gw")[0];
        assert_eq!((check.state, check.stops), (State::Problem, Some(Part::Proxy)));
        assert!(check.advice.contains("SPOOL_DIR"), "{check:?}");
    }

    #[test]
    fn a_spool_that_a_gateway_uses_is_told_with_its_process() {
        let dir = scratch("used");
        let held = DirLock::acquire(&dir.0.join("gw")).unwrap();
        let found = checks(&config(&dir.0), "gw");
        let used = found.iter().find(|check| check.name == "in use").unwrap();
        assert!(
            used.found.contains(&format!("process {}", std::process::id())),
            "{used:?}"
        );
        drop(held);
        assert!(
            checks(&config(&dir.0), "gw")
                .iter()
                .all(|check| check.name != "in use")
        );
    }

    #[test]
    fn a_limit_beyond_the_disk_is_a_warning_and_what_waits_counts() {
        let dir = scratch("room");
        let of = |max_bytes| {
            room(&SpoolConfig {
                max_bytes: ByteSize::from_bytes(max_bytes),
                ..config(&dir.0)
            })
        };
        assert_eq!(of(u64::MAX).state, State::Warning);
        assert_eq!(of(1).state, State::Ok);
        fs::create_dir(dir.0.join("gw")).unwrap();
        fs::write(dir.0.join("gw/a.jsonl"), [0; 3 * 1024]).unwrap();
        assert!(of(1).found.contains("3KiB wait already"), "{:?}", of(1));
    }

    #[test]
    fn sizes_are_told_in_one_unit() {
        let text = |bytes| rounded(bytes).to_string();
        assert_eq!([text(0), text(1_023), text(1_025)], ["0B", "1023B", "1KiB"]);
        assert_eq!(text((5 << 30) + 1), "5GiB");
    }
}
