//! The client against a small server on a socket: everything that a server can do to it.

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

#[tokio::test]
async fn an_unstreamed_abort_and_a_timeout_close_the_socket_in_time() {
    // Long enough for the request to go out on a busy machine: the server must have seen it.
    let patience = Duration::from_millis(150);
    let aborted = one(unstreamed(Fate::AbortAfter(patience)), vec![], true).await;
    assert_eq!(
        (aborted.outcome, aborted.sent),
        (Outcome::Aborted, true),
        "{aborted:?}"
    );
    assert!(aborted.e2e_us >= 150_000, "{aborted:?}");
    let mut bench = Bench::new(vec![vec![vec![]]], true).await;
    bench.client.timeout = patience;
    let late = bench.perform(&unstreamed(Fate::Complete)).await;
    assert_eq!((late.outcome, late.sent), (Outcome::Timeout, true), "{late:?}");
    assert!(late.e2e_us >= 150_000, "{late:?}");
    assert_eq!(bench.finish().await, [1]);
}

#[tokio::test]
async fn stopping_the_run_closes_what_is_under_way() {
    let Bench {
        mut client,
        server,
        stats,
        stop,
    } = Bench::new(vec![vec![sse(&[TEXT, TEXT])]], true).await;
    let planned = streamed(Fate::Complete);
    let stop_in_mid_stream = async {
        while lock(&stats).itl.figures().is_none() {
            tokio::task::yield_now().await;
        }
        stop.send_replace(true);
    };
    let both = async { tokio::join!(client.perform(&planned, Instant::now()), stop_in_mid_stream) };
    let (seen, ()) = tokio::time::timeout(DEADLINE, both)
        .await
        .expect("the stop is heard");
    assert_eq!(
        (seen.outcome, seen.content.chunks),
        (Outcome::Aborted, 2),
        "{seen:?}"
    );
    let requests = tokio::time::timeout(DEADLINE, server)
        .await
        .expect("the socket was closed");
    assert_eq!(requests.expect("no panic"), [1]);
}

#[tokio::test]
async fn latency_counts_from_when_the_request_was_due() {
    let mut bench = Bench::new(vec![vec![json(200, USAGE)]], true).await;
    let due = Instant::now() - Duration::from_secs(3);
    let seen = bench.client.perform(&unstreamed(Fate::Complete), due).await;
    assert!(seen.lag_us >= 3_000_000 && seen.e2e_us >= seen.lag_us, "{seen:?}");
    bench.finish().await;
}
