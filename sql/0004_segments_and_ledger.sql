-- The work of a request within one window at one upstream: what the ledger is computed from.
CREATE TABLE IF NOT EXISTS request_segments{on_cluster}
(
    window_start DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
    upstream LowCardinality(String),
    event_id String CODEC(ZSTD(1)),
    team_id LowCardinality(String),
    project LowCardinality(String),
    model LowCardinality(String),
    run_start DateTime64(6, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    run_end DateTime64(6, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    prompt_tokens UInt64 CODEC(T64, ZSTD(1)),
    cached_tokens UInt64 CODEC(T64, ZSTD(1)),
    completion_tokens UInt64 CODEC(T64, ZSTD(1)),
    kv_token_seconds Float64,
    gateway_id LowCardinality(String),
    batch LowCardinality(String)
)
ENGINE = {replicated}ReplacingMergeTree
PARTITION BY toYYYYMM(window_start)
ORDER BY (upstream, window_start, event_id)
TTL window_start + INTERVAL {raw_ttl_days} DAY
SETTINGS {deduplication_window} = 10000;

-- What each window cost whom. Rows are versioned: the highest revision of a key counts. Kept apart from raw data, and longer: it is the bill.
CREATE TABLE IF NOT EXISTS cost_ledger{on_cluster}
(
    window_start DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
    upstream LowCardinality(String),
    team_id LowCardinality(String),
    project LowCardinality(String),
    model LowCardinality(String),
    busy_us UInt64 CODEC(T64, ZSTD(1)),
    prompt_tokens UInt64 CODEC(T64, ZSTD(1)),
    completion_tokens UInt64 CODEC(T64, ZSTD(1)),
    cost_nano_usd Int64 CODEC(T64, ZSTD(1)),
    method LowCardinality(String),
    revision UInt64,
    state LowCardinality(String)
)
ENGINE = {replicated}ReplacingMergeTree(revision)
PARTITION BY toYYYYMM(window_start)
ORDER BY (upstream, window_start, team_id, project, model)
TTL window_start + INTERVAL {ledger_ttl_days} DAY;

-- Timings that the kernel probe of one gateway took of another gateway's requests, joined by event_id.
CREATE TABLE IF NOT EXISTS tap_timings{on_cluster}
(
    event_id String CODEC(ZSTD(1)),
    seen_at DateTime64(6, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    seen_by LowCardinality(String),
    ttft_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    duration_us UInt64 CODEC(T64, ZSTD(1)),
    batch LowCardinality(String)
)
ENGINE = {replicated}ReplacingMergeTree
PARTITION BY toYYYYMM(seen_at)
ORDER BY (event_id, seen_by)
TTL toDateTime(seen_at) + INTERVAL {raw_ttl_days} DAY
SETTINGS {deduplication_window} = 10000;
