//! The limits of all teams together.

use super::*;
use crate::config::{Config, Env};
use crate::event::Context;
use crate::metrics::Limits;
use crate::wire::exchange::{Ending, Facts};
use proptest::prelude::*;

const START: Now = Now {
    at: At(1_000_000_000),
    wall: Micros(1_795_355_334_000_000),
};

fn limiter(max_teams: usize, limits: &str) -> Limiter {
    let env: Env<'_> = &|_| None;
    let config = Config::parse("c.yaml", &format!("limits: {limits}"), env).unwrap();
    let labels = Limits {
        max_teams,
        ..Limits::default()
    };
    Limiter::new(&config.limits, Metrics::new(labels).unwrap())
}

fn start() -> Now {
    START
}

/// What a team's request is met with.
fn ask(limiter: &Limiter, team: &str) -> Result<Option<Permit>, LimitKind> {
    limiter.admit(team, start).map_err(|denial| denial.limit)
}

fn refused(limiter: &Limiter, team: &str) -> Option<LimitKind> {
    ask(limiter, team).err()
}

#[test]
fn a_team_without_limits_is_let_in_and_leaves_nothing_behind() {
    let limiter = limiter(10, "{teams: [{team: a, requests_per_minute: 1}, {team: free}]}");
    for team in ["b", "free"] {
        for _ in 0..100 {
            assert!(ask(&limiter, team).unwrap().is_none(), "{team}");
        }
    }
    assert_eq!(limiter.teams().len(), 1);
    assert_eq!(refused(&limiter, "a"), None);
    assert_eq!(refused(&limiter, "a"), Some(LimitKind::Requests));
    assert_eq!(refused(&limiter, "b"), None, "of another team it is no affair");
}

#[test]
fn a_refused_request_uses_nothing_of_the_other_limits() {
    let limiter = limiter(10, "{default: {requests_per_minute: 5, concurrent_requests: 1}}");
    let held = ask(&limiter, "a").unwrap();
    for _ in 0..10 {
        assert_eq!(refused(&limiter, "a"), Some(LimitKind::Concurrent));
    }
    drop(held);
    let standing = limiter.team("a").unwrap().standing(START);
    assert_eq!(standing.requests.unwrap().used, 1);
    assert_eq!(standing.concurrent.unwrap().used, 0);
}

#[test]
fn a_denial_says_which_limit_how_much_and_when() {
    let limiter = limiter(
        10,
        "{teams: [{team: a, requests_per_minute: 2, tokens_per_minute: 60}]}",
    );
    for _ in 0..2 {
        ask(&limiter, "a").unwrap();
    }
    let denial = limiter.admit("a", start).unwrap_err();
    assert_eq!((denial.limit, denial.retry_after_s()), (LimitKind::Requests, 30));
    assert_eq!(
        denial.message(),
        "The requests of team a are at their limit of 2 a minute (requests_per_minute). Try again in 30 s."
    );
    assert_eq!(
        denial.fields(),
        "retry-after: 30\r\nx-ratelimit-limit-requests: 2\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 60s\r\n\
         x-ratelimit-limit-tokens: 60\r\nx-ratelimit-remaining-tokens: 60\r\nx-ratelimit-reset-tokens: 0s\r\n"
    );
    // Of two limits the one that lasts longer is the one to wait for.
    limiter.team("a").unwrap().take_tokens(100, START.at);
    let denial = limiter.admit("a", start).unwrap_err();
    assert_eq!((denial.limit, denial.retry_after_s()), (LimitKind::Tokens, 41));
    assert!(denial.message().contains("100 are used"), "{}", denial.message());
    assert_eq!(
        (denial.code(), denial.reason()),
        ("rate_limit_exceeded", "tokens_per_minute_exceeded")
    );
}

#[test]
fn a_place_is_given_back_however_the_request_ends() {
    let limiter = limiter(10, "{default: {concurrent_requests: 2}}");
    let first = ask(&limiter, "a").unwrap();
    let second = ask(&limiter, "a").unwrap();
    assert_eq!(refused(&limiter, "a"), Some(LimitKind::Concurrent));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _held = first;
        panic!("a request that goes wrong");
    }));
    assert!(panicked.is_err());
    assert_eq!(refused(&limiter, "a"), None);
    drop(second);
    assert_eq!(
        limiter
            .team("a")
            .unwrap()
            .standing(START)
            .concurrent
            .unwrap()
            .used,
        0
    );
}

#[test]
fn a_spent_budget_refuses_until_the_period_is_over() {
    let limiter = limiter(10, "{default: {budget: {usd: 1, period: day}}}");
    assert_eq!(refused(&limiter, "a"), None);
    let team = limiter.team("a").unwrap();
    team.charge(START.wall, NanoUsd(NanoUsd::USD - 1));
    assert_eq!(refused(&limiter, "a"), None, "not all of it");
    team.charge(START.wall, NanoUsd(2));
    let denial = limiter.admit("a", start).unwrap_err();
    assert_eq!(
        (denial.code(), denial.kind()),
        ("budget_exceeded", "insufficient_quota")
    );
    assert_eq!(
        denial.message(),
        "The budget of team a, 1 USD a day, is spent: 1.000000001 USD are charged. The next one begins at 2026-11-23."
    );
    // 13:48:54 on the 22nd.
    assert_eq!(denial.retry_after_s(), 10 * 3600 + 11 * 60 + 6);
    assert!(
        denial
            .fields()
            .contains("x-ratelimit-remaining-budget-usd: 0\r\n"),
        "{}",
        denial.fields()
    );
    assert_eq!(refused(&limiter, "b"), None);
    let tomorrow = || Now {
        wall: Micros(START.wall.0 + 86_400_000_000),
        ..START
    };
    assert!(limiter.admit("a", tomorrow).is_ok());
}

#[test]
fn what_is_only_observed_refuses_nothing_and_is_counted_as_if_it_had() {
    let limiter = limiter(
        10,
        "{mode: observe, default: {requests_per_minute: 3, concurrent_requests: 2}}",
    );
    let held: Vec<_> = (0..10).map(|_| ask(&limiter, "a").unwrap()).collect();
    assert_eq!(held.iter().flatten().count(), 2, "eight of them hold no place");
    let team = limiter.team("a").unwrap();
    assert_eq!(team.limited(LimitKind::Concurrent, Action::Observed), Some(8));
    assert_eq!(team.limited(LimitKind::Concurrent, Action::Refused), None);
    drop(held);
    for _ in 0..5 {
        ask(&limiter, "a").unwrap();
    }
    assert_eq!(team.limited(LimitKind::Requests, Action::Observed), Some(4));
    let standing = team.standing(START);
    assert_eq!(
        (standing.requests.unwrap().used, standing.concurrent.unwrap().used),
        (3, 0)
    );
}

#[test]
fn a_budget_can_be_observed_while_limits_are_enforced() {
    let limiter = limiter(
        10,
        "{default: {requests_per_minute: 2, budget: {usd: 1, at_limit: observe}}}",
    );
    ask(&limiter, "a").unwrap();
    let team = limiter.team("a").unwrap();
    team.charge(START.wall, NanoUsd(NanoUsd::USD));
    assert_eq!(refused(&limiter, "a"), None);
    assert_eq!(refused(&limiter, "a"), Some(LimitKind::Requests));
    assert_eq!(team.limited(LimitKind::Budget, Action::Observed), Some(2));
    assert_eq!(team.limited(LimitKind::Requests, Action::Refused), Some(1));
}

#[test]
fn whoever_makes_up_names_shares_one_allowance_in_the_end() {
    let limiter = limiter(
        3,
        "{default: {requests_per_minute: 2}, teams: [{team: own, requests_per_minute: 1}]}",
    );
    let mut let_in = 0;
    for name in 0..1_000 {
        let_in += u32::from(refused(&limiter, &format!("made-up-{name}")).is_none());
    }
    // Two names besides that of the configuration, one request each; and two of all the others.
    assert_eq!(let_in, 2 + 2);
    assert_eq!(limiter.teams().len(), 4);
    let denial = limiter.admit("honest", start).unwrap_err();
    assert!(
        denial
            .message()
            .contains("team honest (which shares its limits with all teams of __other__)"),
        "{}",
        denial.message()
    );
    assert_eq!(
        refused(&limiter, "own"),
        None,
        "the configuration's teams have their own"
    );
}

fn elsewhere(amounts: &[(&str, u64)], rest: u64) -> Elsewhere {
    Elsewhere {
        from: "2026-11-01".parse().unwrap(),
        by_team: amounts
            .iter()
            .map(|(team, amount)| ((*team).into(), NanoUsd(*amount)))
            .collect(),
        rest: NanoUsd(rest),
    }
}

fn spent(limiter: &Limiter, team: &str) -> u64 {
    limiter
        .team(team)
        .unwrap()
        .standing(START)
        .budget
        .unwrap()
        .spent
        .0
}

#[test]
fn what_was_charged_elsewhere_counts_also_for_teams_that_come_later() {
    let limiter = limiter(
        3,
        "{default: {budget: {usd: 1}}, teams: [{team: own, budget: {usd: 1}}]}",
    );
    ask(&limiter, "a").unwrap();
    limiter.learn(
        BudgetPeriod::Month,
        elsewhere(&[("own", 1), ("a", 2), ("b", 3), ("c", 4), ("d", 5)], 10),
    );
    limiter.team("a").unwrap().charge(START.wall, NanoUsd(100));
    assert_eq!((spent(&limiter, "own"), spent(&limiter, "a")), (1, 102));
    for team in ["b", "c"] {
        ask(&limiter, team).unwrap();
    }
    // There is a label for b and none for c.
    assert_eq!(
        (spent(&limiter, "b"), spent(&limiter, "__other__")),
        (3, 4 + 5 + 10)
    );
    limiter.learn(BudgetPeriod::Month, elsewhere(&[("own", 7)], 1));
    assert_eq!(
        (
            spent(&limiter, "own"),
            spent(&limiter, "a"),
            spent(&limiter, "__other__")
        ),
        (7, 100, 1)
    );
    limiter.learn(BudgetPeriod::Day, elsewhere(&[("own", 1_000)], 0));
    assert_eq!(spent(&limiter, "own"), 7, "its budget is by the month");
}

proptest! {
    /// Requests that come and go at once, of any teams: none has more than it may, and in the end all places are free.
    #[test]
    fn no_team_has_more_places_than_it_may(steps in prop::collection::vec((0_usize..3, any::<bool>()), 0..200)) {
        let limiter = limiter(10, "{default: {concurrent_requests: 3}}");
        let mut held: [Vec<Option<Permit>>; 3] = Default::default();
        for (team, comes) in steps {
            if comes {
                let had_room = held[team].len() < 3;
                let asked = ask(&limiter, &format!("team-{team}"));
                prop_assert_eq!(asked.is_ok(), had_room);
                held[team].extend(asked.ok());
            } else {
                held[team].pop();
            }
        }
        drop(held);
        for team in limiter.teams() {
            prop_assert_eq!(team.standing(START).concurrent.unwrap().used, 0);
        }
    }
}

/// An event of a request that used 30 tokens.
fn event(team: &str, capture: CapturedBy, charge: u64) -> RequestEvent {
    let context = Context {
        event_id: "e".into(),
        started_at_us: START.wall.0 as i64,
        gateway_id: "gw".into(),
        team: Some(team.into()),
        project: None,
        user: None,
        upstream: Some("chat".into()),
        request_id: "r".into(),
        trace_id: None,
        status: Some(200),
        error_type: None,
        gateway_overhead_us: None,
        tap: None,
    };
    let mut facts = Facts::unread(At(0), At(1_000), Ending::Complete);
    facts.tokens = Tokens {
        prompt: Some(10),
        completion: Some(20),
        ..Tokens::default()
    };
    let mut event = RequestEvent::new(context, facts, capture);
    event.charge = NanoUsd(charge);
    event
}

#[test]
fn what_goes_past_the_proxy_uses_tokens_and_budget_and_others_tokens_are_taken_elsewhere() {
    let limiter = limiter(10, "{default: {tokens_per_minute: 100, budget: {usd: 1}}}");
    let used = |team: &str| {
        let standing = limiter.team(team)?.standing(Now::read());
        Some((
            standing.tokens?.used,
            limiter.team(team)?.standing(START).budget?.spent.0,
        ))
    };
    limiter.record(&event("direct", CapturedBy::Tap, 7));
    assert_eq!(used("direct"), Some((30, 7)));
    limiter.record(&event("proxied", CapturedBy::Proxy, 7));
    limiter.record(&event("proxied", CapturedBy::ProxyAndTap, 8));
    assert_eq!(used("proxied"), Some((0, 15)), "their permits take the tokens");
    // Whom nobody named has no limits, and what was not charged founds none.
    limiter.record(&event("__direct__", CapturedBy::Tap, 7));
    limiter.record(&event("free", CapturedBy::Proxy, 0));
    assert_eq!((used("__direct__"), used("free")), (None, None));
}
