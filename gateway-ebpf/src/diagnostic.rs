//! What the probe says of itself, in lines that the gateway puts into its log: packets that should not be. Normal traffic has none.
//!
//! A line holds numbers of headers, never a byte of payload. It is written when a CPU's count of its cause reaches a power of two, so
//! that the first is seen at once and a flood makes a few dozen lines, and not one for each packet.
//!
//! It is no function of its own in the kernel: where a program has one, older verifiers take every number to matter, and go many times
//! through what they went through once.

use crate::counter;
use aya_log_ebpf::warn;
use gateway_common::record::INGRESS;

/// Counts a packet of this many bytes that says it is TCP and is not, and tells of it if that is due and the program `LOGS`.
#[inline(always)]
pub fn malformed<const DIRECTION: u8, const LOGS: bool>(packet_bytes: u32, numbers: &[u32; 5]) {
    if !counter::malformed(DIRECTION) || !LOGS {
        return;
    }
    let &[tcp_at_bytes, fragment, tcp_header_bytes, source_port, destination_port] = numbers;
    let way = if DIRECTION == INGRESS { "in" } else { "out" };
    warn!(
        (),
        target: "gateway_ebpf",
        "a malformed packet of {} bytes on its way {}: TCP at byte {}, fragment {}, TCP header of {} bytes, port {} to {}",
        packet_bytes,
        way,
        tcp_at_bytes,
        fragment,
        tcp_header_bytes,
        source_port,
        destination_port
    );
}
