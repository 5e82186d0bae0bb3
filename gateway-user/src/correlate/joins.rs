//! Requests of this gateway that are on their way to a server that is watched.

use crate::clock;
use crate::event::TapTimes;
use crate::wire::At;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a request that has ended unseen is remembered: what the tap reads later than that of its ring would be a defect.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Most of those. Past it the oldest are forgotten, and a look at them that late would make direct traffic of them.
const REMEMBERED_MAX: usize = 100_000;

/// Whether the tap may take a request for one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is on its way, and this is the first sight of that sending.
    Live,
    /// It has ended without having been seen, and arrived before it ended.
    Late,
    /// Nothing was sent that could be this.
    Unknown,
}

#[derive(Debug, Default)]
struct Sent {
    /// Sendings that were not seen yet.
    unseen: u32,
    /// Of the last exchange that has ended.
    times: Option<TapTimes>,
    /// When the request ended, if it has.
    ended: Option<At>,
}

/// The proxy's side of a join and the tap's, by event id. Bounded by the requests in flight, and a number of those that ended unseen.
#[derive(Debug, Default)]
pub struct Joins {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sent: HashMap<Box<str>, Sent>,
    /// Those that ended without having been seen, oldest first.
    remembered: VecDeque<(At, Box<str>)>,
}

impl Joins {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is about to be sent.
    pub fn sent(&self, event_id: &str) {
        let mut state = self.lock();
        if let Some(sent) = state.sent.get_mut(event_id) {
            sent.unseen += 1;
            return;
        }
        let sent = Sent {
            unseen: 1,
            ..Sent::default()
        };
        state.sent.insert(event_id.into(), sent);
    }

    /// The tap sees a request with this id, whose first byte arrived at `at`.
    pub(super) fn claim(&self, event_id: &str, at: At) -> Claim {
        let mut state = self.lock();
        let Some(sent) = state.sent.get_mut(event_id).filter(|sent| sent.unseen > 0) else {
            return Claim::Unknown;
        };
        match sent.ended {
            None => {
                sent.unseen -= 1;
                // Of two tries the last counts: the first was not answered.
                sent.times = None;
                Claim::Live
            }
            Some(ended) if at <= ended => {
                sent.unseen -= 1;
                if sent.unseen == 0 {
                    state.sent.remove(event_id);
                }
                Claim::Late
            }
            Some(_) => Claim::Unknown,
        }
    }

    /// The tap has seen the end. Whether the request's event still waits for that.
    pub(super) fn seen(&self, event_id: &str, times: TapTimes) -> bool {
        let mut state = self.lock();
        let live = state.sent.get_mut(event_id).filter(|sent| sent.ended.is_none());
        live.map(|sent| sent.times = Some(times)).is_some()
    }

    /// Whether the tap has seen the end of a request already.
    pub fn has_ended(&self, event_id: &str) -> bool {
        let state = self.lock();
        state.sent.get(event_id).is_none_or(|sent| sent.times.is_some())
    }

    /// The request has ended: what the tap has seen of it.
    pub fn end(&self, event_id: &str) -> Option<TapTimes> {
        let now = clock::now();
        let mut state = self.lock();
        state.forget(now);
        let sent = state.sent.get_mut(event_id)?;
        if sent.unseen == 0 {
            return state.sent.remove(event_id)?.times;
        }
        sent.ended = Some(now);
        let times = sent.times;
        state.remembered.push_back((now, event_id.into()));
        times
    }
}

impl State {
    fn forget(&mut self, now: At) {
        let limit_us = u64::try_from(REMEMBERED.as_micros()).unwrap_or(u64::MAX);
        while let Some((ended, _)) = self.remembered.front()
            && (self.remembered.len() >= REMEMBERED_MAX || now.micros_since(*ended) > limit_us)
        {
            if let Some((_, event_id)) = self.remembered.pop_front() {
                self.sent.remove(&event_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: TapTimes = TapTimes {
        arrived: At(1_000),
        ended: At(9_000),
        ttft_us: None,
    };

    fn len(joins: &Joins) -> usize {
        joins.lock().sent.len()
    }

    #[test]
    fn a_request_is_joined_once_and_leaves_nothing() {
        let joins = Joins::default();
        joins.sent("gw-1-1");
        assert_eq!(joins.claim("gw-1-1", At(1)), Claim::Live);
        assert_eq!(
            joins.claim("gw-1-1", At(1)),
            Claim::Unknown,
            "a copy of the same id"
        );
        assert!(!joins.has_ended("gw-1-1"));
        assert!(joins.seen("gw-1-1", TIMES) && joins.has_ended("gw-1-1"));
        assert_eq!(joins.end("gw-1-1"), Some(TIMES));
        assert_eq!((joins.end("gw-1-1"), len(&joins)), (None, 0));
        assert_eq!(
            joins.claim("gw-1-1", At(1)),
            Claim::Unknown,
            "a replay after the end"
        );
        assert!(!joins.seen("gw-1-1", TIMES));
    }

    #[test]
    fn a_second_try_is_another_sight_of_the_same_request() {
        let joins = Joins::default();
        joins.sent("gw-1-1");
        assert_eq!(joins.claim("gw-1-1", At(1)), Claim::Live);
        let broken = TapTimes {
            ended: At(2),
            ..TIMES
        };
        assert!(joins.seen("gw-1-1", broken));
        joins.sent("gw-1-1");
        assert_eq!(joins.claim("gw-1-1", At(3)), Claim::Live);
        assert!(!joins.has_ended("gw-1-1"), "the first try answered nothing");
        assert!(joins.seen("gw-1-1", TIMES));
        assert_eq!(joins.end("gw-1-1"), Some(TIMES));
        assert_eq!(len(&joins), 0);
    }

    #[test]
    fn what_was_sent_and_is_seen_late_is_ours_and_what_arrived_later_is_not() {
        let joins = Joins::default();
        for id in ["gw-1-1", "gw-1-2"] {
            joins.sent(id);
            assert_eq!(joins.end(id), None);
        }
        assert_eq!(joins.claim("gw-1-1", At(1)), Claim::Late);
        assert_eq!(joins.claim("gw-1-1", At(1)), Claim::Unknown);
        assert_eq!(joins.claim("gw-1-2", At(u64::MAX)), Claim::Unknown);
        assert_eq!(len(&joins), 1);
    }

    #[test]
    fn the_unseen_are_forgotten_in_the_end() {
        let joins = Joins::default();
        joins.sent("gw-1-1");
        joins.end("gw-1-1");
        joins.lock().forget(At(clock::now().0 + 61_000_000_000));
        assert_eq!(len(&joins), 0);
        assert!(joins.lock().remembered.is_empty());
    }
}
