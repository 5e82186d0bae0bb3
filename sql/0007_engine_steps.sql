-- Steps of the engine, as a counter and as its growth since the scrape before: what each step takes whatever is in it is told from what its contents take
-- (vllm-gateway calibrate).
ALTER TABLE vllm_system_metrics{on_cluster}
    ADD COLUMN IF NOT EXISTS engine_steps_total Nullable(UInt64) CODEC(T64, ZSTD(1));

ALTER TABLE vllm_system_metrics{on_cluster}
    ADD COLUMN IF NOT EXISTS engine_steps_delta Nullable(UInt64) CODEC(T64, ZSTD(1));
