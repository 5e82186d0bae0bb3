-- When a row came to be here, by ClickHouse's clock: the ledger asks for windows to which something was added late.
ALTER TABLE request_segments{on_cluster}
    ADD COLUMN IF NOT EXISTS stored_at DateTime('UTC') DEFAULT now() CODEC(DoubleDelta, ZSTD(1));

ALTER TABLE request_segments{on_cluster}
    ADD INDEX IF NOT EXISTS arrivals stored_at TYPE minmax GRANULARITY 1;

-- The heads of the ledger's statements: one row for each window of each upstream that was computed, with what its rows in cost_ledger sum to
-- and what they were computed from. The highest revision counts.
CREATE TABLE IF NOT EXISTS ledger_windows{on_cluster}
(
    window_start DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
    upstream LowCardinality(String),
    -- Price times time. The window's rows in cost_ledger sum to it.
    bill_nano_usd Int64 CODEC(T64, ZSTD(1)),
    busy_us UInt64 CODEC(T64, ZSTD(1)),
    segments UInt64 CODEC(T64, ZSTD(1)),
    -- Of the segments: what requests are known to have used.
    prompt_tokens UInt64 CODEC(T64, ZSTD(1)),
    completion_tokens UInt64 CODEC(T64, ZSTD(1)),
    -- What the engine's counters grew by; NULL where they were not seen on both sides of the window.
    engine_prompt_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    engine_completion_tokens Nullable(UInt64) CODEC(T64, ZSTD(1)),
    -- What is settled of the difference: the tokens of __unattributed__.
    unattributed_prompt_tokens UInt64 CODEC(T64, ZSTD(1)),
    unattributed_completion_tokens UInt64 CODEC(T64, ZSTD(1)),
    -- A hash of the segments and of how the engine was: with the columns above, all that the rows follow from but the rules.
    facts UInt64 CODEC(ZSTD(1)),
    -- Price and method, in words: an old bill can be explained when the config has changed.
    rules LowCardinality(String),
    revision UInt64 CODEC(T64, ZSTD(1)),
    state LowCardinality(String),
    gateway_id LowCardinality(String),
    computed_at DateTime64(3, 'UTC') DEFAULT now64(3) CODEC(DoubleDelta, ZSTD(1))
)
ENGINE = {replicated}ReplacingMergeTree(revision)
PARTITION BY toYYYYMM(window_start)
ORDER BY (upstream, window_start)
TTL window_start + INTERVAL {ledger_ttl_days} DAY
SETTINGS {deduplication_window} = 10000;

-- What each segment of a request cost: the rows of cost_ledger, divided once more, to the nano-USD. Kept as long as the requests themselves.
CREATE TABLE IF NOT EXISTS segment_costs{on_cluster}
(
    window_start DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
    upstream LowCardinality(String),
    event_id String CODEC(ZSTD(1)),
    team_id LowCardinality(String),
    project LowCardinality(String),
    model LowCardinality(String),
    busy_us UInt64 CODEC(T64, ZSTD(1)),
    cost_nano_usd Int64 CODEC(T64, ZSTD(1)),
    revision UInt64 CODEC(T64, ZSTD(1)),
    state LowCardinality(String)
)
ENGINE = {replicated}ReplacingMergeTree(revision)
PARTITION BY toYYYYMM(window_start)
ORDER BY (upstream, window_start, event_id)
TTL window_start + INTERVAL {raw_ttl_days} DAY
SETTINGS {deduplication_window} = 10000;

-- What each request cost, over all windows that it ran in. It is final when its state is not provisional.
CREATE VIEW IF NOT EXISTS request_costs{on_cluster} AS
SELECT
    event_id,
    any(upstream) AS upstream,
    any(team_id) AS team_id,
    any(project) AS project,
    any(model) AS model,
    min(window_start) AS first_window_start,
    count() AS windows,
    sum(busy_us) AS busy_us,
    sum(cost_nano_usd) AS cost_nano_usd,
    if(countIf(state = 'provisional') > 0, 'provisional', if(countIf(state = 'restated') > 0, 'restated', 'settled')) AS state
FROM segment_costs FINAL
GROUP BY event_id;

-- Months that are closed: nothing writes to their windows any more, and what comes late for them is only counted.
CREATE TABLE IF NOT EXISTS ledger_months{on_cluster}
(
    month Date,
    bill_nano_usd Int64,
    windows UInt64,
    closed_by LowCardinality(String),
    closed_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = {replicated}ReplacingMergeTree(closed_at)
ORDER BY month;
