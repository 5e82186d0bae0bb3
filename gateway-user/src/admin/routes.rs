//! What the admin server answers.

use super::readiness::{Readiness, State};
use crate::metrics::{CONTENT_TYPE, Metrics};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE as CONTENT_TYPE_HEADER, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Scrapes in memory at a time, from the first family to the last byte sent. At the default limits one can be 50 MB.
const SCRAPES_MAX: usize = 4;

/// How long a scrape waits for one of those to end. Less than the 10 s after which Prometheus gives up, so that it learns why.
const SCRAPE_WAIT: Duration = Duration::from_secs(5);

/// A response, whole.
pub(super) type Answer = Response<Full<Bytes>>;

/// What the routes answer from.
pub(super) struct Routes {
    metrics: Metrics,
    readiness: Readiness,
    started: Instant,
    scrapes: Arc<Semaphore>,
}

impl Routes {
    pub(super) fn new(metrics: Metrics, readiness: Readiness) -> Routes {
        let scrapes = Arc::new(Semaphore::new(SCRAPES_MAX));
        Routes {
            metrics,
            readiness,
            started: Instant::now(),
            scrapes,
        }
    }

    /// The answer to a request; that to `HEAD` is cut to its head by the server.
    pub(super) async fn answer<B>(&self, request: Request<B>) -> Answer {
        let path = request.uri().path();
        if !["/metrics", "/health", "/ready"].contains(&path) {
            let message = "no such page here; there are /metrics, /health and /ready";
            return error(StatusCode::NOT_FOUND, "not_found", message);
        }
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            let mut answer = error(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this page is only there to be read: GET or HEAD",
            );
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        match path {
            "/metrics" => self.metrics().await,
            "/health" => self.health(),
            _ => self.ready(),
        }
    }

    async fn metrics(&self) -> Answer {
        let waiting = tokio::time::timeout(SCRAPE_WAIT, Arc::clone(&self.scrapes).acquire_owned());
        let Ok(Ok(permit)) = waiting.await else {
            let message = "too many scrapes at a time; scrape from fewer places, or less often";
            let mut answer = error(StatusCode::SERVICE_UNAVAILABLE, "too_many_scrapes", message);
            answer
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from_static("15"));
            return answer;
        };
        let metrics = self.metrics.clone();
        match tokio::task::spawn_blocking(move || metrics.encode()).await {
            Ok(Ok(text)) => {
                let body = Bytes::from_owner(Scrape {
                    text,
                    _permit: permit,
                });
                respond(StatusCode::OK, CONTENT_TYPE, body)
            }
            Ok(Err(failure)) => {
                tracing::error!(%failure, "metrics cannot be encoded");
                error(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "metrics_failed",
                    "metrics cannot be encoded; see the log",
                )
            }
            Err(failure) => {
                tracing::error!(%failure, "the scrape did not end");
                error(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "metrics_failed",
                    "the scrape did not end; see the log",
                )
            }
        }
    }

    fn health(&self) -> Answer {
        let uptime_s = self.started.elapsed().as_secs();
        json(
            StatusCode::OK,
            &json!({"status": "alive", "version": env!("CARGO_PKG_VERSION"), "uptime_s": uptime_s}),
        )
    }

    fn ready(&self) -> Answer {
        let (state, why) = match self.readiness.get() {
            State::Ready => return json(StatusCode::OK, &json!({"ready": true, "state": "ready"})),
            State::Starting(why) => ("starting", why),
            State::Draining => (
                "draining",
                "the gateway is ending; requests that run are finished first",
            ),
        };
        json(
            StatusCode::SERVICE_UNAVAILABLE,
            &json!({"ready": false, "state": state, "why": why}),
        )
    }
}

/// The text of a scrape. The permit goes back when the last byte has left, not when the text is ready.
struct Scrape {
    text: String,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Scrape {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

fn error(status: StatusCode, kind: &str, message: &str) -> Answer {
    json(status, &json!({"error": {"type": kind, "message": message}}))
}

fn json(status: StatusCode, value: &Value) -> Answer {
    respond(status, "application/json", Bytes::from(format!("{value}\n")))
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE_HEADER, HeaderValue::from_static(content_type));
    // A proxy that kept one of these would tell of a gateway that has long since changed.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
