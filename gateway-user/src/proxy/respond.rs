//! A response on its way from the upstream to the client, until one of the two has had enough.

use super::buffer::Bytes;
use super::client::{Client, Gone};
use super::forward::Next;
use super::recording::Recording;
use super::refusal::Refusal;
use super::relay::{Edit, Relay};
use super::rewrite::{self, Delivered};
use super::upstream::{Place, UpstreamConnection};
use super::{Stop, Worker};
use crate::clock;
use crate::wire::At;
use crate::wire::exchange::Ending;
use crate::wire::head::{Framing, ResponseHead};
use std::io;
use std::pin::pin;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::ReadHalf;
use tokio::time::{Instant, sleep_until, timeout};

/// A response whose head is there.
pub struct Answer {
    /// Where it comes from.
    pub connection: UpstreamConnection,
    /// Its head.
    pub head: ResponseHead,
    /// What was read behind the head.
    pub early: Vec<u8>,
    /// Whether the request went out whole. If not, neither connection can carry another one.
    pub sent_whole: bool,
}

/// What of the request matters to its response.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The client's HTTP/1.x.
    pub minor_version: u8,
    /// Whether the client's connection may carry another request.
    pub keep_alive: bool,
    /// The model that was asked for.
    pub model: Option<&'a str>,
}

enum Event {
    Read(io::Result<Bytes>),
    Gone,
    Silent,
}

/// Delivers the response. The event is out before the client gets the last bytes.
pub async fn deliver(
    worker: &Worker,
    client: &mut Client,
    answer: Answer,
    place: Place,
    edit: Edit,
    request: Request<'_>,
    recording: &mut Recording,
) -> Result<Next, Stop> {
    let Answer {
        mut connection,
        head,
        early,
        sent_whole,
    } = answer;
    let delivered = rewrite::delivery(
        head.framing(),
        request.minor_version,
        matches!(edit, Edit::Strip(_)),
    );
    let ends_at_close = delivered == Delivered::UntilClose
        || head.framing() == Framing::UntilClose && delivered != Delivered::Chunked;
    let keep_alive = request.keep_alive && !ends_at_close;
    let mut out = Vec::with_capacity(head.fields().raw().len() + early.len() + 128);
    rewrite::response_head(&head, delivered, recording.request_id(), !keep_alive, &mut out);
    if head.status() == 101 {
        return tunnel(client, connection, &out, &early, recording).await;
    }
    let mut relay = Relay::new(head.framing(), delivered, edit);
    let streamed = stream(worker, client, &mut connection, &mut relay, out, early, recording).await;
    if ends_at_close && matches!(streamed, Err(Stop::Broken(..))) {
        client.reset_when_dropped();
    }
    // Also of a stream that its client left: official libraries leave at its last event.
    if let (Some(lesson), Some(model)) = (relay.lesson(), request.model) {
        worker.shared.learned.note(place.upstream().name(), model, lesson);
    }
    if let Some(stopped) = relay.stopped() {
        worker.shared.metrics.injection(stopped.name());
    }
    let surplus = streamed?;
    if sent_whole && head.keep_alive() && !surplus {
        worker.pool.put(place.upstream(), connection);
    }
    Ok(if keep_alive { Next::KeepAlive } else { Next::Close })
}

/// Moves the body. Tells whether the upstream sent more than its response.
async fn stream(
    worker: &Worker,
    client: &mut Client,
    connection: &mut UpstreamConnection,
    relay: &mut Relay,
    mut out: Vec<u8>,
    early: Vec<u8>,
    recording: &mut Recording,
) -> Result<bool, Stop> {
    let shared = &worker.shared;
    let limits = &shared.config.proxy;
    let (mut reader, mut writer) = client.split();
    let (mut upstream, mut upstream_writer) = connection.stream.split();
    // Nothing has gone to the client yet, so that it can still be told.
    let progress = relay
        .feed(&early, clock::now(), recording.exchange(), &mut out)
        .map_err(|_| Refusal::BadUpstream)?;
    if relay.is_verbatim() {
        out.extend_from_slice(&early[..progress.consumed]);
    }
    let surplus = progress.consumed < early.len();
    drop(early);
    if progress.done {
        recording.end(Ending::Complete);
        recording.settled().await;
        writer.send(&out).await?;
        return Ok(surplus);
    }
    if let Err(Gone) = writer.send(&out).await {
        return Err(abandon(worker, &mut upstream, &mut upstream_writer, relay, recording).await);
    }
    let mut said_end = has_said_end(recording);
    out = Vec::new();
    let mut last = Instant::now();
    let mut silence = pin!(sleep_until(last + limits.stream_idle_timeout));
    loop {
        let event = tokio::select! {
            biased;
            read = worker.buffers.read(&mut upstream) => Event::Read(read),
            Gone = reader.gone(limits.max_head.as_len()) => Event::Gone,
            () = &mut silence => Event::Silent,
        };
        match event {
            Event::Read(Ok(bytes)) if !bytes.is_empty() => {
                last = Instant::now();
                out.clear();
                let progress = match relay.feed(&bytes, clock::now(), recording.exchange(), &mut out) {
                    Ok(progress) => progress,
                    Err(error) => {
                        relay.release(&mut out);
                        writer.send(&out).await?;
                        return Err(bad_framing(error));
                    }
                };
                let ready = if relay.is_verbatim() {
                    &bytes[..progress.consumed]
                } else {
                    &out[..]
                };
                if progress.done {
                    recording.end(Ending::Complete);
                    recording.settled().await;
                    writer.send(ready).await?;
                    return Ok(progress.consumed < bytes.len());
                }
                if let Err(Gone) = writer.send(ready).await {
                    if said_end {
                        recording.end(Ending::Complete);
                    }
                    return Err(abandon(worker, &mut upstream, &mut upstream_writer, relay, recording).await);
                }
                said_end = has_said_end(recording);
                out.shrink_to(KEPT_BYTES);
            }
            Event::Read(read) => {
                out.clear();
                // A reset ends nothing properly, not even a body that ends with the connection.
                if relay.closed(&mut out) && read.is_ok() {
                    recording.end(Ending::Complete);
                    recording.settled().await;
                    writer.send(&out).await?;
                    return Ok(true);
                }
                writer.send(&out).await?;
                return Err(Stop::Broken(Ending::UpstreamClosed, "upstream_closed"));
            }
            Event::Gone => {
                if said_end {
                    recording.end(Ending::Complete);
                }
                return Err(abandon(worker, &mut upstream, &mut upstream_writer, relay, recording).await);
            }
            Event::Silent if last.elapsed() >= limits.stream_idle_timeout => {
                return Err(Stop::Broken(Ending::TimedOut, "upstream_silent"));
            }
            Event::Silent => silence.as_mut().reset(last + limits.stream_idle_timeout),
        }
    }
}

/// Whether the stream has said its end by what went to the client so far: who leaves behind that has not broken off.
fn has_said_end(recording: &mut Recording) -> bool {
    recording
        .exchange()
        .is_some_and(|exchange| exchange.has_said_end())
}

/// Capacity of the output buffer that an idle stream keeps.
const KEPT_BYTES: usize = 1024;

fn bad_framing(error: crate::wire::body::BodyError) -> Stop {
    tracing::warn!(%error, "the upstream's response cannot be followed");
    Stop::Broken(Ending::UpstreamClosed, "upstream_bad_framing")
}

/// The client has gone: tells the upstream at once, so that it stops, and learns from its last bytes what the request had used.
async fn abandon(
    worker: &Worker,
    upstream: &mut ReadHalf<'_>,
    upstream_writer: &mut tokio::net::tcp::WriteHalf<'_>,
    relay: &mut Relay,
    recording: &mut Recording,
) -> Stop {
    let mut ended = clock::now();
    if upstream_writer.shutdown().await.is_ok() {
        let mut unsent = Vec::new();
        let drain = async {
            while let Ok(bytes) = worker.buffers.read(upstream).await {
                if bytes.is_empty() {
                    break;
                }
                ended = clock::now();
                unsent.clear();
                match relay.feed(&bytes, ended, recording.exchange(), &mut unsent) {
                    Ok(progress) if !progress.done => {}
                    _ => break,
                }
            }
        };
        let _ = timeout(worker.shared.config.proxy.abort_drain, drain).await;
    }
    recording.end_at(ended, Ending::ClientGone);
    Stop::Gone
}

/// As when a client leaves in mid-response, for a response whose head is not there yet. Tells when the last byte came.
pub async fn read_out(
    worker: &Worker,
    connection: &mut UpstreamConnection,
    method: &str,
    mut early: Vec<u8>,
    recording: &mut Recording,
) -> At {
    let mut ended = clock::now();
    let (mut upstream, mut writer) = connection.stream.split();
    if writer.shutdown().await.is_err() {
        return ended;
    }
    let max_head = worker.shared.config.proxy.max_head.as_len();
    let drain = async {
        let mut relay: Option<Relay> = None;
        let mut unsent = Vec::new();
        while let Ok(bytes) = worker.buffers.read(&mut upstream).await {
            if bytes.is_empty() {
                break;
            }
            ended = clock::now();
            early.extend_from_slice(&bytes);
            if relay.is_none() {
                let Ok(parsed) = ResponseHead::parse(&early, max_head, method) else {
                    break;
                };
                let Some((head, len)) = parsed else { continue };
                early.drain(..len);
                if head.is_interim() {
                    continue;
                }
                if let Some(exchange) = recording.exchange() {
                    exchange.response_head(ended, &head);
                }
                relay = Some(Relay::new(head.framing(), Delivered::AsFramed, Edit::None));
            }
            let Some(relay) = &mut relay else { continue };
            match relay.feed(&early, ended, recording.exchange(), &mut unsent) {
                Ok(progress) if !progress.done => early.clear(),
                _ => break,
            }
        }
    };
    let _ = timeout(worker.shared.config.proxy.abort_drain, drain).await;
    ended
}

/// Passes both directions on as they are: the connection has left HTTP.
async fn tunnel(
    client: &mut Client,
    mut connection: UpstreamConnection,
    head: &[u8],
    early: &[u8],
    recording: &mut Recording,
) -> Result<Next, Stop> {
    client.send(head).await?;
    client.send(early).await?;
    let moved = client.tunnel(&mut connection.stream).await;
    recording.tunnelled(moved.to_upstream, moved.to_client + early.len() as u64);
    recording.end(Ending::Complete);
    Ok(Next::Drop)
}
