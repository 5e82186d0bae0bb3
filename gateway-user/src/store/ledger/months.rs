//! Months that are closed.

use super::{LedgerError, LedgerStore, SECOND_US};
use crate::ledger::{Micros, Month, NanoUsd};
use clickhouse::Row;
use serde::{Deserialize, Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};

/// A row of `ledger_months`, name for name, but for the time at which it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClosedMonth {
    /// The month.
    #[serde(serialize_with = "first_day")]
    pub month: Month,
    /// What all windows of all upstreams cost.
    #[serde(rename = "bill_nano_usd", serialize_with = "nano_usd")]
    pub bill: NanoUsd,
    /// How many windows.
    pub windows: u64,
    /// Who closed it.
    pub closed_by: Box<str>,
}

/// What is booked of an upstream in a month.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MonthOfUpstream {
    /// Windows that are booked.
    pub windows: u64,
    /// Those that are not settled.
    pub provisional: u64,
    /// What they cost, by their heads.
    pub bill: NanoUsd,
    /// What the rows in `cost_ledger` sum to.
    pub rows: NanoUsd,
}

impl LedgerStore {
    /// The months that are closed.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn closed_months(&self) -> Result<BTreeSet<Month>, LedgerError> {
        let statement =
            "SELECT DISTINCT toUInt64(toUnixTimestamp(toDateTime(month, 'UTC'))) AS start FROM ledger_months";
        let rows = self.rows::<MonthRow>(self.client.query(statement)).await?;
        Ok(rows
            .into_iter()
            .map(|row| Month::of(Micros(row.start * SECOND_US)))
            .collect())
    }

    /// What is booked in a month, by upstream.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn month(&self, month: Month) -> Result<BTreeMap<String, MonthOfUpstream>, LedgerError> {
        let span = month.span();
        let within = "window_start >= toDateTime({from:UInt32}, 'UTC') AND window_start < toDateTime({to:UInt32}, 'UTC')";
        let heads = format!(
            "SELECT toString(upstream) AS name, count() AS windows, countIf(state = 'provisional') AS provisional, sum(bill_nano_usd) AS cost \
             FROM ledger_windows FINAL WHERE {within} GROUP BY name"
        );
        let rows = format!(
            "SELECT toString(upstream) AS name, toUInt64(0) AS windows, toUInt64(0) AS provisional, sum(cost_nano_usd) AS cost \
             FROM cost_ledger FINAL WHERE {within} GROUP BY name"
        );
        let (heads, rows) = tokio::try_join!(
            self.rows::<SumRow>(self.about(&heads, "", span)),
            self.rows::<SumRow>(self.about(&rows, "", span)),
        )?;
        let mut found: BTreeMap<String, MonthOfUpstream> = BTreeMap::new();
        for row in heads {
            let of = found.entry(row.name).or_default();
            (of.windows, of.provisional) = (row.windows, row.provisional);
            of.bill = NanoUsd(row.cost.max(0) as u64);
        }
        for row in rows {
            found.entry(row.name).or_default().rows = NanoUsd(row.cost.max(0) as u64);
        }
        Ok(found)
    }

    /// Closes a month.
    ///
    /// # Errors
    /// [`LedgerError::Write`].
    pub async fn close(&self, month: &ClosedMonth) -> Result<(), LedgerError> {
        self.insert("ledger_months", std::iter::once(month)).await
    }
}

fn first_day<S: Serializer>(month: &Month, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{month}-01"))
}

fn nano_usd<S: Serializer>(amount: &NanoUsd, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_i64(amount.as_i64())
}

#[derive(Row, Deserialize)]
struct MonthRow {
    start: u64,
}

#[derive(Row, Deserialize)]
struct SumRow {
    name: String,
    windows: u64,
    provisional: u64,
    cost: i64,
}
