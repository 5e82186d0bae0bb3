//! Read buffers that belong to nobody while nothing arrives.
//!
//! A stream spends nearly all its life waiting. A buffer is therefore taken from the pool when bytes are there to be read and
//! goes back as soon as they are forwarded: that is what makes an idle stream cost kilobytes.

use std::future::poll_fn;
use std::io;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, ReadBuf};

/// Size of a buffer: one read of a busy stream, and few system calls for a large body.
const BUFFER_BYTES: usize = 16 * 1024;

/// Most buffers kept for later: 4 MiB in all. More are in use only while more than this many sockets are read at once.
const KEPT_MAX: usize = 256;

/// Where buffers wait for bytes.
#[derive(Clone, Debug, Default)]
pub struct BufferPool {
    kept: Arc<Mutex<Vec<Box<[u8]>>>>,
}

/// Bytes that were read; the buffer goes back to its pool when this is dropped.
#[derive(Debug)]
pub struct Bytes {
    data: Box<[u8]>,
    len: usize,
    pool: BufferPool,
}

impl BufferPool {
    fn take(&self) -> Box<[u8]> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .pop();
        kept.unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice())
    }

    fn give_back(&self, data: Box<[u8]>) {
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if kept.len() < KEPT_MAX {
            kept.push(data);
        }
    }

    /// Waits for bytes from `source`. Empty at the end of the stream. Holds a buffer only while it reads.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn read(&self, source: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
        poll_fn(|cx| self.poll_read(source, cx)).await
    }

    fn poll_read(
        &self,
        source: &mut (impl AsyncRead + Unpin),
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Bytes>> {
        let mut data = self.take();
        let mut target = ReadBuf::new(&mut data);
        let polled = Pin::new(source).poll_read(cx, &mut target);
        let len = target.filled().len();
        match polled {
            Poll::Ready(Ok(())) => Poll::Ready(Ok(Bytes {
                data,
                len,
                pool: self.clone(),
            })),
            Poll::Ready(Err(error)) => {
                self.give_back(data);
                Poll::Ready(Err(error))
            }
            Poll::Pending => {
                self.give_back(data);
                Poll::Pending
            }
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.data[..self.len]
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.data));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_buffer_is_held_only_while_its_bytes_are() {
        let pool = BufferPool::default();
        let mut source = &b"abc"[..];
        let read = pool.read(&mut source).await.expect("a slice can be read");
        assert_eq!(&*read, b"abc");
        assert_eq!(pool.kept.lock().expect("no panic").len(), 0);
        drop(read);
        assert_eq!(pool.kept.lock().expect("no panic").len(), 1);
        assert!(
            pool.read(&mut source)
                .await
                .expect("a slice can be read")
                .is_empty(),
            "the end is an empty read"
        );
    }
}
