//! Placeholder of vllm-sim.
fn main() {}
