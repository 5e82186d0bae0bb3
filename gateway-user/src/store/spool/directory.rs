//! A gateway's directory within the spool: who may use it, what is in it, and how its files are replaced.

use super::StoreError;
use super::names::{BatchId, Kind};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The file whose lock says that a gateway uses the directory.
const LOCK_FILE: &str = "lock";

/// Where rows go that cannot be stored.
pub const QUARANTINE_DIR: &str = "quarantine";

/// How long a start waits for the lock: a predecessor may still be closing, and a neighbour holds it for a moment while it looks for
/// files that were left behind.
const LOCK_WAIT: Duration = Duration::from_secs(3);

/// Time between two tries for the lock. The system has no lock with a timeout.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Holds a directory for this process; it is free again when this is dropped, or the process dies.
pub struct DirLock {
    _file: File,
}

impl DirLock {
    /// Makes the directory, if need be, and locks it.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process has it, otherwise [`StoreError::Io`].
    pub fn acquire(dir: &Path) -> Result<DirLock, StoreError> {
        std::fs::create_dir_all(dir).map_err(|source| StoreError::io("create", dir, source))?;
        let path = dir.join(LOCK_FILE);
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let mut file = open.map_err(|source| StoreError::io("open", &path, source))?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::Locked {
                        dir: dir.to_owned(),
                        holder: holder(&mut file),
                    });
                }
                Err(TryLockError::Error(source)) => return Err(StoreError::io("lock", &path, source)),
            }
        }
        // For people and for the message above; the lock itself does not depend on it.
        let noted = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        noted.map_err(|source| StoreError::io("write", &path, source))?;
        Ok(DirLock { _file: file })
    }

    /// Locks a directory that a gateway has used, if there is nobody in it right now.
    pub fn try_existing(dir: &Path) -> Option<DirLock> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.join(LOCK_FILE))
            .ok()?;
        file.try_lock().ok()?;
        Some(DirLock { _file: file })
    }
}

/// Who uses a directory right now, as far as it is known; `None` when nobody does, or none has ever.
pub fn user_of(dir: &Path) -> Option<String> {
    // Read only: it must not look like a gateway, nor need its rights.
    let mut file = File::open(dir.join(LOCK_FILE)).ok()?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Some(holder(&mut file)),
        _ => None,
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(32).read_to_string(&mut text));
    match read.ok().and_then(|_| text.trim().parse::<u32>().ok()) {
        Some(pid) => format!("process {pid}"),
        None => "a process that left no id".to_owned(),
    }
}

/// What is in a gateway's directory.
#[derive(Debug, Default)]
pub struct Listing {
    /// Sealed batches, oldest first.
    pub sealed: Vec<BatchId>,
    /// Segments.
    pub open: Vec<BatchId>,
    /// Files of journals.
    pub begins: Vec<BatchId>,
    /// Replacements that were never finished.
    pub unfinished: Vec<BatchId>,
    /// Names of files that no gateway wrote.
    pub foreign: Vec<String>,
}

impl Listing {
    /// Reads a directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn of(dir: &Path) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        let entries = std::fs::read_dir(dir).map_err(|source| StoreError::io("read", dir, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| StoreError::io("read", dir, source))?;
            let name = entry.file_name();
            // A directory is none of ours, whatever it is called.
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            match name.to_str().and_then(BatchId::of_file).filter(|_| is_file) {
                Some((id, Kind::Sealed)) => listing.sealed.push(id),
                Some((id, Kind::Open)) => listing.open.push(id),
                Some((id, Kind::Begins)) => listing.begins.push(id),
                Some((id, Kind::Unfinished)) => listing.unfinished.push(id),
                None if name == LOCK_FILE || name == QUARANTINE_DIR => {}
                None => listing.foreign.push(name.to_string_lossy().into_owned()),
            }
        }
        listing.sealed.sort();
        listing.open.sort();
        Ok(listing)
    }

    /// The latest boot that left anything here; 0 if none did.
    pub fn last_boot(&self) -> u64 {
        let all = [&self.sealed, &self.open, &self.begins, &self.unfinished];
        all.into_iter().flatten().map(|id| id.boot).max().unwrap_or(0)
    }
}

/// Puts a file in place that is either there whole, and on the disk, or not there at all.
///
/// # Errors
/// Those of the file system.
pub fn write_sealed(dir: &Path, id: &BatchId, parts: &[&[u8]]) -> io::Result<PathBuf> {
    let unfinished = dir.join(id.file_name(Kind::Unfinished));
    let mut file = File::create(&unfinished)?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    file.sync_all()?;
    let path = dir.join(id.file_name(Kind::Sealed));
    std::fs::rename(&unfinished, &path)?;
    sync_dir(dir)?;
    Ok(path)
}

/// Brings names to the disk.
///
/// # Errors
/// Those of the file system.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Puts rows aside, one JSON object a line: the reason, and the row, or the text of what is no row. Kept for people; nothing reads it.
///
/// # Errors
/// Those of the file system.
pub fn put_aside(dir: &Path, id: &BatchId, reason: &str, pieces: &[&[u8]]) -> io::Result<PathBuf> {
    let quarantine = dir.join(QUARANTINE_DIR);
    std::fs::create_dir_all(&quarantine)?;
    let (path, mut file) = free_name(&quarantine, id)?;
    for piece in pieces {
        let row = serde_json::from_slice::<serde_json::Value>(piece);
        let line = match row {
            Ok(row) => serde_json::json!({"reason": reason, "row": row}),
            Err(_) => serde_json::json!({"reason": reason, "text": String::from_utf8_lossy(piece)}),
        };
        writeln!(file, "{line}")?;
    }
    file.sync_all()?;
    Ok(path)
}

/// A batch can have rows put aside more than once; none overwrites another.
fn free_name(quarantine: &Path, id: &BatchId) -> io::Result<(PathBuf, File)> {
    let mut number = 0_u32;
    loop {
        let path = quarantine.join(format!("{}.{number}.jsonl", id.stem()));
        match File::create_new(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < u32::MAX => number += 1,
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::TempDir;
    use super::*;

    #[test]
    fn a_directory_has_one_gateway_and_the_second_is_told_which() {
        let dir = TempDir::new();
        let held = DirLock::acquire(dir.path()).expect("it is free");
        assert!(DirLock::try_existing(dir.path()).is_none());
        assert_eq!(
            user_of(dir.path()),
            Some(format!("process {}", std::process::id()))
        );
        let refused = DirLock::acquire(dir.path())
            .err()
            .expect("it is taken")
            .to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())),
            "{refused}"
        );
        drop(held);
        assert_eq!(user_of(dir.path()), None);
        assert!(DirLock::try_existing(dir.path()).is_some());
    }

    #[test]
    fn only_our_own_files_are_ours() {
        let dir = TempDir::new();
        let id = BatchId {
            boot: 5,
            sequence: 1,
            gateway: "gw".into(),
        };
        write_sealed(dir.path(), &id, &[b"{}\n"]).expect("it is written");
        put_aside(dir.path(), &id, "why", &[b"{}\n", b"no row"]).expect("it is written");
        std::fs::write(dir.path().join("notes.txt"), "mine").expect("it is written");
        let listing = Listing::of(dir.path()).expect("it is read");
        assert_eq!(
            (listing.sealed.as_slice(), listing.last_boot()),
            (&[id.clone()][..], 5)
        );
        assert_eq!(listing.foreign, ["notes.txt"]);
        let path = put_aside(dir.path(), &id, "again", &[b"{}\n"]).expect("it is written");
        assert!(path.ends_with("gw.000000000005-00000001.1.jsonl"));
        let first = dir.files_ending("-00000001.0.jsonl");
        let text = std::fs::read_to_string(&first[0]).expect("it is there");
        assert_eq!(
            text,
            "{\"reason\":\"why\",\"row\":{}}\n{\"reason\":\"why\",\"text\":\"no row\"}\n"
        );
    }
}
