//! The thread behind the spool: it seals, flushes, and keeps segments ready, so that no request has to.

use super::directory;
use super::lock;
use super::names::Kind;
use super::rows::{Active, Spool};
use super::sealed::Batch;
use crate::clock;
use crate::config::Fsync;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle, park, park_timeout};
use std::time::{Duration, Instant};

/// With this many files waiting, the store cannot be keeping up, and rows gain nothing from being sealed early.
const BACKLOG_FILES: usize = 16;

/// How much later segments are sealed by age then: an outage of a weekend makes thousands of files instead of hundreds of thousands.
const BACKLOG_PATIENCE: u32 = 60;

/// What is made writable ahead of the rows each time: some hundred rows.
const AHEAD_BYTES: usize = 256 * 1024;

/// How long after a failure of the file system it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The thread; ends when this is dropped, once everything is sealed.
pub struct Keeper {
    spool: Arc<Spool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts the thread under this name.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(spool: &Arc<Spool>, name: &str) -> io::Result<Keeper> {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = Builder::new().name(name.into()).spawn({
            let (spool, stop) = (Arc::clone(spool), Arc::clone(&stop));
            move || keep(&spool, &stop)
        })?;
        // Nobody else sets it: there is one keeper to a spool.
        let _ = spool.keeper.set(thread.thread().clone());
        Ok(Keeper {
            spool: Arc::clone(spool),
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.spool.wake_keeper();
        if let Some(thread) = self.thread.take() {
            // It has no panics of its own, and there would be nothing to do about one.
            let _ = thread.join();
        }
    }
}

fn keep(spool: &Spool, stop: &AtomicBool) {
    loop {
        let next = spool.tend(Instant::now());
        if stop.load(Ordering::Acquire) {
            spool.close();
            return;
        }
        match next {
            Some(at) => park_timeout(at.saturating_duration_since(Instant::now())),
            None => park(),
        }
    }
}

impl Spool {
    /// Does everything that is due, and tells when it is due again.
    pub(super) fn tend(&self, now: Instant) -> Option<Instant> {
        self.retire(now, false);
        let sealed = self.seal_full();
        self.flush_if_due(now);
        self.supply.fill();
        if let Err(error) = self.journal.tend() {
            self.failed("make room in the journal", &error);
        }
        self.populate_ahead();
        let retry = !sealed || self.supply.blocked().is_some();
        self.due(now, retry)
    }

    /// Seals what there is and takes in no more.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.retire(Instant::now(), true);
        // What cannot be sealed stays as it is, and the next start recovers it.
        self.seal_full();
        self.supply.close();
        self.durable.send_replace(u64::MAX);
        if let Err(error) = self.journal.close() {
            self.failed("remove the journal", &error);
        }
    }

    /// Closes the active segment for more rows when it is old enough, or in any case.
    ///
    /// Age does not count while nothing could take its place: the room in it is all that rows have then, and they rather come late
    /// than not at all.
    pub(super) fn retire(&self, now: Instant, in_any_case: bool) {
        let patience = self.patience();
        let has_successor = self.supply.has_successor();
        let mut state = lock(&self.state);
        let is_due = state
            .active
            .as_ref()
            .is_some_and(|active| in_any_case || (has_successor && now >= active.first_at + patience));
        if is_due && let Some(active) = state.active.take() {
            state.full.push_back(active);
        }
    }

    fn patience(&self) -> Duration {
        let behind = self.sealed.len() >= BACKLOG_FILES;
        self.config
            .seal_after
            .saturating_mul(if behind { BACKLOG_PATIENCE } else { 1 })
    }

    /// Seals the segments that are closed. False when the file system would not.
    pub(super) fn seal_full(&self) -> bool {
        loop {
            let Some(mut full) = lock(&self.state).full.pop_front() else {
                return true;
            };
            match self.seal(&mut full) {
                Ok(batch) => {
                    self.supply.release((full.segment.capacity() - full.at) as u64);
                    self.raise_durable(full.last_row);
                    self.sealed.put(batch);
                }
                Err(error) => {
                    self.failed("seal a file", &error);
                    let mut state = lock(&self.state);
                    state.full.push_front(full);
                    // Whoever waits for rows to reach a broken disk has waited long enough.
                    self.raise_durable(state.rows);
                    return false;
                }
            }
        }
    }

    /// The rows become durable before the journal forgets their requests, and the journal forgets them before anybody can store and
    /// delete the rows: at each moment one of the two knows of a request.
    fn seal(&self, full: &mut Active) -> io::Result<Batch> {
        let durably = self.config.fsync != Fsync::Off;
        if durably {
            full.segment.mapping().write_back()?;
        }
        full.segment.file().set_len(full.at as u64)?;
        if durably {
            full.segment.file().sync_all()?;
        }
        self.journal.free(&std::mem::take(&mut full.ended));
        if durably {
            self.journal.flush()?;
        }
        let path = self.dir.join(full.id.file_name(Kind::Sealed));
        std::fs::rename(full.segment.path(), &path)?;
        if durably && let Err(error) = directory::sync_dir(&self.dir) {
            self.failed("flush the directory", &error);
        }
        let bytes = full.at as u64;
        Ok(Batch {
            id: full.id.clone(),
            path,
            rows: full.rows,
            bytes,
            sealed_at_us: clock::wall_now_us(),
        })
    }

    fn flush_if_due(&self, now: Instant) {
        let interval = match self.config.fsync {
            Fsync::Off => return,
            Fsync::Interval => self.config.fsync_interval,
            Fsync::Each => Duration::ZERO,
        };
        let (rows, active) = {
            let mut state = lock(&self.state);
            // A segment that was filled just now comes first: rows become durable in the order in which they came.
            let is_due =
                state.full.is_empty() && state.dirty_since.is_some_and(|since| now >= since + interval);
            if is_due {
                state.dirty_since = None;
            }
            let active = state.active.as_mut().filter(|_| is_due);
            let active = active.map(|active| {
                (
                    Arc::clone(active.segment.mapping()),
                    Arc::clone(active.segment.file()),
                    std::mem::take(&mut active.ended),
                )
            });
            (state.rows, active)
        };
        let Some((mapping, file, ended)) = active else {
            if let Err(error) = self.journal.flush() {
                self.failed("flush the journal", &error);
            }
            return;
        };
        let flushed = mapping.write_back().and_then(|()| file.sync_data());
        if let Err(error) = &flushed {
            self.failed("flush rows", error);
        }
        self.journal.free(&ended);
        self.raise_durable(rows);
        if let Err(error) = self.journal.flush() {
            self.failed("flush the journal", &error);
        }
    }

    fn raise_durable(&self, rows: u64) {
        self.durable.send_if_modified(|durable| {
            let risen = rows > *durable;
            *durable = rows.max(*durable);
            risen
        });
    }

    /// After each flush the kernel wants to know of the next write to a page: it is told here and not by a request.
    fn populate_ahead(&self) {
        let ahead = {
            let state = lock(&self.state);
            state
                .active
                .as_ref()
                .map(|active| (Arc::clone(active.segment.mapping()), active.at))
        };
        if let Some((mapping, at)) = ahead {
            mapping.populate(at..at + AHEAD_BYTES);
        }
    }

    fn due(&self, now: Instant, retry: bool) -> Option<Instant> {
        let patience = self.patience();
        let has_successor = self.supply.has_successor();
        let state = lock(&self.state);
        let age = state.active.as_ref().filter(|_| has_successor);
        let age = age.map(|active| active.first_at + patience);
        let flush = match self.config.fsync {
            Fsync::Off => None,
            // Begins that came without rows are flushed at the interval too.
            Fsync::Interval | Fsync::Each => Some(now + self.config.fsync_interval),
        };
        let dirty = match self.config.fsync {
            Fsync::Off => None,
            Fsync::Interval => state.dirty_since.map(|since| since + self.config.fsync_interval),
            Fsync::Each => state.dirty_since,
        };
        let full = (!state.full.is_empty() && !retry).then_some(now);
        [age, flush, dirty, full, retry.then(|| now + RETRY)]
            .into_iter()
            .flatten()
            .min()
    }

    fn failed(&self, what: &str, error: &io::Error) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        tracing::error!(dir = %self.dir.display(), %error, "the spool could not {what}; it is tried again");
    }
}
