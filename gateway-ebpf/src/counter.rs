//! Counts what was recorded and what was lost. A counter belongs to one CPU and is added to atomically, since another program can
//! interrupt this one there.

use crate::element;
use aya_ebpf::{bindings::BPF_F_MMAPABLE, helpers::bpf_get_smp_processor_id, macros::map, maps::Array};
use core::arch::asm;
use gateway_common::counter::{Counters, DIRECTIONS, index};

/// The agent makes it as large as the machine has CPUs.
#[map]
static COUNTERS: Array<Counters> = Array::with_max_entries(DIRECTIONS, BPF_F_MMAPABLE);

/// The counters of one direction on the CPU that a packet is seen on.
#[derive(Clone, Copy)]
pub struct Direction(*mut Counters);

/// Adds to one of a direction's counters.
macro_rules! add {
    ($direction:expr, $counter:ident, $amount:expr) => {
        // The pointer is into a map's element, which lives as long as the program.
        unsafe { add_atomically(&raw mut (*$direction.0).$counter, $amount) }
    };
}

/// The instruction itself, since `core` has no atomic additions for a target without compare-and-swap.
#[inline(always)]
unsafe fn add_atomically(counter: *mut u64, amount: u64) {
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) amount, options(nostack)) };
}

impl Direction {
    /// Those of a direction; `None` never comes, which the verifier only cannot know. A CPU that was added after the start shares
    /// the first one's.
    #[inline(always)]
    pub fn here(direction: u8) -> Option<Self> {
        let cpu = unsafe { bpf_get_smp_processor_id() };
        let own = element::find(&COUNTERS, index(cpu as u32, direction));
        own.or_else(|| element::find(&COUNTERS, index(0, direction)))
            .map(Self)
    }

    /// A packet of ours.
    #[inline(always)]
    pub fn packet(self, payload_bytes: u32) {
        add!(self, packets, 1);
        add!(self, payload_bytes, u64::from(payload_bytes));
    }

    /// A record in the ring.
    #[inline(always)]
    pub fn submitted(self, len_bytes: u32) {
        add!(self, submitted, 1);
        add!(self, submitted_bytes, u64::from(len_bytes));
    }

    /// Records that are lost, and all payload that they stood for.
    #[inline(always)]
    pub fn lost(self, loss: Loss, records: u32, len_bytes: u32) {
        let records = u64::from(records);
        match loss {
            Loss::RingFull => add!(self, lost_ring_full, records),
            Loss::LoadFailed => add!(self, lost_load_failed, records),
            Loss::TooLong => add!(self, lost_too_long, records),
        }
        add!(self, lost_bytes, u64::from(len_bytes));
    }
}

/// Why a record is lost.
#[derive(Clone, Copy)]
pub enum Loss {
    RingFull,
    LoadFailed,
    TooLong,
}

/// A packet that says it is TCP and is not. Whether its number is a power of two, in which case a line is due. A program that interrupts this
/// one in between may have the line in its place.
#[inline(always)]
pub fn malformed(direction: u8) -> bool {
    Direction::here(direction).is_some_and(|direction| {
        add!(direction, malformed, 1);
        let count = unsafe { (&raw const (*direction.0).malformed).read_volatile() };
        count & count.wrapping_sub(1) == 0
    })
}
