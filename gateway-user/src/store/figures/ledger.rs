//! What the ledger says of a period: whose rows, what the lines of nobody have, and the heads of the windows that all of it must sum to.
//!
//! Everything is read with `FINAL`. A window is written in two tables, which no query sees at one moment: where rows and heads differ, all is read
//! again before that is believed.

use super::error::ReadError;
use super::reader::{FIGURES_MAX, FiguresReader};
use super::{Dimension, Period};
use crate::ledger::facts::{DOWN, IDLE, LOADING, SCALED_TO_ZERO, UNATTRIBUTED};
use clickhouse::query::Query;
use clickhouse::{Row, RowOwned, RowRead};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Lines that no team has, in the order in which they are told.
pub const LINES: [&str; 5] = [IDLE, UNATTRIBUTED, LOADING, DOWN, SCALED_TO_ZERO];

/// What teams pay and no stored request explains, where it is asked for by what only requests have: shares of idle time, requests that still
/// run, and those whose rows are no longer kept.
pub const WITHOUT_REQUEST: &str = "__without_request__";

/// How often rows and heads that differ are read: a gateway may be writing a window just then.
const READS_MAX: u32 = 3;

/// How long it may take to write one.
const BETWEEN_READS: Duration = Duration::from_secs(1);

/// So many windows that do not add up are named; the rest are counted.
const UNEVEN_NAMED_MAX: usize = 5;

/// Seconds of a window.
const WINDOW_S: i64 = 15;

/// What fell to somebody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// All of it.
    pub nano_usd: i64,
    /// The part that is a share of idle time; `None` where that cannot be told.
    pub idle_nano_usd: Option<i64>,
    /// Prompt and completion tokens that were worked on in these windows, where they are known.
    pub tokens: Option<u64>,
}

/// The cost of those that agree in everything that they were grouped by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CostGroup {
    /// A value for each dimension.
    pub keys: Vec<String>,
    /// What fell to them.
    pub cost: Cost,
}

/// The cost of a line that nobody has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CostLine {
    /// One of [`LINES`], or [`WITHOUT_REQUEST`].
    pub name: String,
    /// What it has.
    pub nano_usd: i64,
}

/// What is booked of one upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamBooks {
    /// Its name.
    pub upstream: String,
    /// Begin of the first window that was ever booked of it, seconds since 1970.
    pub opened_s: i64,
    /// Windows of the period that are booked, joined where they touch: begin and end, seconds since 1970, in order.
    pub runs: Vec<(i64, i64)>,
    /// How many windows that are.
    pub windows: u64,
    /// Those to which rows may still come.
    pub provisional: u64,
    /// Those that have had their time.
    pub settled: u64,
    /// Those to which something came later still.
    pub restated: u64,
    /// What they cost.
    pub bill_nano_usd: i64,
    /// What its engine counted.
    pub engine: Engine,
    /// Tokens of `__unattributed__`.
    pub unattributed_tokens: u64,
    /// By which rules, and how many windows by each; at most a few.
    pub rules: Vec<RulesUse>,
}

/// An engine's own count against what requests are known to have used, prompt and completion tokens together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Engine {
    /// Windows in which its counters are known.
    pub windows: u64,
    /// What they grew by in these; `None` when there are none.
    pub tokens: Option<u64>,
    /// What requests are known to have used in the same windows.
    pub known_tokens: u64,
    /// What they are known to have used in all windows.
    pub known_tokens_everywhere: u64,
}

/// Rules that windows were booked by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RulesUse {
    /// In the ledger's words.
    pub rules: String,
    /// How many windows.
    pub windows: u64,
}

/// A window whose rows do not sum to its head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnevenWindow {
    /// Its upstream.
    pub upstream: String,
    /// Its begin, seconds since 1970.
    pub start_s: i64,
    /// What its head says.
    pub bill_nano_usd: i64,
    /// What its rows sum to.
    pub cost_nano_usd: i64,
}

/// A month that nothing is written to any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedMonth {
    /// Its bill when it was closed.
    pub bill_nano_usd: i64,
    /// Its windows then.
    pub windows: u64,
    /// Who closed it.
    pub closed_by: String,
    /// When, microseconds since 1970.
    pub closed_at_us: i64,
}

/// A row of the finest kind that is handed on: a day of an upstream, by whom and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChargeRow {
    /// Begin of the day (UTC), seconds since 1970.
    pub day_s: i64,
    /// The upstream.
    pub upstream: String,
    /// The team, or one of [`LINES`].
    pub team: String,
    /// Its project; may be empty.
    pub project: String,
    /// The model; `__idle__` on a team's share of idle time.
    pub model: String,
    /// What it cost.
    pub cost_nano_usd: i64,
    /// The upstream's time that it had. All rows of a day sum to the time of the booked windows.
    pub time_us: u64,
    /// Prompt and completion tokens that were worked on.
    pub tokens: u64,
    /// By which rules.
    pub method: String,
    /// `provisional` while any part of it is, else `restated` when any part is, else `settled`.
    pub state: String,
}

impl ChargeRow {
    /// Whether a team pays it.
    pub fn is_a_teams(&self) -> bool {
        !LINES.contains(&self.team.as_str())
    }
}

/// What the ledger says of a period.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerFigures {
    /// Those who pay, in the order of their keys.
    pub groups: Vec<CostGroup>,
    /// What nobody pays, those lines that there are.
    pub lines: Vec<CostLine>,
    /// The finest rows, where they were asked for instead of groups.
    pub charges: Vec<ChargeRow>,
    /// The heads.
    pub upstreams: Vec<UpstreamBooks>,
    /// How many windows have rows that do not sum to their heads.
    pub uneven_windows: u64,
    /// The first few of them.
    pub uneven: Vec<UnevenWindow>,
}

impl LedgerFigures {
    /// What those who pay have, whether or not a request explains it.
    pub fn teams_nano_usd(&self) -> i64 {
        let groups = self.groups.iter().map(|group| group.cost.nano_usd);
        let unexplained = self.lines.iter().filter(|line| line.name == WITHOUT_REQUEST);
        let charges = self.charges.iter().filter(|row| row.is_a_teams());
        groups
            .chain(unexplained.map(|line| line.nano_usd))
            .chain(charges.map(|row| row.cost_nano_usd))
            .sum()
    }

    /// What all rows sum to.
    pub fn cost_nano_usd(&self) -> i64 {
        let lines = self.lines.iter().filter(|line| line.name != WITHOUT_REQUEST);
        let charges = self.charges.iter().filter(|row| !row.is_a_teams());
        let of_nobody = lines
            .map(|line| line.nano_usd)
            .chain(charges.map(|row| row.cost_nano_usd));
        self.teams_nano_usd() + of_nobody.sum::<i64>()
    }

    /// What all heads sum to.
    pub fn bill_nano_usd(&self) -> i64 {
        self.upstreams.iter().map(|books| books.bill_nano_usd).sum()
    }

    /// Whether every window's rows sum to its head, and what is printed to all heads.
    pub fn is_even(&self) -> bool {
        self.uneven_windows == 0 && self.cost_nano_usd() == self.bill_nano_usd()
    }
}

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

/// Windows of the period.
macro_rules! within {
    () => {
        "window_start >= toDateTime({from_s:UInt32}, 'UTC') AND window_start < toDateTime({to_s:UInt32}, 'UTC')"
    };
}

const OPENED: &str = "SELECT toString(upstream) AS upstream, toUnixTimestamp(min(window_start)) AS opened_s
    FROM ledger_windows WHERE window_start < toDateTime({to_s:UInt32}, 'UTC') GROUP BY upstream ORDER BY upstream";

const HEADS: &str = concat!(
    "SELECT
        toString(upstream) AS upstream,
        count() AS windows,
        countIf(state = 'provisional') AS provisional,
        countIf(state = 'settled') AS settled,
        countIf(state = 'restated') AS restated,
        sum(bill_nano_usd) AS bill,
        countIf(engine_prompt_tokens IS NOT NULL AND engine_completion_tokens IS NOT NULL) AS engine_windows,
        sum(engine_prompt_tokens + engine_completion_tokens) AS engine,
        sumIf(prompt_tokens + completion_tokens, engine_prompt_tokens IS NOT NULL AND engine_completion_tokens IS NOT NULL) AS known_there,
        sum(prompt_tokens + completion_tokens) AS known,
        sum(unattributed_prompt_tokens + unattributed_completion_tokens) AS unattributed
    FROM ledger_windows FINAL WHERE ",
    within!(),
    " GROUP BY upstream ORDER BY upstream"
);

/// Windows that follow each other keep their distance to their number.
const RUNS: &str = concat!(
    "SELECT upstream, min(start_s) AS from_s, max(start_s) AS last_s
    FROM
    (
        SELECT
            toString(upstream) AS upstream,
            toUnixTimestamp(window_start) AS start_s,
            row_number() OVER (PARTITION BY upstream ORDER BY window_start) AS number
        FROM ledger_windows FINAL WHERE ",
    within!(),
    "
    )
    GROUP BY upstream, toInt64(start_s) - 15 * toInt64(number) ORDER BY upstream, from_s"
);

const RULES: &str = concat!(
    "SELECT toString(upstream) AS upstream, toString(rules) AS rules, count() AS windows FROM ledger_windows FINAL WHERE ",
    within!(),
    " GROUP BY upstream, rules ORDER BY upstream, min(window_start), rules LIMIT 20 BY upstream"
);

const UNEVEN: &str = concat!(
    "SELECT upstream, start_s, sum(bill) AS bill_sum, sum(cost) AS cost_sum
    FROM
    (
        SELECT toString(upstream) AS upstream, toUnixTimestamp(window_start) AS start_s, bill_nano_usd AS bill, toInt64(0) AS cost
        FROM ledger_windows FINAL WHERE ",
    within!(),
    "
        UNION ALL
        SELECT toString(upstream) AS upstream, toUnixTimestamp(window_start) AS start_s, toInt64(0) AS bill, cost_nano_usd AS cost
        FROM cost_ledger FINAL WHERE ",
    within!(),
    "
    )
    GROUP BY upstream, start_s HAVING bill_sum != cost_sum ORDER BY start_s, upstream"
);

const DAYS: &str = concat!(
    "SELECT toUnixTimestamp(toStartOfDay(window_start, 'UTC')) AS day_s, toString(upstream) AS upstream, count() AS windows
    FROM ledger_windows FINAL WHERE ",
    within!(),
    " GROUP BY day_s, upstream ORDER BY day_s, upstream"
);

const CHARGES: &str = concat!(
    "SELECT
        toUnixTimestamp(toStartOfDay(window_start, 'UTC')) AS day_s,
        toString(upstream) AS upstream_name,
        toString(team_id) AS team,
        toString(project) AS project_name,
        toString(model) AS model_name,
        sum(cost_nano_usd) AS cost,
        sum(busy_us) AS busy,
        sum(prompt_tokens + completion_tokens) AS tokens,
        arrayStringConcat(arraySort(groupUniqArray(toString(method))), '; ') AS methods,
        if(countIf(state = 'provisional') > 0, 'provisional', if(countIf(state = 'restated') > 0, 'restated', 'settled')) AS state_name
    FROM cost_ledger FINAL WHERE ",
    within!(),
    " GROUP BY day_s, upstream_name, team, project_name, model_name ORDER BY day_s, upstream_name, team, project_name, model_name"
);

fn array_of(by: &[Dimension], sql: impl Fn(Dimension) -> &'static str) -> String {
    match by {
        [] => "emptyArrayString()".to_owned(),
        by => format!(
            "[{}]",
            by.iter()
                .map(|dimension| sql(*dimension))
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}

/// Lines of nobody have no keys: they are of the whole period.
fn costs_statement(by: &[Dimension]) -> String {
    let keys = array_of(by, Dimension::ledger_sql);
    format!(
        "SELECT
            if(has({{lines:Array(String)}}, toString(team_id)), toString(team_id), '') AS line,
            if(line = '', {keys}, emptyArrayString()) AS keys,
            sum(cost_nano_usd) AS cost,
            sumIf(cost_nano_usd, line = '' AND model = {{idle:String}}) AS idle,
            sum(prompt_tokens + completion_tokens) AS tokens
        FROM cost_ledger FINAL
        WHERE {within}
        GROUP BY line, keys
        ORDER BY line, keys",
        within = within!()
    )
}

/// A request's events can lie in any period, but it began before this one ended, and not longer before it than the longest request took. Whose a
/// cost is says the ledger; of the event come only user and endpoint.
fn request_costs_statement(by: &[Dimension]) -> String {
    let keys = array_of(by, |dimension| match dimension {
        Dimension::User => "of_request.user_id",
        Dimension::Endpoint => "of_request.endpoint_name",
        Dimension::Team => "costs.team",
        Dimension::Project => "costs.project_name",
        Dimension::Model => "costs.model_name",
        Dimension::Day => "costs.day",
    });
    format!(
        "WITH (SELECT max(duration_us) FROM request_events WHERE started_at < fromUnixTimestamp64Micro({{to_us:Int64}}, 'UTC')) AS longest_us
        SELECT {keys} AS keys, sum(costs.cost) AS cost
        FROM
        (
            SELECT
                event_id,
                toString(team_id) AS team,
                toString(project) AS project_name,
                toString(model) AS model_name,
                toString(toDate(window_start, 'UTC')) AS day,
                sum(cost_nano_usd) AS cost
            FROM segment_costs FINAL
            WHERE {within} AND NOT has({{lines:Array(String)}}, toString(team_id))
            GROUP BY event_id, team, project_name, model_name, day
        ) AS costs
        LEFT ANY JOIN
        (
            SELECT event_id, user_id, toString(endpoint) AS endpoint_name, toUInt8(1) AS is_known
            FROM request_events FINAL
            WHERE started_at >= fromUnixTimestamp64Micro({{from_us:Int64}} - toInt64(longest_us), 'UTC')
                AND started_at < fromUnixTimestamp64Micro({{to_us:Int64}}, 'UTC')
        ) AS of_request ON costs.event_id = of_request.event_id
        WHERE of_request.is_known = 1
        GROUP BY keys
        ORDER BY keys",
        within = within!()
    )
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
