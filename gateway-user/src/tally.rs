//! What was booked of each upstream since the gateway started, and what is known of it that bookings need.
//!
//! The request path adds to it (a relaxed addition or two for each segment), each upstream's scrape reads it. Upstreams are those of the
//! configuration, so that nothing is locked to find one.

use crate::config::Config;
use crate::event::{CapturedBy, RequestEvent};
use crate::ledger::{Evidence, Slice, Totals};
use crate::vllm::page::Unsupported;
use crate::wire::endpoint::{Endpoint, Purpose};
use crate::wire::exchange::{Outcome, UsageSource};
use foldhash::quality::RandomState;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// The tallies of all upstreams, by their configured names.
#[derive(Debug, Default)]
pub struct Tallies(HashMap<Box<str>, Arc<Tally>, RandomState>);

impl Tallies {
    /// Of the upstreams of this configuration.
    pub fn new(config: &Config) -> Tallies {
        let names = config.upstreams.iter().map(|upstream| upstream.name.as_str());
        Tallies(names.map(|name| (name.into(), Arc::default())).collect())
    }

    /// That of one upstream.
    pub fn of(&self, upstream: &str) -> Option<&Arc<Tally>> {
        self.0.get(upstream)
    }
}

/// What was booked of one upstream.
#[derive(Debug, Default)]
pub struct Tally {
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    /// Requests of other gateways, as the kernel saw them.
    foreign: AtomicU64,
    /// Requests of which no tokens are known, by why.
    untold: [AtomicU64; Untold::COUNT],
    base_model: RwLock<Option<Arc<str>>>,
    /// 0, or 1 and the place in [`Unsupported::ALL`]: it is asked for each segment, and must not lock.
    unsupported: AtomicU8,
}

/// Why the tokens of a request are not known that an engine may have worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Untold {
    /// It went past the gateways, and nobody asked for its usage.
    Direct,
    /// Its chunks were counted.
    Counted,
    /// Its client left before an unstreamed response.
    Aborted,
    /// Anything else.
    Other,
}

impl Untold {
    const COUNT: usize = Untold::Other as usize + 1;

    /// `None` where all is told, or no engine had anything to tell.
    fn of(event: &RequestEvent) -> Option<Untold> {
        let needs_completion = match Endpoint::of_name(event.endpoint).purpose() {
            Purpose::Generate => true,
            Purpose::Pool => false,
            _ => return None,
        };
        let is_refused = matches!(
            event.outcome,
            Outcome::Refused | Outcome::Unreachable | Outcome::ClientError
        );
        let prompt = event.engine_prompt_tokens.or(event.prompt_tokens);
        let completion = event.engine_completion_tokens.or(event.completion_tokens);
        if is_refused || prompt.is_some() && (completion.is_some() || !needs_completion) {
            return None;
        }
        Some(match (event.capture, event.usage_source, event.outcome) {
            (CapturedBy::Tap, _, _) => Untold::Direct,
            (_, UsageSource::Counted, _) => Untold::Counted,
            (_, _, Outcome::Aborted) if !event.stream => Untold::Aborted,
            _ => Untold::Other,
        })
    }
}

impl Tally {
    /// Takes note of the work that segments tell of.
    pub fn attribute(&self, slices: &[Slice]) {
        for slice in slices {
            add(&self.prompt_tokens, slice.work.prompt_tokens);
            add(&self.completion_tokens, slice.work.completion_tokens);
        }
    }

    /// Takes note of a request that has ended.
    pub fn ended(&self, event: &RequestEvent) {
        if let Some(untold) = Untold::of(event) {
            add(&self.untold[untold as usize], 1);
        }
    }

    /// Takes note of another gateway's request.
    pub fn foreign(&self) {
        add(&self.foreign, 1);
    }

    /// All tokens that were attributed to requests, as the engine counts them.
    pub fn attributed(&self) -> Totals {
        Totals {
            prompt_tokens: read(&self.prompt_tokens),
            completion_tokens: read(&self.completion_tokens),
        }
    }

    /// The requests that may explain why the engine counts more than that.
    pub fn evidence(&self) -> Evidence {
        let untold = |untold: Untold| read(&self.untold[untold as usize]);
        Evidence {
            foreign: read(&self.foreign),
            direct: untold(Untold::Direct),
            counted: untold(Untold::Counted),
            aborted: untold(Untold::Aborted),
            untold: untold(Untold::Other),
            ..Evidence::default()
        }
    }

    /// The model that its requests run on, if it is known that there is one.
    pub fn base_model(&self) -> Option<Arc<str>> {
        self.base_model
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Why its requests cannot be billed by what it did for them, if they cannot.
    pub fn unsupported(&self) -> Option<Unsupported> {
        let place = self.unsupported.load(Ordering::Relaxed).checked_sub(1)?;
        Unsupported::ALL.get(usize::from(place)).copied()
    }

    /// Takes note of what it says of itself.
    pub fn learn(&self, base_model: Option<&str>, unsupported: Option<Unsupported>) {
        let place = unsupported.map_or(0, |reason| 1 + reason as u8);
        self.unsupported.store(place, Ordering::Relaxed);
        if self.base_model().as_deref() != base_model {
            *self.base_model.write().unwrap_or_else(PoisonError::into_inner) = base_model.map(Arc::from);
        }
    }
}

fn add(counter: &AtomicU64, count: u64) {
    if count > 0 {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Context;
    use crate::wire::At;
    use crate::wire::exchange::{Ending, Facts, Tokens};

    fn event(change: impl FnOnce(&mut RequestEvent)) -> RequestEvent {
        let context = Context {
            event_id: "e".into(),
            started_at_us: 0,
            gateway_id: "gw".into(),
            team: Some("a".into()),
            project: None,
            user: None,
            upstream: Some("chat".into()),
            request_id: "r".into(),
            trace_id: None,
            status: None,
            error_type: None,
            gateway_overhead_us: None,
            tap: None,
        };
        let mut facts = Facts::unread(At(0), At(1), Ending::Complete);
        facts.endpoint = Endpoint::classify("/v1/chat/completions");
        facts.outcome = Outcome::Completed;
        facts.tokens = Tokens {
            prompt: Some(3),
            completion: Some(4),
            ..Tokens::default()
        };
        let mut event = RequestEvent::new(context, facts, CapturedBy::Proxy);
        change(&mut event);
        event
    }

    fn forgotten(event: &mut RequestEvent) {
        event.completion_tokens = None;
    }

    #[test]
    fn requests_of_which_no_tokens_are_known_are_told_apart_by_why() {
        let of = |change: fn(&mut RequestEvent)| Untold::of(&event(change));
        assert_eq!(of(|_| {}), None);
        assert_eq!(of(forgotten), Some(Untold::Other));
        let embedding = |event: &mut RequestEvent| {
            event.endpoint = Endpoint::classify("/v1/embeddings").name();
            event.completion_tokens = None;
        };
        assert_eq!(of(embedding), None, "an embedding has none to tell");
        let aborted = |event: &mut RequestEvent| {
            forgotten(event);
            event.outcome = Outcome::Aborted;
        };
        assert_eq!(of(aborted), Some(Untold::Aborted));
        let counted = |event: &mut RequestEvent| {
            forgotten(event);
            event.usage_source = UsageSource::Counted;
        };
        assert_eq!(of(counted), Some(Untold::Counted));
        let direct = |event: &mut RequestEvent| {
            forgotten(event);
            event.capture = CapturedBy::Tap;
        };
        assert_eq!(of(direct), Some(Untold::Direct));
        let refused = |event: &mut RequestEvent| {
            forgotten(event);
            event.outcome = Outcome::ClientError;
        };
        assert_eq!(of(refused), None, "no engine worked on it");
    }

    #[test]
    fn what_an_upstream_no_longer_says_is_forgotten() {
        let tally = Tally::default();
        tally.learn(Some("llama"), Some(Unsupported::ExternalKv));
        assert_eq!(tally.base_model().as_deref(), Some("llama"));
        assert_eq!(tally.unsupported(), Some(Unsupported::ExternalKv));
        tally.learn(Some("llama"), Some(Unsupported::KvConnector));
        assert_eq!(tally.unsupported(), Some(Unsupported::KvConnector));
        tally.learn(None, None);
        assert_eq!((tally.base_model(), tally.unsupported()), (None, None));
    }
}
