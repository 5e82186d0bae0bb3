-- 15-second windows by team, project and model, aligned to the clock, by the moment at which a request ended: a window is complete as soon as it
-- is over and its rows have arrived, however long a stream ran.
--
-- Aggregate states, so that the windows of several gateways merge and percentiles stay true percentiles. Read it through request_metrics_15s.
CREATE TABLE IF NOT EXISTS request_metrics{on_cluster}
(
    window_start DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
    team_id LowCardinality(String),
    project LowCardinality(String),
    model LowCardinality(String),
    requests SimpleAggregateFunction(sum, UInt64),
    errors SimpleAggregateFunction(sum, UInt64),
    aborts SimpleAggregateFunction(sum, UInt64),
    refused SimpleAggregateFunction(sum, UInt64),
    prompt_tokens SimpleAggregateFunction(sum, UInt64),
    cached_tokens SimpleAggregateFunction(sum, UInt64),
    completion_tokens SimpleAggregateFunction(sum, UInt64),
    engine_prompt_tokens SimpleAggregateFunction(sum, UInt64),
    engine_completion_tokens SimpleAggregateFunction(sum, UInt64),
    charge_nano_usd SimpleAggregateFunction(sum, Int64),
    latency_state AggregateFunction(quantilesTDigest(0.5, 0.95, 0.99), UInt64),
    ttft_state AggregateFunction(quantilesTDigest(0.5, 0.95, 0.99), Nullable(UInt64)),
    itl_state AggregateFunction(quantilesTDigest(0.5, 0.95, 0.99), Nullable(UInt64))
)
ENGINE = {replicated}AggregatingMergeTree
PARTITION BY toYYYYMM(window_start)
ORDER BY (team_id, project, model, window_start)
TTL window_start + INTERVAL {raw_ttl_days} DAY
-- A retried insert is recognised here on its own: the source table's window does not protect the target of a view.
SETTINGS {deduplication_window} = 10000;

CREATE MATERIALIZED VIEW IF NOT EXISTS request_metrics_mv{on_cluster} TO request_metrics AS
SELECT
    toStartOfInterval(toDateTime(ended_at, 'UTC'), INTERVAL 15 SECOND) AS window_start,
    team_id,
    project,
    model,
    count() AS requests,
    countIf(outcome IN ('client_error', 'server_error', 'truncated', 'unreachable', 'timed_out', 'gateway_crash')) AS errors,
    countIf(outcome = 'aborted') AS aborts,
    countIf(outcome = 'refused') AS refused,
    sum(ifNull(prompt_tokens, 0)) AS prompt_tokens,
    sum(ifNull(cached_tokens, 0)) AS cached_tokens,
    sum(ifNull(completion_tokens, 0)) AS completion_tokens,
    sum(ifNull(engine_prompt_tokens, 0)) AS engine_prompt_tokens,
    sum(ifNull(engine_completion_tokens, 0)) AS engine_completion_tokens,
    sum(charge_nano_usd) AS charge_nano_usd,
    quantilesTDigestState(0.5, 0.95, 0.99)(duration_us) AS latency_state,
    quantilesTDigestState(0.5, 0.95, 0.99)(ttft_us) AS ttft_state,
    quantilesTDigestState(0.5, 0.95, 0.99)(itl_mean_us) AS itl_state
FROM request_events
GROUP BY window_start, team_id, project, model;

CREATE VIEW IF NOT EXISTS request_metrics_15s{on_cluster} AS
SELECT
    window_start,
    team_id,
    project,
    model,
    sum(requests) AS requests,
    sum(errors) AS errors,
    sum(aborts) AS aborts,
    sum(refused) AS refused,
    sum(prompt_tokens) AS prompt_tokens,
    sum(cached_tokens) AS cached_tokens,
    sum(completion_tokens) AS completion_tokens,
    sum(engine_prompt_tokens) AS engine_prompt_tokens,
    sum(engine_completion_tokens) AS engine_completion_tokens,
    sum(charge_nano_usd) AS charge_nano_usd,
    quantilesTDigestMerge(0.5, 0.95, 0.99)(latency_state) AS latency_us,
    quantilesTDigestMerge(0.5, 0.95, 0.99)(ttft_state) AS ttft_us,
    quantilesTDigestMerge(0.5, 0.95, 0.99)(itl_state) AS itl_us,
    latency_us[1] AS latency_p50_us,
    latency_us[2] AS latency_p95_us,
    latency_us[3] AS latency_p99_us,
    ttft_us[1] AS ttft_p50_us,
    ttft_us[2] AS ttft_p95_us,
    ttft_us[3] AS ttft_p99_us,
    itl_us[1] AS itl_p50_us,
    itl_us[2] AS itl_p95_us,
    itl_us[3] AS itl_p99_us
FROM request_metrics
GROUP BY window_start, team_id, project, model;
