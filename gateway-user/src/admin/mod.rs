//! The operator's side of the gateway: metrics, liveness, readiness, the live console and its API, on an address of its own.
//!
//! Kept apart from the data plane so that a flood of requests cannot lock the operator out, nor a scraper slow the requests: it has
//! its own listener, its own limits, and does its heavy work off the async threads. `access.rs` says who may see what, `docs/API.md` what
//! there is to see. Nothing can be changed here.

mod access;
mod answer;
mod page;
mod readiness;
mod routes;
mod server;
mod stream;

pub use readiness::{Readiness, State};
pub use server::AdminServer;
