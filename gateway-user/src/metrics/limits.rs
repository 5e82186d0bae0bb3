//! What limits show: what each team may take, what it has taken, and requests that a limit stood in the way of. Only of teams that have limits.
//!
//! Limits count by themselves, under the labels of the teams; their numbers are read at each scrape.

use super::store::raise;
use crate::ledger::NanoUsd;
use crate::limits::{Action, LimitKind, Limiter, Now, Team};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Result};
use std::sync::Weak;

/// The families of limits.
pub(super) struct LimitFamilies {
    limiter: Weak<Limiter>,
    limit: IntGaugeVec,
    used: IntGaugeVec,
    limited: IntCounterVec,
    budget: GaugeVec,
    spent: GaugeVec,
}

impl LimitFamilies {
    #[rustfmt::skip] // A table: one family a line reads better than five lines each.
    pub(super) fn of(limiter: Weak<Limiter>) -> Result<LimitFamilies> {
        Ok(LimitFamilies {
            limiter,
            limit: IntGaugeVec::new(Opts::new("gateway_limit", "What the team may take: requests_per_minute, tokens_per_minute, concurrent_requests."), &["team", "limit"])?,
            used: IntGaugeVec::new(Opts::new("gateway_limit_used", "What the team has taken of its limit now; of tokens it can be more."), &["team", "limit"])?,
            limited: IntCounterVec::new(Opts::new("gateway_limited_requests_total", "Requests that a limit or budget stood in the way of, by whether they were refused or let in all the same (observed)."), &["team", "limit", "action"])?,
            budget: GaugeVec::new(Opts::new("gateway_budget_usd", "What the team's requests may be charged in the running day or month, in US dollars."), &["team", "period"])?,
            spent: GaugeVec::new(Opts::new("gateway_budget_spent_usd", "What the team's requests are charged so far in the running day or month, over all gateways as far as this one knows."), &["team", "period"])?,
        })
    }

    fn all(&self) -> [&dyn Collector; 5] {
        [&self.limit, &self.used, &self.limited, &self.budget, &self.spent]
    }

    fn read(&self) {
        let Some(limiter) = self.limiter.upgrade() else {
            return;
        };
        let now = Now::read();
        for team in limiter.teams() {
            self.read_team(&team, now);
        }
    }

    fn read_team(&self, team: &Team, now: Now) {
        let standing = team.standing(now);
        let counts = [
            (LimitKind::Requests, standing.requests),
            (LimitKind::Tokens, standing.tokens),
            (LimitKind::Concurrent, standing.concurrent),
        ];
        for (limit, used) in counts {
            let Some(used) = used else { continue };
            let labels = [team.name(), limit.name()];
            self.limit.with_label_values(&labels).set(whole(used.limit));
            self.used.with_label_values(&labels).set(whole(used.used));
        }
        if let Some(budget) = standing.budget {
            let labels = [team.name(), budget.kind.as_str()];
            self.budget.with_label_values(&labels).set(usd(budget.usd));
            self.spent.with_label_values(&labels).set(usd(budget.spent));
        }
        for limit in LimitKind::ALL {
            for (action, name) in [(Action::Refused, "refused"), (Action::Observed, "observed")] {
                // From 0, so that the first one shows as a growth.
                if let Some(count) = team.limited(limit, action) {
                    let labels = [team.name(), limit.name(), name];
                    raise(&self.limited.with_label_values(&labels), count);
                }
            }
        }
    }
}

impl Collector for LimitFamilies {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}

fn usd(amount: NanoUsd) -> f64 {
    amount.0 as f64 / NanoUsd::USD as f64
}

fn whole(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
