//! The boundary between the kernel probe and TCP reassembly: what the probe says of a part of a connection.

use crate::wire::At;
use crate::wire::connection::Direction;
use std::net::SocketAddr;

/// One TCP segment, or a part of one, as a socket of the server got or sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// When the kernel saw it, on `CLOCK_MONOTONIC`.
    pub at: At,
    /// The client's end.
    pub client: SocketAddr,
    /// The server's end.
    pub server: SocketAddr,
    /// Which way it went.
    pub direction: Direction,
    /// It opens its direction. The payload begins one behind `sequence`.
    pub syn: bool,
    /// Its sender has nothing more to say.
    pub fin: bool,
    /// It tears the connection down.
    pub rst: bool,
    /// Sequence number of the first byte, or of the SYN.
    pub sequence: u32,
    /// Length of the payload.
    pub len_bytes: u32,
    /// As much of the payload as was captured, from its first byte on; at most `len_bytes`.
    pub captured: &'a [u8],
}
