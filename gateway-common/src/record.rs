//! One record of the ring: what the probe says of one part of one TCP segment.
//!
//! A record is a [`Record`] and, right behind it, [`Record::captured_bytes`] of payload. What follows up to the end of the ring's
//! entry means nothing: entries come in a few sizes ([`CLASSES`]), because the kernel reserves only what it knows beforehand.

use core::mem::{align_of, offset_of, size_of};

/// The map that carries records: a ring buffer.
pub const RING: &str = "RECORDS";

/// The layout's number. It changes whenever the meaning of any byte does.
pub const VERSION: u8 = 1;

/// Most payload bytes in one record; of a longer segment several are made. A verifier must see that a copy ends within its entry,
/// which takes a power of two.
pub const PART_BYTES: u32 = 16 * 1024;

/// Most records for one segment. Linux's longest packet (BIG TCP) is 8 × 64 KiB with its headers.
pub const PARTS_MAX: u32 = 8 * 64 * 1024 / PART_BYTES + 1;

/// Payload bytes that an entry of the ring has room for: 0, or one of these. Twice the payload is the most that is wasted.
pub const CLASSES: [u32; 8] = [128, 256, 512, 1024, 2048, 4096, 8192, PART_BYTES];

/// The segment opens the connection; its payload, if any, begins one behind [`Record::sequence`].
pub const SYN: u8 = 1;
/// Its sender has nothing more to say.
pub const FIN: u8 = 2;
/// The connection was torn down.
pub const RST: u8 = 4;

/// Towards the server: bytes of a request.
pub const INGRESS: u8 = 0;
/// From the server: bytes of a response.
pub const EGRESS: u8 = 1;

/// What stands before the payload.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When the probe saw the packet: `CLOCK_MONOTONIC`, in nanoseconds. The same for all parts of a segment.
    pub time_ns: u64,
    /// Address of the client, in IPv6's form; IPv4 is mapped (`::ffff:a.b.c.d`).
    pub client: [u8; 16],
    /// Address of the server, likewise.
    pub server: [u8; 16],
    /// Port of the client.
    pub client_port: u16,
    /// Port of the server.
    pub server_port: u16,
    /// Sequence number of the part's first byte, or, with [`SYN`], of the SYN, which stands one before its first byte.
    pub sequence: u32,
    /// Payload that the part stands for.
    pub len_bytes: u32,
    /// How much of it follows, counted from its first byte; at most [`PART_BYTES`].
    pub captured_bytes: u32,
    /// Where in the segment's payload the part begins: 0 for its first.
    pub offset_bytes: u32,
    /// [`VERSION`].
    pub version: u8,
    /// [`INGRESS`] or [`EGRESS`].
    pub direction: u8,
    /// [`SYN`] (on a segment's first part only), [`FIN`] and [`RST`] (on its last only).
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
}

/// Length of a record without payload.
pub const HEADER_BYTES: usize = 64;

const _: () = {
    assert!(size_of::<Record>() == HEADER_BYTES && align_of::<Record>() == 8);
    assert!(offset_of!(Record, time_ns) == 0);
    assert!(offset_of!(Record, client) == 8);
    assert!(offset_of!(Record, server) == 24);
    assert!(offset_of!(Record, client_port) == 40);
    assert!(offset_of!(Record, server_port) == 42);
    assert!(offset_of!(Record, sequence) == 44);
    assert!(offset_of!(Record, len_bytes) == 48);
    assert!(offset_of!(Record, captured_bytes) == 52);
    assert!(offset_of!(Record, offset_bytes) == 56);
    assert!(offset_of!(Record, version) == 60);
    assert!(offset_of!(Record, direction) == 61);
    assert!(offset_of!(Record, flags) == 62);
    assert!(offset_of!(Record, reserved) == 63);
    // The fields fill the record: there is no padding, whose bytes would be whatever the ring held before.
    assert!(8 + 16 + 16 + 2 + 2 + 4 + 4 + 4 + 4 + 1 + 1 + 1 + 1 == HEADER_BYTES);
    assert!(PART_BYTES.is_power_of_two() && CLASSES[CLASSES.len() - 1] == PART_BYTES);
};
