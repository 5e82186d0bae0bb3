//! The payload inside a body's framing.
//!
//! [`BodyReader`] walks over the bytes of a body in any cut and hands out runs of payload, without copying. Chunked framing is read
//! strictly (RFC 9112, section 7.1): sizes are plain hexadecimal, every line ends in CRLF, extensions and trailers are bounded.

use super::head::Framing;

/// Longest chunk extension and longest trailer section, in bytes. vLLM sends neither; a few proxies sign chunks in extensions.
const MAX_EXTRA_BYTES: u32 = 8 * 1024;

/// Most digits of a chunk size: 16 hexadecimal digits fill 64 bits.
const MAX_SIZE_DIGITS: u8 = 16;

/// Why a body's framing cannot be followed any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// A chunk size that is no hexadecimal number, or none at all.
    #[error("a chunk size is not a hexadecimal number")]
    ChunkSize,
    /// Something else than CRLF where a line or a chunk must end.
    #[error("a chunk or a chunk line does not end in CRLF")]
    ChunkEnd,
    /// Chunk extensions or trailers beyond the limit.
    #[error("chunk extensions or trailers are longer than {MAX_EXTRA_BYTES} bytes")]
    TooMuchExtra,
    /// A hole swallowed framing, so that nothing after it can be read.
    #[error("bytes that carry the framing were not captured")]
    HoleInFraming,
}

/// What comes next in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'b> {
    /// A run of payload, never empty.
    Data(&'b [u8]),
    /// All input is consumed, and the body goes on.
    More,
    /// The body is over. What is left of the input belongs to the next message.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Length(u64),
    UntilClose,
    Size { value: u64, digits: u8 },
    Extension(u32),
    SizeLf { value: u64 },
    Chunk(u64),
    ChunkCr,
    ChunkLf,
    Trailer { seen: u32, line_empty: bool },
    TrailerLf { seen: u32, line_empty: bool },
    Done,
}

/// Finds the payload of one body.
#[derive(Clone, Debug)]
pub struct BodyReader {
    state: State,
    pending_size: u64,
}

impl BodyReader {
    /// A reader for a body framed like that.
    pub fn new(framing: Framing) -> BodyReader {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(bytes) => State::Length(bytes),
            Framing::Chunked => State::Size { value: 0, digits: 0 },
            Framing::UntilClose => State::UntilClose,
        };
        BodyReader {
            state,
            pending_size: 0,
        }
    }

    /// The next step in `input`, which is moved past what was read.
    ///
    /// # Errors
    /// When the framing is broken; the reader must not be used any further.
    pub fn next<'b>(&mut self, input: &mut &'b [u8]) -> Result<Step<'b>, BodyError> {
        loop {
            match self.state {
                State::Done => return Ok(Step::End),
                State::Length(_) | State::UntilClose | State::Chunk(_) if !input.is_empty() => {
                    return Ok(Step::Data(self.payload(input)));
                }
                _ => {}
            }
            let Some((byte, rest)) = input.split_first() else {
                return Ok(Step::More);
            };
            self.state = self.framing_byte(*byte)?;
            *input = rest;
        }
    }

    fn payload<'b>(&mut self, input: &mut &'b [u8]) -> &'b [u8] {
        let left = match self.state {
            State::Length(left) | State::Chunk(left) => left,
            _ => u64::MAX,
        };
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
        let (data, rest) = input.split_at(take);
        *input = rest;
        self.advance(take as u64);
        data
    }

    fn advance(&mut self, bytes: u64) {
        self.state = match self.state {
            State::Length(left) if left == bytes => State::Done,
            State::Length(left) => State::Length(left - bytes),
            State::Chunk(left) if left == bytes => State::ChunkCr,
            State::Chunk(left) => State::Chunk(left - bytes),
            other => other,
        };
    }

    fn framing_byte(&mut self, byte: u8) -> Result<State, BodyError> {
        Ok(match (self.state, byte) {
            (State::Size { value, digits }, _) if byte.is_ascii_hexdigit() => {
                if digits == MAX_SIZE_DIGITS {
                    return Err(BodyError::ChunkSize);
                }
                let digit = (byte as char).to_digit(16).map_or(0, u64::from);
                State::Size {
                    value: value << 4 | digit,
                    digits: digits + 1,
                }
            }
            (State::Size { digits: 0, .. }, _) => return Err(BodyError::ChunkSize),
            (State::Size { value, .. }, b'\r') => State::SizeLf { value },
            (State::Size { value, .. }, b';') => {
                self.pending_size = value;
                State::Extension(1)
            }
            (State::Size { .. }, _) => return Err(BodyError::ChunkSize),
            (State::Extension(_), b'\r') => State::SizeLf {
                value: self.pending_size,
            },
            (State::Extension(_), b'\n') => return Err(BodyError::ChunkEnd),
            (State::Extension(seen), _) if seen < MAX_EXTRA_BYTES => State::Extension(seen + 1),
            (State::SizeLf { value: 0 }, b'\n') => State::Trailer {
                seen: 0,
                line_empty: true,
            },
            (State::SizeLf { value }, b'\n') => State::Chunk(value),
            (State::ChunkCr, b'\r') => State::ChunkLf,
            (State::ChunkLf, b'\n') => State::Size { value: 0, digits: 0 },
            (State::Trailer { seen, line_empty }, b'\r') => State::TrailerLf { seen, line_empty },
            (State::Trailer { .. }, b'\n') => return Err(BodyError::ChunkEnd),
            (State::Trailer { seen, .. }, _) if seen < MAX_EXTRA_BYTES => State::Trailer {
                seen: seen + 1,
                line_empty: false,
            },
            (State::TrailerLf { line_empty: true, .. }, b'\n') => State::Done,
            (State::TrailerLf { seen, .. }, b'\n') => State::Trailer {
                seen,
                line_empty: true,
            },
            (State::Extension(_) | State::Trailer { .. }, _) => return Err(BodyError::TooMuchExtra),
            _ => return Err(BodyError::ChunkEnd),
        })
    }

    /// Takes note of `bytes` that passed unseen; how many of them were payload of this body. What is left of them belongs to the next
    /// message, since a length says where this one ends whether its bytes were seen or not.
    ///
    /// # Errors
    /// [`BodyError::HoleInFraming`] when the hole swallowed framing; the reader must not be used any further.
    pub fn hole(&mut self, bytes: u64) -> Result<u64, BodyError> {
        let taken = match self.state {
            State::Length(left) => bytes.min(left),
            State::Chunk(left) if bytes <= left => bytes,
            State::UntilClose => bytes,
            State::Done => 0,
            _ => return Err(BodyError::HoleInFraming),
        };
        self.advance(taken);
        Ok(taken)
    }

    /// Whether the body is over.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether the body ends where the connection ends.
    pub fn ends_at_close(&self) -> bool {
        self.state == State::UntilClose
    }

    /// Whether a chunk has begun whose payload is not all read yet.
    pub fn is_inside_chunk(&self) -> bool {
        matches!(self.state, State::Chunk(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(framing: Framing, cuts: &[&[u8]]) -> Result<(Vec<u8>, bool, usize), BodyError> {
        let mut reader = BodyReader::new(framing);
        let (mut payload, mut left) = (Vec::new(), 0);
        for cut in cuts {
            let mut input = *cut;
            loop {
                match reader.next(&mut input)? {
                    Step::Data(data) => payload.extend_from_slice(data),
                    Step::More => break,
                    Step::End => {
                        left += input.len();
                        break;
                    }
                }
            }
        }
        Ok((payload, reader.is_done(), left))
    }

    #[test]
    fn broken_chunks_are_errors() {
        let error = |text: &[u8]| read(Framing::Chunked, &[text]).unwrap_err();
        assert_eq!(error(b"x\r\n"), BodyError::ChunkSize);
        assert_eq!(error(b"\r\n"), BodyError::ChunkSize);
        assert_eq!(error(b"-1\r\n"), BodyError::ChunkSize);
        assert_eq!(error(b"0x1\r\n"), BodyError::ChunkSize);
        assert_eq!(error(b"1 \r\na\r\n"), BodyError::ChunkSize);
        assert_eq!(error(b"11111111111111111\r\n"), BodyError::ChunkSize);
        assert_eq!(error(b"1\na\r\n"), BodyError::ChunkSize);
        assert_eq!(error(b"1\r\nab\r\n"), BodyError::ChunkEnd);
        assert_eq!(error(b"1;a\nb\r\na\r\n"), BodyError::ChunkEnd);
        assert_eq!(error(b"0\r\nA: b\n\r\n"), BodyError::ChunkEnd);
        let long = [&b"1;"[..], &[b'e'; MAX_EXTRA_BYTES as usize + 1]].concat();
        assert_eq!(error(&long), BodyError::TooMuchExtra);
    }

    #[test]
    fn extensions_and_trailers_are_skipped() {
        let body = b"3;name=\"v\"\r\nabc\r\n0\r\nA: b\r\nC: d\r\n\r\nNEXT";
        assert_eq!(read(Framing::Chunked, &[body]), Ok((b"abc".to_vec(), true, 4)));
    }

    #[test]
    fn a_hole_takes_no_more_than_the_length() {
        let mut sized = BodyReader::new(Framing::Length(10));
        assert_eq!(sized.hole(4), Ok(4));
        assert_eq!((sized.hole(7), sized.is_done()), (Ok(6), true));
        assert_eq!(sized.hole(1), Ok(0));
        assert_eq!(BodyReader::new(Framing::UntilClose).hole(9), Ok(9));
    }

    #[test]
    fn a_hole_inside_a_chunk_is_payload_and_any_other_swallows_framing() {
        let inside = || {
            let mut chunked = BodyReader::new(Framing::Chunked);
            assert_eq!(chunked.next(&mut &b"5\r\na"[..]), Ok(Step::Data(b"a")));
            chunked
        };
        let mut chunked = inside();
        assert_eq!(chunked.hole(3), Ok(3));
        let mut rest = &b"b\r\n0\r\n\r\n"[..];
        assert_eq!(chunked.next(&mut rest), Ok(Step::Data(b"b")));
        assert_eq!((chunked.next(&mut rest), rest.len()), (Ok(Step::End), 0));
        let mut chunked = inside();
        assert_eq!(chunked.hole(4), Ok(4));
        assert_eq!(chunked.hole(1), Err(BodyError::HoleInFraming));
        assert_eq!(inside().hole(5), Err(BodyError::HoleInFraming));
        let mut before = BodyReader::new(Framing::Chunked);
        assert_eq!(before.hole(1), Err(BodyError::HoleInFraming));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_payload(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8),
            cuts in prop::collection::vec(1usize..7, 1..200),
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:X}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let (mut rest, mut pieces) = (&wire[..], Vec::new());
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            prop_assert_eq!(read(Framing::Chunked, &pieces), Ok((chunks.concat(), true, 0)));
            let payload = chunks.concat();
            let sized = Framing::Length(payload.len() as u64);
            prop_assert_eq!(read(sized, &[&payload]), Ok((payload, true, 0)));
        }

        #[test]
        fn no_input_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(Framing::Chunked, &[&bytes]);
        }
    }
}
