//! The proxy's two clocks: monotonic time for durations, wall time only to place an event.

use crate::wire::At;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Reads time relative to its own creation.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Instant,
}

impl Clock {
    /// A clock that begins now.
    pub fn start() -> Clock {
        Clock {
            started: Instant::now(),
        }
    }

    /// Monotonic time now.
    pub fn now(&self) -> At {
        At(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Wall time at the monotonic reading `at`, in microseconds since 1970, as far as the wall clock is right now.
    pub fn wall_us(&self, at: At) -> i64 {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros();
        i64::try_from(wall).unwrap_or(i64::MAX) - i64::try_from(self.now().micros_since(at)).unwrap_or(0)
    }
}
