//! What the ledger says of a period, as it was read.

use crate::ledger::facts::{DOWN, IDLE, LOADING, SCALED_TO_ZERO, UNATTRIBUTED};

/// Lines that no team has, in the order in which they are told.
pub const LINES: [&str; 5] = [IDLE, UNATTRIBUTED, LOADING, DOWN, SCALED_TO_ZERO];

/// What teams pay and no stored request explains, where it is asked for by what only requests have: shares of idle time, requests that still
/// run, and those whose rows are no longer kept.
pub const WITHOUT_REQUEST: &str = "__without_request__";

/// What fell to somebody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// All of it.
    pub nano_usd: i64,
    /// The part that is a share of idle time; `None` where that cannot be told.
    pub idle_nano_usd: Option<i64>,
    /// Prompt and completion tokens that were worked on in these windows, where they are known.
    pub tokens: Option<u64>,
}

/// The cost of those that agree in everything that they were grouped by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CostGroup {
    /// A value for each dimension.
    pub keys: Vec<String>,
    /// What fell to them.
    pub cost: Cost,
}

/// The cost of a line that nobody has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CostLine {
    /// One of [`LINES`], or [`WITHOUT_REQUEST`].
    pub name: String,
    /// What it has.
    pub nano_usd: i64,
}

/// What is booked of one upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamBooks {
    /// Its name.
    pub upstream: String,
    /// Begin of the first window that was ever booked of it, seconds since 1970.
    pub opened_s: i64,
    /// Windows of the period that are booked, joined where they touch: begin and end, seconds since 1970, in order.
    pub runs: Vec<(i64, i64)>,
    /// How many windows that are.
    pub windows: u64,
    /// Those to which rows may still come.
    pub provisional: u64,
    /// Those that have had their time.
    pub settled: u64,
    /// Those to which something came later still.
    pub restated: u64,
    /// What they cost.
    pub bill_nano_usd: i64,
    /// What its engine counted.
    pub engine: Engine,
    /// Tokens of `__unattributed__`.
    pub unattributed_tokens: u64,
    /// By which rules, and how many windows by each; at most a few.
    pub rules: Vec<RulesUse>,
}

/// An engine's own count against what requests are known to have used, prompt and completion tokens together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Engine {
    /// Windows in which its counters are known.
    pub windows: u64,
    /// What they grew by in these; `None` when there are none.
    pub tokens: Option<u64>,
    /// What requests are known to have used in the same windows.
    pub known_tokens: u64,
    /// What they are known to have used in all windows.
    pub known_tokens_everywhere: u64,
}

/// Rules that windows were booked by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RulesUse {
    /// In the ledger's words.
    pub rules: String,
    /// How many windows.
    pub windows: u64,
}

/// A window whose rows do not sum to its head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnevenWindow {
    /// Its upstream.
    pub upstream: String,
    /// Its begin, seconds since 1970.
    pub start_s: i64,
    /// What its head says.
    pub bill_nano_usd: i64,
    /// What its rows sum to.
    pub cost_nano_usd: i64,
}

/// A month that nothing is written to any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedMonth {
    /// Its bill when it was closed.
    pub bill_nano_usd: i64,
    /// Its windows then.
    pub windows: u64,
    /// Who closed it.
    pub closed_by: String,
    /// When, microseconds since 1970.
    pub closed_at_us: i64,
}

/// A row of the finest kind that is handed on: a day of an upstream, by whom and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChargeRow {
    /// Begin of the day (UTC), seconds since 1970.
    pub day_s: i64,
    /// The upstream.
    pub upstream: String,
    /// The team, or one of [`LINES`].
    pub team: String,
    /// Its project; may be empty.
    pub project: String,
    /// The model; `__idle__` on a team's share of idle time.
    pub model: String,
    /// What it cost.
    pub cost_nano_usd: i64,
    /// The upstream's time that it had. All rows of a day sum to the time of the booked windows.
    pub time_us: u64,
    /// Prompt and completion tokens that were worked on.
    pub tokens: u64,
    /// By which rules.
    pub method: String,
    /// `provisional` while any part of it is, else `restated` when any part is, else `settled`.
    pub state: String,
}

impl ChargeRow {
    /// Whether a team pays it.
    pub fn is_a_teams(&self) -> bool {
        !LINES.contains(&self.team.as_str())
    }
}

/// What the ledger says of a period.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerFigures {
    /// Those who pay, in the order of their keys.
    pub groups: Vec<CostGroup>,
    /// What nobody pays, those lines that there are.
    pub lines: Vec<CostLine>,
    /// The finest rows, where they were asked for instead of groups.
    pub charges: Vec<ChargeRow>,
    /// The heads.
    pub upstreams: Vec<UpstreamBooks>,
    /// How many windows have rows that do not sum to their heads.
    pub uneven_windows: u64,
    /// The first few of them.
    pub uneven: Vec<UnevenWindow>,
}

impl LedgerFigures {
    /// What those who pay have, whether or not a request explains it.
    pub fn teams_nano_usd(&self) -> i64 {
        let groups = self.groups.iter().map(|group| group.cost.nano_usd);
        let unexplained = self.lines.iter().filter(|line| line.name == WITHOUT_REQUEST);
        let charges = self.charges.iter().filter(|row| row.is_a_teams());
        groups
            .chain(unexplained.map(|line| line.nano_usd))
            .chain(charges.map(|row| row.cost_nano_usd))
            .sum()
    }

    /// What all rows sum to.
    pub fn cost_nano_usd(&self) -> i64 {
        let lines = self.lines.iter().filter(|line| line.name != WITHOUT_REQUEST);
        let charges = self.charges.iter().filter(|row| !row.is_a_teams());
        let of_nobody = lines
            .map(|line| line.nano_usd)
            .chain(charges.map(|row| row.cost_nano_usd));
        self.teams_nano_usd() + of_nobody.sum::<i64>()
    }

    /// What all heads sum to.
    pub fn bill_nano_usd(&self) -> i64 {
        self.upstreams.iter().map(|books| books.bill_nano_usd).sum()
    }

    /// Whether every window's rows sum to its head, and what is printed to all heads.
    pub fn is_even(&self) -> bool {
        self.uneven_windows == 0 && self.cost_nano_usd() == self.bill_nano_usd()
    }
}
