//! What is known of each window of a span, out of what was read around it.

use std::collections::BTreeMap;

use super::due::windows;
use super::facts::Work;
use super::gap::{Difference, gap};
use super::head::{Inputs, Tally};
use super::observers::{NEAR_US, Observers};
use super::time::{Micros, Span, Window};

/// How far around `span` segments must be known, for contexts of `reach` windows.
pub fn span_of_tallies(span: Span, reach: u64) -> Span {
    widened(span, reach * Window::LEN_US)
}

/// How far around `span` scrapes must be known.
pub fn span_of_scrapes(span: Span, reach: u64) -> Span {
    widened(span, reach * Window::LEN_US + NEAR_US)
}

fn widened(span: Span, by_us: u64) -> Span {
    Span::new(
        Micros(span.from().0.saturating_sub(by_us)),
        Micros(span.to().0.saturating_add(by_us)),
    )
}

/// What is known of each window of `span`, in order. It follows from what lies within `reach` windows of each of them, however long the span is.
pub fn inputs(
    span: Span,
    reach: u64,
    tallies: &BTreeMap<Window, Tally>,
    observers: &Observers,
) -> Vec<Inputs> {
    let around: Vec<Window> = windows(span_of_tallies(span, reach)).collect();
    let tally = |window: &Window| tallies.get(window).copied().unwrap_or_default();
    // The differences as each observer sees them.
    let differences: BTreeMap<&str, Vec<Difference>> = observers
        .names()
        .map(|name| {
            let difference = |window: &Window| Difference {
                counted: observers.counted(name, *window),
                known: tally(window).work,
            };
            (name, around.iter().map(difference).collect())
        })
        .collect();
    let first = around.partition_point(|window| window.start() < span.from());
    windows(span)
        .enumerate()
        .map(|(number, window)| {
            let context = span_of_tallies(window.span(), reach);
            let observer = observers.best(context).unwrap_or_default();
            let seen = differences.get(observer);
            let place = first + number;
            Inputs {
                window,
                tally: tally(&window),
                spans: observers.spans(observer, window),
                counted: seen.and_then(|seen| seen[place].counted),
                gap: seen.map_or(Work::default(), |seen| gap(seen, place, reach as usize)),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::{Condition, Look, Totals};

    const SECOND: u64 = 1_000_000;

    const START: u64 = 1_780_000_005 * SECOND;

    /// Scrapes of two gateways with clocks that differ, of an engine that generates 100 tokens a second, and a little else.
    fn looks(from_s: u64, to_s: u64, downs: &[u64]) -> Vec<Look> {
        let look = |name: &str, second: u64| Look {
            observer: name.into(),
            at: Micros(START + second * SECOND),
            condition: match downs.contains(&(second / 60)) {
                true => Condition::Down,
                false => Condition::Up,
            },
            totals: (!downs.contains(&(second / 60))).then_some(Totals {
                prompt_tokens: second / 7,
                completion_tokens: 100 * second,
            }),
            models: 1,
            is_reset: false,
        };
        let times = |shift: u64| (from_s..to_s).filter(move |second| second % 15 == shift);
        let one = times(2).map(|second| look("a", second));
        one.chain(times(9).map(|second| look("b", second))).collect()
    }

    fn tallies(known: &[u64]) -> BTreeMap<Window, Tally> {
        let tally = |(number, completion_tokens): (usize, &u64)| {
            let work = Work {
                completion_tokens: *completion_tokens,
                ..Work::default()
            };
            let window = Window::at(Micros(START + number as u64 * Window::LEN_US));
            (
                window,
                Tally {
                    segments: 1,
                    work,
                    hash: *completion_tokens,
                },
            )
        };
        known.iter().enumerate().map(tally).collect()
    }

    fn span(from: u64, to: u64) -> Span {
        Span::new(
            Micros(START + from * Window::LEN_US),
            Micros(START + to * Window::LEN_US),
        )
    }

    #[test]
    fn steady_direct_traffic_beside_known_requests_is_found_to_the_token() {
        // 1500 tokens a window, of which 1000 are known.
        let tallies = tallies(&[1_000; 40]);
        let observers = Observers::of(looks(0, 600, &[]));
        let found = inputs(span(10, 30), 4, &tallies, &observers);
        let gaps: Vec<u64> = found.iter().map(|window| window.gap.completion_tokens).collect();
        assert_eq!(gaps, [500; 20]);
    }

    proptest! {
        #[test]
        fn a_window_is_the_same_whichever_others_are_computed_with_it(
            known in prop::collection::vec(0_u64..3_000, 200),
            downs in prop::collection::vec(0_u64..50, 0..5),
            cuts in prop::collection::btree_set(61_u64..140, 0..6),
            reach in 0_u64..20,
        ) {
            let (tallies, all) = (tallies(&known), looks(0, 3_000, &downs));
            // What is read for a span is no more than the span takes.
            let read = |span: Span| {
                let (of_tallies, of_scrapes) = (span_of_tallies(span, reach), span_of_scrapes(span, reach));
                let tallies = tallies.iter().filter(|(window, _)| !window.span().within(of_tallies).is_empty());
                let tallies = tallies.map(|(window, tally)| (*window, *tally)).collect();
                let looks = all.iter().filter(|look| of_scrapes.from() <= look.at && look.at < of_scrapes.to());
                inputs(span, reach, &tallies, &Observers::of(looks.cloned().collect()))
            };
            let edges: Vec<u64> = [60].into_iter().chain(cuts).chain([140]).collect();
            let pieces = edges.windows(2).flat_map(|pair| read(span(pair[0], pair[1])));
            prop_assert_eq!(pieces.collect::<Vec<_>>(), read(span(60, 140)));
        }
    }
}
