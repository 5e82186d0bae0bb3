//! Clients outside of the guest: what they saw end, and when, is all that is known for certain after a power cut.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// How long a client waits for bytes; a guest under emulation on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// Time until a client whose connection broke tries again. The power may be gone, and then it has a moment to be told to stop.
const RETRY: Duration = Duration::from_millis(50);

/// More than any answer of the simulator to these requests.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// One request, as its client saw it.
#[derive(Clone, Debug)]
pub struct Sight {
    /// What the client called it (`X-Request-Id`).
    pub request_id: String,
    /// When it was sent.
    pub sent: Instant,
    /// When the client had the answer's last byte; `None` if it never did.
    pub ended: Option<Instant>,
}

/// Clients that send one request after the other.
#[derive(Debug)]
pub struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Sight>>>,
}

impl Clients {
    /// Starts `count` of them. Ids are unique by `round`.
    pub fn start(address: SocketAddr, round: &str, count: usize) -> Clients {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |client: usize| {
            let (stop, prefix) = (Arc::clone(&stop), format!("cut-{round}-{client}"));
            thread::spawn(move || send(address, &prefix, &stop))
        };
        Clients {
            threads: (0..count).map(start).collect(),
            stop,
        }
    }

    /// Has them stop; returns what they saw.
    ///
    /// # Errors
    /// When one of them failed.
    pub fn finish(self) -> Result<Vec<Sight>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut seen = Vec::new();
        for thread in self.threads {
            seen.extend(thread.join().map_err(|_| anyhow!("a client panicked"))?);
        }
        Ok(seen)
    }
}

fn send(address: SocketAddr, prefix: &str, stop: &AtomicBool) -> Vec<Sight> {
    let (mut seen, mut connection) = (Vec::new(), None);
    while !stop.load(Ordering::Relaxed) {
        let Some(stream) = connection.take().or_else(|| TcpStream::connect(address).ok()) else {
            thread::sleep(RETRY);
            continue;
        };
        let request_id = format!("{prefix}-{}", seen.len());
        let sent = Instant::now();
        let answered = exchange(stream, &request_id, seen.len() % 2 == 0);
        let ended = answered.is_ok().then(Instant::now);
        seen.push(Sight {
            request_id,
            sent,
            ended,
        });
        match answered {
            Ok(stream) => connection = Some(stream),
            Err(_) => thread::sleep(RETRY),
        }
    }
    seen
}

/// Sends one request and reads to the last byte of its answer, behind which the connection can be used again.
fn exchange(mut stream: TcpStream, request_id: &str, streamed: bool) -> Result<TcpStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let body = format!(
        r#"{{"model":"sim","stream":{streamed},"max_tokens":3,"messages":[{{"role":"user","content":"{request_id}"}}]}}"#
    );
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: guest\r\nX-Team-ID: cut\r\nX-Request-Id: {request_id}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes())?;
    let mut answer = Vec::new();
    let mut block = [0; 16 * 1024];
    while !is_whole(&answer)? {
        let read = match stream.read(&mut block) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read?,
        };
        if read == 0 || answer.len() > ANSWER_BYTES_MAX {
            bail!("the connection broke off after {} bytes", answer.len());
        }
        answer.extend_from_slice(&block[..read]);
    }
    Ok(stream)
}

/// Whether all of an answer is there: so many bytes as its head says, or the chunk that ends it.
fn is_whole(answer: &[u8]) -> Result<bool> {
    let Some(head_bytes) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(false);
    };
    let head = String::from_utf8_lossy(&answer[..head_bytes]).to_ascii_lowercase();
    let body = &answer[head_bytes + 4..];
    let value = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
    if let Some(length) = value("content-length: ") {
        let length: usize = length.trim().parse().context("an answer's length is no number")?;
        return Ok(body.len() >= length);
    }
    if value("transfer-encoding: ") == Some("chunked") {
        return Ok(body.ends_with(b"\r\n0\r\n\r\n"));
    }
    bail!("an answer says neither its length nor that it comes in chunks: {head}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_at_its_last_byte_and_not_before() {
        for whole in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{\"a\"}"[..],
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n8\r\ndata: 0\n\r\n0\r\n\r\n",
        ] {
            for cut in 0..whole.len() {
                assert!(!is_whole(&whole[..cut]).expect("it may go on"), "{cut}");
            }
            assert!(is_whole(whole).expect("it is sound"));
        }
        assert!(is_whole(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
