//! From a request to its answer: routes, faults, and the way through the engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::{Method, Request, Response};

use crate::body::{EventStream, SimBody};
use crate::engine::{Engine, Ticket};
use crate::faults::{Fault, Faults};
use crate::http::{Heads, REQUEST_ID};
use crate::metrics;
use crate::options::{Kind, Options};
use crate::pooling::{self, PoolingJob, PoolingRoute};
use crate::prompts::{render_chat, render_messages};
use crate::request::{Endpoint, Job, parse_body, resolve_model};
use crate::shapes::error::ApiError;
use crate::shapes::json::Js;
use crate::shapes::{self, Stamp, site};
use crate::sockets::SocketLog;
use crate::tokens::{Prompt, decode, encode, mix};

const NOT_FOUND: &str = r#"{"detail":"Not Found"}"#;
const METRICS_TYPE: &str = "text/plain; version=1.0.0; charset=utf-8";

/// Everything that answers need.
pub struct Site {
    /// The command line.
    pub options: Options,
    engine: Engine,
    heads: Heads,
    faults: Faults,
    fingerprint: Option<Arc<str>>,
    started_s: f64,
    ids: AtomicU64,
    /// 0 is awake; 1 and 2 are the levels of /sleep.
    sleep_level: AtomicU8,
    /// Filled with --log-sockets only.
    pub sockets: SocketLog,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Generate(Endpoint),
    Pool(PoolingRoute),
    CountTokens,
    Tokenize,
    Detokenize,
    Models,
    Empty,
    Version,
    Load,
    Metrics,
    SimRequests,
    SimTotals,
    SimSockets,
    Sleep,
    WakeUp,
    IsSleeping,
}

impl Route {
    fn of(path: &str, options: &Options) -> Option<Self> {
        let generate = options.kind == Kind::Generate;
        let route = match path {
            "/v1/chat/completions" if generate => Route::Generate(Endpoint::Chat),
            "/v1/completions" if generate => Route::Generate(Endpoint::Completions),
            "/v1/responses" if generate => Route::Generate(Endpoint::Responses),
            "/v1/messages" if generate => Route::Generate(Endpoint::Messages),
            "/v1/messages/count_tokens" if generate => Route::CountTokens,
            "/v1/embeddings" if !generate => Route::Pool(PoolingRoute::Embeddings),
            "/pooling" if !generate => Route::Pool(PoolingRoute::Pooling),
            "/score" | "/v1/score" if !generate => Route::Pool(PoolingRoute::Score),
            "/rerank" | "/v1/rerank" | "/v2/rerank" if !generate => Route::Pool(PoolingRoute::Rerank),
            "/tokenize" => Route::Tokenize,
            "/detokenize" => Route::Detokenize,
            "/v1/models" => Route::Models,
            "/health" | "/ping" => Route::Empty,
            "/version" => Route::Version,
            "/load" => Route::Load,
            "/metrics" => Route::Metrics,
            "/sleep" if options.dev_mode => Route::Sleep,
            "/wake_up" if options.dev_mode => Route::WakeUp,
            "/is_sleeping" if options.dev_mode => Route::IsSleeping,
            "/sim/requests" if options.introspect => Route::SimRequests,
            "/sim/totals" if options.introspect => Route::SimTotals,
            "/sim/sockets" if options.log_sockets => Route::SimSockets,
            _ => return None,
        };
        Some(route)
    }

    fn method(self) -> &'static str {
        match self {
            Route::Generate(_)
            | Route::Pool(_)
            | Route::CountTokens
            | Route::Tokenize
            | Route::Detokenize
            | Route::Sleep
            | Route::WakeUp => "POST",
            _ => "GET",
        }
    }
}

impl Site {
    /// A server with these options in front of `engine`.
    pub fn new(options: Options, engine: Engine) -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let fingerprint =
            (!options.system_fingerprint.is_empty()).then(|| Arc::from(options.system_fingerprint.as_str()));
        Site {
            engine,
            heads: Heads::default(),
            faults: Faults::new(&options),
            fingerprint,
            started_s: since_epoch.as_secs_f64(),
            // Ids must differ between runs, whatever the seed.
            ids: AtomicU64::new(since_epoch.as_nanos() as u64),
            sleep_level: AtomicU8::new(0),
            sockets: SocketLog::default(),
            options,
        }
    }

    /// Answers one request.
    pub async fn answer(&self, request: Request<Incoming>) -> Response<SimBody> {
        let Some(route) = Route::of(request.uri().path(), &self.options) else {
            return self.heads.json(404, NOT_FOUND.to_owned(), None);
        };
        let wanted = route.method();
        let ping = request.uri().path() == "/ping" && request.method() == Method::POST;
        if request.method().as_str() != wanted && !ping {
            return self.heads.method_not_allowed(wanted);
        }
        let given_id = request.headers().get(REQUEST_ID).cloned();
        if wanted == "GET" {
            let mut response = self.answer_get(route).await;
            // With the option, vLLM's server puts the header on every answer, whatever the route.
            if let Some(id) = given_id.filter(|_| self.options.request_id_headers) {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            return response;
        }
        if matches!(route, Route::Sleep | Route::WakeUp) {
            let level = if route == Route::WakeUp {
                0
            } else {
                sleep_level(request.uri().query())
            };
            self.sleep_level.store(level, Ordering::Relaxed);
            return self.heads.empty();
        }
        let fault = match route {
            Route::Generate(_) | Route::Pool(_) => match self.faults.draw(request.headers()) {
                Ok(fault) => fault,
                Err(message) => {
                    let error = ApiError::bad_request(message, crate::faults::FAULT_HEADER);
                    return self.heads.json(400, error.openai_body(), None);
                }
            },
            _ => None,
        };
        let path = request.uri().path().to_owned();
        // A body that ends early is a client that has gone; hyper closes the connection.
        let Ok(body) = request.into_body().collect().await else {
            return self.heads.empty();
        };
        let exchange = Exchange {
            site: self,
            path,
            body: body.to_bytes(),
            given_id,
            fault,
        };
        exchange.answer(route).await
    }

    async fn answer_get(&self, route: Route) -> Response<SimBody> {
        let unavailable = || self.heads.json(500, ApiError::status(500).openai_body(), None);
        match route {
            Route::Models => self.heads.json(200, site::models(&self.options, now_s()), None),
            Route::Version => {
                let version = format!(r#"{{"version":{}}}"#, Js(&self.options.vllm_version));
                self.heads.json(200, version, None)
            }
            Route::Load => self
                .heads
                .json(200, format!(r#"{{"server_load":{}}}"#, self.engine.open()), None),
            Route::Metrics => match self.engine.stats().await {
                Some(stats) => {
                    let sleep_level = self.sleep_level.load(Ordering::Relaxed);
                    let page = metrics::render(&stats, &self.options, self.started_s, sleep_level);
                    self.heads.typed(200, Bytes::from(page), METRICS_TYPE, None)
                }
                None => unavailable(),
            },
            Route::SimTotals => match self.engine.stats().await {
                Some(stats) => self.heads.json(200, metrics::totals(&stats), None),
                None => unavailable(),
            },
            Route::SimRequests => match self.engine.log().await {
                Some(lines) => self
                    .heads
                    .typed(200, Bytes::from(lines), "application/x-ndjson", None),
                None => unavailable(),
            },
            Route::IsSleeping => {
                let is_sleeping = self.sleep_level.load(Ordering::Relaxed) > 0;
                self.heads
                    .json(200, format!(r#"{{"is_sleeping":{is_sleeping}}}"#), None)
            }
            Route::SimSockets => {
                let lines = self.sockets.lines();
                self.heads
                    .typed(200, Bytes::from(lines), "application/x-ndjson", None)
            }
            _ => self.heads.empty(),
        }
    }
}

/// One request whose body has arrived.
struct Exchange<'a> {
    site: &'a Site,
    path: String,
    body: Bytes,
    given_id: Option<HeaderValue>,
    fault: Option<Fault>,
}

impl Exchange<'_> {
    async fn answer(self, route: Route) -> Response<SimBody> {
        if let Some(Fault::Status(status)) = self.fault {
            return self.refuse(route, &ApiError::status(status));
        }
        let answer = match route {
            Route::Generate(endpoint) => self.generate(endpoint).await,
            Route::Pool(pooling) => self.pool(pooling).await,
            Route::CountTokens => self.count_tokens(),
            Route::Tokenize => self.tokenize(),
            _ => self.detokenize(),
        };
        answer.unwrap_or_else(|error| self.refuse(route, &error))
    }

    fn refuse(&self, route: Route, error: &ApiError) -> Response<SimBody> {
        let body = match route {
            Route::Generate(Endpoint::Messages) | Route::CountTokens => error.anthropic_body(),
            _ => error.openai_body(),
        };
        self.site.heads.json(error.status, body, self.echo())
    }

    async fn generate(&self, endpoint: Endpoint) -> Result<Response<SimBody>, ApiError> {
        let options = &self.site.options;
        let job = Job::parse(endpoint, &self.body, options)?;
        let stamp = self.stamp();
        if self.fault == Some(Fault::Stall) {
            return Ok(self.stall(job, stamp).await);
        }
        let interval = job.stream.then_some(options.stream_interval);
        let ticket = self.submit(
            &job.model,
            job.seqs(),
            job.n,
            Some(job.max_tokens),
            interval,
            &stamp,
        )?;
        if job.stream {
            let stream = EventStream::new(Some(ticket), shapes::events(job, stamp), self.fault);
            return Ok(self.site.heads.stream(stream, self.echo()));
        }
        let mut ticket = ticket;
        let (ends, summary) = ticket.done().await;
        self.whole(shapes::whole(&job, &stamp, &ends, summary))
    }

    async fn pool(&self, route: PoolingRoute) -> Result<Response<SimBody>, ApiError> {
        let job = PoolingJob::parse(route, &self.body, &self.site.options)?;
        let stamp = self.stamp();
        if self.fault == Some(Fault::Stall) {
            std::future::pending::<()>().await;
        }
        let mut ticket = self.submit(&job.model, job.seqs(), 1, None, None, &stamp)?;
        ticket.done().await;
        self.whole(pooling::answer(&job, &stamp, &self.site.options))
    }

    /// Never answers; a stream has its head.
    async fn stall(&self, job: Job, stamp: Stamp) -> Response<SimBody> {
        if !job.stream {
            std::future::pending::<()>().await;
        }
        let stream = EventStream::new(None, shapes::events(job, stamp), self.fault);
        self.site.heads.stream(stream, self.echo())
    }

    fn submit(
        &self,
        model: &str,
        seqs: Vec<crate::engine::SeqSpec>,
        n: u32,
        max_tokens: Option<u32>,
        interval: Option<u32>,
        stamp: &Stamp,
    ) -> Result<Ticket, ApiError> {
        let label = self
            .site
            .options
            .introspect
            .then(|| Box::new([stamp.id.clone(), self.path.clone(), model.to_owned()]));
        self.site
            .engine
            .submit(seqs, n, max_tokens, interval, label)
            .map_err(|_full| ApiError::queue_full())
    }

    fn whole(&self, body: String) -> Result<Response<SimBody>, ApiError> {
        if self.fault == Some(Fault::ErrorEvent) {
            return Err(ApiError::status(500));
        }
        let body = match self.fault {
            Some(Fault::Malformed) => body.chars().take(body.chars().count() / 2).collect(),
            _ => body,
        };
        let bytes = Bytes::from(body);
        let mut response = self
            .site
            .heads
            .typed(200, bytes.clone(), "application/json", self.echo());
        if matches!(self.fault, Some(Fault::CloseAfter(_))) {
            *response.body_mut() = SimBody::cut_off(&bytes);
        }
        Ok(response)
    }

    fn count_tokens(&self) -> Result<Response<SimBody>, ApiError> {
        let body = parse_body(&self.body)?;
        resolve_model(&body, &self.site.options)?;
        let prompt = Prompt::new(&render_messages(&body)?, 0, self.site.options.block_size);
        Ok(self.site.heads.json(
            200,
            format!(r#"{{"input_tokens":{}}}"#, prompt.tokens),
            self.echo(),
        ))
    }

    fn tokenize(&self) -> Result<Response<SimBody>, ApiError> {
        let body = parse_body(&self.body)?;
        resolve_model(&body, &self.site.options)?;
        let text = match body["prompt"].as_str() {
            Some(text) => text.as_bytes().to_vec(),
            None if body["messages"].is_array() => render_chat(&body)?,
            None => {
                return Err(ApiError::missing(
                    "prompt",
                    body.as_object().map_or(0, serde_json::Map::len),
                ));
            }
        };
        Ok(self.site.heads.json(
            200,
            site::tokenize(&encode(&text), &self.site.options),
            self.echo(),
        ))
    }

    fn detokenize(&self) -> Result<Response<SimBody>, ApiError> {
        let body = parse_body(&self.body)?;
        resolve_model(&body, &self.site.options)?;
        let ids: Option<Vec<u32>> = body["tokens"].as_array().and_then(|ids| {
            ids.iter()
                .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
                .collect()
        });
        let ids = ids.ok_or_else(|| ApiError::wrong_type("tokens", "list", &body["tokens"]))?;
        let text = String::from_utf8_lossy(&decode(&ids)).into_owned();
        Ok(self
            .site
            .heads
            .json(200, format!(r#"{{"prompt":{}}}"#, Js(&text)), self.echo()))
    }

    fn stamp(&self) -> Stamp {
        let given = self
            .given_id
            .as_ref()
            .and_then(|id| id.to_str().ok())
            .map(str::to_owned);
        let turn = self.site.ids.fetch_add(1, Ordering::Relaxed);
        Stamp {
            id: given.unwrap_or_else(|| format!("{:016x}", mix(turn, 6))),
            created: now_s(),
            fingerprint: self.site.fingerprint.clone(),
            prompt_details: self.site.options.prompt_tokens_details,
            request_metrics: self.site.options.request_metrics,
        }
    }

    fn echo(&self) -> Option<&HeaderValue> {
        self.given_id
            .as_ref()
            .filter(|_| self.site.options.request_id_headers)
    }
}

/// `level=2` discards the weights; 1, the default, moves them to the host's memory.
fn sleep_level(query: Option<&str>) -> u8 {
    let is_two = query.is_some_and(|query| query.split('&').any(|pair| pair == "level=2"));
    1 + u8::from(is_two)
}

fn now_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
