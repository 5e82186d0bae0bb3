//! What a probe in the kernel sees of the connections to vLLM.
//!
//! [`Tap::open`] loads the [`probe`], attaches it to the [`cgroup`] of vLLM's sockets and gives up the privileges that this took. From
//! then on the [`ring`] is read every few milliseconds: it gives TCP [`segment`]s, that is their place in the sequence, their true length,
//! and as much of their bytes as was captured. The [`attachment`] is looked after once a second, and the [`counters`] tell what was lost.
//!
//! Promised: traffic is neither held up nor changed; a crash of the gateway leaves nothing in the kernel; a record is checked before
//! it is believed; what was lost is counted, by cause. TLS cannot be looked into.

#[cfg(target_os = "linux")]
pub mod attacher;
#[cfg(target_os = "linux")]
pub mod attachment;
#[cfg(target_os = "linux")]
pub mod cgroup;
#[cfg(target_os = "linux")]
pub mod counters;
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
pub mod segment;

#[cfg(target_os = "linux")]
pub use open::Tap;
