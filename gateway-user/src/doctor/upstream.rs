//! Whether an upstream answers, as what, and for how long it keeps a connection.

use super::{Check, exposition, flags, tls};
use crate::config::{UpstreamConfig, quote};
use crate::vllm::fetch::{self, FetchError, Kept};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderValue};
use hyper::http::request::Builder;
use hyper::{HeaderMap, StatusCode};
use serde_json::Value;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

/// A host that has not answered by then is not there; a longer `proxy.connect_timeout` would only make the table late.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// For one question. A server that is loading its model answers none.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(4);

/// For a name server.
const RESOLVE_LIMIT: Duration = Duration::from_secs(3);

/// Longest answer that is read: a list of some thousand adapters.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How long is waited for a server to drop an idle connection. vLLM does after 5 s.
const KEEP_ALIVE_WATCH: Duration = Duration::from_secs(6);

/// Time that a request takes to reach a connection that is just being closed, and then some.
const KEEP_ALIVE_MARGIN: Duration = Duration::from_millis(200);

/// Clocks that differ by less disturb no window of 15 s.
const SKEW_MAX: Duration = Duration::from_secs(5);

/// Models that are listed by name; a site with adapters can have hundreds.
const NAMES_SHOWN: usize = 5;

/// What is to be found out of whom.
pub(super) struct Asking {
    /// The server.
    pub upstream: UpstreamConfig,
    /// When the gateway drops an idle connection to it.
    pub upstream_idle: Duration,
    /// For a connection to be made.
    pub connect_limit: Duration,
    /// Whether its engine may be used.
    pub probe_requests: bool,
    /// What it asks of clients, if the operator gave it.
    pub api_key: Option<HeaderValue>,
}

/// The value of `Authorization` for the key that `vllm serve` itself reads from this variable.
pub(super) fn api_key(variable: fn(&str) -> Option<OsString>) -> Option<HeaderValue> {
    let key = variable("VLLM_API_KEY")?.into_string().ok()?;
    let mut value = HeaderValue::try_from(format!("Bearer {key}")).ok()?;
    value.set_sensitive(true);
    (!key.is_empty()).then_some(value)
}

/// What a server said.
pub(super) struct Said {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Asking {
    /// The name of its lines.
    pub fn group(&self) -> String {
        format!("upstream {}", self.upstream.name)
    }

    /// Asks for a path.
    pub async fn get(&self, path: &str) -> Result<Said, String> {
        self.ask(fetch::get(&self.upstream.url, path), Bytes::new()).await
    }

    /// Sends a document to a path.
    pub async fn post(&self, path: &str, document: &Value) -> Result<Said, String> {
        let request = fetch::post(&self.upstream.url, path).header(CONTENT_TYPE, "application/json");
        self.ask(request, document.to_string().into()).await
    }

    async fn ask(&self, mut request: Builder, body: Bytes) -> Result<Said, String> {
        if let Some(key) = &self.api_key {
            request = request.header(AUTHORIZATION, key);
        }
        request = request.header("x-request-id", flags::REQUEST_ID);
        let whole = async {
            let answer = fetch::send(&self.upstream.url, request, body, self.connect_limit).await?;
            Ok(Said {
                status: answer.status(),
                headers: answer.headers().clone(),
                body: answer.body(BODY_BYTES_MAX).await?,
            })
        };
        match timeout(ANSWER_LIMIT, whole).await {
            Ok(answered) => answered.map_err(|error: FetchError| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", ANSWER_LIMIT.as_secs())),
        }
    }
}

/// Everything about one upstream. One that cannot be reached has only the line that says so.
pub(super) async fn checks(asking: Asking) -> Vec<Check> {
    let group = asking.group();
    let reached = match reach(&asking, &group).await {
        Ok(check) => check,
        Err(check) => return vec![check],
    };
    let mut checks = vec![reached];
    match health(&asking, &group).await {
        Ok(found) => checks.extend(found),
        Err(check) => {
            checks.push(check);
            return checks;
        }
    }
    let (version, (models, flags), metrics, keep_alive) = tokio::join!(
        version(&asking, &group),
        async {
            let (models, model) = models(&asking, &group).await;
            (models, flags::checks(&asking, &group, model.as_deref()).await)
        },
        exposition::checks(&asking, &group),
        keep_alive(&asking, &group),
    );
    checks.extend([version, models]);
    checks.extend(metrics);
    checks.push(keep_alive);
    checks.extend(flags);
    checks
}

/// Resolves the name and connects, as the gateway does.
async fn reach(asking: &Asking, group: &str) -> Result<Check, Check> {
    let url = &asking.upstream.url;
    let problem = |found: String| {
        Check::problem(group, "reach", format!("{url}: {found}")).advise(format!(
            "start it, or correct the url of upstream {} (VLLM_URL)",
            asking.upstream.name
        ))
    };
    let resolved = match timeout(RESOLVE_LIMIT, lookup_host((url.host(), url.port()))).await {
        Ok(Ok(addresses)) => addresses.collect::<Vec<SocketAddr>>(),
        Ok(Err(error)) => return Err(problem(format!("the name is not known: {error}"))),
        Err(_) => return Err(problem("no answer of a name server in time".to_owned())),
    };
    let started = Instant::now();
    let connecting = timeout(asking.connect_limit, TcpStream::connect(&*resolved)).await;
    let stream = match connecting.unwrap_or_else(|late| Err(late.into())) {
        Ok(stream) => stream,
        Err(error) => return Err(problem(format!("cannot connect: {error}"))),
    };
    let took_ms = started.elapsed().as_secs_f64() * 1e3;
    let peer = stream
        .peer_addr()
        .map_or_else(|_| url.authority(), |peer| peer.to_string());
    let found = format!("{peer}, connected within {took_ms:.1} ms");
    // A name of this machine often has an address of each family.
    let several = [SocketAddr::is_ipv4, SocketAddr::is_ipv6]
        .map(|family| resolved.iter().filter(|address| family(address)).count())
        .into_iter()
        .max()
        .filter(|count| *count > 1);
    Ok(match several {
        None => Check::ok(group, "reach", found),
        Some(count) => Check::warning(
            group,
            "reach",
            format!("{found}; {} has {count} addresses", url.host()),
        )
        .advise("several servers behind one name cannot be told apart: list each as an upstream of its own"),
    })
}

/// The path that the gateway asks over and over. Its answer tells the server's clock too.
async fn health(asking: &Asking, group: &str) -> Result<Vec<Check>, Check> {
    let path = &asking.upstream.health_path;
    let said = match asking.get(path).await {
        Ok(said) => said,
        Err(error) => return Err(tls::no_http(asking, group, &error).await),
    };
    let mut checks = vec![if said.status == StatusCode::OK {
        Check::ok(group, "health", format!("{path} answers 200"))
    } else {
        Check::problem(group, "health", format!("{path} answers {}", said.status)).advise(
            "the gateway counts it as down: wait for the model to be loaded, or set upstreams[].health_path",
        )
    }];
    checks.extend(skew(&said.headers, SystemTime::now(), group));
    Ok(checks)
}

/// How far the server's clock is from ours, if it says.
fn skew(headers: &HeaderMap, now: SystemTime, group: &str) -> Option<Check> {
    let theirs = httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()?;
    let (apart, which) = match now.duration_since(theirs) {
        Ok(behind) => (behind, "behind"),
        Err(ahead) => (ahead.duration(), "ahead of"),
    };
    (apart > SKEW_MAX).then(|| {
        Check::warning(group, "clock", format!("its clock is {} s {which} this machine's", apart.as_secs()))
            .advise("keep both clocks right: what vLLM and the gateway say of one moment would end up in different windows")
    })
}

async fn version(asking: &Asking, group: &str) -> Check {
    let said = match asking.get("/version").await {
        Ok(said) if said.status == StatusCode::OK => said,
        Ok(said) => {
            return Check::unknown(group, "version", format!("/version answers {}", said.status))
                .advise("vLLM has this route; another server may work too, if it speaks the same API");
        }
        Err(error) => return Check::unknown(group, "version", error),
    };
    match serde_json::from_slice::<Value>(&said.body)
        .ok()
        .as_ref()
        .and_then(|document| document["version"].as_str())
    {
        Some(version) => Check::ok(group, "version", format!("vLLM {}", shown(version))),
        None => Check::unknown(group, "version", "/version names none"),
    }
}

/// The models that are served, and the first one of them.
async fn models(asking: &Asking, group: &str) -> (Check, Option<String>) {
    let said = match asking.get("/v1/models").await {
        Ok(said) => said,
        Err(error) => return (Check::problem(group, "models", error), None),
    };
    if matches!(said.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        let check = Check::unknown(group, "models", format!("/v1/models answers {}", said.status)).advise(
            "it asks for an API key, which clients send through the gateway; set VLLM_API_KEY to let this command look too",
        );
        return (check, None);
    }
    let document: Value = serde_json::from_slice(&said.body).unwrap_or_default();
    let listed = document["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names: Vec<&str> = listed.iter().filter_map(|model| model["id"].as_str()).collect();
    let first = names.first().map(|name| (*name).to_owned());
    (
        models_check(group, said.status, &names, &asking.upstream.models),
        first,
    )
}

fn models_check(group: &str, status: StatusCode, served: &[&str], configured: &[String]) -> Check {
    if served.is_empty() {
        return Check::problem(
            group,
            "models",
            format!("/v1/models answers {status} and names no model"),
        )
        .advise("check that this address is a vLLM server, and that its model is loaded");
    }
    let missing: Vec<String> = configured
        .iter()
        .filter(|model| !served.contains(&model.as_str()))
        .map(|model| shown(model))
        .collect();
    let found = listing(served);
    if missing.is_empty() {
        return Check::ok(group, "models", found);
    }
    Check::problem(group, "models", format!("{found}; not served: {}", missing.join(", "))).advise(
        "upstreams[].models names models that the server does not: requests for them would be answered with 404. \
         Correct the list, or leave it out for any model",
    )
}

/// Names, cut.
fn listing(names: &[&str]) -> String {
    let mut text = names
        .iter()
        .take(NAMES_SHOWN)
        .map(|name| shown(name))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > NAMES_SHOWN {
        text += &format!(" and {} more", names.len() - NAMES_SHOWN);
    }
    text
}

/// What a server said, harmless in a terminal and not too long.
pub(super) fn shown(text: &str) -> String {
    quote(text).trim_matches('`').to_owned()
}

/// Keeps a connection idle until the gateway would drop it, and sees whether the server is faster: then requests would be sent into
/// connections that are being closed.
async fn keep_alive(asking: &Asking, group: &str) -> Check {
    let idle = asking.upstream_idle;
    let needed = idle + KEEP_ALIVE_MARGIN;
    let mut kept = match Kept::open(&asking.upstream.url, asking.connect_limit).await {
        Ok(kept) => kept,
        Err(error) => return Check::unknown(group, "keep-alive", error.to_string()),
    };
    let request = fetch::get(&asking.upstream.url, &asking.upstream.health_path);
    match timeout(ANSWER_LIMIT, kept.ask(request, BODY_BYTES_MAX)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Check::unknown(group, "keep-alive", error.to_string()),
        Err(_) => return Check::unknown(group, "keep-alive", "no answer in time"),
    }
    let started = Instant::now();
    let closed = timeout(needed.min(KEEP_ALIVE_WATCH), kept.closed()).await.is_ok();
    let kept_for_s = started.elapsed().as_secs_f64();
    let pool = format!("the gateway drops them after {idle:?} (proxy.upstream_idle)");
    if closed {
        return Check::warning(group, "keep-alive", format!("it closes idle connections after {kept_for_s:.1} s, {pool}"))
            .advise("set proxy.upstream_idle well below that: a request that meets a connection being closed is sent again at best");
    }
    if needed > KEEP_ALIVE_WATCH {
        return Check::unknown(
            group,
            "keep-alive",
            format!("longer than {kept_for_s:.1} s, which is as long as was waited; {pool}"),
        );
    }
    Check::ok(
        group,
        "keep-alive",
        format!("idle connections are kept longer than {kept_for_s:.1} s; {pool}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_configured_model_that_is_not_served_is_a_problem() {
        let check = |served: &[&str], configured: &[&str]| {
            let configured: Vec<String> = configured.iter().map(|name| (*name).to_owned()).collect();
            models_check("g", StatusCode::OK, served, &configured)
        };
        assert_eq!(check(&["a", "b"], &["b"]).state, State::Ok);
        assert_eq!(check(&["a"], &[]).state, State::Ok);
        let missing = check(&["a"], &["a", "c"]);
        assert_eq!(
            (missing.state, &*missing.found),
            (State::Problem, "a; not served: c")
        );
        assert_eq!(check(&[], &[]).state, State::Problem);
        let many = check(&["1", "2", "3", "4", "5", "6", "7"], &[]);
        assert_eq!(many.found, "1, 2, 3, 4, 5 and 2 more");
    }

    #[test]
    fn what_a_server_says_cannot_forge_lines() {
        assert_eq!(shown("a\nok  kernel"), "a\\nok  kernel");
        assert!(shown(&"x".repeat(1000)).chars().count() < 70);
    }

    #[test]
    fn clocks_that_are_apart_are_told_with_their_direction() {
        let now = httpdate::parse_http_date("Thu, 01 Jan 2026 00:00:30 GMT").unwrap();
        let found = |date: &'static str| {
            let headers = HeaderMap::from_iter([(DATE, HeaderValue::from_static(date))]);
            skew(&headers, now, "g").map(|check| check.found)
        };
        assert_eq!(found("Thu, 01 Jan 2026 00:00:26 GMT"), None);
        assert_eq!(
            found("Thu, 01 Jan 2026 00:00:00 GMT").unwrap(),
            "its clock is 30 s behind this machine's"
        );
        assert_eq!(
            found("Thu, 01 Jan 2026 00:01:30 GMT").unwrap(),
            "its clock is 60 s ahead of this machine's"
        );
        assert_eq!(found("yesterday"), None);
    }

    #[test]
    fn a_key_is_sent_and_never_shown() {
        let key = api_key(|name| (name == "VLLM_API_KEY").then(|| "hunter2".into())).unwrap();
        assert_eq!(key.to_str().unwrap(), "Bearer hunter2");
        assert!(!format!("{key:?}").contains("hunter2"));
        assert_eq!(api_key(|_| None), None);
        assert_eq!(api_key(|_| Some("".into())), None);
    }
}
