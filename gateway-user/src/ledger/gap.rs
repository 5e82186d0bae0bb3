//! What an engine counted beyond the requests that are known, in one window: decided by what lies near it, and by nothing else.
//!
//! [`settle`] over a context of windows on both sides keeps of their differences what no other one of them takes back, and the window's own
//! part of it counts. So whoever computes a window comes to the same, whichever windows were computed with it, and what happened an hour ago changes
//! nothing. Steady direct traffic, of which every window has some, comes out exactly.
//!
//! Where counters are unknown nothing is known to be missing: there is no gap, and a context ends. The window at its end still counts as one in which
//! nothing was counted, since what ran on its edge can have been counted on this side of it.

use super::engine::settle;
use super::facts::Work;

/// What was counted in a window, where that is known, and what is known to have been done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// What the engine's counters grew by.
    pub counted: Option<Work>,
    /// The sum of the segments.
    pub known: Work,
}

/// What was counted beyond what is known in the window at `place` of `windows`, which follow each other without holes; `reach` of them on each side
/// count, or as many as there are.
pub fn gap(windows: &[Difference], place: usize, reach: usize) -> Work {
    let is_unknown = |index: &usize| windows[*index].counted.is_none();
    if windows.get(place).is_none_or(|own| own.counted.is_none()) {
        return Work::default();
    }
    let (first, last) = (
        place.saturating_sub(reach),
        place.saturating_add(reach).min(windows.len() - 1),
    );
    let first = (first..place).rev().find(is_unknown).unwrap_or(first);
    let last = (place..=last).find(is_unknown).unwrap_or(last);
    let context: Vec<(Work, Work)> = windows[first..=last]
        .iter()
        .map(|window| (window.counted.unwrap_or_default(), window.known))
        .collect();
    settle(&context)[place - first]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn completion(completion_tokens: u64) -> Work {
        Work {
            completion_tokens,
            ..Work::default()
        }
    }

    fn window(counted: impl Into<Option<u64>>, known: u64) -> Difference {
        Difference {
            counted: counted.into().map(completion),
            known: completion(known),
        }
    }

    fn gaps(windows: &[Difference], reach: usize) -> Vec<u64> {
        (0..windows.len())
            .map(|place| gap(windows, place, reach).completion_tokens)
            .collect()
    }

    #[test]
    fn steady_direct_traffic_is_counted_exactly_window_by_window() {
        let windows: Vec<Difference> = (0..50).map(|at| window(100 + at % 3, 90)).collect();
        let expected: Vec<u64> = (0..50).map(|at| 10 + at % 3).collect();
        assert_eq!(gaps(&windows, 5), expected);
    }

    #[test]
    fn what_a_window_nearby_takes_back_is_no_gap_and_one_far_away_takes_nothing() {
        let late = [window(0, 10), window(0, 0), window(10, 0), window(0, 0)];
        assert_eq!(gaps(&late, 2), [0, 0, 0, 0]);
        assert_eq!(gaps(&late, 1), [0, 0, 10, 0]);
        let early = [window(10, 0), window(0, 0), window(0, 10)];
        assert_eq!(gaps(&early, 2), [0, 0, 0]);
    }

    #[test]
    fn where_counters_are_unknown_there_is_no_gap_and_what_lies_behind_counts_no_more() {
        // Nine that were not counted would take back the gap of the last window.
        let windows = [window(5, 0), window(0, 9), window(None, 0), window(7, 0)];
        assert_eq!(gaps(&windows, 9), [0, 0, 0, 7]);
        // What ran on the edge can have been counted on this side.
        assert_eq!(gaps(&[window(None, 7), window(7, 0)], 9), [0, 0]);
        assert_eq!(gaps(&[window(7, 0), window(None, 7)], 9), [0, 0]);
        assert_eq!(gap(&[], 0, 3), Work::default());
    }

    fn any_windows() -> impl Strategy<Value = Vec<Difference>> {
        let counted = prop_oneof![4 => (0_u64..1_000).prop_map(Some), 1 => Just(None)];
        prop::collection::vec(
            (counted, 0_u64..1_000).prop_map(|(counted, known)| window(counted, known)),
            1..40,
        )
    }

    proptest! {
        #[test]
        fn only_what_is_near_decides(windows in any_windows(), before in any_windows(), after in any_windows(), reach in 0_usize..6) {
            let all: Vec<Difference> = before.iter().chain(&windows).chain(&after).copied().collect();
            for place in reach..windows.len().saturating_sub(reach) {
                prop_assert_eq!(gap(&windows, place, reach), gap(&all, before.len() + place, reach));
            }
        }

        #[test]
        fn a_window_has_no_more_of_a_gap_than_it_counted(windows in any_windows(), reach in 0_usize..6) {
            for (place, window) in windows.iter().enumerate() {
                let gap = gap(&windows, place, reach).completion_tokens;
                prop_assert!(gap <= window.counted.unwrap_or_default().completion_tokens);
            }
        }
    }
}
