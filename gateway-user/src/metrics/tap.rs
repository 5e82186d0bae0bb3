//! What the tap shows: what the probe saw and lost, what was made of it, and whose it was.
//!
//! The tap counts by itself; its numbers are read at each scrape.

use crate::correlate::CorrelationCounts;
use crate::tap::agent::{Agent, AgentCounts};
use crate::tap::stats::{GiveUp, ProbeTotals, Retired, Totals};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGauge, Opts, Result};
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};

/// Values of one family, by that of its label; a family without a label has one value, under any name.
type Values = Vec<(&'static str, u64)>;

/// A family of counts that the tap keeps.
struct Count {
    name: &'static str,
    help: &'static str,
    label: &'static [&'static str],
    read: fn(&AgentCounts) -> Values,
}

#[rustfmt::skip] // A table: one family a line reads better than six lines each.
const COUNTS: [Count; 15] = [
    Count { name: "gateway_tap_packets_total", help: "Packets of the tapped ports that the probe saw, but for pure acknowledgements.", label: &["direction"], read: |counts| both(counts, |totals| totals.packets) },
    Count { name: "gateway_tap_payload_bytes_total", help: "Payload of the packets that the probe saw.", label: &["direction"], read: |counts| both(counts, |totals| totals.payload_bytes) },
    Count { name: "gateway_tap_records_total", help: "Records that the probe put into the ring.", label: &["direction"], read: |counts| both(counts, |totals| totals.submitted) },
    Count { name: "gateway_tap_lost_records_total", help: "Records that the probe lost, by cause.", label: &["cause"], read: |counts| lost(&counts.probe) },
    Count { name: "gateway_tap_malformed_packets_total", help: "TCP packets that the probe could not understand.", label: &[], read: |counts| one(counts.probe.ingress.malformed + counts.probe.egress.malformed) },
    Count { name: "gateway_tap_opened_connections_total", help: "Connections seen, from their beginning or in their middle.", label: &["seen_from"], read: |counts| vec![("beginning", counts.followed.opened), ("middle", counts.followed.joined)] },
    Count { name: "gateway_tap_retired_connections_total", help: "Connections that are no longer followed, by cause.", label: &["cause"], read: |counts| Retired::ALL.map(|cause| (cause.name(), counts.followed.retired(cause))).into() },
    Count { name: "gateway_tap_unreadable_connections_total", help: "Connections that speak TLS or HTTP/2, which a probe cannot read.", label: &[], read: |counts| one(counts.followed.unreadable) },
    Count { name: "gateway_tap_opaque_bytes_total", help: "Bytes of watched connections that belong to no HTTP exchange.", label: &[], read: |counts| one(counts.followed.opaque_bytes) },
    Count { name: "gateway_tap_gaps_total", help: "Gaps in streams that were given up, by why they were waited for no longer.", label: &["cause"], read: |counts| GiveUp::ALL.map(|cause| (cause.name(), counts.followed.streams.gaps(cause))).into() },
    Count { name: "gateway_tap_gap_bytes_total", help: "Bytes that were missing in streams where they were given up.", label: &[], read: |counts| one(counts.followed.streams.gap_bytes) },
    Count { name: "gateway_tap_duplicate_bytes_total", help: "Bytes of a stream that were seen again (retransmits).", label: &[], read: |counts| one(counts.followed.streams.duplicate_bytes) },
    Count { name: "gateway_tap_incomplete_exchanges_total", help: "Exchanges of which not enough was seen to book them whole.", label: &[], read: |counts| one(counts.followed.incomplete) },
    Count { name: "gateway_tap_exchanges_total", help: "Exchanges that ended, by whose they were: own (joined to the proxy's event), late (own, but not joined), foreign (another gateway's), direct (past every gateway), operational (health checks and scrapes).", label: &["whose"], read: |counts| whose(&counts.correlated) },
    Count { name: "gateway_tap_forged_ids_total", help: "Direct requests that carried a forged or used gateway id.", label: &[], read: |counts| one(read(&counts.correlated.forged)) },
];

fn one(value: u64) -> Values {
    vec![("", value)]
}

fn both(counts: &AgentCounts, field: fn(&Totals) -> u64) -> Values {
    vec![
        ("ingress", field(&counts.probe.ingress)),
        ("egress", field(&counts.probe.egress)),
    ]
}

fn lost(probe: &ProbeTotals) -> Values {
    let both = |field: fn(&Totals) -> u64| field(&probe.ingress) + field(&probe.egress);
    vec![
        ("ring_full", both(|totals| totals.lost_ring_full)),
        ("load_failed", both(|totals| totals.lost_load_failed)),
        ("too_long", both(|totals| totals.lost_too_long)),
        ("unreadable", probe.unreadable),
    ]
}

fn whose(correlated: &CorrelationCounts) -> Values {
    vec![
        ("own", read(&correlated.joined)),
        ("late", read(&correlated.unjoined)),
        ("foreign", read(&correlated.foreign)),
        ("direct", read(&correlated.direct)),
        ("operational", read(&correlated.operational)),
    ]
}

fn read(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

/// The families of the tap.
pub(super) struct TapFamilies {
    /// Weak: the tap has sinks, and this registry is one of them.
    tap: Weak<Agent>,
    counters: Vec<IntCounterVec>,
    connections: IntGauge,
    held: IntGauge,
    in_place: IntGauge,
}

impl TapFamilies {
    pub(super) fn of(tap: Weak<Agent>) -> Result<TapFamilies> {
        let counter = |count: &Count| IntCounterVec::new(Opts::new(count.name, count.help), count.label);
        Ok(TapFamilies {
            tap,
            counters: COUNTS.iter().map(counter).collect::<Result<_>>()?,
            connections: IntGauge::new("gateway_tap_connections", "Connections that the tap follows.")?,
            held: IntGauge::new(
                "gateway_tap_held_bytes",
                "Bytes that came ahead of others in their stream and wait for them.",
            )?,
            in_place: IntGauge::new(
                "gateway_tap_in_place",
                "1 while the probe is attached where the servers' sockets are.",
            )?,
        })
    }

    fn all(&self) -> impl Iterator<Item = &dyn Collector> {
        let gauges = [&self.connections as &dyn Collector, &self.held, &self.in_place];
        self.counters
            .iter()
            .map(|counter| counter as &dyn Collector)
            .chain(gauges)
    }

    fn read(&self) {
        // A tap that has gone has said its last.
        let Some(tap) = self.tap.upgrade() else { return };
        let counts = tap.counts();
        for (count, counter) in COUNTS.iter().zip(&self.counters) {
            for (label, value) in (count.read)(&counts) {
                let labels = [label];
                let series = counter.with_label_values(&labels[..count.label.len()]);
                series.inc_by(value.saturating_sub(series.get()));
            }
        }
        let level = |level: usize| i64::try_from(level).unwrap_or(i64::MAX);
        self.connections.set(level(counts.followed.live));
        self.held.set(level(counts.followed.streams.held_bytes));
        self.in_place.set(counts.probe.is_in_place.into());
    }
}

impl Collector for TapFamilies {
    fn desc(&self) -> Vec<&Desc> {
        self.all().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.all().flat_map(Collector::collect).collect()
    }
}
