//! What the registry promises as a whole.

use super::*;
use crate::event::CapturedBy;
use crate::ledger::{Cause, Gap, NanoUsd, Totals};
use crate::vllm::SystemSample;
use crate::wire::endpoint::Endpoint;
use crate::wire::exchange::{GAP_BOUNDS_US, Gaps, UsageSource};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

fn event(team: &str, model: &str) -> RequestEvent {
    RequestEvent {
        event_id: "gw-1-1".into(),
        started_at_us: 1_700_000_000_000_000,
        team_id: team.into(),
        project: "".into(),
        user_id: "".into(),
        model: model.into(),
        base_model: None,
        upstream: "main".into(),
        endpoint: Endpoint::ChatCompletions.name(),
        priority: 0,
        stream: true,
        capture: CapturedBy::Proxy,
        status_code: 200,
        outcome: Outcome::Completed,
        finish_reason: "stop".into(),
        prompt_tokens: Some(10),
        cached_tokens: Some(4),
        completion_tokens: Some(5),
        reasoning_tokens: None,
        engine_prompt_tokens: Some(20),
        engine_completion_tokens: Some(5),
        usage_source: UsageSource::Reported,
        ttft_us: Some(200_000),
        duration_us: 1_000_000,
        queue_us: None,
        itl_mean_us: Some(200_000),
        itl_max_us: Some(200_000),
        chunks: 5,
        request_bytes: 100,
        response_bytes: 1_000,
        charge: NanoUsd(NanoUsd::USD / 4),
        gateway_overhead_us: Some(50),
        tap_ttft_us: None,
        tap_duration_us: None,
        request_id: "".into(),
        trace_id: "".into(),
        error_type: "".into(),
        gateway_id: "gw".into(),
        gaps: gaps_of(&[200_000; 4]),
    }
}

fn gaps_of(gaps_us: &[u64]) -> Gaps {
    let mut gaps = Gaps::default();
    for gap_us in gaps_us {
        gaps.count += 1;
        gaps.sum_us += gap_us;
        gaps.max_us = gaps.max_us.max(*gap_us);
        gaps.buckets[GAP_BOUNDS_US.partition_point(|bound| bound < gap_us)] += 1;
    }
    gaps
}

fn small(max_teams: usize, max_models: usize, max_combinations: usize) -> Metrics {
    Metrics::new(Limits {
        max_teams,
        max_models,
        max_combinations,
    })
    .unwrap()
}

/// The samples of the encoded text whose name and labels contain all `parts`.
fn samples(metrics: &Metrics, parts: &[&str]) -> Vec<(String, f64)> {
    let text = metrics.encode().unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let matching = lines.filter(|line| parts.iter().all(|part| line.contains(part)));
    matching
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

fn sum(metrics: &Metrics, parts: &[&str]) -> f64 {
    samples(metrics, parts).iter().map(|(_, value)| value).sum()
}

#[test]
fn one_request_lands_in_every_family_with_its_own_figures() {
    let metrics = small(10, 10, 10);
    metrics.record(&event("red", "opt"));
    let of = |parts: &[&str]| sum(&metrics, parts);
    let requests = samples(&metrics, &["gateway_requests_total{"]);
    assert_eq!(
        requests,
        [(
            "gateway_requests_total{endpoint=\"/v1/chat/completions\",model=\"opt\",outcome=\"completed\",\
             status=\"200\",team=\"red\"}"
                .to_owned(),
            1.0
        )]
    );
    assert_eq!(of(&["gateway_tokens_total", "type=\"prompt\""]), 10.0);
    assert_eq!(of(&["gateway_tokens_total", "type=\"cached\""]), 4.0);
    assert_eq!(of(&["gateway_tokens_total", "type=\"completion\""]), 5.0);
    assert_eq!(of(&["gateway_engine_tokens_total", "type=\"prompt\""]), 20.0);
    assert_eq!(
        samples(&metrics, &["gateway_charge_usd_total{"]),
        [(
            "gateway_charge_usd_total{model=\"opt\",team=\"red\"}".to_owned(),
            0.25
        )]
    );
    assert_eq!(of(&["gen_ai_server_request_duration_seconds_sum"]), 1.0);
    assert_eq!(of(&["gen_ai_server_time_to_first_token_seconds_sum"]), 0.2);
    assert_eq!(
        of(&["gen_ai_server_time_per_output_token_seconds_sum"]),
        0.2,
        "0.8 s for 4 tokens after the first"
    );
    assert_eq!(of(&["gateway_inter_token_latency_seconds_count"]), 4.0);
    assert_eq!(
        of(&["gateway_inter_token_latency_seconds_bucket", "le=\"0.15\""]),
        0.0
    );
    assert_eq!(
        of(&["gateway_inter_token_latency_seconds_bucket", "le=\"0.2\""]),
        4.0
    );
    assert_eq!(
        of(&["gateway_inter_token_latency_seconds_bucket", "le=\"+Inf\""]),
        4.0
    );
    assert_eq!(of(&["gateway_request_overhead_seconds_sum"]), 0.00005);
    assert_eq!(of(&["gateway_usage_source_total", "source=\"reported\""]), 1.0);
    assert_eq!(of(&["gateway_request_body_bytes_total", "team=\"red\""]), 100.0);
    assert_eq!(of(&["gateway_response_body_bytes_total", "team=\"red\""]), 1000.0);
}

#[test]
fn what_is_unknown_or_only_counted_adds_no_tokens() {
    let metrics = small(10, 10, 10);
    let counted = RequestEvent {
        usage_source: UsageSource::Counted,
        ..event("red", "opt")
    };
    let unknown = RequestEvent {
        prompt_tokens: None,
        cached_tokens: None,
        completion_tokens: None,
        engine_prompt_tokens: None,
        engine_completion_tokens: None,
        ttft_us: None,
        gateway_overhead_us: None,
        gaps: Gaps::default(),
        ..event("red", "opt")
    };
    metrics.record(&counted);
    metrics.record(&unknown);
    assert_eq!(
        samples(&metrics, &["tokens_total"]),
        [],
        "an unknown count is no series, not a zero"
    );
    assert_eq!(samples(&metrics, &["time_per_output_token"]), []);
    assert_eq!(
        sum(&metrics, &["gateway_usage_source_total", "source=\"counted\""]),
        1.0
    );
    assert_eq!(
        sum(&metrics, &["gen_ai_server_time_to_first_token_seconds_count"]),
        1.0
    );
    assert_eq!(sum(&metrics, &["gateway_requests_total"]), 2.0);
}

#[test]
fn a_request_that_is_charged_nothing_founds_no_series_of_money() {
    let metrics = small(10, 10, 10);
    metrics.record(&RequestEvent {
        charge: NanoUsd(0),
        ..event("red", "opt")
    });
    assert_eq!(samples(&metrics, &["gateway_charge_usd_total"]), []);
}

#[test]
fn usage_sources_are_those_of_requests_that_may_have_cost_tokens() {
    let metrics = small(10, 10, 10);
    let without = |outcome, status_code, endpoint: Endpoint| RequestEvent {
        outcome,
        status_code,
        endpoint: endpoint.name(),
        usage_source: UsageSource::None,
        ..event("red", "opt")
    };
    metrics.record(&without(Outcome::Completed, 200, Endpoint::Models));
    metrics.record(&without(Outcome::Refused, 400, Endpoint::ChatCompletions));
    metrics.record(&without(Outcome::ClientError, 404, Endpoint::ChatCompletions));
    assert_eq!(sum(&metrics, &["gateway_usage_source_total"]), 0.0);
    metrics.record(&without(Outcome::Aborted, 0, Endpoint::ChatCompletions));
    assert_eq!(
        sum(&metrics, &["gateway_usage_source_total", "source=\"none\""]),
        1.0
    );
}

#[test]
fn made_up_names_found_no_labels() {
    let metrics = small(2, 10, 100);
    let failed = |team: &str, model: &str, outcome, status_code| RequestEvent {
        outcome,
        status_code,
        ..event(team, model)
    };
    metrics.record(&failed("", "", Outcome::Refused, 400));
    metrics.record(&failed("typo", "opt", Outcome::Refused, 403));
    metrics.record(&failed("red", "made-up", Outcome::ClientError, 404));
    let teams = |team: &str| sum(&metrics, &["gateway_requests_total", &format!("team=\"{team}\"")]);
    assert_eq!(
        (teams("__none__"), teams("__other__"), teams("typo")),
        (1.0, 1.0, 0.0)
    );
    assert_eq!(
        sum(&metrics, &["gateway_requests_total", "model=\"__unknown__\""]),
        2.0
    );

    metrics.record(&event("red", "opt"));
    metrics.record(&failed("red", "opt", Outcome::ServerError, 500));
    assert_eq!(
        sum(
            &metrics,
            &["gateway_requests_total", "model=\"opt\"", "status=\"500\""]
        ),
        1.0
    );
    metrics.record(&failed("red", "opt", Outcome::Refused, 429));
    assert_eq!(
        teams("red"),
        4.0,
        "a team that is known keeps its name when it is refused"
    );
}

#[test]
fn past_the_limit_of_combinations_a_new_model_is_other_and_old_ones_go_on() {
    let metrics = small(10, 10, 2);
    for (team, model) in [
        ("red", "a"),
        ("blue", "a"),
        ("red", "b"),
        ("red", "c"),
        ("red", "a"),
        ("green", "a"),
    ] {
        metrics.record(&event(team, model));
    }
    let count = |team: &str, model: &str| {
        sum(
            &metrics,
            &[
                "gateway_requests_total",
                &format!("team=\"{team}\""),
                &format!("model=\"{model}\""),
            ],
        )
    };
    assert_eq!((count("red", "a"), count("blue", "a")), (2.0, 1.0));
    assert_eq!(
        (count("red", "__other__"), count("green", "__other__")),
        (2.0, 1.0)
    );
}

#[test]
fn a_gauge_goes_down_with_its_guard_even_when_a_task_unwinds() {
    let metrics = small(1, 1, 1);
    let inflight = |team: &str| sum(&metrics, &["gateway_inflight_requests", team]);
    let (red, second, blue) = (
        metrics.inflight("red"),
        metrics.inflight("red"),
        metrics.inflight("blue"),
    );
    assert_eq!((inflight("red"), inflight("__other__")), (2.0, 1.0));
    drop((red, blue));
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _guard = second;
        panic!("a task that fails");
    }));
    assert!(unwound.is_err());
    assert_eq!((inflight("red"), inflight("__other__")), (0.0, 0.0));
}

/// A registry in which every family has data.
fn full() -> Metrics {
    let metrics = small(10, 10, 10);
    metrics.record(&event("red", "facebook/opt-125m"));
    metrics.record(&event("quote\"back\\slash", "m"));
    std::mem::forget(metrics.inflight("red"));
    std::mem::forget(metrics.client_connection());
    metrics.refused("missing_team");
    metrics.injection("edited");
    let upstream = metrics.upstream("main");
    upstream.set_up(true);
    upstream.connect_failed();
    upstream.retried("stale_connection");
    std::mem::forget((
        upstream.inflight(),
        upstream.idle_connection(),
        upstream.active_connection(),
    ));
    metrics.scrape("main").record(&[system_sample()]);
    let (counted, attributed) = (totals(100, 50), totals(90, 50));
    let reconciliation = metrics.reconciliation("main");
    reconciliation.compared(counted, attributed);
    reconciliation.not_compared(totals(1, 2));
    let gap = Gap {
        counted,
        attributed,
        tokens: totals(10, 0),
    };
    reconciliation.judged(&gap, true, false, &[Cause::Direct]);
    metrics
}

fn totals(prompt_tokens: u64, completion_tokens: u64) -> Totals {
    Totals {
        prompt_tokens,
        completion_tokens,
    }
}

/// A scrape after which every value is known.
fn system_sample() -> SystemSample {
    SystemSample {
        upstream: "main".into(),
        model: "quote\"back\\slash".into(),
        ok: true,
        scrape_us: 2_500,
        running: Some(3.0),
        waiting: Some(1.0),
        kv_cache_usage: Some(0.5),
        prefix_cache_hit_ratio: Some(0.25),
        preemptions_total: Some(7),
        preemptions_delta: Some(1),
        prompt_tokens_total: Some(100),
        prompt_tokens_delta: Some(10),
        generation_tokens_total: Some(200),
        generation_tokens_delta: Some(20),
        request_success: [("stop".into(), 2)].into(),
        ..SystemSample::default()
    }
}

/// All names that are promised to dashboards; a rename here is a break for whoever uses them.
const NAMES: [&str; 46] = [
    "gateway_build_info",
    "gateway_charge_usd_total",
    "gateway_client_connections",
    "gateway_engine_tokens_total",
    "gateway_inflight_requests",
    "gateway_injection_total",
    "gateway_inter_token_latency_seconds",
    "gateway_reconciliation_attributed_tokens_total",
    "gateway_reconciliation_engine_tokens_total",
    "gateway_reconciliation_gap_cause",
    "gateway_reconciliation_gap_exceeded",
    "gateway_reconciliation_gap_tokens",
    "gateway_reconciliation_ratio",
    "gateway_reconciliation_uncompared_tokens_total",
    "gateway_refused_total",
    "gateway_request_body_bytes_total",
    "gateway_request_overhead_seconds",
    "gateway_requests_total",
    "gateway_response_body_bytes_total",
    "gateway_scrape_duration_seconds",
    "gateway_scrape_failures_total",
    "gateway_scrape_resets_total",
    "gateway_scrape_success",
    "gateway_start_time_seconds",
    "gateway_tokens_total",
    "gateway_upstream_condition",
    "gateway_upstream_connect_failures_total",
    "gateway_upstream_connections",
    "gateway_upstream_inflight",
    "gateway_upstream_retries_total",
    "gateway_upstream_unsupported",
    "gateway_upstream_up",
    "gateway_usage_source_total",
    "gateway_vllm_generation_tokens_total",
    "gateway_vllm_kv_cache_usage_ratio",
    "gateway_vllm_preemptions_total",
    "gateway_vllm_prefix_cache_hit_ratio",
    "gateway_vllm_prompt_tokens_total",
    "gateway_vllm_request_success_total",
    "gateway_vllm_requests_running",
    "gateway_vllm_requests_waiting",
    "gen_ai_server_request_duration_seconds",
    "gen_ai_server_time_per_output_token_seconds",
    "gen_ai_server_time_to_first_token_seconds",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
];

#[test]
fn every_family_has_its_promised_name() {
    let text = full().encode().unwrap();
    let families = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let found: Vec<&str> = families.collect();
    let on_this_system = |name: &&&str| cfg!(target_os = "linux") || !name.starts_with("process_");
    for name in NAMES.iter().filter(on_this_system) {
        assert!(found.contains(name), "{name} is missing among {found:?}");
    }
    let unexpected = found
        .iter()
        .filter(|name| !NAMES.contains(name) && !name.starts_with("process_"));
    assert_eq!(unexpected.count(), 0, "{found:?}");
}

#[test]
#[cfg_attr(
    target_os = "macos",
    ignore = "promtool comes with Debian's package of Prometheus"
)]
fn promtool_finds_nothing_to_complain_of() {
    let text = full().encode().unwrap();
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("this test needs promtool on PATH (Debian: apt-get install --no-install-recommends prometheus): {error}")
        });
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && complaints.is_empty(),
        "promtool ({}): {complaints}",
        output.status
    );
}

fn any_event() -> impl Strategy<Value = RequestEvent> {
    let source = prop_oneof![
        Just(UsageSource::Reported),
        Just(UsageSource::Continuous),
        Just(UsageSource::Counted),
        Just(UsageSource::None)
    ];
    let ended = prop_oneof![
        Just((200, Outcome::Completed)),
        Just((200, Outcome::Aborted)),
        Just((429, Outcome::Refused)),
        Just((500, Outcome::ServerError)),
    ];
    let tokens = proptest::option::of(0u64..10_000);
    let gaps = proptest::collection::vec(0u64..4_000_000, 0..20);
    (
        0u8..8,
        0u8..5,
        source,
        ended,
        tokens.clone(),
        tokens,
        gaps,
        0u64..100,
    )
        .prop_map(
            |(
                team,
                model,
                usage_source,
                (status_code, outcome),
                prompt_tokens,
                completion_tokens,
                gaps,
                usd,
            )| {
                RequestEvent {
                    usage_source,
                    status_code,
                    outcome,
                    prompt_tokens,
                    completion_tokens,
                    gaps: gaps_of(&gaps),
                    // Whole dollars, so that a sum of floats is exact.
                    charge: NanoUsd(usd * NanoUsd::USD),
                    ..event(&format!("t{team}"), &format!("m{model}"))
                }
            },
        )
}

proptest! {
    /// However tight the limits, nothing is lost: totals are those of the events, and a team that has a label has its own sum.
    #[test]
    fn sums_are_those_of_the_events(
        events in proptest::collection::vec(any_event(), 1..60),
        (teams, models, combinations) in (1usize..9, 1usize..6, 1usize..12),
    ) {
        let metrics = small(teams, models, combinations);
        (0..teams).for_each(|team| metrics.reserve_team(&format!("t{team}")));
        let mut by_team: BTreeMap<String, [f64; 4]> = BTreeMap::new();
        for event in &events {
            metrics.record(event);
            let named = event.team_id[1..].parse::<usize>().unwrap() < teams;
            let label = if named { event.team_id.to_string() } else { "__other__".to_owned() };
            let billed = matches!(event.usage_source, UsageSource::Reported | UsageSource::Continuous);
            let tokens = event.prompt_tokens.unwrap_or(0) + event.completion_tokens.unwrap_or(0);
            let totals = by_team.entry(label).or_default();
            totals[0] += 1.0;
            totals[1] += if billed { tokens as f64 } else { 0.0 };
            totals[2] += event.gaps.count as f64;
            totals[3] += (event.charge.0 / NanoUsd::USD) as f64;
        }
        for (team, expected) in by_team {
            let team = format!("team=\"{team}\"");
            let billed = sum(&metrics, &["gateway_tokens_total", &team, "type=\"prompt\""])
                + sum(&metrics, &["gateway_tokens_total", &team, "type=\"completion\""]);
            let found = [
                sum(&metrics, &["gateway_requests_total", &team]),
                billed,
                sum(&metrics, &["gateway_inter_token_latency_seconds_count", &team]),
                sum(&metrics, &["gateway_charge_usd_total", &team]),
            ];
            prop_assert_eq!(found, expected, "{}", team);
        }
    }
}
