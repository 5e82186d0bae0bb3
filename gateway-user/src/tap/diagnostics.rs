//! What the probe says of itself: packets that should not be, which it puts into a ring of their own. They go into the gateway's log, as
//! warnings of the target `gateway_ebpf`.
//!
//! They take memory that is shared, and no system call: no privilege is needed to read them. Where nobody does, the ring fills, and the probe
//! leaves out what comes then; its counts are not affected.

use super::error::TapError;
use aya::maps::{Map, MapData, RingBuf};
use gateway_common::malformed::{MALFORMED, Malformed, WORDS};
use gateway_common::record::INGRESS;

/// The reader's end.
pub struct Diagnostics {
    malformed: RingBuf<MapData>,
}

impl Diagnostics {
    pub(super) fn open(map: Map) -> Result<Diagnostics, TapError> {
        let malformed = RingBuf::try_from(map).map_err(|source| TapError::map(MALFORMED, source))?;
        Ok(Diagnostics { malformed })
    }

    /// Writes what has come since the last time into the log.
    pub fn flush(&mut self) {
        while let Some(entry) = self.malformed.next() {
            if let Some(malformed) = parse(&entry) {
                warn(&malformed);
            }
        }
    }
}

/// The ring's entries are as long as what the probe reserves.
fn parse(entry: &[u8]) -> Option<Malformed> {
    let mut words = [0; WORDS];
    let (chunks, _) = entry.as_chunks();
    let chunks = chunks.get(..WORDS)?;
    for (word, bytes) in words.iter_mut().zip(chunks) {
        *word = u32::from_ne_bytes(*bytes);
    }
    Some(Malformed::of(words))
}

fn warn(malformed: &Malformed) {
    let Malformed {
        packet_bytes,
        tcp_at_bytes,
        fragment,
        tcp_header_bytes,
        source_port,
        destination_port,
        direction,
    } = malformed;
    let way = if *direction == u32::from(INGRESS) {
        "in"
    } else {
        "out"
    };
    log::warn!(
        target: "gateway_ebpf",
        "a malformed packet of {packet_bytes} bytes on its way {way}: TCP at byte {tcp_at_bytes}, fragment {fragment}, \
         TCP header of {tcp_header_bytes} bytes, port {source_port} to {destination_port}"
    );
}

impl std::fmt::Debug for Diagnostics {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Diagnostics").finish_non_exhaustive()
    }
}
