//! What a start finds of earlier runs, and what becomes of it.
//!
//! Rows that were taken in become sealed batches, requests that never ended become rows of their own (`gateway_crash`), pieces that are
//! neither go to `quarantine/`. Each step replaces a file as a whole or removes one whose content is elsewhere already, so that a start
//! that is killed is simply repeated by the next one. Nobody can store and delete a batch before recovery is through.

use super::StoreError;
use super::directory::{self, DirLock, Listing};
use super::journal::{self, Unended};
use super::names::{BatchId, Kind, row_prefix};
use super::scan::{self, Scan};
use super::sealed::Batch;
use super::stats::Counters;
use crate::clock;
use crate::event::{Context, RequestEvent};
use crate::wire::At;
use crate::wire::endpoint::Endpoint;
use crate::wire::exchange::{Ending, Facts, Outcome};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::UNIX_EPOCH;

/// How events of requests that a crash cut off name their cause.
const ERROR_TYPE: &str = "gateway_crash";

/// A directory whose past is settled.
pub struct Recovered {
    /// The gateway's directory.
    pub dir: PathBuf,
    /// What waits to be stored.
    pub batches: Vec<Batch>,
    /// The id of the next batch.
    pub next: BatchId,
    /// What was found is counted here.
    pub counters: Arc<Counters>,
}

/// Settles the directory of `gateway`, which the caller has locked. New batches have at most `segment_bytes`.
///
/// # Errors
/// Those of the file system. Nothing is lost then: the next start finds it.
pub fn recover(
    dir: &Path,
    gateway: &str,
    segment_bytes: usize,
    counters: &Arc<Counters>,
) -> Result<Recovered, StoreError> {
    let listing = Listing::of(dir)?;
    for name in &listing.foreign {
        counters.foreign.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(dir = %dir.display(), name, "a file in the spool is not the gateway's: it is left alone");
    }
    // Above every boot that left anything, also when the clock was set back.
    let boot = u64::try_from(clock::wall_now_us() / 1000)
        .unwrap_or(0)
        .max(listing.last_boot() + 1);
    let mut recovery = Recovery {
        dir,
        next: BatchId {
            boot,
            sequence: 1,
            gateway: gateway.into(),
        },
        segment_bytes,
        counters,
        batches: Vec::new(),
    };
    for id in &listing.unfinished {
        recovery.remove(id, Kind::Unfinished)?;
    }
    for id in &listing.open {
        recovery.close_segment(id)?;
    }
    for id in &listing.sealed {
        recovery.check_sealed(id)?;
    }
    recovery.end_requests(&listing.begins)?;
    let Recovery { next, batches, .. } = recovery;
    Ok(Recovered {
        dir: dir.to_owned(),
        batches,
        next,
        counters: Arc::clone(counters),
    })
}

/// Takes over what gateways of other names left in `spool_dir` and nobody looks after: in a container the host name, and so the
/// gateway's, may be another one after each restart. Their directories are settled where they are, and then the batches move to `own`.
/// What cannot be settled stays where it is, for a later start: it is no reason not to start this gateway.
///
/// # Errors
/// When `spool_dir` cannot be read.
pub fn adopt(
    spool_dir: &Path,
    own: &Path,
    segment_bytes: usize,
    counters: &Arc<Counters>,
) -> Result<(), StoreError> {
    let entries = fs::read_dir(spool_dir).map_err(|source| StoreError::io("read", spool_dir, source))?;
    for entry in entries {
        let dir = entry
            .map_err(|source| StoreError::io("read", spool_dir, source))?
            .path();
        let Some(_lock) = Some(&dir)
            .filter(|dir| *dir != own)
            .and_then(|dir| DirLock::try_existing(dir))
        else {
            continue;
        };
        if let Err(error) = take_over(&dir, own, segment_bytes, counters) {
            tracing::warn!(dir = %dir.display(), %error, "what another gateway left in the spool stays there for now");
        }
    }
    Ok(())
}

/// Settles one such directory, which the caller has locked.
fn take_over(
    dir: &Path,
    own: &Path,
    segment_bytes: usize,
    counters: &Arc<Counters>,
) -> Result<(), StoreError> {
    let Some(gateway) = dir.file_name().and_then(|name| name.to_str()) else {
        return Ok(());
    };
    let recovered = recover(dir, gateway, segment_bytes, counters)?;
    for batch in &recovered.batches {
        let to = own.join(batch.id.file_name(Kind::Sealed));
        fs::rename(&batch.path, &to).map_err(|source| StoreError::io("move", &batch.path, source))?;
    }
    if !recovered.batches.is_empty() {
        directory::sync_dir(own).map_err(|source| StoreError::io("flush", own, source))?;
        tracing::info!(
            gateway,
            batches = recovered.batches.len(),
            "took over what another gateway left in the spool"
        );
    }
    Ok(())
}

struct Recovery<'a> {
    dir: &'a Path,
    next: BatchId,
    segment_bytes: usize,
    counters: &'a Counters,
    batches: Vec<Batch>,
}

impl Recovery<'_> {
    /// Makes a batch of what is in a segment.
    fn close_segment(&mut self, id: &BatchId) -> Result<(), StoreError> {
        if self.path(id, Kind::Sealed).exists() {
            // An earlier recovery has copied the rows and was killed before it could remove the segment.
            return self.remove(id, Kind::Open);
        }
        let path = self.path(id, Kind::Open);
        let bytes = fs::read(&path).map_err(|source| StoreError::io("read", &path, source))?;
        let scan = Scan::of(&bytes, &row_prefix(id));
        self.put_torn_aside(id, &bytes, &scan)?;
        if scan.rows.is_empty() {
            return self.remove(id, Kind::Open);
        }
        match scan.whole_until() {
            Some(end) => {
                self.cut_and_seal(id, end as u64)?;
                self.found(id, scan.rows.len() as u64, end as u64)
            }
            None => {
                self.rewrite(id, &bytes, &scan)?;
                self.remove(id, Kind::Open)
            }
        }
    }

    fn cut_and_seal(&self, id: &BatchId, end: u64) -> Result<(), StoreError> {
        let path = self.path(id, Kind::Open);
        let sealed = File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(end).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&path, self.path(id, Kind::Sealed)))
            .and_then(|()| directory::sync_dir(self.dir));
        sealed.map_err(|source| StoreError::io("seal", &path, source))
    }

    /// A power cut can leave a sealed file without some of its pages.
    fn check_sealed(&mut self, id: &BatchId) -> Result<(), StoreError> {
        let path = self.path(id, Kind::Sealed);
        let bytes = fs::read(&path).map_err(|source| StoreError::io("read", &path, source))?;
        if let Some(rows) = scan::intact_rows(&bytes, &row_prefix(id)) {
            return self.found(id, rows, bytes.len() as u64);
        }
        let scan = Scan::of(&bytes, &row_prefix(id));
        self.put_torn_aside(id, &bytes, &scan)?;
        if scan.rows.is_empty() {
            self.remove(id, Kind::Sealed)
        } else {
            self.rewrite(id, &bytes, &scan)
        }
    }

    /// Writes the good rows of a file as its sealed batch.
    fn rewrite(&mut self, id: &BatchId, bytes: &[u8], scan: &Scan) -> Result<(), StoreError> {
        let rows: Vec<&[u8]> = scan.rows.iter().map(|row| &bytes[row.clone()]).collect();
        directory::write_sealed(self.dir, id, &rows)
            .map_err(|source| StoreError::io("rewrite a batch in", self.dir, source))?;
        self.found(
            id,
            rows.len() as u64,
            rows.iter().map(|row| row.len() as u64).sum(),
        )
    }

    fn put_torn_aside(&self, id: &BatchId, bytes: &[u8], scan: &Scan) -> Result<(), StoreError> {
        if scan.torn.is_empty() {
            return Ok(());
        }
        let pieces: Vec<&[u8]> = scan.torn.iter().map(|piece| &bytes[piece.clone()]).collect();
        let aside = directory::put_aside(self.dir, id, "torn", &pieces);
        let aside = aside.map_err(|source| StoreError::io("put rows aside in", self.dir, source))?;
        self.counters
            .torn
            .fetch_add(pieces.len() as u64, Ordering::Relaxed);
        tracing::warn!(batch = %id, pieces = pieces.len(), aside = %aside.display(), "torn rows were put aside");
        Ok(())
    }

    /// Writes a row for each request that the journals know as begun and no file as ended.
    fn end_requests(&mut self, journals: &[BatchId]) -> Result<(), StoreError> {
        let mut begun = Vec::new();
        for id in journals {
            let path = self.path(id, Kind::Begins);
            let bytes = fs::read(&path).map_err(|source| StoreError::io("read", &path, source))?;
            let (found, unreadable) = journal::read(&bytes);
            begun.extend(found);
            self.counters.torn.fetch_add(unreadable, Ordering::Relaxed);
        }
        if let Some(first_boot) = journals
            .iter()
            .map(|id| id.boot)
            .min()
            .filter(|_| !begun.is_empty())
        {
            let mut unended: HashSet<Box<str>> =
                begun.iter().map(|request| request.event_id.clone()).collect();
            self.strike_ended(first_boot, &mut unended)?;
            begun.retain(|request| unended.remove(&request.event_id));
            self.write_crashed(begun)?;
        }
        for id in journals {
            self.remove(id, Kind::Begins)?;
        }
        Ok(())
    }

    /// Strikes out the requests whose rows are here. Older files cannot have one: the start after them settled their requests.
    fn strike_ended(&self, first_boot: u64, unended: &mut HashSet<Box<str>>) -> Result<(), StoreError> {
        for batch in self.batches.iter().filter(|batch| batch.id.boot >= first_boot) {
            if unended.is_empty() {
                break;
            }
            let bytes =
                fs::read(&batch.path).map_err(|source| StoreError::io("read", &batch.path, source))?;
            for event_id in scan::event_ids(&bytes) {
                unended.remove(event_id);
            }
        }
        Ok(())
    }

    /// Written past `spool.max_bytes` if need be: there are at most as many as requests were in flight.
    fn write_crashed(&mut self, mut unended: Vec<Unended>) -> Result<(), StoreError> {
        unended.sort_by_key(|request| request.started_at_us);
        let (mut rows, mut batch) = (0_u64, Vec::new());
        for request in unended {
            let row = serde_json::to_vec(&crashed(request));
            let row = row.map_err(|source| StoreError::io("write", self.dir, source.into()))?;
            if rows > 0 && batch.len() + row_prefix(&self.next).len() + row.len() > self.segment_bytes {
                self.write_batch(rows, &batch)?;
                (rows, batch) = (0, Vec::new());
            }
            batch.extend_from_slice(&row_prefix(&self.next));
            // The prefix has the opening brace.
            batch.extend_from_slice(&row[1..]);
            batch.push(b'\n');
            rows += 1;
        }
        if rows > 0 {
            self.write_batch(rows, &batch)
        } else {
            Ok(())
        }
    }

    fn write_batch(&mut self, rows: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let id = self.next.clone();
        self.next.sequence += 1;
        directory::write_sealed(self.dir, &id, &[bytes])
            .map_err(|source| StoreError::io("write a batch to", self.dir, source))?;
        self.counters.crashed.fetch_add(rows, Ordering::Relaxed);
        tracing::warn!(rows, batch = %id, "requests were in flight when the gateway was killed: they are booked as gateway_crash");
        self.found(&id, rows, bytes.len() as u64)
    }

    fn found(&mut self, id: &BatchId, rows: u64, bytes: u64) -> Result<(), StoreError> {
        let path = self.path(id, Kind::Sealed);
        let modified = fs::metadata(&path).and_then(|metadata| metadata.modified());
        let modified = modified.map_err(|source| StoreError::io("read", &path, source))?;
        let age = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        let sealed_at_us = i64::try_from(age.as_micros()).unwrap_or(i64::MAX);
        self.batches.push(Batch {
            id: id.clone(),
            path,
            rows,
            bytes,
            sealed_at_us,
        });
        Ok(())
    }

    fn remove(&self, id: &BatchId, kind: Kind) -> Result<(), StoreError> {
        let path = self.path(id, kind);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("remove", &path, source))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, id: &BatchId, kind: Kind) -> PathBuf {
        self.dir.join(id.file_name(kind))
    }
}

/// The event of a request whose end nobody saw. Its duration is unknown and stands as 0; it has no tokens.
fn crashed(request: Unended) -> RequestEvent {
    let endpoint = Endpoint::ALL
        .iter()
        .find(|endpoint| endpoint.name() == &*request.endpoint);
    let mut facts = Facts::unread(At(0), At(0), Ending::Unseen);
    facts.outcome = Outcome::GatewayCrash;
    facts.endpoint = endpoint.copied().unwrap_or(Endpoint::Other);
    facts.model = request.model;
    let context = Context {
        event_id: request.event_id,
        started_at_us: request.started_at_us,
        gateway_id: request.gateway_id,
        team: Some(request.team_id),
        project: request.project,
        user: request.user_id,
        upstream: request.upstream,
        request_id: request.request_id,
        trace_id: request.trace_id,
        status: None,
        error_type: Some(ERROR_TYPE),
        gateway_overhead_us: None,
        tap: None,
    };
    RequestEvent::new(context, facts, request.capture)
}
