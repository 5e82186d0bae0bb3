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
//! * **Requests never wait for accounting**, but for `fsync: each`, which is asking for it. Without room rows are lost by the policy
//!   `spool.when_full`, counted by cause. The default, `drop_newest`, never gives up what was once kept: it keeps whole batches whole,
//!   also the one that is being sent. `drop_oldest` is for those to whom this hour matters more than the last.
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
//! * `each`: nothing whose end a client saw, if the caller waits for the [`Ticket`]. Begins are flushed at the interval.
//!
//! Rows are validated when they are read back, since a power loss can leave zeros in place of any page.
//!
//! # What it leaves out
//!
//! Nothing here knows ClickHouse, or sends anything. The journal does not count against `spool.max_bytes`: it is bounded by the
//! requests in flight. Directories are locked with `flock`, which some network file systems do not share between machines.

pub(crate) mod directory;
mod journal;
mod keeper;
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

pub use names::BatchId;
pub use rows::{Spool, Ticket};
pub use sealed::Batch;
pub use stats::{DropCause, SpoolStats};

use crate::config::SpoolConfig;
use crate::event::{Begin, EventSink, RequestEvent, Settled};
use directory::DirLock;
use journal::Journal;
use keeper::Keeper;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// The sink that keeps every request. When it is dropped, what it holds is sealed.
pub struct Store {
    spool: Arc<Spool>,
    buffers: Mutex<Vec<Vec<u8>>>,
    _keeper: Keeper,
}

impl Store {
    /// Opens the spool of `gateway`, with all that earlier runs left: theirs, and that of gateways that are no more.
    ///
    /// Reads every file that waits, so that after a long outage this takes a while (10 GiB: as long as the disk needs for them).
    ///
    /// # Errors
    /// [`StoreError`]. Nothing is lost then.
    pub fn open(config: &SpoolConfig, gateway: &str) -> Result<Store, StoreError> {
        let spool = Arc::new(open_spool(config, gateway)?);
        // Before the first request comes, so that it finds a segment.
        spool.supply.fill();
        let keeper = Keeper::start(&spool).map_err(StoreError::Thread)?;
        Ok(Store {
            spool,
            buffers: Mutex::default(),
            _keeper: keeper,
        })
    }

    /// Where the rows are.
    pub fn spool(&self) -> &Arc<Spool> {
        &self.spool
    }

    /// Keeps the end of a request.
    ///
    /// # Errors
    /// Why its row is lost; that is counted already.
    pub fn keep(&self, event: &RequestEvent) -> Result<Ticket, DropCause> {
        let slot = self.spool.journal.ended(&event.event_id);
        let mut line = lock(&self.buffers).pop().unwrap_or_default();
        line.clear();
        // An event is texts and numbers: there is nothing in it that JSON cannot say. If there were, the row would be refused.
        let _ = serde_json::to_writer(&mut line, event);
        let kept = self.spool.append_end(&line, slot);
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

    fn settled(&self) -> Option<Settled> {
        let ticket = self.spool.unsettled()?;
        Some(Box::pin(ticket.durable()))
    }
}

/// Everything but the thread.
fn open_spool(config: &SpoolConfig, gateway: &str) -> Result<Spool, StoreError> {
    let dir = config.dir.join(gateway);
    let dir_lock = DirLock::acquire(&dir)?;
    let counters = Arc::default();
    let segment_bytes = config.segment_bytes.as_len();
    recover::adopt(&config.dir, &dir, segment_bytes, &counters)?;
    let recovered = recover::recover(&dir, gateway, segment_bytes, &counters)?;
    let journal = Journal::create(dir.clone(), gateway, recovered.next.boot);
    let journal = journal.map_err(|source| StoreError::io("make a journal in", &dir, source))?;
    Ok(Spool::new(config, dir_lock, recovered, journal))
}

/// A lock that a panicking thread leaves usable: what it protects is changed in single steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::testing::{TempDir, begin};
    use super::*;
    use crate::config::{ByteSize, Fsync};
    use crate::event::{CapturedBy, Context};
    use crate::wire::At;
    use crate::wire::exchange::{Ending, Facts};

    fn config(dir: &TempDir, fsync: Fsync) -> SpoolConfig {
        let segment_bytes = ByteSize::from_kib(64);
        SpoolConfig {
            dir: dir.path().to_owned(),
            segment_bytes,
            fsync,
            ..SpoolConfig::default()
        }
    }

    fn ended(event_id: &str) -> RequestEvent {
        let begin = begin(event_id);
        let context = Context {
            event_id: event_id.into(),
            started_at_us: begin.started_at_us,
            gateway_id: begin.gateway_id.into(),
            team: Some(begin.team_id.into()),
            project: None,
            user: None,
            upstream: None,
            request_id: begin.request_id.into(),
            trace_id: None,
            status: Some(200),
            error_type: None,
            gateway_overhead_us: None,
            tap: None,
        };
        RequestEvent::new(
            context,
            Facts::unread(At(0), At(5_000), Ending::Complete),
            CapturedBy::Proxy,
        )
    }

    fn rows(spool: &Spool) -> Vec<serde_json::Value> {
        let read = |batch: &Arc<Batch>| std::fs::read_to_string(&batch.path).expect("it is there");
        let text: String = spool.sealed(usize::MAX).iter().map(read).collect();
        text.lines()
            .map(|line| serde_json::from_str(line).expect("a JSON object"))
            .collect()
    }

    #[tokio::test]
    async fn under_each_what_is_settled_is_durable() {
        let dir = TempDir::new();
        let store = Store::open(&config(&dir, Fsync::Each), "gw").expect("it opens");
        store.began(&begin("gw-1"));
        store.record(&ended("gw-1"));
        if let Some(settled) = store.settled() {
            settled.await;
        }
        assert!(store.settled().is_none());
        assert_eq!(*store.spool.durable.borrow(), 1);
    }

    #[tokio::test]
    async fn a_row_is_sealed_in_time_and_is_the_event() {
        let dir = TempDir::new();
        let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
        assert!(store.settled().is_none());
        store.record(&ended("gw-1"));
        store.spool.wait_for_sealed().await;
        let mut expected = serde_json::to_value(ended("gw-1")).expect("JSON");
        expected["batch"] = store.spool.sealed(1)[0].id.to_string().into();
        assert_eq!(rows(&store.spool), [expected]);
    }

    #[test]
    fn a_store_that_is_closed_leaves_batches_and_no_journal() {
        let dir = TempDir::new();
        let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
        store.began(&begin("gw-1"));
        store.record(&ended("gw-1"));
        drop(store);
        assert_eq!(dir.files_ending(".jsonl").len(), 1);
        assert!(dir.files_ending(".begins").is_empty() && dir.files_ending(".open").is_empty());
    }

    #[test]
    fn a_request_that_a_crash_cut_off_becomes_a_row_with_all_that_was_known() {
        let dir = TempDir::new();
        let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
        store.began(&begin("gw-1"));
        store.began(&begin("gw-2"));
        store.began(&Begin {
            upstream: Some("chat"),
            model: Some("llama"),
            ..begin("gw-2")
        });
        store.record(&ended("gw-1"));
        let killed = dir.copy();
        drop(store);
        let store = Store::open(&config(&killed, Fsync::Interval), "gw").expect("it opens");
        assert_eq!(store.spool.stats().crashed, 1);
        let rows = rows(&store.spool);
        let crash = rows
            .iter()
            .find(|row| row["outcome"] == "gateway_crash")
            .expect("it is there");
        assert_eq!(rows.len(), 2);
        for (key, value) in [
            ("event_id", "gw-2"),
            ("team_id", "team-a"),
            ("user_id", "u"),
            ("upstream", "chat"),
            ("model", "llama"),
            ("endpoint", "/v1/chat/completions"),
            ("error_type", "gateway_crash"),
            ("usage_source", "none"),
        ] {
            assert_eq!(crash[key], value, "{key}");
        }
        assert_eq!(
            (&crash["started_at"], &crash["status_code"]),
            (&1_700_000_000_000_000_i64.into(), &0.into())
        );
    }

    #[test]
    fn a_second_gateway_of_the_same_name_is_told_who_the_first_is() {
        let dir = TempDir::new();
        let _first = Store::open(&config(&dir, Fsync::Off), "gw").expect("it opens");
        let refused = Store::open(&config(&dir, Fsync::Off), "gw")
            .err()
            .expect("it is taken")
            .to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())) && refused.contains("gateway.id"),
            "{refused}"
        );
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named_with_what_to_do() {
        let dir = TempDir::new();
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("it is written");
        let config = SpoolConfig {
            dir: file.clone(),
            ..config(&dir, Fsync::Off)
        };
        let refused = Store::open(&config, "gw")
            .err()
            .expect("a file is no directory")
            .to_string();
        assert!(
            refused.contains(&*file.to_string_lossy()) && refused.contains("SPOOL_DIR"),
            "{refused}"
        );
    }
}
