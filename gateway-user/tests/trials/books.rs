//! What a gateway's books have of a trial: segments, costs, what the engine's pages told on the way.

use std::collections::BTreeMap;

use vllm_gateway::calibrate::{self, Fit, TooLittle};
use vllm_gateway::config::IdleTo;
use vllm_gateway::ledger::{
    Account, CostRow, Cutter, Edition, EngineView, Method, Millionths, Price, PriceList, Run, Segment, Span,
    State, Wait, Weights, Window, WindowFacts, allocate, scheduled,
};

use vllm_gateway::store::figures::WindowWork;

use super::{Lived, Look, Ran};

/// What is known of each request's wait.
pub type Waits<'a> = &'a dyn Fn(usize, &Lived) -> Wait;

/// What a server tells that has per-request metrics.
pub fn told(_: usize, lived: &Lived) -> Wait {
    Wait {
        told_us: Some(lived.scheduled.0 - lived.arrived.0),
        ..Wait::default()
    }
}

/// When a gateway takes a request to have been scheduled.
pub fn run_of(lived: &Lived, wait: Wait) -> Run {
    let span = Span::new(lived.arrived, lived.ended);
    let prefilled = lived.request.is_streamed.then_some(lived.first_token);
    let output_tokens = u64::from(lived.request.output_tokens);
    Run {
        span: Span::new(scheduled(span, prefilled, output_tokens, wait), span.to()),
        prefilled,
        prompt_tokens: lived.request.prompt_tokens.into(),
        cached_tokens: 0,
        completion_tokens: output_tokens,
        points: if lived.request.is_streamed {
            lived.points.clone()
        } else {
            Vec::new()
        },
        units: output_tokens,
    }
}

/// The segments of all requests, by window. A team's name is its index.
pub fn segments(ran: &Ran, waits: Waits<'_>) -> BTreeMap<Window, Vec<Segment>> {
    let mut by_window: BTreeMap<Window, Vec<Segment>> = BTreeMap::new();
    for (index, lived) in ran.requests.iter().enumerate() {
        for slice in Cutter::default().cut_rest(&run_of(lived, waits(index, lived))) {
            by_window.entry(slice.window).or_default().push(Segment {
                event_id: index.to_string().into(),
                account: Account {
                    team_id: lived.request.team.to_string().into(),
                    project: "".into(),
                    model: "m".into(),
                },
                run: slice.run,
                work: slice.work,
            });
        }
    }
    by_window
}

/// What each team pays, as a part of what all of them pay.
pub fn shares(
    windows: &BTreeMap<Window, Vec<Segment>>,
    teams: usize,
    theta: impl Fn(Window) -> f64,
    weights: Weights,
) -> Vec<f64> {
    let prices = PriceList::new(vec![Price::ASSUMED]).expect("one price");
    let mut paid = vec![0.0; teams];
    for (window, segments) in windows {
        let theta = Millionths::new((theta(*window) * 1e6).round() as u32);
        let method = Method::new(theta, weights, IdleTo::Separate).expect("a part of 1");
        let facts = WindowFacts {
            window: *window,
            upstream: "chat",
            prices: &prices,
            segments,
            engine: &EngineView::default(),
            accounts_before: &[],
        };
        let edition = Edition {
            revision: 1,
            state: State::Settled,
        };
        for CostRow { account, cost, .. } in allocate(&facts, &method, edition) {
            if let Ok(team) = account.team_id.parse::<usize>() {
                paid[team] += cost.0 as f64;
            }
        }
    }
    parts(&paid)
}

/// Each as a part of their sum.
pub fn parts(values: &[f64]) -> Vec<f64> {
    let sum: f64 = values.iter().sum();
    values.iter().map(|value| value / sum).collect()
}

/// How much of the cost is with the wrong team.
pub fn misallocated(found: &[f64], right: &[f64]) -> f64 {
    found
        .iter()
        .zip(right)
        .map(|(found, right)| (found - right).abs())
        .sum::<f64>()
        / 2.0
}

/// What `vllm-gateway calibrate` would read of the trial.
pub fn work(ran: &Ran, windows: &BTreeMap<Window, Vec<Segment>>) -> Vec<WindowWork> {
    windows
        .iter()
        .map(|(window, segments)| {
            let sum = |of: fn(&Segment) -> u64| segments.iter().map(of).sum::<u64>();
            WindowWork {
                window: *window,
                busy_us: union_us(segments.iter().map(|segment| segment.run)),
                prompt_tokens: sum(|segment| segment.work.prompt_tokens - segment.work.cached_tokens),
                completion_tokens: sum(|segment| segment.work.completion_tokens),
                kv_token_seconds: sum(|segment| segment.work.kv_token_us) as f64 / 1e6,
                steps: steps_in(window.span(), &ran.looks),
            }
        })
        .collect()
}

/// What it would make of it.
pub fn fit(ran: &Ran, in_force: &Weights) -> Result<Fit, TooLittle> {
    Fit::of(&calibrate::observe(&work(ran, &segments(ran, &told))), in_force)
}

fn union_us(runs: impl Iterator<Item = Span>) -> u64 {
    let mut runs: Vec<Span> = runs.collect();
    runs.sort_unstable();
    let (mut sum, mut until) = (0, 0);
    for run in runs {
        let from = run.from().0.max(until);
        sum += run.to().0.saturating_sub(from);
        until = until.max(run.to().0);
    }
    sum
}

/// Steps spread evenly between two looks; unknown where nobody looked on both sides.
fn steps_in(window: Span, looks: &[Look]) -> Option<f64> {
    let (mut steps, mut known_us) = (0.0, 0);
    for pair in looks.windows(2) {
        let between = Span::new(pair[0].at, pair[1].at);
        let common_us = between.within(window).len_us();
        let count = |look: &Look| look.stats.iteration_tokens.count();
        steps +=
            (count(&pair[1]) - count(&pair[0])) as f64 * common_us as f64 / between.len_us().max(1) as f64;
        known_us += common_us;
    }
    (known_us == window.len_us()).then_some(steps)
}
