//! Rows on their way to the store: taken in at the end of a request, sealed into batches, kept until they are stored.
//!
//! What it promises is stated in [the module above](super).

use super::directory::{self, DirLock};
use super::journal::{Journal, Slot};
use super::lock;
use super::names::BatchId;
use super::names::row_prefix;
use super::recover::Recovered;
use super::sealed::{Batch, SealedBatches};
use super::segment::Segment;
use super::stats::{Counters, DropCause, SpoolStats};
use super::supply::{Fresh, Limits, Supply};
use crate::config::{Fsync, SpoolConfig};
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;
use std::time::Instant;
use tokio::sync::watch;

/// The rows on disk, and who takes care of them.
pub struct Spool {
    pub(super) dir: PathBuf,
    pub(super) config: SpoolConfig,
    pub(super) state: Mutex<State>,
    pub(super) supply: Supply,
    pub(super) sealed: Arc<SealedBatches>,
    pub(super) counters: Arc<Counters>,
    pub(super) journal: Journal,
    /// How many rows are as durable as was asked for.
    pub(super) durable: watch::Sender<u64>,
    pub(super) keeper: OnceLock<Thread>,
    /// The longest row that fits into an empty segment.
    fields_bytes_max: usize,
    _lock: DirLock,
}

/// What the requests of all threads share, under one short lock.
#[derive(Default)]
pub(super) struct State {
    /// The segment that rows are added to; none while there are none.
    pub(super) active: Option<Active>,
    /// Segments that wait to be sealed, oldest first. Each counts against the limit, so that they are few.
    pub(super) full: VecDeque<Active>,
    /// Rows taken in so far.
    pub(super) rows: u64,
    /// When the first row came that is not yet as durable as was asked for.
    pub(super) dirty_since: Option<Instant>,
    pub(super) closed: bool,
}

/// A segment with rows.
pub(super) struct Active {
    pub(super) id: BatchId,
    pub(super) segment: Segment,
    prefix: Box<[u8]>,
    /// Bytes used.
    pub(super) at: usize,
    pub(super) rows: u64,
    /// Number of the last row, over all segments.
    pub(super) last_row: u64,
    pub(super) first_at: Instant,
    /// Slots of the journal that are free once the rows so far are durable.
    pub(super) ended: Vec<Slot>,
}

/// A row that was taken in.
#[derive(Debug)]
#[must_use = "under `spool.fsync: each` a response must not end before its row is durable"]
pub struct Ticket(Option<(watch::Receiver<u64>, u64)>);

impl Ticket {
    /// Done when the row is on the disk. Under `off` and `interval` nobody has to wait, and this is done at once.
    ///
    /// When the disk fails it is done too, and the failure is counted: a request does not wait for a broken disk.
    pub async fn durable(self) {
        if let Some((mut durable, row)) = self.0 {
            // An error says that the spool is gone, and with it whoever could tell.
            let _ = durable.wait_for(|rows| *rows >= row).await;
        }
    }

    /// Whether there is anything to wait for.
    pub fn must_wait(&self) -> bool {
        self.0
            .as_ref()
            .is_some_and(|(durable, row)| *durable.borrow() < *row)
    }
}

impl Spool {
    /// A spool in a directory that was recovered; nobody seals what it takes in until a keeper does.
    pub(super) fn new(config: &SpoolConfig, lock: DirLock, recovered: Recovered, journal: Journal) -> Spool {
        let Recovered {
            dir,
            batches,
            next,
            counters,
        } = recovered;
        let limits = Limits {
            segment_bytes: config.segment_bytes.as_len(),
            max_bytes: config.max_bytes.bytes(),
            when_full: config.when_full,
        };
        // The largest sequence has the longest prefix; one byte is the line's end.
        let longest = row_prefix(&BatchId {
            sequence: u64::MAX,
            ..next.clone()
        })
        .len()
            + 1;
        let used_bytes = batches.iter().map(|batch| batch.bytes).sum();
        let sealed = Arc::new(SealedBatches::default());
        batches.into_iter().for_each(|batch| sealed.put(batch));
        let supply = Supply::new(
            &dir,
            next,
            limits,
            used_bytes,
            Arc::clone(&sealed),
            Arc::clone(&counters),
        );
        Spool {
            dir,
            config: config.clone(),
            state: Mutex::default(),
            supply,
            sealed,
            counters,
            journal,
            durable: watch::Sender::new(0),
            keeper: OnceLock::new(),
            fields_bytes_max: limits.segment_bytes.saturating_sub(longest),
            _lock: lock,
        }
    }

    /// Takes in a row: a JSON object on one line, without its line end. It gets a first field `batch` and is in the page cache when
    /// this returns. No system call, but for the wake-up of the keeper: at the first row of a segment, and of each flush.
    ///
    /// # Errors
    /// Why the row is lost; that is counted already.
    pub fn append(&self, line: &[u8]) -> Result<Ticket, DropCause> {
        self.append_end(line, None)
    }

    /// As [`Spool::append`], for the end of a request whose begin is in this slot of the journal.
    pub(super) fn append_end(&self, line: &[u8], slot: Option<Slot>) -> Result<Ticket, DropCause> {
        let Some(fields) = fields_of(line) else {
            return Err(self.lost(DropCause::Malformed, slot));
        };
        let mut state = lock(&self.state);
        let fresh = state.active.is_none();
        let full = state.full.len();
        if let Err(cause) = self.place(&mut state, fields) {
            drop(state);
            return Err(self.lost(cause, slot));
        }
        state.rows += 1;
        let row = state.rows;
        let mut wake = fresh || state.full.len() > full;
        if self.config.fsync != Fsync::Off && state.dirty_since.is_none() {
            state.dirty_since = Some(Instant::now());
            wake = true;
        }
        if let Some(active) = &mut state.active {
            active.last_row = row;
            match slot {
                // In the page cache is all that was asked for. Freed under the lock, so that no batch is stored, and its rows deleted,
                // while the journal still has one of them as begun.
                Some(slot) if self.config.fsync == Fsync::Off => self.journal.free(&[slot]),
                Some(slot) => active.ended.push(slot),
                None => {}
            }
        }
        drop(state);
        self.counters.appended.fetch_add(1, Ordering::Relaxed);
        if wake {
            self.wake_keeper();
        }
        Ok(Ticket(
            (self.config.fsync == Fsync::Each).then(|| (self.durable.subscribe(), row)),
        ))
    }

    /// Copies the row into the active segment, or into the next one.
    fn place(&self, state: &mut State, fields: &[u8]) -> Result<(), DropCause> {
        if state.closed {
            return Err(DropCause::Closed);
        }
        if let Some(active) = &mut state.active
            && active.add(fields)
        {
            return Ok(());
        }
        if fields.len() > self.fields_bytes_max {
            return Err(DropCause::TooLarge);
        }
        let mut active = Active::new(self.supply.take()?);
        let added = active.add(fields);
        debug_assert!(added, "an empty segment has room for the longest row");
        if let Some(full) = state.active.replace(active) {
            state.full.push_back(full);
        }
        Ok(())
    }

    fn lost(&self, cause: DropCause, slot: Option<Slot>) -> DropCause {
        self.counters.dropped(cause, 1);
        // The request did end; its row is counted as lost and must not turn into a crash at the next start.
        self.journal.free(slot.as_slice());
        cause
    }

    pub(super) fn wake_keeper(&self) {
        if let Some(keeper) = self.keeper.get() {
            keeper.unpark();
        }
    }

    /// Stands for all rows that were taken in so far; `None` unless somebody has to wait for them.
    pub fn unsettled(&self) -> Option<Ticket> {
        if self.config.fsync != Fsync::Each {
            return None;
        }
        let ticket = Ticket(Some((self.durable.subscribe(), lock(&self.state).rows)));
        ticket.must_wait().then_some(ticket)
    }

    /// The oldest batches that wait to be stored, oldest first.
    pub fn sealed(&self, count_max: usize) -> Vec<Arc<Batch>> {
        self.sealed.oldest(count_max)
    }

    /// Done as soon as there is a batch to be stored.
    pub async fn wait_for_sealed(&self) {
        self.sealed.wait().await;
    }

    /// The batch is stored: its file is deleted. Waits for the file system. A batch that is gone already (it was the oldest and had to
    /// make room) is no error.
    ///
    /// # Errors
    /// Those of the file system. The batch is then out of the list, but it would come up again at the next start.
    pub fn acknowledge(&self, batch: &Batch) -> io::Result<()> {
        let Some(batch) = self.sealed.remove(&batch.id) else {
            return Ok(());
        };
        match std::fs::remove_file(&batch.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.supply.release(batch.bytes);
        self.wake_keeper();
        Ok(())
    }

    /// Takes rows (counted from 0) out of a batch that the store refuses for good, and keeps them in `quarantine/` with the reason.
    /// Returns what is left to be stored, under the same id; `None` when nothing is. Waits for the file system. A kill in the middle can
    /// leave rows in both places, but never in none.
    ///
    /// # Errors
    /// Those of the file system; then the batch is as it was.
    pub fn quarantine(&self, batch: &Batch, rows: &[u64], reason: &str) -> io::Result<Option<Arc<Batch>>> {
        let bytes = std::fs::read(&batch.path)?;
        let is_out = |row: &(u64, &[u8])| rows.contains(&row.0);
        let (out, left): (Vec<_>, Vec<_>) = (0..)
            .zip(bytes.split_inclusive(|byte| *byte == b'\n'))
            .partition(is_out);
        let without_number =
            |lines: Vec<(u64, _)>| lines.into_iter().map(|(_, line)| line).collect::<Vec<&[u8]>>();
        let (out, left) = (without_number(out), without_number(left));
        if out.is_empty() {
            return Ok(Some(Arc::new(batch.clone())));
        }
        directory::put_aside(&self.dir, &batch.id, reason, &out)?;
        self.counters
            .quarantined
            .fetch_add(out.len() as u64, Ordering::Relaxed);
        if left.is_empty() {
            return self.acknowledge(batch).map(|()| None);
        }
        directory::write_sealed(&self.dir, &batch.id, &left)?;
        let left_bytes = left.iter().map(|line| line.len() as u64).sum();
        let remaining = Batch {
            rows: left.len() as u64,
            bytes: left_bytes,
            ..batch.clone()
        };
        self.supply.release(batch.bytes.saturating_sub(left_bytes));
        self.sealed.put(remaining.clone());
        Ok(Some(Arc::new(remaining)))
    }

    /// What the spool counts.
    pub fn stats(&self) -> SpoolStats {
        let (files, rows, oldest_sealed_at_us) = self.sealed.totals();
        SpoolStats {
            bytes: self.supply.used_bytes(),
            files,
            rows,
            oldest_sealed_at_us,
            open: self.journal.open() as u64,
            begins_missed: self.journal.missed(),
            ..self.counters.snapshot()
        }
    }
}

impl Active {
    fn new(fresh: Fresh) -> Active {
        Active {
            prefix: row_prefix(&fresh.id),
            id: fresh.id,
            segment: fresh.segment,
            at: 0,
            rows: 0,
            last_row: 0,
            first_at: Instant::now(),
            ended: Vec::new(),
        }
    }

    fn add(&mut self, fields: &[u8]) -> bool {
        let added = self.segment.put(self.at, &[&self.prefix, fields, b"\n"]);
        if added {
            self.at += self.prefix.len() + fields.len() + 1;
            self.rows += 1;
        }
        added
    }
}

/// What stands behind the opening brace of a row; `None` if the line is no JSON object that could be one. Objects without fields are
/// none: there is no such row.
fn fields_of(line: &[u8]) -> Option<&[u8]> {
    let fields = line.strip_prefix(b"{\"").map(|_| &line[1..])?;
    let one_line = fields.ends_with(b"}") && memchr::memchr2(b'\n', 0, fields).is_none();
    one_line.then_some(fields)
}

#[cfg(test)]
mod tests;
