//! What the store shows: rows that wait, rows that are stored, and rows that are lost, by cause.
//!
//! The store counts by itself, without knowing metrics; its numbers are read at each scrape.

use crate::store::service::StoreCounts;
use crate::store::{DropCause, SpoolStats, WaitCause};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, Opts, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The families of the store.
pub(super) struct StoreFamilies {
    counts: StoreCounts,
    spool_bytes: IntGauge,
    spool_files: IntGauge,
    spool_rows: IntGauge,
    spool_oldest_age: Gauge,
    journal_open: IntGauge,
    spooled: IntCounter,
    dropped: IntCounterVec,
    quarantined: IntCounter,
    torn: IntCounter,
    foreign: IntCounter,
    crashed: IntCounter,
    spare_misses: IntCounter,
    disk_failures: IntCounter,
    stored_rows: IntCounter,
    stored_batches: IntCounter,
    retries: IntCounterVec,
    found: IntCounter,
    repaired: IntCounter,
    samples_waiting: IntGauge,
    samples_dropped: IntCounter,
    timings_dropped: IntCounter,
}

impl StoreFamilies {
    #[rustfmt::skip] // A table: one family a line reads better than five lines each.
    pub(super) fn of(counts: StoreCounts) -> Result<StoreFamilies> {
        Ok(StoreFamilies {
            counts,
            spool_bytes: IntGauge::new("gateway_spool_bytes", "Bytes of rows that wait to be stored.")?,
            spool_files: IntGauge::new("gateway_spool_files", "Files of rows that wait to be stored.")?,
            spool_rows: IntGauge::new("gateway_spool_rows", "Rows in those files.")?,
            spool_oldest_age: Gauge::new("gateway_spool_oldest_age_seconds", "Age of the oldest file of rows that waits; 0 when none does.")?,
            journal_open: IntGauge::new("gateway_journal_open", "Requests in flight, as the journal has them.")?,
            spooled: IntCounter::new("gateway_spool_rows_total", "Rows that were taken into the spool.")?,
            dropped: IntCounterVec::new(Opts::new("gateway_spool_dropped_rows_total", "Rows that were lost, by cause."), &["cause"])?,
            quarantined: IntCounter::new("gateway_spool_quarantined_rows_total", "Rows put aside because ClickHouse refuses them.")?,
            torn: IntCounter::new("gateway_spool_torn_total", "Torn pieces of rows put aside at the start.")?,
            foreign: IntCounter::new("gateway_spool_foreign_files_total", "Files found in the spool at the start that are not the gateway's, and are left alone.")?,
            crashed: IntCounter::new("gateway_crashed_requests_total", "Requests that an earlier run left in flight when it was killed.")?,
            spare_misses: IntCounter::new("gateway_spool_spare_misses_total", "Times that a request had to make its own segment.")?,
            disk_failures: IntCounter::new("gateway_spool_disk_failures_total", "Times that the disk would not take what it should.")?,
            stored_rows: IntCounter::new("gateway_store_rows_total", "Rows that ClickHouse has taken.")?,
            stored_batches: IntCounter::new("gateway_store_batches_total", "Batches that ClickHouse has taken.")?,
            retries: IntCounterVec::new(Opts::new("gateway_store_retries_total", "Tries that failed and are made again, by cause."), &["cause"])?,
            found: IntCounter::new("gateway_store_found_batches_total", "Batches that were found to be stored after a lost answer.")?,
            repaired: IntCounter::new("gateway_store_repaired_batches_total", "Batches of which a part was found to be stored.")?,
            samples_waiting: IntGauge::new("gateway_samples_waiting", "Samples of vLLM's own metrics that wait to be stored.")?,
            samples_dropped: IntCounter::new("gateway_samples_dropped_total", "Samples of vLLM's own metrics that were given up.")?,
            timings_dropped: IntCounter::new("gateway_tap_timings_dropped_total", "Kernel times of other gateways' requests that were given up.")?,
        })
    }

    fn all(&self) -> [&dyn Collector; 21] {
        [
            &self.spool_bytes,
            &self.spool_files,
            &self.spool_rows,
            &self.spool_oldest_age,
            &self.journal_open,
            &self.spooled,
            &self.dropped,
            &self.quarantined,
            &self.torn,
            &self.foreign,
            &self.crashed,
            &self.spare_misses,
            &self.disk_failures,
            &self.stored_rows,
            &self.stored_batches,
            &self.retries,
            &self.found,
            &self.repaired,
            &self.samples_waiting,
            &self.samples_dropped,
            &self.timings_dropped,
        ]
    }

    fn read(&self) {
        self.read_spool(&self.counts.spool.stats());
        let sent = &self.counts.sender;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        raise(&self.stored_rows, read(&sent.rows));
        raise(&self.stored_batches, read(&sent.batches));
        for cause in WaitCause::ALL {
            raise(
                &self.retries.with_label_values(&[cause.name()]),
                sent.waits_for(cause),
            );
        }
        raise(&self.found, read(&sent.found));
        raise(&self.repaired, read(&sent.repaired));
        self.samples_waiting.set(whole(self.counts.samples.len() as u64));
        raise(&self.samples_dropped, self.counts.samples.dropped());
        raise(&self.timings_dropped, self.counts.timings.dropped());
    }

    fn read_spool(&self, stats: &SpoolStats) {
        self.spool_bytes.set(whole(stats.bytes));
        self.spool_files.set(whole(stats.files));
        self.spool_rows.set(whole(stats.rows));
        let now_us = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros() as f64;
        let age_us = stats
            .oldest_sealed_at_us
            .map_or(0.0, |sealed_us| now_us - sealed_us as f64);
        self.spool_oldest_age.set(age_us.max(0.0) / 1e6);
        self.journal_open.set(whole(stats.open));
        raise(&self.spooled, stats.appended);
        for (cause, rows) in DropCause::ALL.iter().zip(stats.dropped) {
            raise(&self.dropped.with_label_values(&[cause.name()]), rows);
        }
        raise(&self.quarantined, stats.quarantined);
        raise(&self.torn, stats.torn);
        raise(&self.foreign, stats.foreign);
        raise(&self.crashed, stats.crashed);
        raise(&self.spare_misses, stats.spare_misses);
        raise(&self.disk_failures, stats.failures);
    }
}

impl Collector for StoreFamilies {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}

/// Brings a counter up to a number that only grows.
fn raise(counter: &IntCounter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
