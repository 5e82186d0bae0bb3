//! What an engine said of itself, at scrapes that know nothing of windows, as a view of each window.
//!
//! A scrape stands for the time that lies nearer to it than to any other, and for no more than `REACH_US` of it. That an engine ran at the
//! moments of its scrapes is a fair sample of how often it ran. What its counters grew by between two scrapes is spread evenly over the
//! time in between, and cut at the edges of windows such that nothing is lost.
//!
//! So counters and segments never agree window by window: the engine counts a prompt in one moment, a scrape is late. [`settle`]
//! keeps of their differences what is still there in the end, and nothing that a later window takes back.

use super::facts::{Condition, EngineSpan, EngineView, Work};
use super::time::{Micros, Span, Window};

/// How far from a scrape its word still counts: two intervals as they are configured by default. Beyond that nobody looked.
const REACH_US: u64 = 30_000_000;

/// One look at an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scrape {
    /// When.
    pub at: Micros,
    /// How it was.
    pub condition: Condition,
    /// Its counters; `None` when they could not be read.
    pub totals: Option<Totals>,
    /// Whether they began anew since the scrape before.
    pub is_reset: bool,
}

/// An engine's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Prompt tokens since it started.
    pub prompt_tokens: u64,
    /// Generated tokens since it started.
    pub completion_tokens: u64,
}

impl Condition {
    /// Every condition.
    pub const ALL: [Condition; 6] = [
        Condition::Down,
        Condition::ScaledToZero,
        Condition::Asleep,
        Condition::Loading,
        Condition::Up,
        Condition::Running,
    ];

    /// The name in rows and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Condition::Down => "down",
            Condition::ScaledToZero => "scaled_to_zero",
            Condition::Asleep => "asleep",
            Condition::Loading => "loading",
            Condition::Up => "up",
            Condition::Running => "running",
        }
    }

    /// The condition of that name; `None` for any other, as in rows that are older than the names.
    pub fn from_name(name: &str) -> Option<Condition> {
        Condition::ALL
            .into_iter()
            .find(|condition| condition.name() == name)
    }

    /// How an engine was by a row of `vllm_system_metrics`: by its own word, or, in rows that have none, by what else it says.
    pub fn of_row(name: &str, answered: bool, running: Option<f64>) -> Condition {
        Condition::from_name(name).unwrap_or_else(|| Condition::of_scrape(answered, running))
    }

    /// How an engine is that answered or not, with so many requests running.
    pub fn of_scrape(answered: bool, running: Option<f64>) -> Condition {
        match running {
            _ if !answered => Condition::Down,
            Some(running) if running > 0.0 => Condition::Running,
            _ => Condition::Up,
        }
    }
}

/// The view of a window that the scrapes give, which are in order of time and should reach beyond it on both sides.
///
/// What the counters grew by is known only where they are known on both sides of all of the window.
pub fn view(window: Window, scrapes: &[Scrape]) -> EngineView {
    EngineView {
        spans: spans(window.span(), scrapes),
        counted: counted(window.span(), scrapes),
    }
}

fn spans(window: Span, scrapes: &[Scrape]) -> Vec<EngineSpan> {
    let halfway = |one: Micros, other: Micros| Micros(one.0 + (other.0 - one.0) / 2);
    let mut spans = Vec::new();
    for (index, scrape) in scrapes.iter().enumerate() {
        let earliest = Micros(scrape.at.0.saturating_sub(REACH_US));
        let latest = Micros(scrape.at.0.saturating_add(REACH_US));
        let before = index
            .checked_sub(1)
            .map(|before| halfway(scrapes[before].at, scrape.at));
        let after = scrapes.get(index + 1).map(|after| halfway(scrape.at, after.at));
        let from = before.map_or(earliest, |before| before.max(earliest));
        let to = after.map_or(latest, |after| after.min(latest));
        let span = Span::new(from, to).within(window);
        if !span.is_empty() {
            spans.push(EngineSpan {
                span,
                at: scrape.at,
                condition: scrape.condition,
            });
        }
    }
    spans
}

fn counted(window: Span, scrapes: &[Scrape]) -> Option<Work> {
    let mut counted = Work::default();
    let mut known_us = 0;
    for pair in scrapes.windows(2) {
        let between = Span::new(pair[0].at, pair[1].at);
        let common = between.within(window);
        if common.is_empty() {
            continue;
        }
        let (before, after) = (pair[0].totals?, pair[1].totals.filter(|_| !pair[1].is_reset)?);
        let grown = |before: u64, after: u64| {
            let by = |moment: Micros| {
                let share =
                    u128::from(after.saturating_sub(before)) * u128::from(moment.0 - between.from().0);
                // No more than what it grew by.
                (share / u128::from(between.len_us())) as u64
            };
            by(common.to()) - by(common.from())
        };
        counted.prompt_tokens += grown(before.prompt_tokens, after.prompt_tokens);
        counted.completion_tokens += grown(before.completion_tokens, after.completion_tokens);
        known_us += common.len_us();
    }
    (known_us == window.len_us()).then_some(counted)
}

/// What is counted beyond what is known, in windows one after the other: of each window as much as no later one of them takes back.
///
/// With `D` the sum of all differences up to a window, it is the growth of the highest curve below `D` that never falls. All together it is what
/// `D` comes to at the end, or nothing when that is negative.
pub fn settle(windows: &[(Work, Work)]) -> Vec<Work> {
    let of = |field: fn(&Work) -> u64| {
        let differences = windows
            .iter()
            .map(|(counted, known)| i128::from(field(counted)) - i128::from(field(known)));
        settle_one(differences)
    };
    let prompt = of(|work| work.prompt_tokens);
    let cached = of(|work| work.cached_tokens);
    let completion = of(|work| work.completion_tokens);
    let kv = of(|work| work.kv_token_us);
    (0..windows.len())
        .map(|index| Work {
            prompt_tokens: prompt[index],
            cached_tokens: cached[index].min(prompt[index]),
            completion_tokens: completion[index],
            kv_token_us: kv[index],
        })
        .collect()
}

fn settle_one(differences: impl Iterator<Item = i128>) -> Vec<u64> {
    let mut sum = 0;
    let mut curve: Vec<i128> = differences
        .map(|difference| {
            sum += difference;
            sum
        })
        .collect();
    let mut lowest = i128::MAX;
    for height in curve.iter_mut().rev() {
        lowest = lowest.min(*height);
        *height = lowest.max(0);
    }
    let mut before = 0;
    curve
        .into_iter()
        .map(|height| {
            let growth = height - before;
            before = height;
            u64::try_from(growth).unwrap_or(u64::MAX)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000;

    const START: u64 = 1_780_000_005 * SECOND;

    fn at(seconds: u64) -> Micros {
        Micros(START + seconds * SECOND)
    }

    fn scrape(seconds: u64, condition: Condition, completion_tokens: u64) -> Scrape {
        Scrape {
            at: at(seconds),
            condition,
            totals: Some(Totals {
                prompt_tokens: 0,
                completion_tokens,
            }),
            is_reset: false,
        }
    }

    fn completion(completion_tokens: u64) -> Work {
        Work {
            completion_tokens,
            ..Work::default()
        }
    }

    #[test]
    fn a_scrape_stands_for_the_time_around_it_but_not_for_long() {
        let window = |seconds| Window::at(at(seconds));
        let scrapes = [scrape(4, Condition::Running, 0), scrape(14, Condition::Up, 0)];
        let span = |from, seen, to, condition| EngineSpan {
            span: Span::new(at(from), at(to)),
            at: at(seen),
            condition,
        };
        let expected = [span(0, 4, 9, Condition::Running), span(9, 14, 15, Condition::Up)];
        assert_eq!(view(window(0), &scrapes).spans, expected);
        assert_eq!(
            view(window(30), &scrapes).spans,
            [span(30, 14, 44, Condition::Up)]
        );
        assert!(view(window(45), &scrapes).spans.is_empty());
    }

    #[test]
    fn counters_are_known_where_they_stand_on_both_sides() {
        let mut scrapes = [
            scrape(0, Condition::Up, 100),
            scrape(10, Condition::Up, 200),
            scrape(20, Condition::Up, 300),
        ];
        let window = Window::at(at(0));
        assert_eq!(view(window, &scrapes).counted, Some(completion(150)));
        assert_eq!(view(window.next(), &scrapes).counted, None);
        scrapes[2].is_reset = true;
        assert_eq!(view(window, &scrapes).counted, None);
        scrapes[2] = Scrape {
            totals: None,
            ..scrapes[2]
        };
        assert_eq!(view(window, &scrapes).counted, None);
    }

    #[test]
    fn what_a_later_window_takes_back_is_no_gap() {
        let windows = |pairs: &[(u64, u64)]| -> Vec<(Work, Work)> {
            pairs
                .iter()
                .map(|(counted, known)| (completion(*counted), completion(*known)))
                .collect()
        };
        let gaps = |pairs: &[(u64, u64)]| -> Vec<u64> {
            settle(&windows(pairs))
                .iter()
                .map(|work| work.completion_tokens)
                .collect()
        };
        assert_eq!(gaps(&[(10, 0), (0, 10), (5, 5)]), [0, 0, 0]);
        assert_eq!(gaps(&[(0, 10), (10, 0), (7, 5)]), [0, 0, 2]);
        assert_eq!(gaps(&[(9, 5), (5, 6), (8, 5)]), [3, 0, 3]);
        assert_eq!(gaps(&[(0, 9)]), [0]);
    }

    #[test]
    fn an_engine_that_does_not_answer_is_down_whatever_it_last_said() {
        assert_eq!(Condition::of_scrape(false, Some(3.0)), Condition::Down);
        assert_eq!(Condition::of_scrape(true, Some(3.0)), Condition::Running);
        assert_eq!(Condition::of_scrape(true, Some(0.0)), Condition::Up);
        assert_eq!(Condition::of_scrape(true, None), Condition::Up);
    }

    #[test]
    fn a_condition_is_known_by_its_name_and_an_older_row_by_the_rest() {
        for condition in Condition::ALL {
            assert_eq!(Condition::from_name(condition.name()), Some(condition));
            assert_eq!(Condition::of_row(condition.name(), false, None), condition);
        }
        assert!(Condition::ALL.is_sorted());
        assert_eq!(Condition::of_row("", true, Some(1.0)), Condition::Running);
        assert_eq!(Condition::of_row("", false, None), Condition::Down);
    }

    proptest! {
        #[test]
        fn windows_count_all_that_the_counters_grew_by(
            steps in prop::collection::vec((1_u64..40_000_000, 0_u64..100_000), 1..20),
        ) {
            let first = scrape(0, Condition::Up, 7);
            let mut last = first;
            let mut scrapes = vec![first];
            for (us, tokens) in steps {
                last.at = Micros(last.at.0 + us);
                let before = last.totals.unwrap_or_default();
                last.totals = Some(Totals { completion_tokens: before.completion_tokens + tokens, ..before });
                scrapes.push(last);
            }
            // The last window is cut where the last scrape was.
            let seen = Span::new(first.at, last.at);
            let windows = std::iter::successors(Some(Window::at(first.at)), |window| Some(window.next()));
            let sum: u64 = windows
                .take_while(|window| window.start() < last.at)
                .map(|window| view(window.covering(seen), &scrapes).counted.map_or(0, |work| work.completion_tokens))
                .sum();
            prop_assert_eq!(sum, last.totals.unwrap_or_default().completion_tokens - 7);
        }

        #[test]
        fn gaps_sum_to_the_difference_in_the_end(pairs in prop::collection::vec((0_u64..1_000, 0_u64..1_000), 1..30)) {
            let windows: Vec<(Work, Work)> =
                pairs.iter().map(|(counted, known)| (completion(*counted), completion(*known))).collect();
            let sum: u64 = settle(&windows).iter().map(|work| work.completion_tokens).sum();
            let (counted, known): (u64, u64) =
                pairs.iter().fold((0, 0), |(counted, known), pair| (counted + pair.0, known + pair.1));
            prop_assert_eq!(sum, counted.saturating_sub(known));
        }
    }
}
