//! The options that a vLLM server was started with, as far as they matter here and show in what it answers.
//!
//! Nothing is guessed from versions. `--enable-request-id-headers` shows on every answer; the others show only in answers of the engine,
//! which is asked (for one token, twice) only where the operator said so.

use super::Check;
use super::upstream::{Asking, Said};
use crate::config::Serves;
use hyper::StatusCode;
use serde_json::{Value, json};

/// The id of everything that is asked. It is no secret, and tells an operator who reads vLLM's log where it comes from.
pub(super) const REQUEST_ID: &str = "vllm-gateway-doctor";

/// What the options are for, in the order of the table: the name, the option, and what is lost without it.
const FORCED: &str = "forced usage";
const DETAILS: &str = "prompt details";
const TIMINGS: &str = "request metrics";

/// What an unstreamed and a streamed answer show.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shown {
    /// Usage on chunks of a stream that asked for it at its end only.
    forced: bool,
    /// `prompt_tokens_details` within usage.
    details: bool,
    /// `metrics` beside usage.
    timings: bool,
}

pub(super) async fn checks(asking: &Asking, group: &str, model: Option<&str>) -> Vec<Check> {
    let mut checks = vec![id_headers(asking, group).await];
    if asking.upstream.serves == Serves::Embeddings {
        checks.extend(embeddings(asking, group, model).await);
        return checks;
    }
    let Some(model) = model.filter(|_| asking.probe_requests) else {
        let why = if asking.probe_requests {
            "not tried without a model"
        } else {
            "not tried"
        };
        let advise = "run with --probe-requests, which sends two requests of one token";
        checks.extend([FORCED, DETAILS, TIMINGS].map(|name| Check::unknown(group, name, why).advise(advise)));
        return checks;
    };
    match shown(asking, model).await {
        Ok(shown) => checks.extend(judged(group, &shown)),
        Err(error) => checks.push(refused(group, "probe requests", error)),
    }
    checks
}

/// The middleware behind the option puts the header on every answer.
async fn id_headers(asking: &Asking, group: &str) -> Check {
    match asking.get("/version").await {
        Ok(said) if said.headers.contains_key("x-request-id") => Check::ok(
            group,
            "id headers",
            "X-Request-Id comes back (--enable-request-id-headers)",
        ),
        Ok(_) => Check::ok(
            group,
            "id headers",
            "X-Request-Id does not come back; the gateway gives clients theirs by itself",
        ),
        Err(error) => Check::unknown(group, "id headers", error),
    }
}

async fn embeddings(asking: &Asking, group: &str, model: Option<&str>) -> Option<Check> {
    let model = model.filter(|_| asking.probe_requests)?;
    let answered = asking
        .post("/v1/embeddings", &json!({"model": model, "input": "hi"}))
        .await;
    Some(match answered.and_then(document) {
        Ok(answer) if answer["usage"]["prompt_tokens"].is_u64() => {
            Check::ok(group, "embeddings", "one request was answered, with its usage")
        }
        Ok(_) => Check::warning(group, "embeddings", "one request was answered, without usage")
            .advise("its tokens stay unknown"),
        Err(error) => refused(group, "embeddings", error),
    })
}

fn refused(group: &str, name: &'static str, error: String) -> Check {
    Check::problem(group, name, error)
        .advise("check with curl whether the upstream answers such a request, and upstreams[].serves")
}

/// Asks for one token twice: whole, and streamed with usage at the end. A model without a chat template is asked to complete text.
async fn shown(asking: &Asking, model: &str) -> Result<Shown, String> {
    let chat = json!({"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]});
    let text = json!({"model": model, "max_tokens": 1, "prompt": "hi"});
    let mut refused = String::new();
    for (path, mut request) in [("/v1/chat/completions", chat), ("/v1/completions", text)] {
        match asking.post(path, &request).await.and_then(document) {
            Ok(answer) => {
                request["stream"] = true.into();
                request["stream_options"] = json!({"include_usage": true});
                let streamed = asking.post(path, &request).await.and_then(whole)?;
                return Ok(read(&answer, &String::from_utf8_lossy(&streamed.body)));
            }
            Err(error) => refused = format!("{path}: {error}"),
        }
    }
    Err(refused)
}

fn whole(said: Said) -> Result<Said, String> {
    match said.status {
        StatusCode::OK => Ok(said),
        status => Err(format!("answered with {status}")),
    }
}

fn document(said: Said) -> Result<Value, String> {
    serde_json::from_slice(&whole(said)?.body).map_err(|_| "answered with no JSON".to_owned())
}

/// Whatever either answer shows counts: older servers leave details out where nothing was cached, or on streams.
fn read(answer: &Value, streamed: &str) -> Shown {
    let events = streamed.lines().filter_map(|line| line.strip_prefix("data: "));
    let chunks: Vec<Value> = events
        .filter_map(|event| serde_json::from_str(event).ok())
        .collect();
    let has_choices = |chunk: &&Value| {
        chunk["choices"]
            .as_array()
            .is_some_and(|choices| !choices.is_empty())
    };
    let all = || chunks.iter().chain([answer]);
    Shown {
        forced: chunks
            .iter()
            .filter(has_choices)
            .any(|chunk| chunk["usage"].is_object()),
        details: all().any(|said| said["usage"]["prompt_tokens_details"].is_object()),
        timings: all().any(|said| said["metrics"].is_object()),
    }
}

fn judged(group: &str, shown: &Shown) -> [Check; 3] {
    let forced = if shown.forced {
        Check::ok(group, FORCED, "on: every stream carries usage on every chunk (--enable-force-include-usage)")
            .advise("clients get it whether they asked or not, with and without a gateway; the tap counts direct streams exactly")
    } else {
        Check::ok(group, FORCED, "off").advise(
            "the proxy asks for usage by itself; for tokens of streams that go past the proxy, start vLLM with --enable-force-include-usage",
        )
    };
    let details = if shown.details {
        Check::ok(
            group,
            DETAILS,
            "on: cached prompt tokens are told (--enable-prompt-tokens-details)",
        )
    } else {
        Check::warning(group, DETAILS, "off, or left out because nothing was cached").advise(
            "start vLLM with --enable-prompt-tokens-details: else cached prompt tokens are unknown and weigh as much as computed ones",
        )
    };
    let timings = if shown.timings {
        Check::ok(
            group,
            TIMINGS,
            "on: each answer tells its time in the queue (--enable-per-request-metrics)",
        )
    } else {
        Check::ok(group, TIMINGS, "off")
            .advise("for exact queue times, start vLLM with --enable-per-request-metrics")
    };
    [forced, details, timings]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The body of a captured answer, chunk sizes and all: they stand on lines of their own.
    fn captured(response: &str) -> &str {
        response.split_once("\r\n\r\n").unwrap().1
    }

    macro_rules! fixture {
        ($name:literal) => {
            captured(include_str!(concat!(
                "../../tests/fixtures/vllm-0.32.0/",
                $name,
                ".response"
            )))
        };
    }

    fn of(document: &str, streamed: &str) -> Shown {
        read(&serde_json::from_str(document).unwrap_or_default(), streamed)
    }

    #[test]
    fn real_answers_show_what_the_server_was_started_with() {
        let chat = fixture!("chat");
        let stream = fixture!("chat_stream_usage");
        let expected = Shown {
            forced: false,
            details: true,
            timings: false,
        };
        assert_eq!(of(chat, stream), expected);
        assert!(of(fixture!("chat_request_metrics"), stream).timings);
        assert!(of(chat, fixture!("chat_stream_continuous_usage")).forced);
        let bare = chat.replace(
            r#"{"cached_tokens":0,"created_cache_tokens":0,"multimodal_tokens":null}"#,
            "null",
        );
        assert_eq!(of(&bare, fixture!("chat_stream_no_usage")), Shown::default());
    }
}
