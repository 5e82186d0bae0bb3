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
mod tests {
    use super::testing::{TempDir, begin};
    use super::*;
    use crate::config::{ByteSize, Fsync, WhenFull};
    use crate::event::{CapturedBy, Context};
    use crate::ledger::facts::Work;
    use crate::ledger::{Micros, Span, Window};
    use crate::wire::At;
    use crate::wire::exchange::{Ending, Facts};
    use std::time::Instant;

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

    /// A segment of this event, in the window that begins so many seconds after 1970.
    fn segment(event_id: &str, window_s: u64) -> SegmentRow<'_> {
        let from = Micros(window_s * 1_000_000);
        SegmentRow {
            window_start: Window::at(from),
            upstream: "chat",
            event_id,
            team_id: "team-a",
            project: "",
            model: "llama",
            run: Span::new(from, Micros(from.0 + 1_000)),
            work: Work::default(),
            gateway_id: "gw",
        }
    }

    fn batches_of(store: &Store, table: Table) -> Vec<Arc<Batch>> {
        store.spool_of(table).sealed(usize::MAX)
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
    fn segments_that_a_client_could_know_of_are_there_after_a_kill_under_names_of_their_own() {
        let dir = TempDir::new();
        let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
        store.segment(&segment("gw-1", 15));
        store.segment(&segment("gw-1", 30));
        store.record(&ended("gw-1"));
        let killed = dir.copy();
        drop(store);
        let store = Store::open(&config(&killed, Fsync::Interval), "gw").expect("it opens");
        let segments = rows(store.spool_of(Table::Segments));
        let batch = &batches_of(&store, Table::Segments)[0];
        assert!(batch.id.to_string().starts_with("gw~segments/"), "{}", batch.id);
        let expected = [15, 30].map(|window_s| {
            let mut row = serde_json::to_value(segment("gw-1", window_s)).expect("JSON");
            row["batch"] = batch.id.to_string().into();
            row
        });
        assert_eq!(segments, expected);
        assert_eq!(rows(store.spool()).len(), 1);
        assert_eq!(store.spool_of(Table::Segments).stats().crashed, 0);
    }

    #[test]
    fn torn_segments_are_put_aside_and_those_of_a_gateway_that_is_no_more_are_taken_over() {
        let dir = TempDir::new();
        let store = Store::open(&config(&dir, Fsync::Off), "old-host").expect("it opens");
        store.segment(&segment("old-1", 15));
        store.segment(&segment("old-2", 15));
        drop(store);
        let batch = &dir.files_ending(".jsonl")[0];
        let text = std::fs::read_to_string(batch).expect("it is there");
        std::fs::write(batch, &text[..text.len() - 9]).expect("it is written");
        let store = Store::open(&config(&dir, Fsync::Off), "gw").expect("it opens");
        let (segments, events) = (store.spool_of(Table::Segments), store.spool());
        assert_eq!(rows(segments)[0]["event_id"], "old-1");
        assert_eq!((segments.stats().rows, segments.stats().torn), (1, 1));
        assert_eq!((events.stats().rows, events.stats().torn), (0, 0));
        let taken = &batches_of(&store, Table::Segments)[0];
        assert_eq!(&*taken.id.gateway, "old-host~segments");
        assert!(taken.path.starts_with(dir.path().join("gw/segments")));
        let aside = std::fs::read_dir(dir.path().join("old-host/segments/quarantine"));
        assert_eq!(aside.expect("a directory").count(), 1);
    }

    #[tokio::test]
    async fn under_each_an_end_waits_for_its_segments_too() {
        let dir = TempDir::new();
        let store = Store::open(&config(&dir, Fsync::Each), "gw").expect("it opens");
        store.segment(&segment("gw-1", 15));
        store.record(&ended("gw-1"));
        if let Some(settled) = store.settled() {
            settled.await;
        }
        for table in Table::ALL {
            assert_eq!(*store.spool_of(table).durable.borrow(), 1, "{table:?}");
        }
    }

    /// Both spools with files of 4 KiB and room for eight, which nobody tends but the test.
    fn narrow(dir: &TempDir, when_full: WhenFull) -> [Spool; 2] {
        let config = SpoolConfig {
            segment_bytes: ByteSize::from_kib(4),
            max_bytes: ByteSize::from_kib(4 * 8),
            when_full,
            ..config(dir, Fsync::Off)
        };
        open_spools(&config, "gw").expect("it opens").into()
    }

    /// Appends a row that fills a file, and seals it.
    fn append_file(spool: &Spool, id: &str) -> Result<(), DropCause> {
        let row = format!("{{\"event_id\":\"{id}\",\"pad\":\"{}\"}}", "x".repeat(3900));
        spool.append(row.as_bytes()).map(drop)?;
        spool.retire(Instant::now(), true);
        assert!(spool.seal_full());
        Ok(())
    }

    #[test]
    fn events_and_segments_share_one_limit_and_what_is_lost_is_counted_where_it_was() {
        let dir = TempDir::new();
        let [events, segments] = narrow(&dir, WhenFull::DropNewest);
        for number in 0..6 {
            append_file(&segments, &format!("s-{number}")).expect("there is room");
        }
        append_file(&events, "e-0").expect("there is room");
        // Sealed files are a little smaller than 4 KiB each, and not by as much as a file in all.
        append_file(&events, "e-1").expect("there is room");
        assert_eq!(append_file(&events, "e-2"), Err(DropCause::SpoolFull));
        assert_eq!(append_file(&segments, "s-6"), Err(DropCause::SpoolFull));
        let used = [&events, &segments].map(|spool| spool.stats().bytes);
        assert!(used[0] < used[1] && used[0] + used[1] <= 4 * 8 * 1024, "{used:?}");
        for spool in [&events, &segments] {
            assert_eq!(spool.stats().dropped_by(DropCause::SpoolFull), 1);
        }
        let stored = segments.sealed(1)[0].clone();
        segments.acknowledge(&stored).expect("it is deleted");
        events.supply.fill();
        append_file(&events, "e-3").expect("room of the one is room of the other");
    }

    #[test]
    fn what_gives_way_is_the_oldest_of_both() {
        let dir = TempDir::new();
        let [events, segments] = narrow(&dir, WhenFull::DropOldest);
        for number in 0..8 {
            append_file(&segments, &format!("s-{number}")).expect("there is room");
        }
        append_file(&events, "e-0").expect("the oldest makes room");
        append_file(&events, "e-1").expect("the oldest makes room");
        let evicted = [&events, &segments].map(|spool| spool.stats().dropped_by(DropCause::Evicted));
        assert_eq!(evicted, [0, 2]);
        assert_eq!(segments.sealed(1)[0].id.sequence, 3);
        assert_eq!([&events, &segments].map(|spool| spool.stats().files), [2, 6]);
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
