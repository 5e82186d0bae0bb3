-- What a batch's rows add to the windows: the columns of request_metrics but its revision, in their order. No migration of its own, but a part of
-- the view that fills request_metrics, of what request_metrics_15s reads besides, and of what writes a batch's windows anew (store/windows.rs).
    toStartOfInterval(toDateTime(ended_at, 'UTC'), INTERVAL 15 SECOND) AS window_start,
    team_id,
    project,
    model,
    batch,
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
    -- How long a request took that a crash cut off, nobody knows.
    quantilesTDigestState(0.5, 0.95, 0.99)(if(outcome = 'gateway_crash', NULL, duration_us)) AS latency_state,
    quantilesTDigestState(0.5, 0.95, 0.99)(ttft_us) AS ttft_state,
    quantilesTDigestState(0.5, 0.95, 0.99)(itl_mean_us) AS itl_state
