//! Amounts in whole nano-USD, decimals that are not floats, and how an amount is divided without losing any of it.

use std::cmp::Reverse;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

use serde::{Serialize, Serializer};

/// An amount of money that is not negative: billionths of a US dollar. 64 bits hold eighteen billion dollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NanoUsd(pub u64);

impl NanoUsd {
    /// Decimal places of a dollar.
    pub const PLACES: u32 = 9;

    /// One dollar.
    pub const USD: u64 = 10_u64.pow(Self::PLACES);

    /// Reads dollars as people write them: `2.50`.
    ///
    /// # Errors
    /// When the text is no decimal of at most nine places, or too large.
    pub fn from_usd(text: &str) -> Result<NanoUsd, NoDecimal> {
        parse_decimal(text, Self::PLACES).map(NanoUsd)
    }

    /// In the type of the column, which sums may make negative (corrections); no real amount comes near its end.
    pub fn as_i64(self) -> i64 {
        i64::try_from(self.0).unwrap_or(i64::MAX)
    }
}

impl fmt::Display for NanoUsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_decimal(f, self.0, Self::PLACES)
    }
}

/// In the config: dollars, as a number. Seventeen digits are more than any price has, so that it reads back as it was.
impl Serialize for NanoUsd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0 as f64 / Self::USD as f64)
    }
}

impl Add for NanoUsd {
    type Output = NanoUsd;

    fn add(self, other: NanoUsd) -> NanoUsd {
        NanoUsd(self.0.saturating_add(other.0))
    }
}

impl AddAssign for NanoUsd {
    fn add_assign(&mut self, other: NanoUsd) {
        *self = *self + other;
    }
}

impl Sum for NanoUsd {
    fn sum<I: Iterator<Item = NanoUsd>>(amounts: I) -> NanoUsd {
        amounts.fold(NanoUsd(0), Add::add)
    }
}

/// Divides `total` in proportion to `weights`, by largest remainder: the parts sum to `total`, and each is its exact part rounded down or
/// up. Of equal remainders the earlier one counts first, so that the order of the weights must come from the facts and not from chance.
/// Where no weight is more than 0 the parts are equal.
///
/// There must be someone to pay: without weights there are no parts.
pub fn apportion(total: u64, weights: &[u128]) -> Vec<u64> {
    let sum: u128 = weights.iter().sum();
    if sum == 0 && !weights.is_empty() {
        return apportion(total, &vec![1; weights.len()]);
    }
    // Weights that would not fit the product lose their last bits, all alike; those of a window do fit.
    let shift = (64 - total.leading_zeros()).saturating_sub(sum.leading_zeros());
    let weights: Vec<u128> = weights.iter().map(|weight| weight >> shift).collect();
    let sum: u128 = weights.iter().sum();
    let mut parts = Vec::with_capacity(weights.len());
    let mut remainders = Vec::with_capacity(weights.len());
    for (index, weight) in weights.iter().enumerate() {
        let product = u128::from(total) * weight;
        parts.push((product / sum) as u64);
        remainders.push((Reverse(product % sum), index));
    }
    let missing = total - parts.iter().sum::<u64>();
    remainders.sort_unstable();
    for (_, index) in remainders.iter().take(missing as usize) {
        parts[*index] += 1;
    }
    parts
}

/// Why a text is no decimal that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoDecimal {
    /// Not digits, perhaps with a point among them.
    #[error("it must be digits with at most one point, such as 2.50, and not negative")]
    NotDigits,
    /// More places than are counted.
    #[error("it must have at most {places} digits behind the point")]
    TooFine {
        /// How many are counted.
        places: u32,
    },
    /// More than can be counted.
    #[error("it is too large")]
    TooLarge,
}

/// Reads a decimal as a whole number of its last place.
pub(super) fn parse_decimal(text: &str, places: u32) -> Result<u64, NoDecimal> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) {
        return Err(NoDecimal::NotDigits);
    }
    let fraction = fraction.trim_end_matches('0');
    let padding = (places as usize)
        .checked_sub(fraction.len())
        .ok_or(NoDecimal::TooFine { places })?;
    let digits = format!("{whole}{fraction}{}", "0".repeat(padding));
    digits.parse().map_err(|_| NoDecimal::TooLarge)
}

/// Writes what [`parse_decimal`] reads, without zeros at the end.
pub(super) fn write_decimal(f: &mut fmt::Formatter<'_>, value: u64, places: u32) -> fmt::Result {
    let unit = 10_u64.pow(places);
    let fraction = format!("{:0width$}", value % unit, width = places as usize);
    match fraction.trim_end_matches('0') {
        "" => write!(f, "{}", value / unit),
        fraction => write!(f, "{}.{fraction}", value / unit),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dollars_are_read_to_the_nano() {
        for (text, nano) in [
            ("2.50", 2_500_000_000),
            ("2.5", 2_500_000_000),
            ("0", 0),
            ("0.000000001", 1),
            ("12", 12_000_000_000),
            ("1.0000000000000", 1_000_000_000),
        ] {
            assert_eq!(NanoUsd::from_usd(text), Ok(NanoUsd(nano)), "{text}");
        }
        for text in ["", ".", "1.", ".5", "-1", "+1", "1e3", "1,5", "NaN", " 1"] {
            assert_eq!(NanoUsd::from_usd(text), Err(NoDecimal::NotDigits), "{text}");
        }
        assert_eq!(
            NanoUsd::from_usd("0.0000000001"),
            Err(NoDecimal::TooFine { places: 9 })
        );
        assert_eq!(NanoUsd::from_usd("99999999999"), Err(NoDecimal::TooLarge));
    }

    #[test]
    fn what_is_left_over_goes_to_the_largest_remainders_and_of_equal_ones_to_the_first() {
        assert_eq!(apportion(10, &[1, 1, 1]), [4, 3, 3]);
        assert_eq!(apportion(10, &[1, 2, 4]), [1, 3, 6]);
        assert_eq!(apportion(5, &[0, 0]), [3, 2]);
        assert_eq!(apportion(7, &[0, 1]), [0, 7]);
        assert!(apportion(0, &[]).is_empty());
    }

    proptest! {
        #[test]
        fn parts_sum_to_the_whole_and_none_is_off_by_one(
            total: u64,
            weights in prop::collection::vec(0_u128..1 << 60, 1..20),
        ) {
            let parts = apportion(total, &weights);
            prop_assert_eq!(parts.iter().map(|part| u128::from(*part)).sum::<u128>(), u128::from(total));
            let sum: u128 = weights.iter().sum();
            for (part, weight) in parts.iter().zip(&weights).filter(|_| sum > 0) {
                let exact = u128::from(total) * weight / sum;
                prop_assert!((exact..=exact + 1).contains(&u128::from(*part)));
            }
        }

        #[test]
        fn no_weight_is_too_large(total: u64, weights in prop::collection::vec(0_u128..1 << 120, 1..20)) {
            let parts = apportion(total, &weights);
            prop_assert_eq!(parts.iter().map(|part| u128::from(*part)).sum::<u128>(), u128::from(total));
        }

        #[test]
        fn a_printed_amount_parses_back(nano: u64) {
            prop_assert_eq!(NanoUsd::from_usd(&NanoUsd(nano).to_string()), Ok(NanoUsd(nano)));
        }
    }
}
