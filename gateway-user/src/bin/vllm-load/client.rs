//! One keep-alive connection and the requests that go over it.
//!
//! A thin client over a socket instead of an HTTP library, for its clocks: it takes a time at every read, knows
//! the first byte from the first chunk with content, and closes the socket exactly when the plan says so. It keeps
//! the read buffer and nothing else of a response, and whatever a server sends becomes an outcome, never a panic.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::content::Content;
use crate::failure::{Failure, Outcome};
use crate::http::{BodyDecoder, Head, parse_head};
use crate::plan::{Fate, Planned};
use crate::stats::{SharedStats, lock};
use crate::target::Target;

/// How much one read can take: a burst of some sixty chunks, or a whole unstreamed answer.
const READ_BYTES: usize = 16 * 1024;

/// What was seen of one request.
#[derive(Debug)]
pub struct Observation {
    /// How it ended.
    pub outcome: Outcome,
    /// Why, when it did not end well.
    pub failure: Option<Failure>,
    /// The response's status, once its head came.
    pub status: Option<u16>,
    /// The request went out whole.
    pub sent: bool,
    /// What the body said.
    pub content: Content,
    /// From the origin to the moment the client began to work on it: how late an open loop is.
    pub lag_us: u64,
    /// From the origin to the first byte of the response.
    pub first_byte_us: Option<u64>,
    /// From the origin to the first chunk with content.
    pub ttft_us: Option<u64>,
    /// From the origin to the end, whatever it was.
    pub e2e_us: u64,
    /// Bytes written.
    pub bytes_sent: u64,
    /// Bytes read.
    pub bytes_received: u64,
    /// Connections opened for it.
    pub connects: u32,
    /// It was sent again since the server had closed an idle connection.
    pub retried: bool,
    last_chunk: Option<Instant>,
}

impl Observation {
    fn new(lag_us: u64) -> Self {
        Self {
            outcome: Outcome::TransportError,
            failure: None,
            status: None,
            sent: false,
            content: Content::default(),
            lag_us,
            first_byte_us: None,
            ttft_us: None,
            e2e_us: 0,
            bytes_sent: 0,
            bytes_received: 0,
            connects: 0,
            retried: false,
            last_chunk: None,
        }
    }
}

/// A client with at most one connection, which it keeps between requests.
#[derive(Debug)]
pub struct Client {
    target: Arc<Target>,
    stats: SharedStats,
    stop: watch::Receiver<bool>,
    timeout: Duration,
    connection: Option<Connection>,
    out: Vec<u8>,
}

#[derive(Debug)]
struct Connection {
    socket: TcpStream,
    input: BytesMut,
}

/// What [`Client::attempt`] works on besides the client itself.
struct Exchange<'a> {
    planned: &'a Planned,
    origin: Instant,
    seen: &'a mut Observation,
}

impl Client {
    /// A client that is not connected yet. Gaps between chunks go to `stats` as they are seen; `stop` turning
    /// true ends what is under way.
    pub fn new(
        target: Arc<Target>,
        stats: SharedStats,
        stop: watch::Receiver<bool>,
        timeout: Duration,
    ) -> Self {
        Self {
            target,
            stats,
            stop,
            timeout,
            connection: None,
            out: Vec::new(),
        }
    }

    /// Sends one request and reads its response. All times count from `origin`, the moment at which the request
    /// was due: had they counted from when it was sent, a server that makes us late would look fast.
    pub async fn perform(&mut self, planned: &Planned, origin: Instant) -> Observation {
        let begun = Instant::now();
        let mut seen = Observation::new(micros(begun - origin));
        let (wait, at_deadline) = match planned.fate {
            Fate::AbortAfter(after) if after < self.timeout => (after, Outcome::Aborted),
            _ => (self.timeout, Outcome::Timeout),
        };
        let mut stop = self.stop.clone();
        let exchange = self.exchange(Exchange {
            planned,
            origin,
            seen: &mut seen,
        });
        // Whichever arm wins, dropping the exchange closes the socket that it took out of the client.
        let result = tokio::select! {
            biased;
            result = exchange => result,
            () = sleep_until(begun + wait) => Ok(at_deadline),
            // The sender outlives every client; were it gone, nobody could want more of this run.
            _ = stop.wait_for(|stopped| *stopped) => Ok(Outcome::Aborted),
        };
        seen.e2e_us = micros(origin.elapsed());
        seen.outcome = result.unwrap_or_else(|failure| {
            seen.failure = Some(failure);
            match (failure, seen.status) {
                (Failure::ErrorEvent, _) => Outcome::StreamError,
                (_, Some(_)) => Outcome::Truncated,
                (_, None) => Outcome::TransportError,
            }
        });
        seen
    }

    async fn exchange(&mut self, mut exchange: Exchange<'_>) -> Result<Outcome, Failure> {
        let kept = self.connection.is_some();
        self.target.render(exchange.planned, &mut self.out);
        let first = self.attempt(&mut exchange).await;
        match first {
            // A server may close an idle connection while our request is on its way: it was not looked at, so it
            // is sent again, once, on a connection that cannot be stale.
            Err(Failure::ClosedBeforeResponse) if kept && exchange.seen.bytes_received == 0 => {
                exchange.seen.retried = true;
                self.attempt(&mut exchange).await
            }
            result => result,
        }
    }

    async fn attempt(&mut self, exchange: &mut Exchange<'_>) -> Result<Outcome, Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                exchange.seen.connects += 1;
                Connection::open(&self.target).await?
            }
        };
        // A server that refuses a long request may answer and close before it has read it all: so a failed write
        // is no end yet.
        exchange.seen.sent = connection.socket.write_all(&self.out).await.is_ok();
        exchange.seen.bytes_sent += if exchange.seen.sent {
            self.out.len() as u64
        } else {
            0
        };
        let head = connection.head(exchange).await?;
        exchange.seen.status = Some(head.status);
        let (outcome, whole) = connection.body(head, exchange, &self.stats).await?;
        if whole && head.keep_alive && exchange.seen.sent && connection.input.is_empty() {
            self.connection = Some(connection);
        }
        Ok(outcome)
    }
}

impl Connection {
    async fn open(target: &Target) -> Result<Self, Failure> {
        let socket = TcpStream::connect(&target.addresses[..])
            .await
            .map_err(|error| Failure::of_connect(&error))?;
        // Without it a request of two segments would wait for the acknowledgement of the first.
        socket
            .set_nodelay(true)
            .map_err(|error| Failure::of_connect(&error))?;
        Ok(Self {
            socket,
            input: BytesMut::with_capacity(READ_BYTES),
        })
    }

    /// Reads more; 0 is the end of the connection, be it by a close or a reset.
    async fn fill(&mut self, exchange: &mut Exchange<'_>) -> usize {
        self.input.reserve(READ_BYTES);
        let read = self.socket.read_buf(&mut self.input).await.unwrap_or(0);
        exchange.seen.bytes_received += read as u64;
        if read > 0 && exchange.seen.first_byte_us.is_none() {
            exchange.seen.first_byte_us = Some(micros(exchange.origin.elapsed()));
        }
        read
    }

    /// Reads the response's head, past any interim ones.
    async fn head(&mut self, exchange: &mut Exchange<'_>) -> Result<Head, Failure> {
        loop {
            match parse_head(&self.input)? {
                Some((head, length)) => {
                    self.input.advance(length);
                    if head.status >= 200 {
                        return Ok(head);
                    }
                }
                None if self.fill(exchange).await == 0 => return Err(Failure::ClosedBeforeResponse),
                None => {}
            }
        }
    }

    /// Reads the body; also says whether all of it was read.
    async fn body(
        &mut self,
        head: Head,
        exchange: &mut Exchange<'_>,
        stats: &SharedStats,
    ) -> Result<(Outcome, bool), Failure> {
        let mut decoder = BodyDecoder::new(head.framing);
        loop {
            let mut chunks = 0;
            while let Some(step) = decoder.step(&self.input)? {
                let data = &self.input[step.data];
                if head.event_stream {
                    chunks += exchange.seen.content.push_stream(data);
                } else {
                    exchange.seen.content.push_document(data);
                }
                self.input.advance(step.consumed);
            }
            exchange.saw_chunks(chunks, stats);
            if matches!(exchange.planned.fate, Fate::AbortAfterChunks(n) if exchange.seen.content.chunks >= n.into())
            {
                return Ok((Outcome::Aborted, false));
            }
            if decoder.is_done() {
                break;
            }
            if self.fill(exchange).await == 0 {
                if decoder.may_close() {
                    break;
                }
                return Err(Failure::ClosedInBody);
            }
        }
        Ok((conclude(head, &mut exchange.seen.content)?, decoder.is_done()))
    }
}

impl Exchange<'_> {
    /// Chunks that one read brought have one time: their gaps are zero, as a user sees them.
    fn saw_chunks(&mut self, chunks: u64, stats: &SharedStats) {
        if chunks == 0 {
            return;
        }
        let now = Instant::now();
        let mut stats = lock(stats);
        match self.seen.last_chunk {
            Some(last) => stats.itl.record(micros(now - last)),
            None => self.seen.ttft_us = Some(micros(now - self.origin)),
        }
        (1..chunks).for_each(|_| stats.itl.record(0));
        self.seen.last_chunk = Some(now);
    }
}

/// What a response that was read to its end amounts to.
fn conclude(head: Head, content: &mut Content) -> Result<Outcome, Failure> {
    if !head.event_stream {
        content.finish_document();
    }
    match head.status {
        200..=299 if content.error => Err(Failure::ErrorEvent),
        200..=299 if head.event_stream && !content.terminal => Err(Failure::NoTerminalEvent),
        200..=299 => Ok(Outcome::Ok),
        _ => Ok(Outcome::HttpError),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
