//! What must hold of every window, whatever happened in it.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::select;

use super::facts::{DOWN, IDLE, LOADING, SCALED_TO_ZERO, UNATTRIBUTED};
use super::*;
use crate::config::IdleTo;
use crate::identity::TeamId;

/// Somewhere in 2026, at the start of a window.
const START_US: u64 = 1_780_000_005 * 1_000_000;

const SECOND_US: u64 = 1_000_000;

const EDITION: Edition = Edition {
    revision: 1,
    state: State::Provisional,
};

fn window() -> Window {
    Window::at(Micros(START_US))
}

/// A span within the window, in microseconds from its start.
fn span(from_us: u64, to_us: u64) -> Span {
    Span::new(Micros(START_US + from_us), Micros(START_US + to_us))
}

fn segment(event: &str, team: &str, run: Span, work: Work) -> Segment {
    Segment {
        event_id: event.into(),
        account: Account {
            team_id: team.into(),
            project: "".into(),
            model: "m".into(),
        },
        run,
        work,
    }
}

fn tokens(prompt_tokens: u64, completion_tokens: u64) -> Work {
    Work {
        prompt_tokens,
        completion_tokens,
        ..Work::default()
    }
}

fn price_from(moment: Micros, nano_usd_per_hour: u64) -> Price {
    Price {
        from: moment,
        usd_per_gpu_hour: NanoUsd(nano_usd_per_hour),
        ..Price::ASSUMED
    }
}

/// 1 nano-USD for each microsecond: 15 000 000 for a window.
fn nano_a_microsecond() -> PriceList {
    PriceList::new(vec![price_from(Micros(0), 3_600_000_000)]).unwrap()
}

fn method(theta: u32, idle: IdleTo) -> Method {
    Method::new(Millionths::new(theta), Weights::ASSUMED, idle).unwrap()
}

/// Rows of a window about which nothing is said but this.
fn rows_of(segments: &[Segment], engine: &EngineView, prices: &PriceList, method: &Method) -> Vec<CostRow> {
    let facts = WindowFacts {
        window: window(),
        upstream: "chat",
        prices,
        segments,
        engine,
        accounts_before: &[],
    };
    allocate(&facts, method, EDITION)
}

fn plain(segments: &[Segment]) -> Vec<CostRow> {
    rows_of(
        segments,
        &EngineView::default(),
        &nano_a_microsecond(),
        &method(500_000, IdleTo::Separate),
    )
}

fn total(rows: &[CostRow]) -> NanoUsd {
    rows.iter().map(|row| row.cost).sum()
}

/// What each team or line pays, over its projects and models.
fn by_team(rows: &[CostRow]) -> BTreeMap<&str, u64> {
    let mut sums = BTreeMap::new();
    for row in rows {
        *sums.entry(&*row.account.team_id).or_default() += row.cost.0;
    }
    sums
}

fn is_running(row: &CostRow) -> bool {
    let team = &*row.account.team_id;
    &*row.account.model != IDLE && ![IDLE, LOADING, DOWN, SCALED_TO_ZERO].contains(&team)
}

fn engine(spans: &[(Span, Condition)], counted: Option<Work>) -> EngineView {
    let seen = |(span, condition): &(Span, Condition)| EngineSpan {
        at: Micros((span.from().0 + span.to().0) / 2),
        span: *span,
        condition: *condition,
    };
    EngineView {
        spans: spans.iter().map(seen).collect(),
        counted,
    }
}

#[test]
fn a_request_alone_pays_for_the_time_in_which_it_ran_and_idle_time_has_its_line() {
    let rows = plain(&[segment("e", "search", span(0, 6 * SECOND_US), tokens(10, 20))]);
    assert_eq!(by_team(&rows), [("search", 6_000_000), (IDLE, 9_000_000)].into());
    let row = rows.iter().find(|row| &*row.account.team_id == "search").unwrap();
    assert_eq!(
        (row.busy_us, row.prompt_tokens, row.completion_tokens),
        (6_000_000, 10, 20)
    );
    assert_eq!(&*row.method, "v1 theta=0.5 a=1 b=4 c=0.04 idle=separate");
}

#[test]
fn half_goes_by_presence_and_half_by_work() {
    let whole = span(0, 15 * SECOND_US);
    let rows = plain(&[
        segment("a", "search", whole, tokens(300, 0)),
        segment("b", "ads", whole, tokens(100, 0)),
    ]);
    // Presence 1/2 each; work 3/4 and 1/4: together 5/8 and 3/8.
    assert_eq!(by_team(&rows), [("ads", 5_625_000), ("search", 9_375_000)].into());
}

#[test]
fn tokens_out_of_the_cache_are_no_work_and_a_place_in_it_is() {
    let whole = span(0, 15 * SECOND_US);
    let cached = Work {
        cached_tokens: 1000,
        ..tokens(1000, 0)
    };
    let resident = Work {
        kv_token_us: 1_000_000_000,
        ..Work::default()
    };
    let rows = plain(&[
        segment("a", "cached", whole, cached),
        segment("b", "resident", whole, resident),
    ]);
    assert_eq!(
        by_team(&rows),
        [("cached", 3_750_000), ("resident", 11_250_000)].into()
    );
}

#[test]
fn without_any_work_all_goes_by_presence_whatever_theta_says() {
    let segments = [
        segment("a", "search", span(0, 10 * SECOND_US), Work::default()),
        segment("b", "ads", span(5 * SECOND_US, 10 * SECOND_US), Work::default()),
    ];
    for theta in [0, 300_000, 1_000_000] {
        let none = &EngineView::default();
        let rows = rows_of(
            &segments,
            none,
            &nano_a_microsecond(),
            &method(theta, IdleTo::Separate),
        );
        let expected = [("search", 7_500_000), ("ads", 2_500_000), (IDLE, 5_000_000)];
        assert_eq!(by_team(&rows), expected.into(), "theta {theta}");
    }
}

#[test]
fn a_segment_without_time_pays_nothing_and_keeps_its_tokens() {
    let at = span(SECOND_US, SECOND_US);
    let rows = plain(&[segment("e", "search", at, tokens(1, 2))]);
    assert_eq!(by_team(&rows), [("search", 0), (IDLE, 15_000_000)].into());
    assert_eq!((rows[1].prompt_tokens, rows[1].completion_tokens), (1, 2));
}

#[test]
fn a_price_that_changes_within_the_window_counts_from_its_moment() {
    let change = Micros(START_US + 5 * SECOND_US);
    let prices = PriceList::new(vec![
        price_from(Micros(0), 3_600_000_000),
        price_from(change, 7_200_000_000),
    ])
    .unwrap();
    let early = segment("a", "early", span(0, 5 * SECOND_US), tokens(1, 1));
    let late = segment("b", "late", span(5 * SECOND_US, 10 * SECOND_US), tokens(1, 1));
    let rows = rows_of(
        &[early, late],
        &EngineView::default(),
        &prices,
        &method(500_000, IdleTo::Separate),
    );
    assert_eq!(
        by_team(&rows),
        [("early", 5_000_000), ("late", 10_000_000), (IDLE, 10_000_000)].into()
    );
}

#[test]
fn time_in_which_the_engine_runs_and_nobody_known_does_is_not_idle() {
    let run = segment("e", "search", span(0, 5 * SECOND_US), tokens(10, 10));
    let ran = |from, to| {
        let view = engine(
            &[(span(from * SECOND_US, to * SECOND_US), Condition::Running)],
            None,
        );
        let rows = rows_of(
            std::slice::from_ref(&run),
            &view,
            &nano_a_microsecond(),
            &method(500_000, IdleTo::Separate),
        );
        rows.iter()
            .find(|row| &*row.account.team_id == UNATTRIBUTED)
            .map_or(0, |row| row.cost.0)
    };
    // Seen at the sixth second, when the known one had ended.
    assert_eq!(ran(3, 9), 4_000_000);
    // Seen while it ran: of the time behind it that says nothing.
    assert_eq!(ran(0, 9), 0);
    // Seen in the window behind, where the known one can have run.
    assert_eq!(ran(14, 20), 0);
    // Of a window without any, a look from outside tells all that is known.
    let view = engine(&[(span(9 * SECOND_US, 25 * SECOND_US), Condition::Running)], None);
    let rows = rows_of(
        &[],
        &view,
        &nano_a_microsecond(),
        &method(500_000, IdleTo::Separate),
    );
    assert_eq!(
        by_team(&rows),
        [(UNATTRIBUTED, 6_000_000), (IDLE, 9_000_000)].into()
    );
}

#[test]
fn what_the_counters_have_beyond_the_known_joins_as_one_more_request() {
    let known = segment("e", "search", span(0, 15 * SECOND_US), tokens(100, 0));
    let twice = engine(&[], Some(tokens(200, 0)));
    let rows = rows_of(
        std::slice::from_ref(&known),
        &twice,
        &nano_a_microsecond(),
        &method(500_000, IdleTo::Separate),
    );
    assert_eq!(
        by_team(&rows),
        [("search", 7_500_000), (UNATTRIBUTED, 7_500_000)].into()
    );
    // A gap of a hundredth is no whole request: it gets about a hundredth.
    let nearly = engine(&[], Some(tokens(101, 0)));
    let rows = rows_of(
        &[known],
        &nearly,
        &nano_a_microsecond(),
        &method(500_000, IdleTo::Separate),
    );
    let share = by_team(&rows)[UNATTRIBUTED];
    assert!((140_000..160_000).contains(&share), "{share}");
}

#[test]
fn counters_that_lag_behind_take_nothing_away() {
    let known = segment("e", "search", span(0, 15 * SECOND_US), tokens(100, 100));
    let behind = engine(&[], Some(tokens(1, 1)));
    let rows = rows_of(
        &[known],
        &behind,
        &nano_a_microsecond(),
        &method(500_000, IdleTo::Separate),
    );
    assert_eq!(by_team(&rows), [("search", 15_000_000)].into());
}

#[test]
fn work_at_no_known_time_has_tokens_and_no_cost() {
    let view = engine(&[], Some(tokens(7, 8)));
    let rows = rows_of(
        &[],
        &view,
        &nano_a_microsecond(),
        &method(500_000, IdleTo::Separate),
    );
    assert_eq!(by_team(&rows), [(IDLE, 15_000_000), (UNATTRIBUTED, 0)].into());
    assert_eq!((rows[1].prompt_tokens, rows[1].completion_tokens), (7, 8));
}

#[test]
fn loading_down_and_scaled_to_zero_are_lines_and_a_request_that_runs_comes_first() {
    let seconds = |from, to| span(from * SECOND_US, to * SECOND_US);
    let view = engine(
        &[
            (seconds(0, 4), Condition::Down),
            (seconds(3, 8), Condition::Loading),
            (seconds(8, 9), Condition::ScaledToZero),
            (seconds(10, 15), Condition::Up),
        ],
        None,
    );
    let run = segment("e", "search", seconds(0, 1), tokens(1, 1));
    let rows = rows_of(
        &[run],
        &view,
        &nano_a_microsecond(),
        &method(500_000, IdleTo::Owner),
    );
    let expected = [
        ("search", 1_000_000),
        (DOWN, 2_000_000),
        (LOADING, 5_000_000),
        (SCALED_TO_ZERO, 1_000_000),
        (IDLE, 6_000_000),
    ];
    assert_eq!(by_team(&rows), expected.into());
}

#[test]
fn idle_time_goes_where_the_policy_says() {
    let owned = PriceList::new(vec![Price {
        owner: Some(TeamId::parse(b"platform").unwrap()),
        ..price_from(Micros(0), 3_600_000_000)
    }])
    .unwrap();
    let segments = [
        segment("a", "search", span(0, 9 * SECOND_US), Work::default()),
        segment("b", "ads", span(9 * SECOND_US, 12 * SECOND_US), Work::default()),
        segment(
            "c",
            "__direct__",
            span(12 * SECOND_US, 13 * SECOND_US),
            Work::default(),
        ),
    ];
    let idle_of = |policy, segments: &[Segment]| -> BTreeMap<String, u64> {
        let rows = rows_of(segments, &EngineView::default(), &owned, &method(500_000, policy));
        let idle = rows.iter().filter(|row| !is_running(row));
        idle.map(|row| (row.account.team_id.to_string(), row.cost.0))
            .collect()
    };
    let lines = |lines: &[(&str, u64)]| {
        lines
            .iter()
            .map(|(team, cost)| (team.to_string(), *cost))
            .collect()
    };
    let expected: [(IdleTo, BTreeMap<String, u64>); 4] = [
        (IdleTo::Separate, lines(&[(IDLE, 2_000_000)])),
        (IdleTo::Owner, lines(&[("platform", 2_000_000)])),
        (
            IdleTo::Proportional,
            lines(&[("search", 1_500_000), ("ads", 500_000)]),
        ),
        (IdleTo::Even, lines(&[("search", 1_000_000), ("ads", 1_000_000)])),
    ];
    for (policy, expected) in expected {
        assert_eq!(idle_of(policy, &segments), expected, "{policy}");
    }
    assert_eq!(idle_of(IdleTo::Even, &[]), lines(&[(IDLE, 15_000_000)]));
}

#[test]
fn whom_an_earlier_revision_named_gets_a_row_also_when_nothing_is_left_for_them() {
    let gone = Account {
        team_id: "gone".into(),
        ..Account::default()
    };
    let facts = WindowFacts {
        window: window(),
        upstream: "chat",
        prices: &nano_a_microsecond(),
        segments: &[],
        engine: &EngineView::default(),
        accounts_before: std::slice::from_ref(&gone),
    };
    let rows = allocate(&facts, &method(500_000, IdleTo::Separate), EDITION);
    let row = rows.iter().find(|row| row.account == gone).unwrap();
    assert_eq!((row.cost, row.busy_us), (NanoUsd(0), 0));
}

#[test]
fn an_upstream_that_began_within_a_window_pays_from_then_on() {
    let prices = nano_a_microsecond();
    let begun = Span::new(Micros(START_US + 4 * SECOND_US), Micros(u64::MAX));
    let facts = WindowFacts {
        window: window().covering(begun),
        upstream: "chat",
        prices: &prices,
        segments: &[segment("e", "search", span(0, 15 * SECOND_US), tokens(1, 1))],
        engine: &EngineView::default(),
        accounts_before: &[],
    };
    let rows = allocate(&facts, &method(500_000, IdleTo::Separate), EDITION);
    assert_eq!(by_team(&rows), [("search", 11_000_000)].into());
}

#[test]
fn a_row_has_the_tables_columns() {
    let rows = plain(&[]);
    let row = serde_json::to_value(&rows[0]).unwrap();
    assert_eq!(row["window_start"], START_US / SECOND_US);
    assert_eq!(row["state"], "provisional");
    let sql = include_str!("../../../sql/0004_segments_and_ledger.sql");
    assert_eq!(columns_of(&row), columns_in(sql, "cost_ledger"));
}

fn columns_of(row: &serde_json::Value) -> Vec<String> {
    let mut columns: Vec<String> = row.as_object().unwrap().keys().cloned().collect();
    columns.sort_unstable();
    columns
}

/// The columns of a table, in the order of their names.
pub(super) fn columns_in(sql: &str, table: &str) -> Vec<String> {
    let table = sql
        .split(&format!("CREATE TABLE IF NOT EXISTS {table}{{on_cluster}}"))
        .nth(1)
        .unwrap();
    let table = table.split("ENGINE").next().unwrap();
    let columns = table
        .lines()
        .filter_map(|line| line.strip_prefix("    ")?.split(' ').next())
        .filter(|word| *word != "--");
    let mut columns: Vec<String> = columns.map(str::to_owned).collect();
    columns.sort_unstable();
    columns
}

#[test]
fn a_segments_cost_has_the_tables_columns() {
    let run = segment("e", "search", span(0, SECOND_US), tokens(1, 1));
    let facts = WindowFacts {
        window: window(),
        upstream: "chat",
        prices: &nano_a_microsecond(),
        segments: &[run],
        engine: &EngineView::default(),
        accounts_before: &[],
    };
    let statement = itemize(&facts, &method(500_000, IdleTo::Separate), EDITION);
    let row = serde_json::to_value(&statement.segments[0]).unwrap();
    assert_eq!(
        columns_of(&row),
        columns_in(
            include_str!("../../../sql/0005_ledger_windows.sql"),
            "segment_costs"
        )
    );
}

#[test]
fn a_stream_of_two_hours_sums_to_its_bill_over_all_its_windows() {
    // A price at which no window costs a whole number of nano-USD.
    let prices = PriceList::new(vec![price_from(Micros(0), 2_718_281_829)]).unwrap();
    let run = Span::new(Micros(START_US + 7_654_321), Micros(START_US + 7_200 * SECOND_US));
    let first = Window::at(run.from());
    let windows: Vec<Window> = std::iter::successors(Some(first), |window| Some(window.next()))
        .take_while(|window| window.start() < run.to())
        .collect();
    let mut sum = NanoUsd(0);
    let mut busy_us = 0;
    for window in &windows {
        let segments = [segment("e", "search", run.within(window.span()), tokens(3, 700))];
        let facts = WindowFacts {
            window: *window,
            upstream: "chat",
            prices: &prices,
            segments: &segments,
            engine: &EngineView::default(),
            accounts_before: &[],
        };
        let rows = allocate(&facts, &method(500_000, IdleTo::Separate), EDITION);
        sum += total(&rows);
        busy_us += rows.iter().map(|row| row.busy_us).sum::<u64>();
    }
    let last = windows.last().unwrap();
    assert_eq!(sum, prices.bill(Span::new(first.start(), last.span().to())));
    assert_eq!(busy_us, run.len_us());
}

prop_compose! {
    fn any_work()(
        prompt_tokens in 0_u64..20_000,
        cached_tokens in 0_u64..20_000,
        completion_tokens in 0_u64..2_000,
        kv_token_us in 0_u64..200_000_000_000,
        is_none in prop::bool::weighted(0.2),
    ) -> Work {
        let work = Work { prompt_tokens, cached_tokens, completion_tokens, kv_token_us };
        if is_none { Work::default() } else { work }
    }
}

/// Spans with ends that meet, that reach beyond the window, and that have no time in them.
fn any_span() -> impl Strategy<Value = Span> {
    let edge = prop_oneof![
        2 => select(vec![0, 1, 5_000_000, 7_500_000, 14_999_999, 15_000_000]),
        3 => 0_u64..=15_000_000,
        1 => select(vec![16_000_000_u64]),
    ];
    (edge.clone(), edge).prop_map(|(one, other)| span(one.min(other), one.max(other)))
}

fn any_segments(most: usize) -> impl Strategy<Value = Vec<Segment>> {
    let team = select(vec!["ads", "search", "vision", "__direct__"]);
    prop::collection::vec((team, any_span(), any_work()), 0..most).prop_map(|parts| {
        let named = |(number, (team, run, work)): (usize, (&'static str, Span, Work))| {
            segment(&format!("event-{number}"), team, run, work)
        };
        parts.into_iter().enumerate().map(named).collect()
    })
}

fn any_prices() -> impl Strategy<Value = PriceList> {
    let moment = prop_oneof![Just(0), START_US..START_US + 15_000_000];
    let dear = prop_oneof![Just(0), 0_u64..20_000_000_000, Just(Price::PER_GPU_HOUR_MAX.0)];
    let gpus = select(vec![0_u32, 1, 8, Price::GPUS_MAX]);
    let owner = prop::option::of(Just(TeamId::parse(b"platform").unwrap()));
    prop::collection::btree_map(moment, (dear, gpus, owner), 0..4).prop_map(|prices| {
        let price = |(from, (nano, gpus, owner))| Price {
            from: Micros(from),
            usd_per_gpu_hour: NanoUsd(nano),
            gpus,
            owner,
        };
        PriceList::new(prices.into_iter().map(price).collect()).unwrap()
    })
}

fn any_method() -> impl Strategy<Value = Method> {
    method_of(vec![0, 1, 40_000, 1_000_000, 4_000_000, u32::MAX])
}

fn method_of(weights: Vec<u32>) -> impl Strategy<Value = Method> {
    let weight = move || select(weights.clone()).prop_map(Millionths::new);
    let idle = select(vec![
        IdleTo::Separate,
        IdleTo::Owner,
        IdleTo::Proportional,
        IdleTo::Even,
    ]);
    let theta = prop_oneof![Just(0), Just(1_000_000), 0_u32..=1_000_000].prop_map(Millionths::new);
    (theta, weight(), weight(), weight(), idle).prop_map(|(theta, prompt, completion, kv, idle)| {
        let weights = Weights {
            prompt,
            completion,
            kv,
        };
        Method::new(theta, weights, idle).unwrap()
    })
}

fn any_engine() -> impl Strategy<Value = EngineView> {
    use Condition::{Down, Loading, Running, ScaledToZero, Up};
    let seen = (any_span(), select(vec![Down, ScaledToZero, Loading, Up, Running]));
    let spans = prop::collection::vec(seen, 0..4);
    (spans, prop::option::of(any_work())).prop_map(|(spans, counted)| engine(&spans, counted))
}

/// Time of the window that somebody used, found by looking between any two ends.
fn busy_us(segments: &[Segment], view: &EngineView) -> u64 {
    let running = view
        .spans
        .iter()
        .filter(|seen| seen.condition == Condition::Running && tells_of_others(seen, segments));
    let used: Vec<Span> = segments
        .iter()
        .map(|segment| segment.run)
        .chain(running.map(|seen| seen.span))
        .map(|span| span.within(window().span()))
        .collect();
    pieces(&used)
        .filter(|piece| used.iter().any(|span| covers(*span, *piece)))
        .map(Span::len_us)
        .sum()
}

/// Whether an engine that ran did so for somebody who is not known: nobody who is ran within a quarter of a second, or, where the look is from
/// outside the window, in all of it.
fn tells_of_others(seen: &EngineSpan, segments: &[Segment]) -> bool {
    let window = window().span();
    let mut known = segments.iter().map(|segment| segment.run);
    if seen.at < window.from() || seen.at >= window.to() {
        return known.next().is_none();
    }
    known
        .all(|run| run.is_empty() || run.to().0 + 250_000 <= seen.at.0 || run.from().0 >= seen.at.0 + 250_000)
}

fn pieces(spans: &[Span]) -> impl Iterator<Item = Span> + use<> {
    let mut ends: Vec<Micros> = spans.iter().flat_map(|span| [span.from(), span.to()]).collect();
    ends.sort_unstable();
    let pairs: Vec<Span> = ends.windows(2).map(|pair| Span::new(pair[0], pair[1])).collect();
    pairs.into_iter().filter(|piece| !piece.is_empty())
}

fn covers(span: Span, piece: Span) -> bool {
    piece.within(span) == piece
}

/// The formula as it is written, in floats, for one price and no more than the known requests: seconds of the upstream for each.
fn by_the_formula(segments: &[Segment], method: &Method) -> Vec<f64> {
    let window = window().span();
    let runs: Vec<Span> = segments
        .iter()
        .map(|segment| segment.run.within(window))
        .collect();
    let weight = |weight: Millionths| f64::from(weight.get()) / 1e6;
    let rates: Vec<f64> = segments
        .iter()
        .zip(&runs)
        .map(|(segment, run)| {
            let Work {
                prompt_tokens,
                cached_tokens,
                completion_tokens,
                kv_token_us,
            } = segment.work;
            let work = weight(method.weights.prompt) * prompt_tokens.saturating_sub(cached_tokens) as f64
                + weight(method.weights.completion) * completion_tokens as f64
                + weight(method.weights.kv) * kv_token_us as f64 / 1e6;
            if run.is_empty() {
                0.0
            } else {
                work / run.len_us() as f64
            }
        })
        .collect();
    let theta = weight(method.theta());
    let mut seconds = vec![0.0; segments.len()];
    for piece in pieces(&runs) {
        let there: Vec<usize> = (0..runs.len())
            .filter(|index| covers(runs[*index], piece))
            .collect();
        let sum: f64 = there.iter().map(|index| rates[*index]).sum();
        let present = 1.0 / there.len() as f64;
        for index in &there {
            let worked = if sum > 0.0 { rates[*index] / sum } else { present };
            seconds[*index] += piece.len_us() as f64 / 1e6 * ((1.0 - theta) * present + theta * worked);
        }
    }
    seconds
}

proptest! {
    #[test]
    fn the_rows_of_a_window_sum_to_its_bill_and_to_its_busy_time(
        segments in any_segments(12),
        view in any_engine(),
        prices in any_prices(),
        method in any_method(),
    ) {
        let rows = rows_of(&segments, &view, &prices, &method);
        prop_assert_eq!(total(&rows), prices.bill(window().span()));
        prop_assert!(rows.iter().all(|row| row.cost.as_i64() >= 0));
        let busy: u64 = rows.iter().map(|row| row.busy_us).sum();
        prop_assert_eq!(busy, busy_us(&segments, &view));
        prop_assert!(rows.iter().all(|row| is_running(row) || row.busy_us == 0));
        prop_assert!(rows.is_sorted_by_key(|row| &row.account));
    }

    #[test]
    fn what_an_accounts_segments_cost_sums_to_its_row(
        (segments, shuffled) in any_segments(12).prop_flat_map(|segments| (Just(segments.clone()), Just(segments).prop_shuffle())),
        view in any_engine(),
        prices in any_prices(),
        method in any_method(),
    ) {
        let items = |segments: &[Segment]| {
            let facts = WindowFacts { window: window(), upstream: "chat", prices: &prices, segments, engine: &view, accounts_before: &[] };
            itemize(&facts, &method, EDITION)
        };
        let statement = items(&segments);
        prop_assert_eq!(&statement, &items(&shuffled));
        prop_assert_eq!(statement.segments.len(), segments.len());
        let mut sums: BTreeMap<&Account, (u64, u64)> = BTreeMap::new();
        for item in &statement.segments {
            let sum = sums.entry(&item.account).or_default();
            *sum = (sum.0 + item.cost.0, sum.1 + item.busy_us);
        }
        for row in statement.rows.iter().filter(|row| is_running(row) && &*row.account.team_id != UNATTRIBUTED) {
            prop_assert_eq!(sums.remove(&row.account), Some((row.cost.0, row.busy_us)));
        }
        prop_assert!(sums.is_empty(), "segments of no row: {sums:?}");
    }

    #[test]
    fn what_the_running_pay_together_does_not_depend_on_the_method(
        segments in any_segments(12),
        view in any_engine(),
        prices in any_prices(),
        one in any_method(),
        other in any_method(),
    ) {
        let running = |method| -> NanoUsd {
            let rows = rows_of(&segments, &view, &prices, method);
            rows.iter().filter(|row| is_running(row)).map(|row| row.cost).sum()
        };
        prop_assert_eq!(running(&one), running(&other));
    }

    #[test]
    fn what_the_running_pay_together_is_price_times_busy_time(
        segments in any_segments(12),
        view in any_engine(),
        nano in 0..=Price::PER_GPU_HOUR_MAX.0,
        method in any_method(),
    ) {
        let prices = PriceList::new(vec![price_from(Micros(0), nano)]).unwrap();
        let rows = rows_of(&segments, &view, &prices, &method);
        let running: u64 = rows.iter().filter(|row| is_running(row)).map(|row| row.cost.0).sum();
        let exact = u128::from(nano) * u128::from(busy_us(&segments, &view)) / 3_600_000_000;
        prop_assert!(u128::from(running).abs_diff(exact) <= 2, "{} for {}", running, exact);
    }

    #[test]
    fn the_order_in_which_segments_came_and_by_how_many_gateways_changes_nothing(
        (segments, shuffled) in any_segments(12).prop_flat_map(|segments| (Just(segments.clone()), Just(segments).prop_shuffle())),
        twice in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        view in any_engine(),
        prices in any_prices(),
        method in any_method(),
    ) {
        let mut merged = shuffled.clone();
        // A segment that two spools hold is still one.
        merged.extend(twice.iter().filter(|_| !shuffled.is_empty()).map(|index| index.get(&shuffled).clone()));
        let mut seen_in_reverse = view.clone();
        seen_in_reverse.spans.reverse();
        prop_assert_eq!(
            rows_of(&segments, &view, &prices, &method),
            rows_of(&merged, &seen_in_reverse, &prices, &method)
        );
    }

    #[test]
    fn a_request_alone_pays_all_of_the_busy_time(
        run in any_span(),
        work in any_work(),
        prices in any_prices(),
        theta in 0_u32..=1_000_000,
    ) {
        let run = run.within(window().span());
        let segments = [segment("e", "search", run, work)];
        let rows = rows_of(&segments, &EngineView::default(), &prices, &method(theta, IdleTo::Separate));
        let shares = by_team(&rows);
        let idle = shares.get(IDLE).copied().unwrap_or(0);
        prop_assert_eq!(shares["search"] + idle, prices.bill(window().span()).0);
        // The busy line is rounded once for each price.
        prop_assert!(shares["search"].abs_diff(prices.bill(run).0) <= 3);
    }

    #[test]
    fn two_of_the_same_time_and_work_pay_the_same(
        segments in any_segments(10),
        run in any_span(),
        work in any_work(),
        view in any_engine(),
        prices in any_prices(),
        method in any_method(),
    ) {
        let twins = ["twin-1", "twin-2"].map(|team| segment(team, team, run, work));
        let all: Vec<Segment> = segments.into_iter().chain(twins).collect();
        let rows = rows_of(&all, &view, &prices, &method);
        let running = rows.iter().filter(|row| is_running(row));
        let [one, other] = ["twin-1", "twin-2"].map(|team| -> u64 {
            running.clone().filter(|row| &*row.account.team_id == team).map(|row| row.cost.0).sum()
        });
        // A nano cannot be halved; there is one rounding for each price.
        prop_assert!(one.abs_diff(other) <= 4, "{one} and {other}");
    }

    #[test]
    fn each_pays_what_the_formula_says(
        segments in any_segments(12),
        method in method_of(vec![0, 40_000, 1_000_000, 4_000_000]),
    ) {
        let segments: Vec<Segment> = segments
            .into_iter()
            .map(|segment| Segment {
                account: Account { team_id: segment.event_id.clone(), ..Account::default() },
                ..segment
            })
            .collect();
        let separate = Method::new(method.theta(), method.weights, IdleTo::Separate).unwrap();
        let rows = rows_of(&segments, &EngineView::default(), &nano_a_microsecond(), &separate);
        let paid = by_team(&rows);
        for (segment, seconds) in segments.iter().zip(by_the_formula(&segments, &method)) {
            let paid = paid[&*segment.event_id] as f64;
            prop_assert!((paid - seconds * 1e6).abs() <= 2.0, "{paid} for {seconds} s");
        }
    }

    #[test]
    fn more_work_in_the_same_time_never_pays_less(
        segments in any_segments(8),
        run in any_span(),
        work in any_work(),
        more in 0_u64..10_000,
        method in any_method(),
    ) {
        let pays = |completion_tokens| {
            let mut all = segments.clone();
            all.push(segment("e", "subject", run, Work { completion_tokens, ..work }));
            let rows = rows_of(&all, &EngineView::default(), &nano_a_microsecond(), &method);
            let mut own = rows.iter().filter(|row| is_running(row) && &*row.account.team_id == "subject");
            own.next().map_or(0, |row| row.cost.0)
        };
        prop_assert!(pays(work.completion_tokens) <= pays(work.completion_tokens + more) + 1);
    }

    #[test]
    fn windows_one_after_the_other_sum_to_the_bill_of_the_span(
        segments in any_segments(6),
        prices in any_prices(),
        method in any_method(),
        count in 1_usize..20,
    ) {
        let before = Window::at(Micros(START_US - 60 * SECOND_US));
        let windows = std::iter::successors(Some(before), |window| Some(window.next())).take(count);
        let mut sum = NanoUsd(0);
        let mut end = before.start();
        for window in windows {
            let facts = WindowFacts {
                window,
                upstream: "chat",
                prices: &prices,
                segments: &segments,
                engine: &EngineView::default(),
                accounts_before: &[],
            };
            sum += total(&allocate(&facts, &method, EDITION));
            end = window.span().to();
        }
        prop_assert_eq!(sum, prices.bill(Span::new(before.start(), end)));
    }
}
