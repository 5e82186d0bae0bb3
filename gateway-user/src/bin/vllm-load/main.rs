//! Placeholder of vllm-load.
fn main() {}
