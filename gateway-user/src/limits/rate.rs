//! So many of something a minute: a token bucket that counts without rounding.
//!
//! It holds what a minute gives, and fills at the same pace. So over any time `t` at most `rate · t` and one bucketful are let in: after a quiet
//! minute a minute's worth may come at once, and in no minute is it more than twice the rate. More than is there can be taken, as a debt, which is
//! paid back at that pace before anything is let in again.
//!
//! Time is passed in, and only differences of it mean anything. What fills in a nanosecond is `rate` units, of which one thing takes as many as
//! a minute has nanoseconds: everything is whole numbers, however odd the rate.

use crate::wire::At;

/// Nanoseconds of a minute, and so the units that one thing takes.
const ONE: i128 = 60_000_000_000;

/// A bucket of things that may be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    per_minute: u32,
    /// Negative in debt.
    units: i128,
    at: At,
}

impl Bucket {
    /// A full one.
    pub fn full(per_minute: u32, now: At) -> Bucket {
        Bucket {
            per_minute,
            units: i128::from(per_minute) * ONE,
            at: now,
        }
    }

    /// The pace, which is also what it holds.
    pub fn per_minute(&self) -> u32 {
        self.per_minute
    }

    /// Lets time pass. A clock that stands still or goes back fills nothing.
    fn fill(&mut self, now: At) {
        let elapsed_ns = i128::from(now.0.saturating_sub(self.at.0));
        let filled = self.units + elapsed_ns * i128::from(self.per_minute);
        self.units = filled.min(self.capacity());
        self.at = self.at.max(now);
    }

    fn capacity(&self) -> i128 {
        i128::from(self.per_minute) * ONE
    }

    /// How long until there is one to take, in nanoseconds; 0 when there is.
    pub fn wait_ns(&mut self, now: At) -> u64 {
        self.fill(now);
        self.ns_until(ONE)
    }

    /// How long until it is full, in nanoseconds.
    pub fn until_full_ns(&mut self, now: At) -> u64 {
        self.fill(now);
        self.ns_until(self.capacity())
    }

    fn ns_until(&self, units: i128) -> u64 {
        let missing = (units - self.units).max(0);
        // A rate is at least 1; rounded up, so that what is promised is there.
        let pace = i128::from(self.per_minute.max(1));
        u64::try_from((missing + pace - 1) / pace).unwrap_or(u64::MAX)
    }

    /// Takes so many, whether they are there or not.
    pub fn take(&mut self, count: u64, now: At) {
        self.fill(now);
        self.units = self.units.saturating_sub(i128::from(count) * ONE);
    }

    /// How many are there.
    pub fn remaining(&mut self, now: At) -> u64 {
        self.fill(now);
        u64::try_from(self.units.max(0) / ONE).unwrap_or(u64::MAX)
    }

    /// How many of what it holds are taken, rounded up; more than it holds in debt.
    pub fn used(&mut self, now: At) -> u64 {
        self.fill(now);
        let taken = (self.capacity() - self.units + ONE - 1) / ONE;
        u64::try_from(taken).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_minutes_worth_may_come_at_once_and_then_one_by_one() {
        let mut bucket = Bucket::full(3, At(0));
        for left in [3, 2, 1] {
            assert_eq!((bucket.remaining(At(0)), bucket.wait_ns(At(0))), (left, 0));
            bucket.take(1, At(0));
        }
        assert_eq!(bucket.wait_ns(At(0)), 20 * SECOND);
        assert_eq!(bucket.wait_ns(At(5 * SECOND)), 15 * SECOND);
        assert_eq!(bucket.wait_ns(At(20 * SECOND)), 0);
        assert_eq!(
            (bucket.used(At(20 * SECOND)), bucket.remaining(At(20 * SECOND))),
            (2, 1)
        );
        assert_eq!(bucket.until_full_ns(At(20 * SECOND)), 40 * SECOND);
        assert_eq!(
            bucket.remaining(At(3_600 * SECOND)),
            3,
            "it holds no more than a minute's worth"
        );
    }

    #[test]
    fn a_debt_is_paid_back_before_anything_is_let_in() {
        let mut bucket = Bucket::full(60, At(0));
        bucket.take(150, At(0));
        assert_eq!((bucket.used(At(0)), bucket.remaining(At(0))), (150, 0));
        assert_eq!(bucket.wait_ns(At(0)), 91 * SECOND, "90 of debt, and the one");
        assert_eq!(bucket.remaining(At(91 * SECOND)), 1);
    }

    #[test]
    fn a_clock_that_goes_back_fills_nothing() {
        let mut bucket = Bucket::full(60, At(100 * SECOND));
        bucket.take(60, At(100 * SECOND));
        assert_eq!(bucket.remaining(At(50 * SECOND)), 0);
        assert_eq!(
            bucket.remaining(At(101 * SECOND)),
            1,
            "nor twice when it comes again"
        );
    }

    proptest! {
        /// However requests come, no stretch of time has more than its rate and one bucketful.
        #[test]
        fn no_stretch_lets_in_more_than_its_rate_and_a_bucketful(
            per_minute in 1_u32..2_000,
            gaps in prop::collection::vec(0_u64..5 * SECOND, 1..300),
        ) {
            let mut bucket = Bucket::full(per_minute, At(0));
            let (mut now, mut let_in) = (0, Vec::new());
            for gap in gaps {
                now += gap;
                if bucket.wait_ns(At(now)) == 0 {
                    bucket.take(1, At(now));
                    let_in.push(now);
                }
            }
            for first in 0..let_in.len() {
                for last in first..let_in.len() {
                    let (count, span_ns) = ((last - first + 1) as u128, u128::from(let_in[last] - let_in[first]));
                    let most = u128::from(per_minute) * span_ns / ONE as u128 + u128::from(per_minute);
                    prop_assert!(count <= most, "{count} in {span_ns} ns at {per_minute} a minute");
                }
            }
        }

        /// Waiting as long as it says, and no shorter, is what it takes.
        #[test]
        fn a_wait_is_as_long_as_it_says(per_minute: u32, taken in 0_u64..10_000_000_000, spent_ns in 0_u64..1 << 40) {
            let per_minute = per_minute.max(1);
            let mut bucket = Bucket::full(per_minute, At(0));
            bucket.take(taken, At(0));
            let now = At(spent_ns);
            let wait_ns = bucket.wait_ns(now);
            prop_assert_eq!(wait_ns == 0, bucket.remaining(now) > 0);
            let mut early = bucket.clone();
            prop_assert!(bucket.remaining(At(now.0 + wait_ns)) >= 1);
            if wait_ns > 0 {
                prop_assert_eq!(early.remaining(At(now.0 + wait_ns - 1)), 0);
            }
        }

        /// What is used and what remains are what it holds, but for the part of one.
        #[test]
        fn what_is_used_and_what_remains_are_all(per_minute in 1_u32.., taken: u32, spent_ns in 0_u64..1 << 40) {
            let mut bucket = Bucket::full(per_minute, At(0));
            bucket.take(taken.into(), At(0));
            let (used, remaining) = (bucket.used(At(spent_ns)), bucket.remaining(At(spent_ns)));
            if used <= u64::from(per_minute) {
                prop_assert_eq!(used + remaining, u64::from(per_minute));
            } else {
                prop_assert_eq!(remaining, 0);
            }
        }
    }
}
