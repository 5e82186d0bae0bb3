//! What the agent asked for.

use crate::element;
use aya_ebpf::{macros::map, maps::Array};
use gateway_common::setting::{PORT_WORDS, Settings, port_bit};

#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

#[map]
static PORTS: Array<u64> = Array::with_max_entries(PORT_WORDS, 0);

/// Whether a port is watched.
#[inline(always)]
pub fn is_watched(port: u16) -> bool {
    let (word, bit) = port_bit(port);
    element::find(&PORTS, word).is_some_and(|ports| unsafe { *ports } & bit != 0)
}

/// How much of each packet to a server is captured. Always there: the verifier only cannot know it.
#[inline(always)]
pub fn ingress_prefix_bytes() -> Option<u32> {
    element::find(&SETTINGS, 0).map(|settings| unsafe { (*settings).ingress_prefix_bytes })
}
