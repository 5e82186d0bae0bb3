//! Segments ready to be filled, within the spool's limit.
//!
//! A segment counts against `spool.max_bytes` in full from the moment it is made, so that a row that finds a segment has its room for
//! certain. The limit is one for all tables of a gateway, and none has a part of it reserved. When there is no room for another segment, the
//! policy decides: under `drop_newest` there is none, under `drop_oldest` the oldest sealed files go, of whichever table. Once making one has failed, requests do not try again by themselves: only the keeper does, so that a full disk costs
//! each of them a look at a flag.

use super::lock;
use super::names::{BatchId, Kind};
use super::sealed::SealedBatches;
use super::segment::Segment;
use super::stats::{Counters, DropCause};
use crate::config::WhenFull;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Segments that are kept ready: one is used while the other is made anew.
const SPARES: usize = 2;

/// An empty segment and the batch that it will be.
pub struct Fresh {
    pub id: BatchId,
    pub segment: Segment,
}

/// The room that the spools of a gateway share: each takes what it needs, until nothing is left for either.
pub struct Room {
    max_bytes: u64,
    when_full: WhenFull,
    used_bytes: AtomicU64,
    tenants: Mutex<Vec<Arc<Tenant>>>,
}

/// A spool, as far as the other one has to do with it.
struct Tenant {
    sealed: Arc<SealedBatches>,
    counters: Arc<Counters>,
    /// What it has of the room.
    used_bytes: AtomicU64,
}

/// Makes segments and keeps some ready.
pub struct Supply {
    dir: PathBuf,
    gateway: Box<str>,
    boot: u64,
    segment_bytes: usize,
    room: Arc<Room>,
    tenant: Arc<Tenant>,
    /// The next sequence. Held while a segment is made, so that segments come into use in the order of their sequences.
    maker: Mutex<u64>,
    spares: Mutex<VecDeque<Fresh>>,
    blocked: Mutex<Option<DropCause>>,
}

impl Room {
    /// All of it free.
    pub fn new(max_bytes: u64, when_full: WhenFull) -> Arc<Room> {
        Arc::new(Room {
            max_bytes,
            when_full,
            used_bytes: AtomicU64::new(0),
            tenants: Mutex::default(),
        })
    }

    /// Takes `wanted` bytes for `tenant`, by the policy.
    fn claim(&self, tenant: &Tenant, wanted: u64) -> Result<(), (DropCause, Option<io::Error>)> {
        let fits = |used: u64| used.checked_add(wanted).filter(|sum| *sum <= self.max_bytes);
        while self
            .used_bytes
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, fits)
            .is_err()
        {
            if self.when_full == WhenFull::DropNewest || !self.evict()? {
                return Err((DropCause::SpoolFull, None));
            }
        }
        tenant.used_bytes.fetch_add(wanted, Ordering::AcqRel);
        Ok(())
    }

    fn release(&self, tenant: &Tenant, bytes: u64) {
        tenant.used_bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.used_bytes.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Gives up the oldest file, whosever it is. False when there is none.
    fn evict(&self) -> Result<bool, (DropCause, Option<io::Error>)> {
        let oldest_of = |tenant: &Arc<Tenant>| Some((tenant.sealed.oldest_at_us()?, Arc::clone(tenant)));
        let oldest = lock(&self.tenants)
            .iter()
            .filter_map(oldest_of)
            .min_by_key(|(at_us, _)| *at_us);
        let Some((_, tenant)) = oldest else {
            return Ok(false);
        };
        let Some(batch) = tenant.sealed.remove_oldest() else {
            // Stored meanwhile, so that there is room.
            return Ok(true);
        };
        match std::fs::remove_file(&batch.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                let cause = cause_of(&error);
                tenant.sealed.put((*batch).clone());
                return Err((cause, Some(error)));
            }
        }
        self.release(&tenant, batch.bytes);
        tenant.counters.dropped(DropCause::Evicted, batch.rows);
        Ok(true)
    }
}

impl Supply {
    /// A supply of segments of so many bytes whose first one will have the id `next`, in a directory where `sealed` waits already.
    pub fn new(
        dir: &Path,
        next: BatchId,
        segment_bytes: usize,
        room: Arc<Room>,
        sealed: Arc<SealedBatches>,
        counters: Arc<Counters>,
    ) -> Supply {
        let waiting_bytes = sealed.oldest(usize::MAX).iter().map(|batch| batch.bytes).sum();
        let tenant = Arc::new(Tenant {
            sealed,
            counters,
            used_bytes: AtomicU64::new(waiting_bytes),
        });
        // Also past the limit: what was once kept stays.
        room.used_bytes.fetch_add(waiting_bytes, Ordering::AcqRel);
        lock(&room.tenants).push(Arc::clone(&tenant));
        Supply {
            dir: dir.to_owned(),
            gateway: next.gateway,
            boot: next.boot,
            segment_bytes,
            room,
            tenant,
            maker: Mutex::new(next.sequence),
            spares: Mutex::default(),
            blocked: Mutex::new(None),
        }
    }

    /// A segment for a row that waits: a ready one, or, rather slow than lost, one that is made now.
    ///
    /// # Errors
    /// Why there is none.
    pub fn take(&self) -> Result<Fresh, DropCause> {
        if let Some(spare) = lock(&self.spares).pop_front() {
            return Ok(spare);
        }
        if let Some(cause) = self.blocked() {
            return Err(cause);
        }
        self.tenant.counters.spare_misses.fetch_add(1, Ordering::Relaxed);
        let mut next = lock(&self.maker);
        // The keeper may have made one while this waited for it.
        if let Some(spare) = lock(&self.spares).pop_front() {
            return Ok(spare);
        }
        self.make(&mut next)
    }

    /// Makes segments until enough are ready. For a thread that may wait.
    pub fn fill(&self) {
        while lock(&self.spares).len() < SPARES {
            let mut next = lock(&self.maker);
            let Ok(fresh) = self.make(&mut next) else { return };
            fresh.segment.mapping().populate(0..fresh.segment.capacity());
            lock(&self.spares).push_back(fresh);
        }
    }

    /// Why there are no segments to be had, if there are none.
    pub fn blocked(&self) -> Option<DropCause> {
        *lock(&self.blocked)
    }

    /// Whether a segment is ready, or could be made as far as is known.
    pub fn has_successor(&self) -> bool {
        self.blocked().is_none() || !lock(&self.spares).is_empty()
    }

    /// What the names of all batches begin with that are made here.
    pub fn boot_prefix(&self) -> String {
        format!("{}/{:012x}/", self.gateway, self.boot)
    }

    /// Bytes of this spool that count against the limit.
    pub fn used_bytes(&self) -> u64 {
        self.tenant.used_bytes.load(Ordering::Acquire)
    }

    /// Gives room back.
    pub fn release(&self, bytes: u64) {
        self.room.release(&self.tenant, bytes);
    }

    /// Removes the segments that nobody came to use.
    pub fn close(&self) {
        for spare in lock(&self.spares).drain(..) {
            // One that stays behind is empty, and the next start removes it.
            let _ = std::fs::remove_file(spare.segment.path());
            self.release(self.segment_bytes as u64);
        }
    }

    fn make(&self, next: &mut u64) -> Result<Fresh, DropCause> {
        let claimed = self.room.claim(&self.tenant, self.segment_bytes as u64);
        let made = claimed.and_then(|()| {
            self.create(*next).map_err(|error| {
                self.release(self.segment_bytes as u64);
                let cause = cause_of(&error);
                (cause, Some(error))
            })
        });
        let mut blocked = lock(&self.blocked);
        match made {
            Ok(fresh) => {
                *next += 1;
                if blocked.take().is_some() {
                    tracing::info!(dir = %self.dir.display(), "the spool takes rows again");
                }
                Ok(fresh)
            }
            Err((cause, error)) => {
                if *blocked != Some(cause) {
                    self.complain(cause, error.as_ref());
                }
                *blocked = Some(cause);
                Err(cause)
            }
        }
    }

    fn create(&self, sequence: u64) -> io::Result<Fresh> {
        let id = BatchId {
            boot: self.boot,
            sequence,
            gateway: self.gateway.clone(),
        };
        let segment = Segment::create(&self.dir.join(id.file_name(Kind::Open)), self.segment_bytes)?;
        Ok(Fresh { id, segment })
    }

    fn complain(&self, cause: DropCause, error: Option<&io::Error>) {
        let dir = self.dir.display();
        let limit = self.room.max_bytes;
        match error {
            None => tracing::error!(
                %dir, limit,
                "the spool is full and new rows are lost: see why the store takes none, or raise spool.max_bytes"
            ),
            Some(error) => tracing::error!(
                %dir, cause = cause.name(), %error,
                "the spool's file system takes no more files and new rows are lost: free space or make it writable"
            ),
        }
    }
}

/// What an error of the file system means for rows.
pub fn cause_of(error: &io::Error) -> DropCause {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DropCause::DiskFull,
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => DropCause::ReadOnly,
        _ => DropCause::Io,
    }
}
