//! Whether the upstreams answer: a small request to each, over and over.

use super::Shared;
use super::upstream::Upstream;
use crate::wire::head::ResponseHead;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Checks in a row that must fail before an upstream counts as down: one lost answer under load is no outage.
const FAILURES_TO_DOWN: u32 = 2;

/// Time until a failed check is made again: whether it was an outage should be known before many requests have met it.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// How long one check may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest head of a health answer.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Checks `upstream` until the task is ended.
pub async fn watch(shared: Arc<Shared>, upstream: Arc<Upstream>) {
    let mut ticks = interval(shared.config.proxy.health_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failures = 0;
    loop {
        ticks.tick().await;
        let checked = timeout(CHECK_TIMEOUT, check(&upstream))
            .await
            .unwrap_or_else(|late| Err(late.into()));
        failures = if checked.is_ok() { 0 } else { failures + 1 };
        if failures > 0 && upstream.is_up() {
            ticks.reset_after(AGAIN_AFTER.min(shared.config.proxy.health_interval));
        }
        let up = failures < if upstream.is_up() { FAILURES_TO_DOWN } else { 1 };
        if upstream.set_up(up) {
            match &checked {
                Err(error) => {
                    tracing::warn!(upstream = upstream.name(), url = %upstream.config().url, %error, "upstream is down");
                    // A server that comes back may be another one.
                    shared.learned.forget(upstream.name());
                }
                Ok(()) => tracing::info!(upstream = upstream.name(), "upstream is up"),
            }
        }
    }
}

async fn check(upstream: &Upstream) -> io::Result<()> {
    let config = upstream.config();
    let mut stream = TcpStream::connect((config.url.host(), config.url.port())).await?;
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: vllm-gateway/{}\r\nConnection: close\r\n\r\n",
        config.health_path,
        config.url.authority(),
        env!("CARGO_PKG_VERSION"),
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    loop {
        let parsed = ResponseHead::parse(&head, HEAD_BYTES_MAX, "GET").map_err(io::Error::other)?;
        match parsed {
            Some((head, _)) if head.status() == 200 => return Ok(()),
            Some((head, _)) => {
                return Err(io::Error::other(format!(
                    "health check answered {}",
                    head.status()
                )));
            }
            None if stream.read_buf(&mut head).await? == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            None => {}
        }
    }
}
