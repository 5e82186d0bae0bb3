//! What waits in the spools of this host, for whoever reads figures and wants to know what they lack.
//!
//! Looks at the files only, so that it disturbs no gateway and needs none. What it sees is of one moment: files come and go while it looks.

use super::StoreError;
use super::directory::{Listing, QUARANTINE_DIR};
use super::names::{BatchId, Kind};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes that are looked at in one go.
const PIECE_BYTES: usize = 256 << 10;

/// Rows that ClickHouse does not have, as far as this host knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Rows that wait to be stored.
    pub rows: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files that they are in.
    pub batches: u64,
    /// When the file that waits longest was written last, microseconds since 1970.
    pub oldest_at_us: Option<i64>,
    /// Rows, and torn pieces of rows, that were put aside and will not be stored by themselves.
    pub quarantined_rows: u64,
}

impl Waiting {
    /// Looks into the directories of all gateways below `spool_dir`; `None` when there is no such directory, so that nobody can tell.
    ///
    /// # Errors
    /// When what is there cannot be read.
    pub fn below(spool_dir: &Path) -> Result<Option<Waiting>, StoreError> {
        let Some(dirs) = entries(spool_dir)? else {
            return Ok(None);
        };
        let mut waiting = Waiting::default();
        for dir in dirs.iter().filter(|dir| dir.is_dir()) {
            waiting.add_gateway(dir)?;
        }
        Ok(Some(waiting))
    }

    fn add_gateway(&mut self, dir: &Path) -> Result<(), StoreError> {
        let listing = Listing::of(dir)?;
        let sealed = listing.sealed.iter().map(|id| (id, Kind::Sealed));
        let open = listing.open.iter().map(|id| (id, Kind::Open));
        for (id, kind) in open.chain(sealed) {
            self.add_file(dir, id, kind)?;
        }
        for path in entries(&dir.join(QUARANTINE_DIR))?.unwrap_or_default() {
            let lines = lines_of(&path).map_err(|source| StoreError::io("read", &path, source))?;
            self.quarantined_rows += lines.map_or(0, |lines| lines.rows);
        }
        Ok(())
    }

    fn add_file(&mut self, dir: &Path, id: &BatchId, kind: Kind) -> Result<(), StoreError> {
        let path = dir.join(id.file_name(kind));
        let found = lines_of(&path).map_err(|source| StoreError::io("read", &path, source))?;
        let found = match (found, kind) {
            // Sealed since the directory was read: it is under its new name now, or stored already.
            (None, Kind::Open) => return self.add_file(dir, id, Kind::Sealed),
            (None, _) => return Ok(()),
            (Some(found), _) => found,
        };
        // A segment is of full size before it has any rows.
        if found.rows > 0 {
            self.rows += found.rows;
            self.bytes += found.bytes;
            self.batches += 1;
            let oldest = self.oldest_at_us.unwrap_or(i64::MAX);
            self.oldest_at_us = Some(oldest.min(found.written_at_us));
        }
        Ok(())
    }
}

/// Whole lines of a file.
struct FileLines {
    rows: u64,
    bytes: u64,
    written_at_us: i64,
}

/// Counts lines; `None` when there is no such file any more. What stands behind the last line end is no row (yet).
fn lines_of(path: &Path) -> io::Result<Option<FileLines>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let written = file.metadata()?.modified()?;
    let mut lines = FileLines {
        rows: 0,
        bytes: 0,
        written_at_us: micros(written),
    };
    let (mut piece, mut before) = (vec![0; PIECE_BYTES], 0);
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            return Ok(Some(lines));
        }
        for at in memchr::memchr_iter(b'\n', &piece[..read]) {
            lines.rows += 1;
            lines.bytes = before + at as u64 + 1;
        }
        before += read as u64;
    }
}

fn micros(time: SystemTime) -> i64 {
    let since_1970 = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX)
}

/// What is in a directory; `None` when there is none.
fn entries(dir: &Path) -> Result<Option<Vec<PathBuf>>, StoreError> {
    let found = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()),
    };
    found
        .map(Some)
        .map_err(|source| StoreError::io("read", dir, source))
}

#[cfg(test)]
mod tests {
    use super::super::testing::TempDir;
    use super::super::{Store, directory};
    use super::*;
    use crate::config::{ByteSize, SpoolConfig};

    fn id(sequence: u64) -> BatchId {
        BatchId {
            boot: 1,
            sequence,
            gateway: "dead".into(),
        }
    }

    #[test]
    fn without_a_spool_it_is_unknown_what_waits() {
        let dir = TempDir::new();
        let nowhere = dir.path().join("nowhere");
        assert_eq!(Waiting::below(&nowhere).expect("it looks"), None);
        assert_eq!(
            Waiting::below(dir.path()).expect("it looks"),
            Some(Waiting::default())
        );
    }

    #[test]
    fn rows_of_living_and_dead_gateways_wait_sealed_or_not() {
        let dir = TempDir::new();
        let dead = dir.path().join("dead");
        std::fs::create_dir_all(&dead).expect("a directory");
        directory::write_sealed(&dead, &id(1), &[b"{\"a\":1}\n{\"a\":2}\n"]).expect("it is written");
        // What a kill leaves of a segment: two rows, a torn one, and room.
        let open = [b"{\"a\":3}\n{\"a\":4}\n\0\"a\":5".as_slice(), &[0; 4096]].concat();
        std::fs::write(dead.join(id(2).file_name(Kind::Open)), open).expect("it is written");
        directory::put_aside(&dead, &id(1), "why", &[b"{}", b"{}", b"{}"]).expect("it is written");
        let config = SpoolConfig {
            dir: dir.path().to_owned(),
            segment_bytes: ByteSize::from_kib(64),
            ..SpoolConfig::default()
        };
        let before = Waiting::below(dir.path()).expect("it looks").expect("a spool");
        assert_eq!(
            (before.rows, before.bytes, before.batches, before.quarantined_rows),
            (4, 32, 2, 3)
        );
        assert!(before.oldest_at_us.is_some());
        // Beside it one that runs, with a row; its spare segments are no batches.
        let store = Store::open(&config, "living").expect("it opens");
        drop(store.spool().append(b"{\"event_id\":\"e\"}").expect("room"));
        let after = Waiting::below(dir.path()).expect("it looks").expect("a spool");
        assert_eq!((after.rows, after.batches), (5, 3));
    }
}
