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
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
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
                let now = clock::now();
                let progress = match relay.feed(&bytes, now, recording.exchange(), &mut out) {
                    Ok(progress) => progress,
                    Err(error) => {
                        relay.release(&mut out);
                        // It was broken before, whether or not the client is still there.
                        let _ = writer.send(&out).await;
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
                    return Err(abandon(worker, &mut upstream, &mut upstream_writer, relay, recording).await);
                }
                recording.passed(now);
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
                let _ = writer.send(&out).await;
                return Err(closed_by_upstream());
            }
            Event::Gone => {
                return Err(abandon(worker, &mut upstream, &mut upstream_writer, relay, recording).await);
            }
            Event::Silent if last.elapsed() >= limits.stream_idle_timeout => {
                return Err(Stop::Broken(Ending::TimedOut, "upstream_silent"));
            }
            Event::Silent => silence.as_mut().reset(last + limits.stream_idle_timeout),
        }
    }
}

/// Capacity of the output buffer that an idle stream keeps.
const KEPT_BYTES: usize = 1024;

fn bad_framing(error: crate::wire::body::BodyError) -> Stop {
    tracing::warn!(%error, "the upstream's response cannot be followed");
    Stop::Broken(Ending::UpstreamClosed, "upstream_bad_framing")
}

fn closed_by_upstream() -> Stop {
    Stop::Broken(Ending::UpstreamClosed, "upstream_closed")
}

/// The client has gone: tells the upstream at once, so that it stops, and learns from its last bytes what the request had used, and whether all of the
/// response came.
async fn abandon(
    worker: &Worker,
    upstream: &mut ReadHalf<'_>,
    upstream_writer: &mut WriteHalf<'_>,
    relay: &mut Relay,
    recording: &mut Recording,
) -> Stop {
    let mut unsent = Vec::new();
    let read = read_rest(worker, upstream, upstream_writer, |bytes, at| {
        unsent.clear();
        match bytes {
            [] => relay.closed(&mut unsent).then_some(Rest::Whole),
            _ => match relay.feed(bytes, at, recording.exchange(), &mut unsent) {
                Ok(progress) => progress.done.then_some(Rest::Whole),
                Err(_) => Some(Rest::Unreadable),
            },
        }
    });
    let ended = read.await;
    end_without_client(ended, recording)
}

/// As when a client leaves in mid-response, for a response whose head is not there yet.
pub async fn read_out(
    worker: &Worker,
    connection: &mut UpstreamConnection,
    method: &str,
    mut early: Vec<u8>,
    recording: &mut Recording,
) -> Stop {
    let (mut upstream, mut writer) = connection.stream.split();
    let max_head = worker.shared.config.proxy.max_head.as_len();
    let mut relay: Option<Relay> = None;
    let mut unsent = Vec::new();
    let read = read_rest(worker, &mut upstream, &mut writer, |bytes, at| {
        if bytes.is_empty() {
            let is_whole = relay.as_mut().is_some_and(|relay| relay.closed(&mut unsent));
            return is_whole.then_some(Rest::Whole);
        }
        early.extend_from_slice(bytes);
        while relay.is_none() {
            let Ok(parsed) = ResponseHead::parse(&early, max_head, method) else {
                return Some(Rest::Unreadable);
            };
            let (head, len) = parsed?;
            early.drain(..len);
            if head.is_interim() {
                continue;
            }
            if let Some(exchange) = recording.exchange() {
                exchange.response_head(at, &head);
            }
            relay = Some(Relay::new(head.framing(), Delivered::AsFramed, Edit::None));
        }
        match relay
            .as_mut()?
            .feed(&early, at, recording.exchange(), &mut unsent)
        {
            Ok(progress) => {
                early.clear();
                progress.done.then_some(Rest::Whole)
            }
            Err(_) => Some(Rest::Unreadable),
        }
    });
    let ended = read.await;
    end_without_client(ended, recording)
}

/// Why no more is read of a response whose client has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Whole,
    /// Its framing is broken.
    Unreadable,
}

/// What became of such a response.
struct Ended {
    /// When the last byte came; when the client left, if none did.
    at: At,
    is_whole: bool,
    /// The upstream had ended its bytes before it was told of the client.
    by_upstream: bool,
}

/// Tells the upstream that the client has left, and shows `take` what it still sends, until that is over or `proxy.abort_drain` is. Its end is shown as
/// no bytes, if it is its own; one that follows the client's says nothing of the response.
async fn read_rest(
    worker: &Worker,
    upstream: &mut ReadHalf<'_>,
    writer: &mut WriteHalf<'_>,
    mut take: impl FnMut(&[u8], At) -> Option<Rest>,
) -> Ended {
    let mut ended = Ended {
        at: clock::now(),
        is_whole: false,
        by_upstream: has_ended(upstream.as_ref()),
    };
    // An upstream that cannot be told any more has broken off, and what came before that is still there.
    let _ = writer.shutdown().await;
    let drain = async {
        while let Ok(bytes) = worker.buffers.read(upstream).await {
            let is_over = bytes.is_empty();
            if is_over && !ended.by_upstream {
                break;
            }
            if !is_over {
                ended.at = clock::now();
            }
            let rest = take(&bytes, ended.at);
            ended.is_whole = rest == Some(Rest::Whole);
            if is_over || rest.is_some() {
                break;
            }
        }
    };
    let _ = timeout(worker.shared.config.proxy.abort_drain, drain).await;
    ended
}

/// Whether the other side has ended its bytes, read or not. The kernel tells the tap of the same order.
#[cfg(target_os = "linux")]
fn has_ended(socket: &TcpStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    let at_once = Timespec::default();
    poll(&mut polled, Some(&at_once)).is_ok_and(|found| found > 0)
}

/// Elsewhere there is no tap, whose view could differ.
#[cfg(not(target_os = "linux"))]
fn has_ended(_: &TcpStream) -> bool {
    false
}

/// Books a response whose client left: see [`Outcome`](crate::wire::exchange::Outcome).
fn end_without_client(ended: Ended, recording: &mut Recording) -> Stop {
    if ended.is_whole {
        recording.end_at(ended.at, Ending::Complete);
    } else if ended.by_upstream {
        return closed_by_upstream();
    } else if let Some(exchange) = recording.exchange() {
        let ending = exchange.ending_without_client();
        recording.end_at(ended.at, ending);
    }
    Stop::Gone
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
