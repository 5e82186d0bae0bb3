//! Figures of a period, read back from ClickHouse: what `vllm-gateway report` prints.
//!
//! Rows are read deduplicated (`FINAL`), and a request counts in the period in which it **ended**, as in the 15-second windows. Groups and their
//! total come out of one query, so that they are of one state of the table. Nothing is written, so that a user who may only read will do.
//!
//! Requests, errors, aborts and refusals add up: an error is whatever was neither completed, aborted nor refused. Sums are of the tokens that are
//! known; how many requests have unknown ones is a figure of its own. Percentiles are approximate (t-digest, as those of the windows): TTFT and ITL
//! of all requests that have one, ITL as each request's mean gap, and E2E of completed requests, since one that was given up says nothing of how
//! long it would have taken.
//!
//! What it cost comes from the ledger ([`LedgerFigures`]), whose rows are by window and not by request: cost counts in the period in which the
//! window **begins**, so that the costs of adjoining periods sum to those of both.

mod charges;
mod error;
mod ledger;
mod reader;
mod reconciliation;
mod work;

pub use charges::{Charges, Whose};
pub use error::ReadError;
pub use ledger::{
    ChargeRow, ClosedMonth, Cost, CostGroup, CostLine, Engine, LINES, LedgerFigures, RulesUse, UnevenWindow,
    UpstreamBooks, WITHOUT_REQUEST,
};
pub use reader::FiguresReader;
pub use reconciliation::Reconciled;
pub use work::{WindowWork, WorkByUpstream};

/// What requests can be grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dimension {
    /// Who pays.
    Team,
    /// The second level of attribution.
    Project,
    /// The third level of attribution.
    User,
    /// The model.
    Model,
    /// The route.
    Endpoint,
    /// The day (UTC) on which the request ended; of costs, that on which the window began.
    Day,
}

impl Dimension {
    /// What it is called in output and options.
    pub fn name(self) -> &'static str {
        match self {
            Dimension::Team => "team",
            Dimension::Project => "project",
            Dimension::User => "user",
            Dimension::Model => "model",
            Dimension::Endpoint => "endpoint",
            Dimension::Day => "day",
        }
    }

    fn sql(self) -> &'static str {
        match self {
            Dimension::Team => "toString(team_id)",
            Dimension::Project => "toString(project)",
            Dimension::User => "user_id",
            Dimension::Model => "toString(model)",
            Dimension::Endpoint => "toString(endpoint)",
            Dimension::Day => "toString(toDate(ended_at, 'UTC'))",
        }
    }

    /// Whether rows of the ledger have it. The others are known of single requests only.
    pub fn is_in_the_ledger(self) -> bool {
        !matches!(self, Dimension::User | Dimension::Endpoint)
    }

    /// In rows of the ledger, where the day is that of the window.
    fn ledger_sql(self) -> &'static str {
        match self {
            Dimension::Day => "toString(toDate(window_start, 'UTC'))",
            other => other.sql(),
        }
    }
}

/// A time span that is not empty, its end excluded; microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period {
    from_us: i64,
    to_us: i64,
}

impl Period {
    /// From one time to a later one; `None` if it is not later.
    pub fn new(from_us: i64, to_us: i64) -> Option<Period> {
        (from_us < to_us).then_some(Period { from_us, to_us })
    }

    /// The first moment within.
    pub fn from_us(self) -> i64 {
        self.from_us
    }

    /// The first moment behind.
    pub fn to_us(self) -> i64 {
        self.to_us
    }
}

/// What was found of a group of requests. Absent values are unknown, not zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// All of them.
    pub requests: u64,
    /// Completed.
    pub ok: u64,
    /// Neither completed, aborted nor refused.
    pub errors: u64,
    /// The client left.
    pub aborted: u64,
    /// The gateway refused.
    pub refused: u64,
    /// Billed prompt tokens, as far as they are known.
    pub prompt_tokens: Option<u64>,
    /// Those out of the prefix cache.
    pub cached_tokens: Option<u64>,
    /// Billed completion tokens, as far as they are known.
    pub completion_tokens: Option<u64>,
    /// Those that were reasoning.
    pub reasoning_tokens: Option<u64>,
    /// Requests that an engine may have worked on, and nobody knows for how many tokens.
    pub unknown_token_requests: u64,
    /// What they are charged by their tokens.
    pub charge_nano_usd: i64,
    /// Time to the first token.
    pub ttft: Percentiles,
    /// Mean gap between chunks with content.
    pub itl: Percentiles,
    /// Duration of completed requests.
    pub e2e: Percentiles,
}

/// Two percentiles in microseconds; unknown when no request has such a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percentiles {
    /// Half of the requests took no longer.
    pub p50_us: Option<u64>,
    /// Nineteen of twenty took no longer.
    pub p95_us: Option<u64>,
}

/// The requests that agree in everything that they were grouped by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// A value for each dimension; empty where requests have none.
    pub keys: Vec<String>,
    /// What was found of them.
    pub figures: Figures,
}

/// All groups of a period, in the order of their keys, and all of them together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupedFigures {
    /// The groups.
    pub groups: Vec<Group>,
    /// All of them together.
    pub total: Figures,
}
