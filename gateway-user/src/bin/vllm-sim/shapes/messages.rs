//! `/v1/messages`: Anthropic's API.

use std::collections::VecDeque;

use bytes::Bytes;

use super::chat::tool_call_id;
use super::json::Js;
use super::{Events, Stamp};
use crate::engine::{Delta, Finish, Summary};
use crate::request::Job;

/// The answer in one piece.
pub fn whole(job: &Job, stamp: &Stamp, ends: &[(u32, Finish)], summary: Summary) -> String {
    let Some(&(tokens, finish)) = ends.first() else {
        return String::new();
    };
    let text = job.voices[0].text(0, tokens);
    let content = match &job.tool {
        None => format!(r#"{{"type":"text","text":{}}}"#, Js(&text)),
        Some(tool) => {
            // Cut short, the arguments are no JSON; vLLM then hands over an empty input.
            let input =
                serde_json::from_str::<serde_json::Value>(&text).unwrap_or_else(|_| serde_json::json!({}));
            format!(
                r#"{{"type":"tool_use","id":"{}","name":{},"input":{input}}}"#,
                tool_call_id(stamp, 0),
                Js(tool)
            )
        }
    };
    format!(
        r#"{{"id":"chatcmpl-{}","type":"message","role":"assistant","content":[{content}],"model":{},"stop_reason":"{}","usage":{}}}"#,
        stamp.id,
        Js(&job.model),
        stop_reason(job, finish),
        usage(job, tokens, stamp, summary)
    )
}

fn stop_reason(job: &Job, finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "max_tokens",
        Finish::Stop if job.tool.is_some() => "tool_use",
        Finish::Stop => "end_turn",
    }
}

/// Input tokens leave out what was read from or written to the cache.
fn usage(job: &Job, tokens: u32, stamp: &Stamp, summary: Summary) -> String {
    let (created, read) = match stamp.prompt_details {
        true => (summary.created_cache_tokens, summary.cached_tokens),
        false => (0, 0),
    };
    let input = job.prompt_tokens().saturating_sub(created + read);
    format!(
        r#"{{"input_tokens":{input},"output_tokens":{tokens},"cache_creation_input_tokens":{created},"cache_read_input_tokens":{read}}}"#
    )
}

/// The answer as a stream.
pub struct Stream {
    job: Job,
    stamp: Stamp,
    tokens: u32,
    finish: Finish,
}

impl Stream {
    /// A stream that answers `job`.
    pub fn new(job: Job, stamp: Stamp) -> Self {
        Stream {
            job,
            stamp,
            tokens: 0,
            finish: Finish::Length,
        }
    }

    fn begin(&self, out: &mut VecDeque<Bytes>) {
        emit(
            "message_start",
            &format!(
                r#","message":{{"id":"chatcmpl-{}","type":"message","role":"assistant","content":[],"model":{},"stop_reason":null,"stop_sequence":null,"usage":{{"input_tokens":{},"output_tokens":0}}}}"#,
                self.stamp.id,
                Js(&self.job.model),
                self.job.prompt_tokens()
            ),
            out,
        );
        let block = match &self.job.tool {
            None => r#"{"type":"text","text":""}"#.to_owned(),
            Some(tool) => format!(
                r#"{{"type":"tool_use","id":"{}","name":{},"input":{{}}}}"#,
                tool_call_id(&self.stamp, 0),
                Js(tool)
            ),
        };
        emit(
            "content_block_start",
            &format!(r#","content_block":{block},"index":0"#),
            out,
        );
    }
}

/// Queues an event; `members` begins with a comma.
fn emit(kind: &str, members: &str, out: &mut VecDeque<Bytes>) {
    out.push_back(Bytes::from(format!(
        "event: {kind}\ndata: {{\"type\":\"{kind}\"{members}}}\n\n"
    )));
}

impl Events for Stream {
    fn opening(&mut self, _out: &mut VecDeque<Bytes>) {}

    fn delta(&mut self, delta: Delta, out: &mut VecDeque<Bytes>) {
        if delta.from == 0 {
            self.begin(out);
        }
        self.tokens = delta.to;
        self.finish = delta.finish.unwrap_or(self.finish);
        let text = self.job.voices[0].text(delta.from, delta.to);
        let delta = match self.job.tool {
            None => format!(r#"{{"type":"text_delta","text":{}}}"#, Js(&text)),
            Some(_) => format!(r#"{{"type":"input_json_delta","partial_json":{}}}"#, Js(&text)),
        };
        emit(
            "content_block_delta",
            &format!(r#","delta":{delta},"index":0"#),
            out,
        );
    }

    fn closing(&mut self, summary: Summary, out: &mut VecDeque<Bytes>) {
        emit("content_block_stop", r#","index":0"#, out);
        emit(
            "message_delta",
            &format!(
                r#","delta":{{"stop_reason":"{}","stop_sequence":null}},"usage":{}"#,
                stop_reason(&self.job, self.finish),
                usage(&self.job, self.tokens, &self.stamp, summary)
            ),
            out,
        );
        emit("message_stop", "", out);
    }
}
