//! Connections in, and the way out: a limit while the gateway runs, a grace when it ends.

use super::Worker;
use super::client::{Client, NoRequest};
use super::forward::{self, Next};
use super::recording::Recording;
use crate::clock;
use crate::wire::endpoint::Endpoint;
use crate::wire::head::RequestHead;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Wait after an `accept` that failed for want of file descriptors or memory: without it the loop would burn a core.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// How often idle upstream connections are looked through; well within the second between their limit and vLLM's.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);

/// Whether the gateway takes requests or is on its way out.
#[derive(Debug)]
pub struct Phase(watch::Sender<bool>);

impl Default for Phase {
    fn default() -> Phase {
        Phase(watch::Sender::new(false))
    }
}

impl Phase {
    /// No new connections from now on; requests in flight go on.
    pub fn drain(&self) {
        self.0.send_replace(true);
    }

    /// Whether the gateway is on its way out.
    pub fn is_draining(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits for [`Phase::drain`].
    pub async fn draining(&self) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.0.subscribe().wait_for(|draining| *draining).await;
    }
}

/// Serves the clients of `listener` until the gateway drains, then waits for the requests in flight, at most `drain_timeout`.
/// Returns how many had to be cut off.
pub async fn serve(worker: Worker, listener: TcpListener, permits: Arc<Semaphore>) -> usize {
    let shared = Arc::clone(&worker.shared);
    let mut connections = JoinSet::new();
    let mut sweep = interval(SWEEP_INTERVAL);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // The permit comes first: a client that cannot be served waits in the kernel's queue.
        let accepted = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            (listener.accept().await, permit)
        };
        tokio::select! {
            biased;
            () = shared.phase.draining() => break,
            _ = sweep.tick() => worker.pool.sweep(),
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            (accepted, permit) = accepted => match accepted {
                Ok((stream, _)) => {
                    let worker = worker.clone();
                    connections.spawn(async move {
                        let _permit = permit;
                        connection(worker, stream).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            },
        }
    }
    drop(listener);
    let grace = shared.config.gateway.drain_timeout;
    let all_done = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(grace, all_done).await;
    let cut_off = connections.len();
    connections.shutdown().await;
    cut_off
}

/// One client, from its first request to its last.
async fn connection(worker: Worker, stream: TcpStream) {
    let _counted = worker.shared.metrics.client_connection();
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let limits = &worker.shared.config.proxy;
    let mut client = Client::new(stream, worker.buffers.clone(), limits.client_write_timeout);
    loop {
        let next = tokio::select! {
            biased;
            begun = client.wait_for_request(limits.idle_timeout) => match begun {
                Ok(()) => request(&worker, &mut client).await,
                Err(_) => Next::Drop,
            },
            () = worker.shared.phase.draining() => Next::Close,
        };
        match next {
            Next::KeepAlive => {}
            Next::Close => return client.close().await,
            Next::Drop => return,
        }
    }
}

/// One request that has begun to arrive.
async fn request(worker: &Worker, client: &mut Client) -> Next {
    let shared = &worker.shared;
    let limits = &shared.config.proxy;
    let at = clock::now();
    match client
        .read_head(limits.max_head.as_len(), limits.head_timeout)
        .await
    {
        Ok(head) if is_own_health(&head) => health(worker, client, &head).await,
        // Boxed: a connection between requests should not hold room for one.
        Ok(head) => Box::pin(forward::serve(worker, client, head, at)).await,
        Err(NoRequest::Ended) => Next::Drop,
        Err(NoRequest::Refused(refusal)) => {
            let request_id = Recording::unreadable(shared, at, &refusal);
            let response = refusal.response(Endpoint::Other, &request_id, "GET", true);
            match client.send(&response).await {
                Ok(()) => Next::Close,
                Err(_) => Next::Drop,
            }
        }
    }
}

/// `/health` on the clients' port is the gateway's own: for load balancers, which have no team.
fn is_own_health(head: &RequestHead) -> bool {
    head.path() == "/health" && matches!(head.method(), "GET" | "HEAD")
}

/// 200 while at least one upstream answers and the gateway is not on its way out, else 503; the body names each upstream.
async fn health(worker: &Worker, client: &mut Client, head: &RequestHead) -> Next {
    let shared = &worker.shared;
    let draining = shared.phase.is_draining();
    let healthy = !draining && shared.upstreams.iter().any(|upstream| upstream.is_up());
    let upstreams: serde_json::Map<_, _> = shared
        .upstreams
        .iter()
        .map(|upstream| {
            (
                upstream.name().to_owned(),
                if upstream.is_up() { "up" } else { "down" }.into(),
            )
        })
        .collect();
    let status = if draining {
        "draining"
    } else if healthy {
        "ok"
    } else {
        "no upstream is up"
    };
    let body = serde_json::json!({"status": status, "upstreams": upstreams}).to_string();
    let line = if healthy {
        "200 OK"
    } else {
        "503 Service Unavailable"
    };
    let close = !head.keep_alive() || draining || head.framing() != crate::wire::head::Framing::None;
    let connection = if close { "connection: close\r\n" } else { "" };
    let sent_body = if head.method() == "HEAD" { "" } else { &body };
    let response = format!(
        "HTTP/1.1 {line}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{connection}\r\n{sent_body}",
        body.len()
    );
    match client.send(response.as_bytes()).await {
        Err(_) => Next::Drop,
        Ok(()) if close => Next::Close,
        Ok(()) => Next::KeepAlive,
    }
}
