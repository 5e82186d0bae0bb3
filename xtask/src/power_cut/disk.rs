//! What a disk holds after its power was cut.
//!
//! # What may be relied on
//!
//! QEMU's own image would be too kind: its writes sit in the host's page cache, which outlives a killed QEMU, so that everything the
//! guest had ever written would be there. A disk promises less: a write may sit in its cache until the next flush. So the image is
//! made anew from QEMU's log of writes (`blklogwrites`): all that stands before the last flush that the disk had completed is there, and
//! of what came after it nothing, everything, or any choice of it. Writes are cut in pieces of 4 KiB, a page and a physical sector of
//! today's disks: a longer one can arrive in part.
//!
//! A write that was under way while a flush ran counts as flushed when it was logged first. A disk might have lost it too, but nobody had
//! been told that it was done.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::stage::run;

/// The first number of a log, as `drivers/md/dm-log-writes.c` defines it.
const MAGIC: u64 = 0x006a_7366_7773_6872;

/// The log's own unit; the disk is told to have the same.
const SECTOR_BYTES: usize = 512;

/// An entry of the log that is a flush.
const FLUSH: u64 = 1;

/// An entry without data, which takes some away.
const DISCARD: u64 = 4;

/// What reaches the disk as a whole or not at all.
const PIECE_BYTES: usize = 4096;

/// What becomes of the writes that no flush had followed.
#[derive(Clone, Copy, Debug)]
pub enum Unflushed {
    /// They were in the disk's cache only.
    Gone,
    /// The disk had written them, by chance.
    There,
    /// Each piece is there or not; which, follows from this number.
    Torn(u64),
}

/// What was written to a disk, in order.
#[derive(Debug)]
pub struct WriteLog {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    /// Place on the disk.
    disk_at: u64,
    /// Place and size of its data in the log.
    data_at: usize,
    data_bytes: usize,
    is_flush: bool,
}

impl WriteLog {
    /// Reads a log that may have been cut anywhere.
    ///
    /// # Errors
    /// When it cannot be read, or is no such log.
    pub fn read(path: &Path) -> Result<WriteLog> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        WriteLog::parse(bytes).with_context(|| format!("{} is no log of writes", path.display()))
    }

    fn parse(bytes: Vec<u8>) -> Result<WriteLog> {
        ensure!(
            number(&bytes, 0) == Some(MAGIC),
            "expected it to begin with {MAGIC:#x}, found {:#x?}",
            number(&bytes, 0)
        );
        let (mut entries, mut at) = (Vec::new(), SECTOR_BYTES);
        // The count in the first sector is brought up to date now and then only; entries end where there are zeros.
        while let (Some(sector), Some(sectors), Some(flags)) = (
            number(&bytes, at),
            number(&bytes, at + 8),
            number(&bytes, at + 16),
        ) {
            if (sectors, flags) == (0, 0) {
                break;
            }
            ensure!(
                flags & DISCARD == 0,
                "the file system discards blocks, which this does not follow"
            );
            let (data_at, data_bytes) = (at + SECTOR_BYTES, sectors as usize * SECTOR_BYTES);
            if data_at + data_bytes > bytes.len() {
                break;
            }
            entries.push(Entry {
                disk_at: sector * SECTOR_BYTES as u64,
                data_at,
                data_bytes,
                is_flush: flags & FLUSH != 0,
            });
            at = data_at + data_bytes;
        }
        Ok(WriteLog { bytes, entries })
    }

    /// How many writes no flush had followed when the log had `log_bytes`.
    pub fn unflushed(&self, log_bytes: u64) -> usize {
        let written = self.until(log_bytes);
        written.len() - flushed(written)
    }

    /// Makes `image`, which holds what the disk held at first, into what it holds after a cut at the moment when the log had
    /// `log_bytes`. Returns how many writes no flush had followed.
    ///
    /// # Errors
    /// When the image cannot be written.
    pub fn replay(&self, log_bytes: u64, unflushed: Unflushed, image: &Path) -> Result<usize> {
        let written = self.until(log_bytes);
        let flushed = flushed(written);
        let mut file = File::options().write(true).open(image)?;
        let mut draws = Draws::of(unflushed);
        for (index, entry) in written.iter().enumerate() {
            let data = &self.bytes[entry.data_at..entry.data_at + entry.data_bytes];
            for (disk_at, piece) in pieces(entry.disk_at, data) {
                if index < flushed || draws.is_there() {
                    file.seek(SeekFrom::Start(disk_at))?;
                    file.write_all(piece)
                        .with_context(|| format!("cannot write {}", image.display()))?;
                }
            }
        }
        Ok(written.len() - flushed)
    }

    /// What was written when the log had `log_bytes`.
    fn until(&self, log_bytes: u64) -> &[Entry] {
        let is_within = |entry: &Entry| (entry.data_at + entry.data_bytes) as u64 <= log_bytes;
        &self.entries[..self.entries.partition_point(is_within)]
    }
}

/// How many of the writes, from the first, the last flush covers.
fn flushed(written: &[Entry]) -> usize {
    written
        .iter()
        .rposition(|entry| entry.is_flush)
        .map_or(0, |last| last + 1)
}

/// The pieces of a write, each with its place on the disk.
fn pieces(disk_at: u64, mut data: &[u8]) -> Vec<(u64, &[u8])> {
    let (mut at, mut found) = (disk_at, Vec::new());
    while !data.is_empty() {
        let to_boundary = PIECE_BYTES - (at % PIECE_BYTES as u64) as usize;
        let (piece, rest) = data.split_at(to_boundary.min(data.len()));
        found.push((at, piece));
        at += piece.len() as u64;
        data = rest;
    }
    found
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at + 8)?.first_chunk()?;
    Some(u64::from_le_bytes(*word))
}

/// Which pieces are there.
enum Draws {
    Same(bool),
    /// The state of SplitMix64: the same number gives the same disk.
    Random(u64),
}

impl Draws {
    fn of(unflushed: Unflushed) -> Draws {
        match unflushed {
            Unflushed::Gone => Draws::Same(false),
            Unflushed::There => Draws::Same(true),
            Unflushed::Torn(seed) => Draws::Random(seed),
        }
    }

    fn is_there(&mut self) -> bool {
        match self {
            Draws::Same(there) => *there,
            Draws::Random(state) => {
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                (mixed ^ (mixed >> 31)) & 1 == 1
            }
        }
    }
}

/// Makes an image with an empty ext4.
///
/// # Errors
/// When there is no room, or no `mke2fs`.
pub fn make(image: &Path, bytes: u64) -> Result<()> {
    let file = File::create(image).with_context(|| format!("cannot make {}", image.display()))?;
    file.set_len(bytes)?;
    // Nothing is left for the guest's kernel to write in the background.
    let finished = "lazy_itable_init=0,lazy_journal_init=0,nodiscard";
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-E", finished])
        .arg(image))
}

/// Brings the file system of an image back in order, as a boot would: the journal is replayed.
///
/// # Errors
/// When it is beyond repair.
pub fn repair(image: &Path) -> Result<()> {
    let mut command = Command::new("e2fsck");
    let output = command
        .arg("-fy")
        .arg(image)
        .output()
        .context("cannot start e2fsck")?;
    // 1 says that something was corrected, such as a journal that was not empty.
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "{command:?} ended with {}:\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}

/// Copies the directory `name` of an image's root into `to`. False when there is none.
///
/// # Errors
/// When it cannot be copied.
pub fn extract(image: &Path, name: &str, to: &Path) -> Result<bool> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let mut command = Command::new("debugfs");
    command
        .arg("-R")
        .arg(format!("rdump /{name} {}", to.display()))
        .arg(image)
        .stdin(Stdio::null());
    let output = command.output().context("cannot start debugfs")?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}",
        output.status
    );
    Ok(to.join(name).is_dir())
}

/// Copies an image without writing its holes.
///
/// # Errors
/// When there is no room.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let (mut source, mut target) = (File::open(from)?, File::create(to)?);
    target.set_len(source.metadata()?.len())?;
    let mut block = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let read = source.read(&mut block)?;
        if read == 0 {
            return Ok(());
        }
        if block[..read].iter().any(|byte| *byte != 0) {
            target.seek(SeekFrom::Start(at))?;
            target
                .write_all(&block[..read])
                .with_context(|| format!("cannot write {}", to.display()))?;
        }
        at += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of (sector, content, is flush).
    fn log(entries: &[(u64, &[u8], bool)]) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR_BYTES];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        for (sector, data, is_flush) in entries {
            let mut head = [0; SECTOR_BYTES];
            head[..8].copy_from_slice(&sector.to_le_bytes());
            head[8..16].copy_from_slice(&((data.len() / SECTOR_BYTES) as u64).to_le_bytes());
            head[16] = u8::from(*is_flush);
            bytes.extend_from_slice(&head);
            bytes.extend_from_slice(data);
        }
        bytes
    }

    fn replayed(log: &WriteLog, log_bytes: u64, unflushed: Unflushed) -> (usize, Vec<u8>) {
        let image = std::env::temp_dir().join(format!(
            "xtask-replay-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        fs::write(&image, [b'.'; 32 * SECTOR_BYTES]).expect("room");
        let count = log
            .replay(log_bytes, unflushed, &image)
            .expect("it can be written");
        let bytes = fs::read(&image).expect("it is there");
        fs::remove_file(&image).expect("it is there");
        // One letter a sector.
        (count, bytes.iter().copied().step_by(SECTOR_BYTES).collect())
    }

    #[test]
    fn only_what_was_flushed_is_certain_to_be_there() {
        let long = [b'c'; 16 * SECTOR_BYTES];
        let bytes = log(&[
            (0, &[b'a'; SECTOR_BYTES], false),
            (0, &[], true),
            (1, &[b'b'; SECTOR_BYTES], false),
            (8, &long, false),
        ]);
        let whole = bytes.len() as u64;
        let log = WriteLog::parse(bytes).expect("a log");
        let (count, gone) = replayed(&log, whole, Unflushed::Gone);
        assert_eq!((count, &gone[..2]), (2, &b"a."[..]));
        assert!(gone[2..].iter().all(|letter| *letter == b'.'));
        let (_, there) = replayed(&log, whole, Unflushed::There);
        assert_eq!(&there[..2], b"ab");
        assert_eq!(&there[8..24], [b'c'; 16]);
        let torn: Vec<_> = (0..64)
            .map(|seed| replayed(&log, whole, Unflushed::Torn(seed)).1)
            .collect();
        assert!(
            torn.iter().all(|disk| disk[0] == b'a'),
            "what was flushed is there"
        );
        let halves = |disk: &Vec<u8>| (disk[8] == b'c', disk[16] == b'c');
        for wanted in [(true, true), (true, false), (false, true), (false, false)] {
            assert!(torn.iter().any(|disk| halves(disk) == wanted), "never {wanted:?}");
        }
        assert!(
            torn.iter()
                .all(|disk| disk[8..16].iter().all(|letter| *letter == disk[8])),
            "a piece is whole"
        );
    }

    #[test]
    fn an_earlier_moment_knows_nothing_of_what_came_later() {
        let bytes = log(&[
            (0, &[b'a'; SECTOR_BYTES], false),
            (0, &[], true),
            (1, &[b'b'; SECTOR_BYTES], false),
            (0, &[], true),
        ]);
        let log = WriteLog::parse(bytes).expect("a log");
        let after_a = (3 * SECTOR_BYTES) as u64;
        assert_eq!(&replayed(&log, after_a, Unflushed::Gone).1[..2], b"..");
        let after_flush = after_a + SECTOR_BYTES as u64;
        assert_eq!(&replayed(&log, after_flush, Unflushed::Gone).1[..2], b"a.");
        assert_eq!(&replayed(&log, u64::MAX, Unflushed::Gone).1[..2], b"ab");
    }

    #[test]
    fn a_log_that_was_cut_ends_before_its_unfinished_entry() {
        let mut bytes = log(&[
            (0, &[b'a'; SECTOR_BYTES], false),
            (1, &[b'b'; 2 * SECTOR_BYTES], false),
        ]);
        bytes.truncate(bytes.len() - SECTOR_BYTES);
        assert_eq!(WriteLog::parse(bytes).expect("a log").entries.len(), 1);
        assert!(WriteLog::parse(vec![0; 1024]).is_err());
    }
}
