//! What came ahead of its turn and waits for the bytes before it.

use crate::wire::At;
use std::collections::VecDeque;

/// A run of payload at its place in the stream.
#[derive(Debug)]
pub(super) struct Run {
    /// Position of its first byte.
    pub(super) start: u64,
    /// Position behind its last byte.
    pub(super) end: u64,
    /// The time that its bytes are given.
    pub(super) at: At,
    /// When it came.
    came: At,
    /// Its bytes; `None` where only their number is known.
    pub(super) seen: Option<Box<[u8]>>,
}

impl Run {
    /// What holding it costs.
    fn cost_bytes(&self) -> usize {
        cost_bytes(self.seen.as_deref().unwrap_or(&[]))
    }
}

/// What holding a run of these bytes costs. The run itself counts too: a peer may send one byte at a time.
pub(super) fn cost_bytes(seen: &[u8]) -> usize {
    size_of::<Run>() + seen.len()
}

/// Runs in order, none of which overlap.
#[derive(Debug, Default)]
pub(super) struct Held {
    runs: VecDeque<Run>,
    cost_bytes: usize,
    /// When the run came that has waited longest.
    oldest: Option<At>,
}

/// A part of a segment, all seen or all unseen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) seen: Option<&'a [u8]>,
}

impl Held {
    /// The run that comes next.
    pub(super) fn first(&self) -> Option<&Run> {
        self.runs.front()
    }

    /// What holding all of it costs.
    pub(super) fn cost_bytes(&self) -> usize {
        self.cost_bytes
    }

    /// When the run came that has waited longest.
    pub(super) fn oldest(&self) -> Option<At> {
        self.oldest
    }

    /// Takes the first run out if it begins at `position`.
    pub(super) fn take(&mut self, position: u64) -> Option<Run> {
        let run = self.runs.pop_front_if(|run| run.start == position)?;
        self.cost_bytes -= run.cost_bytes();
        Some(run)
    }

    /// Settles what is left once runs were taken out.
    pub(super) fn settle(&mut self) {
        if self.runs.is_empty() {
            *self = Held::default();
        } else {
            self.oldest = self.runs.iter().map(|run| run.came).min();
        }
    }

    /// Puts in what is new of `part`. Bytes that were seen before stay as they are; where only their number was known they are filled in, and
    /// keep the time of the packet that brought them first. With `no_later`, nothing is given a later time than what stands behind it.
    pub(super) fn insert(&mut self, part: Part<'_>, came: At, no_later: bool) {
        let mut start = part.start;
        let mut index = self.runs.partition_point(|run| run.end <= start);
        while start < part.end {
            let next = self.runs.get(index);
            let (stop, at, came) = match next {
                Some(run) if run.start <= start && (part.seen.is_none() || run.seen.is_some()) => {
                    start = run.end;
                    index += 1;
                    continue;
                }
                Some(run) if run.start <= start => {
                    let (stop, at, came) = (part.end.min(run.end), run.at, run.came);
                    index = self.cut_out(index, start, stop);
                    (stop, at, came)
                }
                Some(run) => {
                    let at = if no_later { came.min(run.at) } else { came };
                    (part.end.min(run.start), at, came)
                }
                None => (part.end, came, came),
            };
            let offset = |position: u64| (position - part.start) as usize;
            let seen = part.seen.map(|seen| seen[offset(start)..offset(stop)].into());
            self.put(
                index,
                Run {
                    start,
                    end: stop,
                    at,
                    came,
                    seen,
                },
            );
            index += 1;
            start = stop;
        }
    }

    /// Cuts a part out of an unseen run; where what takes its place is to be put.
    fn cut_out(&mut self, index: usize, start: u64, stop: u64) -> usize {
        let Some(run) = self.runs.remove(index) else {
            return index;
        };
        self.cost_bytes -= run.cost_bytes();
        let piece = |start, end| Run {
            start,
            end,
            at: run.at,
            came: run.came,
            seen: None,
        };
        if stop < run.end {
            self.put(index, piece(stop, run.end));
        }
        if run.start < start {
            self.put(index, piece(run.start, start));
            return index + 1;
        }
        index
    }

    fn put(&mut self, index: usize, run: Run) {
        self.cost_bytes += run.cost_bytes();
        self.oldest = Some(self.oldest.map_or(run.came, |oldest| oldest.min(run.came)));
        self.runs.insert(index, run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part<'a>(start: u64, end: u64, seen: impl Into<Option<&'a str>>) -> Part<'a> {
        let seen = seen.into().map(str::as_bytes);
        Part { start, end, seen }
    }

    fn told(held: &Held) -> Vec<(u64, u64, u64, Option<&str>)> {
        held.runs
            .iter()
            .map(|run| {
                let seen = run.seen.as_deref().map(|seen| std::str::from_utf8(seen).unwrap());
                assert!(seen.is_none_or(|seen| seen.len() as u64 == run.end - run.start));
                (run.start, run.end, run.at.0, seen)
            })
            .collect()
    }

    #[test]
    fn what_was_seen_first_stays_and_what_was_not_is_filled_in() {
        let mut held = Held::default();
        held.insert(part(10, 14, "abcd"), At(1), false);
        held.insert(part(14, 20, None), At(1), false);
        held.insert(part(12, 18, "XXefgh"), At(2), false);
        held.insert(part(8, 22, None), At(3), false);
        assert_eq!(
            told(&held),
            [
                (8, 10, 3, None),
                (10, 14, 1, Some("abcd")),
                (14, 18, 1, Some("efgh")),
                (18, 20, 1, None),
                (20, 22, 3, None)
            ]
        );
        held.insert(part(19, 20, "k"), At(4), false);
        assert_eq!(told(&held)[3..5], [(18, 19, 1, None), (19, 20, 1, Some("k"))]);
    }

    #[test]
    fn nothing_is_later_than_what_stands_behind_it_where_that_is_asked_for() {
        let mut held = Held::default();
        held.insert(part(10, 12, "kl"), At(5), true);
        held.insert(part(8, 14, "ij__mn"), At(9), true);
        let times: Vec<u64> = told(&held).iter().map(|run| run.2).collect();
        assert_eq!(times, [5, 5, 9]);
    }

    #[test]
    fn what_is_held_is_what_is_counted() {
        let mut held = Held::default();
        held.insert(part(10, 14, None), At(3), false);
        held.insert(part(11, 13, "bc"), At(4), false);
        held.insert(part(20, 22, "xy"), At(5), false);
        assert_eq!(held.cost_bytes(), 4 * size_of::<Run>() + 4);
        assert_eq!((held.take(11).is_none(), held.oldest()), (true, Some(At(3))));
        for position in [10, 11, 13] {
            assert!(held.take(position).is_some(), "{position}");
        }
        held.settle();
        assert_eq!(
            (held.oldest(), held.cost_bytes()),
            (Some(At(5)), cost_bytes(b"xy"))
        );
        assert!(held.take(20).is_some());
        held.settle();
        assert_eq!(
            (held.oldest(), held.cost_bytes(), held.runs.capacity()),
            (None, 0, 0)
        );
    }
}
