//! What the probe says of itself, in lines that the gateway puts into its log: packets that should not be. Normal traffic has none.
//!
//! A line holds numbers of headers, never a byte of payload. It is written when a CPU's count of its cause reaches a power of two, so
//! that the first is seen at once and a flood makes a few dozen lines, and not one for each packet.
//!
//! It is no function of its own in the kernel: where a program has one, older verifiers take every number to matter, and go many times
//! through what they went through once.

use crate::counter;
use aya_log_ebpf::warn;
use core::mem::MaybeUninit;
use gateway_common::record::INGRESS;

/// A packet that says it is TCP and is not. What of it was not read is 0, and all of it while no such packet was seen.
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
    /// None yet. In its place from the start: a copy would take a function, which the compiler calls.
    #[inline(always)]
    pub fn clear(place: &mut MaybeUninit<Self>) -> &mut Self {
        Self::write(place.as_mut_ptr(), [0; 6]);
        unsafe { place.assume_init_mut() }
    }

    /// One of which this much is known: the packet's length, TCP's place, the fragment's, the length of TCP's header, and both ports.
    #[inline(always)]
    pub fn set(&mut self, numbers: [u32; 6]) {
        Self::write(self, numbers);
    }

    /// One by one, so that none is left to a function that the compiler would call.
    #[inline(always)]
    fn write(place: *mut Self, numbers: [u32; 6]) {
        unsafe {
            (&raw mut (*place).packet_bytes).write_volatile(numbers[0]);
            (&raw mut (*place).tcp_at_bytes).write_volatile(numbers[1]);
            (&raw mut (*place).fragment).write_volatile(numbers[2]);
            (&raw mut (*place).tcp_header_bytes).write_volatile(numbers[3]);
            (&raw mut (*place).source_port).write_volatile(numbers[4]);
            (&raw mut (*place).destination_port).write_volatile(numbers[5]);
        }
    }

    /// Counts it, if there was one, and tells of it if that is due.
    #[inline(always)]
    pub fn note(&self) {
        if self.packet_bytes == 0 || !counter::malformed(DIRECTION) {
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
