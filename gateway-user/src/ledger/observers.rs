//! Several gateways that look at one engine, as one view of it.
//!
//! Clocks differ, so that counters of one gateway's scrapes and of another's must never be subtracted from each other: for each window one observer
//! counts, who saw most around it. Only that the engine did not answer is not believed to one of them while it answered to another.

use std::collections::BTreeMap;

use super::engine::{self, Scrape, Totals};
use super::facts::{Condition, EngineSpan, Work};
use super::time::{Micros, Span, Window};

/// How far from a window a scrape can matter. Where none is nearer on one of its sides, the window's counters are unknown: a bound makes a window's view
/// follow from what is near it, whoever looks how far.
pub const NEAR_US: u64 = 300_000_000;

/// What one observer saw at one scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Who looked: the gateway.
    pub observer: Box<str>,
    /// When, by its clock.
    pub at: Micros,
    /// How the engine was.
    pub condition: Condition,
    /// Its counters, over all models; `None` when one of them could not be read.
    pub totals: Option<Totals>,
    /// Which models they are of, as a number.
    pub models: u64,
    /// Whether the observer saw that they began anew.
    pub is_reset: bool,
}

/// The scrapes of each observer, in order of time.
#[derive(Clone, Debug, Default)]
pub struct Observers(BTreeMap<Box<str>, Vec<Scrape>>);

impl Observers {
    /// Sorts out looks that came in any order. Counters that are lower than before, or of other models, began anew, whether the observer noticed or
    /// not: it can have been started in between.
    pub fn of(mut looks: Vec<Look>) -> Observers {
        looks.sort_by(|one, other| (&one.observer, one.at).cmp(&(&other.observer, other.at)));
        looks.dedup_by(|one, other| one.observer == other.observer && one.at == other.at);
        let mut observers: BTreeMap<Box<str>, Vec<Scrape>> = BTreeMap::new();
        let mut before: Option<Look> = None;
        for look in looks {
            let known = look.totals.is_some();
            let last = before.as_ref().filter(|last| last.observer == look.observer);
            let is_reset = look.is_reset || last.is_some_and(|last| known && !look.follows(last));
            observers.entry(look.observer.clone()).or_default().push(Scrape {
                at: look.at,
                condition: look.condition,
                totals: look.totals,
                is_reset,
            });
            if known {
                before = Some(look);
            }
        }
        Observers(observers)
    }

    /// Whoever got most answers within `context`; of several the first by name. `None` when nobody looked at all.
    pub fn best(&self, context: Span) -> Option<&str> {
        let answers = |scrapes: &[Scrape]| {
            let answered = |scrape: &&Scrape| scrape.condition != Condition::Down;
            within(scrapes, context).iter().filter(answered).count()
        };
        let counts = self.0.iter().map(|(name, scrapes)| (name, answers(scrapes)));
        // Of equals the last one is the greatest, and they are in the order of their names.
        let best = counts.rev().max_by_key(|(_, answers)| *answers);
        best.map(|(name, _)| &**name)
    }

    /// Everybody.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(|name| &**name)
    }

    /// What counters grew by in `window`, as `observer` saw it.
    pub fn counted(&self, observer: &str, window: Window) -> Option<Work> {
        engine::view(window, near(self.0.get(observer)?, window)).counted
    }

    /// How the engine was in `window`, as `observer` saw it: spans in order that do not overlap, joined where they touch. That it was up goes without
    /// saying.
    pub fn spans(&self, observer: &str, window: Window) -> Vec<EngineSpan> {
        let seen_by = |scrapes: &Vec<Scrape>| engine::view(window, near(scrapes, window)).spans;
        let mut spans = self.0.get(observer).map(seen_by).unwrap_or_default();
        if spans.iter().any(|seen| seen.condition < Condition::Up) {
            let others = self.0.iter().filter(|(name, _)| &***name != observer);
            let answered = others
                .flat_map(|(_, scrapes)| seen_by(scrapes))
                .filter(|seen| seen.condition >= Condition::Up);
            // That it ran at another moment says nothing of this one.
            spans.extend(answered.map(|seen| EngineSpan {
                condition: Condition::Up,
                ..seen
            }));
        }
        simplified(&spans)
    }
}

impl Look {
    fn follows(&self, last: &Look) -> bool {
        let grown = |of: fn(Totals) -> u64| self.totals.map(of) >= last.totals.map(of);
        self.models == last.models
            && grown(|totals| totals.prompt_tokens)
            && grown(|totals| totals.completion_tokens)
    }
}

fn within(scrapes: &[Scrape], span: Span) -> &[Scrape] {
    let from = scrapes.partition_point(|scrape| scrape.at < span.from());
    let to = scrapes.partition_point(|scrape| scrape.at < span.to());
    &scrapes[from..to]
}

/// The scrapes that a window's view depends on.
fn near(scrapes: &[Scrape], window: Window) -> &[Scrape] {
    let span = window.span();
    let from = Micros(span.from().0.saturating_sub(NEAR_US));
    within(
        scrapes,
        Span::new(from, Micros(span.to().0.saturating_add(NEAR_US))),
    )
}

/// The same conditions in spans that do not overlap, in order, joined where they touch; that an engine was up goes without saying.
fn simplified(spans: &[EngineSpan]) -> Vec<EngineSpan> {
    let mut cuts: Vec<Micros> = spans
        .iter()
        .flat_map(|seen| [seen.span.from(), seen.span.to()])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut simple: Vec<EngineSpan> = Vec::new();
    for pair in cuts.windows(2) {
        let piece = Span::new(pair[0], pair[1]);
        let covers = |seen: &&EngineSpan| piece.within(seen.span) == piece;
        let seen = spans.iter().filter(covers).max_by_key(|seen| seen.condition);
        let Some(seen) = seen.filter(|seen| seen.condition != Condition::Up) else {
            continue;
        };
        // That it ran must be held against who ran at that moment.
        let is_same = |last: &EngineSpan| {
            last.condition == seen.condition && (last.condition != Condition::Running || last.at == seen.at)
        };
        match simple.last_mut() {
            Some(last) if is_same(last) && last.span.to() == piece.from() => {
                last.span = Span::new(last.span.from(), piece.to());
            }
            _ => simple.push(EngineSpan { span: piece, ..*seen }),
        }
    }
    simple
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    const START: u64 = 1_780_000_005 * SECOND;

    fn at(seconds: u64) -> Micros {
        Micros(START + seconds * SECOND)
    }

    fn look(observer: &str, seconds: u64, condition: Condition, total: impl Into<Option<u64>>) -> Look {
        Look {
            observer: observer.into(),
            at: at(seconds),
            condition,
            totals: total.into().map(|completion_tokens| Totals {
                prompt_tokens: 0,
                completion_tokens,
            }),
            models: 1,
            is_reset: false,
        }
    }

    fn counted(looks: Vec<Look>, window_s: u64) -> Option<u64> {
        let context = Span::new(at(0), at(120));
        let observers = Observers::of(looks);
        let counted = observers.counted(observers.best(context)?, Window::at(at(window_s)));
        counted.map(|work| work.completion_tokens)
    }

    #[test]
    fn counters_of_two_clocks_are_never_mixed() {
        // The other one's clock is 7 s ahead: mixed, counters would seem to fall and to grow.
        let steady = |name: &'static str, shift: u64| {
            (0..8).map(move |n| look(name, 15 * n + shift, Condition::Up, 15 * n * 10))
        };
        for (mine, other) in [(0, 7), (7, 0)] {
            let looks: Vec<Look> = steady("a", mine).chain(steady("b", other)).collect();
            assert_eq!(counted(looks, 30), Some(150));
        }
    }

    #[test]
    fn who_got_most_answers_counts_and_of_equals_the_first_by_name() {
        let few = [look("a", 0, Condition::Up, 0), look("a", 60, Condition::Up, 60)];
        let many = (0..8).map(|n| look("b", 15 * n, Condition::Up, 15 * n * 2));
        assert_eq!(counted(few.iter().cloned().chain(many).collect(), 30), Some(30));
        let same = [look("b", 0, Condition::Up, 0), look("b", 60, Condition::Up, 120)];
        assert_eq!(counted(few.into_iter().chain(same).collect(), 30), Some(15));
    }

    #[test]
    fn counters_that_fell_or_are_of_other_models_began_anew() {
        let grown = |total, models| {
            vec![
                look("a", 0, Condition::Up, 100),
                Look {
                    models,
                    ..look("a", 30, Condition::Up, total)
                },
            ]
        };
        assert_eq!(counted(grown(130, 1), 0), Some(15));
        assert_eq!(counted(grown(99, 1), 0), None);
        assert_eq!(counted(grown(130, 2), 0), None);
    }

    #[test]
    fn an_engine_that_answered_to_anybody_was_not_down() {
        let window = Window::at(at(15));
        let down = |name: &str, seconds| look(name, seconds, Condition::Down, None);
        let looks = vec![
            look("a", 0, Condition::Up, 0),
            down("a", 15),
            down("a", 30),
            look("a", 45, Condition::Up, 0),
        ];
        let seen = |looks: &[Look]| Observers::of(looks.to_vec()).spans("a", window);
        let all_of_it = EngineSpan {
            span: window.span(),
            at: at(15),
            condition: Condition::Down,
        };
        assert_eq!(seen(&looks), [all_of_it]);
        let other = [look("b", 15, Condition::Running, 0)];
        assert_eq!(seen(&[&looks[..], &other].concat()), []);
    }

    #[test]
    fn a_scrape_that_comes_later_and_says_the_same_changes_nothing() {
        let window = Window::at(at(0));
        let first = look("a", 2, Condition::Loading, 0);
        let second = look("a", 12, Condition::Loading, 0);
        let spans = |looks: Vec<Look>| Observers::of(looks).spans("a", window);
        assert_eq!(spans(vec![first.clone()]), spans(vec![first, second]));
    }
}
