//! Which windows of an upstream are looked at.
//!
//! An account opens with the upstream's first fact, and from there on every whole window is booked, also those in which no gateway ran: the upstream
//! cost what it cost. What is due is always a set of whole windows, so that it can be cut into spans of any size.

use std::collections::BTreeSet;

use super::time::{Micros, Span, Window};

/// Microseconds of a day.
const DAY_US: u64 = 86_400_000_000;

/// A month, by its first moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month(Micros);

/// Between which moments windows of an upstream are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// From the start of the window with its first fact on.
    pub opened: Micros,
    /// Windows that began before this have lost segments or scrapes to old age, or will before long: computed anew, what somebody had paid for
    /// would become idle time.
    pub kept: Micros,
    /// Windows that ended by this moment are over.
    pub over: Micros,
}

/// Why a text is no month.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a month such as 2026-10")]
pub struct NoMonth;

impl Month {
    /// The month that a moment lies in.
    pub fn of(moment: Micros) -> Month {
        let text = moment.to_string();
        // A date has its month in its first seven letters, in this millennium as in the next seven.
        format!("{}-01", &text[..7])
            .parse()
            .map(Month)
            .unwrap_or(Month(moment))
    }

    /// Its time.
    pub fn span(self) -> Span {
        // No month is longer, and none so short that the next one is over by then.
        let end = Month::of(Micros(self.0.0 + 31 * DAY_US));
        Span::new(self.0, end.0)
    }
}

impl std::fmt::Display for Month {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.to_string()[..7])
    }
}

impl std::str::FromStr for Month {
    type Err = NoMonth;

    fn from_str(text: &str) -> Result<Month, NoMonth> {
        format!("{text}-01").parse().map(Month).map_err(|_| NoMonth)
    }
}

impl Bounds {
    /// The whole windows that can be computed.
    pub fn span(&self) -> Span {
        let from = self.opened.max(self.kept);
        let whole = Window::at(from).start();
        let from = if whole < from {
            Window::at(from).next().start()
        } else {
            whole
        };
        Span::new(from, Window::at(self.over).start())
    }
}

/// Spans of whole windows: those that were touched and all whose statement can depend on them, which lie within `reach` windows of them.
pub fn around(touched: &BTreeSet<Micros>, reach: u64) -> Vec<Span> {
    let reach_us = reach * Window::LEN_US;
    let near = touched.iter().map(|start| {
        let window = Window::at(*start).span();
        Span::new(
            Micros(window.from().0.saturating_sub(reach_us)),
            Micros(window.to().0 + reach_us),
        )
    });
    joined(near.collect())
}

/// The same time in spans that do not overlap, in order, joined where they touch.
pub fn joined(mut spans: Vec<Span>) -> Vec<Span> {
    spans.retain(|span| !span.is_empty());
    spans.sort_unstable();
    let mut joined: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match joined.last_mut() {
            Some(last) if span.from() <= last.to() => {
                *last = Span::new(last.from(), last.to().max(span.to()));
            }
            _ => joined.push(span),
        }
    }
    joined
}

/// What of `spans`, which are in order and apart, lies in `within` and in none of the months.
pub fn open_parts(spans: &[Span], within: Span, closed: &BTreeSet<Month>) -> Vec<Span> {
    let mut parts = Vec::new();
    for span in spans {
        let span = span.within(within);
        let mut from = span.from();
        for month in closed {
            let month = month.span().within(span);
            if !month.is_empty() {
                parts.push(Span::new(from, month.from()));
                from = from.max(month.to());
            }
        }
        parts.push(Span::new(from, span.to()));
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// What of `span` is in none of `there`, which are starts of windows: in whole windows.
pub fn holes(span: Span, there: &BTreeSet<Micros>) -> Vec<Span> {
    let mut holes = Vec::new();
    let mut from = span.from();
    for start in there.range(span.from()..span.to()) {
        holes.push(Span::new(from, *start));
        from = Window::at(*start).span().to();
    }
    holes.push(Span::new(from, span.to()));
    holes.retain(|hole| !hole.is_empty());
    holes
}

/// Cuts spans of whole windows so that none has more than `windows` of them.
pub fn chunks(spans: &[Span], windows: u64) -> Vec<Span> {
    let len_us = windows.max(1) * Window::LEN_US;
    let mut chunks = Vec::new();
    for span in spans {
        let mut from = span.from();
        while from < span.to() {
            let to = Micros(from.0 + len_us).min(span.to());
            chunks.push(Span::new(from, to));
            from = to;
        }
    }
    chunks
}

/// The windows of a span of whole windows.
pub fn windows(span: Span) -> impl Iterator<Item = Window> {
    std::iter::successors(Some(Window::at(span.from())), |window| Some(window.next()))
        .take_while(move |window| window.start() < span.to())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The start of a window.
    fn at(window: u64) -> Micros {
        Micros((118_666_667 + window) * Window::LEN_US)
    }

    fn span(from: u64, to: u64) -> Span {
        Span::new(at(from), at(to))
    }

    fn starts(spans: &[Span]) -> BTreeSet<Micros> {
        spans
            .iter()
            .flat_map(|span| windows(*span))
            .map(Window::start)
            .collect()
    }

    #[test]
    fn a_month_is_its_days() {
        for (text, days) in [("2026-02", 28), ("2028-02", 29), ("2026-11", 30), ("2026-12", 31)] {
            let month: Month = text.parse().unwrap();
            assert_eq!(month.span().len_us(), days * DAY_US, "{text}");
            assert_eq!(month.to_string(), text);
            assert_eq!(Month::of(Micros(month.span().to().0 - 1)), month);
            assert!(Month::of(month.span().to()) > month);
        }
        for text in ["2026-13", "2026", "2026-1", "2026-10-01", ""] {
            assert_eq!(text.parse::<Month>(), Err(NoMonth), "{text}");
        }
    }

    #[test]
    fn whole_windows_are_due_from_the_first_fact_until_now_and_none_that_facts_were_lost_of() {
        let bounds = Bounds {
            opened: at(5),
            kept: at(0),
            over: Micros(at(9).0 + 1),
        };
        assert_eq!(bounds.span(), span(5, 9));
        let kept = Micros(at(6).0 + 1);
        assert_eq!(Bounds { kept, ..bounds }.span(), span(7, 9));
        assert!(
            Bounds {
                over: at(3),
                ..bounds
            }
            .span()
            .is_empty()
        );
    }

    #[test]
    fn what_was_touched_is_due_with_its_neighbours_once() {
        let touched = [at(10), at(13), at(40)].into();
        assert_eq!(around(&touched, 2), [span(8, 16), span(38, 43)]);
    }

    #[test]
    fn nothing_of_a_closed_month_is_due() {
        let month: Month = "2026-10".parse().unwrap();
        let day = |days: i64| Micros((month.span().from().0 as i64 + days * DAY_US as i64) as u64);
        let all = Span::new(day(-2), day(40));
        let spans = [Span::new(day(-5), day(2)), Span::new(day(30), day(33))];
        let open = open_parts(&spans, all, &[month].into());
        assert_eq!(open, [Span::new(day(-2), day(0)), Span::new(day(31), day(33))]);
        assert_eq!(open_parts(&spans[1..], all, &BTreeSet::new()), spans[1..]);
    }

    proptest! {
        #[test]
        fn holes_are_all_that_is_not_there(there in prop::collection::btree_set(0_u64..60, 0..40), from in 0_u64..50, len in 0_u64..30) {
            let there: BTreeSet<Micros> = there.into_iter().map(at).collect();
            let whole = span(from, from + len);
            let expected: BTreeSet<Micros> = starts(&[whole]).difference(&there).copied().collect();
            prop_assert_eq!(starts(&holes(whole, &there)), expected);
        }

        #[test]
        fn chunks_are_the_same_windows_in_pieces(pairs in prop::collection::vec((0_u64..90, 1_u64..40), 0..6), size in 1_u64..20) {
            let spans = joined(pairs.into_iter().map(|(from, len)| span(from, from + len)).collect());
            let pieces = chunks(&spans, size);
            prop_assert!(pieces.iter().all(|piece| piece.len_us() <= size * Window::LEN_US));
            prop_assert_eq!(starts(&pieces), starts(&spans));
            let count: usize = pieces.iter().map(|piece| windows(*piece).count()).sum();
            prop_assert_eq!(count, starts(&spans).len());
        }
    }
}
