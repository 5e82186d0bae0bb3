//! The facts of one request and its response, gathered while the bytes pass.

use super::endpoint::Endpoint;
use super::head::{RequestHead, ResponseHead};
use super::{At, Piece};

/// How an exchange came to its end, as told by whoever moved the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Request and response ended as their framing says.
    Complete,
    /// The client went away before the response had ended.
    ClientGone,
    /// The upstream ended the connection before the response had ended.
    UpstreamClosed,
    /// The upstream could not be reached, so it never saw the request.
    Unreachable,
    /// A time limit ran out.
    TimedOut,
    /// The gateway answered by itself.
    Refused,
    /// Bytes are missing, so that the rest cannot be read (tap only).
    Unseen,
}

/// How the exchange is booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Answered with success, whole.
    Completed,
    /// Answered with a 4xx by the upstream.
    ClientError,
    /// Answered with a 5xx by the upstream, or with an error in mid-stream.
    ServerError,
    /// The client left before the end.
    Aborted,
    /// The upstream broke off in mid-response.
    Truncated,
    /// No upstream could be reached.
    Unreachable,
    /// A time limit ran out.
    TimedOut,
    /// The gateway refused the request.
    Refused,
    /// Not all of it was seen.
    Incomplete,
}

/// Where the token counts come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UsageSource {
    /// The final `usage` of the response.
    Reported,
    /// The last per-chunk `usage` before the stream broke off.
    Continuous,
    /// Chunks were counted, for want of any usage: a lower bound of completion tokens, never billed as a fact.
    Counted,
    /// Nothing to go by.
    #[default]
    None,
}

/// Token counts. What a server did not say is unknown, not 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Prompt tokens as billed, cached ones included.
    pub prompt: Option<u64>,
    /// Those of the prompt that came out of the prefix cache.
    pub cached: Option<u64>,
    /// Tokens generated, over all choices.
    pub completion: Option<u64>,
    /// Those of the completion that were reasoning.
    pub reasoning: Option<u64>,
    /// Prompt tokens as the engine's counters have them (once for each choice).
    pub engine_prompt: Option<u64>,
    /// Completion tokens as the engine's counters have them.
    pub engine_completion: Option<u64>,
}

/// Upper bounds of the buckets of [`Gaps::buckets`], in microseconds; one more bucket holds what is above the last.
pub const GAP_BOUNDS_US: [u64; 16] = [
    1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 75_000, 100_000, 150_000, 200_000, 300_000, 400_000,
    500_000, 750_000, 1_000_000, 2_500_000,
];

/// The gaps between chunks that carry generated content. Constant size, whatever the length of the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    /// How many gaps.
    pub count: u64,
    /// Their sum.
    pub sum_us: u64,
    /// The longest.
    pub max_us: u64,
    /// How many fell into each bucket of [`GAP_BOUNDS_US`] (not cumulative).
    pub buckets: [u32; GAP_BOUNDS_US.len() + 1],
}

/// What the request asked for, as far as it was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// `model`.
    pub model: Option<Box<str>>,
    /// `stream`.
    pub stream: bool,
    /// `n`, 1 when absent.
    pub n: u32,
    /// How many prompts (`prompt` of a completion may be a list), 1 when absent.
    pub prompts: u32,
    /// `priority`.
    pub priority: Option<i64>,
}

/// Everything that is known of an exchange once it has ended.
#[derive(Clone, Debug)]
pub struct Facts {
    /// First byte of the request's head.
    pub started: At,
    /// The end, whatever it was.
    pub ended: At,
    /// The route.
    pub endpoint: Endpoint,
    /// What the request asked for.
    pub asked: Asked,
    /// The model, by the response first, else by the request.
    pub model: Option<Box<str>>,
    /// Whether the response was a stream of events.
    pub streamed: bool,
    /// The response's status code; `None` when no response began.
    pub status: Option<u16>,
    /// How it is booked.
    pub outcome: Outcome,
    /// `type` (or `code`) of the error that the server sent; never its message.
    pub error_type: Option<Box<str>>,
    /// Why generation ended (of the last choice that did).
    pub finish_reason: Option<Box<str>>,
    /// Token counts.
    pub tokens: Tokens,
    /// Where they come from.
    pub usage_source: UsageSource,
    /// Start to the first chunk with generated content. Streams only.
    pub ttft_us: Option<u64>,
    /// Start to the end of the response's head.
    pub response_head_us: Option<u64>,
    /// Time in vLLM's queue, when its per-request metrics give it.
    pub queue_us: Option<u64>,
    /// Gaps between chunks with generated content.
    pub gaps: Gaps,
    /// Chunks with generated content.
    pub chunks: u64,
    /// Payload of the request's body.
    pub request_bytes: u64,
    /// Payload of the response's body.
    pub response_bytes: u64,
}

/// Gathers the [`Facts`] of one exchange while its bytes pass. The caller reads heads and framing and hands over payload.
#[derive(Clone, Debug)]
pub struct Exchange {
    facts: Facts,
}

impl Exchange {
    /// An exchange whose request began at `at` (the first byte of its head).
    pub fn begin(at: At, head: &RequestHead) -> Exchange {
        let _ = (at, head);
        todo!("observer")
    }

    /// Payload of the request's body.
    pub fn request_body(&mut self, at: At, piece: Piece<'_>) {
        let _ = (at, piece);
    }

    /// What the request asked for, as far as its body has been seen.
    pub fn asked(&self) -> &Asked {
        &self.facts.asked
    }

    /// A head of the response; interim ones (1xx) count for nothing.
    pub fn response_head(&mut self, at: At, head: &ResponseHead) {
        let _ = (at, head);
    }

    /// Payload of the response's body, framing removed.
    pub fn response_body(&mut self, at: At, piece: Piece<'_>) {
        let _ = (at, piece);
    }

    /// Whether chunks with generated content have been seen.
    pub fn has_content(&self) -> bool {
        self.facts.chunks > 0
    }

    /// Ends the exchange. `status` of a response that the gateway made itself is told with [`Ending::Refused`] and the like by the
    /// caller, who knows it.
    pub fn finish(self, at: At, ending: Ending) -> Facts {
        let _ = (at, ending);
        self.facts
    }
}
