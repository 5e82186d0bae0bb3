//! vllm-gateway: which team an LLM request was for, how long each phase took, and how many tokens it used.

pub mod admin;
pub mod books;
pub mod cli;
pub mod clock;
pub mod config;
pub mod connections;
pub mod correlate;
pub mod descriptors;
pub mod doctor;
pub mod event;
pub mod gateway;
pub mod identity;
pub mod ids;
pub mod ledger;
pub mod metrics;
pub mod net;
pub mod proxy;
pub mod reconcile;
pub mod report;
pub mod segments;
pub mod store;
pub mod tally;
pub mod tap;
pub mod trace;
pub mod vllm;
pub mod wire;
