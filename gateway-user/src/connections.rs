//! The accept loop of a server that is not the data plane: so many connections at a time, until it is told to end.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// After an accept that failed for want of descriptors, which comes back at once until one is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What bounds a server.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at a time; the rest waits in the backlog.
    pub connections_max: usize,
    /// For connections to end by themselves, once the server is told to end.
    pub grace: Duration,
}

/// Has each connection served by `serve`, until `stop` holds `true` or its sender is gone; then those that are open have the grace. To end in
/// time is for them: they must watch `stop` too. `server` is its name in the log.
pub async fn serve_connections<Served: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    server: &'static str,
    bounds: Bounds,
    mut stop: watch::Receiver<bool>,
    serve: impl Fn(TcpStream) -> Served,
) {
    let permits = Arc::new(Semaphore::new(bounds.connections_max));
    let mut connections = JoinSet::new();
    {
        let mut stopping = pin!(stop.wait_for(|stop| *stop));
        loop {
            tokio::select! {
                _ = &mut stopping => break,
                Some(_) = connections.join_next() => {}
                (stream, permit) = accept(&listener, server, &permits) => {
                    let served = serve(stream);
                    connections.spawn(async move {
                        served.await;
                        drop(permit);
                    });
                }
            }
        }
    }
    drop(listener);
    // What has not ended by then is aborted with the set.
    let _ = timeout(bounds.grace, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
}

/// The next connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    server: &'static str,
    permits: &Arc<Semaphore>,
) -> (TcpStream, OwnedSemaphorePermit) {
    loop {
        let Ok(permit) = Arc::clone(permits).acquire_owned().await else {
            // The semaphore is never closed, so this waits for nothing.
            std::future::pending::<()>().await;
            continue;
        };
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::warn!(server, %error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
