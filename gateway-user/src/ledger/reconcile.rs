//! What engines counted against what requests are known to have used, and where a difference may come from.
//!
//! The two never agree at a moment: the engine counts a token as it makes it, the gateway when it is told. So intervals between two looks at
//! an engine are kept for a while, and a difference is a gap when it is old enough and nothing that came later took it back ([`settle`]).
//! Both sides take part in this with all of their errors: what is found is where to look, and moves no money.

use super::engine::{Totals, settle};
use super::facts::Work;
use super::time::Micros;
use std::collections::VecDeque;

/// Most intervals that are kept: four hours of looks every 15 s. Beyond that the time that is looked back on gets shorter.
const INTERVALS_MAX: usize = 1_000;

/// What lies between two looks at an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interval {
    /// When it ended.
    pub at: Micros,
    /// What the engine counted.
    pub counted: Totals,
    /// What requests are known to have used.
    pub attributed: Totals,
    /// What may explain a difference.
    pub evidence: Evidence,
}

/// The intervals of one upstream that are looked back on.
#[derive(Clone, Debug, Default)]
pub struct History(VecDeque<Interval>);

/// What stands out in a history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// What the engine counted in all of it.
    pub counted: Totals,
    /// What requests are known to have used in all of it.
    pub attributed: Totals,
    /// What the engine counted beyond that in intervals that are old enough, and nothing took back since.
    pub tokens: Totals,
}

impl History {
    /// Adds an interval, and forgets those that ended before `kept_from`.
    pub fn add(&mut self, interval: Interval, kept_from: Micros) {
        while self.0.len() >= INTERVALS_MAX || self.0.front().is_some_and(|oldest| oldest.at < kept_from) {
            self.0.pop_front();
        }
        self.0.push_back(interval);
    }

    /// The gap of all intervals that ended at or before `settled`; later ones only take back.
    pub fn gap(&self, settled: Micros) -> Gap {
        let work = |totals: Totals| Work {
            prompt_tokens: totals.prompt_tokens,
            completion_tokens: totals.completion_tokens,
            ..Work::default()
        };
        let pairs: Vec<(Work, Work)> = self
            .0
            .iter()
            .map(|interval| (work(interval.counted), work(interval.attributed)))
            .collect();
        let mut gap = Gap::default();
        for (interval, beyond) in self.0.iter().zip(settle(&pairs)) {
            gap.counted = gap.counted.plus(interval.counted);
            gap.attributed = gap.attributed.plus(interval.attributed);
            if interval.at <= settled {
                gap.tokens = gap.tokens.plus(Totals {
                    prompt_tokens: beyond.prompt_tokens,
                    completion_tokens: beyond.completion_tokens,
                });
            }
        }
        gap
    }

    /// All that may explain it.
    pub fn evidence(&self) -> Evidence {
        self.0
            .iter()
            .fold(Evidence::default(), |sum, interval| sum.plus(&interval.evidence))
    }
}

impl Totals {
    /// Both together.
    pub fn plus(self, other: Totals) -> Totals {
        Totals {
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            completion_tokens: self.completion_tokens.saturating_add(other.completion_tokens),
        }
    }

    /// How far it is from an earlier reading of the same counts.
    pub fn since(self, before: Totals) -> Totals {
        Totals {
            prompt_tokens: self.prompt_tokens.saturating_sub(before.prompt_tokens),
            completion_tokens: self.completion_tokens.saturating_sub(before.completion_tokens),
        }
    }
}

/// What was seen of an upstream that may explain a gap. Numbers are of requests, but where something else is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Its prompts are prefilled elsewhere, so that none of its requests is attributed.
    pub is_unsupported: bool,
    /// Several processes answered in turn at the address of its counters.
    pub is_shared_address: bool,
    /// A kernel probe looked at its traffic, so that requests past the gateways would have been seen.
    pub is_tapped: bool,
    /// Requests of other gateways, or other gateways that told of it.
    pub foreign: u64,
    /// Requests past the gateways whose tokens nobody told.
    pub direct: u64,
    /// Streams of which only chunks could be counted.
    pub counted: u64,
    /// Unstreamed requests whose client left: the engine worked on them, and no byte tells how much.
    pub aborted: u64,
    /// Other requests whose tokens are not known.
    pub untold: u64,
    /// Scrapes at which the counters began anew: what was made in the last moments before is in no count.
    pub resets: u64,
    /// Scrapes that failed.
    pub failures: u64,
}

impl Evidence {
    /// Both together.
    pub fn plus(&self, other: &Evidence) -> Evidence {
        Evidence {
            is_unsupported: self.is_unsupported || other.is_unsupported,
            is_shared_address: self.is_shared_address || other.is_shared_address,
            is_tapped: self.is_tapped || other.is_tapped,
            foreign: self.foreign.saturating_add(other.foreign),
            direct: self.direct.saturating_add(other.direct),
            counted: self.counted.saturating_add(other.counted),
            aborted: self.aborted.saturating_add(other.aborted),
            untold: self.untold.saturating_add(other.untold),
            resets: self.resets.saturating_add(other.resets),
            failures: self.failures.saturating_add(other.failures),
        }
    }
}

/// Why an engine may have counted more than requests are known to have used.
///
/// Preemption is none: vLLM counts a prompt when its first token comes, and not again when a request that was thrown out is computed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Prefill and decode are on different servers, and its requests are not attributed.
    Unsupported,
    /// Its counters are those of several processes in turn.
    SharedAddress,
    /// Another gateway sends requests there.
    OtherGateway,
    /// Requests went there past the gateways.
    Direct,
    /// Streams did not tell their usage.
    UsageOff,
    /// Clients left before an unstreamed response.
    AbortedUnstreamed,
    /// Requests ended in other ways that tell no tokens.
    UnknownTokens,
    /// The engine began anew.
    CounterReset,
    /// Its counters could not be read at times.
    ScrapesFailed,
    /// Nobody looks for requests past the gateways, and nothing else was seen.
    DirectUnseen,
    /// Nothing was seen that explains it.
    Unexplained,
}

impl Cause {
    /// Every one, the likeliest first.
    pub const ALL: [Cause; 11] = [
        Cause::Unsupported,
        Cause::SharedAddress,
        Cause::OtherGateway,
        Cause::Direct,
        Cause::UsageOff,
        Cause::AbortedUnstreamed,
        Cause::UnknownTokens,
        Cause::CounterReset,
        Cause::ScrapesFailed,
        Cause::DirectUnseen,
        Cause::Unexplained,
    ];

    /// The name in metrics, logs and reports.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Unsupported => "unsupported",
            Cause::SharedAddress => "shared_address",
            Cause::OtherGateway => "other_gateway",
            Cause::Direct => "direct",
            Cause::UsageOff => "usage_off",
            Cause::AbortedUnstreamed => "aborted_unstreamed",
            Cause::UnknownTokens => "unknown_tokens",
            Cause::CounterReset => "counter_reset",
            Cause::ScrapesFailed => "scrapes_failed",
            Cause::DirectUnseen => "direct_unseen",
            Cause::Unexplained => "unexplained",
        }
    }

    /// What to do about it.
    pub fn advice(self) -> &'static str {
        match self {
            Cause::Unsupported => {
                "its prompts are prefilled by another server, so that nobody is billed for its time; if that is but a cache, say so (upstreams[].external_kv_is_cache)"
            }
            Cause::SharedAddress => "list each vLLM process by its own address as an upstream",
            Cause::OtherGateway => {
                "other gateways send requests there too: look at figures of all of them (vllm-gateway report --reconciliation)"
            }
            Cause::Direct => "requests go there past the gateways: let them come through one",
            Cause::UsageOff => {
                "streams tell no usage: set usage.inject to auto, and proxy.on_uninspectable to reject"
            }
            Cause::AbortedUnstreamed => "clients give up before the answer: let them stream, or wait longer",
            Cause::UnknownTokens => {
                "requests ended without telling their tokens: see outcome and error_type in request_events"
            }
            Cause::CounterReset => "the engine was restarted; what it made just before is in no count",
            Cause::ScrapesFailed => "its /metrics could not be read at times",
            Cause::DirectUnseen => {
                "requests may go there past the gateway, or through another one: run the kernel probe (capture: proxy+tap) to see them"
            }
            Cause::Unexplained => "nothing seen explains it; vllm-gateway doctor may",
        }
    }
}

/// What a gap may come from, the likeliest first; never empty.
pub fn likely_causes(evidence: &Evidence) -> Vec<Cause> {
    let is_seen = |cause: &Cause| match cause {
        Cause::Unsupported => evidence.is_unsupported,
        Cause::SharedAddress => evidence.is_shared_address,
        Cause::OtherGateway => evidence.foreign > 0,
        Cause::Direct => evidence.direct > 0,
        Cause::UsageOff => evidence.counted > 0,
        Cause::AbortedUnstreamed => evidence.aborted > 0,
        Cause::UnknownTokens => evidence.untold > 0,
        Cause::CounterReset => evidence.resets > 0,
        Cause::ScrapesFailed => evidence.failures > 0,
        Cause::DirectUnseen | Cause::Unexplained => false,
    };
    let mut causes: Vec<Cause> = Cause::ALL.into_iter().filter(is_seen).collect();
    // These two lose a few tokens at most; where nothing else was seen they do not explain a gap.
    let is_explained = causes
        .iter()
        .any(|cause| !matches!(cause, Cause::CounterReset | Cause::ScrapesFailed));
    if !is_explained {
        let unseen = if evidence.is_tapped {
            Cause::Unexplained
        } else {
            Cause::DirectUnseen
        };
        causes.insert(0, unseen);
    }
    causes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(completion_tokens: u64) -> Totals {
        Totals {
            prompt_tokens: 0,
            completion_tokens,
        }
    }

    fn history(pairs: &[(u64, u64)]) -> History {
        let mut history = History::default();
        for (at, (counted, attributed)) in (1..).zip(pairs) {
            let interval = Interval {
                at: Micros(at),
                counted: tokens(*counted),
                attributed: tokens(*attributed),
                evidence: Evidence::default(),
            };
            history.add(interval, Micros(0));
        }
        history
    }

    #[test]
    fn what_a_later_interval_takes_back_is_no_gap() {
        let stream_told_at_its_end = history(&[(100, 0), (100, 0), (10, 210)]);
        assert_eq!(stream_told_at_its_end.gap(Micros(2)).tokens, tokens(0));
        let direct = history(&[(100, 100), (150, 100), (100, 100), (10, 0)]);
        let gap = direct.gap(Micros(3));
        assert_eq!(
            (gap.tokens, gap.counted, gap.attributed),
            (tokens(50), tokens(360), tokens(300))
        );
        assert_eq!(direct.gap(Micros(4)).tokens, tokens(60));
        assert_eq!(direct.gap(Micros(1)).tokens, tokens(0));
    }

    #[test]
    fn a_load_that_is_always_told_late_is_no_gap_once_it_is_steady() {
        let mut late = history(&[(100, 0), (100, 100), (100, 100), (100, 100), (0, 100)]);
        assert_eq!(late.gap(Micros(4)).tokens, tokens(0));
        let next = Interval {
            at: Micros(6),
            ..Interval::default()
        };
        late.add(next, Micros(3));
        assert_eq!(
            late.gap(Micros(6)).counted,
            tokens(200),
            "older ones are forgotten"
        );
    }

    #[test]
    fn what_was_seen_comes_before_what_is_suspected() {
        let causes = |evidence: Evidence| likely_causes(&evidence);
        assert_eq!(causes(Evidence::default()), [Cause::DirectUnseen]);
        let tapped = Evidence {
            is_tapped: true,
            ..Evidence::default()
        };
        assert_eq!(causes(tapped), [Cause::Unexplained]);
        let restarted = Evidence {
            resets: 1,
            failures: 3,
            ..tapped
        };
        assert_eq!(
            causes(restarted),
            [Cause::Unexplained, Cause::CounterReset, Cause::ScrapesFailed]
        );
        let seen = Evidence {
            direct: 1,
            aborted: 2,
            foreign: 1,
            ..Evidence::default()
        };
        assert_eq!(
            causes(seen),
            [Cause::OtherGateway, Cause::Direct, Cause::AbortedUnstreamed]
        );
        let all = Evidence {
            is_unsupported: true,
            is_shared_address: true,
            counted: 1,
            untold: 1,
            ..seen.plus(&restarted)
        };
        let expected = &Cause::ALL[..Cause::ALL.len() - 2];
        assert_eq!(causes(all), expected);
    }

    proptest! {
        #[test]
        fn the_whole_gap_is_what_is_left_in_the_end(pairs in prop::collection::vec((0_u64..1_000, 0_u64..1_000), 1..30)) {
            let history = history(&pairs);
            let (counted, attributed): (u64, u64) = pairs.iter().fold((0, 0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
            let gap = history.gap(Micros(u64::MAX));
            prop_assert_eq!(gap.tokens.completion_tokens, counted.saturating_sub(attributed));
            // Looking at fewer intervals finds no more.
            prop_assert!(history.gap(Micros(pairs.len() as u64 / 2)).tokens.completion_tokens <= gap.tokens.completion_tokens);
        }
    }
}
