//! Compares what clients saw with what a spool has after a power cut.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display, Formatter};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::clients::Sight;
use super::recovery::Recovered;

/// The moment of a cut, as closely as it is known.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The power was still there.
    pub before: Instant,
    /// What clients saw until then may have come from before the cut; it was gone at the latest now.
    pub after: Instant,
}

/// What a cut took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    /// Ends that clients had seen.
    pub seen: usize,
    /// Those of them without their row.
    pub lost: usize,
    /// Of those, how many come up as `gateway_crash`.
    pub as_crash: usize,
    /// How long before the cut the oldest lost one had ended.
    pub oldest: Duration,
    /// Torn pieces in quarantine.
    pub torn: usize,
}

/// Judges a spool by what was seen until `cut`. A lost end must have been seen within `window` of it; without one, none may be lost.
///
/// # Errors
/// When a row is there twice, or is nobody's, or what was on the disk vanished, or more is lost than may be.
pub fn judge(
    sights: &[Sight],
    cut: Moment,
    recovered: &Recovered,
    window: Option<Duration>,
) -> Result<Taken> {
    ensure!(
        recovered.vanished.is_empty(),
        "the disk had them, and now neither rows nor quarantine do: {:?}",
        recovered.vanished
    );
    let rows = rows_by_request(sights, recovered)?;
    let mut taken = Taken {
        torn: recovered.torn,
        ..Taken::default()
    };
    for sight in sights {
        let Some(ended) = sight.ended.filter(|ended| *ended <= cut.after) else {
            continue;
        };
        taken.seen += 1;
        let row = rows.get(sight.request_id.as_str());
        if row == Some(&false) {
            continue;
        }
        taken.lost += 1;
        taken.as_crash += usize::from(row.is_some());
        let age = cut.before.saturating_duration_since(ended);
        taken.oldest = taken.oldest.max(age);
        let found = if row.is_some() {
            "a row that says `gateway_crash`"
        } else {
            "no row"
        };
        match window {
            None => bail!(
                "a client saw {} end {:.3} s before the cut, and there is {found}",
                sight.request_id,
                age.as_secs_f64()
            ),
            Some(window) => ensure!(
                age <= window,
                "a client saw {} end {:.3} s before the cut, more than {:.3} s, and there is {found}",
                sight.request_id,
                age.as_secs_f64(),
                window.as_secs_f64()
            ),
        }
    }
    Ok(taken)
}

/// For each request with a row, whether that only says `gateway_crash`.
fn rows_by_request<'r>(sights: &[Sight], recovered: &'r Recovered) -> Result<HashMap<&'r str, bool>> {
    let sent: HashSet<&str> = sights.iter().map(|sight| sight.request_id.as_str()).collect();
    let (mut events, mut requests) = (HashSet::new(), HashMap::new());
    for row in &recovered.rows {
        ensure!(
            events.insert(&row.event_id),
            "the event {} is there twice",
            row.event_id
        );
        ensure!(
            sent.contains(row.request_id.as_str()),
            "nobody sent {}",
            row.request_id
        );
        let earlier = requests.insert(row.request_id.as_str(), row.is_crash);
        ensure!(earlier.is_none(), "the request {} is there twice", row.request_id);
    }
    Ok(requests)
}

impl Display for Taken {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>5} ends seen, {:>4} lost ({:>2} as gateway_crash, the oldest {:>5.2} s before), {:>2} torn",
            self.seen,
            self.lost,
            self.as_crash,
            self.oldest.as_secs_f64(),
            self.torn
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::recovery::Row;
    use super::*;

    fn row(request: &str, is_crash: bool) -> Row {
        Row {
            event_id: format!("event-{request}"),
            request_id: request.to_owned(),
            is_crash,
        }
    }

    /// Three requests: `a` ended 5 s before the cut, `b` 1 s, `c` after it.
    fn sights(start: Instant) -> (Vec<Sight>, Moment) {
        let sight = |request: &str, seconds: u64| Sight {
            request_id: request.to_owned(),
            sent: start,
            ended: Some(start + Duration::from_secs(seconds)),
        };
        let cut = start + Duration::from_secs(6);
        let moment = Moment {
            before: cut,
            after: cut,
        };
        (vec![sight("a", 1), sight("b", 5), sight("c", 7)], moment)
    }

    fn judged(rows: Vec<Row>, window: Option<u64>) -> Result<Taken> {
        let (sights, cut) = sights(Instant::now());
        let recovered = Recovered {
            rows,
            ..Recovered::default()
        };
        judge(&sights, cut, &recovered, window.map(Duration::from_secs))
    }

    #[test]
    fn an_end_may_be_lost_within_the_window_only() {
        let taken = judged(vec![row("a", false)], Some(2)).expect("`b` is recent");
        assert_eq!((taken.seen, taken.lost, taken.as_crash), (2, 1, 0));
        assert_eq!(taken.oldest, Duration::from_secs(1));
        let error = judged(vec![row("b", false)], Some(2)).expect_err("`a` is old");
        assert!(error.to_string().contains("saw a end 5.000 s before"), "{error}");
        let error = judged(vec![row("a", false)], None).expect_err("nothing may be lost");
        assert!(error.to_string().contains("saw b end"), "{error}");
    }

    #[test]
    fn a_crash_in_place_of_an_end_is_a_loss() {
        let taken = judged(vec![row("a", false), row("b", true)], Some(2)).expect("`b` is recent");
        assert_eq!((taken.lost, taken.as_crash), (1, 1));
        assert!(judged(vec![row("a", false), row("b", true)], None).is_err());
        let all = vec![row("a", false), row("b", false), row("c", true)];
        assert_eq!(judged(all, None).expect("`c` ended after the cut").lost, 0);
    }

    #[test]
    fn rows_that_are_doubled_or_nobody_s_or_vanished_are_told() {
        let twice = judged(vec![row("a", false), row("a", false)], Some(9));
        assert!(twice.expect_err("twice").to_string().contains("is there twice"));
        let again = Row {
            event_id: "other".to_owned(),
            ..row("a", true)
        };
        assert!(judged(vec![row("a", false), again], Some(9)).is_err());
        assert!(judged(vec![row("z", false)], Some(9)).is_err());
        let (sights, cut) = sights(Instant::now());
        let recovered = Recovered {
            vanished: vec!["a".to_owned()],
            ..Recovered::default()
        };
        assert!(judge(&sights, cut, &recovered, Some(Duration::from_secs(9))).is_err());
    }
}
