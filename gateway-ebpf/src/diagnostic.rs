//! What the probe says of itself, in lines that the gateway puts into its log: packets and records that should not be. Normal traffic
//! has none.
//!
//! A line holds numbers of headers, never a byte of payload. It is written when a CPU's count of its cause reaches a power of two, so
//! that the first is seen at once and a flood makes a few dozen lines, and not one for each packet.
//!
//! Each is a function of its own in the kernel too, which the way of a good packet does not go through.

use crate::counter;
use aya_ebpf::programs::SkBuffContext;
use aya_log_ebpf::warn;
use gateway_common::record::INGRESS;

/// Whether a count has reached a power of two by the last `amount` that was added to it.
#[inline(always)]
pub fn is_due(count: u64, amount: u64) -> bool {
    let before = count.wrapping_sub(amount);
    // Where the highest bit is a new one, the difference has it and the former count does not.
    count ^ before > before
}

/// A packet that says it is TCP and is not. What of it was not read is 0.
pub struct Malformed<const DIRECTION: u8> {
    pub packet_bytes: u32,
    /// Where in the packet TCP should begin.
    pub tcp_at_bytes: u32,
    /// What IPv4 says of a fragment's place, in units of eight bytes.
    pub fragment: u32,
    pub tcp_header_bytes: u32,
    pub source_port: u32,
    pub destination_port: u32,
}

impl<const DIRECTION: u8> Malformed<DIRECTION> {
    /// One of which only this much is known.
    #[inline(always)]
    pub fn at(ctx: &SkBuffContext, tcp_at_bytes: u32) -> Self {
        Self {
            packet_bytes: ctx.len(),
            tcp_at_bytes,
            fragment: 0,
            tcp_header_bytes: 0,
            source_port: 0,
            destination_port: 0,
        }
    }

    /// Counts it, and tells of it if that is due.
    #[inline(never)]
    pub fn note(&self) {
        if !counter::malformed(DIRECTION) {
            return;
        }
        let way = if DIRECTION == INGRESS { "in" } else { "out" };
        warn!(
            (),
            target: "gateway_ebpf",
            "a malformed packet of {} bytes on its way {}: TCP at byte {}, fragment {}, TCP header of {} bytes, port {} to {}",
            self.packet_bytes,
            way,
            self.tcp_at_bytes,
            self.fragment,
            self.tcp_header_bytes,
            self.source_port,
            self.destination_port
        );
    }
}

/// Tells of a segment of which nothing was recorded from `offset_bytes` on although the ring had room.
#[inline(never)]
pub fn unrecorded(payload_bytes: u32, offset_bytes: u32, payload_at: u32, server_port: u16) {
    warn!(
        (),
        target: "gateway_ebpf",
        "a segment with {} bytes of payload could not be recorded from byte {} on: payload at byte {}, server's port {}",
        payload_bytes,
        offset_bytes,
        payload_at,
        server_port
    );
}
