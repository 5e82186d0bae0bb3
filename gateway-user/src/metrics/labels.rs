//! Labels: what each says, and what bounds its values. Teams and models come from clients, and every new value costs memory here and in
//! Prometheus for ever.

use foldhash::quality::RandomState;
use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

/// A label of some families.
#[derive(Clone, Copy, Debug)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// What its value says.
    pub means: &'static str,
    /// How many values there can be, and what becomes of more.
    pub bound: &'static str,
}

/// A word out of a list in the program.
const WORDS: &str = "a fixed list of words";
/// One for each entry of the config.
const CONFIGURED: &str = "the entries of `upstreams`";

/// Every label that a family here has: a family with another one fails the test of `docs/METRICS.md`, as does a label that no family has.
#[rustfmt::skip] // A table: one label a line.
pub const LABELS: &[Label] = &[
    Label { name: "team", means: "who pays; `__none__` where the request never said so", bound: "`metrics.max_teams` (1000), then `__other__`; a refused request founds none" },
    Label { name: "model", means: "the model, as the response names it; `__none__` where there is none", bound: "200 names that a server has answered to, then `__other__`, and `__unknown__` for names that none has; with team and endpoint 5000 combinations, then `__other__`. In `gateway_vllm_*` the names that vLLM itself uses, 200 an upstream" },
    Label { name: "endpoint", means: "the route, under one name for all its spellings", bound: "vLLM's routes, and `other`" },
    Label { name: "status", means: "the status code that the client got; 0 where it got none", bound: "codes of HTTP" },
    Label { name: "outcome", means: "how the request ended: `completed`, `client_error`, `server_error`, `aborted` (by the client), `truncated`, `unreachable`, `timed_out`, `refused` (by the gateway), `incomplete` (seen by the tap only in part), `gateway_crash`", bound: WORDS },
    Label { name: "type", means: "of tokens: `prompt`, `completion`, and of billed ones also `cached`", bound: WORDS },
    Label { name: "source", means: "where token counts come from: `reported` (the final usage), `continuous` (the last usage before a stream broke off), `counted` (chunks, a lower bound), `none`", bound: WORDS },
    Label { name: "reason", means: "why: of a refusal (mostly as `code` in its body), a second try, a failed scrape, the end of a request at the engine, or an upstream that is not billed", bound: "a fixed list of words; the engine's reasons are those that vLLM names" },
    Label { name: "limit", means: "what is limited: `requests_per_minute`, `tokens_per_minute`, `concurrent_requests`, and of limited requests also `budget`", bound: WORDS },
    Label { name: "action", means: "what became of requests that a limit stood in the way of: `refused`, or `observed` where they were let in", bound: WORDS },
    Label { name: "period", means: "the time that a budget is for: `day` or `month`, by UTC", bound: WORDS },
    Label { name: "result", means: "`edited`, or why not: `off`, `endpoint`, `not_json`, `not_streamed`, `duplicate_key`, `stream_options`, `already_asked`, `fingerprint_unknown`; `event_too_long` where it was given up on the way", bound: WORDS },
    Label { name: "upstream", means: "the server, by its configured name", bound: CONFIGURED },
    Label { name: "state", means: "of connections `idle` or `active`, of windows `provisional`, `settled` or `restated`", bound: WORDS },
    Label { name: "line", means: "what the cost was for: `teams`' requests, `__idle__`, `__unattributed__` (the engine ran, and no known request did), `__loading__`, `__down__`, `__scaled_to_zero__`", bound: WORDS },
    Label { name: "condition", means: "how the upstream was", bound: WORDS },
    Label { name: "cause", means: "why something was lost, given up or must be made again", bound: WORDS },
    Label { name: "table", means: "of which table the rows are: `request_events` or `request_segments`", bound: WORDS },
    Label { name: "direction", means: "`ingress` (to the server) or `egress` (from it)", bound: WORDS },
    Label { name: "seen_from", means: "whether a connection was seen from its `beginning` or from its `middle` on", bound: WORDS },
    Label { name: "whose", means: "`own`, `late`, `foreign`, `direct` or `operational`", bound: WORDS },
    Label { name: "mode", means: "`proxy`, `proxy+tap` or `tap`", bound: "one" },
    Label { name: "version", means: "the version of the program", bound: "one" },
    Label { name: "revision", means: "the revision that it was built from, where the build said so", bound: "one" },
];

/// Stands for every value past the limit.
pub(crate) const OTHER: &str = "__other__";
/// Stands for a value that a request never gave.
pub(super) const NONE: &str = "__none__";
/// Stands for a value that a client gave and no server confirmed.
pub(super) const UNKNOWN: &str = "__unknown__";

/// The values of one label, up to a limit. A value once admitted stays.
pub(super) struct Admitted {
    names: RwLock<HashSet<Box<str>, RandomState>>,
    limit: usize,
}

impl Admitted {
    pub(super) fn up_to(limit: usize) -> Admitted {
        Admitted {
            names: RwLock::default(),
            limit,
        }
    }

    /// Admits `name` whatever the limit says: for names that come from the configuration, which strangers must not crowd out.
    pub(super) fn reserve(&self, name: &str) {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        names.insert(name.into());
    }

    /// `name` if it is admitted, else [`OTHER`].
    pub(super) fn admit<'n>(&self, name: &'n str) -> &'n str {
        {
            let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
            if names.contains(name) {
                return name;
            }
            if names.len() >= self.limit {
                return OTHER;
            }
        }
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        if names.len() < self.limit || names.contains(name) {
            names.insert(name.into());
            return name;
        }
        OTHER
    }

    /// Whether `name` has been admitted.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_the_limit_a_new_name_is_other_and_a_known_one_keeps_its_own() {
        let admitted = Admitted::up_to(2);
        assert_eq!(admitted.admit("a"), "a");
        assert_eq!(admitted.admit("b"), "b");
        assert_eq!(admitted.admit("c"), OTHER);
        assert_eq!(admitted.admit("a"), "a");
        assert!(!admitted.has("c"), "a refused name must take no memory");
    }

    #[test]
    fn a_reserved_name_is_admitted_even_when_strangers_came_first() {
        let admitted = Admitted::up_to(1);
        assert_eq!(admitted.admit("stranger"), "stranger");
        admitted.reserve("configured");
        assert_eq!(admitted.admit("configured"), "configured");
        assert_eq!(admitted.admit("another"), OTHER);
    }
}
