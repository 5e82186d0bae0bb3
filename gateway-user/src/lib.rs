//! vllm-gateway: which team an LLM request was for, how long each phase took, and how many tokens it used.

pub mod event;
pub mod proxy;
pub mod wire;
