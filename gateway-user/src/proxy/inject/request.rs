//! The edit of a request's body.

use super::learned::{Fingerprint, Known};
use super::object::{members, span};
use super::stream::Strip;
use crate::config::Inject;
use crate::wire::endpoint::Endpoint;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

/// How much usage the proxy asks for (`usage.inject`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InjectMode {
    /// As `continuous`, but `final` for a model that is known to report `reasoning_tokens`, since for such a model vLLM counts all
    /// tokens so far again at every event.
    #[default]
    Auto,
    /// Usage on every event, so that an aborted stream is counted to within one engine step.
    Continuous,
    /// Usage at the end: an aborted stream has none.
    Final,
    /// Nothing is ever edited.
    Off,
}

impl From<Inject> for InjectMode {
    fn from(setting: Inject) -> InjectMode {
        match setting {
            Inject::Auto => InjectMode::Auto,
            Inject::Continuous => InjectMode::Continuous,
            Inject::Final => InjectMode::Final,
            Inject::Off => InjectMode::Off,
        }
    }
}

/// Why a request goes upstream as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Untouched {
    /// The configuration says so.
    Off,
    /// The route has no `stream_options`.
    Endpoint,
    /// The body is no valid JSON object; the upstream will say so.
    NotJson,
    /// `stream` is not `true`.
    NotStreamed,
    /// A key stands twice, and which of the two counts is the upstream's affair.
    DuplicateKey,
    /// `stream_options`, or a member of it that matters here, has a type that servers read differently.
    StreamOptions,
    /// The client asked for all that the proxy would ask for: usage is in the stream anyway.
    AlreadyAsked,
    /// Several choices, and the fingerprint that would have to be put back is not known yet.
    FingerprintUnknown,
}

impl Untouched {
    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Untouched::Off => "off",
            Untouched::Endpoint => "endpoint",
            Untouched::NotJson => "not_json",
            Untouched::NotStreamed => "not_streamed",
            Untouched::DuplicateKey => "duplicate_key",
            Untouched::StreamOptions => "stream_options",
            Untouched::AlreadyAsked => "already_asked",
            Untouched::FingerprintUnknown => "fingerprint_unknown",
        }
    }
}

/// What to do with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Send the client's body, and leave the response alone.
    Untouched(Untouched),
    /// Send `body`, and edit the response by `strip`.
    Edited {
        /// The client's body but for `stream_options`.
        body: Vec<u8>,
        /// What the edit makes the upstream add to the stream.
        strip: Strip,
    },
}

/// Decides what to ask the upstream for. `body` is the request's whole payload, not compressed; `known` is what was learned of the
/// requested model on the upstream that will get it.
pub fn plan(body: &[u8], endpoint: Endpoint, mode: InjectMode, known: Known) -> Plan {
    match edit(body, endpoint, mode, known) {
        Ok((body, strip)) => Plan::Edited { body, strip },
        Err(why) => Plan::Untouched(why),
    }
}

fn edit(
    body: &[u8],
    endpoint: Endpoint,
    mode: InjectMode,
    known: Known,
) -> Result<(Vec<u8>, Strip), Untouched> {
    let continuous = match mode {
        InjectMode::Off => return Err(Untouched::Off),
        InjectMode::Auto => known.reports_reasoning != Some(true),
        InjectMode::Continuous => true,
        InjectMode::Final => false,
    };
    if !matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions) {
        return Err(Untouched::Endpoint);
    }
    let text = std::str::from_utf8(body).map_err(|_| Untouched::NotJson)?;
    let request = Request::read(text)?;
    let stream = request
        .stream
        .filter(|value| *value == "true")
        .ok_or(Untouched::NotStreamed)?;
    let (edits, keeps_final) = match request.stream_options {
        None => (vec![insertion(text, stream, continuous)], false),
        Some(options) => edits_of_options(text, options, continuous)?,
    };
    let single_choice = request.has_single_choice(endpoint);
    if !keeps_final && !single_choice && known.fingerprint == Fingerprint::Unknown {
        return Err(Untouched::FingerprintUnknown);
    }
    let strip = Strip {
        keeps_final,
        single_choice,
        known,
    };
    Ok((apply(text, edits), strip))
}

/// The members that matter; values are slices of the body.
#[derive(Default)]
struct Request<'t> {
    stream: Option<&'t str>,
    stream_options: Option<&'t str>,
    n: Option<&'t str>,
    prompt: Option<&'t str>,
    prompt_embeds: Option<&'t str>,
}

impl<'t> Request<'t> {
    fn read(text: &'t str) -> Result<Request<'t>, Untouched> {
        let mut request = Request::default();
        each_member_once(text, Untouched::NotJson, |key, value| {
            let place = match key {
                "stream" => &mut request.stream,
                "stream_options" => &mut request.stream_options,
                "n" => &mut request.n,
                "prompt" => &mut request.prompt,
                "prompt_embeds" => &mut request.prompt_embeds,
                _ => return,
            };
            *place = Some(value);
        })?;
        Ok(request)
    }

    /// Whether the stream can only have one choice. What cannot be read counts as several, which asks for more care.
    fn has_single_choice(&self, endpoint: Endpoint) -> bool {
        let one_each = matches!(self.n, None | Some("null" | "1"));
        let one_prompt = match endpoint {
            Endpoint::Completions => {
                matches!(self.prompt_embeds, None | Some("null")) && self.prompt.is_some_and(is_one_prompt)
            }
            _ => true,
        };
        one_each && one_prompt
    }
}

/// A text, a list of token ids, or a list of one prompt.
fn is_one_prompt(prompt: &str) -> bool {
    if prompt.starts_with('"') {
        return true;
    }
    let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(prompt) else {
        return false;
    };
    let is_id = |item: &&RawValue| item.get().starts_with(|first: char| first.is_ascii_digit());
    items.len() == 1 || (!items.is_empty() && items.iter().all(is_id))
}

/// Walks over an object in which no key may stand twice, however it is escaped.
fn each_member_once<'t>(
    text: &'t str,
    otherwise: Untouched,
    mut visit: impl FnMut(&str, &'t str),
) -> Result<(), Untouched> {
    let mut keys: HashSet<Cow<'t, str>> = HashSet::new();
    let mut twice = false;
    members(text, |key, value| {
        visit(&key, value);
        twice |= !keys.insert(key);
    })
    .ok_or(otherwise)?;
    if twice {
        Err(Untouched::DuplicateKey)
    } else {
        Ok(())
    }
}

/// A piece of the body and what stands there instead.
type Edit = (Range<usize>, String);

/// `stream_options` is put behind `stream`, without which it would be refused.
fn insertion(text: &str, stream: &str, continuous: bool) -> Edit {
    let at = span(text, stream).end;
    let also = if continuous {
        r#","continuous_usage_stats":true"#
    } else {
        ""
    };
    (
        at..at,
        format!(r#","stream_options":{{"include_usage":true{also}}}"#),
    )
}

/// The edits within `stream_options`, and whether the client asked for the final usage itself.
///
/// An `include_usage` that is absent counts as `true` with vLLM, and the edit leaves it to the server: where the default is another,
/// `continuous_usage_stats` alone asks for nothing, and nothing has to be taken out.
fn edits_of_options(text: &str, options: &str, continuous: bool) -> Result<(Vec<Edit>, bool), Untouched> {
    let (mut include_usage, mut per_event, mut last) = (None, None, None);
    each_member_once(options, Untouched::StreamOptions, |key, value| {
        match key {
            "include_usage" => include_usage = Some(value),
            "continuous_usage_stats" => per_event = Some(value),
            _ => {}
        }
        last = Some(value);
    })?;
    let asks_final = flag(include_usage)?.unwrap_or(true);
    let asks_per_event = flag(per_event)?.unwrap_or(false);
    if asks_final && (asks_per_event || !continuous) {
        return Err(Untouched::AlreadyAsked);
    }
    let mut edits = Vec::new();
    if let Some(value) = include_usage.filter(|_| !asks_final) {
        edits.push((span(text, value), "true".to_owned()));
    }
    match (per_event, last) {
        _ if asks_per_event == continuous => {}
        (Some(value), _) => edits.push((span(text, value), continuous.to_string())),
        (None, Some(last)) => {
            let at = span(text, last).end;
            edits.push((at..at, r#","continuous_usage_stats":true"#.to_owned()));
        }
        (None, None) => {
            let at = span(text, options).start + 1;
            edits.push((at..at, r#""continuous_usage_stats":true"#.to_owned()));
        }
    }
    Ok((edits, asks_final))
}

/// A flag of `stream_options`; `null` is false to every server that allows it.
fn flag(value: Option<&str>) -> Result<Option<bool>, Untouched> {
    match value {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false" | "null") => Ok(Some(false)),
        Some(_) => Err(Untouched::StreamOptions),
    }
}

fn apply(text: &str, mut edits: Vec<Edit>) -> Vec<u8> {
    edits.sort_by_key(|(place, _)| place.start);
    let added: usize = edits.iter().map(|(_, with)| with.len()).sum();
    let mut edited = Vec::with_capacity(text.len() + added);
    let mut done = 0;
    for (place, with) in edits {
        edited.extend_from_slice(&text.as_bytes()[done..place.start]);
        edited.extend_from_slice(with.as_bytes());
        done = place.end;
    }
    edited.extend_from_slice(&text.as_bytes()[done..]);
    edited
}

#[cfg(test)]
mod tests;
