//! A file of fixed size in memory, filled without system calls.
//!
//! The file's blocks are reserved and its pages are made writable before anybody waits for them, so that adding to it is a copy. What
//! was copied belongs to the kernel's page cache at once: it survives the death of the process, though not of the machine.
//!
//! A piece is committed by its first byte, which is stored last; what is not used is zero. Since no piece begins with a zero byte, a
//! piece that was being copied when the process died can be told from one that was there.
//!
//! Left out: on a file system that copies on write (btrfs, ZFS, APFS) reserved blocks do not guarantee that a write finds room; there a
//! full disk can end the process with SIGBUS. Whoever truncates a segment under a running gateway gets the same.

use memmap2::MmapRaw;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// The memory of a segment, shared with whoever makes its pages ready.
pub struct Mapping(MmapRaw);

impl Mapping {
    /// Makes pages writable now, so that the first write to each does not have to enter the kernel. A mere help: where the system
    /// cannot do that, the write itself will.
    pub fn populate(&self, range: Range<usize>) {
        let end = range.end.min(self.0.len());
        if range.start < end {
            #[cfg(target_os = "linux")]
            let _ = self
                .0
                .advise_range(memmap2::Advice::PopulateWrite, range.start, end - range.start);
        }
    }

    /// To be called before the file is flushed: gives the file what was written to memory. On Linux it has that already; elsewhere
    /// nothing says so.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_back(&self) -> io::Result<()> {
        #[cfg(not(target_os = "linux"))]
        self.0.flush()?;
        Ok(())
    }
}

/// A preallocated file of zeros in memory. Whoever owns it is the only one who writes.
pub struct Segment {
    mapping: Arc<Mapping>,
    file: Arc<File>,
    path: PathBuf,
}

impl Segment {
    /// Makes the file and reserves all of it.
    ///
    /// # Errors
    /// Those of the file system; then there is no file. A file of this name that exists is left as it is.
    pub fn create(path: &Path, bytes: usize) -> io::Result<Segment> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        let mapped = reserve(&file, bytes).and_then(|()| MmapRaw::map_raw(&file));
        match mapped {
            Ok(map) => {
                let mapping = Arc::new(Mapping(map));
                Ok(Segment {
                    mapping,
                    file: Arc::new(file),
                    path: path.to_owned(),
                })
            }
            Err(error) => {
                // An empty file that stays behind is dealt with at the next start.
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    /// How much fits.
    pub fn capacity(&self) -> usize {
        self.mapping.0.len()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, to be flushed.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The memory, to be made ready, and written back.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Copies the parts behind each other to `at` and commits them as one piece. False, and nothing done, when they do not fit.
    ///
    /// The byte at `at` must be zero, or what it commits is not new.
    pub fn put(&mut self, at: usize, parts: &[&[u8]]) -> bool {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let Some(&first) = parts.first().and_then(|part| part.first()) else {
            return false;
        };
        if at.checked_add(bytes).is_none_or(|end| end > self.capacity()) {
            return false;
        }
        let base = self.mapping.0.as_mut_ptr();
        let mut to = at;
        for (index, part) in parts.iter().enumerate() {
            let skipped = usize::from(index == 0);
            let rest = &part[skipped..];
            // SAFETY: `at..at + bytes` was found to lie within the mapping, which lives as long as `self`. `&mut self` is the only way
            // to its bytes (`Mapping` gives none out), so nobody reads or writes them meanwhile, and `rest` is no part of it.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), base.add(to + skipped), rest.len()) };
            to += part.len();
        }
        self.store_first(at, first);
        true
    }

    /// Takes a piece back: whoever reads the file does not see it any more.
    pub fn clear(&mut self, at: usize) {
        if at < self.capacity() {
            self.store_first(at, 0);
        }
    }

    fn store_first(&mut self, at: usize, byte: u8) {
        debug_assert!(at < self.capacity());
        // SAFETY: callers have checked that `at` lies within the mapping; a byte is always aligned. Release keeps the copies that come
        // before it in the program before it in memory: the process can die between any two instructions.
        unsafe { AtomicU8::from_ptr(self.mapping.0.as_mut_ptr().add(at)) }.store(byte, Ordering::Release);
    }
}

/// Reserves blocks for the whole file; where the file system cannot reserve, zeros are written.
fn reserve(file: &File, bytes: usize) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let mode = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(file, mode, 0, bytes as u64) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    write_zeros(file, bytes)
}

fn write_zeros(mut file: &File, bytes: usize) -> io::Result<()> {
    static BLOCK: [u8; 64 * 1024] = [0; 64 * 1024];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(BLOCK.len());
        io::Write::write_all(&mut file, &BLOCK[..now])?;
        left -= now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::TempDir;
    use super::*;

    #[test]
    fn what_was_put_is_in_the_file_and_the_rest_is_zero() {
        let dir = TempDir::new();
        let path = dir.path().join("s");
        let mut segment = Segment::create(&path, 8192).expect("it is made");
        assert!(segment.put(0, &[b"{\"a\":", b"1}\n"]));
        assert!(segment.put(8, &[b"x"]));
        let bytes = std::fs::read(&path).expect("it is there");
        assert_eq!(bytes.len(), 8192);
        assert_eq!(&bytes[..10], b"{\"a\":1}\nx\0");
        segment.clear(0);
        assert_eq!(std::fs::read(&path).expect("it is there")[..2], *b"\0\"");
    }

    /// A page without a block behind it would end the process with SIGBUS when the disk is full.
    #[cfg(target_os = "linux")]
    #[test]
    fn every_page_has_its_block_before_it_is_written_to() {
        use std::os::unix::fs::MetadataExt;

        let dir = TempDir::new();
        let path = dir.path().join("s");
        let segment = Segment::create(&path, 1 << 20).expect("it is made");
        let reserved = std::fs::metadata(&path).expect("it is there").blocks() * 512;
        assert!(reserved >= segment.capacity() as u64, "{reserved} bytes");
    }

    #[test]
    fn what_does_not_fit_leaves_no_trace() {
        let dir = TempDir::new();
        let path = dir.path().join("s");
        let mut segment = Segment::create(&path, 4096).expect("it is made");
        assert!(!segment.put(4090, &[b"1234", b"567"]));
        assert!(!segment.put(usize::MAX, &[b"1"]));
        assert!(!segment.put(0, &[]));
        assert!(segment.put(4090, &[b"1234", b"56"]));
        assert!(
            std::fs::read(&path).expect("it is there")[..4090]
                .iter()
                .all(|byte| *byte == 0)
        );
    }

    #[test]
    fn zeros_are_written_where_blocks_cannot_be_reserved() {
        let dir = TempDir::new();
        let file = File::create_new(dir.path().join("s")).expect("it is made");
        write_zeros(&file, 100_000).expect("it is written");
        assert_eq!(file.metadata().expect("it is there").len(), 100_000);
    }

    #[test]
    fn a_file_that_exists_is_not_overwritten() {
        let dir = TempDir::new();
        let path = dir.path().join("s");
        std::fs::write(&path, "mine").expect("it is written");
        assert!(Segment::create(&path, 4096).is_err());
        assert_eq!(std::fs::read(&path).expect("it is there"), b"mine");
    }
}
