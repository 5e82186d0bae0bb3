//! vllm-gateway: which team an LLM request was for, how long each phase took, and how many tokens it used.

pub mod admin;
pub mod cli;
pub mod config;
pub mod descriptors;
pub mod doctor;
pub mod event;
pub mod gateway;
pub mod identity;
pub mod metrics;
pub mod net;
pub mod proxy;
pub mod store;
pub mod tap;
pub mod vllm;
pub mod wire;
