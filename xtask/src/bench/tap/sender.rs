//! Streams as an engine's server sends them, at a rate that is kept: both ends of each connection are here, in one thread.
//!
//! Every piece is written by itself, so that it is a packet and a record. A client reads its answer once it is whole, which saves half of
//! the calls; answers are short enough to wait in the socket until then.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

const REQUEST: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\nHost: server\r\nX-Team-ID: team-1\r\nContent-Type: application/json\r\n\
    Content-Length: 73\r\n\r\n{\"model\":\"sim\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]}";

const HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n";

const START: &str = r#"{"id":"chatcmpl-2f1be4a3a0a84c0db6f0a2b7cf1d9a10","object":"chat.completion.chunk","created":1764000000,"model":"sim","choices":"#;
const TOKEN: &str = r#"[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":9,"total_tokens":12,"completion_tokens":3}}"#;
const LAST: &str = r#"[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"total_tokens":12,"completion_tokens":3}}"#;

/// How often the sender looks what is due.
const TICK: Duration = Duration::from_millis(1);

/// An end that does not come must not hang the bench.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Records in a second, over all streams.
    pub records_per_s: u32,
    /// Streams at a time.
    pub streams: usize,
    /// Chunks with a token in each of them.
    pub chunks: usize,
    /// A connection for each stream, in place of one for all of its place.
    pub reconnects: bool,
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sent {
    /// Packets that say something: those with payload, and the ends of connections.
    pub records: u64,
    /// Streams, all of them read to their end.
    pub streams: u64,
    /// How long it took.
    pub seconds: f64,
}

/// A server and its clients.
pub struct Sender {
    listener: TcpListener,
    addr: SocketAddr,
    token: Vec<u8>,
    last: Vec<u8>,
    answer: Vec<u8>,
}

/// One place for a stream.
#[derive(Default)]
struct Place {
    ends: Option<[TcpStream; 2]>,
    /// Pieces of the answer that were sent; 0 is before a request.
    sent: usize,
}

impl Sender {
    /// Listens.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn new() -> Result<Sender> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port on loopback is free")?;
        let addr = listener.local_addr()?;
        Ok(Sender {
            listener,
            addr,
            token: chunk(&format!("data: {START}{TOKEN}\n\n")),
            last: [
                chunk(&format!("data: {START}{LAST}\n\n")),
                chunk("data: [DONE]\n\n"),
                b"0\r\n\r\n".to_vec(),
            ]
            .concat(),
            answer: Vec::new(),
        })
    }

    /// Where its server listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Sends for so long, and then what is left of streams that have begun. What could not be sent in time is sent late.
    ///
    /// # Errors
    /// When a connection cannot be made or breaks off.
    pub fn run(&mut self, shape: Shape, duration: Duration) -> Result<Sent> {
        let mut places: Vec<Place> = (0..shape.streams).map(|_| Place::default()).collect();
        // The ends of the places lie apart in time, as those of any streams do.
        let mut sent = Sent::default();
        self.stagger(&mut places, shape, &mut sent)?;
        let (started, mut turn) = (Instant::now(), 0);
        sent.records = 0;
        while started.elapsed() < duration {
            let due = (started.elapsed().as_secs_f64() * f64::from(shape.records_per_s)) as u64;
            while sent.records < due {
                self.step(&mut places[turn], shape, &mut sent)?;
                turn = (turn + 1) % shape.streams;
            }
            thread::sleep(TICK);
        }
        sent.seconds = started.elapsed().as_secs_f64();
        let in_time = sent.records;
        for place in &mut places {
            while place.sent > 0 {
                self.step(place, shape, &mut sent)?;
            }
        }
        sent.records = in_time;
        Ok(sent)
    }

    fn stagger(&mut self, places: &mut [Place], shape: Shape, sent: &mut Sent) -> Result<()> {
        for (number, place) in places.iter_mut().enumerate() {
            for _ in 0..1 + number * shape.chunks / shape.streams {
                self.step(place, shape, sent)?;
            }
        }
        Ok(())
    }

    /// Sends the next piece of a stream.
    fn step(&mut self, place: &mut Place, shape: Shape, sent: &mut Sent) -> Result<()> {
        if place.ends.is_none() {
            place.ends = Some(self.connect().context("cannot open a connection on loopback")?);
            // SYN and its answer.
            sent.records += 2;
        }
        let Some([client, server]) = &mut place.ends else {
            anyhow::bail!("expected a connection that was just opened");
        };
        if place.sent == 0 {
            client.write_all(REQUEST)?;
            self.answer.resize(REQUEST.len(), 0);
            server.read_exact(&mut self.answer)?;
            server.write_all(HEAD)?;
            sent.records += 2;
        } else if place.sent <= shape.chunks {
            server.write_all(&self.token)?;
            sent.records += 1;
        } else {
            server.write_all(&self.last)?;
            let len_bytes = HEAD.len() + shape.chunks * self.token.len() + self.last.len();
            self.answer.resize(len_bytes, 0);
            client
                .read_exact(&mut self.answer)
                .context("an answer was broken off")?;
            sent.records += 1;
            sent.streams += 1;
            place.sent = 0;
            if shape.reconnects {
                place.ends = None;
                sent.records += 2;
            }
            return Ok(());
        }
        place.sent += 1;
        Ok(())
    }

    fn connect(&self) -> io::Result<[TcpStream; 2]> {
        let client = TcpStream::connect(self.addr)?;
        let ours = client.local_addr()?;
        // The gateway asks every upstream how it is, this one too; it finds the door shut.
        let server = loop {
            let (server, peer) = self.listener.accept()?;
            if peer == ours {
                break server;
            }
        };
        for end in [&client, &server] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(READ_TIMEOUT))?;
        }
        Ok([client, server])
    }
}

/// A chunk of a chunked body.
fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_long_as_it_says() {
        let text = String::from_utf8_lossy(REQUEST);
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(
            head.ends_with(&format!("Content-Length: {}", body.len())),
            "{}",
            body.len()
        );
    }

    #[test]
    fn streams_are_read_to_their_end_on_any_kind_of_connection() {
        for reconnects in [false, true] {
            let shape = Shape {
                records_per_s: 20_000,
                streams: 3,
                chunks: 4,
                reconnects,
            };
            let sent = Sender::new()
                .expect("a port")
                .run(shape, Duration::from_millis(50))
                .expect("all of it read");
            assert!(sent.streams >= 3 && sent.records > 0, "{sent:?}");
        }
    }
}
