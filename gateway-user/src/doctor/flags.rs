//! The options that a vLLM server was started with, as far as they matter here and show in what it answers.
//!
//! Nothing is guessed from versions. `--enable-request-id-headers` shows on every answer; the others show only in answers of the engine,
//! which is asked (for one token, twice) only where the operator said so.

use super::Check;
use super::upstream::Asking;
use crate::config::Serves;
use hyper::StatusCode;
use hyper::body::Bytes;
use serde_json::{Value, json};

/// The id of everything that is asked. It is no secret, and tells an operator who reads vLLM's log where it comes from.
pub(super) const REQUEST_ID: &str = "vllm-gateway-doctor";

/// The lines, in the order of the table.
const FORCED: &str = "forced usage";
const DETAILS: &str = "prompt details";
const TIMINGS: &str = "request metrics";
const EMBEDDINGS: &str = "embeddings";

/// What an unstreamed and a streamed answer show.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Usage on chunks of a stream that asked for it at its end only.
    forced: bool,
    /// `prompt_tokens_details` within usage.
    details: bool,
    /// `metrics` beside usage.
    timings: bool,
}

pub(super) async fn checks(asking: &Asking, group: &str, model: Option<&str>) -> Vec<Check> {
    let mut checks = vec![id_headers(asking, group).await];
    let names: &[&'static str] = match asking.upstream.serves {
        Serves::Generate => &[FORCED, DETAILS, TIMINGS],
        Serves::Embeddings => &[EMBEDDINGS],
    };
    let tried = match (model, asking.upstream.serves) {
        (Some(model), Serves::Generate) if asking.probe_requests => generate(asking, model)
            .await
            .map(|seen| judged(group, &seen).to_vec()),
        (Some(model), Serves::Embeddings) if asking.probe_requests => {
            embed(asking, group, model).await.map(|check| vec![check])
        }
        _ => Ok(names.iter().map(|name| not_tried(asking, group, name)).collect()),
    };
    checks.extend(tried.unwrap_or_else(|refusal| vec![refused(group, &refusal)]));
    checks
}

fn not_tried(asking: &Asking, group: &str, name: &'static str) -> Check {
    if asking.probe_requests {
        return Check::unknown(group, name, "not tried without a model");
    }
    let check = Check::unknown(group, name, "not tried");
    // Said once is enough.
    match name {
        FORCED | EMBEDDINGS => check
            .advise("run with --probe-requests, which lets the engine answer one or two requests of a token"),
        _ => check,
    }
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

async fn embed(asking: &Asking, group: &str, model: &str) -> Result<Check, Refusal> {
    let answer = ask(asking, "/v1/embeddings", &json!({"model": model, "input": "hi"})).await?;
    Ok(match document(&answer)?["usage"]["prompt_tokens"].is_u64() {
        true => Check::ok(group, EMBEDDINGS, "one request was answered, with its usage"),
        false => Check::warning(group, EMBEDDINGS, "one request was answered, without usage")
            .advise("the tokens of such requests stay unknown"),
    })
}

/// Asks for one token twice: whole, and streamed with usage at the end. A model without a chat template is asked to complete text.
async fn generate(asking: &Asking, model: &str) -> Result<Seen, Refusal> {
    let chat = json!({"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]});
    let text = json!({"model": model, "max_tokens": 1, "prompt": "hi"});
    let (path, mut request, answer) = match ask(asking, "/v1/chat/completions", &chat).await {
        Err(Refusal::Status(_)) => {
            let answer = ask(asking, "/v1/completions", &text).await?;
            ("/v1/completions", text, answer)
        }
        answer => ("/v1/chat/completions", chat, answer?),
    };
    request["stream"] = true.into();
    request["stream_options"] = json!({"include_usage": true});
    let streamed = ask(asking, path, &request).await?;
    Ok(read(&document(&answer)?, &String::from_utf8_lossy(&streamed)))
}

/// Why a request gave nothing to look at.
enum Refusal {
    /// The server would not.
    Status(StatusCode),
    /// It did not answer, which a busy engine may not do in the time that is given here.
    Unanswered(String),
}

async fn ask(asking: &Asking, path: &str, request: &Value) -> Result<Bytes, Refusal> {
    let said = asking.post(path, request).await.map_err(Refusal::Unanswered)?;
    match said.status {
        StatusCode::OK => Ok(said.body),
        status => Err(Refusal::Status(status)),
    }
}

fn document(body: &[u8]) -> Result<Value, Refusal> {
    serde_json::from_slice(body).map_err(|_| Refusal::Unanswered("the answer is no JSON".to_owned()))
}

fn refused(group: &str, refusal: &Refusal) -> Check {
    const NAME: &str = "probe requests";
    match refusal {
        Refusal::Status(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            Check::unknown(group, NAME, "it asks for an API key").advise("set VLLM_API_KEY")
        }
        Refusal::Status(status) => Check::problem(group, NAME, format!("answered with {status}"))
            .advise("check with curl whether the upstream answers such a request, and upstreams[].serves"),
        Refusal::Unanswered(error) => {
            Check::unknown(group, NAME, error.as_str()).advise("try again when the engine is less busy")
        }
    }
}

/// Whatever either answer shows counts: older servers leave details out where nothing was cached, or on streams.
fn read(answer: &Value, streamed: &str) -> Seen {
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
    Seen {
        forced: chunks
            .iter()
            .filter(has_choices)
            .any(|chunk| chunk["usage"].is_object()),
        details: all().any(|said| said["usage"]["prompt_tokens_details"].is_object()),
        timings: all().any(|said| said["metrics"].is_object()),
    }
}

fn judged(group: &str, seen: &Seen) -> [Check; 3] {
    let forced = if seen.forced {
        Check::ok(group, FORCED, "on: every stream carries usage on every chunk (--enable-force-include-usage)")
            .advise("clients get it whether they asked or not, with and without a gateway; the tap counts direct streams exactly")
    } else {
        Check::ok(group, FORCED, "off").advise(
            "the proxy asks for usage by itself; for tokens of streams that go past the proxy, start vLLM with --enable-force-include-usage",
        )
    };
    let details = if seen.details {
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
    let timings = if seen.timings {
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

    fn of(document: &str, streamed: &str) -> Seen {
        read(&serde_json::from_str(document).unwrap_or_default(), streamed)
    }

    #[test]
    fn real_answers_show_what_the_server_was_started_with() {
        let chat = fixture!("chat");
        let stream = fixture!("chat_stream_usage");
        let expected = Seen {
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
        assert_eq!(of(&bare, fixture!("chat_stream_no_usage")), Seen::default());
    }
}
