//! One reader of HTTP/1.1 exchanges with a vLLM server, for both capture paths.
//!
//! The proxy feeds it what it forwards, the kernel tap what it reassembled; the same bytes give the same facts.
//! Everything in here is pure: no socket, no clock, no allocation that grows with the length of a stream. Times come in
//! from outside ([`At`]), bytes come in any cut, and bytes that were not captured come in as a hole of known length.
//!
//! * [`head`] reads request and response heads, strictly: what two servers could read differently is an error.
//! * [`body`] finds the payload inside a framing (content length, chunked, until close).
//! * [`endpoint`] knows vLLM's routes and which of them cost tokens.
//! * [`sse`] finds the data of server-sent events, [`json`] the values that matter in a document.
//! * [`progress`] keeps how a response came along.
//! * [`exchange`] gathers the [`facts`] of one request and its response.
//! * [`connection`] does all this for the raw bytes of a TCP connection.

pub mod body;
pub mod connection;
pub mod endpoint;
pub mod exchange;
pub mod facts;
pub mod head;
pub mod json;
pub mod progress;
mod request;
mod response;
pub mod sse;
mod usage;

/// A reading of a monotonic clock in nanoseconds. Only differences mean anything; which clock it was is the caller's affair,
/// as long as all readings of one exchange come from the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct At(pub u64);

impl At {
    /// Microseconds from `earlier` to `self`; 0 when `earlier` is the later one.
    pub fn micros_since(self, earlier: At) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000
    }
}

/// A run of payload: bytes that were seen, or the length of bytes that were not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'b> {
    /// Payload as it was on the wire, framing removed.
    Bytes(&'b [u8]),
    /// So many bytes of payload passed unseen.
    Hole(u64),
}

impl Piece<'_> {
    /// How many bytes of payload it stands for.
    pub fn len_bytes(self) -> u64 {
        match self {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::Hole(len) => len,
        }
    }
}
