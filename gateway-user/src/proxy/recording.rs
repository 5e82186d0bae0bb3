//! One event for one request, whatever happens to it.
//!
//! A [`Recording`] begins with the request and is ended exactly once: by whoever knows how the request ended, or, when its task is
//! taken down in the middle, by being dropped.

use super::Shared;
use super::refusal::Refusal;
use crate::clock;
use crate::event::{Begin, CapturedBy, Context, EventSink};
use crate::identity::Identity;
use crate::ids::{self, random_hex};
use crate::limits::Permit;
use crate::metrics::InflightGuard;
use crate::segments::Segments;
use crate::trace::Trace;
use crate::wire::exchange::{Ending, Exchange, Facts};
use crate::wire::head::RequestHead;
use crate::wire::{At, Piece};
use std::sync::Arc;

/// A request on its way, from its first byte to its event.
pub struct Recording {
    shared: Arc<Shared>,
    /// `None` once the event is out.
    live: Option<Live>,
    inflight: Option<InflightGuard>,
    /// What the request holds of its team's limits; given back when it ends, or is taken down.
    permit: Option<Permit>,
    /// The trace that goes on to the upstream.
    pub trace: Trace,
}

struct Live {
    exchange: Exchange,
    context: Context,
    segments: Segments,
    /// When the request was first sent on, and was whole before that. Only of requests that the kernel sees too.
    beside: Option<At>,
}

impl Recording {
    /// The recording of the request with this head, whose first byte came at `at`.
    pub fn begin(shared: &Arc<Shared>, at: At, head: &RequestHead) -> Recording {
        let fields = head.fields();
        let trace = Trace::child_of(fields.get("traceparent"));
        let mut context = new_context(shared, at);
        context.trace_id = Some(trace.trace_id.clone());
        if let Some(id) = fields.get("x-request-id").and_then(ids::acceptable) {
            context.request_id = id.into();
        }
        let exchange = Exchange::begin(at, head);
        Recording {
            shared: Arc::clone(shared),
            live: Some(Live {
                exchange,
                segments: Segments::begin(at, context.started_at_us),
                context,
                beside: None,
            }),
            inflight: None,
            permit: None,
            trace,
        }
    }

    /// Records bytes that were no request.
    pub fn unreadable(shared: &Shared, at: At, refusal: &Refusal) -> Box<str> {
        let mut context = new_context(shared, at);
        context.status = Some(refusal.status().0);
        context.error_type = Some(refusal.reason());
        let request_id = context.request_id.clone();
        shared.metrics.refused(refusal.reason());
        let facts = Facts::unread(at, clock::now(), refusal.ending());
        shared.books.record(context, facts, CapturedBy::Proxy, None);
        request_id
    }

    /// Takes note of who the request is for.
    pub fn identified(&mut self, identity: &Identity) {
        self.inflight = Some(self.shared.metrics.inflight(identity.team.as_str()));
        if let Some(live) = &mut self.live {
            live.context.team = Some(identity.team.as_str().into());
            live.context.project = identity.project.as_ref().map(|project| project.as_str().into());
            live.context.user = identity.user.as_ref().map(|user| user.as_str().into());
        }
        self.announce();
    }

    /// Keeps what the request holds of its team's limits for as long as it runs.
    pub fn admitted(&mut self, permit: Option<Permit>) {
        self.permit = permit;
    }

    /// Takes note of the upstream that is tried.
    pub fn sent_to(&mut self, upstream: &str) {
        if let Some(live) = &mut self.live {
            live.context.upstream = Some(upstream.into());
        }
        self.announce();
    }

    /// Tells the sinks that the request is on its way.
    fn announce(&self) {
        let Some(Live {
            exchange, context, ..
        }) = &self.live
        else {
            return;
        };
        if let Some(begin) = Begin::of(
            context,
            CapturedBy::Proxy,
            exchange.endpoint().name(),
            exchange.asked().model.as_deref(),
        ) {
            self.shared.books.sinks.began(&begin);
        }
    }

    /// Takes note that the request is sent now, whole since `received`. What lies between the two is the gateway's own share of the time; a
    /// request that is sent a second time keeps the first.
    pub fn forwarded(&mut self, received: At) {
        let now = clock::now();
        let overhead_us = now.micros_since(received);
        let Some(live) = &mut self.live else { return };
        live.segments.sent(now);
        live.context.gateway_overhead_us.get_or_insert(overhead_us);
        if let (Some(beside), Some(upstream)) = (&self.shared.beside, &live.context.upstream)
            && beside.covers(upstream)
        {
            beside.sent(&live.context.event_id);
            live.beside.get_or_insert(received);
        }
    }

    /// Waits until the event is as safe as was configured (`spool.fsync: each`); in all other cases there is nothing to wait for.
    pub async fn settled(&self) {
        if let Some(settled) = self.shared.books.sinks.settled() {
            settled.await;
        }
    }

    /// Takes note that time has passed on a response that goes on: what is over of it, by windows, is told to the ledger, and what it has used by
    /// now is taken from its team's tokens.
    pub fn passed(&mut self, now: At) {
        let Some(live) = &mut self.live else { return };
        if let Some(permit) = &mut self.permit
            && permit.is_due(now)
        {
            permit.used(live.exchange.tokens_so_far(), now);
        }
        if live.segments.is_due(now) {
            let books = &self.shared.books;
            let wait = books
                .waits
                .of(live.context.upstream.as_deref().unwrap_or_default());
            let slices = live.segments.advance(&mut live.exchange, now, wait);
            books.segments(&live.context, live.exchange.model(), &slices);
        }
    }

    /// The observer; `None` once the event is out.
    pub fn exchange(&mut self) -> Option<&mut Exchange> {
        self.live.as_mut().map(|live| &mut live.exchange)
    }

    /// The event's id.
    pub fn event_id(&self) -> &str {
        self.live.as_ref().map_or("", |live| &live.context.event_id)
    }

    /// `X-Request-Id` of this request.
    pub fn request_id(&self) -> &str {
        self.live.as_ref().map_or("", |live| &live.context.request_id)
    }

    /// Ends it with what the gateway itself answers.
    pub fn refuse(&mut self, refusal: &Refusal) {
        self.shared.metrics.refused(refusal.reason());
        if let Some(live) = &mut self.live {
            live.context.status = Some(refusal.status().0);
            live.context.error_type = Some(refusal.reason());
        }
        self.end(refusal.ending());
    }

    /// Ends it with an error that cut the response short.
    pub fn broke(&mut self, ending: Ending, reason: &'static str) {
        if let Some(live) = &mut self.live {
            live.context.error_type = Some(reason);
        }
        self.end(ending);
    }

    /// Takes note of what passed through after the connection had left HTTP.
    pub fn tunnelled(&mut self, to_upstream: u64, to_client: u64) {
        let at = clock::now();
        if let Some(live) = &mut self.live {
            live.exchange.request_body(Piece::Hole(to_upstream));
            live.exchange.response_body(at, Piece::Hole(to_client));
        }
    }

    /// Ends it now.
    pub fn end(&mut self, ending: Ending) {
        self.end_at(clock::now(), ending);
    }

    /// Ends it as of `at`. Whatever comes after the first end is ignored.
    pub fn end_at(&mut self, at: At, ending: Ending) {
        let Some(Live {
            exchange,
            mut context,
            segments,
            beside,
        }) = self.live.take()
        else {
            return;
        };
        self.inflight = None;
        let facts = exchange.finish(at, ending);
        let permit = self.permit.take();
        if let Some(mut permit) = permit {
            permit.used(facts.tokens, clock::now());
        }
        let capture = match beside.and_then(|received| join(&self.shared, &mut context, received)) {
            Some(()) => CapturedBy::ProxyAndTap,
            None => CapturedBy::Proxy,
        };
        self.shared.books.record(context, facts, capture, Some(segments));
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.live.is_some() {
            self.broke(Ending::UpstreamClosed, "gateway_shutdown");
        }
    }
}

/// Adds what the kernel saw of a request that was whole at `received`. The gateway's own share of its time then lasts until it arrived.
fn join(shared: &Shared, context: &mut Context, received: At) -> Option<()> {
    let times = shared.beside.as_ref()?.times(&context.event_id)?;
    context.gateway_overhead_us = Some(times.arrived.micros_since(received));
    context.tap = Some(times);
    Some(())
}

fn new_context(shared: &Shared, at: At) -> Context {
    Context {
        event_id: shared.books.ids.next(),
        started_at_us: clock::wall_us(at),
        gateway_id: shared.books.ids.gateway_id().into(),
        team: None,
        project: None,
        user: None,
        upstream: None,
        request_id: random_hex::<16>().into(),
        trace_id: None,
        status: None,
        error_type: None,
        gateway_overhead_us: None,
        tap: None,
    }
}
