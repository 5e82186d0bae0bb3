//! Dates and RFC 3339 times, read and written; microseconds since 1970.
//!
//! As much as the command line needs: years 1970 to 2199, in which ClickHouse's `DateTime64(6)` has room, and no leap seconds, which neither a
//! system's clock nor ClickHouse has. Days are counted as in Howard Hinnant's `days_from_civil`
//! (<https://howardhinnant.github.io/date_algorithms.html>).

use crate::clock;

const DAY_S: i64 = 86_400;
const YEARS: std::ops::RangeInclusive<i64> = 1970..=2199;

/// The wall clock.
pub fn now_us() -> i64 {
    clock::wall_now_us()
}

/// Reads `2026-11-24`, which is its first moment in UTC, or an RFC 3339 time. What is finer than a microsecond is cut off.
pub fn parse(text: &str) -> Option<i64> {
    // Fields have fixed places, so that nothing but ASCII may be before them.
    let (date, rest) = text.is_ascii().then(|| text.split_at_checked(10))??;
    let day_s = parse_date(date)? * DAY_S;
    if rest.is_empty() {
        return Some(day_s * 1_000_000);
    }
    let clock = rest.strip_prefix(['T', 't', ' '])?;
    let (time, rest) = clock.split_at_checked(8)?;
    let [hours, minutes, seconds] = numbers(time, ':', [2, 2, 2])?;
    if hours > 23 || minutes > 59 || seconds > 59 {
        return None;
    }
    let (fraction_us, offset) = match rest.strip_prefix('.') {
        None => (0, rest),
        Some(rest) => {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (fraction, offset) = rest.split_at(digits);
            let six: String = fraction.chars().chain("000000".chars()).take(6).collect();
            ((digits > 0).then(|| six.parse::<i64>().ok())??, offset)
        }
    };
    let local_s = day_s + hours * 3600 + minutes * 60 + seconds;
    Some((local_s - parse_offset(offset)?) * 1_000_000 + fraction_us)
}

/// Reads `2026-11`: its first moment, and that of the month behind it.
pub fn parse_month(text: &str) -> Option<(i64, i64)> {
    let [year, month] = numbers(text, '-', [4, 2])?;
    let next = if month == 12 {
        (year + 1, 1)
    } else {
        (year, month + 1)
    };
    let first = |(year, month): (i64, i64)| parse(&format!("{year:04}-{month:02}-01"));
    Some((first((year, month))?, first(next)?))
}

/// The month of a moment: its first moment, and that of the month behind it.
pub fn month_of(us: i64) -> (i64, i64) {
    let (year, month, _) = date_of(us.div_euclid(DAY_S * 1_000_000));
    let next = if month == 12 {
        (year + 1, 1)
    } else {
        (year, month + 1)
    };
    let first = |(year, month)| day_of(year, month, 1) * DAY_S * 1_000_000;
    (first((year, month)), first(next))
}

/// As `2026-11-24T08:00:00Z`, with a fraction where there is one.
pub fn format(us: i64) -> String {
    let (seconds, fraction_us) = (us.div_euclid(1_000_000), us.rem_euclid(1_000_000));
    let (day, second) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
    let (year, month, day) = date_of(day);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = match fraction_us {
        0 => String::new(),
        us => format!(".{us:06}"),
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

fn parse_date(text: &str) -> Option<i64> {
    let [year, month, day] = numbers(text, '-', [4, 2, 2])?;
    if !YEARS.contains(&year) {
        return None;
    }
    let days = day_of(year, month, day);
    // A date that does not exist, such as the 30th of February, is another one when it is written again.
    (date_of(days) == (year, month, day)).then_some(days)
}

fn parse_offset(text: &str) -> Option<i64> {
    if text == "Z" || text == "z" {
        return Some(0);
    }
    let sign = match text.as_bytes().first()? {
        b'+' => 1,
        b'-' => -1,
        _ => return None,
    };
    let [hours, minutes] = numbers(&text[1..], ':', [2, 2])?;
    (hours <= 23 && minutes <= 59).then_some(sign * (hours * 3600 + minutes * 60))
}

/// Numbers of exactly so many digits each.
fn numbers<const N: usize>(text: &str, separator: char, digits: [usize; N]) -> Option<[i64; N]> {
    let mut parts = text.split(separator);
    let mut found = [0; N];
    for (number, digits) in found.iter_mut().zip(digits) {
        let part = parts.next()?;
        if part.len() != digits || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(found)
}

/// Days since 1970. A year is taken to begin in March, so that its leap day is its last.
fn day_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Year, month and day of a day since 1970.
fn date_of(day: i64) -> (i64, i64, i64) {
    let day = day + 719_468;
    let (era, day_of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day_of_year - (153 * from_march + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_times_are_read() {
        for (text, us) in [
            ("1970-01-01", 0),
            ("2000-02-29", 951_782_400_000_000),
            ("2026-11-24", 1_795_478_400_000_000),
            ("2026-11-24T00:00:00Z", 1_795_478_400_000_000),
            ("2026-11-24T01:30:00+01:30", 1_795_478_400_000_000),
            ("2026-11-23t19:00:00-05:00", 1_795_478_400_000_000),
            ("2026-11-24 00:00:00.5Z", 1_795_478_400_500_000),
            ("2026-11-24T00:00:00.123456789z", 1_795_478_400_123_456),
        ] {
            assert_eq!(parse(text), Some(us), "{text}");
        }
    }

    #[test]
    fn what_could_mean_two_times_or_none_is_refused() {
        for text in [
            "",
            "today",
            "2026-11",
            "2026-11-24T08:00:00",
            "2026-11-24T08:00Z",
            "2026-02-29",
            "2100-02-29",
            "2026-13-01",
            "2026-00-01",
            "2026-04-31",
            "1969-12-31",
            "2200-01-01",
            "2026-11-24T24:00:00Z",
            "2026-11-24T08:60:00Z",
            "2026-11-24T08:00:60Z",
            "2026-11-24T08:00:00.Z",
            "2026-11-24T08:00:00+1:00",
            "2026-11-24T08:00:00+24:00",
            "2026-11-24T08:00:00Zulu",
            "+026-11-24",
            "2026-1é-24",
            "1795478400",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_month_ends_where_the_next_one_begins() {
        let month = |from: &str, to: &str| Some((parse(from)?, parse(to)?));
        assert_eq!(parse_month("2026-11"), month("2026-11-01", "2026-12-01"));
        assert_eq!(parse_month("2026-12"), month("2026-12-01", "2027-01-01"));
        let late = parse("2026-12-31T23:59:59.999999Z").expect("a time");
        assert_eq!(Some(month_of(late)), month("2026-12-01", "2027-01-01"));
        for text in ["2026-13", "2026-00", "2026-1", "2026", "2199-12", "+026-01"] {
            assert_eq!(parse_month(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(us in 0_i64..7_258_118_400_000_000) {
            prop_assert_eq!(parse(&format(us)), Some(us));
        }

        #[test]
        fn days_follow_each_other(day in 0_i64..84_000) {
            let (year, month, of_month) = date_of(day);
            prop_assert_eq!(day_of(year, month, of_month), day);
            prop_assert!(date_of(day + 1) > (year, month, of_month));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,40}") {
            let _ = parse(&text);
        }
    }
}
