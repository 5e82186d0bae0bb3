//! What the kernel probe and the userspace agent must agree on: the ports' byte order, the directions and
//! the flags of a captured segment. Nothing else lives here, and nothing here needs `std`.
#![no_std]

/// Which way a TCP segment went, seen from the server (vLLM) whose socket is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// Towards the server: bytes of a request.
    Ingress = 0,
    /// From the server: bytes of a response.
    Egress = 1,
}
