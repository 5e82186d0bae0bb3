//! What the probe counts. Between two packets `payload_bytes = submitted_bytes + lost_bytes` holds in each direction, exactly:
//! what did not reach the ring is known, by cause.
//!
//! Counters are kept for each CPU in a memory-mapped array, so that reading them takes no system call and no privilege. An
//! element is one direction's on one CPU: see [`index`].

use core::mem::{align_of, offset_of, size_of};

/// The map of counters: an array of [`Counters`].
pub const COUNTERS: &str = "COUNTERS";

/// The counters of one direction on one CPU, which fill two cache lines, so that no two CPUs write to the same one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets of a watched port with payload, SYN, FIN or RST.
    pub packets: u64,
    /// Their payload.
    pub payload_bytes: u64,
    /// Records in the ring.
    pub submitted: u64,
    /// Payload that they stand for, captured or not.
    pub submitted_bytes: u64,
    /// Payload of lost records, whatever the cause.
    pub lost_bytes: u64,
    /// Records lost because the ring was full, and those behind them in the same segment; likewise for the other causes.
    pub lost_ring_full: u64,
    /// Records lost because the kernel would not give their bytes.
    pub lost_load_failed: u64,
    /// Records lost because their segment is longer than any that is known of.
    pub lost_too_long: u64,
    /// Packets of any port that say they are TCP and whose headers make no sense. What they carried is not known, and in no other count.
    pub malformed: u64,
    /// Zero.
    pub reserved: [u64; 7],
}

/// Numbers in an element.
pub const WORDS: usize = 16;

const _: () = {
    assert!(size_of::<Counters>() == WORDS * 8 && align_of::<Counters>() == 8);
    assert!(offset_of!(Counters, packets) == 0);
    assert!(offset_of!(Counters, payload_bytes) == 8);
    assert!(offset_of!(Counters, submitted) == 16);
    assert!(offset_of!(Counters, submitted_bytes) == 24);
    assert!(offset_of!(Counters, lost_bytes) == 32);
    assert!(offset_of!(Counters, lost_ring_full) == 40);
    assert!(offset_of!(Counters, lost_load_failed) == 48);
    assert!(offset_of!(Counters, lost_too_long) == 56);
    assert!(offset_of!(Counters, malformed) == 64);
    assert!(offset_of!(Counters, reserved) == 72);
};

/// Directions, each with an element on each CPU.
pub const DIRECTIONS: u32 = 2;

/// The element of a CPU and a direction ([`crate::record::INGRESS`] or [`crate::record::EGRESS`]).
pub const fn index(cpu: u32, direction: u8) -> u32 {
    cpu * DIRECTIONS + direction as u32
}
