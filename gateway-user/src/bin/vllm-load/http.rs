//! Reading an HTTP/1.1 response: its head, and its body's framing. Pure: bytes in, bytes out.
//!
//! This shares nothing with the gateway's own readers on purpose: a mistake that both sides of a test make is
//! one that no test finds.

use std::ops::Range;

use crate::failure::Failure;

/// A response head may be this long; vLLM's have 200 bytes.
const HEAD_MAX_BYTES: usize = 64 * 1024;

/// A response may have this many header fields.
const HEADERS_MAX: usize = 64;

/// A chunk-size line, extensions included, and a trailer line may be this long.
const LINE_MAX_BYTES: usize = 8 * 1024;

/// What matters of a response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// How the end of the body is found.
    pub framing: Framing,
    /// Whether the connection can carry another request afterwards.
    pub keep_alive: bool,
    /// Whether the body is `text/event-stream`.
    pub event_stream: bool,
}

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// After this many bytes.
    Length(u64),
    /// At the chunk of size zero.
    Chunked,
    /// At the end of the connection.
    UntilClose,
}

/// Reads a head from the start of `input`: `None` while it is not whole, else the head and its length.
pub fn parse_head(input: &[u8]) -> Result<Option<(Head, usize)>, Failure> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(input) {
        Ok(httparse::Status::Complete(length)) => {
            let status = response.code.ok_or(Failure::BadHead)?;
            let minor = response.version.ok_or(Failure::BadHead)?;
            Ok(Some((understand(status, minor, response.headers)?, length)))
        }
        Ok(httparse::Status::Partial) if input.len() <= HEAD_MAX_BYTES => Ok(None),
        _ => Err(Failure::BadHead),
    }
}

fn understand(status: u16, minor: u8, headers: &[httparse::Header<'_>]) -> Result<Head, Failure> {
    let mut head = Head {
        status,
        framing: Framing::UntilClose,
        keep_alive: minor == 1,
        event_stream: false,
    };
    let mut length = None;
    let mut chunked = false;
    for header in headers {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            length = Some(value.parse().map_err(|_| Failure::BadHead)?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.to_ascii_lowercase().ends_with("chunked");
        } else if header.name.eq_ignore_ascii_case("connection") {
            head.keep_alive = match value.to_ascii_lowercase().as_str() {
                "close" => false,
                "keep-alive" => true,
                _ => head.keep_alive,
            };
        } else if header.name.eq_ignore_ascii_case("content-type") {
            head.event_stream = value.to_ascii_lowercase().starts_with("text/event-stream");
        }
    }
    head.framing = match length {
        _ if status < 200 || status == 204 || status == 304 => Framing::Length(0),
        _ if chunked => Framing::Chunked,
        Some(length) => Framing::Length(length),
        None => Framing::UntilClose,
    };
    head.keep_alive &= head.framing != Framing::UntilClose;
    Ok(head)
}

/// Finds the body's data in the bytes after the head, however they were split.
#[derive(Debug)]
pub struct BodyDecoder {
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// This much data is left, and then the body is over.
    Length(u64),
    UntilClose,
    ChunkSize,
    /// This much data is left of the chunk.
    ChunkData(u64),
    /// The line end that follows a chunk's data.
    ChunkEnd,
    Trailers,
    Done,
}

/// What was found at the start of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// This many bytes are dealt with.
    pub consumed: usize,
    /// Among them, where the data stands.
    pub data: Range<usize>,
}

impl BodyDecoder {
    /// A decoder for the body of one response.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::ChunkSize,
            Framing::UntilClose => State::UntilClose,
        };
        Self { state }
    }

    /// Whether the body's end was seen.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether the end of the connection is a proper end of the body.
    pub fn may_close(&self) -> bool {
        matches!(self.state, State::Done | State::UntilClose)
    }

    /// Takes one step; `None` means that more bytes are needed.
    pub fn step(&mut self, input: &[u8]) -> Result<Option<Step>, Failure> {
        match self.state {
            State::Done => Ok(None),
            _ if input.is_empty() => Ok(None),
            State::UntilClose => Ok(Some(Step {
                consumed: input.len(),
                data: 0..input.len(),
            })),
            State::Length(left) => {
                let (taken, left) = take(left, input.len());
                self.state = if left == 0 {
                    State::Done
                } else {
                    State::Length(left)
                };
                Ok(Some(Step {
                    consumed: taken,
                    data: 0..taken,
                }))
            }
            State::ChunkData(left) => {
                let (taken, left) = take(left, input.len());
                self.state = if left == 0 {
                    State::ChunkEnd
                } else {
                    State::ChunkData(left)
                };
                Ok(Some(Step {
                    consumed: taken,
                    data: 0..taken,
                }))
            }
            State::ChunkSize | State::ChunkEnd | State::Trailers => self.line(input),
        }
    }

    fn line(&mut self, input: &[u8]) -> Result<Option<Step>, Failure> {
        let Some(end) = memchr::memchr(b'\n', input) else {
            return if input.len() > LINE_MAX_BYTES {
                Err(Failure::BadFraming)
            } else {
                Ok(None)
            };
        };
        let line = input[..end].strip_suffix(b"\r").unwrap_or(&input[..end]);
        self.state = match self.state {
            State::ChunkEnd if line.is_empty() => State::ChunkSize,
            State::ChunkEnd => return Err(Failure::BadFraming),
            State::ChunkSize => match chunk_size(line)? {
                0 => State::Trailers,
                size => State::ChunkData(size),
            },
            _ if line.is_empty() => State::Done,
            _ => State::Trailers,
        };
        Ok(Some(Step {
            consumed: end + 1,
            data: 0..0,
        }))
    }
}

/// How much of `left` bytes is there, and how much is left then.
fn take(left: u64, available: usize) -> (usize, u64) {
    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(available);
    (taken, left - taken as u64)
}

fn chunk_size(line: &[u8]) -> Result<u64, Failure> {
    let digits = line
        .split(|byte| *byte == b';')
        .next()
        .unwrap_or_default()
        .trim_ascii();
    let text = std::str::from_utf8(digits).map_err(|_| Failure::BadFraming)?;
    if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Failure::BadFraming);
    }
    u64::from_str_radix(text, 16).map_err(|_| Failure::BadFraming)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head_of(text: &str) -> Head {
        parse_head(text.as_bytes())
            .expect("a sound head")
            .expect("a whole head")
            .0
    }

    /// Decodes `wire` in pieces of these sizes; what the last piece leaves is offered whole.
    fn decode(framing: Framing, wire: &[u8], sizes: &[usize]) -> Result<(Vec<u8>, BodyDecoder), Failure> {
        let (mut decoder, mut body, mut buffer) = (BodyDecoder::new(framing), Vec::new(), Vec::new());
        let mut rest = wire;
        let mut sizes = sizes.iter().copied().chain(std::iter::repeat(usize::MAX));
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(sizes.next().unwrap_or(1).clamp(1, rest.len()));
            buffer.extend_from_slice(piece);
            rest = after;
            while let Some(step) = decoder.step(&buffer)? {
                body.extend_from_slice(&buffer[step.data]);
                buffer.drain(..step.consumed);
            }
        }
        Ok((body, decoder))
    }

    #[test]
    fn a_head_says_how_the_body_ends() {
        let head = head_of(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n",
        );
        assert_eq!(
            head,
            Head {
                status: 200,
                framing: Framing::Chunked,
                keep_alive: true,
                event_stream: true
            }
        );
        let head = head_of("HTTP/1.1 503 Busy\r\ncontent-length: 7\r\nConnection: close\r\n\r\n");
        assert_eq!((head.framing, head.keep_alive), (Framing::Length(7), false));
        assert_eq!(
            head_of("HTTP/1.1 204 No Content\r\n\r\n").framing,
            Framing::Length(0)
        );
        let head = head_of("HTTP/1.0 200 OK\r\n\r\n");
        assert_eq!((head.framing, head.keep_alive), (Framing::UntilClose, false));
    }

    #[test]
    fn a_head_that_is_not_whole_or_not_http_is_told_apart() {
        assert_eq!(parse_head(b"HTTP/1.1 200 OK\r\nA: b"), Ok(None));
        assert_eq!(parse_head(b"SSH-2.0-OpenSSH\r\n\r\n"), Err(Failure::BadHead));
        assert_eq!(
            parse_head(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
            Err(Failure::BadHead)
        );
        let endless = format!("HTTP/1.1 200 OK\r\nA: {}", "x".repeat(HEAD_MAX_BYTES));
        assert_eq!(parse_head(endless.as_bytes()), Err(Failure::BadHead));
    }

    proptest! {
        #[test]
        fn a_chunked_body_is_the_same_wherever_it_is_split(sizes in prop::collection::vec(1usize..9, 0..80)) {
            let wire = b"5\r\nhello\r\n1;note=x\r\n \r\nB\r\nwide, world\r\n0\r\nTrailer: y\r\n\r\n";
            let (body, decoder) = decode(Framing::Chunked, wire, &sizes).expect("sound framing");
            prop_assert_eq!(body, b"hello wide, world");
            prop_assert!(decoder.is_done());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(wire in prop::collection::vec(any::<u8>(), 0..200), sizes in prop::collection::vec(1usize..9, 0..40)) {
            let _ = decode(Framing::Chunked, &wire, &sizes);
            let _ = parse_head(&wire);
        }
    }

    #[test]
    fn a_body_that_stops_early_is_not_done() {
        for (framing, wire) in [
            (Framing::Chunked, &b"5\r\nhello\r\n"[..]),
            (Framing::Length(9), b"hello"),
        ] {
            let (body, decoder) = decode(framing, wire, &[]).expect("sound so far");
            assert_eq!(body, b"hello");
            assert!(!decoder.is_done() && !decoder.may_close());
        }
        let (_, decoder) = decode(Framing::UntilClose, b"hello", &[]).expect("sound");
        assert!(!decoder.is_done() && decoder.may_close());
    }

    #[test]
    fn wrong_framing_is_refused() {
        for wire in [
            &b"5\r\nhelloX\r\n"[..],
            b"zz\r\n",
            b"-1\r\n",
            b"\r\n",
            b"11111111111111111\r\n",
        ] {
            assert_eq!(
                decode(Framing::Chunked, wire, &[]).expect_err("refused"),
                Failure::BadFraming
            );
        }
    }
}
