//! A request on its way to an upstream, until the head of the response is there.

use super::buffer::Bytes;
use super::client::{Client, Gone, Reader};
use super::receive::{Body, Receiver};
use super::recording::Recording;
use super::refusal::Refusal;
use super::respond::{Answer, read_out};
use super::rewrite;
use super::upstream::UpstreamConnection;
use super::{Stop, Worker};
use crate::clock;
use crate::wire::head::ResponseHead;
use std::io;
use std::io::Write;
use std::pin::pin;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::WriteHalf;
use tokio::time::{Instant, sleep_until};

/// How soon a connection that the server had closed while it was idle shows that: a round trip, and some slack for a busy machine. A connection
/// that ends later was working on the request, which must not be run twice.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The head, rewritten for the upstream.
    pub head: &'a [u8],
    /// The client's body.
    pub body: &'a Body,
    /// What is sent instead of the client's body.
    pub edited: Option<&'a [u8]>,
    /// Whether a body that is streamed on goes in chunks.
    pub rechunked: bool,
    /// The method: it decides whether a response has a body.
    pub method: &'a str,
    /// Whether the client understands interim responses.
    pub interim: bool,
    /// Whether the client asked to leave HTTP.
    pub upgrade: bool,
}

/// Why no answer came.
#[derive(Debug)]
pub enum Failed {
    /// An idle connection that the server had closed: nothing was answered, so the request can be sent again.
    Stale,
    /// Anything else.
    Stop(Stop),
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Failed {
        Failed::Stop(refusal.into())
    }
}

impl From<Failed> for Stop {
    fn from(failed: Failed) -> Stop {
        match failed {
            // A new connection that was closed at once is no stale one.
            Failed::Stale => Refusal::UpstreamClosed.into(),
            Failed::Stop(stop) => stop,
        }
    }
}

enum Event<'c> {
    Sent(Result<Reader<'c>, Unsent>),
    Read(io::Result<Bytes>),
    Gone,
    TimedOut,
}

/// Why a request did not go out whole.
enum Unsent {
    /// The upstream takes no more; it may have answered already.
    Upstream,
    /// The client's side failed.
    Stop(Stop),
}

/// Sends `request` and waits for the head of the response. A client that leaves meanwhile ends the request.
pub async fn exchange(
    worker: &Worker,
    client: &mut Client,
    mut connection: UpstreamConnection,
    request: Request<'_>,
    recording: &mut Recording,
) -> Result<Answer, Failed> {
    let limits = &worker.shared.config.proxy;
    let max_head = limits.max_head.as_len();
    let (reused, started) = (connection.reused, Instant::now());
    let (client_reader, mut client_writer) = client.split();
    let (mut upstream_reader, mut upstream_writer) = connection.stream.split();
    let mut early = Vec::new();
    let (mut sent_whole, mut waiting_reader) = (false, None);
    let mut answered = false;
    let head = {
        let mut sending = pin!(send(
            worker,
            request,
            client_reader,
            &mut upstream_writer,
            recording
        ));
        let mut sending_done = false;
        let mut deadline = pin!(sleep_until(Instant::now() + limits.response_head_timeout));
        loop {
            let event = tokio::select! {
                biased;
                sent = &mut sending, if !sending_done => Event::Sent(sent),
                read = worker.buffers.read(&mut upstream_reader) => Event::Read(read),
                _ = gone(&mut waiting_reader, max_head) => Event::Gone,
                () = &mut deadline => Event::TimedOut,
            };
            match event {
                Event::Sent(Ok(reader)) => {
                    (sending_done, sent_whole, waiting_reader) = (true, true, Some(reader));
                    deadline
                        .as_mut()
                        .reset(Instant::now() + limits.response_head_timeout);
                }
                Event::Sent(Err(Unsent::Upstream)) => sending_done = true,
                Event::Sent(Err(Unsent::Stop(Stop::Gone))) => break Err(Gone),
                Event::Sent(Err(Unsent::Stop(stop))) => return Err(Failed::Stop(stop)),
                Event::Read(Ok(bytes)) if !bytes.is_empty() => {
                    answered = true;
                    early.extend_from_slice(&bytes);
                    let Parsed { interim, head } = parse(&mut early, &request, max_head)?;
                    let told = client_writer.send(&interim).await;
                    if let Some(head) = head {
                        break Ok(head);
                    }
                    if told.is_err() {
                        break Err(Gone);
                    }
                }
                Event::Read(_) if reused && !answered && started.elapsed() < STALE_WITHIN => {
                    return Err(Failed::Stale);
                }
                Event::Read(_) => return Err(Refusal::UpstreamClosed.into()),
                Event::Gone => break Err(Gone),
                Event::TimedOut => return Err(Refusal::UpstreamTimeout.into()),
            }
        }
    };
    match head {
        Ok(head) => {
            if let Some(exchange) = recording.exchange() {
                exchange.response_head(clock::now(), &head);
            }
            Ok(Answer {
                connection,
                head,
                early,
                sent_whole,
            })
        }
        Err(Gone) => {
            let stop = read_out(worker, &mut connection, request.method, early, recording).await;
            Err(Failed::Stop(stop))
        }
    }
}

/// Waits for the client to leave, once its request has been read.
async fn gone(reader: &mut Option<Reader<'_>>, max_bytes: usize) -> Gone {
    match reader {
        Some(reader) => reader.gone(max_bytes).await,
        None => std::future::pending().await,
    }
}

/// What the upstream has said so far.
struct Parsed {
    /// Interim responses for the client.
    interim: Vec<u8>,
    /// The head of the response itself.
    head: Option<ResponseHead>,
}

/// Takes the heads that are whole out of `early`.
fn parse(early: &mut Vec<u8>, request: &Request<'_>, max_head: usize) -> Result<Parsed, Refusal> {
    let mut interim = Vec::new();
    loop {
        let parsed =
            ResponseHead::parse(early, max_head, request.method).map_err(|_| Refusal::BadUpstream)?;
        match parsed {
            None => return Ok(Parsed { interim, head: None }),
            // Nobody asked to leave HTTP: what follows could not be followed, and would pass uncounted.
            Some((head, _)) if head.status() == 101 && !request.upgrade => return Err(Refusal::BadUpstream),
            Some((head, len)) => {
                early.drain(..len);
                if !head.is_interim() {
                    return Ok(Parsed {
                        interim,
                        head: Some(head),
                    });
                }
                // The gateway has said `100 Continue` itself.
                if request.interim && head.status() != 100 {
                    rewrite::interim_head(&head, &mut interim);
                }
            }
        }
    }
}

/// Sends head and body, and gives the client's direction back.
async fn send<'c>(
    worker: &Worker,
    request: Request<'_>,
    reader: Reader<'c>,
    writer: &mut WriteHalf<'_>,
    recording: &mut Recording,
) -> Result<Reader<'c>, Unsent> {
    match request.body {
        Body::Whole(body) => {
            let body = request.edited.unwrap_or(body);
            write_both(writer, request.head, body).await?;
            Ok(reader)
        }
        Body::Begun { first, rest } => {
            writer.write_all(request.head).await?;
            write_framed(writer, first, request.rechunked).await?;
            let mut framed = Vec::new();
            let mut rest = rest.clone();
            let limits = &worker.shared.config.proxy;
            let mut receiver = Receiver {
                reader,
                limits,
                recording,
            };
            let (max_body, mut total) = (limits.max_body.as_len() as u64, first.len() as u64);
            while !rest.is_done() {
                let input = receiver.input().await.map_err(Unsent::Stop)?;
                framed.clear();
                receiver
                    .take(&input, &mut rest, |payload| {
                        total += payload.len() as u64;
                        frame(payload, request.rechunked, &mut framed);
                    })
                    .map_err(|refusal| Unsent::Stop(refusal.into()))?;
                if total > max_body {
                    return Err(Unsent::Stop(Refusal::BodyTooLarge(max_body).into()));
                }
                writer.write_all(&framed).await?;
            }
            if request.rechunked {
                writer.write_all(b"0\r\n\r\n").await?;
            }
            Ok(receiver.reader)
        }
    }
}

/// Head and body in one system call, as a rule.
async fn write_both(writer: &mut WriteHalf<'_>, head: &[u8], body: &[u8]) -> io::Result<()> {
    let written = writer
        .write_vectored(&[io::IoSlice::new(head), io::IoSlice::new(body)])
        .await?;
    if written < head.len() {
        writer.write_all(&head[written..]).await?;
        return writer.write_all(body).await;
    }
    writer.write_all(&body[written - head.len()..]).await
}

/// Sends `payload` from where it lies: up to `inspect_max` was read ahead, and a copy would be held for as long as the rest takes.
async fn write_framed(writer: &mut WriteHalf<'_>, payload: &[u8], chunked: bool) -> io::Result<()> {
    if !chunked || payload.is_empty() {
        return writer.write_all(payload).await;
    }
    writer
        .write_all(format!("{:x}\r\n", payload.len()).as_bytes())
        .await?;
    writer.write_all(payload).await?;
    writer.write_all(b"\r\n").await
}

fn frame(payload: &[u8], chunked: bool, out: &mut Vec<u8>) {
    if !chunked {
        out.extend_from_slice(payload);
    } else if !payload.is_empty() {
        // Writing to a vector cannot fail.
        let _ = write!(out, "{:x}\r\n", payload.len());
        out.extend_from_slice(payload);
        out.extend_from_slice(b"\r\n");
    }
}

impl From<io::Error> for Unsent {
    fn from(_: io::Error) -> Unsent {
        Unsent::Upstream
    }
}
