//! One row for one request.
//!
//! A [`RequestEvent`] holds what is known of a request once it has ended: who it was for, what it asked, how long each phase
//! took, how many tokens it used. Its JSON form is the row of `request_events`, name for name. It holds no text of a prompt or a
//! completion, and of an error only its type.

use crate::ledger::{NanoUsd, SegmentRow};
use crate::wire::At;
use crate::wire::exchange::{Facts, Outcome, UsageSource};
use serde::{Deserialize, Serialize, Serializer};
use std::pin::Pin;
use std::sync::Arc;

/// Which path saw a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CapturedBy {
    /// The proxy, which it passed through.
    #[default]
    #[serde(rename = "proxy")]
    Proxy,
    /// The kernel probe alone: it went straight to its server.
    #[serde(rename = "tap")]
    Tap,
    /// Both.
    #[serde(rename = "proxy+tap")]
    ProxyAndTap,
}

/// What the kernel saw of a request at its server's socket, on the monotonic clock that the gateway reads too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapTimes {
    /// The request's first byte arrived.
    pub arrived: At,
    /// The response's last byte left.
    pub ended: At,
    /// From the one to the first chunk with generated content. Streams only.
    pub ttft_us: Option<u64>,
}

/// When another gateway's request was at its server's socket: a row of `tap_timings`, name for name, joined by event id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TapTiming {
    /// The event that the other gateway writes.
    pub event_id: Box<str>,
    /// Wall clock at the request's arrival, microseconds since 1970.
    #[serde(rename = "seen_at")]
    pub seen_at_us: i64,
    /// The gateway whose probe saw it.
    pub seen_by: Box<str>,
    /// Arrival to the first chunk with generated content.
    pub ttft_us: Option<u64>,
    /// Arrival to the response's last byte.
    pub duration_us: u64,
}

/// Where such timings go. It must neither block nor fail.
pub trait TimingSink: Send + Sync {
    /// Takes note of one.
    fn record(&self, timing: &TapTiming);
}

/// Everything about a request that the bytes themselves do not tell.
#[derive(Clone, Debug)]
pub struct Context {
    /// Unique for ever: gateway, boot and sequence.
    pub event_id: Box<str>,
    /// Wall clock at the request's first byte, microseconds since 1970.
    pub started_at_us: i64,
    /// Which gateway wrote the event.
    pub gateway_id: Box<str>,
    /// Who pays; `None` when the request never said so (it was refused).
    pub team: Option<Box<str>>,
    /// Optional second level of attribution.
    pub project: Option<Box<str>>,
    /// Optional third level of attribution.
    pub user: Option<Box<str>>,
    /// The upstream (configured name) that served it.
    pub upstream: Option<Box<str>>,
    /// `X-Request-Id`, the client's or the gateway's.
    pub request_id: Box<str>,
    /// The trace that the request belongs to (from `traceparent`).
    pub trace_id: Option<Box<str>>,
    /// Status code that the client got, also when the gateway made the response.
    pub status: Option<u16>,
    /// Why the gateway answered by itself: a reason from a bounded set.
    pub error_type: Option<&'static str>,
    /// Time that the gateway itself added before the first byte went upstream, or arrived there where the kernel saw it arrive.
    pub gateway_overhead_us: Option<u64>,
    /// The kernel's times of the same request.
    pub tap: Option<TapTimes>,
}

/// A request that has ended. Absent values are unknown, not zero.
#[derive(Clone, Debug, Serialize)]
pub struct RequestEvent {
    /// Unique for ever: gateway, boot and sequence.
    pub event_id: Box<str>,
    /// Wall clock at the request's first byte, microseconds since 1970.
    #[serde(rename = "started_at")]
    pub started_at_us: i64,
    /// Who pays; empty when the request never said so.
    pub team_id: Box<str>,
    /// Optional second level of attribution, else empty.
    pub project: Box<str>,
    /// Optional third level of attribution, else empty.
    pub user_id: Box<str>,
    /// The model, as the response names it, else as the request does.
    pub model: Box<str>,
    /// The model that it ran on, as the upstream labels what it counts; `None` where it does not say or has several, and then the row has `model`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "name_of_model")]
    pub base_model: Option<Arc<str>>,
    /// The upstream that served it.
    pub upstream: Box<str>,
    /// The route's name.
    pub endpoint: &'static str,
    /// `priority` of the request.
    pub priority: i64,
    /// Whether the response was a stream of events.
    pub stream: bool,
    /// Which path saw it.
    pub capture: CapturedBy,
    /// Status code of the response, also of one that came when its client had just left; 0 when there was none.
    pub status_code: u16,
    /// How it ended.
    #[serde(serialize_with = "name_of_outcome")]
    pub outcome: Outcome,
    /// Why generation ended.
    pub finish_reason: Box<str>,
    /// Billed prompt tokens, cached ones included.
    pub prompt_tokens: Option<u64>,
    /// Those out of the prefix cache.
    pub cached_tokens: Option<u64>,
    /// Billed completion tokens.
    pub completion_tokens: Option<u64>,
    /// Those that were reasoning.
    pub reasoning_tokens: Option<u64>,
    /// Prompt tokens as the engine counts them.
    pub engine_prompt_tokens: Option<u64>,
    /// Completion tokens as the engine counts them.
    pub engine_completion_tokens: Option<u64>,
    /// Where the counts come from.
    #[serde(serialize_with = "name_of_usage_source")]
    pub usage_source: UsageSource,
    /// Start to the first chunk with generated content.
    pub ttft_us: Option<u64>,
    /// Start to end.
    pub duration_us: u64,
    /// Time in vLLM's queue, when vLLM says so.
    pub queue_us: Option<u64>,
    /// Mean gap between chunks with generated content.
    pub itl_mean_us: Option<u64>,
    /// Longest such gap.
    pub itl_max_us: Option<u64>,
    /// Chunks with generated content.
    pub chunks: u64,
    /// Payload of the request.
    pub request_bytes: u64,
    /// Payload of the response.
    pub response_bytes: u64,
    /// Time that the gateway itself added.
    pub gateway_overhead_us: Option<u64>,
    /// As `ttft_us`, but from the request's arrival at the server's socket, by the kernel's clock.
    pub tap_ttft_us: Option<u64>,
    /// As `duration_us`, likewise.
    pub tap_duration_us: Option<u64>,
    /// What the request is charged by the rate card; nothing where its tokens are no facts.
    #[serde(rename = "charge_nano_usd", serialize_with = "as_i64")]
    pub charge: NanoUsd,
    /// `X-Request-Id`.
    pub request_id: Box<str>,
    /// Trace id.
    pub trace_id: Box<str>,
    /// Type of the error, if any.
    pub error_type: Box<str>,
    /// Which gateway wrote it.
    pub gateway_id: Box<str>,
    /// The gaps in full, for the histogram of inter-token latency; not stored.
    #[serde(skip)]
    pub gaps: crate::wire::exchange::Gaps,
}

impl RequestEvent {
    /// Joins what the bytes told with what the gateway knows. It is not charged for yet, nor has it a base model: see [`Books::event`](crate::books::Books::event).
    pub fn new(context: Context, facts: Facts, capture: CapturedBy) -> RequestEvent {
        let owned = |text: Option<Box<str>>| text.unwrap_or_default();
        let gaps = facts.gaps;
        let error_type = context.error_type.map(Box::from).or(facts.error_type);
        RequestEvent {
            event_id: context.event_id,
            started_at_us: context.started_at_us,
            team_id: owned(context.team),
            project: owned(context.project),
            user_id: owned(context.user),
            model: owned(facts.model),
            base_model: None,
            upstream: owned(context.upstream),
            endpoint: facts.endpoint.name(),
            priority: facts.asked.priority.unwrap_or(0),
            stream: facts.streamed,
            capture,
            status_code: context.status.or(facts.status).unwrap_or(0),
            outcome: facts.outcome,
            finish_reason: owned(facts.finish_reason),
            prompt_tokens: facts.tokens.prompt,
            cached_tokens: facts.tokens.cached,
            completion_tokens: facts.tokens.completion,
            reasoning_tokens: facts.tokens.reasoning,
            engine_prompt_tokens: facts.tokens.engine_prompt,
            engine_completion_tokens: facts.tokens.engine_completion,
            usage_source: facts.usage_source,
            ttft_us: facts.ttft_us,
            duration_us: facts.ended.micros_since(facts.started),
            queue_us: facts.queue_us,
            itl_mean_us: gaps.sum_us.checked_div(gaps.count),
            itl_max_us: (gaps.count > 0).then_some(gaps.max_us),
            chunks: facts.chunks,
            request_bytes: facts.request_bytes,
            response_bytes: facts.response_bytes,
            gateway_overhead_us: context.gateway_overhead_us,
            tap_ttft_us: context.tap.and_then(|tap| tap.ttft_us),
            tap_duration_us: context.tap.map(|tap| tap.ended.micros_since(tap.arrived)),
            charge: NanoUsd(0),
            request_id: context.request_id,
            trace_id: owned(context.trace_id),
            error_type: owned(error_type),
            gateway_id: context.gateway_id,
            gaps,
        }
    }
}

/// A request that has begun and not ended: enough to account for it if the gateway does not live to see its end.
#[derive(Clone, Debug, Serialize)]
pub struct Begin<'a> {
    /// As in the event that will end it.
    pub event_id: &'a str,
    /// Wall clock at the request's first byte, microseconds since 1970.
    pub started_at_us: i64,
    /// Which gateway it came to, or saw it.
    pub gateway_id: &'a str,
    /// Which path saw it.
    pub capture: CapturedBy,
    /// Who pays.
    pub team_id: &'a str,
    /// Optional second level of attribution.
    pub project: Option<&'a str>,
    /// Optional third level of attribution.
    pub user_id: Option<&'a str>,
    /// The route's name.
    pub endpoint: &'static str,
    /// `X-Request-Id`.
    pub request_id: &'a str,
    /// Trace id.
    pub trace_id: Option<&'a str>,
    /// The upstream, once one is chosen.
    pub upstream: Option<&'a str>,
    /// The model that is asked for, once the body was read.
    pub model: Option<&'a str>,
}

impl<'a> Begin<'a> {
    /// What is known of a request so far; `None` before it is known who it is for.
    pub fn of(
        context: &'a Context,
        capture: CapturedBy,
        endpoint: &'static str,
        model: Option<&'a str>,
    ) -> Option<Begin<'a>> {
        Some(Begin {
            event_id: &context.event_id,
            started_at_us: context.started_at_us,
            gateway_id: &context.gateway_id,
            capture,
            team_id: context.team.as_deref()?,
            project: context.project.as_deref(),
            user_id: context.user.as_deref(),
            endpoint,
            request_id: &context.request_id,
            trace_id: context.trace_id.as_deref(),
            upstream: context.upstream.as_deref(),
            model,
        })
    }
}

/// Done when everything that a sink has recorded so far is as safe as was asked for.
pub type Settled = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where requests go. Called on the request's own task: it must neither block nor fail.
pub trait EventSink: Send + Sync {
    /// Takes note of a request that is on its way: once its team is known, and again for each upstream that is tried.
    fn began(&self, _begin: &Begin<'_>) {}

    /// What a response has to wait for before its last bytes go out, once its event is recorded. Only a sink that was asked for
    /// more than the life of this process can promise has anything to wait for.
    fn settled(&self) -> Option<Settled> {
        None
    }

    /// Takes note of the part of a request that falls into one window: while it runs, or just before it is recorded. Only what the
    /// ledger is computed from needs it.
    fn segment(&self, _row: &SegmentRow<'_>) {}

    /// Takes note of a request that has ended. Called once for each.
    fn record(&self, event: &RequestEvent);
}

/// All sinks of a gateway.
#[derive(Clone)]
pub struct Sinks(Arc<[Arc<dyn EventSink>]>);

impl Sinks {
    /// These, in the order in which each is told.
    pub fn new(sinks: impl IntoIterator<Item = Arc<dyn EventSink>>) -> Sinks {
        Sinks(sinks.into_iter().collect())
    }
}

impl EventSink for Sinks {
    fn began(&self, begin: &Begin<'_>) {
        self.0.iter().for_each(|sink| sink.began(begin));
    }

    /// Done when all of them are.
    fn settled(&self) -> Option<Settled> {
        let waits: Vec<Settled> = self.0.iter().filter_map(|sink| sink.settled()).collect();
        if waits.is_empty() {
            return None;
        }
        Some(Box::pin(async move {
            for wait in waits {
                wait.await;
            }
        }))
    }

    fn segment(&self, row: &SegmentRow<'_>) {
        self.0.iter().for_each(|sink| sink.segment(row));
    }

    fn record(&self, event: &RequestEvent) {
        self.0.iter().for_each(|sink| sink.record(event));
    }
}

impl Outcome {
    /// The name in metrics and rows.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::ClientError => "client_error",
            Outcome::ServerError => "server_error",
            Outcome::Aborted => "aborted",
            Outcome::Truncated => "truncated",
            Outcome::Unreachable => "unreachable",
            Outcome::TimedOut => "timed_out",
            Outcome::Refused => "refused",
            Outcome::Incomplete => "incomplete",
            Outcome::GatewayCrash => "gateway_crash",
        }
    }
}

impl UsageSource {
    /// The name in rows.
    pub fn name(self) -> &'static str {
        match self {
            UsageSource::Reported => "reported",
            UsageSource::Continuous => "continuous",
            UsageSource::Counted => "counted",
            UsageSource::None => "none",
        }
    }
}

fn name_of_model<S: Serializer>(model: &Option<Arc<str>>, serializer: S) -> Result<S::Ok, S::Error> {
    model.as_deref().serialize(serializer)
}

fn name_of_outcome<S: Serializer>(outcome: &Outcome, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(outcome.name())
}

fn as_i64<S: Serializer>(amount: &NanoUsd, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_i64(amount.as_i64())
}

fn name_of_usage_source<S: Serializer>(source: &UsageSource, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(source.name())
}
