//! What the bookkeeper counts, for metrics.

use crate::ledger::{Micros, State};
use crate::store::WaitCause;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one bookkeeper.
#[derive(Debug, Default)]
pub struct LedgerStats {
    written: [AtomicU64; State::ALL.len()],
    failures: [AtomicU64; WaitCause::ALL.len()],
    late_segments: AtomicU64,
    cycle_us: AtomicU64,
    /// The end of the newest booked window of each upstream, microseconds since 1970; 0 while there is none.
    booked_until: Vec<(Box<str>, AtomicU64)>,
}

impl LedgerStats {
    /// For these upstreams.
    pub(super) fn of<'a>(upstreams: impl Iterator<Item = &'a str>) -> LedgerStats {
        LedgerStats {
            booked_until: upstreams.map(|name| (name.into(), AtomicU64::new(0))).collect(),
            ..LedgerStats::default()
        }
    }

    /// Windows written in this state.
    pub fn written(&self, state: State) -> u64 {
        self.written[place(state)].load(Ordering::Relaxed)
    }

    /// Cycles that failed for this cause.
    pub fn failures(&self, cause: WaitCause) -> u64 {
        self.failures[cause as usize].load(Ordering::Relaxed)
    }

    /// Segments that came for months that were closed.
    pub fn late_segments(&self) -> u64 {
        self.late_segments.load(Ordering::Relaxed)
    }

    /// How long the last cycle took, in microseconds.
    pub fn cycle_us(&self) -> u64 {
        self.cycle_us.load(Ordering::Relaxed)
    }

    /// Until when each upstream is booked, where it is at all.
    pub fn booked_until(&self) -> impl Iterator<Item = (&str, Micros)> {
        let until = self
            .booked_until
            .iter()
            .map(|(name, until)| (&**name, Micros(until.load(Ordering::Relaxed))));
        until.filter(|(_, until)| until.0 > 0)
    }

    pub(super) fn wrote(&self, state: State, windows: u64) {
        self.written[place(state)].fetch_add(windows, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, cause: WaitCause) {
        self.failures[cause as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn came_late(&self, segments: u64) {
        self.late_segments.fetch_add(segments, Ordering::Relaxed);
    }

    pub(super) fn took(&self, cycle_us: u64) {
        self.cycle_us.store(cycle_us, Ordering::Relaxed);
    }

    pub(super) fn booked(&self, upstream: &str, until: Micros) {
        for (_, booked) in self.booked_until.iter().filter(|(name, _)| &**name == upstream) {
            booked.fetch_max(until.0, Ordering::Relaxed);
        }
    }
}

fn place(state: State) -> usize {
    match state {
        State::Provisional => 0,
        State::Settled => 1,
        State::Restated => 2,
    }
}
