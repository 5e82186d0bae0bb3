//! What the agent tells the probe: which ports, and how much of a request.

use core::mem::{align_of, offset_of, size_of};

/// The map of settings: an array of one [`Settings`].
pub const SETTINGS: &str = "SETTINGS";

/// The map of watched ports: an array of [`PORT_WORDS`] words, one bit for each port. A port is tested with one load, which
/// matters to the packets that are none of ours.
pub const PORTS: &str = "PORTS";

/// Words in [`PORTS`].
pub const PORT_WORDS: u32 = 65_536 / u64::BITS;

/// The word of [`PORTS`] in which a port's bit is, and the bit.
pub const fn port_bit(port: u16) -> (u32, u64) {
    (port as u32 / u64::BITS, 1 << (port as u32 % u64::BITS))
}

/// Settings of the probe.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// How much of each packet to the server is captured, in bytes. Responses are captured whole.
    pub ingress_prefix_bytes: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<Settings>() == 8 && align_of::<Settings>() == 4);
    assert!(offset_of!(Settings, ingress_prefix_bytes) == 0);
    assert!(offset_of!(Settings, reserved) == 4);
};
