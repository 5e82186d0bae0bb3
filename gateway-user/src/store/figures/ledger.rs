//! What the ledger says of a period: whose rows, what the lines of nobody have, and the heads of the windows that all of it must sum to.
//!
//! Everything is read with `FINAL`. A window is written in two tables, which no query sees at one moment: where rows and heads differ, all is read
//! again before that is believed.

mod books;
mod statements;

pub use books::{
    ChargeRow, ClosedMonth, Cost, CostGroup, CostLine, Engine, LINES, LedgerFigures, RulesUse, UnevenWindow,
    UpstreamBooks, WITHOUT_REQUEST,
};

use super::error::ReadError;
use super::reader::{FIGURES_MAX, FiguresReader};
use super::{Dimension, Period};
use crate::ledger::facts::IDLE;
use clickhouse::query::Query;
use clickhouse::{Row, RowOwned, RowRead};
use serde::Deserialize;
use statements::{
    CHARGES, DAYS, HEADS, OPENED, RULES, RUNS, UNEVEN, costs_statement, request_costs_statement,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// How often rows and heads that differ are read: a gateway may be writing a window just then.
const READS_MAX: u32 = 3;

/// How long it may take to write one.
const BETWEEN_READS: Duration = Duration::from_secs(1);

/// So many windows that do not add up are named; the rest are counted.
const UNEVEN_NAMED_MAX: usize = 5;

/// Seconds of a window.
const WINDOW_S: i64 = 15;

impl FiguresReader {
    /// The ledger of `period`, its costs grouped by `by`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read_ledger(&self, period: Period, by: &[Dimension]) -> Result<LedgerFigures, ReadError> {
        self.until_even(async || {
            let mut ledger = self.heads(period).await?;
            self.costs(period, by, &mut ledger).await?;
            Ok(ledger)
        })
        .await
    }

    /// The ledger of `period` in its finest rows.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read_charges(&self, period: Period) -> Result<LedgerFigures, ReadError> {
        self.check_schema().await?;
        self.until_even(async || {
            let mut ledger = self.heads(period).await?;
            ledger.charges = self.charges(period).await?;
            Ok(ledger)
        })
        .await
    }

    /// Whether and how the month that begins with `period` was closed.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read_closing(&self, period: Period) -> Result<Option<ClosedMonth>, ReadError> {
        let query = self.client.query(
            "SELECT bill_nano_usd, windows, toString(closed_by) AS closed_by, toUnixTimestamp64Milli(closed_at) AS closed_at_ms
            FROM ledger_months FINAL WHERE month = toDate(toDateTime({from_s:UInt32}, 'UTC'))",
        );
        let rows: Vec<ClosedRow> = self.booked(over(query, period)).await?;
        Ok(rows.into_iter().next().map(|row| ClosedMonth {
            bill_nano_usd: row.bill_nano_usd,
            windows: row.windows,
            closed_by: row.closed_by,
            closed_at_us: row.closed_at_ms.saturating_mul(1000),
        }))
    }

    async fn until_even(
        &self,
        mut read: impl AsyncFnMut() -> Result<LedgerFigures, ReadError>,
    ) -> Result<LedgerFigures, ReadError> {
        let mut reads = 1;
        loop {
            let ledger = read().await?;
            if ledger.is_even() || reads == READS_MAX {
                return Ok(ledger);
            }
            reads += 1;
            tokio::time::sleep(BETWEEN_READS).await;
        }
    }

    async fn booked<R: RowOwned + RowRead>(&self, query: Query) -> Result<Vec<R>, ReadError> {
        self.answer(FIGURES_MAX, query.fetch_all()).await
    }

    /// Everything but costs.
    async fn heads(&self, period: Period) -> Result<LedgerFigures, ReadError> {
        let of = |sql: &str| over(self.client.query(sql), period);
        let opened: Vec<OpenedRow> = self.booked(of(OPENED)).await?;
        let heads: Vec<HeadRow> = self.booked(of(HEADS)).await?;
        let runs: Vec<RunRow> = self.booked(of(RUNS)).await?;
        let rules: Vec<RulesRow> = self.booked(of(RULES)).await?;
        let uneven: Vec<UnevenRow> = self.booked(of(UNEVEN)).await?;
        let mut books: BTreeMap<String, UpstreamBooks> = BTreeMap::new();
        for row in opened {
            let entry = books.entry(row.upstream.clone()).or_default();
            (entry.upstream, entry.opened_s) = (row.upstream, row.opened_s.into());
        }
        for row in heads {
            row.enter(books.entry(row.upstream.clone()).or_default());
        }
        for row in runs {
            let entry = books.entry(row.upstream).or_default();
            entry
                .runs
                .push((row.from_s.into(), i64::from(row.last_s) + WINDOW_S));
        }
        for row in rules {
            let entry = books.entry(row.upstream).or_default();
            entry.rules.push(RulesUse {
                rules: row.rules,
                windows: row.windows,
            });
        }
        Ok(LedgerFigures {
            upstreams: books.into_values().collect(),
            uneven_windows: uneven.len() as u64,
            uneven: uneven
                .into_iter()
                .take(UNEVEN_NAMED_MAX)
                .map(UnevenRow::window)
                .collect(),
            ..LedgerFigures::default()
        })
    }

    async fn costs(
        &self,
        period: Period,
        by: &[Dimension],
        ledger: &mut LedgerFigures,
    ) -> Result<(), ReadError> {
        let is_booked = by.iter().all(|dimension| dimension.is_in_the_ledger());
        let keys = if is_booked { by } else { &[] };
        let query = self
            .client
            .query(&costs_statement(keys))
            .param("lines", LINES.as_slice())
            .param("idle", IDLE);
        let rows: Vec<CostRow> = self.booked(over(query, period)).await?;
        let mut of_teams = 0;
        let mut lines: BTreeMap<String, i64> = BTreeMap::new();
        for row in rows {
            if !row.line.is_empty() {
                lines.insert(row.line, row.cost);
                continue;
            }
            of_teams += row.cost;
            if is_booked {
                let cost = Cost {
                    nano_usd: row.cost,
                    idle_nano_usd: Some(row.idle),
                    tokens: Some(row.tokens),
                };
                ledger.groups.push(CostGroup { keys: row.keys, cost });
            }
        }
        if !is_booked {
            ledger.groups = self.request_costs(period, by).await?;
            let explained: i64 = ledger.groups.iter().map(|group| group.cost.nano_usd).sum();
            if explained != of_teams {
                let name = WITHOUT_REQUEST.to_owned();
                let nano_usd = of_teams - explained;
                ledger.lines.push(CostLine { name, nano_usd });
            }
        }
        let told = LINES.iter().filter_map(|name| Some((name, *lines.get(*name)?)));
        ledger.lines.extend(told.map(|(name, nano_usd)| CostLine {
            name: (*name).to_owned(),
            nano_usd,
        }));
        Ok(())
    }

    /// Costs of those who are known of requests only.
    async fn request_costs(&self, period: Period, by: &[Dimension]) -> Result<Vec<CostGroup>, ReadError> {
        let query = self
            .client
            .query(&request_costs_statement(by))
            .param("lines", LINES.as_slice())
            .param("from_us", period.from_us())
            .param("to_us", period.to_us());
        let rows: Vec<RequestCostRow> = self.booked(over(query, period)).await?;
        let group = |row: RequestCostRow| CostGroup {
            keys: row.keys,
            cost: Cost {
                nano_usd: row.cost,
                idle_nano_usd: None,
                tokens: None,
            },
        };
        Ok(rows.into_iter().map(group).collect())
    }

    async fn charges(&self, period: Period) -> Result<Vec<ChargeRow>, ReadError> {
        let days: Vec<DayRow> = self.booked(over(self.client.query(DAYS), period)).await?;
        let rows: Vec<ChargeQueryRow> = self.booked(over(self.client.query(CHARGES), period)).await?;
        let mut charges: Vec<ChargeRow> = rows.into_iter().map(ChargeQueryRow::charge).collect();
        for day in days {
            let day_s = i64::from(day.day_s);
            let from = charges.partition_point(|row| (row.day_s, &row.upstream) < (day_s, &day.upstream));
            let to = charges.partition_point(|row| (row.day_s, &row.upstream) <= (day_s, &day.upstream));
            let time_us = day.windows.saturating_mul(WINDOW_S as u64 * 1_000_000);
            spread_unused_time(time_us, &mut charges[from..to]);
        }
        Ok(charges)
    }
}

/// Gives the time of an upstream that no row has to those that pay for it without having been busy, by what they pay.
fn spread_unused_time(time_us: u64, rows: &mut [ChargeRow]) {
    let busy_us: u64 = rows.iter().map(|row| row.time_us).sum();
    let weights: Vec<u128> = rows
        .iter()
        .map(|row| {
            if row.time_us == 0 {
                u128::from(row.cost_nano_usd.unsigned_abs())
            } else {
                0
            }
        })
        .collect();
    if weights.iter().all(|weight| *weight == 0) {
        return;
    }
    let parts = crate::ledger::money::apportion(time_us.saturating_sub(busy_us), &weights);
    for (row, part) in rows.iter_mut().zip(parts) {
        row.time_us += part;
    }
}

/// A window counts by its begin; ClickHouse's `DateTime` ends in 2106, and so do the books.
fn over(query: Query, period: Period) -> Query {
    let second =
        |us: i64| u32::try_from(us.saturating_add(999_999).div_euclid(1_000_000)).unwrap_or(u32::MAX);
    query
        .param("from_s", second(period.from_us()))
        .param("to_s", second(period.to_us()))
}

#[derive(Debug, Row, Deserialize)]
struct OpenedRow {
    upstream: String,
    opened_s: u32,
}

#[derive(Debug, Row, Deserialize)]
struct HeadRow {
    upstream: String,
    windows: u64,
    provisional: u64,
    settled: u64,
    restated: u64,
    bill: i64,
    engine_windows: u64,
    engine: Option<u64>,
    known_there: u64,
    known: u64,
    unattributed: u64,
}

impl HeadRow {
    fn enter(&self, books: &mut UpstreamBooks) {
        books.windows = self.windows;
        books.provisional = self.provisional;
        books.settled = self.settled;
        books.restated = self.restated;
        books.bill_nano_usd = self.bill;
        books.unattributed_tokens = self.unattributed;
        books.engine = Engine {
            windows: self.engine_windows,
            tokens: self.engine,
            known_tokens: self.known_there,
            known_tokens_everywhere: self.known,
        };
    }
}

#[derive(Debug, Row, Deserialize)]
struct RunRow {
    upstream: String,
    from_s: u32,
    last_s: u32,
}

#[derive(Debug, Row, Deserialize)]
struct RulesRow {
    upstream: String,
    rules: String,
    windows: u64,
}

#[derive(Debug, Row, Deserialize)]
struct UnevenRow {
    upstream: String,
    start_s: u32,
    bill_sum: i64,
    cost_sum: i64,
}

impl UnevenRow {
    fn window(self) -> UnevenWindow {
        UnevenWindow {
            upstream: self.upstream,
            start_s: self.start_s.into(),
            bill_nano_usd: self.bill_sum,
            cost_nano_usd: self.cost_sum,
        }
    }
}

#[derive(Debug, Row, Deserialize)]
struct ClosedRow {
    bill_nano_usd: i64,
    windows: u64,
    closed_by: String,
    closed_at_ms: i64,
}

#[derive(Debug, Row, Deserialize)]
struct CostRow {
    line: String,
    keys: Vec<String>,
    cost: i64,
    idle: i64,
    tokens: u64,
}

#[derive(Debug, Row, Deserialize)]
struct RequestCostRow {
    keys: Vec<String>,
    cost: i64,
}

#[derive(Debug, Row, Deserialize)]
struct DayRow {
    day_s: u32,
    upstream: String,
    windows: u64,
}

#[derive(Debug, Row, Deserialize)]
struct ChargeQueryRow {
    day_s: u32,
    upstream_name: String,
    team: String,
    project_name: String,
    model_name: String,
    cost: i64,
    busy: u64,
    tokens: u64,
    methods: String,
    state_name: String,
}

impl ChargeQueryRow {
    fn charge(self) -> ChargeRow {
        ChargeRow {
            day_s: self.day_s.into(),
            upstream: self.upstream_name,
            team: self.team,
            project: self.project_name,
            model: self.model_name,
            cost_nano_usd: self.cost,
            time_us: self.busy,
            tokens: self.tokens,
            method: self.methods,
            state: self.state_name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(time_us: u64, cost_nano_usd: i64) -> ChargeRow {
        ChargeRow {
            day_s: 0,
            upstream: "chat".to_owned(),
            team: "a".to_owned(),
            project: String::new(),
            model: "m".to_owned(),
            cost_nano_usd,
            time_us,
            tokens: 0,
            method: String::new(),
            state: "settled".to_owned(),
        }
    }

    #[test]
    fn time_that_nobody_used_goes_to_those_who_pay_for_it_and_none_is_lost() {
        let mut rows = [row(400, 40), row(0, 20), row(0, 40), row(0, 0)];
        spread_unused_time(1000, &mut rows);
        assert_eq!(rows.map(|row| row.time_us), [400, 200, 400, 0]);
        // What is free has no one who pays for being idle.
        let mut free = [row(400, 0), row(0, 0)];
        spread_unused_time(1000, &mut free);
        assert_eq!(free.map(|row| row.time_us), [400, 0]);
    }
}
