//! What the spool counts, as plain numbers.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a row is not in the spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropCause {
    /// The spool has reached `spool.max_bytes` (`drop_newest`), or nothing is left that could be given up (`drop_oldest`).
    SpoolFull,
    /// It was the oldest, and made room for newer ones (`drop_oldest`).
    Evicted,
    /// The file system has no room.
    DiskFull,
    /// The directory cannot be written to.
    ReadOnly,
    /// The file system failed otherwise.
    Io,
    /// The row is larger than a segment.
    TooLarge,
    /// The row is no JSON object on one line: a defect of this program.
    Malformed,
    /// The spool was closed already.
    Closed,
}

impl DropCause {
    /// Every cause.
    pub const ALL: [DropCause; 8] = [
        DropCause::SpoolFull,
        DropCause::Evicted,
        DropCause::DiskFull,
        DropCause::ReadOnly,
        DropCause::Io,
        DropCause::TooLarge,
        DropCause::Malformed,
        DropCause::Closed,
    ];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            DropCause::SpoolFull => "spool_full",
            DropCause::Evicted => "evicted",
            DropCause::DiskFull => "disk_full",
            DropCause::ReadOnly => "read_only",
            DropCause::Io => "io_error",
            DropCause::TooLarge => "too_large",
            DropCause::Malformed => "malformed",
            DropCause::Closed => "closed",
        }
    }
}

/// The state of a spool at one moment. Counts are since the start of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpoolStats {
    /// Bytes that count against `spool.max_bytes`: sealed files, and whole segments that are not sealed yet.
    pub bytes: u64,
    /// Sealed files that wait.
    pub files: u64,
    /// Rows in them.
    pub rows: u64,
    /// When the oldest of them was sealed, microseconds since 1970.
    pub oldest_sealed_at_us: Option<i64>,
    /// Rows taken in.
    pub appended: u64,
    /// Rows lost, in the order of [`DropCause::ALL`].
    pub dropped: [u64; DropCause::ALL.len()],
    /// Rows put aside because the store refused them.
    pub quarantined: u64,
    /// Torn pieces put aside at the start.
    pub torn: u64,
    /// Requests that were found to have been in flight when the gateway was killed.
    pub crashed: u64,
    /// Times that a request had to make its own segment.
    pub spare_misses: u64,
    /// Times that the disk would not take what it should.
    pub failures: u64,
    /// Requests in flight, as the journal has them.
    pub open: u64,
    /// Requests whose begin could not be noted.
    pub begins_missed: u64,
    /// Files in the directory that are not the gateway's.
    pub foreign: u64,
}

/// The counters behind [`SpoolStats`].
#[derive(Default)]
pub struct Counters {
    pub(super) appended: AtomicU64,
    dropped: [AtomicU64; DropCause::ALL.len()],
    pub(super) quarantined: AtomicU64,
    pub(super) torn: AtomicU64,
    pub(super) crashed: AtomicU64,
    pub(super) spare_misses: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) foreign: AtomicU64,
}

impl Counters {
    /// Books lost rows.
    pub fn dropped(&self, cause: DropCause, rows: u64) {
        // The discriminants count from 0 in the order of `ALL`, which a test holds.
        self.dropped[cause as usize].fetch_add(rows, Ordering::Relaxed);
    }

    /// The counts so far; the rest is left at zero.
    pub fn snapshot(&self) -> SpoolStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SpoolStats {
            appended: read(&self.appended),
            dropped: std::array::from_fn(|cause| read(&self.dropped[cause])),
            quarantined: read(&self.quarantined),
            torn: read(&self.torn),
            crashed: read(&self.crashed),
            spare_misses: read(&self.spare_misses),
            failures: read(&self.failures),
            foreign: read(&self.foreign),
            ..SpoolStats::default()
        }
    }
}

impl SpoolStats {
    /// Rows lost for this cause.
    pub fn dropped_by(&self, cause: DropCause) -> u64 {
        self.dropped[cause as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_a_place_and_a_name_of_its_own() {
        for (index, cause) in DropCause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, index);
            assert_eq!(
                DropCause::ALL
                    .iter()
                    .filter(|other| other.name() == cause.name())
                    .count(),
                1
            );
        }
    }
}
