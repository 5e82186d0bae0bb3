//! What a probe in the kernel sees of the connections to vLLM, read as exchanges.
//!
//! The probe tells of TCP [`segment`]s: their place in the sequence, their true length, and as much of their bytes as it captured. A
//! [`stream`] puts those of one direction in order, with holes where bytes are missing, and [`connections`] hands both directions of each
//! connection to [`wire`](crate::wire), which finds the exchanges. Where bytes are not known nothing is made up, and every loss is
//! counted by its cause ([`stats`]).
//!
//! These parts are pure: no socket, no clock, and they compile on every system. Times are those of the segments and of
//! [`Connections::tick`](connections::Connections::tick), all from one monotonic clock. What speaks with the kernel is for Linux alone.

pub mod connections;
mod held;
pub mod segment;
pub mod stats;
pub mod stream;
mod table;

#[cfg(target_os = "linux")]
pub mod cgroup;
#[cfg(target_os = "linux")]
pub mod counters;
#[cfg(target_os = "linux")]
pub mod error;
#[cfg(target_os = "linux")]
pub mod link;
#[cfg(target_os = "linux")]
pub mod privileges;
#[cfg(target_os = "linux")]
pub mod probe;
#[cfg(target_os = "linux")]
mod record;
#[cfg(target_os = "linux")]
pub mod ring;
