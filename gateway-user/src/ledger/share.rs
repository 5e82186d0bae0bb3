//! Divides a stretch of an upstream's time between the requests that ran in it.
//!
//! At a moment at which `n` requests run, each gets `(1−θ)/n` of it for being there and `θ·r/Σr` for its work, `r` being the request's work
//! over its run time; where nobody works, all of it goes by being there. Both are sums over the stretch's elementary intervals, between
//! which nobody comes or goes, and differ between requests only by where these sums begin and end: so two running sums do for all of
//! them, and a window with many requests is no more work than sorting them.
//!
//! Shares are whole numbers of 2^-36 µs, and rounded down. An elementary interval can take 2^-26 µs of a share: in a window of a thousand
//! requests each loses less than a ten-thousandth of a microsecond. Who ran the same span with the same work has the same share to the last bit.

use super::method::Millionths;
use super::time::{Micros, Span, Window};

/// Fractional bits of a share, which is in microseconds.
pub(super) const SHARE_BITS: u32 = 36;

/// Fractional bits of a presence.
const PRESENCE_BITS: u32 = 16;

/// The presence of a request that runs.
pub(super) const PRESENT: u64 = 1 << PRESENCE_BITS;

/// Longest stretch, in bits of microseconds: a window.
const STRETCH_BITS: u32 = 24;

const _: () = assert!(Window::LEN_US < 1 << STRETCH_BITS);

/// Fractional bits of the running sum of time over rates: what a whole stretch over the lowest rate leaves of 127.
const PER_RATE_BITS: u32 = 127 - STRETCH_BITS;

/// Rates stay below this many bits. More would be finer where the slowest has a billionth of the rate of the fastest, and coarser in sums: a
/// rate times the last bit of the running sum is what may get lost in an interval.
const RATE_BITS: u32 = 76;

/// Someone who ran.
#[derive(Clone, Copy, Debug)]
pub(super) struct Runner {
    pub(super) run: Span,
    pub(super) rate: u128,
}

/// Someone who is there, in part, whenever anybody runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Companion {
    /// At most [`PRESENT`].
    pub(super) presence: u64,
    pub(super) rate: u128,
}

/// Who got how much of a stretch.
#[derive(Debug)]
pub(super) struct Shares {
    /// In the order of the runners.
    pub(super) runners: Vec<u128>,
    /// The companion's.
    pub(super) companion: u128,
    /// When anybody ran, in order and apart from each other.
    pub(super) busy: Vec<Span>,
}

/// Work over time, for all at one scale, since only proportions matter: the highest has almost [`RATE_BITS`] bits. Who has worked at all has
/// a rate of at least 1. No time counts as no rate.
pub(super) fn rates(works: impl Iterator<Item = (u128, u64)> + Clone) -> Vec<u128> {
    let highest = works
        .clone()
        .map(|(work, time_us)| work.checked_div(time_us.into()).unwrap_or(0));
    let bits = 128 - highest.max().unwrap_or(0).leading_zeros();
    let rate = |(work, time_us): (u128, u64)| {
        let scaled = match RATE_BITS.checked_sub(bits) {
            Some(up) => (work << up).checked_div(time_us.into()),
            None => work
                .checked_div(time_us.into())
                .map(|rate| rate >> (bits - RATE_BITS)),
        };
        scaled.map_or(0, |rate| rate.max(u128::from(work > 0)))
    };
    works.map(rate).collect()
}

/// Divides the time within `stretch`.
pub(super) fn divide(stretch: Span, runners: &[Runner], companion: Companion, theta: Millionths) -> Shares {
    debug_assert!(stretch.len_us() >> STRETCH_BITS == 0, "a window is shorter");
    let clipped = |runner: &Runner| runner.run.within(stretch);
    let mut turns: Vec<Turn> = Vec::with_capacity(2 * runners.len());
    for (runner, of) in runners.iter().enumerate() {
        let run = clipped(of);
        if !run.is_empty() {
            turns.extend([(run.from(), false), (run.to(), true)].map(|(at, leaves)| Turn {
                at,
                leaves,
                runner,
            }));
        }
    }
    turns.sort_unstable_by_key(|turn| turn.at);
    let mut sums = Sums::default();
    let mut crowd = Crowd::new(companion);
    let mut busy: Vec<Span> = Vec::new();
    let mut gained = vec![Sums::default(); runners.len()];
    let mut before = stretch.from();
    for turn in &turns {
        crowd.pass(Span::new(before, turn.at), &mut sums, &mut busy);
        before = turn.at;
        let gained = &mut gained[turn.runner];
        *gained = if turn.leaves { sums.since(*gained) } else { sums };
        crowd.turn(turn.leaves, runners[turn.runner].rate);
    }
    let share = |gained: &Sums, presence, rate| gained.share(presence, rate, theta);
    Shares {
        runners: gained
            .iter()
            .zip(runners)
            .map(|(gained, runner)| share(gained, PRESENT, runner.rate))
            .collect(),
        companion: share(&sums, companion.presence, companion.rate),
        busy,
    }
}

/// Someone comes or goes.
struct Turn {
    at: Micros,
    leaves: bool,
    runner: usize,
}

/// Who is there just now.
struct Crowd {
    runners: u64,
    presence: u64,
    rate: u128,
}

/// Integrals over the time so far.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// Of 1 over presences, in µs with [`SHARE_BITS`].
    per_presence: u128,
    /// The same, of times at which nobody works.
    per_presence_of_no_work: u128,
    /// Of 1 over the sum of rates, in µs with [`PER_RATE_BITS`].
    per_rate: u128,
}

impl Crowd {
    fn new(companion: Companion) -> Crowd {
        Crowd {
            runners: 0,
            presence: companion.presence.min(PRESENT),
            rate: companion.rate,
        }
    }

    fn turn(&mut self, leaves: bool, rate: u128) {
        if leaves {
            self.runners -= 1;
            self.presence -= PRESENT;
            self.rate -= rate;
        } else {
            self.runners += 1;
            self.presence += PRESENT;
            self.rate += rate;
        }
    }

    /// Lets a time pass in which nobody comes or goes.
    fn pass(&self, time: Span, sums: &mut Sums, busy: &mut Vec<Span>) {
        if self.runners == 0 || time.is_empty() {
            return;
        }
        let len_us = u128::from(time.len_us());
        let per_presence = (len_us << (SHARE_BITS + PRESENCE_BITS)) / u128::from(self.presence);
        sums.per_presence += per_presence;
        match (len_us << PER_RATE_BITS).checked_div(self.rate) {
            Some(per_rate) => sums.per_rate += per_rate,
            None => sums.per_presence_of_no_work += per_presence,
        }
        match busy.last_mut() {
            Some(last) if last.to() == time.from() => *last = Span::new(last.from(), time.to()),
            _ => busy.push(time),
        }
    }
}

impl Sums {
    fn since(self, before: Sums) -> Sums {
        Sums {
            per_presence: self.per_presence - before.per_presence,
            per_presence_of_no_work: self.per_presence_of_no_work - before.per_presence_of_no_work,
            per_rate: self.per_rate - before.per_rate,
        }
    }

    /// The share of someone who was there meanwhile.
    fn share(&self, presence: u64, rate: u128, theta: Millionths) -> u128 {
        let present = |per_presence: u128| (per_presence * u128::from(presence)) >> PRESENCE_BITS;
        // The rate is part of every sum that was divided by, so that the product is at most the time.
        let by_rate = (self.per_rate * rate) >> (PER_RATE_BITS - SHARE_BITS);
        let worked = by_rate + present(self.per_presence_of_no_work);
        let (one, theta) = (u128::from(Millionths::ONE.get()), u128::from(theta.get()));
        ((one - theta) * present(self.per_presence) + theta * worked) / one
    }
}
