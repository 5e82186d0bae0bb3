//! What the parts of the gateway hold: cheap clones, resolved once, that leave no way to name a label wrong.

use super::families::Families;
use prometheus::{IntCounter, IntGauge};
use std::sync::Arc;

/// Counts one thing in progress (a request, a connection) for as long as it lives. Whatever way its owner ends, the gauge goes
/// down again.
#[must_use = "dropped at once, it counts nothing"]
pub struct InflightGuard {
    gauge: IntGauge,
}

impl InflightGuard {
    pub(super) fn of(gauge: IntGauge) -> InflightGuard {
        gauge.inc();
        InflightGuard { gauge }
    }
}

impl Drop for InflightGuard {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// The metrics of one upstream; made once for each configured name, then cloned.
#[derive(Clone)]
pub struct UpstreamMetrics {
    families: Arc<Families>,
    name: Arc<str>,
    up: IntGauge,
    inflight: IntGauge,
    idle: IntGauge,
    active: IntGauge,
    connect_failures: IntCounter,
}

impl UpstreamMetrics {
    pub(super) fn of(families: Arc<Families>, name: &str) -> UpstreamMetrics {
        let connections = |state| families.upstream_connections.with_label_values(&[name, state]);
        UpstreamMetrics {
            name: name.into(),
            up: families.upstream_up.with_label_values(&[name]),
            inflight: families.upstream_inflight.with_label_values(&[name]),
            idle: connections("idle"),
            active: connections("active"),
            connect_failures: families.upstream_connect_failures.with_label_values(&[name]),
            families,
        }
    }

    /// Whether requests are sent there. Down (0) until first told otherwise.
    pub fn set_up(&self, up: bool) {
        self.up.set(up.into());
    }

    /// A request that the upstream works on, until the guard is dropped.
    pub fn inflight(&self) -> InflightGuard {
        InflightGuard::of(self.inflight.clone())
    }

    /// A connection that waits in the pool, until the guard is dropped.
    pub fn idle_connection(&self) -> InflightGuard {
        InflightGuard::of(self.idle.clone())
    }

    /// A connection that carries a request, until the guard is dropped.
    pub fn active_connection(&self) -> InflightGuard {
        InflightGuard::of(self.active.clone())
    }

    /// A connection could not be made.
    pub fn connect_failed(&self) {
        self.connect_failures.inc();
    }

    /// A request is sent again; `reason` says why the first try failed.
    pub fn retried(&self, reason: &'static str) {
        self.families
            .upstream_retries
            .with_label_values(&[&*self.name, reason])
            .inc();
    }
}
