//! What the console shows of the moment: each team's last minute, the last requests, and what the engines say.
//!
//! [`Live`] is told what every sink is told, and keeps a bounded part of it in memory: [`window`] a team's last minute, [`recent`] single
//! requests, [`engines`] the last scrape of each upstream. [`View`] joins it with the state of the upstreams, the spool and the tap, and
//! gives it out in the shapes of [`shape`], which `docs/API.md` describes.
//!
//! Promises: totals are those of `/metrics`, since they are counted by the same rules under the same labels; teams are as many as there
//! are labels ([`Metrics`]); a request costs two short locks and one allocated row, and a chunk costs nothing. Nothing here is on disk or
//! outlives the process.
//!
//! Left out: whatever is billed. A charge shown here is the one in the request's row, and the ledger's costs are ClickHouse's.

mod allowance;
pub mod engines;
pub mod recent;
pub mod shape;
pub mod view;
pub mod window;

pub use view::{Show, View};

use crate::clock;
use crate::event::{EventSink, RequestEvent};
use crate::metrics::{Metrics, may_be_billed};
use crate::vllm::{SampleSink, SystemSample};
use crate::wire::At;
use crate::wire::exchange::Outcome;
use engines::Engines;
use foldhash::quality::RandomState;
use recent::{Recent, RequestRow};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use window::{Counts, Window};

/// Requests that are kept, of all teams together.
pub const REQUESTS_MAX: usize = 200;

/// Requests that are kept of each team that has a token of its own: in the list of all, others' requests would crowd them out.
pub const TEAM_REQUESTS_MAX: usize = 50;

/// What a gateway knows of the moment.
pub struct Live {
    metrics: Metrics,
    teams: RwLock<HashMap<Box<str>, Arc<Mutex<Team>>, RandomState>>,
    recent: Recent,
    /// Of the teams with tokens.
    recent_of: HashMap<Box<str>, Recent, RandomState>,
    engines: Engines,
}

/// One team, by its label.
#[derive(Debug, Default)]
pub(super) struct Team {
    totals: Totals,
    window: Window,
}

/// Since the start, as in `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    counts: Counts,
    cached_tokens: u64,
    engine_prompt_tokens: u64,
    engine_completion_tokens: u64,
}

impl Live {
    /// Nothing yet, of these upstreams. Labels are those of `metrics`, whose sink must come before this one. Each of `teams` has a list of
    /// its own requests.
    pub fn new<'n>(
        metrics: Metrics,
        upstreams: impl IntoIterator<Item = &'n str>,
        teams: impl IntoIterator<Item = &'n str>,
    ) -> Live {
        let recent_of = teams.into_iter().map(|team| {
            // Whoever comes to look is not to find the team among the others.
            metrics.reserve_team(team);
            (team.into(), Recent::up_to(TEAM_REQUESTS_MAX))
        });
        Live {
            recent_of: recent_of.collect(),
            teams: RwLock::default(),
            recent: Recent::up_to(REQUESTS_MAX),
            engines: Engines::of(upstreams),
            metrics,
        }
    }

    /// Takes in a request that ended at `now`.
    pub fn record_at(&self, event: &RequestEvent, now: At) {
        let billed = may_be_billed(event.usage_source);
        let tokens = |count: Option<u64>| count.filter(|_| billed).unwrap_or(0);
        let counts = Counts {
            requests: 1,
            errors: is_error(event.outcome).into(),
            aborted: (event.outcome == Outcome::Aborted).into(),
            refused: (event.outcome == Outcome::Refused).into(),
            prompt_tokens: tokens(event.prompt_tokens),
            completion_tokens: tokens(event.completion_tokens),
            charge_nano_usd: event.charge.0,
        };
        let engine_prompt = tokens(event.engine_prompt_tokens);
        let engine_completion = tokens(event.engine_completion_tokens);
        let team = self.team(self.metrics.team_label(event));
        {
            let mut team = team.lock().unwrap_or_else(PoisonError::into_inner);
            let totals = &mut team.totals;
            totals.counts.add(&counts);
            totals.cached_tokens += tokens(event.cached_tokens);
            totals.engine_prompt_tokens += engine_prompt;
            totals.engine_completion_tokens += engine_completion;
            team.window.add(now, &counts, event.ttft_us, &event.gaps);
        }
        let row = self.recent.push(RequestRow::of(event));
        if let Some(recent) = self.recent_of.get(&event.team_id) {
            recent.keep(&row);
        }
    }

    fn team(&self, label: &str) -> Arc<Mutex<Team>> {
        let known = {
            let teams = self.teams.read().unwrap_or_else(PoisonError::into_inner);
            teams.get(label).cloned()
        };
        known.unwrap_or_else(|| {
            let mut teams = self.teams.write().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(teams.entry(label.into()).or_default())
        })
    }
}

impl EventSink for Live {
    fn record(&self, event: &RequestEvent) {
        self.record_at(event, clock::now());
    }
}

impl SampleSink for Live {
    fn record(&self, sample: &SystemSample) {
        self.engines.record(sample, clock::now());
    }
}

/// As `vllm-gateway report` and the windows in ClickHouse count errors.
fn is_error(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::ClientError
            | Outcome::ServerError
            | Outcome::Truncated
            | Outcome::Unreachable
            | Outcome::TimedOut
            | Outcome::GatewayCrash
    )
}

#[cfg(test)]
mod tests;
