//! When which bytes passed through the server's sockets, by readings of `CLOCK_MONOTONIC` around each system call.
//!
//! A kernel probe stamps packets with the same clock: a byte that was written must have left between the two readings around its
//! write, and one that was read must have arrived before the reading after its read.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// All calls so far, as lines of JSON: `client` (address), `op` (`read` or `write`), `offset` and `len` in bytes of that direction,
/// `before_ns` and `after_ns`.
#[derive(Clone, Debug, Default)]
pub struct SocketLog(Arc<Mutex<String>>);

impl SocketLog {
    /// The lines.
    pub fn lines(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn push(&self, line: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push_str(line);
    }
}

/// A connection whose calls are logged.
pub struct Logged {
    stream: TcpStream,
    client: SocketAddr,
    log: SocketLog,
    read_bytes: u64,
    written_bytes: u64,
}

impl Logged {
    /// The connection of that client.
    pub fn new(stream: TcpStream, client: SocketAddr, log: SocketLog) -> Logged {
        Logged {
            stream,
            client,
            log,
            read_bytes: 0,
            written_bytes: 0,
        }
    }

    fn wrote(&mut self, before_ns: i128, result: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(len)) = result {
            let offset = self.written_bytes;
            self.written_bytes += *len as u64;
            self.note("write", offset, *len, before_ns);
        }
    }

    fn note(&self, op: &str, offset: u64, len: usize, before_ns: i128) {
        if len > 0 {
            let (client, after_ns) = (self.client, now_ns());
            self.log.push(&format!(
                "{{\"client\":\"{client}\",\"op\":\"{op}\",\"offset\":{offset},\"len\":{len},\
                 \"before_ns\":{before_ns},\"after_ns\":{after_ns}}}\n"
            ));
        }
    }
}

fn now_ns() -> i128 {
    let now = clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

impl AsyncRead for Logged {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (before_ns, held) = (now_ns(), buf.filled().len());
        let result = Pin::new(&mut self.stream).poll_read(context, buf);
        let (offset, len) = (self.read_bytes, buf.filled().len() - held);
        self.read_bytes += len as u64;
        self.note("read", offset, len, before_ns);
        result
    }
}

impl AsyncWrite for Logged {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let before_ns = now_ns();
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(before_ns, &result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let before_ns = now_ns();
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.wrote(before_ns, &result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
