//! What a probe in the kernel sees of the connections to vLLM, read as exchanges.
//!
//! [`open`] loads the probe, attaches it to the cgroup of vLLM's sockets and gives up the privileges that this took. The probe tells of
//! TCP [`segment`]s: their place in the sequence, their true length, and as much of their bytes as it captured. A
//! [`stream`] puts those of one direction in order, with holes where bytes are missing, and [`connections`] hands both directions of each
//! connection to [`wire`](crate::wire), which finds the exchanges. The [`agent`] does all this every few milliseconds, and books what it finds.
//!
//! Promised: traffic is neither held up nor changed; a crash of the gateway leaves nothing in the kernel; a record is checked before
//! it is believed; where bytes are not known nothing is made up; what was lost is counted, by cause ([`stats`]). TLS cannot be looked into.
//!
//! What speaks with the kernel is for Linux alone. The rest is pure (no socket, no clock, but for the agent) and compiles everywhere.

pub mod agent;
pub mod connections;
mod held;
pub mod segment;
pub mod stats;
pub mod stream;
mod table;

#[cfg(not(target_os = "linux"))]
mod absent;
#[cfg(target_os = "linux")]
pub mod attacher;
#[cfg(target_os = "linux")]
pub mod attachment;
#[cfg(target_os = "linux")]
pub mod cgroup;
#[cfg(target_os = "linux")]
pub mod counters;
#[cfg(target_os = "linux")]
pub mod diagnostics;
#[cfg(target_os = "linux")]
pub mod error;
#[cfg(target_os = "linux")]
pub mod link;
#[cfg(target_os = "linux")]
mod listeners;
#[cfg(target_os = "linux")]
mod open;
#[cfg(target_os = "linux")]
pub mod privileges;
#[cfg(target_os = "linux")]
pub mod probe;
#[cfg(target_os = "linux")]
mod record;
#[cfg(target_os = "linux")]
pub mod ring;

#[cfg(not(target_os = "linux"))]
pub use absent::{TapError, open};
#[cfg(target_os = "linux")]
pub use {error::TapError, open::Tap, open::open};
