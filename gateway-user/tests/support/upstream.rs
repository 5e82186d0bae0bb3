//! An upstream whose every byte the test decides, and that remembers every request it was sent.
//!
//! It reads requests leniently and on its own, not with the gateway's readers: what the gateway sends must be plain enough that any
//! reader finds the same requests in it.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// A server that follows a script. What the gateway asks for itself it answers by itself, outside of the script.
pub struct Upstream {
    /// Where it listens.
    pub addr: SocketAddr,
    /// What it saw.
    pub seen: Arc<Seen>,
    accepting: JoinHandle<()>,
}

/// What an upstream saw.
#[derive(Default)]
pub struct Seen {
    requests: Mutex<Vec<String>>,
    /// Connections that carried clients' requests.
    pub connections: AtomicUsize,
    /// Connections whose other side said that it would send no more.
    pub half_closed: AtomicUsize,
    /// Whether health checks are answered with 503.
    pub ill: AtomicBool,
}

impl Seen {
    /// The requests since the last call: heads and bodies, in order.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().expect("no panic while requests are held"))
    }

    /// How many requests there are since the last [`Seen::take`].
    pub fn count(&self) -> usize {
        self.requests
            .lock()
            .expect("no panic while requests are held")
            .len()
    }
}

impl Upstream {
    /// Starts one that hands every connection to `script`.
    pub async fn start<F, S>(script: S) -> Upstream
    where
        S: Fn(Talk) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        Upstream::on(listener, script)
    }

    /// As [`Upstream::start`], on a listener of the caller's.
    pub fn on<F, S>(listener: TcpListener, script: S) -> Upstream
    where
        S: Fn(Talk) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let addr = listener.local_addr().expect("an address");
        let seen = Arc::new(Seen::default());
        let (log, script) = (Arc::clone(&seen), Arc::new(script));
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, script) = (Arc::clone(&log), Arc::clone(&script));
                tokio::spawn(async move {
                    let mut talk = Talk {
                        stream,
                        unread: Vec::new(),
                        seen,
                        turn: 0,
                    };
                    if talk.fill_to_head().await.is_none() || talk.is_gateways_own().await {
                        return;
                    }
                    talk.turn = talk.seen.connections.fetch_add(1, Ordering::Relaxed);
                    script(talk).await;
                });
            }
        });
        Upstream {
            addr,
            seen,
            accepting,
        }
    }

    /// Starts one that answers each request when it is given a permit.
    pub async fn gated() -> (Upstream, Arc<Semaphore>) {
        let gate = Arc::new(Semaphore::new(0));
        let given = Arc::clone(&gate);
        let upstream = Upstream::start(move |mut talk| {
            let gate = Arc::clone(&given);
            async move {
                while talk.request().await.is_some() {
                    gate.acquire().await.expect("it stays open").forget();
                    talk.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
                }
            }
        });
        (upstream.await, gate)
    }

    /// Starts one that answers every request with 200 and a small document that names its target; in chunks, if the target says so.
    pub async fn recording() -> Upstream {
        Upstream::start(|mut talk| async move {
            while let Some(request) = talk.request().await {
                let target = request.split(' ').nth(1).unwrap_or_default();
                let body = format!("{{\"target\":{target:?}}}");
                let framing = if target.contains("chunked") {
                    format!(
                        "transfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
                        body.len()
                    )
                } else if request.starts_with("HEAD ") {
                    format!("content-length: {}\r\n\r\n", body.len())
                } else {
                    format!("content-length: {}\r\n\r\n{body}", body.len())
                };
                talk.send(format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{framing}"
                ))
                .await;
            }
        })
        .await
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One connection to an upstream.
pub struct Talk {
    stream: TcpStream,
    unread: Vec<u8>,
    /// What the upstream saw.
    pub seen: Arc<Seen>,
    /// How many connections came before this one, the gateway's own aside.
    pub turn: usize,
}

impl Talk {
    /// The next request, head and body; `None` when the other side sends no more.
    pub async fn request(&mut self) -> Option<String> {
        let mut request = self.head().await?;
        let lower = request.to_ascii_lowercase();
        let value = |name: &str| {
            let line = lower
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).map(str::to_owned)
        };
        if let Some(length) = value("content-length") {
            let length = length.parse().expect("a plain length");
            while self.unread.len() < length {
                self.fill().await?;
            }
            let body: Vec<u8> = self.unread.drain(..length).collect();
            request += &String::from_utf8_lossy(&body);
        } else if value("transfer-encoding").is_some() {
            request += &self.chunks().await?;
        }
        self.seen
            .requests
            .lock()
            .expect("no panic while requests are held")
            .push(request.clone());
        Some(request)
    }

    /// The next request's head alone. It is not counted as a request.
    pub async fn head(&mut self) -> Option<String> {
        let len = self.fill_to_head().await?;
        let head: Vec<u8> = self.unread.drain(..len).collect();
        Some(String::from_utf8_lossy(&head).into_owned())
    }

    async fn chunks(&mut self) -> Option<String> {
        let mut payload = String::new();
        loop {
            let line = self.unread.windows(2).position(|pair| pair == b"\r\n");
            let Some(line) = line else {
                self.fill().await?;
                continue;
            };
            let size = String::from_utf8_lossy(&self.unread[..line]).into_owned();
            let size = usize::from_str_radix(&size, 16).expect("a plain chunk size");
            while self.unread.len() < line + 2 + size + 2 {
                self.fill().await?;
            }
            payload += &String::from_utf8_lossy(&self.unread[line + 2..line + 2 + size]);
            self.unread.drain(..line + 2 + size + 2);
            if size == 0 {
                return Some(payload);
            }
        }
    }

    async fn fill_to_head(&mut self) -> Option<usize> {
        loop {
            let end = self.unread.windows(4).position(|four| four == b"\r\n\r\n");
            if let Some(end) = end {
                return Some(end + 4);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Option<()> {
        let read = self.stream.read_buf(&mut self.unread).await.unwrap_or(0);
        (read > 0).then_some(())
    }

    /// Whether the gateway asks for itself, not for a client: health checks, and reads of the server's metrics, of which it has none.
    async fn is_gateways_own(&mut self) -> bool {
        let is_check = self.unread.starts_with(b"GET /health ");
        let is_scrape = self.unread.starts_with(b"GET /metrics ");
        if is_check || is_scrape {
            let status = match (is_check, self.seen.ill.load(Ordering::Relaxed)) {
                (true, false) => "200 OK",
                (true, true) => "503 No",
                (false, _) => "404 Not Found",
            };
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            self.send(head).await;
        }
        is_check || is_scrape
    }

    /// Sends `bytes`; that the other side has gone is for the test to notice elsewhere.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref()).await;
    }

    /// Reads until the other side sends no more, and counts that.
    pub async fn until_half_closed(&mut self) {
        while self.fill().await.is_some() {}
        self.seen.half_closed.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends the connection with a reset.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream)
            .set_linger(Some(std::time::Duration::ZERO))
            .expect("a live socket");
    }
}
