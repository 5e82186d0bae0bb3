//! Which time a report is about.

use std::time::Duration;

use clap::Args;

use super::time;
use crate::config::units::parse_duration;
use crate::store::figures::Period;

/// What is reported when nothing is said.
const SINCE_DEFAULT: Duration = Duration::from_hours(24);

/// A point in time; microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(i64);

impl Moment {
    /// Reads a date or an RFC 3339 time.
    ///
    /// # Errors
    /// What was expected. (What was found, clap says.)
    pub fn parse(text: &str) -> Result<Moment, String> {
        time::parse(text).map(Moment).ok_or_else(|| {
            "expected a date such as 2026-11-24, which begins at 00:00 UTC, or a time with its offset such as 2026-11-24T08:00:00Z or \
             2026-11-24T09:00:00+01:00 (RFC 3339), from 1970 to 2199"
                .to_owned()
        })
    }
}

/// The options that say it.
#[derive(Debug, Args)]
pub struct PeriodArgs {
    /// The time up to now, such as 15m or 24h [default: 24h].
    #[arg(long, value_name = "TIME", value_parser = parse_duration, conflicts_with = "from")]
    since: Option<Duration>,
    /// First moment: a date, which begins at 00:00 UTC, or a time in RFC 3339 (2026-11-24T08:00:00Z).
    #[arg(long, value_name = "TIME", value_parser = Moment::parse)]
    from: Option<Moment>,
    /// First moment that is not in it any more [default: now].
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, requires = "from")]
    to: Option<Moment>,
}

impl PeriodArgs {
    /// The period that they mean at `now_us`.
    ///
    /// # Errors
    /// When there is nothing in it.
    pub fn of(&self, now_us: i64) -> Result<Period, PeriodError> {
        of(self.since, self.from, self.to, now_us)
    }
}

/// Why there is no such period.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeriodError {
    /// It ends before it begins.
    #[error(
        "expected --from before --to, found {from} and {to}: a period ends before --to, which is now unless it is given"
    )]
    Backwards {
        /// Its begin.
        from: String,
        /// Its end.
        to: String,
    },
    /// It has no length.
    #[error("expected --since above 0, found 0: for example 24h")]
    Empty,
}

/// The period that the options mean at `now_us`.
///
/// # Errors
/// When there is nothing in it.
pub fn of(
    since: Option<Duration>,
    from: Option<Moment>,
    to: Option<Moment>,
    now_us: i64,
) -> Result<Period, PeriodError> {
    let to_us = to.map_or(now_us, |Moment(us)| us);
    let Some(Moment(from_us)) = from else {
        let length = since.unwrap_or(SINCE_DEFAULT);
        // The longest that can be asked for is a year.
        let length_us = i64::try_from(length.as_micros()).unwrap_or(i64::MAX);
        return Period::new(to_us.saturating_sub(length_us), to_us).ok_or(PeriodError::Empty);
    };
    Period::new(from_us, to_us).ok_or_else(|| PeriodError::Backwards {
        from: time::format(from_us),
        to: time::format(to_us),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_US: i64 = 86_400_000_000;

    fn moment(text: &str) -> Option<Moment> {
        Some(Moment::parse(text).expect("a time"))
    }

    #[test]
    fn without_options_it_is_the_day_up_to_now() {
        assert_eq!(
            of(None, None, None, 2 * DAY_US),
            Ok(Period::new(DAY_US, 2 * DAY_US).expect("a day"))
        );
        let minute = of(Some(Duration::from_mins(1)), None, None, DAY_US).expect("a minute");
        assert_eq!((minute.from_us(), minute.to_us()), (DAY_US - 60_000_000, DAY_US));
    }

    #[test]
    fn dates_are_midnights_and_the_end_is_now_unless_it_is_said() {
        let day = of(None, moment("1970-01-02"), moment("1970-01-03"), 9 * DAY_US).expect("a day");
        assert_eq!((day.from_us(), day.to_us()), (DAY_US, 2 * DAY_US));
        let open = of(None, moment("1970-01-02"), None, 9 * DAY_US).expect("days");
        assert_eq!(open.to_us(), 9 * DAY_US);
    }

    #[test]
    fn a_period_with_nothing_in_it_is_refused_with_both_ends() {
        let error = of(None, moment("1970-01-03"), moment("1970-01-03"), 0).expect_err("it is empty");
        assert!(
            error
                .to_string()
                .contains("1970-01-03T00:00:00Z and 1970-01-03T00:00:00Z"),
            "{error}"
        );
        assert!(of(None, moment("2100-01-01"), None, DAY_US).is_err());
        assert_eq!(
            of(Some(Duration::ZERO), None, None, DAY_US),
            Err(PeriodError::Empty)
        );
    }
}
