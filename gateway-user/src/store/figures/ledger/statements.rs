//! What ClickHouse is asked of the ledger.

use crate::store::figures::Dimension;

/// Windows of the period.
macro_rules! within {
    () => {
        "window_start >= toDateTime({from_s:UInt32}, 'UTC') AND window_start < toDateTime({to_s:UInt32}, 'UTC')"
    };
}

pub(super) const OPENED: &str = "SELECT toString(upstream) AS upstream, toUnixTimestamp(min(window_start)) AS opened_s
    FROM ledger_windows WHERE window_start < toDateTime({to_s:UInt32}, 'UTC') GROUP BY upstream ORDER BY upstream";

pub(super) const HEADS: &str = concat!(
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
pub(super) const RUNS: &str = concat!(
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

pub(super) const RULES: &str = concat!(
    "SELECT toString(upstream) AS upstream, toString(rules) AS rules, count() AS windows FROM ledger_windows FINAL WHERE ",
    within!(),
    " GROUP BY upstream, rules ORDER BY upstream, min(window_start), rules LIMIT 20 BY upstream"
);

pub(super) const UNEVEN: &str = concat!(
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

pub(super) const DAYS: &str = concat!(
    "SELECT toUnixTimestamp(toStartOfDay(window_start, 'UTC')) AS day_s, toString(upstream) AS upstream, count() AS windows
    FROM ledger_windows FINAL WHERE ",
    within!(),
    " GROUP BY day_s, upstream ORDER BY day_s, upstream"
);

pub(super) const CHARGES: &str = concat!(
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
pub(super) fn costs_statement(by: &[Dimension]) -> String {
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
pub(super) fn request_costs_statement(by: &[Dimension]) -> String {
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
