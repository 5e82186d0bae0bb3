//! Joins what the two capture paths saw of the same requests.
//!
//! The proxy signs each request that it sends on (`X-Gateway-Request-Id`), and the tap finds that id in the bytes: ids survive NAT and
//! containers, 4-tuples do not. What the tap sees is
//!
//! * a request of **this** gateway: its times go into the event that the proxy writes ([`Joins`]), never into a second one;
//! * a request of **another** gateway that shares the secret: its times become a row of `tap_timings`;
//! * **direct** traffic, when it has no id, a forged one, or one that was used before: an event of its own, for the team that its own
//!   headers name, else [`DIRECT`].
//!
//! # How an event gets the kernel's times without waiting for them
//!
//! The probe puts a response's packets into its ring as they leave the server, before anyone can read them. So whoever has read a
//! response to its end finds all of it there: the proxy reads the ring out itself ([`Beside::times`]) rather than wait for the
//! tap's own next look, and the event is written when it would have been written without a tap.
//!
//! Promises: no request has two events. An id buys its holder nothing: each sending of a request is joined once, and a copy
//! of it is direct traffic. Left out: reading rings and packets, which is the tap's.

mod joins;
mod replay;

pub use joins::Joins;

use crate::books::Books;
use crate::clock::Placer;
use crate::event::{Begin, CapturedBy, Context, EventSink, TapTimes, TapTiming, TimingSink};
use crate::proxy::rewrite::GATEWAY_REQUEST_ID;
use crate::segments::Segments;
use crate::trace::trace_id_of;
use crate::wire::At;
use crate::wire::endpoint::Endpoint;
use crate::wire::exchange::{Facts, UsageSource};
use crate::wire::head::RequestHead;
use replay::Replays;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The team of direct traffic that does not say who it is for.
pub const DIRECT: &str = "__direct__";

/// The kernel's view of the proxy's requests.
pub trait Beside: Send + Sync {
    /// Whether it sees what goes to the upstream of that name.
    fn covers(&self, upstream: &str) -> bool;

    /// A request is about to be sent to an upstream that is covered. Called again for each further try.
    fn sent(&self, event_id: &str);

    /// The times of a request that was sent and has ended now; `None` when the kernel did not see its end. To be called once.
    fn times(&self, event_id: &str) -> Option<TapTimes>;
}

/// How many exchanges the tap has seen, by whose they were.
#[derive(Debug, Default)]
pub struct CorrelationCounts {
    /// Of this gateway, and joined to their events.
    pub joined: AtomicU64,
    /// Of this gateway, but too late for their events, or not seen to their end.
    pub unjoined: AtomicU64,
    /// Of other gateways.
    pub foreign: AtomicU64,
    /// Direct ones, with an event of their own.
    pub direct: AtomicU64,
    /// Direct ones with an id that was forged or used before; part of `direct`.
    pub forged: AtomicU64,
    /// Health checks, scrapes and the like that name no team: no event.
    pub operational: AtomicU64,
}

/// What the tap keeps of an exchange while it runs.
pub enum Whose {
    /// This gateway's: the proxy writes the event.
    Own(Box<str>),
    /// This gateway's, and over: the proxy has written the event.
    Late,
    /// Another gateway's.
    Foreign(Box<str>),
    /// Nobody's but the client's own.
    Direct(Box<Context>),
    /// An operator's.
    Operational,
}

/// Decides whose an exchange is, and books it.
pub struct Correlator {
    books: Books,
    timings: Option<Arc<dyn TimingSink>>,
    joins: Arc<Joins>,
    replays: Replays,
    placer: Placer,
    counts: Arc<CorrelationCounts>,
}

impl Correlator {
    /// A correlator that books direct traffic in `books`, and other gateways' times with `timings`.
    pub fn new(books: Books, timings: Option<Arc<dyn TimingSink>>) -> Correlator {
        Correlator {
            books,
            timings,
            joins: Arc::default(),
            replays: Replays::default(),
            placer: Placer::default(),
            counts: Arc::default(),
        }
    }

    /// Where the proxy says what it sends.
    pub fn joins(&self) -> &Arc<Joins> {
        &self.joins
    }

    /// What there is to count.
    pub fn counts(&self) -> &Arc<CorrelationCounts> {
        &self.counts
    }

    /// Takes note of a request to `upstream` whose first byte arrived at `at`.
    pub fn began(&mut self, at: At, upstream: &str, head: &RequestHead) -> Whose {
        if let Some(signed) = head.fields().get(GATEWAY_REQUEST_ID) {
            if let Some(whose) = self.gateways(at, signed) {
                if let (Whose::Foreign(_), Some(tally)) = (&whose, self.books.tallies.of(upstream)) {
                    tally.foreign();
                }
                return whose;
            }
            count(&self.counts.forged);
        }
        let endpoint = Endpoint::classify(head.path());
        let context = self.direct(at, upstream, head);
        if is_operational(endpoint) && context.team.as_deref() == Some(DIRECT) {
            return Whose::Operational;
        }
        if let Some(begin) = Begin::of(&context, CapturedBy::Tap, endpoint.name(), None) {
            self.books.sinks.began(&begin);
        }
        Whose::Direct(Box::new(context))
    }

    /// Whose the request is by its id; `None` when the id proves nothing.
    fn gateways(&mut self, at: At, signed: &[u8]) -> Option<Whose> {
        let id = self.books.ids.verified(std::str::from_utf8(signed).ok()?)?;
        if self.books.ids.is_own(id) {
            return match self.joins.claim(id, at) {
                joins::Claim::Live => Some(Whose::Own(id.into())),
                joins::Claim::Late => Some(Whose::Late),
                joins::Claim::Unknown => None,
            };
        }
        self.replays.is_first(id).then(|| Whose::Foreign(id.into()))
    }

    /// What is known of a direct request at its beginning.
    fn direct(&mut self, at: At, upstream: &str, head: &RequestHead) -> Context {
        let fields = head.fields();
        let identity = self
            .books
            .identity
            .identify(fields.iter().map(|field| (field.name, field.value)));
        let identity = identity.ok();
        let team = identity
            .as_ref()
            .map_or(DIRECT, |identity| identity.team.as_str());
        let project = identity.as_ref().and_then(|identity| identity.project.as_ref());
        let user = identity.as_ref().and_then(|identity| identity.user.as_ref());
        Context {
            event_id: self.books.ids.next(),
            started_at_us: self.placer.wall_us(at),
            gateway_id: self.books.ids.gateway_id().into(),
            team: Some(team.into()),
            project: project.map(|project| project.as_str().into()),
            user: user.map(|user| user.as_str().into()),
            upstream: Some(upstream.into()),
            request_id: fields
                .get("x-request-id")
                .and_then(crate::ids::acceptable)
                .unwrap_or_default()
                .into(),
            trace_id: fields.get("traceparent").and_then(trace_id_of).map(Box::from),
            status: None,
            error_type: None,
            gateway_overhead_us: None,
            tap: None,
        }
    }

    /// Books an exchange that has ended.
    pub fn ended(&mut self, whose: Whose, facts: Facts) {
        let times = TapTimes {
            arrived: facts.started,
            ended: facts.ended,
            ttft_us: facts.ttft_us,
        };
        match whose {
            Whose::Own(id) if self.joins.seen(&id, times) => count(&self.counts.joined),
            Whose::Own(_) | Whose::Late => count(&self.counts.unjoined),
            Whose::Foreign(id) => self.foreign(id, times),
            Whose::Direct(context) => self.book(*context, facts, times),
            Whose::Operational => count(&self.counts.operational),
        }
    }

    fn foreign(&mut self, event_id: Box<str>, times: TapTimes) {
        count(&self.counts.foreign);
        if let Some(sink) = &self.timings {
            sink.record(&TapTiming {
                event_id,
                seen_at_us: self.placer.wall_us(times.arrived),
                seen_by: self.books.ids.gateway_id().into(),
                ttft_us: times.ttft_us,
                duration_us: times.ended.micros_since(times.arrived),
            });
        }
    }

    fn book(&self, mut context: Context, mut facts: Facts, times: TapTimes) {
        count(&self.counts.direct);
        context.tap = Some(times);
        // The tap cannot ask for usage: a stream without it is the rule here. That its chunks were seen stands in `chunks`.
        if facts.usage_source == UsageSource::Counted {
            facts.usage_source = UsageSource::None;
        }
        let mut segments = Segments::begin(facts.started, context.started_at_us);
        segments.sent(facts.started);
        self.books.record(context, facts, CapturedBy::Tap, Some(segments));
    }
}

/// Whether requests to that route are an operator's, if nobody says whose they are: they cost nothing, and a probe each second is no traffic. What
/// would change the server is worth an event.
fn is_operational(endpoint: Endpoint) -> bool {
    use Endpoint::{Health, Load, Metrics, Models, Version};
    matches!(endpoint, Health | Load | Metrics | Models | Version)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
