//! Ids of other gateways that were seen before.
//!
//! A sliding window over each run's sequence numbers, as IPsec has it (RFC 4303, section 3.4.3): an id counts the first time, if it is not
//! far behind the highest of its run. Whoever copies a valid id gains nothing by it.

use crate::ids::origin;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// How far a request may lag behind the newest of its run: more than any gateway has in flight.
const WINDOW: u64 = 65_536;

/// Most runs that are remembered, 8 KiB each. A run that is new past that is not recognised, so that its requests count as direct: a
/// cluster has some gateways, and whoever holds its secret is no stranger.
const RUNS_MAX: usize = 256;

const WORD_BITS: u64 = u64::BITS as u64;

#[derive(Debug, Default)]
pub(super) struct Replays {
    runs: HashMap<Box<str>, Seen>,
}

#[derive(Debug)]
struct Seen {
    highest: u64,
    /// One bit for each sequence number of the window, at its number modulo [`WINDOW`].
    bits: Box<[u64]>,
}

impl Replays {
    /// Whether `id`, which was verified, is seen for the first time.
    pub(super) fn is_first(&mut self, id: &str) -> bool {
        let Some((run, sequence)) = origin(id) else {
            return false;
        };
        if let Some(seen) = self.runs.get_mut(run) {
            return seen.mark(sequence);
        }
        if self.runs.len() >= RUNS_MAX {
            return false;
        }
        match self.runs.entry(run.into()) {
            Entry::Occupied(seen) => seen.into_mut().mark(sequence),
            Entry::Vacant(place) => place.insert(Seen::new(sequence)).mark(sequence),
        }
    }
}

impl Seen {
    fn new(highest: u64) -> Seen {
        let words = usize::try_from(WINDOW / WORD_BITS).unwrap_or(usize::MAX);
        Seen {
            highest,
            bits: vec![0; words].into(),
        }
    }

    /// Whether `sequence` was new; it is not any more.
    fn mark(&mut self, sequence: u64) -> bool {
        if sequence > self.highest {
            self.advance(sequence);
        } else if self.highest - sequence >= WINDOW {
            return false;
        }
        let (word, bit) = place(sequence);
        let is_new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        is_new
    }

    /// Moves the window; the places of what fell out are free for what came in.
    fn advance(&mut self, highest: u64) {
        if highest - self.highest >= WINDOW {
            self.bits.fill(0);
        } else {
            for sequence in self.highest + 1..=highest {
                let (word, bit) = place(sequence);
                self.bits[word] &= !bit;
            }
        }
        self.highest = highest;
    }
}

fn place(sequence: u64) -> (usize, u64) {
    let at = sequence % WINDOW;
    (
        usize::try_from(at / WORD_BITS).unwrap_or(0),
        1 << (at % WORD_BITS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn each_run_has_numbers_of_its_own() {
        let mut replays = Replays::default();
        assert!(replays.is_first("gw-a-1") && replays.is_first("gw-b-1") && replays.is_first("other-a-1"));
        assert!(!replays.is_first("gw-a-1"));
        assert!(!replays.is_first("no number"));
    }

    #[test]
    fn more_runs_than_a_cluster_has_are_not_believed() {
        let mut replays = Replays::default();
        assert!((0..RUNS_MAX).all(|run| replays.is_first(&format!("gw-{run:x}-1"))));
        assert!(!replays.is_first("gw-ffffff-1"));
        assert!(replays.is_first("gw-0-2"));
    }

    proptest! {
        #[test]
        fn a_number_counts_once_and_only_within_the_window(
            steps in prop::collection::vec(prop_oneof![0..200_u64, 60_000..70_000_u64, 0..400_000_u64], 1..200),
        ) {
            let mut seen = Seen::new(steps[0]);
            let (mut model, mut highest) = (HashSet::new(), steps[0]);
            for sequence in steps {
                highest = highest.max(sequence);
                let expected = highest - sequence < WINDOW && model.insert(sequence);
                prop_assert_eq!(seen.mark(sequence), expected, "{}", sequence);
            }
        }
    }
}
