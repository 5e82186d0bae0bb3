//! Where rows are kept, and how they get to ClickHouse.
//!
//! Requests end in the [spool](Store), on disk, and so do their segments; that is all they wait for. A [sender](sender::Sender) for each [`Table`] takes
//! batches from there to ClickHouse, each once; what describes only a moment goes through [queues](queue) in memory. The
//! [service](service::StoreService) is all of it while a gateway runs.

pub mod embedded;
mod exception;
pub mod figures;
pub mod ledger;
mod lines;
pub mod migrate;
pub mod queue;
pub mod sender;
pub mod service;
pub(crate) mod spool;
mod table;
mod windows;

pub use exception::WaitCause;
pub use spool::waiting::{Backlog, Waiting};
pub use spool::{
    Batch, BatchId, Counted, DropCause, LeftCharge, Spool, SpoolStats, Store, StoreError, Ticket,
};
pub use table::Table;
