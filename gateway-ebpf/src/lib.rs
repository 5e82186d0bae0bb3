//! The kernel probe. It holds only its manifest until the tap is built.
#![no_std]
