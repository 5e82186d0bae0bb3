-- 15-second windows by team, project and model, aligned to the clock, by the moment at which a request ended: a window is complete as soon as it
-- is over and its rows have arrived, however long a stream ran. Read it through request_metrics_15s.
--
-- Aggregate states, so that the windows of several gateways merge and percentiles stay true percentiles. A row is what one batch adds to one
-- window. So it can be written again, by a retry beyond the deduplication window or from the rows after a lost answer, and replaces itself: a
-- sum over batches counts each batch once.
CREATE TABLE IF NOT EXISTS request_metrics{on_cluster}
(
    window_start DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
    team_id LowCardinality(String),
    project LowCardinality(String),
    model LowCardinality(String),
    batch LowCardinality(String),
    requests UInt64 CODEC(T64, ZSTD(1)),
    errors UInt64 CODEC(T64, ZSTD(1)),
    aborts UInt64 CODEC(T64, ZSTD(1)),
    refused UInt64 CODEC(T64, ZSTD(1)),
    prompt_tokens UInt64 CODEC(T64, ZSTD(1)),
    cached_tokens UInt64 CODEC(T64, ZSTD(1)),
    completion_tokens UInt64 CODEC(T64, ZSTD(1)),
    engine_prompt_tokens UInt64 CODEC(T64, ZSTD(1)),
    engine_completion_tokens UInt64 CODEC(T64, ZSTD(1)),
    charge_nano_usd Int64 CODEC(T64, ZSTD(1)),
    latency_state AggregateFunction(quantilesTDigest(0.5, 0.95, 0.99), Nullable(UInt64)) CODEC(ZSTD(1)),
    ttft_state AggregateFunction(quantilesTDigest(0.5, 0.95, 0.99), Nullable(UInt64)) CODEC(ZSTD(1)),
    itl_state AggregateFunction(quantilesTDigest(0.5, 0.95, 0.99), Nullable(UInt64)) CODEC(ZSTD(1)),
    -- 1: written from the stored rows of the whole batch. That is better than what came with an insert, which can have been a part of it.
    revision UInt8
)
ENGINE = {replicated}ReplacingMergeTree(revision)
PARTITION BY toYYYYMM(window_start)
ORDER BY (team_id, project, model, window_start, batch)
TTL window_start + INTERVAL {raw_ttl_days} DAY
-- A retried insert is recognised here on its own: the source table's window does not protect the target of a view.
SETTINGS {deduplication_window} = 10000;

-- Without rows that were only inferred from a crash: such a row can give way to the request's own row, of another batch and in another window.
CREATE MATERIALIZED VIEW IF NOT EXISTS request_metrics_mv{on_cluster} TO request_metrics AS
SELECT
{window_columns},
    toUInt8(0) AS revision
FROM request_events
WHERE outcome != 'gateway_crash'
GROUP BY window_start, team_id, project, model, batch;

-- Rows that were inferred from a crash are added when it is read, from the few of them that stand.
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
FROM
(
    SELECT *
    FROM request_metrics FINAL
    UNION ALL
    SELECT
{window_columns},
        toUInt8(0) AS revision
    FROM request_events FINAL
    WHERE outcome = 'gateway_crash'
        AND (team_id, started_at, event_id) IN (SELECT team_id, started_at, event_id FROM request_events WHERE row_version = 0)
    GROUP BY window_start, team_id, project, model, batch
)
GROUP BY window_start, team_id, project, model;
