//! One team's limits, and how it stands with each.

use super::Now;
use super::budget::Spending;
use super::concurrency::Slots;
use super::denial::{Denial, LimitKind};
use super::rate::Bucket;
use super::tokens::{Meter, used};
use crate::config::{AtLimit, BudgetConfig, BudgetPeriod, LimitMode, TeamLimits};
use crate::ledger::{Micros, NanoUsd, Span};
use crate::wire::At;
use crate::wire::facts::Tokens;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a client is told to wait for a place: nobody knows when a request ends, and a second is no burden to anyone.
const PLACE_WAIT_NS: u64 = 1_000_000_000;

/// One team, or those that share an allowance.
#[derive(Debug)]
pub struct Team {
    name: Box<str>,
    mode: LimitMode,
    budget: Option<BudgetConfig>,
    state: Mutex<State>,
    limited: [Limited; LimitKind::ALL.len()],
}

/// Only what is limited is kept.
#[derive(Debug)]
struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    slots: Option<Slots>,
    spending: Option<Spending>,
}

/// Requests that a limit stood in the way of.
#[derive(Debug, Default)]
struct Limited {
    refused: AtomicU64,
    observed: AtomicU64,
}

/// How a team stands with its limits; what is not limited is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Requests a minute.
    pub requests: Option<Used>,
    /// Tokens a minute.
    pub tokens: Option<Used>,
    /// Requests at a time.
    pub concurrent: Option<Used>,
    /// What is charged in a period.
    pub budget: Option<BudgetUsed>,
}

/// What is used of a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// The number.
    pub limit: u64,
    /// What is used of it; of tokens it can be more.
    pub used: u64,
    /// How long until nothing is, where only time has to pass.
    pub until_full_ns: Option<u64>,
}

/// What is used of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetUsed {
    /// All of it.
    pub usd: NanoUsd,
    /// What is charged so far; it can be more.
    pub spent: NanoUsd,
    /// Which time it is for.
    pub kind: BudgetPeriod,
    /// That time.
    pub period: Span,
    /// What is left of the time, in microseconds.
    pub left_us: u64,
}

/// What became of requests that a limit stood in the way of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// They were refused.
    Refused,
    /// They were let in all the same.
    Observed,
}

/// A limit that stands in the way.
#[derive(Clone, Copy, Debug)]
struct Obstacle {
    limit: LimitKind,
    wait_ns: u64,
}

impl Team {
    /// A team with these limits that has not used anything.
    pub(super) fn new(name: &str, mode: LimitMode, limits: &TeamLimits, now: At) -> Team {
        let bucket = |per_minute: Option<u32>| per_minute.map(|per_minute| Bucket::full(per_minute, now));
        Team {
            name: name.into(),
            mode,
            budget: limits.budget,
            state: Mutex::new(State {
                requests: bucket(limits.requests_per_minute),
                tokens: bucket(limits.tokens_per_minute),
                slots: limits.concurrent_requests.map(Slots::new),
                spending: limits.budget.map(|budget| Spending::new(budget.period)),
            }),
            limited: Default::default(),
        }
    }

    /// What it is called in metrics.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its budget.
    pub fn budget(&self) -> Option<BudgetConfig> {
        self.budget
    }

    /// Lets a request in, or says why not; `None` when nothing has to be given back in the end. `named` is what its client calls the team.
    ///
    /// A request that is refused uses nothing, and neither does one that is let in only because limits are observed: what is counted is what
    /// enforcing them would have left.
    pub(super) fn admit(self: &Arc<Team>, named: &str, now: Now) -> Result<Option<Permit>, Box<Denial>> {
        let mut state = self.lock();
        if self.mode_at_budget(&mut state, now) == Some(Action::Observed) {
            self.count(LimitKind::Budget, Action::Observed);
        }
        if let Some(obstacle) = self.obstacle(&mut state, now) {
            if self.mode == LimitMode::Observe {
                self.count(obstacle.limit, Action::Observed);
                return Ok(None);
            }
            self.count(obstacle.limit, Action::Refused);
            let standing = self.standing_of(&mut state, now);
            drop(state);
            let shared_by = (*self.name != *named).then_some(&*self.name);
            return Err(Box::new(Denial::new(
                named,
                shared_by,
                obstacle.limit,
                obstacle.wait_ns,
                &standing,
            )));
        }
        if let Some(requests) = &mut state.requests {
            requests.take(1, now.at);
        }
        let holds_slot = state.slots.as_mut().is_some_and(Slots::take);
        let meter = state.tokens.as_ref().map(|_| Meter::begin(now.at));
        Ok((holds_slot || meter.is_some()).then(|| Permit {
            team: Arc::clone(self),
            holds_slot,
            meter,
        }))
    }

    /// Whether a spent budget only counts: `at_limit: observe`.
    fn mode_at_budget(&self, state: &mut State, now: Now) -> Option<Action> {
        let (budget, spending) = (self.budget?, state.spending.as_ref()?);
        let is_spent = spending.spent(now.wall) >= budget.usd;
        is_spent.then_some(match budget.at_limit {
            AtLimit::Refuse => Action::Refused,
            AtLimit::Observe => Action::Observed,
        })
    }

    /// What stands in the way for longest.
    fn obstacle(&self, state: &mut State, now: Now) -> Option<Obstacle> {
        let budget_wait_ns = match self.mode_at_budget(state, now) {
            Some(Action::Refused) => {
                let period = state.spending.as_ref().map(|spending| spending.period(now.wall));
                period.map_or(0, |period| (period.to().0 - now.wall.0).saturating_mul(1_000))
            }
            _ => 0,
        };
        let wait = |bucket: &mut Option<Bucket>| bucket.as_mut().map_or(0, |bucket| bucket.wait_ns(now.at));
        let is_full = state.slots.as_ref().is_some_and(Slots::is_full);
        let waits = [
            (LimitKind::Requests, wait(&mut state.requests)),
            (LimitKind::Tokens, wait(&mut state.tokens)),
            (LimitKind::Concurrent, if is_full { PLACE_WAIT_NS } else { 0 }),
            (LimitKind::Budget, budget_wait_ns),
        ];
        let longest = waits.into_iter().max_by_key(|(_, wait_ns)| *wait_ns);
        longest
            .filter(|(_, wait_ns)| *wait_ns > 0)
            .map(|(limit, wait_ns)| Obstacle { limit, wait_ns })
    }

    /// Takes tokens that were used.
    pub(super) fn take_tokens(&self, count: u64, now: At) {
        if count > 0
            && let Some(tokens) = &mut self.lock().tokens
        {
            tokens.take(count, now);
        }
    }

    /// As [`Team::take_tokens`], for all that a request has used.
    pub(super) fn take_tokens_of(&self, tokens: Tokens, now: At) {
        self.take_tokens(used(tokens), now);
    }

    /// Takes note of what a request that ended at `ended` is charged.
    pub(super) fn charge(&self, ended: Micros, amount: NanoUsd) {
        if let Some(spending) = &mut self.lock().spending {
            spending.charge(ended, amount);
        }
    }

    /// Takes note of what was charged elsewhere in the period that begins at `from`.
    pub(super) fn learn(&self, from: Micros, elsewhere: NanoUsd) {
        if let Some(spending) = &mut self.lock().spending {
            spending.learn(from, elsewhere);
        }
    }

    /// How it stands now.
    pub fn standing(&self, now: Now) -> Standing {
        self.standing_of(&mut self.lock(), now)
    }

    fn standing_of(&self, state: &mut State, now: Now) -> Standing {
        let of_bucket = |bucket: &mut Option<Bucket>| {
            bucket.as_mut().map(|bucket| Used {
                limit: bucket.per_minute().into(),
                used: bucket.used(now.at),
                until_full_ns: Some(bucket.until_full_ns(now.at)),
            })
        };
        let of_slots = |slots: &Slots| Used {
            limit: slots.most().into(),
            used: slots.taken().into(),
            until_full_ns: None,
        };
        let of_budget = |(budget, spending): (BudgetConfig, &Spending)| {
            let period = spending.period(now.wall);
            BudgetUsed {
                usd: budget.usd,
                spent: spending.spent(now.wall),
                kind: budget.period,
                period,
                left_us: period.to().0.saturating_sub(now.wall.0),
            }
        };
        Standing {
            requests: of_bucket(&mut state.requests),
            tokens: of_bucket(&mut state.tokens),
            concurrent: state.slots.as_ref().map(of_slots),
            budget: self.budget.zip(state.spending.as_ref()).map(of_budget),
        }
    }

    /// How many requests a limit stood in the way of; `None` where there is no such limit, or such requests come to something else.
    pub fn limited(&self, limit: LimitKind, action: Action) -> Option<u64> {
        let has_limit = {
            let state = self.lock();
            match limit {
                LimitKind::Requests => state.requests.is_some(),
                LimitKind::Tokens => state.tokens.is_some(),
                LimitKind::Concurrent => state.slots.is_some(),
                LimitKind::Budget => state.spending.is_some(),
            }
        };
        let observes = self.mode == LimitMode::Observe
            || limit == LimitKind::Budget
                && self
                    .budget
                    .is_some_and(|budget| budget.at_limit == AtLimit::Observe);
        let limited = &self.limited[limit as usize];
        let counter = match action {
            Action::Refused => &limited.refused,
            Action::Observed => &limited.observed,
        };
        (has_limit && observes == (action == Action::Observed)).then(|| counter.load(Ordering::Relaxed))
    }

    fn count(&self, limit: LimitKind, action: Action) {
        let limited = &self.limited[limit as usize];
        let counter = match action {
            Action::Refused => &limited.refused,
            Action::Observed => &limited.observed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Each holder changes what it protects in single steps, so that a panic leaves it usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a request holds of its team's limits. Dropped, it gives its place back, however the request ended.
#[derive(Debug)]
#[must_use = "dropped at once, the request has no place"]
pub struct Permit {
    team: Arc<Team>,
    holds_slot: bool,
    meter: Option<Meter>,
}

impl Permit {
    /// Whether it is time to say what the request has used so far.
    pub fn is_due(&self, now: At) -> bool {
        self.meter.as_ref().is_some_and(|meter| meter.is_due(now))
    }

    /// Takes what the request has used beyond what was taken before.
    pub fn used(&mut self, so_far: Tokens, now: At) {
        if let Some(meter) = &mut self.meter {
            let more = meter.more(so_far, now);
            self.team.take_tokens(more, now);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.holds_slot
            && let Some(slots) = &mut self.team.lock().slots
        {
            slots.give_back();
        }
    }
}
