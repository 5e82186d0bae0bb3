//! What the last hour of an upstream cost.

use super::{IN_SPAN, LedgerError, LedgerStore, SECOND_US};
use crate::ledger::hour::{self, HourCost, Line};
use crate::ledger::{Micros, NanoUsd};
use clickhouse::Row;
use serde::Deserialize;
use std::collections::BTreeMap;

impl LedgerStore {
    /// The last hour of booked windows of an upstream whose account opened then; `None` while it is not known.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn last_hour(
        &self,
        upstream: &str,
        opened: Micros,
        now: Micros,
    ) -> Result<Option<HourCost>, LedgerError> {
        let heads = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, bill_nano_usd AS bill FROM ledger_windows FINAL WHERE {IN_SPAN}"
        );
        let heads = self
            .rows::<BillRow>(self.about(&heads, upstream, hour::looked_at(now)))
            .await?;
        let heads: BTreeMap<Micros, NanoUsd> = heads
            .into_iter()
            .map(|row| (Micros(row.start * SECOND_US), nano_usd(row.bill)))
            .collect();
        let Some(span) = hour::last(&heads, opened) else {
            return Ok(None);
        };
        // After the heads, since a window's head is written last.
        let costs = format!(
            "SELECT toString(team_id) AS team, toString(model) AS of_model, sum(cost_nano_usd) AS cost FROM cost_ledger FINAL \
             WHERE {IN_SPAN} GROUP BY team, of_model"
        );
        let costs = self.rows::<CostRow>(self.about(&costs, upstream, span)).await?;
        let bill = heads
            .range(span.from()..span.to())
            .fold(NanoUsd(0), |sum, (_, bill)| NanoUsd(sum.0 + bill.0));
        let rows = costs
            .into_iter()
            .map(|row| (Line::of(&row.team, &row.of_model), nano_usd(row.cost)));
        Ok(HourCost::of(span, bill, rows))
    }
}

fn nano_usd(amount: i64) -> NanoUsd {
    NanoUsd(amount.max(0) as u64)
}

#[derive(Row, Deserialize)]
struct BillRow {
    start: u64,
    bill: i64,
}

#[derive(Row, Deserialize)]
struct CostRow {
    team: String,
    of_model: String,
    cost: i64,
}
