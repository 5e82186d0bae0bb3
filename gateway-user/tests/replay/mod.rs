//! Real captures of vLLM as messages, and a server that plays them byte for byte.

pub mod event;
pub mod heads;
pub mod stream;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// One exchange (or several, on one connection) with a real vLLM.
pub struct Capture {
    pub name: String,
    pub request: Vec<u8>,
    pub response: Vec<u8>,
    pub about: Value,
}

impl Capture {
    pub fn load(name: &str) -> Capture {
        let read = |extension: &str| {
            let file = folder().join(format!("{name}.{extension}"));
            std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
        };
        let about = serde_json::from_slice(&read("json")).expect("JSON");
        Capture {
            name: name.to_owned(),
            request: read("request"),
            response: read("response"),
            about,
        }
    }

    /// Every capture, by name.
    pub fn all() -> Vec<Capture> {
        let files = std::fs::read_dir(folder())
            .expect("the captures")
            .map(|entry| entry.expect("an entry").path());
        let requests = files.filter(|file| file.extension().is_some_and(|extension| extension == "request"));
        let mut names: Vec<_> = requests
            .map(|file| file.file_stem().expect("a name").to_string_lossy().into_owned())
            .collect();
        names.sort();
        assert!(names.len() >= 40, "the captures are not where they should be");
        names.iter().map(|name| Capture::load(name)).collect()
    }

    /// Whether the client left before the response had ended.
    pub fn is_aborted(&self) -> bool {
        self.about["aborted_by_client"].as_bool().expect("a flag")
    }

    /// How much one of vLLM's counters moved because of this capture, over all its labels.
    pub fn counter(&self, name: &str) -> u64 {
        let prefix = format!("{name}{{");
        let deltas = self.about["metrics_delta"].as_object().expect("deltas").iter();
        deltas
            .filter(|(series, _)| series.starts_with(&prefix))
            .map(|(_, delta)| delta.as_f64().expect("a number") as u64)
            .sum()
    }

    /// Its requests, one after the other.
    pub fn requests(&self) -> Vec<Vec<u8>> {
        messages(&self.request)
    }

    /// Its responses, one after the other; the last is cut off where the client left.
    pub fn responses(&self) -> Vec<Vec<u8>> {
        messages(&self.response)
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vllm-0.32.0")
}

fn messages(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (message, rest) = bytes.split_at(message_len(bytes).unwrap_or(bytes.len()));
        found.push(message.to_vec());
        bytes = rest;
    }
    found
}

/// How long the message is that `bytes` begin with, framing included; `None` when it is not all there.
pub fn message_len(bytes: &[u8]) -> Option<usize> {
    let head_len = head_len(bytes)?;
    let head = String::from_utf8_lossy(&bytes[..head_len]).to_lowercase();
    if head.contains("\r\ntransfer-encoding: chunked\r\n") {
        let (_, len) = chunks(&bytes[head_len..])?;
        return Some(head_len + len);
    }
    let length = head
        .split("\r\ncontent-length: ")
        .nth(1)
        .and_then(|rest| rest.lines().next());
    let len = head_len + length.map_or(0, |length| length.parse::<usize>().expect("a length"));
    (len <= bytes.len()).then_some(len)
}

/// A message's head, blank line included.
pub fn head(message: &[u8]) -> &[u8] {
    &message[..head_len(message).expect("a whole head")]
}

/// What follows a message's head, framing included.
pub fn body(message: &[u8]) -> &[u8] {
    &message[head(message).len()..]
}

fn head_len(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .map(|at| at + 4)
}

/// The chunks of a whole chunked body, and how long it is.
pub fn chunks(body: &[u8]) -> Option<(Vec<&[u8]>, usize)> {
    let (mut chunks, mut at) = (Vec::new(), 0);
    loop {
        let line = body.get(at..)?.windows(2).position(|window| window == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&body[at..at + line]).expect("text"), 16)
            .expect("a size");
        let start = at + line + 2;
        let payload = body.get(start..start + size)?;
        at = start + size + 2;
        assert!(
            body.get(start + size..at)? == b"\r\n",
            "a chunk is longer than it says"
        );
        if size == 0 {
            return Some((chunks, at));
        }
        chunks.push(payload);
    }
}

/// In what pieces bytes are written. The kernel may join neighbours; that only makes other cuts.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    Whole,
    Bytewise,
    /// Pieces of random lengths, short ones as likely as long ones; the seed fixes them.
    Random(u64),
}

impl Cut {
    /// Writes `bytes` in these pieces.
    pub async fn write(self, stream: &mut TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
        let mut random = StdRng::seed_from_u64(if let Cut::Random(seed) = self { seed } else { 0 });
        while !bytes.is_empty() {
            let len = match self {
                Cut::Whole => bytes.len(),
                Cut::Bytewise => 1,
                Cut::Random(_) => 1 << random.random_range(0..11),
            };
            let (piece, rest) = bytes.split_at(match self {
                Cut::Random(_) => random.random_range(1..=len).min(bytes.len()),
                _ => len,
            });
            stream.write_all(piece).await?;
            tokio::task::yield_now().await;
            bytes = rest;
        }
        Ok(())
    }
}

/// What the server answers to a request.
#[derive(Clone)]
enum Played {
    /// These bytes. A cut-off response is held open until the other side leaves.
    Response { bytes: Vec<u8>, cut_off: bool },
    /// The capture `NAME_{none|final|continuous}` that fits the `stream_options` which the server received.
    Triple(String),
}

struct Script {
    to_play: VecDeque<Played>,
    cut: Cut,
    received: Vec<Vec<u8>>,
}

/// A server that answers with captures.
pub struct Replay {
    pub addr: SocketAddr,
    script: Arc<Mutex<Script>>,
}

impl Replay {
    /// Starts it on a free port; it lives as long as the test's runtime.
    pub async fn start() -> Replay {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let script = Script {
            to_play: VecDeque::new(),
            cut: Cut::Whole,
            received: Vec::new(),
        };
        let script = Arc::new(Mutex::new(script));
        let shared = Arc::clone(&script);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Replay { addr, script }
    }

    /// Answers the next requests with the responses of `capture`, in order.
    pub fn play(&self, capture: &Capture, cut: Cut) {
        let responses = capture.responses();
        let count = responses.len();
        let plays = responses.into_iter().enumerate().map(|(index, bytes)| {
            let cut_off = capture.is_aborted() && index + 1 == count;
            Played::Response { bytes, cut_off }
        });
        self.put(plays.collect(), cut);
    }

    /// Answers the next request with that capture of `triple` which it asks for.
    pub fn play_triple(&self, triple: &str, cut: Cut) {
        self.put(VecDeque::from([Played::Triple(triple.to_owned())]), cut);
    }

    fn put(&self, plays: VecDeque<Played>, cut: Cut) {
        let mut script = self.script.lock().expect("no panic");
        assert!(
            script.to_play.is_empty(),
            "the responses before were not all asked for"
        );
        (script.to_play, script.cut) = (plays, cut);
    }

    /// The requests that came since the last call, as the server saw them.
    pub fn received(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.script.lock().expect("no panic").received)
    }
}

async fn serve(mut stream: TcpStream, script: Arc<Mutex<Script>>) {
    stream.set_nodelay(true).expect("a socket option");
    let mut unread = Vec::new();
    while let Some(request) = read_message(&mut stream, &mut unread).await {
        let text = String::from_utf8_lossy(head(&request)).to_lowercase();
        if !text.contains("x-gateway-request-id: ") {
            // The gateway's own health check.
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            drop(stream.write_all(answer).await);
            return;
        }
        let (answer, cut_off, cut) = {
            let mut script = script.lock().expect("no panic");
            let played = script
                .to_play
                .pop_front()
                .expect("a request that no response was put in for");
            let (answer, cut_off) = match played {
                Played::Response { bytes, cut_off } => (bytes, cut_off),
                Played::Triple(name) => (
                    Capture::load(&format!("{name}_{}", asked(&request))).response,
                    false,
                ),
            };
            script.received.push(request);
            (answer, cut_off, script.cut)
        };
        if cut.write(&mut stream, &answer).await.is_err() {
            return;
        }
        if cut_off {
            let mut rest = Vec::new();
            drop(stream.read_to_end(&mut rest).await);
            return;
        }
    }
}

/// Which capture of a triple a request asks for, as vLLM reads it.
pub fn asked(request: &[u8]) -> &'static str {
    let body: Value = serde_json::from_slice(body(request)).expect("JSON");
    let options = &body["stream_options"];
    let flag = |name: &str| options[name].as_bool().unwrap_or(false);
    match (flag("include_usage"), flag("continuous_usage_stats")) {
        (false, _) => "none",
        (true, false) => "final",
        (true, true) => "continuous",
    }
}

/// Reads one message; what comes behind it stays in `unread`. `None` at the end of the connection.
pub async fn read_message(stream: &mut TcpStream, unread: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        if let Some(len) = message_len(unread) {
            return Some(unread.drain(..len).collect());
        }
        match stream.read_buf(unread).await {
            Ok(read) if read > 0 => {}
            _ => return None,
        }
    }
}
