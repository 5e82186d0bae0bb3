//! `usage` and `metrics` of chat and completions.

use std::fmt::{self, Display, Formatter};

use super::Stamp;
use super::json::{Js, OrNull};
use crate::engine::Summary;

/// Tokens of a request or of a chunk.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Prompt tokens, each prompt once.
    pub prompt: u32,
    /// Generated tokens.
    pub completion: u32,
}

impl Display for Usage {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Usage { prompt, completion } = *self;
        let total = u64::from(prompt) + u64::from(completion);
        write!(
            f,
            r#""prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion}"#
        )
    }
}

/// Chat knows how many tokens a request added to the cache; completions does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Details {
    /// As chat has it.
    WithCreated,
    /// As completions has it.
    CachedOnly,
}

/// `usage` of a whole answer.
pub fn whole(usage: Usage, stamp: &Stamp, summary: Summary, details: Details) -> String {
    let created = (details == Details::WithCreated).then_some(summary.created_cache_tokens);
    let prompt_details = stamp.prompt_details.then(|| {
        format!(
            r#"{{"cached_tokens":{},"created_cache_tokens":{},"multimodal_tokens":null}}"#,
            summary.cached_tokens,
            OrNull(created)
        )
    });
    format!(
        r#"{{{usage},"prompt_tokens_details":{},"completion_tokens_details":null}}"#,
        OrNull(prompt_details)
    )
}

/// `usage` of a stream's last chunk: members that are null are left out.
fn last(usage: Usage, stamp: &Stamp, summary: Summary, details: Details) -> String {
    let cached = summary.cached_tokens;
    let prompt_details = match (stamp.prompt_details, details) {
        (false, _) => String::new(),
        (true, Details::CachedOnly) => format!(r#","prompt_tokens_details":{{"cached_tokens":{cached}}}"#),
        (true, Details::WithCreated) => {
            let created = summary.created_cache_tokens;
            format!(
                r#","prompt_tokens_details":{{"cached_tokens":{cached},"created_cache_tokens":{created}}}"#
            )
        }
    };
    format!("{{{usage}{prompt_details}}}")
}

/// `metrics`, open at the end: a whole answer adds a member that streams leave out.
pub fn metrics(completion: u32, summary: Summary) -> String {
    let ms = |ns: u64| ns as f64 / 1e6;
    let gaps = completion.saturating_sub(1);
    let mean_itl_ms = (gaps > 0).then(|| ms(summary.decode_ns) / f64::from(gaps));
    let inference_s = (summary.prefill_ns + summary.decode_ns) as f64 / 1e9;
    let per_second = (inference_s > 0.0).then(|| f64::from(completion) / inference_s);
    format!(
        r#"{{"time_to_first_token_ms":{:?},"generation_time_ms":{:?},"queue_time_ms":{:?},"mean_itl_ms":{},"tokens_per_second":{}"#,
        ms(summary.prefill_ns),
        ms(summary.decode_ns),
        ms(summary.queue_ns),
        OrNull(mean_itl_ms.map(|value| format!("{value:?}"))),
        OrNull(per_second.map(|value| format!("{value:?}"))),
    )
}

/// `metrics` of a whole answer; vLLM gives none when there are several choices.
pub fn whole_metrics(stamp: &Stamp, completion: u32, choices: usize, summary: Summary) -> String {
    if !stamp.request_metrics || choices != 1 {
        return "null".to_owned();
    }
    format!(
        r#"{},"speculative_decoding":null}}"#,
        metrics(completion, summary)
    )
}

/// A stream's last chunk, which no choice has a part in: `head` is its beginning, up to and with the bracket that opens `choices`; `choices` is how
/// many there were.
pub fn last_chunk(
    head: &str,
    usage: Usage,
    choices: usize,
    stamp: &Stamp,
    summary: Summary,
    details: Details,
) -> String {
    let fingerprint = stamp.fingerprint.as_deref();
    let metrics = if stamp.request_metrics && choices == 1 {
        format!(r#","metrics":{}}}"#, metrics(usage.completion, summary))
    } else {
        String::new()
    };
    format!(
        r#"{head}],"usage":{}{}{metrics}}}{}"#,
        last(usage, stamp, summary, details),
        fingerprint
            .map(|text| format!(r#","system_fingerprint":{}"#, Js(text)))
            .unwrap_or_default(),
        "\n\n"
    )
}
