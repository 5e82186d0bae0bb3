//! The operator's side of the gateway: metrics, liveness and readiness, on an address of its own.
//!
//! Kept apart from the data plane so that a flood of requests cannot lock the operator out, nor a scraper slow the requests: it has
//! its own listener, its own limits, and does its heavy work off the async threads. It asks for no credentials; the default address
//! is loopback for that reason.

mod readiness;
mod routes;
mod server;

pub use readiness::{Readiness, State};
pub use server::AdminServer;
