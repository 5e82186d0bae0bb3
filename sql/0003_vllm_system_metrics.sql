-- What each replica of vLLM said of itself at each scrape. Counters are stored as they stood and as their growth since the scrape before (NULL after
-- a reset or at the first scrape); a family that the server does not have is NULL, which is unknown and not 0. A scrape that failed is a row too.
CREATE TABLE IF NOT EXISTS vllm_system_metrics{on_cluster}
(
    scraped_at DateTime64(3, 'UTC') CODEC(DoubleDelta, ZSTD(1)),
    gateway_id LowCardinality(String),
    upstream LowCardinality(String),
    model LowCardinality(String),
    ok Bool,
    error LowCardinality(String),
    scrape_us UInt64 CODEC(T64, ZSTD(1)),
    interval_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    engines UInt16,
    counter_reset Bool,
    running Nullable(Float64),
    waiting Nullable(Float64),
    kv_cache_usage Nullable(Float64),
    prefix_cache_hit_ratio Nullable(Float64),
    preemptions_total Nullable(UInt64) CODEC(T64, ZSTD(1)),
    prompt_tokens_total Nullable(UInt64) CODEC(T64, ZSTD(1)),
    generation_tokens_total Nullable(UInt64) CODEC(T64, ZSTD(1)),
    prompt_tokens_delta Nullable(UInt64) CODEC(T64, ZSTD(1)),
    generation_tokens_delta Nullable(UInt64) CODEC(T64, ZSTD(1)),
    prompt_tokens_per_second Nullable(Float64),
    generation_tokens_per_second Nullable(Float64),
    request_success Map(LowCardinality(String), UInt64),
    ttft_p50_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    ttft_p95_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    ttft_p99_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    itl_p50_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    itl_p95_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    itl_p99_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    queue_p50_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    queue_p95_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    queue_p99_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    prefill_p50_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    prefill_p95_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    prefill_p99_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    decode_p50_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    decode_p95_us Nullable(UInt64) CODEC(T64, ZSTD(1)),
    decode_p99_us Nullable(UInt64) CODEC(T64, ZSTD(1))
)
ENGINE = {replicated}ReplacingMergeTree
PARTITION BY toYYYYMM(scraped_at)
ORDER BY (upstream, model, gateway_id, scraped_at)
TTL toDateTime(scraped_at) + INTERVAL {raw_ttl_days} DAY
SETTINGS {deduplication_window} = 10000;
