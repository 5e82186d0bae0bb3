//! A client's connection: heads in, refusals out, one request after the other.

use super::buffer::BufferPool;
use super::refusal::Refusal;
use crate::wire::head::RequestHead;
use socket2::SockRef;
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::{Instant, timeout};

/// How long, and for how many bytes, a client may go on sending after it was refused. Without this the kernel answers
/// bytes that nobody reads with a reset, and the client never sees why it was refused.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// A client's socket and what was read from it ahead of need.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    /// Bytes of requests that have not begun yet.
    unread: Vec<u8>,
    pool: BufferPool,
    write_timeout: Duration,
}

/// What came instead of a request.
#[derive(Debug)]
pub enum NoRequest {
    /// The connection ended between requests, or stayed idle for too long: nothing to record.
    Ended,
    /// Something arrived that is no request.
    Refused(Refusal),
}

/// How many bytes went each way through a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// From the client.
    pub to_upstream: u64,
    /// To the client.
    pub to_client: u64,
}

/// The client went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl Client {
    /// A connection that was just accepted.
    pub fn new(stream: TcpStream, pool: BufferPool, write_timeout: Duration) -> Client {
        Client {
            stream,
            unread: Vec::new(),
            pool,
            write_timeout,
        }
    }

    /// Whether bytes of a further request are already here.
    pub fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Waits for the first byte of a request, at most `idle`.
    pub async fn wait_for_request(&mut self, idle: Duration) -> Result<(), NoRequest> {
        if self.has_unread() {
            return Ok(());
        }
        // An idle connection keeps no buffer.
        self.unread = Vec::new();
        match timeout(idle, self.fill()).await {
            Ok(Ok(true)) => Ok(()),
            _ => Err(NoRequest::Ended),
        }
    }

    /// Reads the head that has begun, within `limit`.
    pub async fn read_head(&mut self, max_bytes: usize, limit: Duration) -> Result<RequestHead, NoRequest> {
        let deadline = Instant::now() + limit;
        let mut looked_at = 0;
        loop {
            // Later a head can only become whole, or wrong, by a line end or by its length; but a client that speaks TLS to this
            // port is told so by its first byte, and would wait for ever for the answer to its greeting.
            let has_news = looked_at == 0 || memchr::memchr(b'\n', &self.unread[looked_at..]).is_some();
            if has_news || self.unread.len() >= max_bytes {
                match RequestHead::parse(&self.unread, max_bytes) {
                    Ok(Some((head, len))) => {
                        self.unread.drain(..len);
                        return Ok(head);
                    }
                    Ok(None) => {}
                    Err(error) => return Err(NoRequest::Refused(Refusal::Head(error))),
                }
            }
            looked_at = self.unread.len();
            match tokio::time::timeout_at(deadline, self.fill()).await {
                Ok(Ok(true)) => {}
                Ok(_) => return Err(NoRequest::Ended),
                Err(_) => return Err(NoRequest::Refused(Refusal::SlowRequest)),
            }
        }
    }

    /// Reads once. False at the end of the stream.
    async fn fill(&mut self) -> io::Result<bool> {
        let bytes = self.pool.read(&mut self.stream).await?;
        self.unread.extend_from_slice(&bytes);
        Ok(!bytes.is_empty())
    }

    /// The two directions of the socket, and the bytes read ahead.
    pub fn split(&mut self) -> (Reader<'_>, Writer<'_>) {
        let (read, write) = self.stream.split();
        let reader = Reader {
            half: read,
            unread: &mut self.unread,
            pool: &self.pool,
        };
        (
            reader,
            Writer {
                half: write,
                timeout: self.write_timeout,
            },
        )
    }

    /// Passes bytes between the client and `upstream` until both have ended or one has failed.
    pub async fn tunnel(&mut self, upstream: &mut TcpStream) -> Moved {
        let unread = std::mem::take(&mut self.unread);
        let ahead = unread.len() as u64;
        if upstream.write_all(&unread).await.is_err() {
            return Moved {
                to_upstream: 0,
                to_client: 0,
            };
        }
        // A peer that vanishes without a word must not hold the tunnel for ever.
        for socket in [SockRef::from(&self.stream), SockRef::from(&*upstream)] {
            let _ = socket.set_keepalive(true);
        }
        let moved = tokio::io::copy_bidirectional(&mut self.stream, upstream)
            .await
            .unwrap_or((0, 0));
        Moved {
            to_upstream: ahead + moved.0,
            to_client: moved.1,
        }
    }

    /// Sends `bytes`.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.split().1.send(bytes).await
    }

    /// Makes the end of the connection look like the failure it is: where a body lasts until the connection ends, an orderly end
    /// would pass a part of it off as the whole.
    pub fn reset_when_dropped(&self) {
        // If it cannot be set, the connection is in no state to end in an orderly way either.
        let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// Ends the connection such that the client still reads what was sent: says that nothing more comes, then reads for a
    /// while what the client still sends.
    pub async fn close(mut self) {
        if self.stream.shutdown().await.is_err() {
            return;
        }
        let drain = async {
            let mut seen = 0;
            while seen < LINGER_BYTES {
                match self.pool.read(&mut self.stream).await {
                    Ok(bytes) if !bytes.is_empty() => seen += bytes.len(),
                    _ => break,
                }
            }
        };
        let _ = timeout(LINGER, drain).await;
    }
}

/// The direction from the client.
#[derive(Debug)]
pub struct Reader<'c> {
    half: ReadHalf<'c>,
    unread: &'c mut Vec<u8>,
    pool: &'c BufferPool,
}

impl Reader<'_> {
    /// The next bytes: those read ahead first. Empty at the end of the stream.
    pub async fn read(&mut self) -> Result<Input, Gone> {
        if !self.unread.is_empty() {
            return Ok(Input::Ahead(std::mem::take(self.unread)));
        }
        self.pool
            .read(&mut self.half)
            .await
            .map(Input::Fresh)
            .map_err(|_| Gone)
    }

    /// Gives back what belongs to the next request.
    pub fn unread(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
    }

    /// Waits until the client goes away. What it sends meanwhile (pipelined requests) is kept, up to `max_bytes`; beyond that the
    /// client is not read any more, and its leaving shows when it is written to.
    pub async fn gone(&mut self, max_bytes: usize) -> Gone {
        while self.unread.len() < max_bytes {
            match self.pool.read(&mut self.half).await {
                Ok(bytes) if !bytes.is_empty() => self.unread.extend_from_slice(&bytes),
                _ => return Gone,
            }
        }
        std::future::pending().await
    }
}

/// Bytes from the client.
#[derive(Debug)]
pub enum Input {
    /// Read ahead with an earlier request.
    Ahead(Vec<u8>),
    /// Just read.
    Fresh(super::buffer::Bytes),
}

impl std::ops::Deref for Input {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Input::Ahead(bytes) => bytes,
            Input::Fresh(bytes) => bytes,
        }
    }
}

/// The direction to the client.
#[derive(Debug)]
pub struct Writer<'c> {
    half: WriteHalf<'c>,
    timeout: Duration,
}

impl Writer<'_> {
    /// Sends all of `bytes`; a client that takes none for `client_write_timeout` is gone.
    pub async fn send(&mut self, mut bytes: &[u8]) -> Result<(), Gone> {
        while !bytes.is_empty() {
            match self.half.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    timely(self.timeout, self.half.writable()).await?;
                }
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }
}

async fn timely<T>(limit: Duration, wait: impl Future<Output = io::Result<T>>) -> Result<T, Gone> {
    match timeout(limit, wait).await {
        Ok(Ok(done)) => Ok(done),
        _ => Err(Gone),
    }
}
