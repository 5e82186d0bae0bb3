//! What statements are computed from, and what stands of them.

use super::{IN_SPAN, LedgerError, LedgerStore, SECOND_US};
use crate::ledger::segment::kv_token_us;
use crate::ledger::{
    Account, Condition, Head, Look, Micros, NanoUsd, Segment, SegmentCost, Span, Standing, State, Tally,
    Totals, Window, Work,
};
use clickhouse::Row;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// A row of `cost_ledger` that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandingRow {
    /// Whom it is for.
    pub account: Account,
    /// What it costs.
    pub cost: NanoUsd,
}

impl LedgerStore {
    /// What ClickHouse's clock says, which rows are stamped with.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn now(&self) -> Result<Micros, LedgerError> {
        let query = self.client.query("SELECT toUnixTimestamp64Micro(now64(6)) AS us");
        let found = self.rows::<MicrosRow>(query).await?;
        Ok(Micros(found.first().map_or(0, |row| row.us.max(0) as u64)))
    }

    /// The moment of an upstream's first fact, or of the first window that was booked when its facts are gone: segment, scrape or head.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn first_fact(&self, upstream: &str) -> Result<Option<Micros>, LedgerError> {
        // The first two tables are in this order, so that these rows are the first that are read.
        let statement = "SELECT toInt64(min(second)) AS us FROM (\
             SELECT * FROM (SELECT toUInt64(toUnixTimestamp(window_start)) AS second FROM request_segments WHERE upstream = {upstream:String} \
               ORDER BY upstream, window_start LIMIT 1) UNION ALL \
             SELECT * FROM (SELECT toUInt64(toUnixTimestamp(window_start)) AS second FROM ledger_windows WHERE upstream = {upstream:String} \
               ORDER BY upstream, window_start LIMIT 1) UNION ALL \
             SELECT toUInt64(toUnixTimestamp(min(scraped_at))) AS second FROM vllm_system_metrics WHERE upstream = {upstream:String}) \
             WHERE second > 0";
        let query = self.client.query(statement).param("upstream", upstream);
        let found = self.rows::<MicrosRow>(query).await?;
        let second = found.first().and_then(|row| u64::try_from(row.us).ok());
        // The least of nothing is 0.
        Ok(second
            .filter(|second| *second > 0)
            .map(|second| Micros(second * SECOND_US)))
    }

    /// The windows to which a segment came at or after a moment of ClickHouse's clock.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn touched(&self, upstream: &str, since: Micros) -> Result<BTreeSet<Micros>, LedgerError> {
        let statement = "SELECT DISTINCT toUInt64(toUnixTimestamp(window_start)) AS start FROM request_segments \
                         WHERE upstream = {upstream:String} AND stored_at >= toDateTime({since:UInt32}, 'UTC')";
        let query = self
            .client
            .query(statement)
            .param("upstream", upstream)
            .param("since", u32::try_from(since.0 / SECOND_US).unwrap_or(u32::MAX));
        self.starts(query).await
    }

    /// When, by ClickHouse's clock, a statement of an upstream was last written.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn last_computed(&self, upstream: &str) -> Result<Option<Micros>, LedgerError> {
        let statement = "SELECT toUnixTimestamp64Micro(toDateTime64(max(computed_at), 6, 'UTC')) AS us FROM ledger_windows \
                         WHERE upstream = {upstream:String}";
        let query = self.client.query(statement).param("upstream", upstream);
        let found = self.rows::<MicrosRow>(query).await?;
        let at = found.first().and_then(|row| u64::try_from(row.us).ok());
        Ok(at.filter(|us| *us > 0).map(Micros))
    }

    /// Windows of a span that are booked.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn booked(&self, upstream: &str, span: Span) -> Result<BTreeSet<Micros>, LedgerError> {
        let statement = format!(
            "SELECT DISTINCT toUInt64(toUnixTimestamp(window_start)) AS start FROM ledger_windows WHERE {IN_SPAN}"
        );
        self.starts(self.about(&statement, upstream, span)).await
    }

    /// Windows of a span that are booked and not settled.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn provisional(&self, upstream: &str, span: Span) -> Result<BTreeSet<Micros>, LedgerError> {
        let statement = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start FROM ledger_windows FINAL WHERE {IN_SPAN} AND state = 'provisional'"
        );
        self.starts(self.about(&statement, upstream, span)).await
    }

    /// How many windows of each day of a span are booked: the days by their first moment.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn booked_by_day(
        &self,
        upstream: &str,
        span: Span,
    ) -> Result<BTreeMap<Micros, u64>, LedgerError> {
        let statement = format!(
            "SELECT toUInt64(toUnixTimestamp(toStartOfDay(window_start))) AS start, uniqExact(window_start) AS count FROM ledger_windows \
             WHERE {IN_SPAN} GROUP BY start"
        );
        let rows = self
            .rows::<CountRow>(self.about(&statement, upstream, span))
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| (Micros(row.start * SECOND_US), row.count))
            .collect())
    }

    async fn starts(&self, query: clickhouse::query::Query) -> Result<BTreeSet<Micros>, LedgerError> {
        let rows = self.rows::<StartRow>(query).await?;
        Ok(rows
            .into_iter()
            .map(|row| Micros(row.start * SECOND_US))
            .collect())
    }

    /// The segments of each window of a span, taken together; windows without any are not among them.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn tallies(&self, upstream: &str, span: Span) -> Result<BTreeMap<Window, Tally>, LedgerError> {
        let statement = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, count() AS segments, sum(prompt_tokens) AS prompt, \
             sum(cached_tokens) AS cached, sum(completion_tokens) AS completion, \
             sum(cityHash64(event_id, team_id, project, model, run_start, run_end, prompt_tokens, cached_tokens, completion_tokens, \
             kv_token_seconds)) AS hash FROM request_segments FINAL WHERE {IN_SPAN} GROUP BY start"
        );
        let rows = self
            .rows::<TallyRow>(self.about(&statement, upstream, span))
            .await?;
        let tally = |row: TallyRow| {
            let work = Work {
                prompt_tokens: row.prompt,
                cached_tokens: row.cached,
                completion_tokens: row.completion,
                kv_token_us: 0,
            };
            let tally = Tally {
                segments: row.segments,
                work,
                hash: row.hash,
            };
            (window(row.start), tally)
        };
        Ok(rows.into_iter().map(tally).collect())
    }

    /// The segments of each window of a span.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn segments(
        &self,
        upstream: &str,
        span: Span,
    ) -> Result<BTreeMap<Window, Vec<Segment>>, LedgerError> {
        let statement = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, event_id AS event, toString(team_id) AS team, toString(project) AS of_project, \
             toString(model) AS of_model, toUnixTimestamp64Micro(run_start) AS run_from, toUnixTimestamp64Micro(run_end) AS run_to, \
             prompt_tokens AS prompt, cached_tokens AS cached, completion_tokens AS completion, kv_token_seconds AS kv \
             FROM request_segments FINAL WHERE {IN_SPAN}"
        );
        let rows = self
            .rows::<SegmentRow>(self.about(&statement, upstream, span))
            .await?;
        let mut segments: BTreeMap<Window, Vec<Segment>> = BTreeMap::new();
        for row in rows {
            segments.entry(window(row.start)).or_default().push(row.segment());
        }
        Ok(segments)
    }

    /// What gateways saw of an upstream within a span.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn looks(&self, upstream: &str, span: Span) -> Result<Vec<Look>, LedgerError> {
        let statement = "SELECT toString(gateway_id) AS observer, toUnixTimestamp64Milli(scraped_at) AS at_ms, toUInt8(min(ok)) AS answered, \
             groupUniqArray(toString(condition)) AS conditions, \
             sum(running) AS running_sum, toUInt8(count() = count(prompt_tokens_total) AND count() = count(generation_tokens_total)) AS known, \
             sum(ifNull(prompt_tokens_total, 0)) AS prompt, sum(ifNull(generation_tokens_total, 0)) AS completion, \
             sum(cityHash64(model)) AS models, toUInt8(max(counter_reset)) AS reset FROM vllm_system_metrics FINAL \
             WHERE upstream = {upstream:String} AND scraped_at >= toDateTime({from:UInt32}, 'UTC') AND scraped_at < toDateTime({to:UInt32}, 'UTC') \
             GROUP BY observer, at_ms";
        let rows = self
            .rows::<LookRow>(self.about(statement, upstream, span))
            .await?;
        Ok(rows.into_iter().map(LookRow::look).collect())
    }

    /// What stands of each window of a span.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn standing(
        &self,
        upstream: &str,
        span: Span,
    ) -> Result<BTreeMap<Window, Standing>, LedgerError> {
        let heads = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, bill_nano_usd, busy_us, segments, prompt_tokens, completion_tokens, \
             engine_prompt_tokens, engine_completion_tokens, unattributed_prompt_tokens, unattributed_completion_tokens, facts, \
             toString(rules) AS by_rules, revision, toString(state) AS in_state, toString(gateway_id) AS gateway FROM ledger_windows FINAL \
             WHERE {IN_SPAN}"
        );
        let sums = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, count() AS count, sum(cost_nano_usd) AS cost, sum(busy_us) AS busy, \
             sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion, min(revision) AS lowest, max(revision) AS highest \
             FROM cost_ledger FINAL WHERE {IN_SPAN} GROUP BY start"
        );
        let items = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, count() AS count, sum(cost_nano_usd) AS cost, sum(busy_us) AS busy, \
             toUInt64(0) AS prompt, toUInt64(0) AS completion, min(revision) AS lowest, max(revision) AS highest \
             FROM segment_costs FINAL WHERE {IN_SPAN} GROUP BY start"
        );
        let (heads, sums, items) = tokio::try_join!(
            self.rows::<HeadRow>(self.about(&heads, upstream, span)),
            self.rows::<SumRow>(self.about(&sums, upstream, span)),
            self.rows::<SumRow>(self.about(&items, upstream, span)),
        )?;
        let mut found: BTreeMap<u64, Found> = BTreeMap::new();
        for row in heads {
            let found = found.entry(row.start).or_default();
            found.head = Some(row);
        }
        for row in sums {
            let found = found.entry(row.start).or_default();
            found.rows = Some(row);
        }
        for row in items {
            let found = found.entry(row.start).or_default();
            found.items = Some(row);
        }
        let standing = |(start, found): (u64, Found)| (window(start), found.standing(upstream));
        Ok(found.into_iter().map(standing).collect())
    }

    /// The rows that stand of each window of a span.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn standing_rows(
        &self,
        upstream: &str,
        span: Span,
    ) -> Result<BTreeMap<Window, Vec<StandingRow>>, LedgerError> {
        let statement = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, toString(team_id) AS team, toString(project) AS of_project, \
             toString(model) AS of_model, cost_nano_usd AS cost FROM cost_ledger FINAL WHERE {IN_SPAN}"
        );
        let rows = self
            .rows::<AccountRow>(self.about(&statement, upstream, span))
            .await?;
        let mut found: BTreeMap<Window, Vec<StandingRow>> = BTreeMap::new();
        for row in rows {
            let account = account(row.team, row.of_project, row.of_model);
            let cost = NanoUsd(row.cost.max(0) as u64);
            found
                .entry(window(row.start))
                .or_default()
                .push(StandingRow { account, cost });
        }
        Ok(found)
    }

    /// Costs that stand of segments that are not there (any more), of each window of a span: what is left of a statement that another one
    /// has to take back. Their cost is 0 here.
    ///
    /// # Errors
    /// What ClickHouse says.
    pub async fn orphans(
        &self,
        upstream: &str,
        span: Span,
    ) -> Result<BTreeMap<Window, Vec<SegmentCost>>, LedgerError> {
        let statement = format!(
            "SELECT toUInt64(toUnixTimestamp(window_start)) AS start, event_id AS event, toString(team_id) AS team, toString(project) AS of_project, \
             toString(model) AS of_model FROM segment_costs FINAL WHERE {IN_SPAN} \
             AND (window_start, event_id) NOT IN (SELECT window_start, event_id FROM request_segments WHERE {IN_SPAN})"
        );
        let rows = self
            .rows::<OrphanRow>(self.about(&statement, upstream, span))
            .await?;
        let mut found: BTreeMap<Window, Vec<SegmentCost>> = BTreeMap::new();
        for row in rows {
            let window_start = window(row.start);
            found.entry(window_start).or_default().push(SegmentCost {
                window_start,
                upstream: upstream.into(),
                event_id: row.event.into(),
                account: account(row.team, row.of_project, row.of_model),
                busy_us: 0,
                cost: NanoUsd(0),
                revision: 0,
                state: State::Provisional,
            });
        }
        Ok(found)
    }
}

fn window(start_s: u64) -> Window {
    Window::at(Micros(start_s * SECOND_US))
}

fn account(team: String, project: String, model: String) -> Account {
    Account {
        team_id: team.into(),
        project: project.into(),
        model: model.into(),
    }
}

#[derive(Row, Deserialize)]
struct MicrosRow {
    us: i64,
}

#[derive(Row, Deserialize)]
struct StartRow {
    start: u64,
}

#[derive(Row, Deserialize)]
struct CountRow {
    start: u64,
    count: u64,
}

#[derive(Row, Deserialize)]
struct TallyRow {
    start: u64,
    segments: u64,
    prompt: u64,
    cached: u64,
    completion: u64,
    hash: u64,
}

#[derive(Row, Deserialize)]
struct SegmentRow {
    start: u64,
    event: String,
    team: String,
    of_project: String,
    of_model: String,
    run_from: i64,
    run_to: i64,
    prompt: u64,
    cached: u64,
    completion: u64,
    kv: f64,
}

impl SegmentRow {
    fn segment(self) -> Segment {
        let moment = |us: i64| Micros(us.max(0) as u64);
        Segment {
            event_id: self.event.into(),
            account: account(self.team, self.of_project, self.of_model),
            run: Span::new(moment(self.run_from), moment(self.run_to)),
            work: Work {
                prompt_tokens: self.prompt,
                cached_tokens: self.cached,
                completion_tokens: self.completion,
                kv_token_us: kv_token_us(self.kv),
            },
        }
    }
}

#[derive(Row, Deserialize)]
struct LookRow {
    observer: String,
    at_ms: i64,
    answered: u8,
    conditions: Vec<String>,
    running_sum: Option<f64>,
    known: u8,
    prompt: u64,
    completion: u64,
    models: u64,
    reset: u8,
}

impl LookRow {
    fn look(self) -> Look {
        let answered = self.answered > 0;
        // Of the models of one engine, the one that is nearest to running tells.
        let conditions = self.conditions.iter();
        let condition = conditions
            .map(|name| Condition::of_row(name, answered, self.running_sum))
            .max();
        Look {
            observer: self.observer.into(),
            at: Micros(self.at_ms.max(0) as u64 * 1_000),
            condition: condition.unwrap_or(Condition::Down),
            totals: (answered && self.known > 0).then_some(Totals {
                prompt_tokens: self.prompt,
                completion_tokens: self.completion,
            }),
            models: self.models,
            is_reset: self.reset > 0,
        }
    }
}

#[derive(Row, Deserialize)]
struct HeadRow {
    start: u64,
    bill_nano_usd: i64,
    busy_us: u64,
    segments: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    engine_prompt_tokens: Option<u64>,
    engine_completion_tokens: Option<u64>,
    unattributed_prompt_tokens: u64,
    unattributed_completion_tokens: u64,
    facts: u64,
    by_rules: String,
    revision: u64,
    in_state: String,
    gateway: String,
}

impl HeadRow {
    fn head(self, upstream: &str) -> Head {
        Head {
            window_start: window(self.start),
            upstream: upstream.into(),
            bill: NanoUsd(self.bill_nano_usd.max(0) as u64),
            busy_us: self.busy_us,
            segments: self.segments,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            engine_prompt_tokens: self.engine_prompt_tokens,
            engine_completion_tokens: self.engine_completion_tokens,
            unattributed_prompt_tokens: self.unattributed_prompt_tokens,
            unattributed_completion_tokens: self.unattributed_completion_tokens,
            facts: self.facts,
            rules: self.by_rules.into(),
            revision: self.revision,
            // A name that nobody knows is no settled state.
            state: State::named(&self.in_state).unwrap_or(State::Provisional),
            gateway_id: self.gateway.into(),
        }
    }
}

#[derive(Row, Deserialize)]
struct SumRow {
    start: u64,
    count: u64,
    cost: i64,
    busy: u64,
    prompt: u64,
    completion: u64,
    lowest: u64,
    highest: u64,
}

/// All that was found of a window.
#[derive(Default)]
struct Found {
    head: Option<HeadRow>,
    rows: Option<SumRow>,
    items: Option<SumRow>,
}

impl Found {
    fn standing(self, upstream: &str) -> Standing {
        let highest = |sums: &Option<SumRow>| sums.as_ref().map_or(0, |sums| sums.highest);
        let of_rows = highest(&self.rows).max(highest(&self.items));
        let is_whole = self.is_whole();
        let head = self.head.map(|head| head.head(upstream));
        Standing {
            revision: of_rows.max(head.as_ref().map_or(0, |head| head.revision)),
            is_whole,
            head,
        }
    }

    /// Whether rows, items and head are one statement.
    fn is_whole(&self) -> bool {
        let Some(head) = &self.head else { return false };
        let is_of_head = |sums: &SumRow| sums.lowest == head.revision && sums.highest == head.revision;
        let rows = self.rows.as_ref().is_some_and(|rows| {
            is_of_head(rows)
                && rows.cost == head.bill_nano_usd
                && rows.busy == head.busy_us
                && rows.prompt == head.prompt_tokens + head.unattributed_prompt_tokens
                && rows.completion == head.completion_tokens + head.unattributed_completion_tokens
        });
        let items = match &self.items {
            Some(items) => is_of_head(items) && items.count >= head.segments,
            None => head.segments == 0,
        };
        rows && items
    }
}

#[derive(Row, Deserialize)]
struct AccountRow {
    start: u64,
    team: String,
    of_project: String,
    of_model: String,
    cost: i64,
}

#[derive(Row, Deserialize)]
struct OrphanRow {
    start: u64,
    event: String,
    team: String,
    of_project: String,
    of_model: String,
}
