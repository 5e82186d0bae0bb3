//! Amounts of money in text. They are whole nano-USD until they are written, and every written one but those of a table is exact.

/// Billionths of a dollar.
const NANO: u64 = 1_000_000_000;

/// Decimal places of an exact amount.
const PLACES: usize = 9;

/// Dollars with all nine places: `-0.000000001`.
pub fn exact(nano_usd: i64) -> String {
    written(nano_usd, PLACES)
}

/// Dollars rounded to some places, halves away from zero.
pub fn rounded(nano_usd: i64, places: usize) -> String {
    let unit = 10_i128.pow((PLACES - places.min(PLACES)) as u32);
    let half = if nano_usd < 0 { -unit / 2 } else { unit / 2 };
    let whole = (i128::from(nano_usd) + half) / unit * unit;
    written(i64::try_from(whole).unwrap_or(nano_usd), places.min(PLACES))
}

/// How many places say enough where `largest` is the largest amount beside: four digits of it, and cents at least.
pub fn places_for(largest: u64) -> usize {
    match largest {
        largest if largest >= 1000 * NANO => 2,
        largest if largest >= NANO => 4,
        largest if largest >= NANO / 1000 => 6,
        _ => PLACES,
    }
}

fn written(nano_usd: i64, places: usize) -> String {
    let magnitude = nano_usd.unsigned_abs();
    let sign = if nano_usd < 0 { "-" } else { "" };
    let fraction = format!("{:09}", magnitude % NANO);
    match places {
        0 => format!("{sign}{}", magnitude / NANO),
        places => format!("{sign}{}.{}", magnitude / NANO, &fraction[..places]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::NanoUsd;
    use proptest::prelude::*;

    #[test]
    fn amounts_are_exact_and_rounded_ones_say_so_by_their_places() {
        assert_eq!(exact(1), "0.000000001");
        assert_eq!(exact(-2_500_000_000), "-2.500000000");
        assert_eq!(exact(i64::MIN), "-9223372036.854775808");
        assert_eq!(rounded(1_005_000_000, 2), "1.01");
        assert_eq!(rounded(-1_005_000_000, 2), "-1.01");
        assert_eq!(rounded(-1, 2), "0.00", "nothing has no sign");
        assert_eq!(places_for(5_000 * NANO), 2);
        assert_eq!(places_for(0), 9);
    }

    proptest! {
        #[test]
        fn an_exact_amount_reads_back(nano in 0..i64::MAX) {
            let read = NanoUsd::from_usd(&exact(nano)).expect("a decimal");
            prop_assert_eq!(read.as_i64(), nano);
            prop_assert_eq!(exact(-nano).trim_start_matches('-').to_owned(), exact(nano));
        }
    }
}
