//! What the probe says of itself, which the gateway puts into its log: packets that should not be. Normal traffic has none.
//!
//! It says numbers of headers, never a byte of payload, when a CPU's count of its cause reaches a power of two, so that the first is seen at
//! once and a flood makes a few dozen lines, and not one for each packet.
//!
//! It is no function of its own in the kernel: where a program has one, older verifiers take every number to matter, and go many times
//! through what they went through once.

use crate::counter;
use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, macros::map, maps::RingBuf};
use gateway_common::malformed::Malformed;

/// Room for some thousand, which is more than a machine of many CPUs says of any flood: the gateway looks every second or so. A page of any
/// machine's is no larger.
#[map]
static MALFORMED: RingBuf = RingBuf::with_byte_size(64 << 10, 0);

/// Counts a packet of this many bytes that says it is TCP and is not, and tells of it if that is due.
#[inline(always)]
pub fn malformed<const DIRECTION: u8>(packet_bytes: u32, numbers: &[u32; 5]) {
    if !counter::malformed(DIRECTION) {
        return;
    }
    let &[tcp_at, fragment, tcp_header, source_port, destination_port] = numbers;
    let Some(mut entry) = MALFORMED.reserve::<Malformed>(0) else {
        return;
    };
    entry.write(Malformed::of([
        packet_bytes,
        tcp_at,
        fragment,
        tcp_header,
        source_port,
        destination_port,
        DIRECTION.into(),
    ]));
    entry.submit(BPF_RB_NO_WAKEUP.into());
}
