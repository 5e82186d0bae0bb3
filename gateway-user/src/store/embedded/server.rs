//! HTTP connections, authentication, and the paths of ClickHouse's HTTP interface.

use super::answer::{AnswerBody, Face};
use super::engine::EngineError;
use super::execute::Executor;
use super::request::Asked;
use crate::connections::{Bounds, serve_connections};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Connections at a time; the rest waits in the backlog. Above the places for queries and those who wait for one.
const CONNECTIONS_MAX: usize = 1024;

/// For a request's head to arrive, the wait on an idle connection included. ClickHouse's own keep-alive time.
const HEAD_READ_LIMIT: Duration = Duration::from_secs(30);

/// For queries in progress, once the process is told to end. An insert that is cut off is sent again by the spool.
const GRACE: Duration = Duration::from_secs(8);

/// Who may ask. There is one user.
#[derive(Clone)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The password; empty for none.
    pub password: String,
}

impl Credentials {
    /// Whether the request names this user and this password.
    fn allow(&self, asked: &Asked) -> bool {
        let (user, password) = (
            asked.user.as_deref(),
            asked.password.as_deref().unwrap_or_default(),
        );
        let user_fits = user.filter(|user| !user.is_empty()).unwrap_or("default") == self.user;
        user_fits & same(password.as_bytes(), self.password.as_bytes())
    }
}

/// Compares in a time that tells nothing about where two texts differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// ClickHouse's HTTP interface on an executor.
pub struct HttpFace {
    executor: Executor,
    credentials: Credentials,
}

impl HttpFace {
    /// Asks `credentials` of everyone, except for `/ping`.
    pub fn new(executor: Executor, credentials: Credentials) -> HttpFace {
        HttpFace {
            executor,
            credentials,
        }
    }

    /// Serves until `stop` holds true; then queries in progress have 8 seconds.
    pub async fn serve(self, listener: TcpListener, stop: watch::Receiver<bool>) {
        let face = Arc::new(self);
        let bounds = Bounds {
            connections_max: CONNECTIONS_MAX,
            grace: GRACE,
        };
        let stopped = stop.clone();
        let serve = |stream| connection(stream, Arc::clone(&face), stopped.clone());
        serve_connections(listener, "embedded ClickHouse", bounds, stop, serve).await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<AnswerBody> {
        match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/ping") => plain(StatusCode::OK, "Ok.\n"),
            (&Method::GET | &Method::HEAD, "/replicas_status") => plain(StatusCode::OK, "Ok.\n"),
            (&Method::GET | &Method::HEAD, "/") if request.uri().query().is_none() => {
                plain(StatusCode::OK, "Ok.\n")
            }
            (&Method::GET | &Method::HEAD | &Method::POST, "/") => self.query(request).await,
            (_, "/" | "/ping" | "/replicas_status") => {
                plain(StatusCode::METHOD_NOT_ALLOWED, "GET and POST are taken here.\n")
            }
            (_, path) => {
                let message = format!(
                    "There is no handle {path}\n\nUse / or /ping for health checks. Send queries to / with POST, or with GET and the parameter `query`.\n"
                );
                plain(StatusCode::NOT_FOUND, &message)
            }
        }
    }

    async fn query(&self, request: Request<Incoming>) -> Response<AnswerBody> {
        let asked = match Asked::parse(request.method(), request.uri(), request.headers()) {
            Ok(asked) => asked,
            Err(error) => return self.face().refusal(&error),
        };
        if !self.credentials.allow(&asked) {
            let message = "Authentication failed: password is incorrect, or there is no user with such name.";
            return self
                .face()
                .refusal(&EngineError::new(516, "AUTHENTICATION_FAILED", message));
        }
        self.executor.answer(asked, request).await
    }

    fn face(&self) -> Face {
        self.executor.face(&Asked::default())
    }
}

fn plain(status: StatusCode, text: &str) -> Response<AnswerBody> {
    let mut response = Response::new(AnswerBody::whole(text.to_owned()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=UTF-8"));
    response
}

async fn connection(stream: TcpStream, face: Arc<HttpFace>, mut stop: watch::Receiver<bool>) {
    // Small answers must not wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request: Request<Incoming>| {
        let face = Arc::clone(&face);
        async move { Ok::<_, Infallible>(face.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_READ_LIMIT)
        // A client that has sent its query and half-closes still gets its answer; curl and Go do not, netcat does.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // How a connection ends is the client's affair.
    tokio::select! {
        _ = &mut connection => return,
        _ = stop.wait_for(|stop| *stop) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_user_with_the_password_is_let_in() {
        let credentials = |user: &str, password: &str| Credentials {
            user: user.into(),
            password: password.into(),
        };
        let asked = |user: Option<&str>, password: Option<&str>| Asked {
            user: user.map(str::to_owned),
            password: password.map(str::to_owned),
            ..Asked::default()
        };
        let open = credentials("default", "");
        assert!(open.allow(&asked(None, None)) && open.allow(&asked(Some("default"), Some(""))));
        assert!(!open.allow(&asked(Some("other"), None)) && !open.allow(&asked(None, Some("x"))));
        let closed = credentials("gateway", "secret");
        assert!(closed.allow(&asked(Some("gateway"), Some("secret"))));
        for (user, password) in [
            (None, None),
            (Some("gateway"), None),
            (Some("gateway"), Some("secre")),
            (None, Some("secret")),
        ] {
            assert!(!closed.allow(&asked(user, password)), "{user:?} {password:?}");
        }
    }
}
