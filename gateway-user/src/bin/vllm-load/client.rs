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
mod tests {
    use super::*;
    use crate::mix::Endpoint;
    use crate::plan::tests::plan;
    use crate::target::tests::target;
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;

    /// Every wait of these tests ends by then, with a failure.
    const DEADLINE: Duration = Duration::from_secs(10);

    /// The pieces of one response, one write each.
    type Answer = Vec<Vec<u8>>;

    /// Takes the connections in turn. On each it answers as many requests as it has answers, and then closes, or
    /// after the very last one waits for the client to close, if `linger`. Returns the requests of each connection.
    async fn serve(listener: TcpListener, connections: Vec<Vec<Answer>>, linger: bool) -> Vec<usize> {
        let mut requests = Vec::new();
        let (mut last, count_of_connections) = (None, connections.len());
        for answers in connections {
            let (mut socket, _) = listener.accept().await.expect("a client");
            socket.set_nodelay(true).expect("an option");
            let mut count = 0;
            for answer in answers {
                if read_request(&mut socket).await.is_none() {
                    break;
                }
                count += 1;
                for piece in answer {
                    // A client that has left is what some of the tests are about.
                    let _ = socket.write_all(&piece).await;
                    tokio::task::yield_now().await;
                }
            }
            requests.push(count);
            last = Some(socket).filter(|_| requests.len() == count_of_connections);
        }
        if let Some(mut socket) = last.filter(|_| linger) {
            while socket.read_u8().await.is_ok() {}
        }
        requests
    }

    async fn read_request(socket: &mut TcpStream) -> Option<()> {
        let mut seen = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&seen);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let (_, length) = head.split_once("Content-Length: ").expect("a length");
                if body.len() >= length.parse::<usize>().expect("the last header") {
                    return Some(());
                }
            }
            if socket.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    struct Bench {
        client: Client,
        server: JoinHandle<Vec<usize>>,
        stats: SharedStats,
        stop: watch::Sender<bool>,
    }

    impl Bench {
        async fn new(connections: Vec<Vec<Answer>>, linger: bool) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address");
            let server = tokio::spawn(serve(listener, connections, linger));
            let (stop, stopped) = watch::channel(false);
            let stats = SharedStats::default();
            let client = Client::new(
                Arc::new(target(vec![address], &[])),
                stats.clone(),
                stopped,
                DEADLINE,
            );
            Self {
                client,
                server,
                stats,
                stop,
            }
        }

        async fn perform(&mut self, planned: &Planned) -> Observation {
            self.client.perform(planned, Instant::now()).await
        }

        /// How many requests each connection saw.
        async fn finish(self) -> Vec<usize> {
            drop(self.client);
            tokio::time::timeout(DEADLINE, self.server)
                .await
                .expect("the server ends")
                .expect("no panic")
        }
    }

    /// One request to a server that gives one answer, and then closes or lingers.
    async fn one(planned: Planned, answer: Answer, linger: bool) -> Observation {
        let mut bench = Bench::new(vec![vec![answer]], linger).await;
        let seen = bench.perform(&planned).await;
        assert_eq!(bench.finish().await, [1]);
        seen
    }

    fn streamed(fate: Fate) -> Planned {
        Planned {
            endpoint: Endpoint::Completions,
            stream: true,
            fate,
            ..plan().request(0)
        }
    }

    fn unstreamed(fate: Fate) -> Planned {
        Planned {
            stream: false,
            ..streamed(fate)
        }
    }

    fn json(status: u16, body: &str) -> Answer {
        let length = body.len();
        vec![format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()]
    }

    const USAGE: &str = r#"{"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}"#;
    const TEXT: &str = r#"data: {"choices":[{"text":"a"}]}"#;
    const LAST: &str = r#"data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
    const DONE: &str = "data: [DONE]";

    /// A head and one chunk for each event; the body's end is left out.
    fn sse(events: &[&str]) -> Answer {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        let chunk = |event: &&str| format!("{:x}\r\n{event}\n\n\r\n", event.len() + 2).into_bytes();
        std::iter::once(head.into())
            .chain(events.iter().map(chunk))
            .collect()
    }

    fn whole_sse(events: &[&str]) -> Answer {
        let mut answer = sse(events);
        answer.push(b"0\r\n\r\n".to_vec());
        answer
    }

    #[tokio::test]
    async fn a_connection_is_kept_and_a_stale_one_is_replaced_once() {
        let answer = || json(200, USAGE);
        let mut bench = Bench::new(vec![vec![answer(), answer()], vec![answer()]], false).await;
        for retried in [false, false, true] {
            let seen = bench.perform(&unstreamed(Fate::Complete)).await;
            assert_eq!(
                (seen.outcome, seen.status, seen.retried),
                (Outcome::Ok, Some(200), retried),
                "{seen:?}"
            );
            assert_eq!(seen.content.tokens.prompt, Some(7));
            assert!(seen.ttft_us.is_none() && seen.first_byte_us.is_some());
        }
        assert_eq!(bench.finish().await, [2, 1]);
    }

    #[tokio::test]
    async fn a_fresh_connection_that_closes_is_not_retried() {
        let seen = one(unstreamed(Fate::Complete), vec![], false).await;
        assert_eq!(
            (seen.outcome, seen.failure),
            (Outcome::TransportError, Some(Failure::ClosedBeforeResponse))
        );
        assert!(seen.sent && !seen.retried);
    }

    #[tokio::test]
    async fn nobody_listening_is_a_transport_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let (_stop, stopped) = watch::channel(false);
        let target = Arc::new(target(vec![address], &[]));
        let mut client = Client::new(target, SharedStats::default(), stopped, DEADLINE);
        let seen = client.perform(&unstreamed(Fate::Complete), Instant::now()).await;
        assert_eq!(
            (seen.outcome, seen.failure),
            (Outcome::TransportError, Some(Failure::ConnectRefused))
        );
        assert!(!seen.sent);
    }

    #[tokio::test]
    async fn a_stream_split_anywhere_gives_its_chunks_usage_and_gaps() {
        let wire = whole_sse(&[TEXT, ": keep-alive", TEXT, LAST, DONE]).concat();
        for size in [1, 7, 40, wire.len()] {
            let pieces = wire.chunks(size).map(<[u8]>::to_vec).collect();
            let mut bench = Bench::new(vec![vec![pieces]], true).await;
            let seen = bench.perform(&streamed(Fate::Complete)).await;
            assert_eq!(seen.outcome, Outcome::Ok, "{seen:?}");
            assert_eq!((seen.content.chunks, seen.content.events), (2, 3));
            assert_eq!(
                (seen.content.tokens.prompt, seen.content.tokens.completion),
                (Some(3), Some(2))
            );
            assert_eq!(seen.bytes_received, wire.len() as u64);
            let (first_byte, ttft) = (seen.first_byte_us.expect("bytes"), seen.ttft_us.expect("content"));
            assert!(first_byte <= ttft && ttft <= seen.e2e_us);
            assert_eq!(lock(&bench.stats).itl.figures().expect("a gap").count, 1);
            assert!(
                bench.client.connection.is_some(),
                "a stream that ended leaves its connection usable"
            );
            bench.finish().await;
        }
    }

    #[tokio::test]
    async fn a_stream_that_the_close_ends_is_whole_only_after_its_terminal_event() {
        let until_close = |events: &str| {
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
            vec![format!("{head}{events}").into_bytes()]
        };
        let whole = one(
            streamed(Fate::Complete),
            until_close(&format!("{TEXT}\n\n{DONE}\n\n")),
            false,
        )
        .await;
        assert_eq!((whole.outcome, whole.content.chunks), (Outcome::Ok, 1));
        let cut = one(
            streamed(Fate::Complete),
            until_close(&format!("{TEXT}\n\n")),
            false,
        )
        .await;
        assert_eq!(
            (cut.outcome, cut.failure),
            (Outcome::Truncated, Some(Failure::NoTerminalEvent))
        );
    }

    #[tokio::test]
    async fn a_stream_cut_within_its_body_is_truncated() {
        let seen = one(streamed(Fate::Complete), sse(&[TEXT, TEXT]), false).await;
        assert_eq!(
            (seen.outcome, seen.failure),
            (Outcome::Truncated, Some(Failure::ClosedInBody))
        );
        assert_eq!((seen.content.chunks, seen.status), (2, Some(200)));
    }

    #[tokio::test]
    async fn an_error_is_told_by_status_or_by_event() {
        let refused = one(unstreamed(Fate::Complete), json(503, r#"{"error":"busy"}"#), true).await;
        assert_eq!((refused.outcome, refused.status), (Outcome::HttpError, Some(503)));
        let events = [TEXT, r#"data: {"error":{"code":500}}"#, DONE];
        let broken = one(streamed(Fate::Complete), whole_sse(&events), true).await;
        assert_eq!(
            (broken.outcome, broken.failure),
            (Outcome::StreamError, Some(Failure::ErrorEvent))
        );
        let alien = one(
            unstreamed(Fate::Complete),
            vec![b"220 mail ready\r\n".to_vec()],
            true,
        )
        .await;
        assert_eq!(
            (alien.outcome, alien.failure),
            (Outcome::TransportError, Some(Failure::BadHead))
        );
    }

    #[tokio::test]
    async fn an_abort_closes_the_socket_after_its_chunks() {
        // The server lingers until the client closes: that it ends proves that the socket was closed.
        let seen = one(streamed(Fate::AbortAfterChunks(2)), sse(&[TEXT, TEXT]), true).await;
        assert_eq!((seen.outcome, seen.content.chunks), (Outcome::Aborted, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unstreamed_abort_and_a_timeout_close_the_socket_in_time() {
        let after = Duration::from_millis(20);
        let aborted = one(unstreamed(Fate::AbortAfter(after)), vec![], true).await;
        assert_eq!(
            (aborted.outcome, aborted.e2e_us),
            (Outcome::Aborted, 20_000),
            "{aborted:?}"
        );
        let late = one(unstreamed(Fate::Complete), vec![], true).await;
        assert_eq!(late.outcome, Outcome::Timeout, "{late:?}");
        assert_eq!(late.e2e_us, DEADLINE.as_micros() as u64);
    }

    #[tokio::test]
    async fn stopping_the_run_ends_what_is_under_way() {
        let mut bench = Bench::new(vec![vec![vec![]]], true).await;
        bench.stop.send(true).expect("a client listens");
        // The first poll sends nothing yet: the connect is pending when the stop is seen.
        let seen = bench.perform(&unstreamed(Fate::Complete)).await;
        assert_eq!(seen.outcome, Outcome::Aborted);
    }

    #[tokio::test]
    async fn latency_counts_from_when_the_request_was_due() {
        let mut bench = Bench::new(vec![vec![json(200, USAGE)]], true).await;
        let due = Instant::now() - Duration::from_secs(3);
        let seen = bench.client.perform(&unstreamed(Fate::Complete), due).await;
        assert!(seen.lag_us >= 3_000_000 && seen.e2e_us >= seen.lag_us, "{seen:?}");
        bench.finish().await;
    }
}
