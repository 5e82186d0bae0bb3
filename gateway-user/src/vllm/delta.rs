//! What happened between two scrapes of one model: differences of counters, and percentiles out of differences of histograms.
//!
//! A difference is either exact or not there. Every engine is compared with itself; when one counter of one engine went down, the engine
//! was restarted (or the page came from another process behind the same address), and then nothing is known about the whole model's
//! interval. The same holds when an engine came or went: what it did unseen is in no difference.

use super::names::{Counter, Latency};
use super::page::{self, Buckets, ByReason, Engine, Model};

/// What a model's engines did together between two scrapes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Growth {
    counters: [Option<u64>; Counter::COUNT],
    /// Requests that ended, by reason, those with none included. `None` when the server does not have the family.
    pub success: Option<ByReason>,
    latencies: [Option<Buckets>; Latency::COUNT],
    sums_us: [Option<u64>; Latency::COUNT],
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
        for (index, sum) in growth.sums_us.iter_mut().enumerate() {
            let of_each = pairs().map(|(before, now)| (before.sums_us()[index], now.sums_us()[index]));
            // Sums are floats on the page: what shrank by a rounding has not grown.
            *sum = sum_known(
                of_each.map(|pair| difference(pair, |before, now| Some(now.saturating_sub(before)))),
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

    /// What the new observations of a histogram were on average, in microseconds; `None` without any.
    pub fn mean_us(&self, latency: Latency) -> Option<u64> {
        let (_, count) = self.latency(latency)?.0.last()?;
        self.sums_us[latency as usize]?.checked_div(*count)
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
            page::add_reason(&mut grown, reason, now.saturating_sub(before));
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

#[cfg(test)]
mod tests {
    use super::super::page::Page;
    use super::*;
    use proptest::prelude::*;

    const INF: f64 = f64::INFINITY;

    fn model(lines: &[&str]) -> Model {
        let page: String = lines.iter().map(|line| format!("vllm:{line}\n")).collect();
        let page = page.replace('{', "{model_name=\"m\",");
        Page::read(page.as_bytes())
            .unwrap_or_else(|error| panic!("{error}"))
            .models
            .remove("m")
            .unwrap()
    }

    fn between(before: &[&str], now: &[&str]) -> Option<Growth> {
        Growth::between(&model(before), &model(now))
    }

    fn us(q: f64, buckets: &[(f64, u64)]) -> Option<u64> {
        Buckets(buckets.to_vec()).quantile_us(q)
    }

    #[test]
    fn percentiles_are_those_of_histogram_quantile() {
        let buckets = [(0.1, 10), (0.2, 30), (0.4, 40), (INF, 40)];
        assert_eq!(
            us(0.5, &buckets),
            Some(150_000),
            "rank 20: half of the bucket from 0.1 to 0.2"
        );
        assert_eq!(
            us(0.25, &buckets),
            Some(100_000),
            "rank 10: the first bucket's end"
        );
        assert_eq!(us(0.1, &buckets), Some(40_000), "the first bucket begins at 0");
        assert_eq!(
            us(0.95, &buckets),
            Some(360_000),
            "rank 38: 8 of the 10 between 0.2 and 0.4"
        );
    }

    #[test]
    fn what_lies_beyond_the_last_bound_counts_as_that_bound() {
        assert_eq!(us(0.99, &[(0.1, 1), (0.2, 1), (INF, 4)]), Some(200_000));
        assert_eq!(us(0.5, &[(0.1, 0), (0.2, 0), (INF, 4)]), Some(200_000));
    }

    #[test]
    fn without_observations_or_bounds_there_is_no_percentile() {
        assert_eq!(us(0.5, &[(0.1, 0), (INF, 0)]), None);
        assert_eq!(us(0.5, &[]), None);
        assert_eq!(us(0.5, &[(INF, 3)]), None);
        assert_eq!(us(0.5, &[(0.1, 1), (0.2, 2)]), None, "not a whole histogram");
    }

    #[test]
    fn a_bucket_behind_a_smaller_one_is_levelled() {
        assert_eq!(us(0.5, &[(0.1, 10), (0.2, 8), (INF, 10)]), Some(50_000));
    }

    #[test]
    fn a_counter_that_went_down_in_one_engine_makes_all_unknown() {
        let before = [
            "prompt_tokens_total{engine=\"0\"} 10",
            "prompt_tokens_total{engine=\"1\"} 100",
        ];
        let now = [
            "prompt_tokens_total{engine=\"0\"} 900",
            "prompt_tokens_total{engine=\"1\"} 5",
        ];
        assert_eq!(
            between(&before, &now),
            None,
            "the sum went up, which must not hide it"
        );
        let now = [
            "prompt_tokens_total{engine=\"0\"} 11",
            "prompt_tokens_total{engine=\"1\"} 102",
        ];
        assert_eq!(
            between(&before, &now).unwrap().counter(Counter::PromptTokens),
            Some(3)
        );
    }

    #[test]
    fn buckets_and_reasons_that_went_down_are_resets_too() {
        let bucket = |count| format!("request_queue_time_seconds_bucket{{le=\"+Inf\"}} {count}");
        assert_eq!(between(&[&bucket(3)], &[&bucket(2)]), None);
        assert!(between(&[&bucket(3)], &[&bucket(3)]).is_some());
        let success = |reason, count| format!("request_success{{finished_reason=\"{reason}\"}} {count}");
        assert_eq!(between(&[&success("stop", 3)], &[&success("stop", 2)]), None);
        assert_eq!(
            between(&[&success("stop", 3)], &[&success("length", 9)]),
            None,
            "a reason was lost"
        );
    }

    #[test]
    fn an_engine_that_came_or_went_makes_all_unknown() {
        let (one, two) = (
            "prompt_tokens_total{engine=\"0\"} 1",
            "prompt_tokens_total{engine=\"1\"} 1",
        );
        assert_eq!(between(&[one], &[one, two]), None);
        assert_eq!(between(&[one, two], &[one]), None);
    }

    #[test]
    fn a_family_at_one_scrape_only_is_unknown_and_the_others_are_not() {
        let growth = between(
            &[
                "prompt_tokens{engine=\"0\"} 1",
                "prompt_tokens{engine=\"1\"} 1",
                "num_preemptions{engine=\"0\"} 1",
            ],
            &[
                "prompt_tokens{engine=\"0\"} 2",
                "num_preemptions{engine=\"1\"} 4",
                "num_preemptions{engine=\"0\"} 3",
            ],
        );
        let growth = growth.unwrap();
        assert_eq!(growth.counter(Counter::PromptTokens), None);
        assert_eq!(growth.counter(Counter::Preemptions), None);
        assert_eq!(growth.counter(Counter::GenerationTokens), None);
        assert_eq!(growth.success, None);
    }

    #[test]
    fn a_reason_that_was_never_seen_began_at_0() {
        let growth = between(
            &["request_success_total{finished_reason=\"stop\"} 5"],
            &[
                "request_success_total{finished_reason=\"stop\"} 5",
                "request_success_total{finished_reason=\"length\"} 2",
            ],
        );
        let expected = ByReason::from([("stop".into(), 0), ("length".into(), 2)]);
        assert_eq!(growth.unwrap().success, Some(expected));
    }

    #[test]
    fn buckets_of_several_engines_are_summed() {
        let bucket = |engine, le, count| {
            format!("time_to_first_token_seconds_bucket{{engine=\"{engine}\",le=\"{le}\"}} {count}")
        };
        let page = |counts: [u64; 4]| {
            let [a, b, c, d] = counts;
            [
                bucket(0, "0.1", a),
                bucket(0, "+Inf", b),
                bucket(1, "0.1", c),
                bucket(1, "+Inf", d),
            ]
        };
        let (before, now) = (page([1, 1, 2, 2]), page([1, 4, 7, 8]));
        let growth = between(
            &before.each_ref().map(String::as_str),
            &now.each_ref().map(String::as_str),
        )
        .unwrap();
        assert_eq!(
            growth.latency(Latency::Ttft),
            Some(&Buckets(vec![(0.1, 5), (INF, 9)]))
        );
    }

    #[test]
    fn without_queries_there_is_no_hit_ratio() {
        let page = |queries, hits| {
            [
                format!("prefix_cache_queries{{}} {queries}"),
                format!("prefix_cache_hits{{}} {hits}"),
            ]
        };
        let ratio = |before: [String; 2], now: [String; 2]| {
            let text = |page: &[String; 2]| page.each_ref().map(String::as_str).map(str::to_owned);
            let (before, now) = (text(&before), text(&now));
            between(&[&before[0], &before[1]], &[&now[0], &now[1]])
                .unwrap()
                .prefix_cache_hit_ratio()
        };
        assert_eq!(ratio(page(100, 50), page(100, 50)), None);
        assert_eq!(ratio(page(100, 50), page(180, 70)), Some(0.25));
    }

    proptest! {
        /// A percentile lies within the bounds, and a higher one is not lower.
        #[test]
        fn percentiles_are_ordered(counts in proptest::collection::vec(0u64..1_000, 3)) {
            let mut seen = 0;
            let cumulative = counts.iter().map(|count| { seen += count; seen });
            let buckets: Vec<_> = [0.01, 0.5, INF].into_iter().zip(cumulative).collect();
            let found = [0.5, 0.95, 0.99].map(|q| us(q, &buckets));
            prop_assert!(found.is_sorted());
            prop_assert!(found.iter().all(|found| found.is_some() == (seen > 0) && found.is_none_or(|us| us <= 500_000)));
        }
    }
}
