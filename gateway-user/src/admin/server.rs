//! The HTTP server of the operator's side.

use super::access::Access;
use super::readiness::Readiness;
use super::routes::Routes;
use super::stream::Streams;
use crate::config::AdminConfig;
use crate::connections::{Bounds, serve_connections};
use crate::live::View;
use crate::metrics::Metrics;
use crate::net::{BindError, bind_listener};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// Connections at a time. Scrapers and probes are a handful; the rest waits in the backlog, and requests keep their descriptors.
const CONNECTIONS_MAX: usize = 64;

/// For a request's head to arrive, the wait on an idle connection included. Twice the usual scrape interval of 15 s, so that a
/// scraper keeps its connection.
const HEAD_READ_LIMIT: Duration = Duration::from_secs(30);

/// A connection is asked to end after this, so that one whose peer has vanished does not hold its place for ever.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(300);

/// For an answer in progress to leave, once its connection is asked to end; also at shutdown.
const GRACE: Duration = Duration::from_secs(5);

/// Where the admin address can be changed, for the error when it is taken.
const SETTING: &str = "admin.listen or GATEWAY_ADMIN_ADDR";

/// Serves `/metrics`, `/health`, `/ready`, the console and its API until told to end.
pub struct AdminServer {
    listener: TcpListener,
    addr: SocketAddr,
    routes: Arc<Routes>,
}

impl AdminServer {
    /// Listens on the config's address (port 0: any). Nobody is answered before [`AdminServer::run`].
    ///
    /// # Errors
    /// When the address cannot be listened on; the message names who holds it and what to set.
    pub fn bind(
        config: &AdminConfig,
        metrics: Metrics,
        readiness: Readiness,
        view: Arc<View>,
    ) -> Result<AdminServer, BindError> {
        let listener = bind_listener(config.listen, "admin", SETTING)?;
        let addr = listener.local_addr().unwrap_or(config.listen);
        let access = Access::new(config, addr);
        if access.is_closed() {
            tracing::warn!(
                %addr,
                "the console and its API are closed: other machines reach the admin address, and admin.tokens names nobody who may read it"
            );
        }
        Ok(AdminServer {
            listener,
            addr,
            routes: Arc::new(Routes::new(metrics, readiness, view, access)),
        })
    }

    /// The address that is listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `shutdown` holds `true` or its sender is gone; then answers in progress have 5 seconds to leave. To answer
    /// `/ready` while the gateway drains, end this server last.
    ///
    /// # Errors
    /// When the runtime does not take the listener.
    pub async fn run(self, shutdown: watch::Receiver<bool>) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let bounds = Bounds {
            connections_max: CONNECTIONS_MAX,
            grace: GRACE,
        };
        let stop = shutdown.clone();
        let streams = Arc::new(Streams::until(stop.clone()));
        let serve = |stream| {
            serve(
                stream,
                Arc::clone(&self.routes),
                Arc::clone(&streams),
                stop.clone(),
            )
        };
        serve_connections(listener, "admin", bounds, shutdown, serve).await;
        Ok(())
    }
}

async fn serve(
    stream: TcpStream,
    routes: Arc<Routes>,
    streams: Arc<Streams>,
    mut stop: watch::Receiver<bool>,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (routes, streams) = (Arc::clone(&routes), Arc::clone(&streams));
        async move { Ok::<_, Infallible>(routes.answer(request, &streams).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_READ_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // How a connection ends is the peer's affair: a probe that hangs up is no event for the log.
    tokio::select! {
        _ = &mut connection => return,
        _ = stop.wait_for(|ended| *ended) => {}
        () = sleep(CONNECTION_AGE_MAX) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(GRACE, connection).await;
}

#[cfg(test)]
mod tests {
    use super::super::readiness::State;
    use super::*;
    use crate::books::Books;
    use crate::config::Config;
    use crate::event::Sinks;
    use crate::limits::Limiter;
    use crate::live::Live;
    use crate::metrics::Limits;
    use crate::proxy::Shared;
    use serde_json::Value;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinHandle;

    struct Running {
        addr: SocketAddr,
        readiness: Readiness,
        metrics: Metrics,
        stop: watch::Sender<bool>,
        task: JoinHandle<io::Result<()>>,
    }

    /// A server of a gateway that has no requests.
    fn bind(addr: SocketAddr, metrics: &Metrics, readiness: &Readiness) -> Result<AdminServer, BindError> {
        let config = Config::default();
        let live = Arc::new(Live::new(metrics.clone(), [], []));
        let books = Books::new(&config, Sinks::new([]));
        let limiter = Arc::new(Limiter::new(&config.limits, metrics.clone()));
        let shared = Shared::new(config, metrics.clone(), books, limiter, None);
        let view = Arc::new(View::new(live, shared, None, None));
        let config = AdminConfig {
            listen: addr,
            ..AdminConfig::default()
        };
        AdminServer::bind(&config, metrics.clone(), readiness.clone(), view)
    }

    fn start() -> Running {
        let metrics = Metrics::new(Limits::default()).unwrap();
        let readiness = Readiness::default();
        let server = bind("127.0.0.1:0".parse().unwrap(), &metrics, &readiness).unwrap();
        let addr = server.local_addr();
        let (stop, stopped) = watch::channel(false);
        Running {
            addr,
            readiness,
            metrics,
            stop,
            task: tokio::spawn(server.run(stopped)),
        }
    }

    /// Head and body of the answer to one request on a connection of its own.
    async fn ask(addr: SocketAddr, method: &str, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(10), stream.read_to_string(&mut answer))
            .await
            .expect("an answer")
            .unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), body.to_owned())
    }

    #[tokio::test]
    async fn metrics_are_served_in_the_text_format() {
        let running = start();
        running.metrics.refused("missing_team");
        let (head, body) = ask(running.addr, "GET", "/metrics?name=x").await;
        assert!(head.starts_with("http/1.1 200"), "{head}");
        assert!(
            head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"),
            "{head}"
        );
        assert!(
            body.contains("gateway_refused_total{reason=\"missing_team\"} 1\n"),
            "{body}"
        );
        let (head, body) = ask(running.addr, "HEAD", "/metrics").await;
        assert!(
            head.starts_with("http/1.1 200") && body.is_empty(),
            "{head} {body}"
        );
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .unwrap();
        assert!(
            length.parse::<usize>().unwrap() > 100,
            "HEAD tells the length that GET would have: {head}"
        );
    }

    #[tokio::test]
    async fn ready_follows_the_state_and_says_why_not_while_health_stays_well() {
        let running = start();
        let ready = async |status: &str| {
            let (head, body) = ask(running.addr, "GET", "/ready").await;
            assert!(head.starts_with(&format!("http/1.1 {status}")), "{head}");
            serde_json::from_str::<Value>(&body).unwrap()
        };
        let starting = ready("503").await;
        assert_eq!(
            (&starting["state"], &starting["why"]),
            (&"starting".into(), &"listeners are not up yet".into())
        );
        running.readiness.set(State::Ready);
        assert_eq!(ready("200").await["ready"], true);
        running.readiness.set(State::Draining);
        assert_eq!(ready("503").await["state"], "draining");
        let (head, body) = ask(running.addr, "GET", "/health").await;
        assert!(
            head.starts_with("http/1.1 200"),
            "a gateway that drains must not be killed: {head}"
        );
        assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["status"], "alive");
    }

    #[tokio::test]
    async fn what_is_not_there_and_what_is_not_allowed_are_told_apart() {
        let running = start();
        for (method, path, status, kind) in [
            ("GET", "/v1/chat/completions", "404", "not_found"),
            ("POST", "/nothing", "404", "not_found"),
            ("POST", "/ready", "405", "method_not_allowed"),
        ] {
            let (head, body) = ask(running.addr, method, path).await;
            assert!(
                head.starts_with(&format!("http/1.1 {status}")),
                "{method} {path}: {head}"
            );
            assert!(head.contains("content-type: application/json"), "{head}");
            assert_eq!(
                serde_json::from_str::<Value>(&body).unwrap()["error"]["type"],
                kind
            );
            assert_eq!(head.contains("allow: get, head"), status == "405", "{head}");
        }
    }

    #[tokio::test]
    async fn connections_past_the_limit_wait_until_one_ends() {
        let running = start();
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(running.addr).await.unwrap();
            stream
                .write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                .await
                .unwrap();
            let mut first = [0; 12];
            stream.read_exact(&mut first).await.unwrap();
            assert_eq!(&first, b"HTTP/1.1 200");
            held.push(stream);
        }
        let mut late = pin!(ask(running.addr, "GET", "/health"));
        let early = timeout(Duration::from_millis(200), &mut late).await;
        assert!(early.is_err(), "one more than the limit was served: {early:?}");
        held.pop();
        assert!(late.await.0.starts_with("http/1.1 200"));
    }

    #[tokio::test]
    async fn shutdown_ends_idle_connections_and_frees_the_port() {
        let running = start();
        let mut idle = TcpStream::connect(running.addr).await.unwrap();
        assert!(
            ask(running.addr, "GET", "/health")
                .await
                .0
                .starts_with("http/1.1 200")
        );
        running.stop.send(true).unwrap();
        let ended = timeout(Duration::from_secs(10), running.task)
            .await
            .expect("the server ends");
        ended.unwrap().unwrap();
        let mut rest = Vec::new();
        let _ = timeout(Duration::from_secs(10), idle.read_to_end(&mut rest))
            .await
            .expect("closed");
        assert!(rest.is_empty());
        TcpStream::connect(running.addr)
            .await
            .expect_err("nobody listens any more");
    }

    #[tokio::test]
    async fn a_head_that_never_ends_is_cut_off() {
        let running = start();
        let mut slow = TcpStream::connect(running.addr).await.unwrap();
        slow.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /health HT")
            .await
            .unwrap();
        let mut first = [0; 12];
        slow.read_exact(&mut first).await.unwrap();
        // From here the server has nothing to do but wait, so paused time runs to its limit at once.
        tokio::time::pause();
        let mut rest = Vec::new();
        timeout(HEAD_READ_LIMIT * 2, slow.read_to_end(&mut rest))
            .await
            .expect("closed by then")
            .unwrap();
        let rest = String::from_utf8(rest).unwrap();
        assert_eq!(
            rest.matches("alive").count(),
            1,
            "the unfinished request got no success: {rest}"
        );
    }

    #[tokio::test]
    async fn a_taken_admin_address_says_what_to_set() {
        let running = start();
        let metrics = Metrics::new(Limits::default()).unwrap();
        let error = bind(running.addr, &metrics, &Readiness::default())
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with(&format!("admin address {} is in use by ", running.addr)),
            "{error}"
        );
        assert!(
            error.ends_with("; set admin.listen or GATEWAY_ADMIN_ADDR"),
            "{error}"
        );
    }
}
