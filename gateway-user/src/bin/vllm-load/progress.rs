//! How far a run is, on stderr: a bar on a terminal, else a line now and then.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often a bar moves: often enough to look alive.
const BAR_EVERY: Duration = Duration::from_millis(200);

/// How often a line is printed when stderr is a file.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Cells of the bar.
const BAR_WIDTH: usize = 30;

/// Counters that all threads touch once a request. Nothing is ordered by them.
#[derive(Debug, Default)]
pub struct Live {
    /// Requests that ended.
    pub ended: AtomicU64,
    /// Those that did not end well, aborts aside.
    pub failed: AtomicU64,
}

/// Which end a run has.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// After this many requests.
    pub requests: Option<u64>,
    /// After this time.
    pub duration: Option<Duration>,
}

impl Goal {
    /// How much is done, from 0 to 1: whichever end is nearer.
    fn share(&self, ended: u64, elapsed: Duration) -> f64 {
        let by_requests = self
            .requests
            .map_or(0.0, |goal| ended as f64 / goal.max(1) as f64);
        let by_time = self
            .duration
            .map_or(0.0, |goal| elapsed.as_secs_f64() / goal.as_secs_f64().max(1e-9));
        by_requests.max(by_time).clamp(0.0, 1.0)
    }
}

/// Shows progress until it is dropped.
#[derive(Debug)]
pub struct Progress {
    goal: Goal,
    started: Instant,
    /// `None` shows nothing.
    terminal: Option<bool>,
}

impl Progress {
    /// Progress of a run that starts now.
    pub fn new(goal: Goal, shown: bool) -> Self {
        Self {
            goal,
            started: Instant::now(),
            terminal: shown.then(|| std::io::stderr().is_terminal()),
        }
    }

    /// How long to wait between two calls of [`Progress::show`].
    pub fn interval(&self) -> Duration {
        if self.terminal == Some(true) {
            BAR_EVERY
        } else {
            LINE_EVERY
        }
    }

    /// Shows how far the run is.
    pub fn show(&self, live: &Live) {
        let Some(terminal) = self.terminal else { return };
        let (ended, failed) = (
            live.ended.load(Ordering::Relaxed),
            live.failed.load(Ordering::Relaxed),
        );
        let line = describe(&self.goal, ended, failed, self.started.elapsed());
        // Progress that cannot be written is no reason to stop a run.
        let _ = if terminal {
            write!(std::io::stderr(), "\r{line}\x1b[K")
        } else {
            writeln!(std::io::stderr(), "{line}")
        };
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal == Some(true) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn describe(goal: &Goal, ended: u64, failed: u64, elapsed: Duration) -> String {
    let share = goal.share(ended, elapsed);
    let full = (share * BAR_WIDTH as f64) as usize;
    let bar = format!("{}{}", "#".repeat(full), "-".repeat(BAR_WIDTH - full));
    let seconds = elapsed.as_secs_f64();
    let rate = ended as f64 / seconds.max(1e-3);
    format!(
        "[{bar}] {:3.0} %  {seconds:.0} s  {ended} requests, {rate:.0}/s, {failed} failed",
        share * 100.0
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_end_counts() {
        let goal = Goal {
            requests: Some(100),
            duration: Some(Duration::from_secs(10)),
        };
        assert_eq!(goal.share(50, Duration::from_secs(1)), 0.5);
        assert_eq!(goal.share(1, Duration::from_secs(9)), 0.9);
        assert_eq!(goal.share(200, Duration::from_secs(9)), 1.0);
    }

    #[test]
    fn the_bar_has_its_width_at_both_ends() {
        let goal = Goal {
            requests: Some(4),
            duration: None,
        };
        let empty = describe(&goal, 0, 0, Duration::ZERO);
        let full = describe(&goal, 4, 1, Duration::from_secs(2));
        assert!(
            empty.contains(&"-".repeat(BAR_WIDTH)) && full.contains(&"#".repeat(BAR_WIDTH)),
            "{empty} {full}"
        );
        assert!(full.contains("2/s, 1 failed"), "{full}");
    }
}
