//! What stands before ClickHouse and does to inserts what the engine itself cannot be made to do. Everything else passes through.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// What becomes of one insert of requests.
#[derive(Clone)]
pub enum Fault {
    /// It is answered with this and goes no further.
    Answer(StatusCode, &'static str),
    /// ClickHouse has it, and the answer is lost.
    LoseAnswer,
    /// ClickHouse has its first half, and the answer is lost.
    Half,
    /// It waits for a permit, and is passed on then, whether or not anybody still waits for the answer.
    Hold(Arc<Semaphore>),
}

/// The front of one ClickHouse; it ends with the test's runtime.
pub struct Front {
    /// Where it listens.
    pub addr: SocketAddr,
    faults: Arc<Mutex<VecDeque<Fault>>>,
}

type Client = legacy::Client<HttpConnector, Full<Bytes>>;

impl Front {
    /// Starts it before the ClickHouse at `behind`.
    pub async fn start(behind: SocketAddr) -> Front {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let faults: Arc<Mutex<VecDeque<Fault>>> = Arc::default();
        let client: Client = legacy::Client::builder(TokioExecutor::new()).build_http();
        tokio::spawn({
            let faults = Arc::clone(&faults);
            async move {
                while let Ok((socket, _)) = listener.accept().await {
                    let (faults, client) = (Arc::clone(&faults), client.clone());
                    let service = service_fn(move |request| {
                        serve(request, behind, client.clone(), Arc::clone(&faults))
                    });
                    // An error is how an answer gets lost.
                    tokio::spawn(async move {
                        drop(
                            http1::Builder::new()
                                .serve_connection(TokioIo::new(socket), service)
                                .await,
                        );
                    });
                }
            }
        });
        Front { addr, faults }
    }

    /// What becomes of the next insert that has no fault yet.
    pub fn next(&self, fault: Fault) {
        self.faults
            .lock()
            .expect("no panic while it is held")
            .push_back(fault);
    }

    /// How many faults nobody has met yet.
    pub fn left(&self) -> usize {
        self.faults.lock().expect("no panic while it is held").len()
    }
}

async fn serve(
    request: Request<Incoming>,
    behind: SocketAddr,
    client: Client,
    faults: Arc<Mutex<VecDeque<Fault>>>,
) -> io::Result<Response<Full<Bytes>>> {
    let (mut head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let path = head
        .uri
        .path_and_query()
        .map_or("/", |path| path.as_str())
        .to_owned();
    let is_insert = path.contains("INSERT") && path.contains("request_events");
    head.uri = format!("http://{behind}{path}").parse().expect("a URI");
    for gone in ["transfer-encoding", "content-length", "expect"] {
        head.headers.remove(gone);
    }
    let pass = async |head, body: Bytes| {
        let answer = client.request(Request::from_parts(head, Full::new(body))).await;
        let (mut head, body) = answer.map_err(io::Error::other)?.into_parts();
        head.headers.remove("transfer-encoding");
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        Ok(Response::from_parts(head, Full::new(body)))
    };
    let fault = is_insert
        .then(|| faults.lock().expect("no panic while it is held").pop_front())
        .flatten();
    let lost = || Err(io::Error::other("the answer is lost"));
    match fault {
        None => pass(head, body).await,
        Some(Fault::Answer(status, text)) => {
            let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
            *answer.status_mut() = status;
            Ok(answer)
        }
        Some(Fault::LoseAnswer) => {
            let _: Response<_> = pass(head, body).await?;
            lost()
        }
        Some(Fault::Half) => {
            let rows = body.iter().filter(|byte| **byte == b'\n').count();
            let ends = body.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            let half = ends
                .map(|(at, _)| at + 1)
                .nth(rows.div_ceil(2) - 1)
                .expect("a row");
            let _: Response<_> = pass(head, body.slice(..half)).await?;
            lost()
        }
        Some(Fault::Hold(permits)) => {
            let passed = tokio::spawn(async move {
                permits.acquire().await.map_err(io::Error::other)?.forget();
                let answer = client.request(Request::from_parts(head, Full::new(body))).await;
                let (head, body) = answer.map_err(io::Error::other)?.into_parts();
                let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
                Ok::<_, io::Error>((head.status, body))
            });
            let (status, body) = passed.await.map_err(io::Error::other)??;
            let mut answer = Response::new(Full::new(body));
            *answer.status_mut() = status;
            Ok(answer)
        }
    }
}
