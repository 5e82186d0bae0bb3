//! What both capture paths need to book a request: ids, the rules of identity, and where events go.

use crate::config::Config;
use crate::event::{EventSink, Sinks, TimingSink};
use crate::identity::IdentityRules;
use crate::ids::RequestIds;
use crate::vllm::SampleSink;
use std::sync::Arc;

/// Where what a gateway learns goes, besides Prometheus.
#[derive(Clone, Default)]
pub struct Outlets {
    /// Ended requests.
    pub events: Vec<Arc<dyn EventSink>>,
    /// What the upstreams say of themselves.
    pub samples: Vec<Arc<dyn SampleSink>>,
    /// What the kernel saw of other gateways' requests.
    pub timings: Option<Arc<dyn TimingSink>>,
}

/// Cheap to clone; clones share one sequence of ids.
#[derive(Clone)]
pub struct Books {
    /// Makes and recognises request ids.
    pub ids: Arc<RequestIds>,
    /// Who a request is for.
    pub identity: Arc<IdentityRules>,
    /// Where events go, Prometheus among them.
    pub sinks: Sinks,
}

impl Books {
    /// The books of the gateway with this configuration.
    pub fn new(config: &Config, sinks: Sinks) -> Books {
        let secret = config.gateway.secret.as_ref();
        let secret = secret.map(|secret| secret.expose().as_bytes());
        Books {
            ids: Arc::new(RequestIds::new(config.gateway.id_or_host_name().as_str(), secret)),
            identity: Arc::new(IdentityRules::new(&config.identity)),
            sinks,
        }
    }
}
