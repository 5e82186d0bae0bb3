//! What the kernel probe and the agent must agree on: the layout of a captured segment, the names and shapes of the maps
//! between them, and what is counted. Nothing else lives here, and nothing here needs `std`.
//!
//! Both sides run on the same machine, so that numbers are in its own byte order. Every layout is asserted when either side is
//! compiled: a change that moves a field breaks the build, not the numbers.
#![no_std]

pub mod counter;
pub mod record;
pub mod setting;
