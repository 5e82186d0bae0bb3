//! The Prometheus registry: what operators and dashboards see of the gateway while it runs.
//!
//! One [`Metrics`] is made at start and handed down; clones share one registry, and there are no globals. Requests come in as
//! ended [`RequestEvent`]s, the rest through handles that each part of the gateway holds.
//!
//! Promises: labels are bounded ([`Limits`]), and past a bound a value is booked under `__other__`, never lost, so that sums stay
//! right. Token counters only hold what may be billed. What is unknown adds nothing. Base units are seconds and bytes.
//!
//! Left out: allocated cost by team and per-user figures (those are computed from stored rows; of the ledger's only the last hour of each upstream is told, by
//! what it was for), and anything that must survive a restart. The charge of a
//! request is known when it ends and is counted here, to be watched; a bill is summed from rows.

mod catalogue;
mod families;
mod gaps;
mod handles;
mod labels;
mod ledger;
mod limits;
mod process;
mod reconciliation;
mod scrape;
mod series;
mod store;
mod tap;
#[cfg(test)]
mod tests;

pub use catalogue::Family;
pub use handles::{InflightGuard, UpstreamMetrics};
pub use labels::LABELS;
pub(crate) use labels::OTHER as OTHER_TEAMS;
pub use reconciliation::ReconciliationMetrics;
pub use scrape::ScrapeMetrics;
pub(crate) use series::may_be_billed;

use crate::bookkeeper::LedgerStats;
use crate::config::Capture;
use crate::event::{EventSink, RequestEvent};
use crate::limits::Limiter;
use crate::store::service::StoreCounts;
use crate::tap::agent::Agent;
use crate::wire::exchange::Outcome;
use catalogue::Catalogue;
use families::Families;
use labels::Admitted;
use prometheus::TextEncoder;
use prometheus::core::Collector;
use series::SeriesCache;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

/// The content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How many label values are kept apart.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Teams; more are `__other__`.
    pub max_teams: usize,
    /// Models; more are `__other__`.
    pub max_models: usize,
    /// Triples of team, model and endpoint. Each costs some 10 kB of text at every scrape when it streams, so that the product of
    /// the other two limits would be a gigabyte.
    pub max_combinations: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_teams: 1_000,
            max_models: 200,
            max_combinations: 5_000,
        }
    }
}

/// Why the registry could not be made or read.
#[derive(Debug, thiserror::Error)]
#[error("metrics registry: {0}")]
pub struct MetricsError(#[from] prometheus::Error);

/// The registry and everything in it. Clones are cheap and share it.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Catalogue,
    families: Arc<Families>,
    teams: Admitted,
    models: Admitted,
    series: SeriesCache,
}

impl Metrics {
    /// Registers every family.
    ///
    /// # Errors
    /// When two families clash, which is a defect of this program.
    pub fn new(limits: Limits) -> Result<Metrics, MetricsError> {
        let registry = Catalogue::default();
        let families = Arc::new(Families::registered_in(&registry)?);
        let revision = option_env!("VLLM_GATEWAY_REVISION").unwrap_or_default();
        families
            .build_info
            .with_label_values(&[env!("CARGO_PKG_VERSION"), revision])
            .set(1.0);
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        families.start_time.set(since_1970.as_secs_f64());
        let inner = Inner {
            registry,
            families,
            teams: Admitted::up_to(limits.max_teams),
            models: Admitted::up_to(limits.max_models),
            series: SeriesCache::up_to(limits.max_combinations),
        };
        Ok(Metrics {
            inner: Arc::new(inner),
        })
    }

    /// Says where requests are seen.
    pub fn capture(&self, capture: Capture) {
        self.inner
            .families
            .capture
            .with_label_values(&[capture.as_str()])
            .set(1.0);
    }

    /// Keeps a label for a team of the configuration, however many strangers come first.
    pub fn reserve_team(&self, team: &str) {
        self.inner.teams.reserve(team);
    }

    /// Keeps a label for a model that an upstream is known to serve.
    pub fn reserve_model(&self, model: &str) {
        self.inner.models.reserve(model);
    }

    /// A request of a team whose name has been accepted, until the guard is dropped.
    pub fn inflight(&self, team: &str) -> InflightGuard {
        let team = self.inner.teams.admit(team);
        InflightGuard::of(self.inner.families.inflight.with_label_values(&[team]))
    }

    /// How many requests of each team have begun and not ended, by the team's label.
    pub fn inflight_by_team(&self) -> BTreeMap<String, i64> {
        let families = self.inner.families.inflight.collect();
        let gauges = families.iter().flat_map(|family| family.get_metric());
        gauges
            .filter_map(|gauge| {
                let team = gauge.get_label().first()?.value().to_owned();
                Some((team, gauge.get_gauge().get_value() as i64))
            })
            .collect()
    }

    /// The label of a team whose name has been accepted.
    pub(crate) fn label_of<'n>(&self, team: &'n str) -> &'n str {
        self.inner.teams.admit(team)
    }

    /// The label under which an event is counted, if it is its turn now.
    pub(crate) fn team_label<'e>(&self, event: &'e RequestEvent) -> &'e str {
        self.inner.team_of(event)
    }

    /// An open connection of a client, until the guard is dropped.
    pub fn client_connection(&self) -> InflightGuard {
        InflightGuard::of(self.inner.families.client_connections.clone())
    }

    /// The gateway answered by itself, for this reason.
    pub fn refused(&self, reason: &'static str) {
        self.inner.families.refused.with_label_values(&[reason]).inc();
    }

    /// What became of asking for usage on the client's behalf: `edited`, `untouched` and the like.
    pub fn injection(&self, result: &'static str) {
        self.inner.families.injection.with_label_values(&[result]).inc();
    }

    /// The handle of a configured upstream.
    pub fn upstream(&self, name: &str) -> UpstreamMetrics {
        UpstreamMetrics::of(Arc::clone(&self.inner.families), name)
    }

    /// The handle of the scrape of a configured upstream.
    pub fn scrape(&self, upstream: &str) -> ScrapeMetrics {
        ScrapeMetrics::of(Arc::clone(&self.inner.families), upstream)
    }

    /// The handle of the reconciliation of a configured upstream.
    pub fn reconciliation(&self, upstream: &str) -> ReconciliationMetrics {
        ReconciliationMetrics::of(Arc::clone(&self.inner.families), upstream)
    }

    /// Shows a store's numbers too.
    ///
    /// # Errors
    /// When they are shown already, which is a defect of this program.
    pub fn show_store(&self, counts: StoreCounts) -> Result<(), MetricsError> {
        Ok(self
            .inner
            .registry
            .register(Box::new(store::StoreFamilies::of(counts)?))?)
    }

    /// Shows a bookkeeper's numbers too.
    ///
    /// # Errors
    /// When they are shown already, which is a defect of this program.
    pub fn show_ledger(&self, stats: Arc<LedgerStats>) -> Result<(), MetricsError> {
        Ok(self
            .inner
            .registry
            .register(Box::new(ledger::LedgerFamilies::of(stats)?))?)
    }

    /// Shows the limits of teams too, and how these stand with them. Weak: they take their labels from here.
    ///
    /// # Errors
    /// When they are shown already, which is a defect of this program.
    pub fn show_limits(&self, limiter: Weak<Limiter>) -> Result<(), MetricsError> {
        Ok(self
            .inner
            .registry
            .register(Box::new(limits::LimitFamilies::of(limiter)?))?)
    }

    /// Shows a tap's numbers too, for as long as it is there.
    ///
    /// # Errors
    /// When they are shown already, which is a defect of this program.
    pub fn show_tap(&self, tap: Weak<Agent>) -> Result<(), MetricsError> {
        Ok(self
            .inner
            .registry
            .register(Box::new(tap::TapFamilies::of(tap)?))?)
    }

    /// Every family that is shown here, also where it has no sample yet, by name.
    pub fn families(&self) -> Vec<Family> {
        self.inner.registry.families()
    }

    /// Everything, in Prometheus' text format. With many teams this takes milliseconds: not for an async thread.
    ///
    /// # Errors
    /// When a family breaks the format, which is a defect of this program.
    pub fn encode(&self) -> Result<String, MetricsError> {
        Ok(TextEncoder::new().encode_to_string(&self.inner.registry.gather())?)
    }
}

impl EventSink for Metrics {
    fn record(&self, event: &RequestEvent) {
        let (inner, families) = (&*self.inner, &*self.inner.families);
        if let Some(overhead_us) = event.gateway_overhead_us {
            families.overhead.observe(overhead_us as f64 / 1e6);
        }
        let series = inner.series.get(
            families,
            inner.team_of(event),
            inner.model_of(event),
            event.endpoint,
        );
        series.record(families, event);
    }
}

impl Inner {
    /// A refused request does not found a label: otherwise whoever makes up names would use up the limit.
    fn team_of<'e>(&self, event: &'e RequestEvent) -> &'e str {
        match &*event.team_id {
            "" => labels::NONE,
            team if event.outcome != Outcome::Refused || self.teams.has(team) => self.teams.admit(team),
            _ => labels::OTHER,
        }
    }

    /// A model's name comes from the client, so it takes a success of the server to make it a label.
    fn model_of<'e>(&self, event: &'e RequestEvent) -> &'e str {
        match &*event.model {
            "" => labels::NONE,
            model if (200..400).contains(&event.status_code) || self.models.has(model) => {
                self.models.admit(model)
            }
            _ => labels::UNKNOWN,
        }
    }
}
