//! What the probe counted, read from memory that it shares: no system call and no privilege is needed, so that counts can be read
//! long after every capability is gone.

use super::error::TapError;
use aya::maps::MapData;
use gateway_common::counter::{COUNTERS, Counters as Element, DIRECTIONS, WORDS, index};
use gateway_common::record::{EGRESS, INGRESS};
use memmap2::{MmapOptions, MmapRaw};
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// The probe's counters.
#[derive(Debug)]
pub struct Counters {
    memory: MmapRaw,
    cpus: u32,
}

/// What the probe counted since it was loaded. `payload_bytes` is always `submitted_bytes` plus `lost_bytes`, once no packet is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Packets with payload, SYN, FIN or RST.
    pub packets: u64,
    /// Their payload.
    pub payload_bytes: u64,
    /// Records in the ring, read or not.
    pub submitted: u64,
    /// Payload that they stand for.
    pub submitted_bytes: u64,
    /// Payload of lost records.
    pub lost_bytes: u64,
    /// Records lost because the ring was full.
    pub lost_ring_full: u64,
    /// Records lost because the kernel would not give their bytes.
    pub lost_load_failed: u64,
    /// Records lost because their segment was too long.
    pub lost_too_long: u64,
    /// TCP packets of any port that could not be understood; they are in no other count.
    pub malformed: u64,
}

impl Totals {
    /// Records lost, whatever the cause.
    pub fn lost(&self) -> u64 {
        self.lost_ring_full + self.lost_load_failed + self.lost_too_long
    }
}

impl Counters {
    /// Maps the counters of `cpus` processors.
    pub(super) fn open(map: &MapData, cpus: u32) -> Result<Counters, TapError> {
        let memory = MmapOptions::new()
            .len((cpus * DIRECTIONS) as usize * size_of::<Element>())
            .map_raw_read_only(map.fd().as_fd().as_raw_fd())
            .map_err(|source| TapError::Memory {
                map: COUNTERS,
                source,
            })?;
        Ok(Counters { memory, cpus })
    }

    /// Of what goes to servers.
    pub fn ingress(&self) -> Totals {
        self.of(INGRESS)
    }

    /// Of what comes from them.
    pub fn egress(&self) -> Totals {
        self.of(EGRESS)
    }

    fn of(&self, direction: u8) -> Totals {
        let sum = |field| {
            (0..self.cpus)
                .map(|cpu| self.word(index(cpu, direction), field))
                .sum()
        };
        Totals {
            packets: sum(offset_of!(Element, packets)),
            payload_bytes: sum(offset_of!(Element, payload_bytes)),
            submitted: sum(offset_of!(Element, submitted)),
            submitted_bytes: sum(offset_of!(Element, submitted_bytes)),
            lost_bytes: sum(offset_of!(Element, lost_bytes)),
            lost_ring_full: sum(offset_of!(Element, lost_ring_full)),
            lost_load_failed: sum(offset_of!(Element, lost_load_failed)),
            lost_too_long: sum(offset_of!(Element, lost_too_long)),
            malformed: sum(offset_of!(Element, malformed)),
        }
    }

    fn word(&self, element: u32, field_bytes: usize) -> u64 {
        let words = self.memory.as_ptr().cast::<AtomicU64>();
        let word = element as usize * WORDS + field_bytes / size_of::<u64>();
        assert!(
            (word + 1) * size_of::<u64>() <= self.memory.len(),
            "a counter outside of its map"
        );
        // SAFETY: the word is within the mapping, as was just asserted; the mapping begins at a page, so that it is aligned; and the
        // kernel changes it by atomic additions only.
        unsafe { &*words.add(word) }.load(Ordering::Relaxed)
    }
}
