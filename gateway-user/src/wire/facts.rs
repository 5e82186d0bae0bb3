//! What is known of an exchange: plain data, without any reading of bytes.

use super::At;
use super::endpoint::Endpoint;
use super::progress::Progress;

/// How an exchange came to its end, as told by whoever moved the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Request and response ended as their framing says.
    Complete,
    /// The client went away, and the response had neither ended nor did so within the time that it is still read for: see [`Outcome::Aborted`].
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
///
/// What counts of a client that left is what its server made of the request, not what the client took: nobody beside a connection can know how much of
/// what lies in its buffers is still read, and a server that answered whole has done all the work. So it does not matter whether the last byte
/// or the client's end came first, which two who watch from two places may see differently. Both capture paths book by this rule:
///
/// * [`Completed`](Outcome::Completed) (or an error of the server's) is a response that ended as its framing says, or a stream that said its last word
///   (`[DONE]`), before its client left or within `proxy.abort_drain` of that.
/// * [`Aborted`](Outcome::Aborted) is any other whose client left while the server had not ended the connection itself.
/// * [`Truncated`](Outcome::Truncated) is one that the server broke off before the client left. A body that lasts until the connection ends is whole then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Answered with success, whole.
    Completed,
    /// Answered with a 4xx by the upstream.
    ClientError,
    /// Answered with a 5xx by the upstream, or with an error in mid-stream.
    ServerError,
    /// The client left, and the server's answer did not come whole by `proxy.abort_drain` behind that.
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
    /// The gateway itself was killed before the request had ended.
    GatewayCrash,
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

impl Tokens {
    /// Without what was generated.
    pub(super) fn input_only(self) -> Tokens {
        Tokens {
            prompt: self.prompt,
            cached: self.cached,
            engine_prompt: self.engine_prompt,
            ..Tokens::default()
        }
    }
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

impl Gaps {
    pub(super) fn add(&mut self, gap_us: u64) {
        self.count += 1;
        self.sum_us = self.sum_us.saturating_add(gap_us);
        self.max_us = self.max_us.max(gap_us);
        let bucket = GAP_BOUNDS_US.partition_point(|bound| *bound < gap_us);
        self.buckets[bucket] = self.buckets[bucket].saturating_add(1);
    }
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
    /// Last byte of the request, be it of its head or of its body; `None` when it had not come before the end, or was not seen.
    pub request_whole: Option<At>,
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
    /// How the generated content came along.
    pub progress: Progress,
    /// When the last byte of the response came; when the request began if none did.
    pub last_byte_at: At,
    /// Payload of the request's body.
    pub request_bytes: u64,
    /// Payload of the response's body.
    pub response_bytes: u64,
}

impl Facts {
    /// What is known of bytes that were no request: when they came, and how it ended.
    pub fn unread(started: At, ended: At, ending: Ending) -> Facts {
        Facts {
            started,
            request_whole: None,
            ended,
            endpoint: Endpoint::Other,
            asked: Asked::default(),
            model: None,
            streamed: false,
            status: None,
            outcome: Outcome::of(ending, None, false),
            error_type: None,
            finish_reason: None,
            tokens: Tokens::default(),
            usage_source: UsageSource::None,
            ttft_us: None,
            response_head_us: None,
            queue_us: None,
            gaps: Gaps::default(),
            chunks: 0,
            progress: Progress::default(),
            last_byte_at: started,
            request_bytes: 0,
            response_bytes: 0,
        }
    }
}

impl Outcome {
    /// How an exchange is booked that ended like that, with this status and perhaps an error in mid-stream.
    pub(super) fn of(ending: Ending, status: Option<u16>, has_error: bool) -> Outcome {
        match ending {
            Ending::ClientGone => Outcome::Aborted,
            Ending::UpstreamClosed => Outcome::Truncated,
            Ending::Unreachable => Outcome::Unreachable,
            Ending::TimedOut => Outcome::TimedOut,
            Ending::Refused => Outcome::Refused,
            Ending::Unseen => Outcome::Incomplete,
            Ending::Complete => match status {
                None => Outcome::Incomplete,
                Some(500..) => Outcome::ServerError,
                Some(400..) => Outcome::ClientError,
                Some(_) if has_error => Outcome::ServerError,
                Some(_) => Outcome::Completed,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_falls_into_the_bucket_whose_bound_it_does_not_pass() {
        let mut gaps = Gaps::default();
        for gap_us in [0, 1_000, 1_001, 2_500_000, 2_500_001] {
            gaps.add(gap_us);
        }
        assert_eq!((gaps.count, gaps.sum_us, gaps.max_us), (5, 5_002_002, 2_500_001));
        assert_eq!((gaps.buckets[0], gaps.buckets[1]), (2, 1));
        assert_eq!((gaps.buckets[15], gaps.buckets[16]), (1, 1));
        assert_eq!(gaps.buckets.iter().sum::<u32>(), 5);
    }

    #[test]
    fn how_it_ended_counts_before_what_the_server_said() {
        assert_eq!(Outcome::of(Ending::ClientGone, Some(500), true), Outcome::Aborted);
        assert_eq!(
            Outcome::of(Ending::Complete, Some(200), true),
            Outcome::ServerError
        );
        assert_eq!(
            Outcome::of(Ending::Complete, Some(404), true),
            Outcome::ClientError
        );
        assert_eq!(
            Outcome::of(Ending::Complete, Some(503), true),
            Outcome::ServerError
        );
        assert_eq!(
            Outcome::of(Ending::Complete, Some(200), false),
            Outcome::Completed
        );
        assert_eq!(Outcome::of(Ending::Complete, None, false), Outcome::Incomplete);
    }
}
