//! A TCP segment, as a probe beside the server's socket sees it.

use crate::wire::At;
use crate::wire::connection::Direction;
use std::net::SocketAddr;

/// A segment that carries payload, SYN, FIN or RST. A packet too large for one record comes as several, with advancing sequence
/// numbers and FIN on the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// When the packet passed the probe, by the kernel's monotonic clock.
    pub at: At,
    /// The client's address.
    pub client: SocketAddr,
    /// The server's address.
    pub server: SocketAddr,
    /// Who sent it.
    pub direction: Direction,
    /// It opens the connection.
    pub syn: bool,
    /// It ends the sender's bytes.
    pub fin: bool,
    /// It breaks the connection off.
    pub rst: bool,
    /// Sequence number of its first payload byte; of the SYN when there is one, which takes a number of its own.
    pub sequence: u32,
    /// How much payload it carries.
    pub len_bytes: u32,
    /// The first bytes of its payload: all of them, some, or none.
    pub captured: &'a [u8],
}

impl Segment<'_> {
    /// Sequence number of the first payload byte, or of what would be there.
    pub fn payload_sequence(&self) -> u32 {
        self.sequence.wrapping_add(u32::from(self.syn))
    }
}
