//! What a team may take, and has taken, for the API.

use super::shape::{BudgetRow, LimitRow, LimitsRow};
use crate::ledger::NanoUsd;
use crate::limits::team::Used;
use crate::limits::{Action, LimitKind, Now, Team};

/// How a team stands with its budget, and with its limits.
pub(super) fn limit_rows(team: &Team, now: Now) -> (Option<BudgetRow>, Option<LimitsRow>) {
    let standing = team.standing(now);
    let limited = |limit| {
        let actions = [Action::Refused, Action::Observed];
        actions
            .into_iter()
            .filter_map(|action| team.limited(limit, action))
            .sum()
    };
    let usd = |amount: NanoUsd| amount.0 as f64 / NanoUsd::USD as f64;
    let budget = standing.budget.map(|budget| BudgetRow {
        usd: usd(budget.usd),
        spent_usd: usd(budget.spent),
        period: budget.kind.as_str(),
        resets_in_s: budget.left_us.div_ceil(1_000_000),
        limited_total: limited(LimitKind::Budget),
    });
    let row = |used: Option<Used>, limit| {
        used.map(|used| LimitRow {
            limit: used.limit,
            used: used.used,
            limited_total: limited(limit),
        })
    };
    let rows = LimitsRow {
        requests_per_minute: row(standing.requests, LimitKind::Requests),
        tokens_per_minute: row(standing.tokens, LimitKind::Tokens),
        concurrent_requests: row(standing.concurrent, LimitKind::Concurrent),
    };
    let has_any = rows.requests_per_minute.is_some()
        || rows.tokens_per_minute.is_some()
        || rows.concurrent_requests.is_some();
    (budget, has_any.then_some(rows))
}
