//! A row of `cost_ledger`.

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

impl State {
    /// The name in rows.
    pub fn name(self) -> &'static str {
        match self {
            State::Provisional => "provisional",
            State::Settled => "settled",
            State::Restated => "restated",
        }
    }
}

fn in_seconds<S: Serializer>(window: &Window, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(window.start().0 / 1_000_000)
}

fn as_i64<S: Serializer>(amount: &NanoUsd, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_i64(amount.as_i64())
}

fn name_of_state<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}
