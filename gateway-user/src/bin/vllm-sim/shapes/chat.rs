//! `/v1/chat/completions`.

use std::collections::VecDeque;

use bytes::Bytes;

use super::json::{Js, List, OrNull};
use super::usage::{self, Details, Usage};
use super::{DONE, Events, Stamp, finish_reason};
use crate::engine::{Delta, Finish, Summary};
use crate::request::{Job, UsageMode};
use crate::tokens::{Voice, mix};

/// The answer in one piece.
pub fn whole(job: &Job, stamp: &Stamp, ends: &[(u32, Finish)], summary: Summary) -> String {
    let choices = (0u32..).zip(&job.voices).zip(ends).map(|((index, voice), &(tokens, finish))| {
        format!(
            r#"{{"index":{index},"message":{{"role":"assistant",{}}},"logprobs":{},"finish_reason":"{}","stop_reason":null,"token_ids":null,"routed_experts":null}}"#,
            message(job, voice, tokens, stamp, index),
            OrNull(logprobs(job, voice, 0, tokens)),
            reason(job, finish),
        )
    });
    let completion = ends.iter().map(|end| end.0).sum();
    let tokens = Usage {
        prompt: job.prompt_tokens(),
        completion,
    };
    format!(
        r#"{{"id":"chatcmpl-{}","object":"chat.completion","created":{},"model":{},"choices":{},"service_tier":null,"system_fingerprint":{},"usage":{},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":{}}}"#,
        stamp.id,
        stamp.created,
        Js(&job.model),
        List(choices),
        OrNull(stamp.fingerprint.as_deref().map(Js)),
        usage::whole(tokens, stamp, summary, Details::WithCreated),
        usage::whole_metrics(stamp, completion, ends.len(), summary),
    )
}

fn message(job: &Job, voice: &Voice, tokens: u32, stamp: &Stamp, index: u32) -> String {
    let text = voice.text(0, tokens);
    let Some(tool) = &job.tool else {
        return format!(
            r#""content":{},"refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null"#,
            Js(&text)
        );
    };
    format!(
        r#""content":"","refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[{{"id":"{}","type":"function","function":{{"name":{},"arguments":{}}}}}],"reasoning":null"#,
        tool_call_id(stamp, index),
        Js(tool),
        Js(&text)
    )
}

/// An id as vLLM makes them for tool calls, fixed by the request and the choice.
pub fn tool_call_id(stamp: &Stamp, choice: u32) -> String {
    format!(
        "chatcmpl-tool-{:016x}",
        mix(
            crate::tokens::hash_bytes(1, stamp.id.as_bytes()),
            u64::from(choice)
        )
    )
}

fn reason(job: &Job, finish: Finish) -> &'static str {
    // A named tool ends in `stop`; only a demanded one says that it was a call.
    if job.tool.is_some() && job.tool_required && finish == Finish::Stop {
        return "tool_calls";
    }
    finish_reason(finish)
}

fn logprobs(job: &Job, voice: &Voice, from: u32, to: u32) -> Option<String> {
    let top = job.logprobs?;
    let entry = |text: &str, rank: u32, tail: &str| {
        format!(
            r#"{{"token":{},"logprob":{:?},"bytes":{}{tail}}}"#,
            Js(text),
            logprob(rank),
            List(text.as_bytes())
        )
    };
    let tokens = (from..to).map(|position| {
        let said = voice.token(position);
        let others = (0..top).map(|rank| {
            entry(
                if rank == 0 {
                    said
                } else {
                    voice.alternative(position, rank)
                },
                rank,
                "",
            )
        });
        entry(said, 0, &format!(r#","top_logprobs":{}"#, List(others)))
    });
    Some(format!(r#"{{"content":{}}}"#, List(tokens)))
}

/// The log probability of the token of a rank: always the same, since nothing depends on it.
pub fn logprob(rank: u32) -> f64 {
    -0.5 - f64::from(rank)
}

/// The answer as a stream.
pub struct Stream {
    job: Job,
    stamp: Stamp,
    /// Everything up to the choices, which never changes.
    head: String,
    begun: bool,
    completion: Vec<u32>,
}

impl Stream {
    /// A stream that answers `job`.
    pub fn new(job: Job, stamp: Stamp) -> Self {
        let head = format!(
            r#"data: {{"id":"chatcmpl-{}","object":"chat.completion.chunk","created":{},"model":{},"choices":["#,
            stamp.id,
            stamp.created,
            Js(&job.model)
        );
        let completion = vec![0; job.voices.len()];
        Stream {
            job,
            stamp,
            head,
            begun: false,
            completion,
        }
    }

    fn roles(&self, out: &mut VecDeque<Bytes>) {
        for choice in 0..self.job.voices.len() as u32 {
            out.push_back(Bytes::from(format!(
                r#"{}{{"index":{choice},"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]{},"prompt_token_ids":null,"prompt_text":null}}{}"#,
                self.head,
                self.continuous(choice, 0),
                "\n\n"
            )));
        }
    }

    fn continuous(&self, choice: u32, completion: u32) -> String {
        if self.job.usage != UsageMode::Continuous {
            return String::new();
        }
        let usage = Usage {
            prompt: self.job.prompt_tokens_of(choice),
            completion,
        };
        format!(r#","usage":{{{usage},"completion_tokens_details":null}}"#)
    }

    fn chunk(&self, delta: Delta, content: &str, finish: Option<Finish>) -> Bytes {
        let voice = &self.job.voices[delta.choice as usize];
        let (ending, fingerprint) = match finish {
            None => (r#""finish_reason":null"#.to_owned(), String::new()),
            Some(finish) => (
                format!(
                    r#""finish_reason":"{}","stop_reason":null"#,
                    reason(&self.job, finish)
                ),
                self.fingerprint(),
            ),
        };
        Bytes::from(format!(
            r#"{}{{"index":{},"delta":{{{content}}},"logprobs":{},{ending},"token_ids":null}}]{}{fingerprint}}}{}"#,
            self.head,
            delta.choice,
            OrNull(logprobs(&self.job, voice, delta.from, delta.to)),
            self.continuous(delta.choice, delta.to),
            "\n\n"
        ))
    }

    /// On the chunks that finish a choice, unless a usage chunk follows, which then carries it.
    fn fingerprint(&self) -> String {
        match &self.stamp.fingerprint {
            Some(fingerprint) if self.job.usage == UsageMode::Off => {
                format!(r#","system_fingerprint":{}"#, Js(fingerprint))
            }
            _ => String::new(),
        }
    }

    fn tool_chunks(&self, tool: &str, delta: Delta, out: &mut VecDeque<Bytes>) {
        if delta.from == 0 {
            let content = format!(
                r#""content":null,"tool_calls":[{{"id":"{}","type":"function","index":0,"function":{{"name":{}}}}}]"#,
                tool_call_id(&self.stamp, delta.choice),
                Js(tool)
            );
            out.push_back(self.chunk(delta, &content, None));
        }
        let text = self.job.voices[delta.choice as usize].text(delta.from, delta.to);
        let content = format!(
            r#""content":null,"tool_calls":[{{"index":0,"function":{{"arguments":{}}}}}]"#,
            Js(&text)
        );
        out.push_back(self.chunk(delta, &content, delta.finish));
    }
}

impl Events for Stream {
    fn opening(&mut self, _out: &mut VecDeque<Bytes>) {}

    fn delta(&mut self, delta: Delta, out: &mut VecDeque<Bytes>) {
        if !self.begun {
            self.begun = true;
            self.roles(out);
        }
        self.completion[delta.choice as usize] = delta.to;
        if let Some(tool) = &self.job.tool {
            self.tool_chunks(tool, delta, out);
            return;
        }
        let text = self.job.voices[delta.choice as usize].text(delta.from, delta.to);
        let content = if text.is_empty() {
            String::new()
        } else {
            format!(r#""content":{}"#, Js(&text))
        };
        out.push_back(self.chunk(delta, &content, delta.finish));
    }

    fn closing(&mut self, summary: Summary, out: &mut VecDeque<Bytes>) {
        if self.job.usage != UsageMode::Off {
            let tokens = Usage {
                prompt: self.job.prompt_tokens(),
                completion: self.completion.iter().sum(),
            };
            let choices = self.completion.len();
            let chunk = usage::last_chunk(
                &self.head,
                tokens,
                choices,
                &self.stamp,
                summary,
                Details::WithCreated,
            );
            out.push_back(Bytes::from(chunk));
        }
        out.push_back(DONE);
    }
}
