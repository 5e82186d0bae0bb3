//! The gateway as a process of its own, whose memory can be told from the test's, and an upstream that plays what it is asked for.

use crate::support::DEADLINE;
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vllm_gateway::wire::body::{BodyReader, Step};
use vllm_gateway::wire::head::Framing;

/// Soft limit on descriptors that the gateway is started with: as low as some systems', so that it must raise it by itself.
const SOFT_LIMIT: u32 = 256;

/// A running gateway.
pub struct ChildGateway {
    child: Child,
    dir: PathBuf,
    /// Where clients connect.
    pub addr: SocketAddr,
}

impl ChildGateway {
    /// Starts one in front of `upstream`, on free ports. `name` must be the test's own.
    pub fn start(name: &str, upstream: SocketAddr) -> ChildGateway {
        let dir = std::env::temp_dir().join(format!("vllm-gateway-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let config = format!(
            "gateway: {{listen: \"127.0.0.1:0\"}}\nadmin: {{listen: \"127.0.0.1:0\"}}\ncapture: proxy\nlog: {{format: json, level: info}}\nstore: {{url: none}}\n\
             upstreams:\n  - {{name: chat, url: \"http://{upstream}\", serves: generate}}\n"
        );
        std::fs::write(dir.join("config.yaml"), config).expect("a file");
        // `exec`, so that the process that is measured and stopped is the gateway and not the shell.
        let mut command = Command::new("/bin/sh");
        command.args([
            "-c",
            &format!("ulimit -Sn {SOFT_LIMIT} && exec \"$0\" run --config config.yaml"),
        ]);
        command
            .arg(env!("CARGO_BIN_EXE_vllm-gateway"))
            .current_dir(&dir)
            .env_remove("RUST_LOG");
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
        let addr = client_addr(&mut log);
        // A pipe that nobody reads would fill up and hold the gateway's log.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        ChildGateway { child, dir, addr }
    }

    /// What is resident now, in bytes.
    pub fn resident(&self) -> u64 {
        self.status_bytes("VmRSS:")
    }

    /// The most that was resident since the last [`ChildGateway::reset_peak`].
    pub fn peak(&self) -> u64 {
        self.status_bytes("VmHWM:")
    }

    /// Forgets the peak so far.
    pub fn reset_peak(&self) {
        // 5 is "reset the peak resident set size", see proc(5).
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").expect("our own process");
    }

    fn status_bytes(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .expect("Linux says so");
        let kib = line.trim().strip_suffix(" kB").expect("a size in kB");
        kib.trim().parse::<u64>().expect("a number") * 1024
    }
}

impl Drop for ChildGateway {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The clients' address out of the log.
fn client_addr(log: &mut impl BufRead) -> SocketAddr {
    let mut said = String::new();
    for line in log.lines() {
        let line = line.expect("text");
        let entry: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        if let Some(addr) = entry["fields"]["clients"].as_str() {
            return addr.parse().expect("an address");
        }
        said += &line;
        said.push('\n');
    }
    panic!("the gateway ended before it said where it listens:\n{said}")
}

/// What an upstream is asked for, in the header `X-Play`.
#[derive(Clone, Copy, Debug)]
pub enum Play {
    /// A small document.
    Document,
    /// A head and a first chunk, and then silence.
    Silence,
    /// A stream of so many events, each with so many characters of text.
    Stream {
        /// How many.
        events: u64,
        /// How long.
        text_bytes: usize,
    },
}

impl Play {
    fn header(self) -> String {
        match self {
            Play::Document => "document".to_owned(),
            Play::Silence => "silence".to_owned(),
            Play::Stream { events, text_bytes } => format!("{events} {text_bytes}"),
        }
    }

    fn of_head(head: &str) -> Play {
        let asked = head.lines().find_map(|line| line.strip_prefix("X-Play: "));
        match asked.map(|asked| (asked, asked.split_once(' '))) {
            Some(("silence", _)) => Play::Silence,
            Some((_, Some((events, text_bytes)))) => Play::Stream {
                events: events.parse().expect("a count"),
                text_bytes: text_bytes.parse().expect("a length"),
            },
            _ => Play::Document,
        }
    }
}

/// The server behind the gateway, within the test's process.
pub struct Upstream {
    /// Where it listens.
    pub addr: SocketAddr,
    /// What it did.
    pub deeds: Arc<Deeds>,
}

/// What an upstream did.
#[derive(Debug, Default)]
pub struct Deeds {
    /// Bytes of request bodies.
    pub received_bytes: AtomicU64,
    /// Payload of streams that the gateway took.
    pub sent_bytes: AtomicU64,
    /// Streams that are silent now.
    pub silent: AtomicUsize,
}

impl Upstream {
    /// Starts it on a free port; it ends with the test's runtime.
    pub async fn start() -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let deeds = Arc::new(Deeds::default());
        let shared = Arc::clone(&deeds);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let deeds = Arc::clone(&shared);
                // The gateway may leave at any time; then there is nothing left to play.
                tokio::spawn(async move { drop(serve(socket, &deeds).await) });
            }
        });
        Upstream { addr, deeds }
    }
}

async fn serve(mut socket: TcpStream, deeds: &Deeds) -> std::io::Result<()> {
    let mut unread = Vec::new();
    loop {
        let head = read_head(&mut socket, &mut unread).await?;
        let mut body = BodyReader::new(framing(&head));
        while !read_body(&mut body, &mut unread, deeds) {
            if socket.read_buf(&mut unread).await? == 0 {
                return Ok(());
            }
        }
        match Play::of_head(&head) {
            Play::Document => {
                socket
                    .write_all(
                        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
                    )
                    .await?;
            }
            Play::Silence => {
                socket.write_all(STREAM_HEAD.as_bytes()).await?;
                socket.write_all(chunk(&event(0, 8)).as_bytes()).await?;
                deeds.silent.fetch_add(1, Ordering::Relaxed);
                // Until the gateway leaves.
                socket.read_to_end(&mut unread).await?;
                return Ok(());
            }
            Play::Stream { events, text_bytes } => {
                socket.write_all(STREAM_HEAD.as_bytes()).await?;
                for index in 0..events {
                    let chunk = chunk(&event(index, text_bytes));
                    socket.write_all(chunk.as_bytes()).await?;
                    deeds.sent_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                }
                socket.write_all((chunk(DONE) + "0\r\n\r\n").as_bytes()).await?;
            }
        }
    }
}

fn framing(head: &str) -> Framing {
    let head = head.to_ascii_lowercase();
    match head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
    {
        Some(length) => Framing::Length(length.parse().expect("a length")),
        None if head.contains("transfer-encoding: chunked") => Framing::Chunked,
        None => Framing::None,
    }
}

/// Counts the payload in `unread`, and tells whether the body is over.
fn read_body(body: &mut BodyReader, unread: &mut Vec<u8>, deeds: &Deeds) -> bool {
    let mut input = &unread[..];
    let done = loop {
        match body.next(&mut input).expect("sound framing") {
            Step::Data(payload) => {
                deeds
                    .received_bytes
                    .fetch_add(payload.len() as u64, Ordering::Relaxed);
            }
            Step::More => break false,
            Step::End => break true,
        }
    };
    let left = input.len();
    unread.drain(..unread.len() - left);
    done
}

const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
const DONE: &str = "data: [DONE]\n\n";

async fn read_head(socket: &mut TcpStream, unread: &mut Vec<u8>) -> std::io::Result<String> {
    loop {
        if let Some(end) = memchr::memmem::find(unread, b"\r\n\r\n") {
            let head = unread.drain(..end + 4).collect();
            return Ok(String::from_utf8(head).expect("a head is text"));
        }
        if socket.read_buf(unread).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Event number `index` of a chat stream, as vLLM writes it. Its text depends on the number, so that no two can be taken for each other.
fn event(index: u64, text_bytes: usize) -> String {
    let mut text = String::with_capacity(text_bytes + 16);
    while text.len() < text_bytes {
        let _ = write!(text, "{index} ");
    }
    format!(
        "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"tiny\",\"choices\":\
         [{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
    )
}

fn chunk(payload: &str) -> String {
    format!("{:x}\r\n{payload}\r\n", payload.len())
}

/// The digest of the payload that [`Play::Stream`] sends.
pub fn digest_of_stream(events: u64, text_bytes: usize) -> [u8; 32] {
    let mut digest = Sha256::new();
    (0..events).for_each(|index| digest.update(event(index, text_bytes)));
    digest.update(DONE);
    digest.finalize().into()
}

/// The head of a request that asks the upstream for `play`; without a length its body comes in chunks.
pub fn head(path: &str, play: Play, body_bytes: Option<usize>) -> String {
    let framing = match body_bytes {
        Some(bytes) => format!("Content-Length: {bytes}"),
        None => "Transfer-Encoding: chunked".to_owned(),
    };
    format!(
        "POST {path} HTTP/1.1\r\nHost: a\r\nX-Team-ID: search\r\nX-Play: {}\r\nContent-Type: application/json\r\n\
         {framing}\r\n\r\n",
        play.header()
    )
}

/// A streamed chat request with a prompt of `prompt_bytes`.
pub fn chat(play: Play, prompt_bytes: usize) -> Vec<u8> {
    let prompt = "word ".repeat(prompt_bytes.div_ceil(5));
    let body =
        format!(r#"{{"model":"tiny","stream":true,"messages":[{{"role":"user","content":"{prompt}"}}]}}"#);
    (head("/v1/chat/completions", play, Some(body.len())) + &body).into_bytes()
}

/// Sends `request` on a connection of its own.
pub async fn send(addr: SocketAddr, request: &[u8]) -> TcpStream {
    let mut client = TcpStream::connect(addr).await.expect("a connection");
    client.write_all(request).await.expect("the request is taken");
    client
}

/// Reads until `wanted` has come; returns everything so far.
pub async fn read_past(client: &mut TcpStream, wanted: &[u8]) -> Vec<u8> {
    let mut seen = Vec::new();
    let reading = async {
        while memchr::memmem::find(&seen, wanted).is_none() {
            assert!(
                client.read_buf(&mut seen).await.expect("it goes on") > 0,
                "the gateway closed the connection"
            );
        }
    };
    tokio::time::timeout(DEADLINE, reading)
        .await
        .expect("it comes in time");
    seen
}
