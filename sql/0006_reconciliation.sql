-- How an engine was at a scrape: down, scaled_to_zero, asleep, loading, up or running; empty in rows that are older than the names. A row of a
-- server that did not answer is written again, as loading, when it turns out that its process was there already.
ALTER TABLE vllm_system_metrics{on_cluster}
    ADD COLUMN IF NOT EXISTS condition LowCardinality(String);

-- Why requests are not billed by what the engine did for them; empty where they are.
ALTER TABLE vllm_system_metrics{on_cluster}
    ADD COLUMN IF NOT EXISTS unsupported LowCardinality(String);

-- What the gateway attributed to requests since its page before, as the engine counts it; NULL where that is not known.
ALTER TABLE vllm_system_metrics{on_cluster}
    ADD COLUMN IF NOT EXISTS attributed_prompt_tokens Nullable(UInt64) CODEC(T64, ZSTD(1));

ALTER TABLE vllm_system_metrics{on_cluster}
    ADD COLUMN IF NOT EXISTS attributed_completion_tokens Nullable(UInt64) CODEC(T64, ZSTD(1));
