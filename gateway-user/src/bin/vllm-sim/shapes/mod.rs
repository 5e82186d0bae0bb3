//! What answers look like: one file for each API, member by member as vLLM writes them.

pub mod chat;
pub mod completion;
pub mod error;
pub mod json;
pub mod messages;
pub mod pooling;
pub mod responses;
pub mod site;
pub mod usage;

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::engine::{Delta, Finish, Summary};
use crate::request::{Endpoint, Job};

/// What an answer needs beside its request.
#[derive(Debug, Clone)]
pub struct Stamp {
    /// The request's id, without the prefix that each API puts before it.
    pub id: String,
    /// Unix time in seconds.
    pub created: u64,
    /// `system_fingerprint`.
    pub fingerprint: Option<Arc<str>>,
    /// Whether cached prompt tokens are reported.
    pub prompt_details: bool,
    /// Whether timings are reported.
    pub request_metrics: bool,
}

/// Turns what the engine reports into server-sent events.
pub trait Events: Send {
    /// Events that leave before the first token.
    fn opening(&mut self, out: &mut VecDeque<Bytes>);
    /// Events for new tokens.
    fn delta(&mut self, delta: Delta, out: &mut VecDeque<Bytes>);
    /// Events after the last token.
    fn closing(&mut self, summary: Summary, out: &mut VecDeque<Bytes>);
}

/// The writer of a streamed answer to `job`.
pub fn events(job: Job, stamp: Stamp) -> Box<dyn Events> {
    match job.endpoint {
        Endpoint::Chat => Box::new(chat::Stream::new(job, stamp)),
        Endpoint::Completions => Box::new(completion::Stream::new(job, stamp)),
        Endpoint::Responses => Box::new(responses::Stream::new(job, stamp)),
        Endpoint::Messages => Box::new(messages::Stream::new(job, stamp)),
    }
}

/// The whole answer to `job`.
pub fn whole(job: &Job, stamp: &Stamp, ends: &[(u32, Finish)], summary: Summary) -> String {
    match job.endpoint {
        Endpoint::Chat => chat::whole(job, stamp, ends, summary),
        Endpoint::Completions => completion::whole(job, stamp, ends, summary),
        Endpoint::Responses => responses::whole(job, stamp, ends, summary),
        Endpoint::Messages => messages::whole(job, stamp, ends, summary),
    }
}

/// The event that ends OpenAI's streams.
pub const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// `finish_reason` of OpenAI's APIs.
pub fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}
