//! Durations and byte sizes as people write them: `15s`, `200ms`, `64KiB`.
//!
//! A number without a unit is refused: `30` could be seconds or milliseconds, and guessing wrong by a factor of
//! a thousand is found only in production. What is printed is the shortest form that parses back to the same value.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Serialize, Serializer};

/// One year. Adding a longer duration to a clock reading can overflow it, and no timeout needs more.
pub const DURATION_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Largest unit first, so that printing finds the shortest form.
const DURATION_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Largest unit first, so that printing finds the shortest form.
const SIZE_UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// A number of bytes, written with a binary unit: `64KiB`, `4MiB`, `1GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// A size of so many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// A size of so many kibibytes (1024 bytes). The caller states a constant that fits.
    pub const fn from_kib(kib: u32) -> Self {
        Self((kib as u64) << 10)
    }

    /// A size of so many mebibytes (1024 KiB).
    pub const fn from_mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The size in bytes as a length in memory; a size beyond the address space is the largest length.
    pub fn as_len(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_shortest(f, self.0, &SIZE_UNITS, "B")
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse_with_unit(text, &SIZE_UNITS, "4MiB").map(Self)
    }
}

/// Reads a duration such as `200ms`, `15s`, `5m` or `1h`.
///
/// # Errors
/// When there is no whole number, no known unit, or the value is beyond [`DURATION_MAX`].
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let duration = Duration::from_millis(parse_with_unit(text, &DURATION_UNITS, "15s")?);
    if duration > DURATION_MAX {
        Err(UnitError::TooLarge)
    } else {
        Ok(duration)
    }
}

/// Prints a duration of whole milliseconds in the form that [`parse_duration`] reads; what is finer is cut off.
pub fn format_duration(duration: Duration) -> String {
    struct Shortest(u64);
    impl fmt::Display for Shortest {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_shortest(f, self.0, &DURATION_UNITS, "s")
        }
    }
    Shortest(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)).to_string()
}

/// For `#[serde(serialize_with)]` on a `Duration`.
pub(super) fn serialize_duration<S: Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_duration(*duration))
}

/// Why a duration or a size was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// A bare number.
    #[error("a number needs its unit, for example \"{example}\"")]
    NoUnit {
        /// A value that would have been understood.
        example: &'static str,
    },
    /// Nothing that starts with a whole number.
    #[error("it must start with a whole number, for example \"{example}\"")]
    NoNumber {
        /// A value that would have been understood.
        example: &'static str,
    },
    /// A unit that is not in the list; `KB` and `MB` too, since half of the world means 1000 by them.
    #[error("the units are {known}")]
    UnknownUnit {
        /// The units that would have been understood.
        known: String,
    },
    /// More than can be represented, or than makes sense.
    #[error("it is too large")]
    TooLarge,
}

fn write_shortest(
    f: &mut fmt::Formatter<'_>,
    value: u64,
    units: &[(&str, u64)],
    zero_unit: &str,
) -> fmt::Result {
    // Each table ends with a unit of 1, which divides everything; zero, which all units divide, is named apart.
    match units.iter().find(|(_, factor)| value.is_multiple_of(*factor)) {
        Some((unit, factor)) if value != 0 => write!(f, "{}{unit}", value / factor),
        _ => write!(f, "{value}{zero_unit}"),
    }
}

fn parse_with_unit(text: &str, units: &[(&str, u64)], example: &'static str) -> Result<u64, UnitError> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() || unit.starts_with(['.', ',', '_']) {
        return Err(UnitError::NoNumber { example });
    }
    let unit = unit.trim_start();
    if unit.is_empty() {
        return Err(UnitError::NoUnit { example });
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        let known = units
            .iter()
            .rev()
            .map(|(name, _)| *name)
            .collect::<Vec<_>>()
            .join(", ");
        return Err(UnitError::UnknownUnit { known });
    };
    // Only digits are left, so that the one way to fail is the size.
    let number: u64 = number.parse().map_err(|_| UnitError::TooLarge)?;
    number.checked_mul(*factor).ok_or(UnitError::TooLarge)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn people_write_durations_with_a_unit() {
        for (text, ms) in [
            ("15s", 15_000),
            ("200ms", 200),
            ("5m", 300_000),
            ("1h", 3_600_000),
            (" 2 s ", 2_000),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
    }

    #[test]
    fn a_bare_number_is_refused_with_an_example() {
        assert_eq!(parse_duration("30"), Err(UnitError::NoUnit { example: "15s" }));
        let message = "4096".parse::<ByteSize>().unwrap_err().to_string();
        assert_eq!(message, "a number needs its unit, for example \"4MiB\"");
    }

    #[test]
    fn ambiguous_fractional_and_negative_values_are_refused() {
        let message = "4MB".parse::<ByteSize>().unwrap_err().to_string();
        assert_eq!(message, "the units are B, KiB, MiB, GiB, TiB");
        for text in ["1.5s", "1_000ms", "-1s", "s", "", "１５s"] {
            assert_eq!(
                parse_duration(text),
                Err(UnitError::NoNumber { example: "15s" }),
                "{text}"
            );
        }
        for text in ["5M", "1S", "1h30m"] {
            assert!(
                matches!(parse_duration(text), Err(UnitError::UnknownUnit { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn what_would_overflow_is_too_large() {
        assert_eq!(parse_duration("8761h"), Err(UnitError::TooLarge));
        assert_eq!(parse_duration("8760h"), Ok(DURATION_MAX));
        assert_eq!(
            "18446744073709551615TiB".parse::<ByteSize>(),
            Err(UnitError::TooLarge)
        );
        assert_eq!(
            "99999999999999999999B".parse::<ByteSize>(),
            Err(UnitError::TooLarge)
        );
    }

    #[test]
    fn the_shortest_form_is_printed() {
        assert_eq!(format_duration(Duration::from_secs(90)), "90s");
        assert_eq!(format_duration(Duration::from_secs(7200)), "2h");
        assert_eq!(format_duration(Duration::ZERO), "0s");
        assert_eq!(ByteSize::from_mib(4).to_string(), "4MiB");
        assert_eq!(ByteSize::from_bytes(1025).to_string(), "1025B");
    }

    proptest! {
        #[test]
        fn a_printed_duration_parses_back(ms in 0..=DURATION_MAX.as_millis() as u64) {
            let duration = Duration::from_millis(ms);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn a_printed_size_parses_back(bytes: u64) {
            let size = ByteSize::from_bytes(bytes);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn no_string_panics(text in any::<String>(), number: u128, unit in "[a-zA-Z ]{0,4}") {
            for text in [text, format!("{number}{unit}")] {
                // The promise is that both return; what they accept must print and parse back.
                if let Ok(duration) = parse_duration(&text) {
                    prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
                }
                if let Ok(size) = text.parse::<ByteSize>() {
                    prop_assert_eq!(size.to_string().parse(), Ok(size));
                }
            }
        }
    }
}
