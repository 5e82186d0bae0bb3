//! Which limit stands in a request's way, and how its client is told.

use super::team::Standing;
use crate::ledger::NanoUsd;
use std::fmt::Write;

/// What can be limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LimitKind {
    /// Requests a minute.
    Requests,
    /// Tokens a minute.
    Tokens,
    /// Requests at a time.
    Concurrent,
    /// What may be charged in a period.
    Budget,
}

impl LimitKind {
    /// All of them, in the order of their discriminants.
    pub const ALL: [LimitKind; 4] = [
        LimitKind::Requests,
        LimitKind::Tokens,
        LimitKind::Concurrent,
        LimitKind::Budget,
    ];

    /// The key of the configuration, which is the label in metrics too.
    pub fn name(self) -> &'static str {
        match self {
            LimitKind::Requests => "requests_per_minute",
            LimitKind::Tokens => "tokens_per_minute",
            LimitKind::Concurrent => "concurrent_requests",
            LimitKind::Budget => "budget",
        }
    }
}

/// Why a request is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The limit. Where several stand in the way, the one that lasts longest.
    pub limit: LimitKind,
    message: String,
    retry_after_s: u64,
    fields: String,
}

impl Denial {
    /// The denial of a request of `team`, as its client calls it, which may be let in after `wait_ns`. `shared_by` names the allowance where the
    /// team has none of its own.
    pub(super) fn new(
        team: &str,
        shared_by: Option<&str>,
        limit: LimitKind,
        wait_ns: u64,
        standing: &Standing,
    ) -> Denial {
        let retry_after_s = wait_ns.div_ceil(1_000_000_000).max(1);
        Denial {
            limit,
            message: message(team, shared_by, limit, retry_after_s, standing),
            retry_after_s,
            fields: fields(retry_after_s, standing),
        }
    }

    /// What the client is told.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// After how many seconds it is worth trying again.
    pub fn retry_after_s(&self) -> u64 {
        self.retry_after_s
    }

    /// The reason, as metrics and events name it.
    pub fn reason(&self) -> &'static str {
        match self.limit {
            LimitKind::Requests => "requests_per_minute_exceeded",
            LimitKind::Tokens => "tokens_per_minute_exceeded",
            LimitKind::Concurrent => "concurrent_requests_exceeded",
            LimitKind::Budget => "budget_exceeded",
        }
    }

    /// `code` of the error, as OpenAI's library knows it.
    pub fn code(&self) -> &'static str {
        match self.limit {
            LimitKind::Budget => "budget_exceeded",
            _ => "rate_limit_exceeded",
        }
    }

    /// `type` of the error in OpenAI's shape.
    pub fn kind(&self) -> &'static str {
        match self.limit {
            LimitKind::Budget => "insufficient_quota",
            _ => "rate_limit_error",
        }
    }

    /// Header fields of the response, each with its line end: `retry-after`, and how the team stands with each of its limits.
    pub fn fields(&self) -> &str {
        &self.fields
    }
}

fn message(
    team: &str,
    shared_by: Option<&str>,
    limit: LimitKind,
    retry_after_s: u64,
    standing: &Standing,
) -> String {
    let whose = match shared_by {
        Some(label) => format!("team {team} (which shares its limits with all teams of {label})"),
        None => format!("team {team}"),
    };
    let again = format!("Try again in {retry_after_s} s.");
    match limit {
        LimitKind::Requests => {
            let most = standing.requests.map_or(0, |used| used.limit);
            format!(
                "The requests of {whose} are at their limit of {most} a minute (requests_per_minute). {again}"
            )
        }
        LimitKind::Tokens => {
            let of = standing.tokens.unwrap_or_default();
            format!(
                "The tokens of {whose} are at their limit of {} a minute (tokens_per_minute): {} are used. {again}",
                of.limit, of.used
            )
        }
        LimitKind::Concurrent => {
            let most = standing.concurrent.map_or(0, |used| used.limit);
            format!(
                "The requests of {whose} are at their limit of {most} at a time (concurrent_requests). Try again when one has ended."
            )
        }
        LimitKind::Budget => match standing.budget {
            Some(budget) => format!(
                "The budget of {whose}, {} USD a {}, is spent: {} USD are charged. The next one begins at {}.",
                budget.usd,
                budget.kind,
                budget.spent,
                budget.period.to()
            ),
            None => String::new(),
        },
    }
}

/// As OpenAI names them; times are to the second. What is reset is the whole limit, while `retry-after` is when one request may come.
fn fields(retry_after_s: u64, standing: &Standing) -> String {
    let mut fields = format!("retry-after: {retry_after_s}\r\n");
    let counts = [
        ("requests", standing.requests),
        ("tokens", standing.tokens),
        ("concurrent-requests", standing.concurrent),
    ];
    for (name, used) in counts {
        let Some(used) = used else { continue };
        let remaining = used.limit.saturating_sub(used.used);
        add(&mut fields, "limit", name, used.limit);
        add(&mut fields, "remaining", name, remaining);
        // When a request ends nobody knows.
        if let Some(reset_ns) = used.until_full_ns {
            add(
                &mut fields,
                "reset",
                name,
                format_args!("{}s", reset_ns.div_ceil(1_000_000_000)),
            );
        }
    }
    if let Some(budget) = standing.budget {
        let remaining = NanoUsd(budget.usd.0.saturating_sub(budget.spent.0));
        add(&mut fields, "limit", "budget-usd", budget.usd);
        add(&mut fields, "remaining", "budget-usd", remaining);
        add(
            &mut fields,
            "reset",
            "budget-usd",
            format_args!("{}s", budget.left_us.div_ceil(1_000_000)),
        );
    }
    fields
}

fn add(fields: &mut String, what: &str, name: &str, value: impl std::fmt::Display) {
    // Writing to a text cannot fail.
    let _ = write!(fields, "x-ratelimit-{what}-{name}: {value}\r\n");
}
