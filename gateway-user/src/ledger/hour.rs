//! What an upstream's last hour cost, and for what: for metrics and the console, which tell of money while somebody can still act on it.
//!
//! The hour is the 240 windows that end with the newest booked one, or all since the account opened while these are fewer. It is read back from
//! ClickHouse, so that it is the same whichever gateway tells it, but for what was written since each of them looked. It is known only when none of its
//! windows is missing and its rows sum to its heads.

use std::collections::BTreeMap;

use super::facts::{DOWN, IDLE, LOADING, SCALED_TO_ZERO, UNATTRIBUTED};
use super::money::NanoUsd;
use super::time::{Micros, Span, Window};

/// Windows of an hour.
const WINDOWS: u64 = 3_600_000_000 / Window::LEN_US;

/// How late the books may be: as much as the alert on their lag allows. What they say then is of another hour.
const LATE_MAX_US: u64 = 600_000_000;

/// What the upstream's time was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Line {
    /// What teams' requests took.
    Teams,
    /// Nobody used it; whoever pays for that.
    Idle,
    /// No known request asked for it.
    Unattributed,
    /// It loaded its model.
    Loading,
    /// It did not answer.
    Down,
    /// There was none, on purpose.
    ScaledToZero,
}

impl Line {
    /// All of them, in the order in which they are told.
    pub const ALL: [Line; 6] = [
        Line::Teams,
        Line::Idle,
        Line::Unattributed,
        Line::Loading,
        Line::Down,
        Line::ScaledToZero,
    ];

    /// As a label: the ledger's own name, but for the teams together.
    pub fn name(self) -> &'static str {
        match self {
            Line::Teams => "teams",
            Line::Idle => IDLE,
            Line::Unattributed => UNATTRIBUTED,
            Line::Loading => LOADING,
            Line::Down => DOWN,
            Line::ScaledToZero => SCALED_TO_ZERO,
        }
    }

    /// The line of a row of `cost_ledger`. A team's share of idle time has `__idle__` for a model.
    pub fn of(team_id: &str, model: &str) -> Line {
        let is_named = |line: &Line| *line != Line::Teams && line.name() == team_id;
        match model {
            IDLE => Line::Idle,
            _ => Line::ALL.into_iter().find(is_named).unwrap_or(Line::Teams),
        }
    }
}

/// What an hour cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HourCost {
    /// Its booked windows.
    pub span: Span,
    /// By line, in the order of [`Line::ALL`].
    costs: [NanoUsd; Line::ALL.len()],
}

impl HourCost {
    /// The rows of `span`, if they sum to the bill of its heads.
    pub fn of(
        span: Span,
        bill: NanoUsd,
        rows: impl IntoIterator<Item = (Line, NanoUsd)>,
    ) -> Option<HourCost> {
        let mut costs = [NanoUsd(0); Line::ALL.len()];
        for (line, cost) in rows {
            costs[line as usize] += cost;
        }
        let sum: u64 = costs.iter().map(|cost| cost.0).sum();
        (sum == bill.0).then_some(HourCost { span, costs })
    }

    /// What was for this.
    pub fn cost(&self, line: Line) -> NanoUsd {
        self.costs[line as usize]
    }

    /// Whether this is still the last hour.
    pub fn is_of(&self, now: Micros) -> bool {
        self.span.to().0 + LATE_MAX_US >= now.0
    }
}

/// Where the windows of the last hour can lie.
pub fn looked_at(now: Micros) -> Span {
    let back_us = WINDOWS * Window::LEN_US + LATE_MAX_US;
    Span::new(Window::at(Micros(now.0.saturating_sub(back_us))).start(), now)
}

/// The last hour of booked windows of an account that opened then; `None` while a window of it is not booked. `heads` are the bills of windows by their
/// starts.
pub fn last(heads: &BTreeMap<Micros, NanoUsd>, opened: Micros) -> Option<Span> {
    let (newest, _) = heads.last_key_value()?;
    let to = Window::at(*newest).next().start();
    let from = Micros(to.0.saturating_sub(WINDOWS * Window::LEN_US)).max(Window::at(opened).start());
    let windows = Span::new(from, to).len_us() / Window::LEN_US;
    (heads.range(from..to).count() as u64 == windows).then_some(Span::new(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Starts of windows by their number, each of which cost 1.
    fn heads(numbers: impl IntoIterator<Item = u64>) -> BTreeMap<Micros, NanoUsd> {
        let start = |number| Micros(number * Window::LEN_US);
        numbers
            .into_iter()
            .map(|number| (start(number), NanoUsd(1)))
            .collect()
    }

    fn windows(from: u64, to: u64) -> Option<Span> {
        Some(Span::new(
            Micros(from * Window::LEN_US),
            Micros(to * Window::LEN_US),
        ))
    }

    #[test]
    fn an_hour_is_known_when_all_of_its_windows_are_booked() {
        let opened = Micros(0);
        assert_eq!(last(&heads(0..1000), opened), windows(760, 1000));
        assert_eq!(last(&heads(760..1000), opened), windows(760, 1000));
        assert_eq!(last(&heads(761..1000), opened), None, "its first is missing");
        let with_hole = heads((0..900).chain(901..1000));
        assert_eq!(last(&with_hole, opened), None, "one in its middle is missing");
        assert_eq!(last(&BTreeMap::new(), opened), None);
    }

    #[test]
    fn a_young_account_has_less() {
        let opened = Micros(100 * Window::LEN_US + 1);
        assert_eq!(last(&heads(100..103), opened), windows(100, 103));
        assert_eq!(last(&heads(101..103), opened), None, "its first is missing");
    }

    #[test]
    fn what_does_not_sum_to_the_bill_is_not_known() {
        let span = Span::new(Micros(0), Micros(Window::LEN_US));
        let rows = [(Line::Teams, NanoUsd(3)), (Line::Idle, NanoUsd(4))];
        let hour = HourCost::of(span, NanoUsd(7), rows).expect("it sums");
        assert_eq!(Line::ALL.map(|line| hour.cost(line).0), [3, 4, 0, 0, 0, 0]);
        assert_eq!(HourCost::of(span, NanoUsd(8), rows), None);
    }

    #[test]
    fn idle_time_is_that_whoever_pays_for_it() {
        for (team, model, line) in [
            ("search", "m", Line::Teams),
            ("search", IDLE, Line::Idle),
            (IDLE, "", Line::Idle),
            (UNATTRIBUTED, "m", Line::Unattributed),
            (SCALED_TO_ZERO, "", Line::ScaledToZero),
            ("__direct__", "m", Line::Teams),
            ("teams", "m", Line::Teams),
        ] {
            assert_eq!(Line::of(team, model), line, "{team} {model}");
        }
    }

    #[test]
    fn what_was_booked_long_ago_is_not_the_last_hour() {
        let span = Span::new(Micros(0), Micros(Window::LEN_US));
        let hour = HourCost::of(span, NanoUsd(0), []).expect("it sums");
        let limit = Window::LEN_US + LATE_MAX_US;
        assert!(hour.is_of(Micros(limit)) && !hour.is_of(Micros(limit + 1)));
    }
}
