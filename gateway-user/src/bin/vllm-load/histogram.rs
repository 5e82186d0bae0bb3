//! A histogram of durations with fixed buckets.
//!
//! The `hdrhistogram` crate would do, but what is needed of it is this one page: recording in O(1), merging the
//! threads' histograms, quantiles, and a size that never grows. Buckets are log-linear: each power of two is cut
//! into 64 equal parts, so that a quantile is at most 1.6 % too high, at any size.

/// 64 parts to a power of two: 6 bits of the value below its leading one.
const SUB_BITS: u32 = 6;

/// Values from 2⁴⁰ µs (12 days) on share the last bucket: no run is as long.
const MAX_BITS: u32 = 40;

/// The first 64 values have a bucket each; every further power of two has 64.
const BUCKETS: usize = ((MAX_BITS - SUB_BITS + 1) as usize) << SUB_BITS;

/// Counts of microseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum_us: u64,
    max_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            count: 0,
            sum_us: 0,
            max_us: 0,
        }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, value_us: u64) {
        self.counts[bucket(value_us)] += 1;
        self.count += 1;
        self.sum_us = self.sum_us.saturating_add(value_us);
        self.max_us = self.max_us.max(value_us);
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
        self.max_us = self.max_us.max(other.max_us);
    }

    /// The smallest bucket bound that at least this share of the values does not exceed; `None` when empty.
    pub fn quantile_us(&self, quantile: f64) -> Option<u64> {
        let rank = ((quantile * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut below = 0;
        for (index, count) in self.counts.iter().enumerate() {
            below += count;
            if below >= rank {
                return Some(upper_bound_us(index).min(self.max_us));
            }
        }
        None
    }

    /// The figures that a report shows; `None` when nothing was counted.
    pub fn figures(&self) -> Option<Figures> {
        Some(Figures {
            count: self.count,
            mean_us: self.sum_us.checked_div(self.count)?,
            p50_us: self.quantile_us(0.50)?,
            p95_us: self.quantile_us(0.95)?,
            p99_us: self.quantile_us(0.99)?,
            max_us: self.max_us,
        })
    }
}

/// A distribution in six numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Figures {
    /// How many values there are.
    pub count: u64,
    /// Their mean.
    pub mean_us: u64,
    /// The median.
    pub p50_us: u64,
    /// 95 of 100 are no longer.
    pub p95_us: u64,
    /// 99 of 100 are no longer.
    pub p99_us: u64,
    /// The longest, exactly.
    pub max_us: u64,
}

fn bucket(value_us: u64) -> usize {
    let value = value_us.min((1 << MAX_BITS) - 1);
    let leading = 63 - (value | 1).leading_zeros();
    if leading < SUB_BITS {
        return value as usize;
    }
    let shift = leading - SUB_BITS;
    // The part of the value below its leading one, and above it which power of two it is.
    let within = (value >> shift) as usize - (1 << SUB_BITS);
    (((shift + 1) as usize) << SUB_BITS) + within
}

fn upper_bound_us(bucket: usize) -> u64 {
    let power = (bucket >> SUB_BITS) as u32;
    let within = (bucket & ((1 << SUB_BITS) - 1)) as u64;
    match power.checked_sub(1) {
        None => within,
        Some(shift) => (((1 << SUB_BITS) + within + 1) << shift) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_value_lies_below_its_bucket_s_bound_and_near_it(value in 0u64..(1 << MAX_BITS)) {
            let bound = upper_bound_us(bucket(value));
            prop_assert!(value <= bound);
            prop_assert!((bound - value) as f64 <= value as f64 / 64.0, "{value} in the bucket up to {bound}");
        }

        #[test]
        fn quantiles_are_those_of_the_sorted_values(mut values in prop::collection::vec(0u64..10_000_000, 1..300)) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|value| histogram.record(*value));
            values.sort_unstable();
            for quantile in [0.5, 0.95, 0.99] {
                let exact = values[((quantile * values.len() as f64).ceil() as usize).max(1) - 1];
                let found = histogram.quantile_us(quantile).expect("values");
                prop_assert!(found >= exact && found as f64 <= exact as f64 * (1.0 + 1.0 / 64.0), "{found} for {exact}");
            }
        }
    }

    #[test]
    fn merging_is_as_if_one_had_counted_all() {
        let (mut one, mut other, mut all) =
            (Histogram::default(), Histogram::default(), Histogram::default());
        for value in 0..1000 {
            if value % 3 == 0 {
                one.record(value * 17)
            } else {
                other.record(value * 17)
            }
            all.record(value * 17);
        }
        one.merge(&other);
        assert_eq!(one.figures(), all.figures());
        assert_eq!(one.figures().expect("values").count, 1000);
    }

    #[test]
    fn nothing_counted_has_no_figures_and_the_largest_value_fits() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.figures(), None);
        histogram.record(u64::MAX);
        assert_eq!(histogram.figures().expect("a value").max_us, u64::MAX);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }
}
