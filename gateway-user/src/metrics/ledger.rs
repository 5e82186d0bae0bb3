//! What the bookkeeper shows: windows written, how far the books are, what the last hour cost, and what went wrong.

use super::store::raise;
use crate::bookkeeper::LedgerStats;
use crate::clock;
use crate::ledger::{Line, Micros, State};
use crate::store::WaitCause;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, IntCounter, IntCounterVec, Opts, Result};
use std::sync::Arc;

/// The families of the ledger.
pub(super) struct LedgerFamilies {
    stats: Arc<LedgerStats>,
    windows: IntCounterVec,
    cycle: Gauge,
    lag: GaugeVec,
    failures: IntCounterVec,
    late: IntCounter,
    cost: GaugeVec,
}

impl LedgerFamilies {
    #[rustfmt::skip] // A table: one family a line reads better than five lines each.
    pub(super) fn of(stats: Arc<LedgerStats>) -> Result<LedgerFamilies> {
        Ok(LedgerFamilies {
            stats,
            windows: IntCounterVec::new(Opts::new("gateway_ledger_windows_total", "Windows whose statement this gateway wrote, by the state that it gave them: provisional, settled or restated."), &["state"])?,
            cycle: Gauge::new("gateway_ledger_cycle_seconds", "How long the ledger's last cycle took.")?,
            lag: GaugeVec::new(Opts::new("gateway_ledger_lag_seconds", "Time since the end of the newest window that is booked."), &["upstream"])?,
            failures: IntCounterVec::new(Opts::new("gateway_ledger_failures_total", "Cycles of the ledger that failed and are made again, by cause."), &["cause"])?,
            late: IntCounter::new("gateway_ledger_late_segments_total", "Segments that came for a month that was closed, and are in no bill.")?,
            cost: GaugeVec::new(Opts::new("gateway_ledger_cost_usd", "What the last hour of booked windows cost, or all of them while the upstream is younger, by what it was for; idle time whoever pays for it. The same in each gateway."), &["upstream", "line"])?,
        })
    }

    fn all(&self) -> [&dyn Collector; 6] {
        [
            &self.windows,
            &self.cycle,
            &self.lag,
            &self.failures,
            &self.late,
            &self.cost,
        ]
    }

    fn read(&self) {
        for state in State::ALL {
            let windows = self.windows.with_label_values(&[state.name()]);
            raise(&windows, self.stats.written(state));
        }
        for cause in WaitCause::ALL {
            let failures = self.failures.with_label_values(&[cause.name()]);
            raise(&failures, self.stats.failures(cause));
        }
        raise(&self.late, self.stats.late_segments());
        self.cycle.set(self.stats.cycle_us() as f64 / 1e6);
        let now_us = clock::wall_now_us();
        for (upstream, until) in self.stats.booked_until() {
            let lag_us = now_us.saturating_sub_unsigned(until.0).max(0);
            self.lag.with_label_values(&[upstream]).set(lag_us as f64 / 1e6);
        }
        let now = Micros(u64::try_from(now_us).unwrap_or(0));
        for (upstream, hour) in self.stats.last_hours(now) {
            for line in Line::ALL {
                let labels = [upstream, line.name()];
                match hour {
                    Some(hour) => self
                        .cost
                        .with_label_values(&labels)
                        .set(hour.cost(line).0 as f64 / 1e9),
                    // That there was none to remove is as it should be.
                    None => drop(self.cost.remove_label_values(&labels)),
                }
            }
        }
    }
}

impl Collector for LedgerFamilies {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}
