//! The thin proxy in front of vLLM.

pub mod inject;
