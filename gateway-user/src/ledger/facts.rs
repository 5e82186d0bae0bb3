//! What is known of one window of one upstream.

use serde::Serialize;

use super::method::{Millionths, Weights};
use super::price::PriceList;
use super::time::{Micros, Span, Window};

/// Time of a server that nobody used.
pub const IDLE: &str = "__idle__";

/// What the engine did and no known request asked for.
pub const UNATTRIBUTED: &str = "__unattributed__";

/// Time in which the server loaded its model.
pub const LOADING: &str = "__loading__";

/// Time in which the server was paid for and did not answer.
pub const DOWN: &str = "__down__";

/// Time in which there was, on purpose, no server.
pub const SCALED_TO_ZERO: &str = "__scaled_to_zero__";

/// What begins the names of lines that no team has.
const LINE_PREFIX: &str = "__";

/// More tokens than an engine makes in a window; what is beyond is no work, so that no sum overflows.
const TOKENS_MAX: u64 = 1 << 40;

/// What was worked on. `cached` tokens are part of `prompt`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Work {
    /// Prompt tokens, as the engine counts them.
    pub prompt_tokens: u64,
    /// Those of them that came out of the prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated, as the engine counts them.
    pub completion_tokens: u64,
    /// Tokens in the KV cache, times the microseconds that they lay there.
    pub kv_token_us: u64,
}

/// Whom a row is for. Orders rows, and so decides between equal remainders.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Account {
    /// The team, or a line of the ledger's own.
    pub team_id: Box<str>,
    /// Its project; may be empty.
    pub project: Box<str>,
    /// The model; `__idle__` on a team's share of idle time.
    pub model: Box<str>,
}

/// The part of a request that falls into one window at one upstream: a row of `request_segments`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Segment {
    /// The request: with upstream and window, the row's key.
    pub event_id: Box<str>,
    /// Who pays.
    pub account: Account,
    /// When it ran.
    pub run: Span,
    /// What was done for it meanwhile.
    pub work: Work,
}

/// How an engine was. Where two observers differ, the later of these counts: who saw more was nearer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// It did not answer.
    Down,
    /// There was none, on purpose.
    ScaledToZero,
    /// It slept, on purpose: there is a server, and its model is not on the GPU. Its time is that of a server that is not there.
    Asleep,
    /// It loaded its model.
    Loading,
    /// It was ready.
    Up,
    /// It said that requests ran.
    Running,
}

/// How an engine was for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineSpan {
    /// The while.
    pub span: Span,
    /// The moment at which it was seen, for which the while stands.
    pub at: Micros,
    /// How it was.
    pub condition: Condition,
}

/// What the engine said of itself in a window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineView {
    /// How it was; they may overlap and reach beyond the window. In time that none covers it counts as up.
    pub spans: Vec<EngineSpan>,
    /// What its counters grew by, once that is settled; `None` while it is not known.
    pub counted: Option<Work>,
}

/// All that the rows of a window follow from.
#[derive(Clone, Copy, Debug)]
pub struct WindowFacts<'a> {
    /// The window.
    pub window: Window,
    /// The upstream's configured name.
    pub upstream: &'a str,
    /// What it costs.
    pub prices: &'a PriceList,
    /// The segments of all gateways, in any order. Of several with one event's id the greatest counts.
    pub segments: &'a [Segment],
    /// What its engine said.
    pub engine: &'a EngineView,
    /// Whom an earlier revision has rows for. They get one now even when nothing falls to them any more: a row that was
    /// written is replaced only by a row.
    pub accounts_before: &'a [Account],
}

impl Account {
    /// A line of the ledger's own.
    pub(super) fn line(name: &str) -> Account {
        Account {
            team_id: name.into(),
            ..Account::default()
        }
    }

    /// A team's share of idle time.
    pub(super) fn idle_of(team: &str) -> Account {
        Account {
            team_id: team.into(),
            model: IDLE.into(),
            ..Account::default()
        }
    }

    /// Whether it is a team's, and not one of the lines that nobody has.
    pub(super) fn is_a_teams(&self) -> bool {
        !self.team_id.starts_with(LINE_PREFIX)
    }
}

impl Work {
    /// Both together.
    pub fn plus(self, other: Work) -> Work {
        self.each(other, u64::saturating_add)
    }

    /// What is in this beyond `known`.
    pub(super) fn beyond(self, known: Work) -> Work {
        self.each(known, u64::saturating_sub)
    }

    /// The greater of each.
    pub(super) fn at_least(self, other: Work) -> Work {
        self.each(other, u64::max)
    }

    fn each(self, other: Work, join: impl Fn(u64, u64) -> u64) -> Work {
        Work {
            prompt_tokens: join(self.prompt_tokens, other.prompt_tokens),
            cached_tokens: join(self.cached_tokens, other.cached_tokens),
            completion_tokens: join(self.completion_tokens, other.completion_tokens),
            kv_token_us: join(self.kv_token_us, other.kv_token_us),
        }
    }

    /// By its weights, in millionths of a millionth.
    pub(super) fn amount(self, weights: &Weights) -> u128 {
        let of = |weight: Millionths, count: u64| u128::from(weight.get()) * u128::from(count);
        let uncached = self
            .prompt_tokens
            .saturating_sub(self.cached_tokens)
            .min(TOKENS_MAX);
        let completion = self.completion_tokens.min(TOKENS_MAX);
        let tokens = of(weights.prompt, uncached) + of(weights.completion, completion);
        let second_us = u128::from(Millionths::ONE.get());
        tokens * second_us + of(weights.kv, self.kv_token_us.min(TOKENS_MAX << 20))
    }
}
