//! The bill of a month, and how an invoice is shared out by it.

use super::line::{Line, Whose};
use crate::command::time;
use crate::ledger::NanoUsd;
use crate::ledger::money::apportion;
use crate::store::figures::Period;

/// A calendar month (UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Month {
    from_us: i64,
    to_us: i64,
}

/// A month's bill: what a report has besides.
#[derive(Clone, Copy, Debug)]
pub struct Bill {
    /// The month.
    pub month: Month,
    /// Whether it is over.
    pub is_over: bool,
    /// What the invoice says, and by how much it differs.
    pub invoice: Option<Invoice>,
}

/// What a month did cost in the end, and what the ledger has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invoice {
    /// Its amount.
    pub actual_nano_usd: i64,
    /// What all lines sum to.
    pub cost_nano_usd: i64,
}

/// Why an invoice cannot be shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected costs in the month to share the invoice out by, found none booked: check the month, and that a gateway books the ledger there"
)]
pub struct NothingToShareBy;

impl Month {
    /// Reads `2026-11`.
    ///
    /// # Errors
    /// What was expected. (What was found, clap says.)
    pub fn parse(text: &str) -> Result<Month, String> {
        time::parse_month(text)
            .map(|(from_us, to_us)| Month { from_us, to_us })
            .ok_or_else(|| "expected a month such as 2026-11, from 1970-01 to 2199-11".to_owned())
    }

    /// All of it, which is never empty.
    pub fn period(self) -> Option<Period> {
        Period::new(self.from_us, self.to_us)
    }

    /// Its name.
    pub fn name(self) -> String {
        time::format(self.from_us).chars().take(7).collect()
    }

    /// The first moment behind it.
    pub fn to_us(self) -> i64 {
        self.to_us
    }
}

impl Invoice {
    /// What a dollar of cost came to.
    pub fn factor(self) -> f64 {
        self.actual_nano_usd as f64 / self.cost_nano_usd as f64
    }
}

/// Reads an amount of the invoice, in USD.
///
/// # Errors
/// What was expected. (What was found, clap says.)
pub fn parse_amount(text: &str) -> Result<NanoUsd, String> {
    let amount = NanoUsd::from_usd(text).map_err(|error| format!("expected an amount in USD: {error}"))?;
    // What a column of amounts can hold.
    i64::try_from(amount.0)
        .map(|_| amount)
        .map_err(|_| "expected an amount below 9 billion USD".to_owned())
}

/// Shares `actual` out in proportion to costs, by largest remainder, so that the parts sum to it to the nano-USD.
///
/// # Errors
/// When nothing costs anything.
pub fn share_out(actual: NanoUsd, costs: &[i64]) -> Result<Vec<i64>, NothingToShareBy> {
    let weights: Vec<u128> = costs
        .iter()
        .map(|cost| u128::try_from(*cost).unwrap_or(0))
        .collect();
    if weights.iter().all(|weight| *weight == 0) {
        return Err(NothingToShareBy);
    }
    let parts = apportion(actual.0, &weights).into_iter();
    Ok(parts.map(|part| NanoUsd(part).as_i64()).collect())
}

/// Gives every line its share of the invoice, and the total all of it.
///
/// # Errors
/// When nothing costs anything.
pub fn true_up(lines: &mut [Line], actual: NanoUsd) -> Result<Invoice, NothingToShareBy> {
    let is_total = |line: &Line| line.whose == Whose::Total;
    let mut payers: Vec<&mut Line> = lines.iter_mut().filter(|line| !is_total(line)).collect();
    let costs: Vec<i64> = payers
        .iter()
        .map(|line| line.cost_nano_usd().unwrap_or(0))
        .collect();
    for (line, part) in payers.iter_mut().zip(share_out(actual, &costs)?) {
        line.actual_nano_usd = line.cost.map(|_| part);
    }
    for total in lines.iter_mut().filter(|line| is_total(line)) {
        total.actual_nano_usd = Some(actual.as_i64());
    }
    Ok(Invoice {
        actual_nano_usd: actual.as_i64(),
        cost_nano_usd: costs.iter().sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::figures::Cost;
    use proptest::prelude::*;

    fn line(whose: Whose, nano_usd: Option<i64>) -> Line {
        Line {
            whose,
            figures: None,
            cost: nano_usd.map(|nano_usd| Cost {
                nano_usd,
                ..Cost::default()
            }),
            bill_nano_usd: None,
            actual_nano_usd: None,
        }
    }

    #[test]
    fn a_month_has_its_days() {
        let month = Month::parse("2028-02").expect("a month");
        assert_eq!((month.to_us - month.from_us) / 86_400_000_000, 29);
        assert_eq!(month.name(), "2028-02");
        for text in [
            "2026",
            "2026-13",
            "2026-00",
            "2026-1",
            "2026-11-01",
            "11-2026",
            "",
        ] {
            assert!(Month::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_invoice_without_costs_is_not_shared_out_by_chance() {
        assert_eq!(share_out(NanoUsd(5), &[0, 0]), Err(NothingToShareBy));
        assert_eq!(share_out(NanoUsd(5), &[]), Err(NothingToShareBy));
        assert!(parse_amount("9999999999").is_err() && parse_amount("-1").is_err());
    }

    proptest! {
        #[test]
        fn shares_sum_to_the_invoice_and_none_is_off_by_more_than_a_nano(
            actual in 0..i64::MAX as u64,
            costs in prop::collection::vec(prop::option::of(0..1_i64 << 50), 1..30),
        ) {
            let mut lines: Vec<Line> = costs.iter().map(|cost| line(Whose::Group(Vec::new()), *cost)).collect();
            lines.push(line(Whose::Total, Some(costs.iter().flatten().sum())));
            let sum: i64 = costs.iter().flatten().sum();
            let Ok(invoice) = true_up(&mut lines, NanoUsd(actual)) else {
                prop_assert_eq!(sum, 0);
                return Ok(());
            };
            prop_assert_eq!(invoice, Invoice { actual_nano_usd: actual as i64, cost_nano_usd: sum });
            let total = lines.pop().expect("the total");
            prop_assert_eq!(total.actual_nano_usd, Some(actual as i64));
            let shares: i64 = lines.iter().filter_map(|line| line.actual_nano_usd).sum();
            prop_assert_eq!(shares, actual as i64);
            for (line, cost) in lines.iter().zip(&costs) {
                prop_assert_eq!(line.actual_nano_usd.is_some(), cost.is_some(), "unknown stays unknown");
                let exact = i128::from(actual) * i128::from(cost.unwrap_or(0)) / i128::from(sum);
                let share = i128::from(line.actual_nano_usd.unwrap_or(0));
                prop_assert!((exact..=exact + 1).contains(&share), "{share} for {exact}");
            }
        }
    }
}
