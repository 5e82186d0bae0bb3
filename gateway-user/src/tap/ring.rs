//! The ring between the probe and the gateway, read without being woken: whoever reads comes by every few milliseconds, and what is
//! there has the kernel's own times on it.

use super::error::TapError;
use super::record;
use super::segment::Segment;
use aya::maps::{MapData, RingBuf};

/// The reader's end.
pub struct Ring {
    records: RingBuf<MapData>,
    unreadable: u64,
}

impl Ring {
    pub(super) fn open(map: aya::maps::Map) -> Result<Ring, TapError> {
        let records =
            RingBuf::try_from(map).map_err(|source| TapError::map(gateway_common::record::RING, source))?;
        Ok(Ring {
            records,
            unreadable: 0,
        })
    }

    /// Hands up to `max_records` records to `take`, in the order in which the probe made them, and tells how many there were. Fewer
    /// than `max_records` means that the ring is empty, or that the probe is in the middle of the next one.
    ///
    /// A record's bytes are the ring's own memory: it is free for the next one as soon as `take` returns.
    pub fn drain(&mut self, max_records: usize, take: &mut impl FnMut(Segment<'_>)) -> usize {
        for taken in 0..max_records {
            let Some(entry) = self.records.next() else {
                return taken;
            };
            match record::parse(&entry) {
                Some(segment) => take(segment),
                None => self.unreadable += 1,
            }
        }
        max_records
    }

    /// Records so far that did not keep to the layout. Anything but 0 is a fault of the probe.
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Ring")
            .field("unreadable", &self.unreadable)
            .finish_non_exhaustive()
    }
}
