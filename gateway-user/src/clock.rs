//! The two clocks: monotonic time for durations, wall time only to place an event.
//!
//! Monotonic readings are those of `CLOCK_MONOTONIC`, which is also what the kernel probe stamps its records with: on Linux, times of both capture
//! paths can be subtracted from each other.

use crate::wire::At;
use rustix::time::{ClockId, clock_gettime};
use std::time::{SystemTime, UNIX_EPOCH};

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// Monotonic time now.
pub fn now() -> At {
    let now = clock_gettime(ClockId::Monotonic);
    // Since some start of the system, so that neither part is ever negative.
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    At(seconds.unwrap_or(0) * NANOS_PER_SECOND + nanos.unwrap_or(0))
}

/// Wall time now, in microseconds since 1970.
pub fn wall_now_us() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX)
}

/// Wall time at the monotonic reading `at`, in microseconds since 1970, as far as the wall clock is right now.
pub fn wall_us(at: At) -> i64 {
    wall_now_us() - i64::try_from(now().micros_since(at)).unwrap_or(0)
}

/// How long the two clocks are taken to run side by side. A wall clock that is set is noticed that much later; a server that answers as fast as it can
/// has a hundred requests in it.
const LAID_FOR_NS: u64 = 1_000_000;

/// Places moments on the wall clock, and reads the clocks once for all that lie within a millisecond: for who places each request of all servers.
#[derive(Debug, Default)]
pub struct Placer {
    /// The last moment for which the clocks were read.
    laid: Option<At>,
    /// Wall time less monotonic time, then.
    offset_us: i64,
}

impl Placer {
    /// Wall time at `at`, in microseconds since 1970, as [`wall_us`] tells it, or told it up to a millisecond of such moments ago.
    pub fn wall_us(&mut self, at: At) -> i64 {
        let monotonic_us = i64::try_from(at.0 / 1_000).unwrap_or(0);
        if self.laid.is_none_or(|laid| at.0.abs_diff(laid.0) > LAID_FOR_NS) {
            self.laid = Some(at);
            self.offset_us = wall_us(at) - monotonic_us;
        }
        self.offset_us + monotonic_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placed_moment_is_where_both_clocks_have_it() {
        let mut placer = Placer::default();
        let start = now();
        for after_ns in [
            0,
            400_000,
            LAID_FOR_NS,
            2 * LAID_FOR_NS,
            NANOS_PER_SECOND,
            900_000,
        ] {
            let at = At(start.0 + after_ns);
            // As far as a busy machine may take to read one clock behind the other.
            assert!(placer.wall_us(at).abs_diff(wall_us(at)) < 100_000, "{after_ns}");
        }
        let (first, second) = (placer.wall_us(start), placer.wall_us(At(start.0 + 250_000)));
        assert_eq!(
            second - first,
            250,
            "moments close to each other keep their distance"
        );
    }

    #[test]
    fn a_moment_that_is_past_lies_as_far_back_on_the_wall_clock() {
        let at = now();
        let second_ago = At(at.0.saturating_sub(NANOS_PER_SECOND));
        let between_us = wall_us(at) - wall_us(second_ago);
        // Microseconds pass between the readings, and the wall clock may be slewed meanwhile; a second is far beyond either.
        assert!((900_000..=1_100_000).contains(&between_us), "{between_us}");
        assert!(now() >= at);
    }
}
