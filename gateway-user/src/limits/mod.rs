//! How much each team may take: requests and tokens a minute, requests at a time, and a budget.
//!
//! A [`Limiter`] is asked once for each request, when it is known who it is for and before anything is done for it. It looks at the limits of that
//! team alone, so that no team can use up another's. In the order of how much they know of the world:
//!
//! * [`rate`], [`concurrency`], [`tokens`], [`budget`]: counting, pure, with time passed in.
//! * [`team`]: all limits of one team under one short lock, so that a request is let in by all of them or uses none; [`denial`] says why not.
//! * [`account`]: what budgets are told of the world beyond this process; [`memo`]: what is written down of them for a restart.
//!
//! Promises: a team without limits costs a look into a map at most, and no lock where nobody has any; nothing here waits. Memory is bounded by the
//! labels of the metrics: teams of the configuration have limits of their own for certain, others as long as there are labels
//! (`metrics.max_teams`), and those beyond have one allowance together, `__other__`. So whoever makes up names has at most so many allowances, and
//! a name that he makes up when they are used up gets none of its own.
//!
//! What is exact and what is not: requests a minute and requests at a time are exact, for one gateway. Tokens are taken when they are known, a
//! second late in a stream and at the end of other requests: beyond the limit goes at most what requests use that ran when the last token was
//! taken, and it is paid back. A budget is exact for what passes through this gateway, but for requests that run when it is spent; what other
//! gateways charge is known once they have stored it and it was read.
//!
//! Left out: limits over all gateways for anything but budgets (each gateway has its own buckets), reservations, and cutting off what runs.

pub mod account;
pub mod budget;
pub mod concurrency;
pub mod denial;
pub mod memo;
pub mod rate;
pub mod team;
pub mod tokens;

pub use denial::{Denial, LimitKind};
pub use team::{Action, Permit, Standing, Team};

use crate::clock;
use crate::config::{BudgetPeriod, LimitMode, LimitsConfig, TeamLimits};
use crate::event::{CapturedBy, EventSink, RequestEvent};
use crate::ledger::{Micros, NanoUsd};
use crate::metrics::{Metrics, OTHER_TEAMS};
use crate::wire::At;
use crate::wire::facts::Tokens;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// For minutes.
    pub at: At,
    /// For periods of budgets.
    pub wall: Micros,
}

impl Now {
    /// Reads them.
    pub fn read() -> Now {
        Now {
            at: clock::now(),
            wall: micros(clock::wall_now_us()),
        }
    }
}

/// What was charged in a period beyond what this process has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// Where the period begins.
    pub from: Micros,
    /// By team: those that were charged most.
    pub by_team: BTreeMap<Box<str>, NanoUsd>,
    /// By all others together.
    pub rest: NanoUsd,
}

/// The limits of all teams.
pub struct Limiter {
    mode: LimitMode,
    /// `None` when nothing is limited by default.
    default: Option<TeamLimits>,
    /// The teams of the configuration; `None` for those that nothing is limited for.
    entries: HashMap<Box<str>, Option<Arc<Team>>>,
    /// Others, by their labels.
    others: RwLock<HashMap<Box<str>, Arc<Team>>>,
    /// What is known of each kind of period: teams that come later must know it too.
    elsewhere: RwLock<HashMap<BudgetPeriod, Elsewhere>>,
    metrics: Metrics,
}

impl Limiter {
    /// The limits of a configuration. Labels are those of `metrics`, and the configuration's teams have theirs for certain.
    pub fn new(config: &LimitsConfig, metrics: Metrics) -> Limiter {
        let now = clock::now();
        let entry = |entry: &crate::config::TeamEntry| {
            let name = entry.team.as_str();
            metrics.reserve_team(name);
            let team = Team::new(name, config.mode, &entry.limits, now);
            let team = (!entry.limits.is_empty()).then(|| Arc::new(team));
            (Box::from(name), team)
        };
        Limiter {
            mode: config.mode,
            default: (!config.default.is_empty()).then(|| config.default.clone()),
            entries: config.teams.iter().map(entry).collect(),
            others: RwLock::default(),
            elsewhere: RwLock::default(),
            metrics,
        }
    }

    /// Lets a request of a team in, or says why not. What comes back is kept until the request has ended; `None` when there is nothing to keep.
    ///
    /// # Errors
    /// The limit that stands in the way.
    pub fn admit(&self, team: &str, now: fn() -> Now) -> Result<Option<Permit>, Box<Denial>> {
        match self.limits_of(team, || self.metrics.label_of(team)) {
            Some(limits) => limits.admit(team, now()),
            None => Ok(None),
        }
    }

    /// The limits that hold for a team; `None` when none do. `label` is asked for the name under which a team without an entry is counted.
    fn limits_of<'n>(&self, team: &str, label: impl FnOnce() -> &'n str) -> Option<Arc<Team>> {
        if !self.entries.is_empty()
            && let Some(entry) = self.entries.get(team)
        {
            return entry.clone();
        }
        let default = self.default.as_ref()?;
        let label = label();
        let known = self
            .others
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(label)
            .cloned();
        Some(known.unwrap_or_else(|| self.begin(label, default)))
    }

    /// The limits of a team that was not seen before.
    fn begin(&self, label: &str, default: &TeamLimits) -> Arc<Team> {
        let elsewhere = self.elsewhere.read().unwrap_or_else(PoisonError::into_inner);
        let mut others = self.others.write().unwrap_or_else(PoisonError::into_inner);
        let team = others
            .entry(label.into())
            .or_insert_with(|| Arc::new(Team::new(label, self.mode, default, clock::now())));
        let team = Arc::clone(team);
        if let Some(known) = default.budget.and_then(|budget| elsewhere.get(&budget.period)) {
            team.learn(known.from, self.share_of(&team, known, &others));
        }
        team
    }

    /// What was charged elsewhere for a team; for those that share an allowance, what was charged for all that have none.
    fn share_of(&self, team: &Team, known: &Elsewhere, others: &HashMap<Box<str>, Arc<Team>>) -> NanoUsd {
        if team.name() != OTHER_TEAMS {
            return known.by_team.get(team.name()).copied().unwrap_or_default();
        }
        let has_none = |name: &str| !self.entries.contains_key(name) && !others.contains_key(name);
        let theirs = known.by_team.iter().filter(|(name, _)| has_none(name));
        theirs.map(|(_, amount)| *amount).sum::<NanoUsd>() + known.rest
    }

    /// Takes note of what was charged elsewhere in a period of this kind.
    pub fn learn(&self, kind: BudgetPeriod, known: Elsewhere) {
        let mut elsewhere = self.elsewhere.write().unwrap_or_else(PoisonError::into_inner);
        {
            let others = self.others.read().unwrap_or_else(PoisonError::into_inner);
            let entries = self.entries.values().flatten();
            for team in entries.chain(others.values()) {
                if team.budget().is_some_and(|budget| budget.period == kind) {
                    team.learn(known.from, self.share_of(team, &known, &others));
                }
            }
        }
        elsewhere.insert(kind, known);
    }

    /// The limits of the team with this label, if it has any.
    pub fn team(&self, label: &str) -> Option<Arc<Team>> {
        if let Some(entry) = self.entries.get(label) {
            return entry.clone();
        }
        self.others
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(label)
            .cloned()
    }

    /// The teams that have limits, as far as they are known.
    pub fn teams(&self) -> Vec<Arc<Team>> {
        let others = self.others.read().unwrap_or_else(PoisonError::into_inner);
        let entries = self.entries.values().flatten();
        entries.chain(others.values()).cloned().collect()
    }
}

/// What a request was charged, and, of those that went past the proxy, the tokens that it used: those of others are taken while they run.
impl EventSink for Limiter {
    fn record(&self, event: &RequestEvent) {
        let is_direct = event.capture == CapturedBy::Tap;
        if event.charge == NanoUsd(0) && !is_direct || event.team_id.starts_with("__") {
            return;
        }
        let Some(limits) = self.limits_of(&event.team_id, || self.metrics.team_label(event)) else {
            return;
        };
        if is_direct {
            let tokens = Tokens {
                prompt: event.prompt_tokens,
                completion: event.completion_tokens,
                ..Tokens::default()
            };
            limits.take_tokens_of(tokens, clock::now());
        }
        if event.charge > NanoUsd(0) {
            limits.charge(ended_at(event), event.charge);
        }
    }
}

/// As rows have it.
fn ended_at(event: &RequestEvent) -> Micros {
    micros(event.started_at_us.saturating_add_unsigned(event.duration_us))
}

fn micros(since_1970_us: i64) -> Micros {
    Micros(u64::try_from(since_1970_us).unwrap_or(0))
}

#[cfg(test)]
mod tests;
