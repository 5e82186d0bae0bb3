//! `/v1/responses`.

use std::collections::VecDeque;

use bytes::Bytes;
use serde_json::Value;

use super::json::{Js, List, OrNull};
use super::{Events, Stamp};
use crate::engine::{Delta, Finish, Summary};
use crate::request::Job;
use crate::tokens::{hash_bytes, mix};

/// The answer in one piece.
pub fn whole(job: &Job, stamp: &Stamp, ends: &[(u32, Finish)], summary: Summary) -> String {
    let Some(&(tokens, finish)) = ends.first() else {
        return String::new();
    };
    let item = item(job, stamp, Some(&job.voices[0].text(0, tokens)));
    response(
        job,
        stamp,
        Some(&Ended {
            item,
            tokens,
            finish,
            summary,
        }),
    )
}

struct Ended {
    item: String,
    tokens: u32,
    finish: Finish,
    summary: Summary,
}

/// The response object, under way or ended.
fn response(job: &Job, stamp: &Stamp, ended: Option<&Ended>) -> String {
    let body = &job.body;
    let cut = ended.is_some_and(|ended| ended.finish == Finish::Length);
    let status = match ended {
        None => "in_progress",
        Some(_) if cut => "incomplete",
        Some(_) => "completed",
    };
    let tools = body["tools"].as_array().map(Vec::as_slice).unwrap_or_default();
    let default_choice = if tools.is_empty() { "none" } else { "auto" };
    let tool_choice = match &body["tool_choice"] {
        Value::Null => Value::from(default_choice),
        _ if tools.is_empty() => Value::from("none"),
        choice => choice.clone(),
    };
    format!(
        r#"{{"id":"resp_{}","created_at":{},"incomplete_details":{},"instructions":{},"metadata":{},"model":{},"object":"response","output":{},"parallel_tool_calls":{},"temperature":{:?},"tool_choice":{tool_choice},"tools":{},"top_p":{:?},"background":false,"max_output_tokens":{},"max_tool_calls":{},"previous_response_id":{},"prompt":null,"reasoning":{},"service_tier":"auto","status":"{status}","text":{},"top_logprobs":{},"truncation":"disabled","usage":{},"user":{},"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,"input_messages":null,"output_messages":null}}"#,
        stamp.id,
        stamp.created,
        if cut {
            r#"{"reason":"max_output_tokens"}"#
        } else {
            "null"
        },
        body["instructions"],
        body["metadata"],
        Js(&job.model),
        List(ended.map(|ended| &ended.item)),
        body["parallel_tool_calls"].as_bool().unwrap_or(true),
        body["temperature"].as_f64().unwrap_or(1.0),
        List(tools),
        body["top_p"].as_f64().unwrap_or(1.0),
        job.max_tokens,
        body["max_tool_calls"],
        body["previous_response_id"],
        body["reasoning"],
        body["text"],
        body["top_logprobs"],
        OrNull(ended.map(|ended| usage(job, ended))),
        body["user"],
    )
}

fn usage(job: &Job, ended: &Ended) -> String {
    let (input, output) = (job.prompt_tokens(), ended.tokens);
    format!(
        r#"{{"input_tokens":{input},"input_tokens_details":{{"cached_tokens":{},"cache_write_tokens":{},"input_tokens_per_turn":[],"cached_tokens_per_turn":[]}},"output_tokens":{output},"output_tokens_details":{{"reasoning_tokens":0,"tool_output_tokens":0,"output_tokens_per_turn":[],"tool_output_tokens_per_turn":[]}},"total_tokens":{}}}"#,
        ended.summary.cached_tokens,
        ended.summary.created_cache_tokens,
        u64::from(input) + u64::from(output)
    )
}

/// The id of the output item, fixed by the request's.
fn item_id(stamp: &Stamp, prefix: &str) -> String {
    format!("{prefix}_{:016x}", mix(hash_bytes(2, stamp.id.as_bytes()), 0))
}

/// The output item; without a text it has just begun.
fn item(job: &Job, stamp: &Stamp, text: Option<&str>) -> String {
    let status = if text.is_some() {
        "completed"
    } else {
        "in_progress"
    };
    if let Some(tool) = &job.tool {
        return format!(
            r#"{{"arguments":{},"call_id":"{}","name":{},"type":"function_call","id":"{}","status":"{status}"}}"#,
            Js(text.unwrap_or("")),
            item_id(stamp, "call"),
            Js(tool),
            item_id(stamp, "fc"),
        );
    }
    let content = text.map(|text| part(text, "null"));
    format!(
        r#"{{"id":"{}","content":{},"role":"assistant","status":"{status}","type":"message","phase":null}}"#,
        item_id(stamp, "msg"),
        List(content.as_deref()),
    )
}

fn part(text: &str, logprobs: &str) -> String {
    format!(
        r#"{{"annotations":[],"text":{},"type":"output_text","logprobs":{logprobs}}}"#,
        Js(text)
    )
}

/// The answer as a stream.
pub struct Stream {
    job: Job,
    stamp: Stamp,
    sequence: u32,
    tokens: u32,
    finish: Finish,
}

impl Stream {
    /// A stream that answers `job`.
    pub fn new(job: Job, stamp: Stamp) -> Self {
        Stream {
            job,
            stamp,
            sequence: 0,
            tokens: 0,
            finish: Finish::Length,
        }
    }

    /// Queues an event; `members` ends in a comma.
    fn emit(&mut self, kind: &str, members: &str, out: &mut VecDeque<Bytes>) {
        let sequence = self.sequence;
        self.sequence += 1;
        out.push_back(Bytes::from(format!(
            "event: {kind}\ndata: {{{members}\"sequence_number\":{sequence},\"type\":\"{kind}\"}}\n\n"
        )));
    }

    fn begin_item(&mut self, out: &mut VecDeque<Bytes>) {
        let item = item(&self.job, &self.stamp, None);
        self.emit(
            "response.output_item.added",
            &format!(r#""item":{item},"output_index":0,"#),
            out,
        );
        if self.job.tool.is_none() {
            let (id, part) = (item_id(&self.stamp, "msg"), part("", "[]"));
            let members = format!(r#""content_index":0,"item_id":"{id}","output_index":0,"part":{part},"#);
            self.emit("response.content_part.added", &members, out);
        }
    }
}

impl Events for Stream {
    fn opening(&mut self, out: &mut VecDeque<Bytes>) {
        let members = format!(r#""response":{},"#, response(&self.job, &self.stamp, None));
        self.emit("response.created", &members, out);
        self.emit("response.in_progress", &members, out);
    }

    fn delta(&mut self, delta: Delta, out: &mut VecDeque<Bytes>) {
        if delta.from == 0 {
            self.begin_item(out);
        }
        self.tokens = delta.to;
        self.finish = delta.finish.unwrap_or(self.finish);
        let text = self.job.voices[0].text(delta.from, delta.to);
        if self.job.tool.is_some() {
            let id = item_id(&self.stamp, "fc");
            let members = format!(r#""delta":{},"item_id":"{id}","output_index":0,"#, Js(&text));
            self.emit("response.function_call_arguments.delta", &members, out);
        } else {
            let id = item_id(&self.stamp, "msg");
            let members = format!(
                r#""content_index":0,"delta":{},"item_id":"{id}","logprobs":[],"output_index":0,"#,
                Js(&text)
            );
            self.emit("response.output_text.delta", &members, out);
        }
    }

    fn closing(&mut self, summary: Summary, out: &mut VecDeque<Bytes>) {
        let text = self.job.voices[0].text(0, self.tokens);
        let item = item(&self.job, &self.stamp, Some(&text));
        if let Some(tool) = &self.job.tool {
            let id = item_id(&self.stamp, "fc");
            let members = format!(
                r#""arguments":{},"item_id":"{id}","name":{},"output_index":0,"#,
                Js(&text),
                Js(tool)
            );
            self.emit("response.function_call_arguments.done", &members, out);
        } else {
            let id = item_id(&self.stamp, "msg");
            let at = format!(r#""content_index":0,"item_id":"{id}","#);
            let members = format!(r#"{at}"logprobs":[],"output_index":0,"#);
            // The text is the only member that comes after the sequence number.
            let sequence = self.sequence;
            self.sequence += 1;
            out.push_back(Bytes::from(format!(
                "event: response.output_text.done\ndata: {{{members}\"sequence_number\":{sequence},\"text\":{},\
                 \"type\":\"response.output_text.done\"}}\n\n",
                Js(&text)
            )));
            let members = format!(r#"{at}"output_index":0,"part":{},"#, part(&text, "null"));
            self.emit("response.content_part.done", &members, out);
        }
        self.emit(
            "response.output_item.done",
            &format!(r#""item":{item},"output_index":0,"#),
            out,
        );
        let ended = Ended {
            item,
            tokens: self.tokens,
            finish: self.finish,
            summary,
        };
        let members = format!(
            r#""response":{},"#,
            response(&self.job, &self.stamp, Some(&ended))
        );
        self.emit("response.completed", &members, out);
    }
}
