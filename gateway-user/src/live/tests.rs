//! Live state against the metrics that are counted beside it.

use super::*;
use crate::books::Books;
use crate::config::Config;
use crate::event::{CapturedBy, Sinks};
use crate::identity::TeamId;
use crate::ledger::NanoUsd;
use crate::limits::Limiter;
use crate::metrics::Limits;
use crate::proxy::Shared;
use crate::wire::At;
use crate::wire::exchange::{Ending, Facts, Gaps, UsageSource};
use proptest::prelude::*;

/// A gateway's parts, without its servers.
struct Parts {
    metrics: Metrics,
    live: Arc<Live>,
    shared: Arc<Shared>,
    view: View,
}

fn parts(max_teams: usize, own_lists: &[&str]) -> Parts {
    let config = Config::default();
    let metrics = Metrics::new(Limits {
        max_teams,
        ..Limits::default()
    })
    .unwrap();
    let names = config.upstreams.iter().map(|upstream| upstream.name.as_str());
    let live = Arc::new(Live::new(metrics.clone(), names, own_lists.iter().copied()));
    let books = Books::new(&config, Sinks::new([]));
    let limiter = Arc::new(Limiter::new(&config.limits, metrics.clone()));
    let shared = Shared::new(config, metrics.clone(), books, limiter, None);
    Parts {
        view: View::new(Arc::clone(&live), Arc::clone(&shared), None, None),
        shared,
        metrics,
        live,
    }
}

fn event(team: &str, tokens: u64) -> RequestEvent {
    let facts = Facts::unread(At(0), At(1_000_000), Ending::Complete);
    let context = crate::event::Context {
        event_id: "gw-1".into(),
        started_at_us: 1,
        gateway_id: "gw".into(),
        team: Some(team.into()),
        project: None,
        user: None,
        upstream: Some("chat".into()),
        request_id: "r".into(),
        trace_id: None,
        status: Some(200),
        error_type: None,
        gateway_overhead_us: Some(40),
        tap: None,
    };
    RequestEvent {
        outcome: Outcome::Completed,
        usage_source: UsageSource::Reported,
        prompt_tokens: Some(tokens),
        completion_tokens: Some(2 * tokens),
        charge: NanoUsd(tokens),
        gaps: Gaps::default(),
        ..RequestEvent::new(context, facts, CapturedBy::Proxy)
    }
}

fn record(parts: &Parts, event: &RequestEvent) {
    parts.metrics.record(event);
    EventSink::record(&*parts.live, event);
}

/// The sum of a family over the series that hold all of `labels`.
fn metric(metrics: &Metrics, family: &str, labels: &[String]) -> u64 {
    let text = metrics.encode().unwrap();
    let lines = text.lines().filter(|line| {
        line.starts_with(&format!("{family}{{")) && labels.iter().all(|label| line.contains(label))
    });
    lines
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum()
}

#[test]
fn however_many_teams_come_the_state_is_bounded_and_nothing_is_lost() {
    let parts = parts(3, &["own"]);
    for number in 0..500_u64 {
        record(&parts, &event(&format!("team-{number}"), 1));
    }
    record(&parts, &event("own", 7));
    let teams = parts.view.teams(&Show::All).teams;
    let names: Vec<_> = teams.iter().map(|row| row.team.as_str()).collect();
    assert_eq!(
        names,
        ["__other__", "own", "team-0", "team-1"],
        "and a team with a token has its place"
    );
    assert_eq!(teams.iter().map(|row| row.requests_total).sum::<u64>(), 501);
    let requests = parts.view.requests(&Show::All, usize::MAX).requests;
    assert_eq!(requests.len(), REQUESTS_MAX);
    assert_eq!((requests[0].sequence, &*requests[0].team), (501, "own"));
    for _ in 0..TEAM_REQUESTS_MAX + 5 {
        record(&parts, &event("own", 1));
    }
    let own = Show::Team(team_id("own"));
    assert_eq!(
        parts.view.requests(&own, usize::MAX).requests.len(),
        TEAM_REQUESTS_MAX
    );
}

fn team_id(name: &str) -> TeamId {
    TeamId::parse(name.as_bytes()).unwrap()
}

#[test]
fn a_team_sees_its_own_and_nothing_that_tells_of_others() {
    let parts = parts(10, &["red"]);
    record(&parts, &event("red", 5));
    record(&parts, &event("blue", 9));
    let busy = parts.metrics.inflight("blue");
    let red = Show::Team(team_id("red"));
    let seen = serde_json::to_string(&parts.view.snapshot(&red, 0)).unwrap();
    assert!(
        seen.contains("\"team\":\"red\"") && !seen.contains("blue"),
        "{seen}"
    );
    assert!(
        seen.contains("\"reconciliation\":null") && seen.contains("\"scope\":\"team:red\""),
        "{seen}"
    );
    for hidden in [
        "in_flight\":null",
        "busy_share\":null",
        "running\":null",
        "url\":null",
        "condition\":\"up\"",
    ] {
        assert!(seen.contains(hidden), "{hidden} in {seen}");
    }
    let all = parts.view.teams(&Show::All).teams;
    assert_eq!(all.len(), 2);
    assert_eq!(all[0].in_flight, 1);
    drop(busy);
}

#[test]
fn a_team_whose_first_request_runs_is_there_and_an_event_only_adds_what_is_new() {
    let parts = parts(10, &[]);
    let running = parts.metrics.inflight("red");
    let row = parts.view.teams(&Show::All).teams.remove(0);
    assert_eq!(
        (row.team.as_str(), row.in_flight, row.requests_total),
        ("red", 1, 0)
    );
    drop(running);
    record(&parts, &event("red", 1));
    record(&parts, &event("red", 1));
    let sequences = |after| {
        let rows = parts.view.snapshot(&Show::All, after).requests;
        rows.iter().map(|row| row.sequence).collect::<Vec<_>>()
    };
    assert_eq!(
        (sequences(0), sequences(1), sequences(2)),
        (vec![2, 1], vec![2], vec![])
    );
}

#[test]
fn an_upstream_that_is_down_says_no_more_what_it_said_last() {
    let parts = parts(10, &[]);
    let sample = SystemSample {
        upstream: "chat".into(),
        model: "m".into(),
        ok: true,
        running: Some(2.0),
        waiting: Some(1.0),
        kv_cache_usage: Some(0.5),
        ..SystemSample::default()
    };
    SampleSink::record(&*parts.live, &sample);
    let row = |at: usize| parts.view.upstreams(&Show::All).upstreams.remove(at);
    let chat = row(0);
    assert_eq!(
        (chat.condition, chat.running, chat.kv_cache_usage),
        ("queueing", Some(2.0), Some(0.5))
    );
    assert_eq!(row(1).running, None, "of the other nothing is known");
    let upstream = parts.shared.upstreams.iter().next().unwrap();
    upstream.set_up(false);
    let chat = row(0);
    assert_eq!((chat.condition, chat.up, chat.running), ("down", false, None));
}

proptest! {
    /// Whatever comes, in whatever order: the totals are those of the metrics.
    #[test]
    fn totals_are_those_of_the_metrics(
        events in proptest::collection::vec((0_u8..6, 0_u64..1_000, 0_u8..4, 0_u8..5), 1..40),
        max_teams in 1_usize..6,
    ) {
        let parts = parts(max_teams, &[]);
        for (team, tokens, source, outcome) in &events {
            let usage_source = [UsageSource::Reported, UsageSource::Continuous, UsageSource::Counted, UsageSource::None][*source as usize];
            let outcome = [Outcome::Completed, Outcome::Aborted, Outcome::Refused, Outcome::ServerError, Outcome::ClientError][*outcome as usize];
            let team = if *team == 0 { String::new() } else { format!("t{team}") };
            record(&parts, &RequestEvent { usage_source, outcome, team_id: team.into(), engine_prompt_tokens: Some(*tokens), ..event("", *tokens) });
        }
        for row in parts.view.teams(&Show::All).teams {
            let team = format!("team=\"{}\"", row.team);
            let of = |family: &str, more: &[&str]| {
                let labels: Vec<String> = more.iter().map(|label| (*label).to_owned()).chain([team.clone()]).collect();
                metric(&parts.metrics, family, &labels)
            };
            prop_assert_eq!(row.requests_total, of("gateway_requests_total", &[]));
            prop_assert_eq!(row.prompt_tokens_total, of("gateway_tokens_total", &["type=\"prompt\""]));
            prop_assert_eq!(row.completion_tokens_total, of("gateway_tokens_total", &["type=\"completion\""]));
            prop_assert_eq!(row.engine_prompt_tokens_total, of("gateway_engine_tokens_total", &["type=\"prompt\""]));
        }
    }
}
