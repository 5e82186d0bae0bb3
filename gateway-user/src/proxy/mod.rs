//! The data plane: a thin HTTP/1.1 proxy on [`crate::wire`]'s strict readers.
//!
//! It forwards the client's bytes as they are, refuses what is ambiguous, notices a client that leaves while the upstream is silent, and
//! ends every request in exactly one [`RequestEvent`](crate::event::RequestEvent). In the order in which a request meets them:
//!
//! * [`accept`]: listeners, the limit on connections, draining.
//! * [`client`]: a connection and its requests, one after the other.
//! * [`forward`]: one request: who it is for, its body ([`receive`]), where it goes ([`upstream`], [`health`]), what is asked on its
//!   behalf ([`inject`]).
//! * [`send`] and [`respond`] ([`relay`]): to the upstream and back; [`rewrite`] has what changes in the heads.
//! * [`crate::limits`] may stand in its way, once it is known who it is for.
//! * [`refusal`]: what the gateway answers by itself.
//! * [`recording`]: the request's one event.

pub mod accept;
pub mod buffer;
pub mod client;
pub mod forward;
pub mod health;
pub mod inject;
pub mod receive;
pub mod recording;
pub mod refusal;
pub mod relay;
pub mod respond;
pub mod rewrite;
pub mod send;
pub mod upstream;

use crate::books::Books;
use crate::config::Config;
use crate::correlate::Beside;
use crate::limits::Limiter;
use crate::metrics::Metrics;
use crate::wire::exchange::Ending;
use buffer::BufferPool;
use client::Gone;
use inject::Learned;
use refusal::Refusal;
use std::sync::Arc;
use upstream::{ConnectionPool, Upstreams};

/// What all workers share.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Whose requests are, and where their events go.
    pub books: Books,
    /// The servers.
    pub upstreams: Upstreams,
    /// Prometheus.
    pub metrics: Metrics,
    /// What was learned about the servers' answers.
    pub learned: Learned,
    /// Whether the gateway is on its way out.
    pub phase: accept::Phase,
    /// How much each team may take.
    pub limiter: Arc<Limiter>,
    /// The kernel's view of the same requests, where there is one.
    pub beside: Option<Arc<dyn Beside>>,
}

impl Shared {
    /// Everything that a gateway with this configuration needs.
    pub fn new(
        config: Config,
        metrics: Metrics,
        books: Books,
        limiter: Arc<Limiter>,
        beside: Option<Arc<dyn Beside>>,
    ) -> Arc<Shared> {
        Arc::new(Shared {
            upstreams: Upstreams::new(&config, &metrics),
            learned: Learned::default(),
            phase: accept::Phase::default(),
            books,
            metrics,
            config,
            limiter,
            beside,
        })
    }
}

/// What the connections of one runtime share.
#[derive(Clone)]
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// Idle connections to the upstreams.
    pub pool: Arc<ConnectionPool>,
    /// Read buffers.
    pub buffers: BufferPool,
}

impl Worker {
    /// A worker with empty pools.
    pub fn new(shared: &Arc<Shared>) -> Worker {
        let pool = Arc::new(ConnectionPool::new(&shared.upstreams, &shared.config));
        Worker {
            shared: Arc::clone(shared),
            pool,
            buffers: BufferPool::default(),
        }
    }
}

/// Why a request does not go on.
#[derive(Debug)]
pub enum Stop {
    /// The gateway answers by itself; the client has got nothing yet.
    Refused(Refusal),
    /// The client went away.
    Gone,
    /// The response broke off in the middle: the connection must end so that the client sees that.
    Broken(Ending, &'static str),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Stop {
        Stop::Refused(refusal)
    }
}

impl From<Gone> for Stop {
    fn from(Gone: Gone) -> Stop {
        Stop::Gone
    }
}
