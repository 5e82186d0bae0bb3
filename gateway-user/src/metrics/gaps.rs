//! The histogram of inter-token latency.
//!
//! A stream has thousands of gaps, and they come as the bucket counts of a whole request ([`Gaps`]). The crate's own histogram
//! takes one observation at a time, so this one adds whole buckets. Each series is read under the lock it is written under: its
//! buckets, sum and count always belong together.

use crate::wire::exchange::{GAP_BOUNDS_US, Gaps};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

const NAME: &str = "gateway_inter_token_latency_seconds";
const HELP: &str = "Gap between two chunks of a stream that carry generated content.";

/// Both label values of a series, team first.
type Labels = (Box<str>, Box<str>);

/// The family; clones share their series.
#[derive(Clone)]
pub(super) struct GapHistograms {
    desc: Desc,
    series: Arc<Mutex<HashMap<Labels, Arc<GapHistogram>>>>,
}

/// One series.
#[derive(Default)]
pub(super) struct GapHistogram {
    totals: Mutex<Totals>,
}

#[derive(Clone, Copy, Default)]
struct Totals {
    /// Not cumulative, as they come.
    buckets: [u64; GAP_BOUNDS_US.len() + 1],
    sum_us: u64,
}

impl GapHistograms {
    pub(super) fn new() -> prometheus::Result<GapHistograms> {
        let labels = vec!["team".to_owned(), "model".to_owned()];
        let desc = Desc::new(NAME.to_owned(), HELP.to_owned(), labels, HashMap::new())?;
        Ok(GapHistograms {
            desc,
            series: Arc::default(),
        })
    }

    pub(super) fn series(&self, team: &str, model: &str) -> Arc<GapHistogram> {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.entry((team.into(), model.into())).or_default().clone()
    }
}

impl GapHistogram {
    pub(super) fn add(&self, gaps: &Gaps) {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        for (total, more) in totals.buckets.iter_mut().zip(gaps.buckets) {
            *total += u64::from(more);
        }
        totals.sum_us = totals.sum_us.saturating_add(gaps.sum_us);
    }

    fn read(&self) -> Histogram {
        let totals = *self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = 0;
        let mut buckets = Vec::with_capacity(GAP_BOUNDS_US.len());
        for (bound_us, count) in GAP_BOUNDS_US.iter().zip(totals.buckets) {
            seen += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound_us as f64 / 1e6);
            bucket.set_cumulative_count(seen);
            buckets.push(bucket);
        }
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets);
        histogram.set_sample_count(totals.buckets.iter().sum());
        histogram.set_sample_sum(totals.sum_us as f64 / 1e6);
        histogram
    }
}

impl Collector for GapHistograms {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let label = |name: &str, value: &str| {
            let mut pair = LabelPair::default();
            pair.set_name(name.to_owned());
            pair.set_value(value.to_owned());
            pair
        };
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = series.iter().map(|((team, model), one)| {
            let mut metric = Metric::from_label(vec![label("model", model), label("team", team)]);
            metric.set_histogram(one.read());
            metric
        });
        let mut family = MetricFamily::default();
        family.set_metric(metrics.collect());
        family.set_name(NAME.to_owned());
        family.set_help(HELP.to_owned());
        family.set_field_type(MetricType::HISTOGRAM);
        vec![family]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_buckets_add_up_and_come_out_cumulative() {
        let family = GapHistograms::new().unwrap();
        let mut gaps = Gaps {
            count: 6,
            sum_us: 9_010_000,
            max_us: 3_000_000,
            ..Gaps::default()
        };
        gaps.buckets[0] = 2;
        gaps.buckets[3] = 1;
        gaps.buckets[GAP_BOUNDS_US.len()] = 3;
        family.series("t", "m").add(&gaps);
        family.series("t", "m").add(&gaps);

        let collected = family.collect();
        let histogram = collected[0].get_metric()[0].get_histogram();
        assert_eq!(
            collected[0].get_metric().len(),
            1,
            "one pair of labels, one series"
        );
        assert_eq!(histogram.get_sample_count(), 12);
        assert_eq!(histogram.get_sample_sum(), 18.02);
        let cumulative: Vec<u64> = histogram
            .get_bucket()
            .iter()
            .map(Bucket::cumulative_count)
            .collect();
        assert_eq!(cumulative[..5], [4, 4, 4, 6, 6]);
        assert_eq!(
            cumulative[15], 6,
            "what is above the last bound is only in the count"
        );
        assert_eq!(histogram.get_bucket()[0].upper_bound(), 0.001);
    }
}
