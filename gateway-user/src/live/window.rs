//! A team's last minute: counts by second, latencies by slices of ten seconds. Of fixed size, whatever happens in it.

use crate::wire::At;
use crate::wire::exchange::{GAP_BOUNDS_US, Gaps};

/// Seconds that rates and percentiles are of.
pub const WINDOW_S: usize = 60;

/// Those, and the one that is not over yet.
const SECONDS: usize = WINDOW_S + 1;

/// Seconds in a slice of latencies: percentiles need no finer edge, and each slice has buckets of its own.
const SLICE_S: u64 = 10;

/// The slices that cover the window, and the one that is not over yet.
const SLICES: usize = WINDOW_S / SLICE_S as usize + 1;

/// Buckets in each octave of a time to first token: one is an eighth wide, so that interpolation within it errs by a few per cent.
const STEPS: u32 = 8;

/// The octaves begin at 64 µs, below which no server answers, and end at 18 minutes, beyond any time limit.
const OCTAVE_MIN: u32 = 6;
const OCTAVES: u32 = 24;
const TTFT_BUCKETS: usize = (OCTAVES * STEPS) as usize;

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// What is counted by second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that ended.
    pub requests: u64,
    /// Those that the server, the way there or the client's own mistake made fail.
    pub errors: u64,
    /// Those that the client gave up.
    pub aborted: u64,
    /// Those that the gateway refused.
    pub refused: u64,
    /// Billed prompt tokens.
    pub prompt_tokens: u64,
    /// Billed completion tokens.
    pub completion_tokens: u64,
    /// What was charged, in billionths of a USD.
    pub charge_nano_usd: u64,
}

impl Counts {
    /// Adds, and stays at the end of the scale rather than begin anew.
    pub fn add(&mut self, more: &Counts) {
        let fields = [
            (&mut self.requests, more.requests),
            (&mut self.errors, more.errors),
            (&mut self.aborted, more.aborted),
            (&mut self.refused, more.refused),
            (&mut self.prompt_tokens, more.prompt_tokens),
            (&mut self.completion_tokens, more.completion_tokens),
            (&mut self.charge_nano_usd, more.charge_nano_usd),
        ];
        for (sum, value) in fields {
            *sum = sum.saturating_add(value);
        }
    }
}

/// One team's last minute.
#[derive(Debug, Default)]
pub struct Window {
    seconds: Ring<Counts, SECONDS>,
    gaps: Ring<GapSlice, SLICES>,
    /// Made for the first stream: most teams of a cluster may have none.
    ttft: Option<Box<Ring<TtftSlice, SLICES>>>,
}

/// What a window holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Sums over the last [`WINDOW_S`] whole seconds.
    pub counts: Counts,
    /// Requests in each of them, oldest first; empty when there were none at all.
    pub requests_by_second: Vec<u64>,
    /// Median time to first token, microseconds.
    pub ttft_p50_us: Option<u64>,
    /// Its 95th percentile.
    pub ttft_p95_us: Option<u64>,
    /// 95th percentile of the gaps between chunks.
    pub itl_p95_us: Option<u64>,
}

impl Window {
    /// Takes in a request that ended at `at`.
    pub fn add(&mut self, at: At, counts: &Counts, ttft_us: Option<u64>, gaps: &Gaps) {
        let second = at.0 / NANOS_PER_SECOND;
        self.seconds.at(second).add(counts);
        if gaps.count > 0 {
            self.gaps.at(second / SLICE_S).add(gaps);
        }
        if let Some(ttft_us) = ttft_us {
            let slices = self.ttft.get_or_insert_default();
            let slice = slices.at(second / SLICE_S);
            let bucket = &mut slice.0[ttft_bucket(ttft_us)];
            *bucket = bucket.saturating_add(1);
        }
    }

    /// What it holds at `now`.
    pub fn view(&self, now: At) -> View {
        let second = now.0 / NANOS_PER_SECOND;
        let first = second.saturating_sub(WINDOW_S as u64);
        let mut view = View::default();
        for at in first..second {
            let counts = self.seconds.get(at);
            view.requests_by_second
                .push(counts.map_or(0, |counts| counts.requests));
            view.counts.add(&counts.copied().unwrap_or_default());
        }
        if view.counts == Counts::default() {
            view.requests_by_second.clear();
        }
        let slices = slices_at(second);
        let mut gaps = GapSlice::default();
        slices
            .clone()
            .filter_map(|at| self.gaps.get(at))
            .for_each(|slice| gaps.join(slice));
        view.itl_p95_us = gaps.quantile_us(0.95);
        if let Some(ttft) = &self.ttft {
            let mut sum = [0_u64; TTFT_BUCKETS];
            for slice in slices.filter_map(|at| ttft.get(at)) {
                for (sum, count) in sum.iter_mut().zip(slice.0) {
                    *sum += u64::from(count);
                }
            }
            let at = |q| quantile(&sum, q).map(|(bucket, part)| within(ttft_bounds(bucket), part));
            (view.ttft_p50_us, view.ttft_p95_us) = (at(0.5), at(0.95));
        }
        view
    }
}

/// The slices that cover the window.
fn slices_at(second: u64) -> impl Iterator<Item = u64> + Clone {
    let last = second / SLICE_S;
    last.saturating_sub(SLICES as u64 - 1)..=last
}

/// The last `N` of something that is numbered by time. What was not written has no value, and what is older has lost it.
#[derive(Debug)]
struct Ring<T, const N: usize>([(u64, T); N]);

impl<T: Default, const N: usize> Default for Ring<T, N> {
    fn default() -> Self {
        // No time has that number.
        Ring(std::array::from_fn(|_| (u64::MAX, T::default())))
    }
}

impl<T: Default, const N: usize> Ring<T, N> {
    fn at(&mut self, number: u64) -> &mut T {
        let (held, value) = &mut self.0[(number % N as u64) as usize];
        if *held != number {
            (*held, *value) = (number, T::default());
        }
        value
    }

    fn get(&self, number: u64) -> Option<&T> {
        let (held, value) = &self.0[(number % N as u64) as usize];
        (*held == number).then_some(value)
    }
}

/// Gaps, in the buckets that they come in.
#[derive(Debug, Default)]
struct GapSlice {
    buckets: [u64; GAP_BOUNDS_US.len() + 1],
    max_us: u64,
}

impl GapSlice {
    fn add(&mut self, gaps: &Gaps) {
        for (sum, more) in self.buckets.iter_mut().zip(gaps.buckets) {
            *sum += u64::from(more);
        }
        self.max_us = self.max_us.max(gaps.max_us);
    }

    fn join(&mut self, other: &GapSlice) {
        for (sum, more) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += more;
        }
        self.max_us = self.max_us.max(other.max_us);
    }

    fn quantile_us(&self, q: f64) -> Option<u64> {
        let (bucket, part) = quantile(&self.buckets, q)?;
        let low = bucket.checked_sub(1).map_or(0, |below| GAP_BOUNDS_US[below]);
        let high = GAP_BOUNDS_US.get(bucket).copied().unwrap_or(u64::MAX);
        // No gap is longer than the longest.
        Some(within((low, high.min(self.max_us.max(low))), part))
    }
}

/// Times to first token, in buckets of equal ratio.
#[derive(Debug)]
struct TtftSlice([u32; TTFT_BUCKETS]);

impl Default for TtftSlice {
    fn default() -> Self {
        TtftSlice([0; TTFT_BUCKETS])
    }
}

fn ttft_bucket(us: u64) -> usize {
    let us = us.clamp(1 << OCTAVE_MIN, (1 << (OCTAVE_MIN + OCTAVES)) - 1);
    let octave = us.ilog2();
    let step = (us >> (octave - STEPS.ilog2())) as usize % STEPS as usize;
    (octave - OCTAVE_MIN) as usize * STEPS as usize + step
}

/// The lowest value of a bucket, and the lowest of the next.
fn ttft_bounds(bucket: usize) -> (u64, u64) {
    let (octave, step) = (bucket as u32 / STEPS, bucket as u64 % u64::from(STEPS));
    let width = 1 << (octave + OCTAVE_MIN - STEPS.ilog2());
    let low = (u64::from(STEPS) + step) * width;
    (low, low + width)
}

/// The bucket that holds a quantile, and how far into it that lies, 0 to 1; `None` when all are empty.
fn quantile(buckets: &[u64], q: f64) -> Option<(usize, f64)> {
    let total: u64 = buckets.iter().sum();
    let rank = q * total as f64;
    let mut below = 0;
    for (bucket, count) in buckets.iter().enumerate().filter(|(_, count)| **count > 0) {
        below += count;
        if below as f64 >= rank {
            let into = (rank - (below - count) as f64) / *count as f64;
            return Some((bucket, into));
        }
    }
    None
}

fn within((low, high): (u64, u64), part: f64) -> u64 {
    low + ((high - low) as f64 * part) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn second(number: u64) -> At {
        At(number * NANOS_PER_SECOND + 1)
    }

    fn requests(requests: u64) -> Counts {
        Counts {
            requests,
            ..Counts::default()
        }
    }

    #[test]
    fn the_last_minute_slides_and_the_second_that_runs_does_not_count_yet() {
        let mut window = Window::default();
        for at in [100, 100, 159, 160] {
            window.add(second(at), &requests(1), None, &Gaps::default());
        }
        let view = window.view(second(160));
        assert_eq!(view.counts.requests, 3);
        assert_eq!(view.requests_by_second.len(), WINDOW_S);
        assert_eq!((view.requests_by_second[0], view.requests_by_second[59]), (2, 1));
        assert_eq!(
            window.view(second(161)).counts.requests,
            2,
            "second 100 is over a minute ago"
        );
        let idle = window.view(second(1_000));
        assert_eq!(idle, View::default(), "and an idle minute takes no room");
    }

    #[test]
    fn latencies_of_the_minute_give_percentiles_and_older_ones_are_forgotten() {
        let mut window = Window::default();
        for ms in 1..=100_u64 {
            window.add(second(50), &requests(1), Some(ms * 10_000), &Gaps::default());
        }
        let view = window.view(second(51));
        let near = |found: Option<u64>, expected: u64| {
            let found = found.unwrap() as f64;
            (found / expected as f64 - 1.0).abs() < 0.04
        };
        assert!(near(view.ttft_p50_us, 500_000), "{view:?}");
        assert!(near(view.ttft_p95_us, 950_000), "{view:?}");
        assert_eq!(view.itl_p95_us, None, "no gaps, no percentile");
        assert_eq!(window.view(second(131)).ttft_p50_us, None);
    }

    #[test]
    fn gaps_are_interpolated_within_their_bucket_and_end_at_the_longest() {
        let mut gaps = Gaps {
            count: 100,
            max_us: 3_000_000,
            ..Gaps::default()
        };
        (gaps.buckets[4], gaps.buckets[16]) = (90, 10);
        let mut window = Window::default();
        window.add(second(5), &requests(1), None, &gaps);
        let p95 = window.view(second(6)).itl_p95_us;
        assert_eq!(p95, Some(2_750_000), "half into 2.5 s to 3 s");
        assert_eq!(quantile(&[0, 0], 0.5), None);
    }

    proptest! {
        #[test]
        fn each_time_lies_within_its_bucket(us in 64_u64..1 << 30) {
            let (low, high) = ttft_bounds(ttft_bucket(us));
            prop_assert!(low <= us && us < high, "{low} {us} {high}");
            prop_assert!((high - low) * 8 <= low, "no bucket is wider than an eighth");
        }

        #[test]
        fn no_time_is_out_of_range(us: u64) {
            prop_assert!(ttft_bucket(us) < TTFT_BUCKETS);
        }

        /// However it is filled, a window is what the same events of the last minute sum to.
        #[test]
        fn a_window_is_the_sum_of_its_seconds(mut ends in proptest::collection::vec(0_u64..200, 0..100)) {
            ends.sort_unstable();
            let mut window = Window::default();
            for end in &ends {
                window.add(second(*end), &requests(1), None, &Gaps::default());
            }
            let now = ends.last().copied().unwrap_or(0);
            let expected = ends.iter().filter(|end| **end < now && **end + 60 >= now).count() as u64;
            prop_assert_eq!(window.view(second(now)).counts.requests, expected);
        }
    }
}
