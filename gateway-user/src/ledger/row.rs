//! Rows of `cost_ledger`, and of `segment_costs`.

use serde::{Serialize, Serializer};

use super::facts::Account;
use super::money::NanoUsd;
use super::time::Window;

/// How final a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// More segments may come.
    Provisional,
    /// All have come, or have had their time to.
    Settled,
    /// Some came later still.
    Restated,
}

/// Which statement of a window a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edition {
    /// Of the rows of a key, the one with the highest counts.
    pub revision: u64,
    /// How final it is.
    pub state: State,
}

/// A row of `cost_ledger`, name for name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CostRow {
    /// Start of the window.
    #[serde(serialize_with = "in_seconds")]
    pub window_start: Window,
    /// The upstream.
    pub upstream: Box<str>,
    /// Whom it is for.
    #[serde(flatten)]
    pub account: Account,
    /// The share of the upstream's busy time: the rows of a window sum to its busy time, and lines that are not busy have none.
    pub busy_us: u64,
    /// Prompt tokens worked on, cached ones included.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// What it cost.
    #[serde(rename = "cost_nano_usd", serialize_with = "as_i64")]
    pub cost: NanoUsd,
    /// By which rules.
    pub method: Box<str>,
    /// Of the rows of a key the highest counts.
    pub revision: u64,
    /// How final it is.
    #[serde(serialize_with = "name_of_state")]
    pub state: State,
}

/// A row of `segment_costs`, name for name: what one segment has of its account's row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SegmentCost {
    /// Start of the window.
    #[serde(serialize_with = "in_seconds")]
    pub window_start: Window,
    /// The upstream.
    pub upstream: Box<str>,
    /// The request.
    pub event_id: Box<str>,
    /// Whom it is for.
    #[serde(flatten)]
    pub account: Account,
    /// The share of the upstream's busy time.
    pub busy_us: u64,
    /// What it cost.
    #[serde(rename = "cost_nano_usd", serialize_with = "as_i64")]
    pub cost: NanoUsd,
    /// As in the account's row.
    pub revision: u64,
    /// As in the account's row.
    #[serde(serialize_with = "name_of_state")]
    pub state: State,
}

/// What a window cost: its rows by account, and what each segment has of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// In the order of their accounts; they sum to the window's bill.
    pub rows: Vec<CostRow>,
    /// Each segment once.
    pub segments: Vec<SegmentCost>,
}

impl State {
    /// Every state.
    pub const ALL: [State; 3] = [State::Provisional, State::Settled, State::Restated];

    /// The state of this name.
    pub fn named(name: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.name() == name)
    }

    /// The name in rows.
    pub fn name(self) -> &'static str {
        match self {
            State::Provisional => "provisional",
            State::Settled => "settled",
            State::Restated => "restated",
        }
    }
}

pub(super) fn in_seconds<S: Serializer>(window: &Window, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(window.start().0 / 1_000_000)
}

pub(super) fn as_i64<S: Serializer>(amount: &NanoUsd, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_i64(amount.as_i64())
}

pub(super) fn name_of_state<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}
