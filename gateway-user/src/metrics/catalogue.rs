//! The registry that knows what is in it: every family by name, kind, help and labels, also one that has no sample yet.
//!
//! The reference of metrics (`docs/METRICS.md`) is made of this. Prometheus' own registry tells only of families with samples.

use prometheus::core::Collector;
use prometheus::proto::{MetricFamily, MetricType};
use prometheus::{Registry, Result};
use std::sync::{Mutex, PoisonError};

/// A family, as it was registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name, as samples have it (a histogram's have `_bucket`, `_sum` and `_count` behind it).
    pub name: String,
    /// `counter`, `gauge` or `histogram`, as the text format names them.
    pub kind: &'static str,
    /// What it counts.
    pub help: String,
    /// Names of its labels.
    pub labels: Vec<String>,
}

/// Prometheus' registry, and what was put into it.
#[derive(Default)]
pub(super) struct Catalogue {
    registry: Registry,
    families: Mutex<Vec<Family>>,
}

impl Catalogue {
    pub(super) fn register(&self, collector: Box<dyn Collector>) -> Result<()> {
        let described = describe(&*collector);
        self.registry.register(collector)?;
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        families.extend(described);
        Ok(())
    }

    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    /// All families, by name.
    pub(super) fn families(&self) -> Vec<Family> {
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let mut families = families.clone();
        families.sort_by(|left, right| left.name.cmp(&right.name));
        families
    }
}

/// The families of a collector. A description has no kind, and a collected family without samples no labels, so that it takes both. What this
/// system does not have (`process_*` elsewhere than on Linux) is not there.
fn describe(collector: &dyn Collector) -> Vec<Family> {
    let collected = collector.collect();
    let descriptions = collector.desc();
    let found = descriptions.iter().filter_map(|description| {
        let family = collected
            .iter()
            .find(|family| family.name() == description.fq_name)?;
        Some(Family {
            name: description.fq_name.clone(),
            kind: match family.get_field_type() {
                MetricType::COUNTER => "counter",
                MetricType::HISTOGRAM => "histogram",
                MetricType::SUMMARY => "summary",
                MetricType::GAUGE => "gauge",
                MetricType::UNTYPED => "untyped",
            },
            help: description.help.clone(),
            labels: description.variable_labels.clone(),
        })
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{IntCounterVec, Opts};

    #[test]
    fn a_family_without_samples_is_known_and_not_shown() {
        let catalogue = Catalogue::default();
        let family = IntCounterVec::new(Opts::new("things_total", "Things."), &["kind"]).unwrap();
        catalogue.register(Box::new(family.clone())).unwrap();
        let known = Family {
            name: "things_total".to_owned(),
            kind: "counter",
            help: "Things.".to_owned(),
            labels: vec!["kind".to_owned()],
        };
        assert_eq!(catalogue.families(), [known]);
        assert!(catalogue.gather().is_empty());
        assert!(
            catalogue.register(Box::new(family)).is_err(),
            "it is there already"
        );
        assert_eq!(catalogue.families().len(), 1, "what was refused is not listed");
    }
}
