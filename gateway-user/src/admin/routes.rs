//! What the admin server answers.

use super::access::{Access, Denied};
use super::answer::{Answer, denied, document, error, not_allowed, not_found, respond};
use super::page;
use super::readiness::{Readiness, State};
use super::stream::Streams;
use crate::live::{REQUESTS_MAX, Show, View};
use crate::metrics::{CONTENT_TYPE, Metrics};
use bytes::Bytes;
use hyper::header::{HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, StatusCode};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Scrapes in memory at a time, from the first family to the last byte sent. At the default limits one can be 50 MB.
const SCRAPES_MAX: usize = 4;

/// How long a scrape waits for one of those to end. Less than the 10 s after which Prometheus gives up, so that it learns why.
const SCRAPE_WAIT: Duration = Duration::from_secs(5);

/// What the routes answer from.
pub(super) struct Routes {
    pub(super) metrics: Metrics,
    pub(super) readiness: Readiness,
    pub(super) view: Arc<View>,
    pub(super) access: Access,
    pub(super) started: Instant,
    pub(super) scrapes: Arc<Semaphore>,
}

/// What a path means.
#[derive(Clone, Copy, Debug)]
enum Page {
    Metrics,
    Health,
    Ready,
    Console,
    Teams,
    Upstreams,
    Requests,
    Reconciliation,
    Live,
}

impl Page {
    fn at(path: &str) -> Option<Page> {
        Some(match path {
            "/metrics" => Page::Metrics,
            "/health" => Page::Health,
            "/ready" => Page::Ready,
            "/api/teams" => Page::Teams,
            "/api/upstreams" => Page::Upstreams,
            "/api/requests" => Page::Requests,
            "/api/reconciliation" => Page::Reconciliation,
            "/api/live" => Page::Live,
            _ if page::file(path).is_some() => Page::Console,
            _ => return None,
        })
    }
}

impl Routes {
    pub(super) fn new(metrics: Metrics, readiness: Readiness, view: Arc<View>, access: Access) -> Routes {
        Routes {
            metrics,
            readiness,
            view,
            access,
            started: Instant::now(),
            scrapes: Arc::new(Semaphore::new(SCRAPES_MAX)),
        }
    }

    /// The answer to a request; that to `HEAD` is cut to its head by the server.
    pub(super) async fn answer<B>(&self, request: Request<B>, streams: &Streams) -> Answer {
        let Some(page) = Page::at(request.uri().path()) else {
            return not_found();
        };
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            return not_allowed();
        }
        self.page(page, &request, streams)
            .await
            .unwrap_or_else(|why| denied(&why))
    }

    async fn page<B>(&self, page: Page, request: &Request<B>, streams: &Streams) -> Result<Answer, Denied> {
        let headers = request.headers();
        let figures = || self.access.to_figures(headers);
        Ok(match page {
            Page::Health => self.health(),
            Page::Ready => self.ready(),
            Page::Metrics => {
                self.access.to_metrics(headers)?;
                self.metrics().await
            }
            Page::Console => {
                self.access.page(headers)?;
                page::file(request.uri().path()).unwrap_or_else(not_found)
            }
            Page::Teams => document(StatusCode::OK, &self.view.teams(&figures()?)),
            Page::Upstreams => document(StatusCode::OK, &self.view.upstreams(&figures()?)),
            Page::Requests => self.requests(&figures()?, request.uri().query()),
            Page::Reconciliation => {
                self.access.to_all(headers)?;
                document(StatusCode::OK, &self.view.reconciliation())
            }
            Page::Live => {
                let show = figures()?;
                // A stream that is only asked for its head has no end that the server could wait for.
                if request.method() == Method::HEAD {
                    return Ok(respond(StatusCode::OK, "text/event-stream", Bytes::new()));
                }
                streams.open(&self.view, show)
            }
        })
    }

    fn requests(&self, show: &Show, query: Option<&str>) -> Answer {
        let limit = query
            .unwrap_or_default()
            .split('&')
            .find_map(|pair| pair.strip_prefix("limit="));
        let Some(limit) = limit else {
            return document(StatusCode::OK, &self.view.requests(show, REQUESTS_MAX));
        };
        let rows_max = limit
            .parse()
            .ok()
            .filter(|rows| (1..=REQUESTS_MAX).contains(rows));
        match rows_max {
            Some(rows_max) => document(StatusCode::OK, &self.view.requests(show, rows_max)),
            None => {
                let message = format!("limit: expected a number from 1 to {REQUESTS_MAX}");
                error(StatusCode::BAD_REQUEST, "bad_limit", &message)
            }
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
        document(
            StatusCode::OK,
            &json!({"status": "alive", "version": env!("CARGO_PKG_VERSION"), "uptime_s": uptime_s}),
        )
    }

    fn ready(&self) -> Answer {
        let (state, why) = match self.readiness.get() {
            State::Ready => return document(StatusCode::OK, &json!({"ready": true, "state": "ready"})),
            State::Starting(why) => ("starting", why),
            State::Draining => (
                "draining",
                "the gateway is ending; requests that run are finished first",
            ),
        };
        document(
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
