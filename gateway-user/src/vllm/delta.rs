//! What happened between two scrapes of one model: differences of counters, and percentiles out of differences of histograms.
//!
//! A difference is either exact or not there. Every engine is compared with itself; when one counter of one engine went down, the engine
//! was restarted (or the page came from another process behind the same address), and then nothing is known about the whole model's
//! interval. The same holds when an engine came or went: what it did unseen is in no difference.

use super::families::{self, Buckets, ByReason, Counter, Engine, Latency, Model};

/// What a model's engines did together between two scrapes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Growth {
    counters: [Option<u64>; Counter::COUNT],
    /// Requests that ended, by reason, those with none included. `None` when the server does not have the family.
    pub success: Option<ByReason>,
    latencies: [Option<Buckets>; Latency::COUNT],
}

impl Growth {
    /// How far `now` is from `before`; `None` after a reset.
    pub fn between(before: &Model, now: &Model) -> Option<Growth> {
        if !before.engines.keys().eq(now.engines.keys()) {
            return None;
        }
        let pairs = || before.engines.values().zip(now.engines.values());
        if pairs().any(|(before, now)| went_down(before, now)) {
            return None;
        }
        let mut growth = Growth {
            success: success_growth(pairs()),
            ..Growth::default()
        };
        for (index, sum) in growth.counters.iter_mut().enumerate() {
            let of_each = pairs().map(|(before, now)| (before.counters()[index], now.counters()[index]));
            *sum = sum_known(
                of_each.map(|pair| difference(pair, |before, now| Some(now - before))),
                |a, b| Some(a.saturating_add(b)),
            );
        }
        for (index, sum) in growth.latencies.iter_mut().enumerate() {
            let of_each = pairs().map(|(before, now)| (before.latencies()[index], now.latencies()[index]));
            *sum = sum_known(of_each.map(|pair| difference(pair, buckets_between)), |a, b| {
                buckets_summed(&a, &b)
            });
        }
        Some(growth)
    }

    /// How much a counter grew.
    pub fn counter(&self, counter: Counter) -> Option<u64> {
        self.counters[counter as usize]
    }

    /// The observations of a histogram that were new.
    pub fn latency(&self, latency: Latency) -> Option<&Buckets> {
        self.latencies[latency as usize].as_ref()
    }

    /// Share of the looked up tokens that the prefix cache had; `None` when nothing was looked up.
    pub fn prefix_cache_hit_ratio(&self) -> Option<f64> {
        let queries = self
            .counter(Counter::PrefixCacheQueries)
            .filter(|queries| *queries > 0)?;
        Some(self.counter(Counter::PrefixCacheHits)? as f64 / queries as f64)
    }
}

/// What one engine adds to a sum.
enum Part<T> {
    Known(T),
    /// The engine does not have the family, at neither scrape.
    Absent,
    /// It has it at one of the two.
    Unknown,
}

fn difference<T, D>((before, now): (Option<T>, Option<T>), minus: impl Fn(T, T) -> Option<D>) -> Part<D> {
    match (before, now) {
        (Some(before), Some(now)) => minus(before, now).map_or(Part::Unknown, Part::Known),
        (None, None) => Part::Absent,
        _ => Part::Unknown,
    }
}

/// The sum over all engines that have the family; `None` when none has it, or when one's part of it is unknown.
fn sum_known<T>(parts: impl Iterator<Item = Part<T>>, add: impl Fn(T, T) -> Option<T>) -> Option<T> {
    let mut sum = None;
    for part in parts {
        sum = match (sum, part) {
            (sum, Part::Absent) => sum,
            (_, Part::Unknown) => return None,
            (None, Part::Known(part)) => Some(part),
            (Some(sum), Part::Known(part)) => Some(add(sum, part)?),
        };
    }
    sum
}

/// Whether any counter of the engine shrank, buckets of histograms included.
fn went_down(before: &Engine, now: &Engine) -> bool {
    let counters = before.counters().into_iter().zip(now.counters());
    if counters
        .into_iter()
        .any(|(before, now)| matches!((before, now), (Some(before), Some(now)) if now < before))
    {
        return true;
    }
    if let (Some(before), Some(now)) = (before.success(), now.success())
        && before
            .iter()
            .any(|(reason, before)| now.get(reason).is_none_or(|now| now < before))
    {
        return true;
    }
    let mut latencies = before.latencies().into_iter().zip(now.latencies());
    latencies.any(|(before, now)| match (before, now) {
        (Some(before), Some(now)) if before.has_bounds_of(now) => before
            .0
            .iter()
            .zip(&now.0)
            .any(|((_, before), (_, now))| now < before),
        _ => false,
    })
}

/// A reason that an engine did not have before began at 0: clients of Prometheus make a series when they first need it.
fn success_growth<'e>(pairs: impl Iterator<Item = (&'e Engine, &'e Engine)>) -> Option<ByReason> {
    let mut grown = ByReason::new();
    let mut any = false;
    for (before, now) in pairs {
        let Some(now) = now.success() else { continue };
        any = true;
        for (reason, now) in now {
            let before = before
                .success()
                .and_then(|before| before.get(reason))
                .copied()
                .unwrap_or(0);
            families::add_reason(&mut grown, reason, now.saturating_sub(before));
        }
    }
    any.then_some(grown)
}

/// The new observations; `None` when the bounds are others than before. Call it only when no bucket went down.
fn buckets_between(before: &Buckets, now: &Buckets) -> Option<Buckets> {
    let pairs = before.0.iter().zip(&now.0);
    let grown = pairs.map(|((_, before), (bound_s, now))| (*bound_s, now.saturating_sub(*before)));
    before.has_bounds_of(now).then(|| Buckets(grown.collect()))
}

fn buckets_summed(a: &Buckets, b: &Buckets) -> Option<Buckets> {
    let sums =
        a.0.iter()
            .zip(&b.0)
            .map(|((bound_s, a), (_, b))| (*bound_s, a.saturating_add(*b)));
    a.has_bounds_of(b).then(|| Buckets(sums.collect()))
}

impl Buckets {
    /// The value below which the share `q` of the observations is, in whole microseconds; `None` without observations.
    ///
    /// As Prometheus' `histogram_quantile`: observations are taken to lie evenly within their bucket, the first bucket begins at 0, and
    /// what is in the last one (up to infinity) counts as the highest finite bound.
    pub fn quantile_us(&self, q: f64) -> Option<u64> {
        self.quantile_s(q).map(|seconds| (seconds * 1e6).round() as u64)
    }

    fn quantile_s(&self, q: f64) -> Option<f64> {
        let ((last_bound_s, _), finite) = self.0.split_last()?;
        let (highest_s, _) = finite.last()?;
        if *last_bound_s != f64::INFINITY {
            return None;
        }
        // A page is not read at one instant of the engine's, so that a bucket may be behind a smaller one. It cannot really be.
        let mut seen = 0;
        let cumulative: Vec<u64> = self
            .0
            .iter()
            .map(|(_, count)| {
                seen = seen.max(*count);
                seen
            })
            .collect();
        if seen == 0 {
            return None;
        }
        let rank = q * seen as f64;
        let index = cumulative.iter().position(|count| *count as f64 >= rank)?;
        let Some((end_s, _)) = finite.get(index) else {
            return Some(*highest_s);
        };
        let (start_s, below) = match index.checked_sub(1) {
            Some(previous) => (finite[previous].0, cumulative[previous]),
            None if *end_s <= 0.0 => return Some(*end_s),
            None => (0.0, 0),
        };
        let within = (rank - below as f64) / (cumulative[index] - below) as f64;
        Some(start_s + (end_s - start_s) * within)
    }
}
