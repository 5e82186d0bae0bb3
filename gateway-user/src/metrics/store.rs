//! What the store shows: rows that wait, rows that are stored, and rows that are lost, by cause.
//!
//! The store counts by itself, without knowing metrics; its numbers are read at each scrape.

use crate::store::sender::SenderStats;
use crate::store::service::StoreCounts;
use crate::store::{DropCause, SpoolStats, Table, WaitCause};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Labels of what is counted by table.
const TABLE: &[&str] = &["table"];

/// The families of the store.
pub(super) struct StoreFamilies {
    counts: StoreCounts,
    spool_bytes: IntGaugeVec,
    spool_files: IntGaugeVec,
    spool_rows: IntGaugeVec,
    spool_oldest_age: GaugeVec,
    journal_open: IntGauge,
    spooled: IntCounterVec,
    dropped: IntCounterVec,
    quarantined: IntCounterVec,
    torn: IntCounterVec,
    foreign: IntCounterVec,
    crashed: IntCounter,
    spare_misses: IntCounterVec,
    disk_failures: IntCounterVec,
    stored_rows: IntCounterVec,
    stored_batches: IntCounterVec,
    retries: IntCounterVec,
    found: IntCounterVec,
    repaired: IntCounterVec,
    samples_waiting: IntGauge,
    samples_dropped: IntCounter,
    timings_dropped: IntCounter,
}

impl StoreFamilies {
    #[rustfmt::skip] // A table: one family a line reads better than five lines each.
    pub(super) fn of(counts: StoreCounts) -> Result<StoreFamilies> {
        Ok(StoreFamilies {
            counts,
            spool_bytes: IntGaugeVec::new(Opts::new("gateway_spool_bytes", "Bytes of rows on disk that wait to be stored."), TABLE)?,
            spool_files: IntGaugeVec::new(Opts::new("gateway_spool_files", "Files of rows that wait to be stored."), TABLE)?,
            spool_rows: IntGaugeVec::new(Opts::new("gateway_spool_rows", "Rows in the files that wait to be stored."), TABLE)?,
            spool_oldest_age: GaugeVec::new(Opts::new("gateway_spool_oldest_age_seconds", "Age of the oldest file of rows that waits; 0 when none does."), TABLE)?,
            journal_open: IntGauge::new("gateway_journal_open", "Requests in flight, as the journal has them.")?,
            spooled: IntCounterVec::new(Opts::new("gateway_spool_rows_total", "Rows that were taken into the spool."), TABLE)?,
            dropped: IntCounterVec::new(Opts::new("gateway_spool_dropped_rows_total", "Rows that were lost, by cause."), &["table", "cause"])?,
            quarantined: IntCounterVec::new(Opts::new("gateway_spool_quarantined_rows_total", "Rows put aside because ClickHouse refuses them."), TABLE)?,
            torn: IntCounterVec::new(Opts::new("gateway_spool_torn_total", "Torn pieces of rows that were found at the start, after a power loss, and put aside."), TABLE)?,
            foreign: IntCounterVec::new(Opts::new("gateway_spool_foreign_files_total", "Files found in the spool at the start that are not the gateway's, and are left alone."), TABLE)?,
            crashed: IntCounter::new("gateway_crashed_requests_total", "Requests that an earlier run left in flight when it was killed; each has an event with the outcome gateway_crash.")?,
            spare_misses: IntCounterVec::new(Opts::new("gateway_spool_spare_misses_total", "Times that no file was ready and a request had to make its own."), TABLE)?,
            disk_failures: IntCounterVec::new(Opts::new("gateway_spool_disk_failures_total", "Times that the disk would not take what it should."), TABLE)?,
            stored_rows: IntCounterVec::new(Opts::new("gateway_store_rows_total", "Rows that ClickHouse has taken."), TABLE)?,
            stored_batches: IntCounterVec::new(Opts::new("gateway_store_batches_total", "Batches that ClickHouse has taken."), TABLE)?,
            retries: IntCounterVec::new(Opts::new("gateway_store_retries_total", "Tries to store a batch that failed and are made again, by cause."), &["table", "cause"])?,
            found: IntCounterVec::new(Opts::new("gateway_store_found_batches_total", "Batches that were found to be stored after a lost answer."), TABLE)?,
            repaired: IntCounterVec::new(Opts::new("gateway_store_repaired_batches_total", "Batches of which a part was found to be stored after a lost answer; the rest was sent."), TABLE)?,
            samples_waiting: IntGauge::new("gateway_samples_waiting", "Samples of vLLM's own metrics that wait to be stored.")?,
            samples_dropped: IntCounter::new("gateway_samples_dropped_total", "Samples of vLLM's own metrics that were given up because too many waited.")?,
            timings_dropped: IntCounter::new("gateway_tap_timings_dropped_total", "Kernel times of other gateways' requests that were given up because too many waited.")?,
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
        for table in Table::ALL {
            let counts = match table {
                Table::Events => &self.counts.events,
                Table::Segments => &self.counts.segments,
            };
            self.read_spool(table, &counts.spool.stats());
            self.read_sender(table, &counts.sender);
        }
        let stats = self.counts.events.spool.stats();
        self.journal_open.set(whole(stats.open));
        raise(&self.crashed, stats.crashed);
        self.samples_waiting.set(whole(self.counts.samples.len() as u64));
        raise(&self.samples_dropped, self.counts.samples.dropped());
        raise(&self.timings_dropped, self.counts.timings.dropped());
    }

    fn read_sender(&self, table: Table, sent: &SenderStats) {
        let raise_to = |counter: &IntCounterVec, count: &AtomicU64| {
            raise(
                &counter.with_label_values(&[table.name()]),
                count.load(Ordering::Relaxed),
            );
        };
        raise_to(&self.stored_rows, &sent.rows);
        raise_to(&self.stored_batches, &sent.batches);
        raise_to(&self.found, &sent.found);
        raise_to(&self.repaired, &sent.repaired);
        for cause in WaitCause::ALL {
            let retries = self.retries.with_label_values(&[table.name(), cause.name()]);
            raise(&retries, sent.waits_for(cause));
        }
    }

    fn read_spool(&self, table: Table, stats: &SpoolStats) {
        let set = |gauge: &IntGaugeVec, to| gauge.with_label_values(&[table.name()]).set(whole(to));
        set(&self.spool_bytes, stats.bytes);
        set(&self.spool_files, stats.files);
        set(&self.spool_rows, stats.rows);
        let now_us = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros() as f64;
        let age_us = stats
            .oldest_sealed_at_us
            .map_or(0.0, |sealed_us| now_us - sealed_us as f64);
        let oldest_age = self.spool_oldest_age.with_label_values(&[table.name()]);
        oldest_age.set(age_us.max(0.0) / 1e6);
        for (cause, rows) in DropCause::ALL.iter().zip(stats.dropped) {
            raise(
                &self.dropped.with_label_values(&[table.name(), cause.name()]),
                rows,
            );
        }
        for (counter, count) in [
            (&self.spooled, stats.appended),
            (&self.quarantined, stats.quarantined),
            (&self.torn, stats.torn),
            (&self.foreign, stats.foreign),
            (&self.spare_misses, stats.spare_misses),
            (&self.disk_failures, stats.failures),
        ] {
            raise(&counter.with_label_values(&[table.name()]), count);
        }
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
pub(super) fn raise(counter: &IntCounter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
