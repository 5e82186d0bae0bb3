//! What both capture paths need to book a request: ids, the rules of identity, and where events go.

use crate::config::Config;
use crate::event::{CapturedBy, Context, EventSink, RequestEvent, Sinks, TimingSink};
use crate::identity::IdentityRules;
use crate::ids::RequestIds;
use crate::ledger::{Micros, RateCard, SegmentRow, Slice, Usage};
use crate::segments::{Segments, Waits};
use crate::tally::Tallies;
use crate::vllm::SampleSink;
use crate::wire::exchange::{Facts, UsageSource};
use std::sync::Arc;

/// Where what a gateway learns goes, besides Prometheus.
#[derive(Clone, Default)]
pub struct Outlets {
    /// Ended requests.
    pub events: Vec<Arc<dyn EventSink>>,
    /// What the upstreams say of themselves.
    pub samples: Vec<Arc<dyn SampleSink>>,
    /// What the kernel saw of other gateways' requests.
    pub timings: Option<Arc<dyn TimingSink>>,
}

/// Cheap to clone; clones share one sequence of ids.
#[derive(Clone)]
pub struct Books {
    /// Makes and recognises request ids.
    pub ids: Arc<RequestIds>,
    /// Who a request is for.
    pub identity: Arc<IdentityRules>,
    /// Where events go, Prometheus among them.
    pub sinks: Sinks,
    /// What tokens are charged.
    pub rates: Arc<RateCard>,
    /// How long requests wait at each upstream.
    pub waits: Arc<Waits>,
    /// What was booked of each upstream.
    pub tallies: Arc<Tallies>,
}

impl Books {
    /// The books of the gateway with this configuration.
    pub fn new(config: &Config, sinks: Sinks) -> Books {
        let secret = config.gateway.secret.as_ref();
        let secret = secret.map(|secret| secret.expose().as_bytes());
        Books {
            ids: Arc::new(RequestIds::new(config.gateway.id_or_host_name().as_str(), secret)),
            identity: Arc::new(IdentityRules::new(&config.identity)),
            sinks,
            // The config refuses two rates of one moment.
            rates: Arc::new(RateCard::new(config.rates.clone()).unwrap_or_default()),
            waits: Arc::default(),
            tallies: Arc::new(Tallies::new(config)),
        }
    }

    /// Books a request that has ended: what is left of its segments, then its event.
    pub fn record(&self, context: Context, facts: Facts, capture: CapturedBy, segments: Option<Segments>) {
        if let Some(segments) = segments {
            let wait = self.waits.of(context.upstream.as_deref().unwrap_or_default());
            let slices = segments.finish(&facts, context.tap, wait);
            self.segments(&context, facts.model.as_deref(), &slices);
        }
        let event = self.event(context, facts, capture);
        if let Some(tally) = self.tallies.of(&event.upstream) {
            tally.ended(&event);
        }
        self.sinks.record(&event);
    }

    /// Hands the slices of a request to the sinks as rows. Nobody has them to pay when nobody is known.
    ///
    /// Nor where prompts are prefilled elsewhere: the slices would say that this server had done it. What it did is its own to tell, and
    /// without segments is nobody's (`__unattributed__`).
    pub fn segments(&self, context: &Context, model: Option<&str>, slices: &[Slice]) {
        let (Some(team_id), Some(upstream)) = (context.team.as_deref(), context.upstream.as_deref()) else {
            return;
        };
        if slices.is_empty() {
            return;
        }
        if let Some(tally) = self.tallies.of(upstream) {
            if tally.unsupported().is_some() {
                return;
            }
            tally.attribute(slices);
        }
        for slice in slices {
            self.sinks.segment(&SegmentRow {
                window_start: slice.window,
                upstream,
                event_id: &context.event_id,
                team_id,
                project: context.project.as_deref().unwrap_or_default(),
                model: model.unwrap_or_default(),
                run: slice.run,
                work: slice.work,
                gateway_id: &context.gateway_id,
            });
        }
    }

    /// The event of a request, with what it is charged. Tokens that were counted from chunks, or half told, are no facts and not charged.
    pub fn event(&self, context: Context, facts: Facts, capture: CapturedBy) -> RequestEvent {
        let mut event = RequestEvent::new(context, facts, capture);
        event.base_model = self
            .tallies
            .of(&event.upstream)
            .and_then(|tally| tally.base_model());
        if matches!(
            event.usage_source,
            UsageSource::Reported | UsageSource::Continuous
        ) {
            let began = Micros(u64::try_from(event.started_at_us).unwrap_or(0));
            let usage = Usage {
                prompt_tokens: event.prompt_tokens.unwrap_or(0),
                cached_tokens: event.cached_tokens.unwrap_or(0),
                completion_tokens: event.completion_tokens.unwrap_or(0),
            };
            event.charge = self.rates.charge(&event.model, began, usage);
        }
        event
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::NanoUsd;
    use crate::wire::At;
    use crate::wire::exchange::{Ending, Tokens};

    fn context() -> Context {
        Context {
            event_id: "gw-1".into(),
            started_at_us: 1_780_000_000_000_000,
            gateway_id: "gw".into(),
            team: Some("search".into()),
            project: None,
            user: None,
            upstream: Some("chat".into()),
            request_id: "r".into(),
            trace_id: None,
            status: None,
            error_type: None,
            gateway_overhead_us: None,
            tap: None,
        }
    }

    #[test]
    fn only_tokens_that_are_facts_are_charged() {
        let books = Books::new(&Config::default(), Sinks::new([]));
        let charge = |usage_source| {
            let mut facts = Facts::unread(At(0), At(1), Ending::Complete);
            facts.usage_source = usage_source;
            facts.tokens = Tokens {
                prompt: Some(1_000),
                cached: Some(400),
                completion: Some(100),
                ..Tokens::default()
            };
            books.event(context(), facts, CapturedBy::Proxy).charge
        };
        // 600 at 0.10, 400 at 0.01 and 100 at 0.40 USD for a million.
        for told in [UsageSource::Reported, UsageSource::Continuous] {
            assert_eq!(charge(told), NanoUsd(60_000 + 4_000 + 40_000));
        }
        for not_told in [UsageSource::Counted, UsageSource::None] {
            assert_eq!(charge(not_told), NanoUsd(0));
        }
    }
}
