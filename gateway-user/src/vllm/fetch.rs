//! One request to a server, on a connection of its own: for what is asked so seldom that a pool would only hold closed connections.
//!
//! The request path has its own client (`proxy`), which forwards bytes as they are. How long the whole may take is the caller's to say.

use crate::config::UpstreamUrl;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::http::request::Builder;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Why there is no answer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The server cannot be reached.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The connection broke, or what came is no HTTP.
    #[error("no whole response: {0}")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The body is too long.
    #[error("expected a body of at most {0} bytes")]
    TooLarge(usize),
}

/// An answer whose body has not been read yet.
pub struct Answer {
    response: Response<Incoming>,
    /// Dropped with the answer, it takes the connection with it, also when a timeout ends the wait.
    _connection: JoinSet<hyper::Result<()>>,
}

/// A connection that is kept between requests.
pub struct Kept {
    sender: SendRequest<Full<Bytes>>,
    connection: JoinSet<hyper::Result<()>>,
}

/// A `GET` of `path`, to be completed with headers.
pub fn get(url: &UpstreamUrl, path: &str) -> Builder {
    with_host(Request::get(path), url)
}

/// A `POST` to `path`, to be completed with headers.
pub fn post(url: &UpstreamUrl, path: &str) -> Builder {
    with_host(Request::post(path), url)
}

fn with_host(builder: Builder, url: &UpstreamUrl) -> Builder {
    builder
        .header(HOST, url.authority())
        .header(USER_AGENT, concat!("vllm-gateway/", env!("CARGO_PKG_VERSION")))
}

/// Sends one request and waits for the head of its answer. The connection is closed behind it.
///
/// # Errors
/// [`FetchError`]; what the server answers is none.
pub async fn send(
    url: &UpstreamUrl,
    request: Builder,
    body: Bytes,
    connect_limit: Duration,
) -> Result<Answer, FetchError> {
    let mut kept = Kept::open(url, connect_limit).await?;
    let response = kept.send(request.header(CONNECTION, "close"), body).await?;
    Ok(Answer {
        response,
        _connection: kept.connection,
    })
}

impl Answer {
    /// The status.
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// The header fields.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When it breaks off, or is longer than `bytes_max`.
    pub async fn body(self, bytes_max: usize) -> Result<Bytes, FetchError> {
        read(self.response.into_body(), bytes_max).await
    }
}

impl Kept {
    /// Connects.
    ///
    /// # Errors
    /// [`FetchError::Connect`].
    pub async fn open(url: &UpstreamUrl, connect_limit: Duration) -> Result<Kept, FetchError> {
        let connecting = timeout(connect_limit, TcpStream::connect((url.host(), url.port()))).await;
        let stream = connecting
            .unwrap_or_else(|late| Err(late.into()))
            .map_err(FetchError::Connect)?;
        let (sender, driven) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let mut connection = JoinSet::new();
        connection.spawn(driven);
        Ok(Kept { sender, connection })
    }

    /// Sends a request, reads the whole answer, and leaves the connection open.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn ask(&mut self, request: Builder, bytes_max: usize) -> Result<Bytes, FetchError> {
        let response = self.send(request, Bytes::new()).await?;
        read(response.into_body(), bytes_max).await
    }

    /// Waits until the server closes the connection.
    pub async fn closed(&mut self) {
        // How it ended is of no interest: there is nothing in flight.
        let _ = self.connection.join_next().await;
    }

    async fn send(&mut self, request: Builder, body: Bytes) -> Result<Response<Incoming>, FetchError> {
        let request = request.body(Full::new(body)).map_err(broken)?;
        self.sender.send_request(request).await.map_err(broken)
    }
}

async fn read(body: Incoming, bytes_max: usize) -> Result<Bytes, FetchError> {
    let read = Limited::new(body, bytes_max).collect().await;
    let read = read.map_err(|error| match error.downcast::<LengthLimitError>() {
        Ok(_) => FetchError::TooLarge(bytes_max),
        Err(error) => FetchError::Broken(error),
    })?;
    Ok(read.to_bytes())
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> FetchError {
    FetchError::Broken(error.into())
}
