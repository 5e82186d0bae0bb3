//! What the probe says of a packet that says it is TCP and is not: numbers of its headers, never a byte of payload.

/// The map that carries them: a ring buffer of its own.
pub const MALFORMED: &str = "MALFORMED";

/// Numbers in a [`Malformed`].
pub const WORDS: usize = 7;

/// A malformed packet. What of it was not read is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Its length.
    pub packet_bytes: u32,
    /// Where in it TCP should begin.
    pub tcp_at_bytes: u32,
    /// What IPv4 says of a fragment's place, in units of eight bytes.
    pub fragment: u32,
    /// What TCP's header says of its own length.
    pub tcp_header_bytes: u32,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// [`crate::record::INGRESS`] or [`crate::record::EGRESS`].
    pub direction: u32,
}

impl Malformed {
    /// From its numbers, in the order of the fields.
    pub const fn of(words: [u32; WORDS]) -> Self {
        Self {
            packet_bytes: words[0],
            tcp_at_bytes: words[1],
            fragment: words[2],
            tcp_header_bytes: words[3],
            source_port: words[4],
            destination_port: words[5],
            direction: words[6],
        }
    }
}

const _: () = assert!(core::mem::size_of::<Malformed>() == WORDS * 4);
