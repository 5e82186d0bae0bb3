//! `/v1/completions`.

use std::collections::VecDeque;

use bytes::Bytes;

use super::chat::logprob;
use super::json::{Js, List, OrNull};
use super::usage::{self, Details, Usage};
use super::{DONE, Events, Stamp, finish_reason};
use crate::engine::{Delta, Finish, Summary};
use crate::request::{Job, UsageMode};
use crate::tokens::Voice;

/// The answer in one piece.
pub fn whole(job: &Job, stamp: &Stamp, ends: &[(u32, Finish)], summary: Summary) -> String {
    let choices = (0u32..).zip(&job.voices).zip(ends).map(|((index, voice), &(tokens, finish))| {
        format!(
            r#"{{"index":{index},"text":{},"logprobs":{},"finish_reason":"{}","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}}"#,
            Js(&voice.text(0, tokens)),
            OrNull(logprobs(job, voice, 0, tokens)),
            finish_reason(finish),
        )
    });
    let completion = ends.iter().map(|end| end.0).sum();
    let tokens = Usage {
        prompt: job.prompt_tokens(),
        completion,
    };
    format!(
        r#"{{"id":"cmpl-{}","object":"text_completion","created":{},"model":{},"choices":{},"service_tier":null,"system_fingerprint":{},"usage":{},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":{}}}"#,
        stamp.id,
        stamp.created,
        Js(&job.model),
        List(choices),
        OrNull(stamp.fingerprint.as_deref().map(Js)),
        usage::whole(tokens, stamp, summary, Details::CachedOnly),
        usage::whole_metrics(stamp, completion, ends.len(), summary),
    )
}

fn logprobs(job: &Job, voice: &Voice, from: u32, to: u32) -> Option<String> {
    let top = job.logprobs?;
    let mut offset = voice.text(0, from).chars().count();
    let offsets = (from..to)
        .map(|position| {
            let at = offset;
            offset += voice.token(position).chars().count();
            at
        })
        .collect::<Vec<_>>();
    let alternatives = (from..to).map(|position| {
        let others = (0..top.max(1)).map(|rank| {
            let text = if rank == 0 {
                voice.token(position)
            } else {
                voice.alternative(position, rank)
            };
            format!("{}:{:?}", Js(text), logprob(rank))
        });
        format!("{{{}}}", others.collect::<Vec<_>>().join(","))
    });
    Some(format!(
        r#"{{"text_offset":{},"token_logprobs":{},"tokens":{},"top_logprobs":{}}}"#,
        List(&offsets),
        List((from..to).map(|_| format!("{:?}", logprob(0)))),
        List((from..to).map(|position| Js(voice.token(position)))),
        List(alternatives)
    ))
}

/// The answer as a stream.
pub struct Stream {
    job: Job,
    stamp: Stamp,
    /// Everything up to the choices, which never changes.
    head: String,
    completion: Vec<u32>,
}

impl Stream {
    /// A stream that answers `job`.
    pub fn new(job: Job, stamp: Stamp) -> Self {
        let head = format!(
            r#"data: {{"id":"cmpl-{}","object":"text_completion","created":{},"model":{},"choices":["#,
            stamp.id,
            stamp.created,
            Js(&job.model)
        );
        let completion = vec![0; job.voices.len()];
        Stream {
            job,
            stamp,
            head,
            completion,
        }
    }
}

impl Events for Stream {
    fn opening(&mut self, _out: &mut VecDeque<Bytes>) {}

    fn delta(&mut self, delta: Delta, out: &mut VecDeque<Bytes>) {
        self.completion[delta.choice as usize] = delta.to;
        let voice = &self.job.voices[delta.choice as usize];
        let mut tail = String::new();
        if self.job.usage == UsageMode::Continuous {
            let tokens = Usage {
                prompt: self.job.prompt_tokens_of(delta.choice),
                completion: delta.to,
            };
            tail = format!(r#","usage":{{{tokens}}}"#);
        } else if let (Some(_), UsageMode::Off, Some(text)) =
            (delta.finish, self.job.usage, self.stamp.fingerprint.as_deref())
        {
            tail = format!(r#","system_fingerprint":{}"#, Js(text));
        }
        out.push_back(Bytes::from(format!(
            r#"{}{{"index":{},"text":{},"logprobs":{},"finish_reason":{},"stop_reason":null,"prompt_token_ids":null,"token_ids":null}}]{tail}}}{}"#,
            self.head,
            delta.choice,
            Js(&voice.text(delta.from, delta.to)),
            OrNull(logprobs(&self.job, voice, delta.from, delta.to)),
            OrNull(delta.finish.map(finish_reason).map(Js)),
            "\n\n"
        )));
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
                Details::CachedOnly,
            );
            out.push_back(Bytes::from(chunk));
        }
        out.push_back(DONE);
    }
}
