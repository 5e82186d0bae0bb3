-- Every request, one row, as the gateways saw it. Facts only: money is computed from them elsewhere.
--
-- A row is known by its event: the sorting key ends in event_id, and the other parts of the key are functions of the event, so that a row that
-- arrives twice (a retry beyond the deduplication window, a restored spool) replaces itself. What a bill reads is read with FINAL.
-- Unknown numbers are NULL, not 0.
CREATE TABLE IF NOT EXISTS request_events{on_cluster}
(
    event_id String CODEC(ZSTD(1)),
    started_at DateTime64(6, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    ended_at DateTime64(6, 'UTC') DEFAULT fromUnixTimestamp64Micro(toUnixTimestamp64Micro(started_at) + toInt64(duration_us), 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    team_id LowCardinality(String),
    project LowCardinality(String),
    user_id String CODEC(ZSTD(1)),
    key_id LowCardinality(String),
    auth_method LowCardinality(String) DEFAULT 'header',
    model LowCardinality(String),
    base_model LowCardinality(String) DEFAULT model,
    upstream LowCardinality(String),
    cluster LowCardinality(String),
    endpoint LowCardinality(String),
    variant LowCardinality(String),
    priority Int32,
    stream Bool,
    capture LowCardinality(String),
    status_code UInt16,
    outcome LowCardinality(String),
    finish_reason LowCardinality(String),
    prompt_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    cached_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    completion_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    reasoning_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    engine_prompt_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    engine_completion_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    usage_source LowCardinality(String),
    ttft_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    duration_us UInt64 CODEC(T64, ZSTD(1)),
    queue_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    itl_mean_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    itl_max_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    chunks UInt64 CODEC(T64, ZSTD(1)),
    request_bytes UInt64 CODEC(T64, ZSTD(1)),
    response_bytes UInt64 CODEC(T64, ZSTD(1)),
    gateway_overhead_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    -- At the server's socket, by the kernel's clock; NULL where no probe saw the request.
    tap_ttft_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    tap_duration_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    charge_nano_usd Int64 CODEC(T64, ZSTD(1)),
    request_id String CODEC(ZSTD(1)),
    trace_id String CODEC(ZSTD(1)),
    error_type LowCardinality(String),
    labels Map(LowCardinality(String), String),
    gateway_id LowCardinality(String),
    batch LowCardinality(String),
    -- A row that was only inferred from a crash gives way to the request's own row, should that turn up.
    row_version UInt8 DEFAULT outcome != 'gateway_crash',
    -- Such rows are rare, and request_metrics_15s finds them by this.
    INDEX inferred row_version TYPE minmax GRANULARITY 8
)
ENGINE = {replicated}ReplacingMergeTree(row_version)
PARTITION BY toYYYYMM(started_at)
ORDER BY (team_id, started_at, event_id)
TTL toDateTime(started_at) + INTERVAL {raw_ttl_days} DAY
SETTINGS {deduplication_window} = 10000;
