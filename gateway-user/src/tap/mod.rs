//! The tap.
pub mod cgroup;
pub mod counters;
pub mod error;
pub mod link;
pub mod privileges;
pub mod probe;
mod record;
pub mod ring;
pub mod segment;
