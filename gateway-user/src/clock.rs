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

#[cfg(test)]
mod tests {
    use super::*;

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
