//! What must not get lost: a journal of requests that have begun, and a spool of rows that wait to be stored.
//!
//! # What it promises
//!
//! * **Whoever saw a response end finds its row.** The row is in a memory-mapped file before the response's last bytes go to the client,
//!   and the page cache outlives a killed process. Taking a row in makes no system call that can wait: it is a copy into a segment that
//!   was made ahead of need. (Two exceptions, both counted or stated: when no segment is ready one is made on the spot, `spare_misses`;
//!   and a page that the kernel is writing out at that moment makes its next writer wait, which the keeper pre-empts by touching pages
//!   first.)
//! * **Every request that began has one row in the end.** Its begin stays in the journal until its row is as durable as was asked for;
//!   what has a begin and no row at the next start becomes a row with outcome `gateway_crash`, once, even if that start is killed too.
//! * **A row is in one batch, and says which.** Batches are files of one JSON object a line, exactly what is sent. Their names,
//!   `gateway/boot/sequence`, are never used twice. A file is deleted when it is acknowledged and not before.
//! * **What cannot be sent is put aside**, in `quarantine/`, with its reason: torn rows, and rows that the store refuses.
//! * **Segments are kept as events are.** What the ledger is told of a request is in a spool of its own, in the directory `segments/`
//!   within the gateway's, before the request's own row is in its spool; so who saw a response end finds both. Its batches are called
//!   `gateway~segments/boot/sequence`. There is no journal of them: a request that a crash cut off has the segments of the windows that
//!   were over, and `gateway_crash` as its event.
//! * **Requests never wait for accounting**, but for `fsync: each`, which is asking for it. Without room rows are lost by the policy
//!   `spool.when_full`, counted by cause. The default, `drop_newest`, never gives up what was once kept: it keeps whole batches whole,
//!   also the one that is being sent. `drop_oldest` is for those to whom this hour matters more than the last. `spool.max_bytes` bounds
//!   both spools together: each takes what it needs, neither has a part for itself, and what goes is the oldest of either.
//!
//! # What a power loss takes
//!
//! A crash or kill of the gateway alone takes nothing, under any policy. When the machine dies:
//!
//! * `off`: whatever the kernel had not written by itself, on Linux mostly the last 30 s, of sealed files too; rows of the last
//!   seconds may come up as `gateway_crash` although they had ended, even if they were stored (the store must let any other row of the
//!   same event win over such a one).
//! * `interval`: rows that ended within the last `fsync_interval`, plus the time of one flush, or of two when a file is sealed just
//!   then. A request whose end was taken, but whose begin was flushed, comes up as `gateway_crash`.
//! * `each`: nothing whose end a client saw, segments included, if the caller waits until it is [settled](EventSink::settled). Begins are flushed at the interval.
//!
//! Rows are validated when they are read back, since a power loss can leave zeros in place of any page.
//!
//! # What it leaves out
//!
//! Nothing here knows ClickHouse, or sends anything. The journal does not count against `spool.max_bytes`: it is bounded by the
//! requests in flight. An event and its segments are not one commit: for a while the store can have the one without the others, and a
//! power loss can take either. Directories are locked with `flock`, which some network file systems do not share between machines.

pub(crate) mod directory;
mod journal;
mod keeper;
mod leftover;
mod names;
mod recover;
mod rows;
mod scan;
mod sealed;
pub(crate) mod segment;
mod stats;
mod supply;
#[cfg(test)]
mod testing;
pub mod waiting;

pub use leftover::{Counted, LeftCharge};
pub use names::BatchId;
pub use rows::{Spool, Ticket};
pub use sealed::Batch;
pub use stats::{DropCause, SpoolStats};

use super::Table;
use crate::config::SpoolConfig;
use crate::event::{Begin, EventSink, RequestEvent, Settled};
use crate::ledger::SegmentRow;
use directory::{DirLock, SEGMENTS_DIR};
use journal::Journal;
use keeper::Keeper;
use names::writer_of_segments;
use recover::CountersOfBoth;
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use supply::Room;

/// Row buffers that are kept: more than there are threads that could want one at a time.
const BUFFERS_MAX: usize = 64;

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process uses the directory.
    #[error(
        "{} is in use by {holder}: two gateways need two names (gateway.id), or two directories (spool.dir or SPOOL_DIR)",
        dir.display()
    )]
    Locked {
        /// The gateway's directory.
        dir: PathBuf,
        /// Who has it, as far as that is known.
        holder: String,
    },
    /// The file system would not.
    #[error(
        "the spool cannot {what} {}: {source}; spool.dir (SPOOL_DIR) must be a directory with room that the gateway may write to",
        path.display()
    )]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system gave no thread.
    #[error("the spool's thread could not be started: {0}")]
    Thread(io::Error),
}

impl StoreError {
    fn io(what: &'static str, path: &Path, source: io::Error) -> StoreError {
        StoreError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }
}

/// The sink that keeps every request, and its segments. When it is dropped, what it holds is sealed.
pub struct Store {
    spool: Arc<Spool>,
    segments: Arc<Spool>,
    buffers: Mutex<Vec<Vec<u8>>>,
    _keepers: [Keeper; 2],
}

impl Store {
    /// Opens the spool of `gateway`, with all that earlier runs left: theirs, and that of gateways that are no more.
    ///
    /// Reads every file that waits, so that after a long outage this takes a while (10 GiB: as long as the disk needs for them).
    ///
    /// # Errors
    /// [`StoreError`]. Nothing is lost then.
    pub fn open(config: &SpoolConfig, gateway: &str) -> Result<Store, StoreError> {
        let (spool, segments) = open_spools(config, gateway)?;
        let (spool, segments) = (Arc::new(spool), Arc::new(segments));
        // Before the first request comes, so that it finds a segment.
        spool.supply.fill();
        segments.supply.fill();
        let keeper = |spool, name| Keeper::start(spool, name).map_err(StoreError::Thread);
        let keepers = [keeper(&spool, "spool")?, keeper(&segments, "spool-segments")?];
        Ok(Store {
            spool,
            segments,
            buffers: Mutex::default(),
            _keepers: keepers,
        })
    }

    /// Where the rows of requests are.
    pub fn spool(&self) -> &Arc<Spool> {
        &self.spool
    }

    /// Where the rows of a table are.
    pub fn spool_of(&self, table: Table) -> &Arc<Spool> {
        match table {
            Table::Events => &self.spool,
            Table::Segments => &self.segments,
        }
    }

    /// Keeps the end of a request.
    ///
    /// # Errors
    /// Why its row is lost; that is counted already.
    pub fn keep(&self, event: &RequestEvent) -> Result<Ticket, DropCause> {
        let slot = self.spool.journal.ended(&event.event_id);
        self.with_line(event, |line| self.spool.append_end(line, slot))
    }

    fn with_line<T>(&self, row: &impl Serialize, keep: impl FnOnce(&[u8]) -> T) -> T {
        let mut line = lock(&self.buffers).pop().unwrap_or_default();
        line.clear();
        // A row is texts and numbers: there is nothing in it that JSON cannot say. If there were, the row would be refused.
        let _ = serde_json::to_writer(&mut line, row);
        let kept = keep(&line);
        let mut buffers = lock(&self.buffers);
        if buffers.len() < BUFFERS_MAX {
            buffers.push(line);
        }
        kept
    }
}

impl EventSink for Store {
    fn began(&self, begin: &Begin<'_>) {
        self.spool.journal.begin(begin);
    }

    fn record(&self, event: &RequestEvent) {
        // A loss is counted and logged where it happens; who has to wait does so by `settled`.
        let _ = self.keep(event);
    }

    fn segment(&self, row: &SegmentRow<'_>) {
        // Counted and logged where it happens; the request's end waits for this row too.
        drop(self.with_line(row, |line| self.segments.append(line)));
    }

    fn settled(&self) -> Option<Settled> {
        match (self.segments.unsettled(), self.spool.unsettled()) {
            (None, None) => None,
            (Some(ticket), None) | (None, Some(ticket)) => Some(Box::pin(ticket.durable())),
            (Some(segments), Some(events)) => Some(Box::pin(async {
                segments.durable().await;
                events.durable().await;
            })),
        }
    }
}

/// Everything but the threads: the spools of events and of segments.
fn open_spools(config: &SpoolConfig, gateway: &str) -> Result<(Spool, Spool), StoreError> {
    let dir = config.dir.join(gateway);
    let dir_lock = Arc::new(DirLock::acquire(&dir)?);
    let segments_dir = dir.join(SEGMENTS_DIR);
    std::fs::create_dir_all(&segments_dir)
        .map_err(|source| StoreError::io("create", &segments_dir, source))?;
    let counters = CountersOfBoth::default();
    let segment_bytes = config.segment_bytes.as_len();
    recover::adopt(&config.dir, &dir, segment_bytes, &counters)?;
    let recovered = recover::recover(&dir, gateway, segment_bytes, &counters.events)?;
    let journal = Journal::create(dir.clone(), gateway, recovered.next.boot);
    let journal = journal.map_err(|source| StoreError::io("make a journal in", &dir, source))?;
    let writer = writer_of_segments(gateway);
    let segments = recover::recover(&segments_dir, &writer, segment_bytes, &counters.segments)?;
    let room = Room::new(config.max_bytes.bytes(), config.when_full);
    let spool = Spool::new(
        config,
        Arc::clone(&dir_lock),
        recovered,
        journal,
        Arc::clone(&room),
    );
    let segments = Spool::new(config, dir_lock, segments, Journal::none(), room);
    Ok((spool, segments))
}

/// A lock that a panicking thread leaves usable: what it protects is changed in single steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
