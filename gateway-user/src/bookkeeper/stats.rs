//! What the bookkeeper counts, for metrics.

use crate::ledger::{HourCost, Micros, State};
use crate::store::WaitCause;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Counts of one bookkeeper.
#[derive(Debug, Default)]
pub struct LedgerStats {
    written: [AtomicU64; State::ALL.len()],
    failures: [AtomicU64; WaitCause::ALL.len()],
    late_segments: AtomicU64,
    cycle_us: AtomicU64,
    /// The end of the newest booked window of each upstream, microseconds since 1970; 0 while there is none.
    booked_until: Vec<(Box<str>, AtomicU64)>,
    /// The last hour of each upstream, where it was known at the last look.
    hours: Vec<(Box<str>, Mutex<Option<HourCost>>)>,
}

impl LedgerStats {
    /// For these upstreams.
    pub(super) fn of<'a>(upstreams: impl Iterator<Item = &'a str>) -> LedgerStats {
        let names: Vec<Box<str>> = upstreams.map(Into::into).collect();
        LedgerStats {
            hours: names
                .iter()
                .map(|name| (name.clone(), Mutex::default()))
                .collect(),
            booked_until: names.into_iter().map(|name| (name, AtomicU64::new(0))).collect(),
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

    /// What the last hour cost at each upstream; `None` where that is not known, or was not told for so long that it was another hour.
    pub fn last_hours(&self, now: Micros) -> impl Iterator<Item = (&str, Option<HourCost>)> {
        self.hours.iter().map(move |(name, hour)| {
            let hour = *hour.lock().unwrap_or_else(PoisonError::into_inner);
            (&**name, hour.filter(|hour| hour.is_of(now)))
        })
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

    pub(super) fn knows_hour(&self, upstream: &str) -> bool {
        let mut of_upstream = self.hours.iter().filter(|(name, _)| &**name == upstream);
        of_upstream.any(|(_, hour)| hour.lock().unwrap_or_else(PoisonError::into_inner).is_some())
    }

    pub(super) fn hour_was(&self, upstream: &str, cost: Option<HourCost>) {
        for (_, hour) in self.hours.iter().filter(|(name, _)| &**name == upstream) {
            *hour.lock().unwrap_or_else(PoisonError::into_inner) = cost;
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
