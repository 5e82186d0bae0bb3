//! Moments, spans and windows, in whole microseconds.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// Microseconds of a second.
const SECOND_US: u64 = 1_000_000;

/// Microseconds of a day.
const DAY_US: u64 = 86_400 * SECOND_US;

/// A moment: microseconds since the beginning of 1970, UTC, by the wall clock.
///
/// Text is a date, `2026-01-31`, which is its first moment, or `2026-01-31T12:30:00Z`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Micros(pub u64);

/// From one moment up to, and without, another; perhaps empty, never backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    from: Micros,
    to: Micros,
}

/// A stretch of the clock that costs are computed for.
///
/// All windows have one length and begin at whole multiples of it, so that every gateway cuts time at the same moments. Where an upstream
/// began or ended within a window, only a part of it is covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Window {
    start: Micros,
    covered: Span,
}

impl Span {
    /// The span between two moments; empty, at `from`, when `to` lies before it.
    pub fn new(from: Micros, to: Micros) -> Span {
        Span {
            from,
            to: to.max(from),
        }
    }

    /// Its first moment.
    pub fn from(self) -> Micros {
        self.from
    }

    /// The moment at which it is over.
    pub fn to(self) -> Micros {
        self.to
    }

    /// Its length.
    pub fn len_us(self) -> u64 {
        self.to.0 - self.from.0
    }

    /// Whether there is no time in it.
    pub fn is_empty(self) -> bool {
        self.from == self.to
    }

    /// What it has in common with another; empty, and within `other`, when that is nothing.
    pub fn within(self, other: Span) -> Span {
        let from = self.from.clamp(other.from, other.to);
        Span::new(from, self.to.clamp(other.from, other.to))
    }
}

impl Window {
    /// Length of every window: the granularity of all that is stored by window.
    pub const LEN_US: u64 = 15 * SECOND_US;

    /// The window that a moment falls into.
    pub fn at(moment: Micros) -> Window {
        let start = Micros(moment.0 - moment.0 % Self::LEN_US);
        Window {
            start,
            covered: Span::new(start, Micros(start.0.saturating_add(Self::LEN_US))),
        }
    }

    /// The next one.
    pub fn next(self) -> Window {
        Window::at(Micros(self.start.0.saturating_add(Self::LEN_US)))
    }

    /// The part of it that lies in `span`.
    pub fn covering(self, span: Span) -> Window {
        Window {
            covered: self.covered.within(span),
            ..self
        }
    }

    /// When it begins by the clock: its name.
    pub fn start(self) -> Micros {
        self.start
    }

    /// The time that it stands for: all of it unless it was cut.
    pub fn span(self) -> Span {
        self.covered
    }
}

impl Serialize for Micros {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil_of(self.0 / DAY_US);
        write!(f, "{year:04}-{month:02}-{day:02}")?;
        let second = self.0 % DAY_US / SECOND_US;
        if second == 0 {
            return Ok(());
        }
        let (hour, minute) = (second / 3600, second / 60 % 60);
        write!(f, "T{hour:02}:{minute:02}:{:02}Z", second % 60)
    }
}

/// Why a text is no moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it must be a day from 1970 on, such as 2026-01-31, or a moment in UTC such as 2026-01-31T12:30:00Z")]
pub struct NoMoment;

impl FromStr for Micros {
    type Err = NoMoment;

    fn from_str(text: &str) -> Result<Micros, NoMoment> {
        let (date, time) = match text.split_once('T') {
            Some((date, time)) => (date, time.strip_suffix('Z').ok_or(NoMoment)?),
            None => (text, "00:00:00"),
        };
        let [year, month, day] = numbers(date, '-', [4, 2, 2]).ok_or(NoMoment)?;
        let [hour, minute, second] = numbers(time, ':', [2, 2, 2]).ok_or(NoMoment)?;
        let days = days_of(year, month, day).filter(|days| civil_of(*days) == (year, month, day));
        if hour > 23 || minute > 59 || second > 59 {
            return Err(NoMoment);
        }
        let seconds = days.ok_or(NoMoment)? * 86_400 + hour * 3600 + minute * 60 + second;
        Ok(Micros(seconds * SECOND_US))
    }
}

/// Three numbers of exactly so many digits each.
fn numbers(text: &str, separator: char, digits: [usize; 3]) -> Option<[u64; 3]> {
    let mut parts = text.split(separator);
    let mut values = [0; 3];
    for (value, digits) in values.iter_mut().zip(digits) {
        let part = parts.next()?;
        let is_good = part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit());
        *value = part.parse().ok().filter(|_| is_good)?;
    }
    parts.next().is_none().then_some(values)
}

/// Days since 1970 of a date in the Gregorian calendar. Years are counted from March, so that a leap day is the last of its year.
fn days_of(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1..=12).contains(&month) {
        return None;
    }
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year.checked_sub(1)?, month + 9)
    };
    let before = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
    // The count up to the first day of 1970, that day included.
    before.checked_sub(719_469)
}

/// The date of a day since 1970.
fn civil_of(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year_of_era;
    if month < 10 {
        (year, month + 3, day)
    } else {
        (year + 1, month - 9, day)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_date_is_its_first_moment() {
        for (text, seconds) in [
            ("1970-01-01", 0),
            ("2000-03-01", 951_868_800),
            ("2026-01-31", 1_769_817_600),
            ("2028-02-29T23:59:59Z", 1_835_481_599),
        ] {
            assert_eq!(text.parse(), Ok(Micros(seconds * SECOND_US)), "{text}");
        }
    }

    #[test]
    fn what_is_no_date_is_refused() {
        for text in [
            "",
            "2026-02-29",
            "2026-00-01",
            "2026-13-01",
            "2026-01-00",
            "2026-1-1",
            "1969-12-31",
            "2026-01-01T00:00:00",
            "2026-01-01T24:00:00Z",
            "2026-01-01 ",
            "+026-01-01",
        ] {
            assert_eq!(text.parse::<Micros>(), Err(NoMoment), "{text}");
        }
    }

    #[test]
    fn a_window_is_named_by_the_clock_also_when_only_a_part_of_it_counts() {
        let window = Window::at(Micros(47 * SECOND_US + 1));
        assert_eq!(window.start(), Micros(45 * SECOND_US));
        assert_eq!(window.next(), Window::at(Micros(60 * SECOND_US)));
        let begun = Span::new(Micros(50 * SECOND_US), Micros(u64::MAX));
        assert_eq!(window.covering(begun).start(), window.start());
        assert_eq!(window.covering(begun).span().len_us(), 10 * SECOND_US);
        assert!(window.covering(Span::new(Micros(0), Micros(7))).span().is_empty());
    }

    proptest! {
        #[test]
        fn a_printed_moment_parses_back(seconds in 0_u64..253_402_300_799) {
            let moment = Micros(seconds * SECOND_US);
            prop_assert_eq!(moment.to_string().parse(), Ok(moment));
        }

        #[test]
        fn no_text_panics(text in any::<String>(), digits in "[0-9T:Z-]{0,22}") {
            for text in [text, digits] {
                if let Ok(moment) = text.parse::<Micros>() {
                    prop_assert_eq!(moment.to_string().parse(), Ok(moment));
                }
            }
        }
    }
}
