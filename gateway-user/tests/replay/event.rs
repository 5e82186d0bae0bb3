//! What an event must say of a captured exchange, by the plainest reading of its bytes and by the engine's own counters.

use super::heads::text;
use super::{Capture, body, chunks, head};
use serde_json::Value;
use vllm_gateway::event::{CapturedBy, RequestEvent};
use vllm_gateway::wire::exchange::{Outcome, UsageSource};

/// What the document of a response, or the events of a stream, say by the plainest reading.
fn documents(response: &[u8]) -> Vec<Value> {
    let payload = match chunks(body(response)) {
        Some((chunks, _)) if text(head(response)).contains("chunked") => chunks.concat(),
        // A cut-off stream's frames stand between its lines and are no `data`.
        _ => body(response).to_vec(),
    };
    let payload = text(&payload);
    if let Ok(document) = serde_json::from_str(&payload) {
        return vec![document];
    }
    let data = payload.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter_map(|data| serde_json::from_str(data).ok()).collect()
}

fn last<T>(documents: &[Value], of: impl Fn(&Value) -> Option<T>) -> Option<T> {
    documents.iter().filter_map(of).next_back()
}

/// Billed prompt and completion tokens, and cached ones, as the last usage object says.
fn usage(documents: &[Value]) -> Option<(Option<u64>, Option<u64>, Option<u64>)> {
    let usage = last(documents, |document| {
        let places = [&document["usage"], &document["response"]["usage"]];
        places.into_iter().find(|usage| usage.is_object()).cloned()
    })?;
    let first = |names: &[&str]| names.iter().find_map(|name| usage.pointer(name)?.as_u64());
    let beside = first(&["/cache_read_input_tokens"]).unwrap_or(0)
        + first(&["/cache_creation_input_tokens"]).unwrap_or(0);
    Some((
        first(&["/prompt_tokens", "/input_tokens"]).map(|prompt| prompt + beside),
        first(&["/completion_tokens", "/output_tokens"]),
        first(&[
            "/prompt_tokens_details/cached_tokens",
            "/input_tokens_details/cached_tokens",
            "/cache_read_input_tokens",
        ]),
    ))
}

fn finish_reason(documents: &[Value]) -> Option<String> {
    last(documents, |document| {
        let places = [
            "/choices/0/finish_reason",
            "/stop_reason",
            "/delta/stop_reason",
            "/incomplete_details/reason",
            "/response/incomplete_details/reason",
        ];
        places
            .iter()
            .find_map(|place| document.pointer(place)?.as_str().map(str::to_owned))
    })
}

fn model(documents: &[Value], request: &[u8]) -> String {
    let said = last(documents, |document| {
        let places = ["/model", "/response/model", "/message/model"];
        places
            .iter()
            .find_map(|place| document.pointer(place)?.as_str().map(str::to_owned))
    });
    // By the text, since the body that is no JSON names a model too.
    let asked = text(body(request))
        .split_once("\"model\": \"")
        .map(|(_, rest)| rest.split('"').next().unwrap_or_default().to_owned());
    said.or(asked).unwrap_or_default()
}

/// Holds an event against the response that the upstream gave, the request, and the identity in it.
pub fn assert_event(name: &str, event: &RequestEvent, request: &[u8], upstream: &[u8], aborted: bool) {
    let documents = documents(upstream);
    let request_head = text(head(request));
    let field = |wanted: &str| {
        let value = request_head
            .lines()
            .find_map(|line| line.strip_prefix(wanted)?.strip_prefix(": "));
        value.unwrap_or_default().to_owned()
    };
    let who = [&*event.team_id, &event.project, &event.user_id].map(str::to_owned);
    assert_eq!(
        who,
        [field("X-Team-ID"), field("X-Project"), field("X-User-ID")],
        "{name}"
    );
    let path = request_head.split(' ').nth(1).expect("a target");
    assert_eq!(
        event.endpoint,
        if path == "/v1/nope" { "other" } else { path },
        "{name}"
    );
    let upstream_head = text(head(upstream));
    let status: u16 = upstream_head[9..12].parse().expect("a status");
    let outcome = match status {
        _ if aborted => Outcome::Aborted,
        200 => Outcome::Completed,
        _ => Outcome::ClientError,
    };
    assert_eq!((event.status_code, event.outcome), (status, outcome), "{name}");
    assert_eq!(
        event.stream,
        upstream_head.contains("text/event-stream"),
        "{name}"
    );
    assert_eq!(&*event.model, model(&documents, request), "{name}");
    assert_eq!(
        &*event.finish_reason,
        finish_reason(&documents).unwrap_or_default(),
        "{name}"
    );
    assert_eq!(event.capture, CapturedBy::Proxy, "{name}");
    let (billed, source) = match usage(&documents) {
        Some(usage) if aborted => (Some(usage), UsageSource::Continuous),
        Some(usage) => (Some(usage), UsageSource::Reported),
        None if event.stream => (None, UsageSource::Counted),
        None => (None, UsageSource::None),
    };
    let (prompt, completion, cached) = billed.unwrap_or_default();
    assert_eq!(event.usage_source, source, "{name}");
    assert_eq!(
        (event.prompt_tokens, event.completion_tokens, event.cached_tokens),
        (prompt, completion, cached),
        "{name}"
    );
}

/// Holds the engine's tokens of these events against the counters of the capture.
pub fn assert_engine_tokens(capture: &Capture, events: &[RequestEvent]) -> bool {
    let sum = |of: fn(&RequestEvent) -> Option<u64>| events.iter().map(of).sum::<Option<u64>>();
    let Some(prompt) = sum(|event| event.engine_prompt_tokens) else {
        return false;
    };
    assert_eq!(
        prompt,
        capture.counter("vllm:prompt_tokens_total"),
        "{}",
        capture.name
    );
    let generated = sum(|event| Some(event.engine_completion_tokens.unwrap_or(0)));
    assert_eq!(
        generated,
        Some(capture.counter("vllm:generation_tokens_total")),
        "{}",
        capture.name
    );
    let cached = sum(|event| Some(event.cached_tokens.unwrap_or(0)));
    assert_eq!(
        cached,
        Some(capture.counter("vllm:prompt_tokens_cached_total")),
        "{}",
        capture.name
    );
    true
}
