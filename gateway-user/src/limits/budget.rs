//! What a team's requests were charged in a period: here, and elsewhere as far as that is known.
//!
//! Periods are those of the calendar in UTC. Two are kept at a time, so that what ends just behind the edge of one, or a clock that is set back
//! over it, takes nothing from either.

use crate::config::BudgetPeriod;
use crate::ledger::{Micros, Month, NanoUsd, Span};

/// Microseconds of a day.
const DAY_US: u64 = 86_400_000_000;

/// The period that a moment is in.
pub fn period_at(kind: BudgetPeriod, now: Micros) -> Span {
    match kind {
        BudgetPeriod::Day => {
            let from = now.0 - now.0 % DAY_US;
            Span::new(Micros(from), Micros(from.saturating_add(DAY_US)))
        }
        BudgetPeriod::Month => Month::of(now).span(),
    }
}

/// What was charged, by period.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spending {
    kind: BudgetPeriod,
    /// The one that was needed last comes first.
    periods: [Spent; 2],
}

/// What was charged in one period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spent {
    period: Span,
    /// By this gateway, since it runs.
    here: NanoUsd,
    /// By others, and by this one before.
    elsewhere: NanoUsd,
}

impl Spent {
    fn nothing(period: Span) -> Spent {
        Spent {
            period,
            here: NanoUsd(0),
            elsewhere: NanoUsd(0),
        }
    }
}

impl Spending {
    /// Nothing yet.
    pub fn new(kind: BudgetPeriod) -> Spending {
        let none = Spent::nothing(Span::new(Micros(0), Micros(0)));
        Spending {
            kind,
            periods: [none; 2],
        }
    }

    /// The period that a moment is in.
    pub fn period(&self, now: Micros) -> Span {
        let known = self.periods.iter().find(|spent| is_in(now, spent.period));
        known.map_or_else(|| period_at(self.kind, now), |spent| spent.period)
    }

    /// Takes note of a request that ended here at `ended`.
    pub fn charge(&mut self, ended: Micros, amount: NanoUsd) {
        self.at(ended).here += amount;
    }

    /// Takes note of all that was charged elsewhere in the period that begins at `from`. It may be less than what was known before: then that
    /// was corrected.
    pub fn learn(&mut self, from: Micros, elsewhere: NanoUsd) {
        self.at(from).elsewhere = elsewhere;
    }

    /// What was charged in the period that `now` is in.
    pub fn spent(&self, now: Micros) -> NanoUsd {
        let known = self.periods.iter().find(|spent| is_in(now, spent.period));
        known.map_or(NanoUsd(0), |spent| spent.here + spent.elsewhere)
    }

    fn at(&mut self, moment: Micros) -> &mut Spent {
        let known = self.periods.iter().position(|spent| is_in(moment, spent.period));
        let place = known.unwrap_or_else(|| {
            self.periods.swap(0, 1);
            self.periods[0] = Spent::nothing(period_at(self.kind, moment));
            0
        });
        &mut self.periods[place]
    }
}

fn is_in(moment: Micros, period: Span) -> bool {
    (period.from()..period.to()).contains(&moment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Micros {
        text.parse().unwrap()
    }

    #[test]
    fn periods_are_the_calendars() {
        let day = period_at(BudgetPeriod::Day, at("2026-02-28T23:59:59Z"));
        assert_eq!((day.from(), day.to()), (at("2026-02-28"), at("2026-03-01")));
        let month = period_at(BudgetPeriod::Month, at("2026-02-28T23:59:59Z"));
        assert_eq!((month.from(), month.to()), (at("2026-02-01"), at("2026-03-01")));
        assert_eq!(
            period_at(BudgetPeriod::Month, at("2026-03-01")).from(),
            at("2026-03-01")
        );
    }

    #[test]
    fn what_is_spent_begins_anew_with_the_period_and_the_past_is_not_lost_at_its_edge() {
        let mut spending = Spending::new(BudgetPeriod::Month);
        let (old, new) = (at("2026-01-31T23:59:59Z"), at("2026-02-01"));
        spending.charge(old, NanoUsd(5));
        spending.learn(at("2026-01-01"), NanoUsd(7));
        assert_eq!(
            (spending.spent(old), spending.spent(new)),
            (NanoUsd(12), NanoUsd(0))
        );
        spending.charge(new, NanoUsd(1));
        // A clock that is set back by a second, and forth again.
        spending.charge(old, NanoUsd(1));
        assert_eq!(
            (spending.spent(old), spending.spent(new)),
            (NanoUsd(13), NanoUsd(1))
        );
        spending.learn(at("2026-02-01"), NanoUsd(3));
        spending.learn(at("2026-02-01"), NanoUsd(2));
        assert_eq!(spending.spent(new), NanoUsd(3), "what is read again is not added");
    }

    proptest! {
        /// Whatever comes in which order, the running period has all that was charged in it.
        #[test]
        fn the_running_day_has_what_was_charged_in_it(charges in prop::collection::vec((0_u64..3 * 86_400, 0_u64..1000), 0..100)) {
            let mut charges = charges;
            charges.sort_unstable();
            let mut spending = Spending::new(BudgetPeriod::Day);
            for (second, amount) in &charges {
                spending.charge(Micros(second * 1_000_000), NanoUsd(*amount));
            }
            let last = charges.last().map_or(0, |(second, _)| second / 86_400);
            let expected: u64 = charges.iter().filter(|(second, _)| second / 86_400 == last).map(|(_, amount)| amount).sum();
            prop_assert_eq!(spending.spent(Micros(last * DAY_US + 1)), NanoUsd(expected));
        }
    }
}
