//! What the probe counted, read from memory that it shares: no system call and no privilege is needed, so that counts can be read
//! long after every capability is gone.

use super::error::TapError;
use super::stats::Totals;
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
