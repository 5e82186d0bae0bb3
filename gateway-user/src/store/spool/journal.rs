//! Requests that have begun and whose end is not yet kept: what a crash would otherwise make disappear.
//!
//! The journal is a table of slots in memory-mapped files. A request takes a slot when its team is known, adds its upstream and model
//! when they are, and gives the slot back once its row is kept as durably as `spool.fsync` says. So the files are as large as the most
//! requests that were ever in flight at a time (2 KiB each), and there is nothing to rotate. It is never sent.
//!
//! Each slot holds JSON lines and then zeros: `tr -d '\0' < FILE | jq` shows who is on the way.
//!
//! Left out: when the disk is full or a record does not fit, the request goes on and its begin is missing, which is counted. A power
//! loss can take the begins since the last flush, under `each` too: nobody waits for them.

use super::lock;
use super::names::{BatchId, Kind};
use super::segment::Segment;
use crate::event::{Begin, CapturedBy};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A record has four names of up to 128 bytes, each of which JSON may double, and some 400 bytes besides; the rest is for the update.
const SLOT_BYTES: usize = 2048;

/// Slots of one file: 4 MiB.
const SLOTS_PER_FILE: u32 = 2048;

/// When fewer slots than this are free, the next file is made: the requests of some hundred milliseconds at a high load.
const SLOTS_SPARE_MIN: usize = 512;

/// A model's name comes from the client and may be as long as a body. A real one is shorter than this.
const MODEL_BYTES_MAX: usize = 256;

/// A slot's number, over all files.
pub type Slot = u32;

/// The requests in flight.
pub struct Journal {
    dir: PathBuf,
    /// Of the first file; each further one has the next sequence.
    id: BatchId,
    table: Mutex<Table>,
    missed: AtomicU64,
    /// Whether there is anything that a flush would write.
    dirty: AtomicBool,
    /// Whether the last file could not be made: the keeper tries again, requests do not.
    stuck: AtomicBool,
    /// Whether there is one at all.
    is_kept: bool,
}

#[derive(Default)]
struct Table {
    files: Vec<Segment>,
    free: Vec<Slot>,
    open: HashMap<Box<str>, Taken>,
    /// Reused for every record.
    line: Vec<u8>,
}

struct Taken {
    slot: Slot,
    /// Bytes of the slot that are used, its ending zero apart.
    used: usize,
}

/// What is learned of a request after its begin.
#[derive(Serialize)]
struct Update<'a> {
    upstream: Option<&'a str>,
    model: Option<&'a str>,
}

impl Journal {
    /// A journal with its first file, in a directory that is locked.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(dir: PathBuf, gateway: &str, boot: u64) -> io::Result<Journal> {
        let id = BatchId {
            boot,
            sequence: 1,
            gateway: gateway.into(),
        };
        let journal = Journal::unopened(dir, id, true);
        journal.grow(0)?;
        Ok(journal)
    }

    /// None, for rows whose coming nobody announces: it has no file, and takes no note.
    pub fn none() -> Journal {
        let id = BatchId {
            boot: 0,
            sequence: 0,
            gateway: "".into(),
        };
        Journal::unopened(PathBuf::new(), id, false)
    }

    fn unopened(dir: PathBuf, id: BatchId, is_kept: bool) -> Journal {
        Journal {
            dir,
            id,
            table: Mutex::default(),
            missed: AtomicU64::new(0),
            dirty: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            is_kept,
        }
    }

    /// Takes note of a request, or of what is new about one that is noted.
    pub fn begin(&self, begin: &Begin<'_>) {
        let model = begin
            .model
            .map(|model| &model[..model.floor_char_boundary(MODEL_BYTES_MAX)]);
        let mut table = lock(&self.table);
        let table = &mut *table;
        if let Some(taken) = table.open.get_mut(begin.event_id) {
            write_line(
                &mut table.line,
                &Update {
                    upstream: begin.upstream,
                    model,
                },
            );
            let (file, at) = place(taken.slot);
            // An update that does not fit is left out: who began, and when, is what matters.
            if taken.used + table.line.len() < SLOT_BYTES
                && table.files[file].put(at + taken.used, &[&table.line, b"\0"])
            {
                taken.used += table.line.len();
            }
        } else {
            write_line(
                &mut table.line,
                &Begin {
                    model,
                    ..begin.clone()
                },
            );
            if table.line.len() >= SLOT_BYTES || !self.take_slot(table, begin.event_id) {
                self.missed.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
        self.dirty.store(true, Ordering::Release);
    }

    /// The slot of a request that has ended; to be freed once its row is kept. `None` if its begin is not noted.
    pub fn ended(&self, event_id: &str) -> Option<Slot> {
        lock(&self.table).open.remove(event_id).map(|taken| taken.slot)
    }

    /// Gives slots back: their requests need no record any more.
    pub fn free(&self, slots: &[Slot]) {
        if slots.is_empty() {
            return;
        }
        let mut table = lock(&self.table);
        for &slot in slots {
            let (file, at) = place(slot);
            table.files[file].clear(at);
            table.free.push(slot);
        }
        self.dirty.store(true, Ordering::Release);
    }

    /// How many requests are in flight.
    pub fn open(&self) -> usize {
        lock(&self.table).open.len()
    }

    /// How many begins could not be noted.
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    /// Makes room ahead of need. For a thread that may wait.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn tend(&self) -> io::Result<()> {
        let (files, free) = {
            let table = lock(&self.table);
            (table.files.len(), table.free.len())
        };
        if self.is_kept && free < SLOTS_SPARE_MIN {
            self.grow(files)
        } else {
            Ok(())
        }
    }

    /// Brings everything so far to the disk. For a thread that may wait.
    ///
    /// # Errors
    /// Those of the file system; then the next flush tries again.
    pub fn flush(&self) -> io::Result<()> {
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let files: Vec<_> = lock(&self.table)
            .files
            .iter()
            .map(|segment| (segment.mapping().clone(), segment.file().clone()))
            .collect();
        files
            .iter()
            .try_for_each(|(mapping, file)| mapping.write_back().and_then(|()| file.sync_data()))
            .inspect_err(|_| self.dirty.store(true, Ordering::Release))
    }

    /// Removes the files, unless a request is still in flight: then the next start will find it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn close(&self) -> io::Result<()> {
        let mut table = lock(&self.table);
        if table.open.is_empty() {
            table.free.clear();
            for segment in table.files.drain(..) {
                std::fs::remove_file(segment.path())?;
            }
        }
        Ok(())
    }

    /// Writes the record that stands in `table.line` into a free slot.
    fn take_slot(&self, table: &mut Table, event_id: &str) -> bool {
        if table.free.is_empty() && (self.stuck.load(Ordering::Relaxed) || self.grow_locked(table).is_err()) {
            return false;
        }
        let Some(slot) = table.free.pop() else {
            return false;
        };
        let (file, at) = place(slot);
        // The zero behind the line hides what the slot's last owner had there.
        table.files[file].put(at, &[&table.line, b"\0"]);
        table.open.insert(
            event_id.into(),
            Taken {
                slot,
                used: table.line.len(),
            },
        );
        true
    }

    /// Adds a file, unless somebody has since there were `known` of them.
    fn grow(&self, known: usize) -> io::Result<()> {
        let segment = self
            .make(known)
            .inspect_err(|_| self.stuck.store(true, Ordering::Relaxed))?;
        let mut table = lock(&self.table);
        if table.files.len() == known {
            add_file(&mut table, segment);
        }
        self.stuck.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn grow_locked(&self, table: &mut Table) -> io::Result<()> {
        let segment = self
            .make(table.files.len())
            .inspect_err(|_| self.stuck.store(true, Ordering::Relaxed))?;
        add_file(table, segment);
        Ok(())
    }

    fn make(&self, number: usize) -> io::Result<Segment> {
        let id = BatchId {
            sequence: self.id.sequence + number as u64,
            ..self.id.clone()
        };
        let path = self.dir.join(id.file_name(Kind::Begins));
        let segment = Segment::create(&path, SLOT_BYTES * SLOTS_PER_FILE as usize)?;
        // The slots that are used first; the others follow as they are needed.
        segment.mapping().populate(0..SLOT_BYTES * SLOTS_SPARE_MIN);
        Ok(segment)
    }
}

fn add_file(table: &mut Table, segment: Segment) {
    // The number of files is bounded by the requests in flight, far below what a slot's number can hold.
    let first = table.files.len() as Slot * SLOTS_PER_FILE;
    table.files.push(segment);
    // The last one freed is the next one used, so that a quiet gateway keeps to a few pages.
    table.free.extend((first..first + SLOTS_PER_FILE).rev());
}

fn place(slot: Slot) -> (usize, usize) {
    (
        (slot / SLOTS_PER_FILE) as usize,
        (slot % SLOTS_PER_FILE) as usize * SLOT_BYTES,
    )
}

fn write_line(into: &mut Vec<u8>, record: &impl Serialize) {
    into.clear();
    // Plain structs of texts and numbers: there is nothing in them that JSON cannot say, and memory is no file that could be full.
    let _ = serde_json::to_writer(&mut *into, record);
    into.push(b'\n');
}

/// A request whose end the gateway did not live to see.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[allow(missing_docs, reason = "the fields are those of `Begin`")]
pub struct Unended {
    pub event_id: Box<str>,
    pub started_at_us: i64,
    pub gateway_id: Box<str>,
    /// Journals of versions without a tap do not say.
    #[serde(default)]
    pub capture: CapturedBy,
    pub team_id: Box<str>,
    pub project: Option<Box<str>>,
    pub user_id: Option<Box<str>>,
    pub endpoint: Box<str>,
    pub request_id: Box<str>,
    pub trace_id: Option<Box<str>>,
    pub upstream: Option<Box<str>>,
    pub model: Option<Box<str>>,
}

#[derive(Deserialize)]
struct Updated {
    upstream: Option<Box<str>>,
    model: Option<Box<str>>,
}

/// The requests in a journal's file, and how many slots cannot be read, which only a power loss brings about.
pub fn read(bytes: &[u8]) -> (Vec<Unended>, u64) {
    let (mut found, mut unreadable) = (Vec::new(), 0);
    for slot in bytes.chunks(SLOT_BYTES).filter(|slot| slot[0] != 0) {
        let used = &slot[..memchr::memchr(0, slot).unwrap_or(slot.len())];
        let mut lines = used.split_inclusive(|byte| *byte == b'\n');
        let begin = lines
            .next()
            .and_then(|line| serde_json::from_slice::<Unended>(line).ok());
        let Some(mut begin) = begin else {
            unreadable += 1;
            continue;
        };
        for update in lines.filter_map(|line| serde_json::from_slice::<Updated>(line).ok()) {
            begin.upstream = update.upstream.or(begin.upstream);
            begin.model = update.model.or(begin.model);
        }
        found.push(begin);
    }
    (found, unreadable)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{TempDir, begin};
    use super::*;

    fn on_disk(dir: &TempDir) -> Vec<Unended> {
        let mut all = Vec::new();
        for path in dir.files_ending(".begins") {
            let (found, unreadable) = read(&std::fs::read(path).expect("it is there"));
            assert_eq!(unreadable, 0);
            all.extend(found);
        }
        all
    }

    #[test]
    fn a_begin_is_on_disk_with_what_was_learned_since_until_it_is_freed() {
        let dir = TempDir::new();
        let journal = Journal::create(dir.path().to_owned(), "gw", 1).expect("it is made");
        journal.begin(&begin("gw-1-1"));
        journal.begin(&begin("gw-1-2"));
        journal.begin(&Begin {
            upstream: Some("chat"),
            model: Some("llama"),
            ..begin("gw-1-1")
        });
        let mut found = on_disk(&dir);
        found.sort_by(|left, right| left.event_id.cmp(&right.event_id));
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].upstream.as_deref(), found[0].model.as_deref()),
            (Some("chat"), Some("llama"))
        );
        assert_eq!(
            (&*found[1].team_id, found[1].upstream.as_deref()),
            ("team-a", None)
        );
        let slot = journal.ended("gw-1-1").expect("it was noted");
        assert_eq!(on_disk(&dir).len(), 2, "an end that is not yet kept is none");
        journal.free(&[slot]);
        assert_eq!(&*on_disk(&dir)[0].event_id, "gw-1-2");
        assert_eq!(journal.ended("gw-1-1"), None);
    }

    #[test]
    fn a_slots_next_owner_inherits_nothing() {
        let dir = TempDir::new();
        let journal = Journal::create(dir.path().to_owned(), "gw", 1).expect("it is made");
        journal.begin(&begin("gw-1-1"));
        journal.begin(&Begin {
            upstream: Some("chat"),
            ..begin("gw-1-1")
        });
        let slot = journal.ended("gw-1-1").expect("it was noted");
        journal.free(&[slot]);
        journal.begin(&begin("gw-1-2"));
        let found = on_disk(&dir);
        assert_eq!((found.len(), &found[0].upstream), (1, &None));
    }

    #[test]
    fn the_table_grows_with_the_requests_in_flight_and_not_with_their_number() {
        let dir = TempDir::new();
        let journal = Journal::create(dir.path().to_owned(), "gw", 1).expect("it is made");
        for number in 0..3 * SLOTS_PER_FILE {
            let id = format!("gw-1-{number:x}");
            journal.begin(&begin(&id));
            let slot = journal.ended(&id).expect("it was noted");
            journal.free(&[slot]);
        }
        assert_eq!(dir.files_ending(".begins").len(), 1);
        for number in 0..=SLOTS_PER_FILE {
            journal.begin(&begin(&format!("gw-2-{number:x}")));
        }
        assert_eq!(dir.files_ending(".begins").len(), 2);
        assert_eq!(on_disk(&dir).len(), SLOTS_PER_FILE as usize + 1);
        assert_eq!(journal.missed(), 0);
    }

    #[test]
    fn the_longest_names_fit_and_an_endless_model_is_cut() {
        let dir = TempDir::new();
        let journal = Journal::create(dir.path().to_owned(), "gw", 1).expect("it is made");
        let quotes = "\"".repeat(128);
        let model = "é".repeat(100_000);
        let long = Begin {
            team_id: &quotes,
            project: Some(&quotes),
            user_id: Some(&quotes),
            request_id: &quotes,
            model: Some(&model),
            ..begin("gw-1-1")
        };
        journal.begin(&long);
        let found = on_disk(&dir);
        assert_eq!(&*found[0].team_id, &*quotes);
        assert_eq!(found[0].model.as_deref(), Some(&*"é".repeat(128)));
        assert_eq!(journal.missed(), 0);
    }

    #[test]
    fn a_closed_journal_leaves_files_only_for_requests_in_flight() {
        let dir = TempDir::new();
        let journal = Journal::create(dir.path().to_owned(), "gw", 1).expect("it is made");
        journal.begin(&begin("gw-1-1"));
        journal.close().expect("nothing is in the way");
        assert_eq!(on_disk(&dir).len(), 1);
        let slot = journal.ended("gw-1-1").expect("it was noted");
        journal.free(&[slot]);
        journal.close().expect("nothing is in the way");
        assert!(dir.files_ending(".begins").is_empty());
    }
}
