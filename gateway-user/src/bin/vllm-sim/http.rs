//! The HTTP side: accepts connections, and gives responses the head that uvicorn gives them.
//!
//! Where hyper differs from uvicorn on the wire: chunk sizes are upper-case hexadecimal, a whole answer's head and
//! body leave in one write, the keep-alive time also runs before a connection's first request, and an abort behind
//! pipelined bytes is noticed only when something is written.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hyper::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderName, HeaderValue, SERVER, VARY};
use hyper::service::service_fn;
use hyper::{HeaderMap, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

use crate::body::{EventStream, SimBody};
use crate::router::Site;
use crate::sockets::Logged;

/// Pause after a failed accept (no descriptors left, most likely), so that the loop does not spin.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// The header whose value becomes the request's id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Accepts connections until the task is dropped.
pub async fn serve(listener: TcpListener, site: Arc<Site>) {
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                tokio::spawn(connection(stream, client, Arc::clone(&site)));
            }
            Err(error) => {
                eprintln!("vllm-sim: cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, client: SocketAddr, site: Arc<Site>) {
    // Without it a chunk would wait for the reader's ACK of the one before. Fails only on a dead connection.
    let _ = stream.set_nodelay(true);
    if site.options.log_sockets {
        let log = site.sockets.clone();
        return exchange(Logged::new(stream, client, log), site).await;
    }
    exchange(stream, site).await;
}

async fn exchange<S>(stream: S, site: Arc<Site>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let keep_alive = site.options.keep_alive;
    let service = service_fn(move |request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, std::convert::Infallible>(site.answer(request).await) }
    });
    // A client's EOF ends the connection, and so drops the request: that is what uvicorn does, half-closed or not.
    // An error is a client that left or sent no HTTP; there is nobody to tell.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(keep_alive)
        .half_close(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Builds responses; keeps the date, which changes once a second.
#[derive(Debug, Default)]
pub struct Heads {
    date: Mutex<(u64, Option<HeaderValue>)>,
}

impl Heads {
    /// A whole JSON answer.
    pub fn json(&self, status: u16, body: String, echo: Option<&HeaderValue>) -> Response<SimBody> {
        self.typed(status, Bytes::from(body), "application/json", echo)
    }

    /// A whole answer of another type.
    pub fn typed(
        &self,
        status: u16,
        body: Bytes,
        content_type: &'static str,
        echo: Option<&HeaderValue>,
    ) -> Response<SimBody> {
        let length = body.len();
        let mut response = self.response(status, SimBody::Whole(Some(body)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        finish(headers, echo);
        response
    }

    /// An answer without a body.
    pub fn empty(&self) -> Response<SimBody> {
        let mut response = self.response(200, SimBody::Whole(Some(Bytes::new())));
        response
            .headers_mut()
            .insert(CONTENT_LENGTH, HeaderValue::from(0));
        finish(response.headers_mut(), None);
        response
    }

    /// A wrong method, with the right one.
    pub fn method_not_allowed(&self, allowed: &'static str) -> Response<SimBody> {
        let body = Bytes::from_static(br#"{"detail":"Method Not Allowed"}"#);
        let mut response = self.response(405, SimBody::Whole(Some(body.clone())));
        let headers = response.headers_mut();
        headers.insert(ALLOW, HeaderValue::from_static(allowed));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        finish(headers, None);
        response
    }

    /// An event stream.
    pub fn stream(&self, stream: EventStream, echo: Option<&HeaderValue>) -> Response<SimBody> {
        let mut response = self.response(200, SimBody::Stream(Box::new(stream)));
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        );
        finish(headers, echo);
        response
    }

    fn response(&self, status: u16, body: SimBody) -> Response<SimBody> {
        let mut response = Response::new(body);
        // Statuses come from the code or from checked options; 500 is what an unknown one would be anyway.
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().reserve(8);
        if let Some(date) = self.date() {
            response.headers_mut().insert(DATE, date);
        }
        response
            .headers_mut()
            .insert(SERVER, HeaderValue::from_static("uvicorn"));
        response
    }

    fn date(&self) -> Option<HeaderValue> {
        let now = SystemTime::now();
        let second = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // Both members are replaced together, so a panic elsewhere leaves nothing half done.
        let mut cached = self.date.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.0 != second || cached.1.is_none() {
            *cached = (second, HeaderValue::from_str(&httpdate::fmt_http_date(now)).ok());
        }
        cached.1.clone()
    }
}

fn finish(headers: &mut HeaderMap, echo: Option<&HeaderValue>) {
    headers.insert(VARY, HeaderValue::from_static("Origin"));
    if let Some(id) = echo {
        headers.insert(REQUEST_ID, id.clone());
    }
}
