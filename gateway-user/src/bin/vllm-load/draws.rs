//! Random draws that depend on `(seed, stream, index)` and on nothing else.
//!
//! A run must be repeatable from its seed, on any machine and with any version of this program's
//! dependencies. The generators of `rand` promise no stable output between versions, so this is SplitMix64
//! (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), which is a dozen lines.
//! It is good enough for load shapes and not for secrets.

use std::ops::RangeInclusive;

/// What a sequence of draws is for. Each purpose has its own sequence, so that adding a draw to one of them
/// changes none of the others.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// What request `index` is.
    Request = 1,
    /// Which words its prompt has.
    Prompt = 2,
    /// How long after its predecessor it arrives.
    Arrival = 3,
}

/// A sequence of draws.
#[derive(Debug)]
pub struct Draws {
    state: u64,
}

/// The odd increment of SplitMix64: the golden ratio's fraction in 64 bits.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output permutation of SplitMix64.
fn scramble(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Draws {
    /// The sequence for one purpose of one request.
    pub fn new(seed: u64, purpose: Purpose, index: u64) -> Self {
        // Scrambling between the parts keeps (seed 1, index 2) away from (seed 2, index 1).
        let of_seed = scramble(seed.wrapping_add(GOLDEN));
        let of_purpose = scramble(of_seed ^ purpose as u64);
        Self {
            state: scramble(of_purpose.wrapping_add(index.wrapping_mul(GOLDEN))),
        }
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        scramble(self.state)
    }

    /// Uniform in `[0, 1)`, with the 53 bits that an `f64` can hold.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True with this probability: never at 0, always at 1.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// Uniform in a range that includes both its ends. The bias of the multiplication is below 2⁻³².
    pub fn within(&mut self, range: RangeInclusive<u32>) -> u32 {
        let (low, high) = (*range.start(), *range.end().max(range.start()));
        let width = u64::from(high - low) + 1;
        let offset = ((u128::from(self.bits()) * u128::from(width)) >> 64) as u32;
        low + offset
    }

    /// The standard normal distribution, by Box and Muller.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// The exponential distribution of mean 1: the gaps of a Poisson process of rate 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_depends_on_seed_purpose_and_index() {
        let first = |seed, purpose, index| Draws::new(seed, purpose, index).bits();
        assert_eq!(first(1, Purpose::Request, 2), first(1, Purpose::Request, 2));
        assert_ne!(first(1, Purpose::Request, 2), first(2, Purpose::Request, 1));
        assert_ne!(first(1, Purpose::Request, 2), first(1, Purpose::Prompt, 2));
        assert_ne!(first(1, Purpose::Request, 2), first(1, Purpose::Request, 3));
    }

    #[test]
    fn a_range_is_covered_evenly_and_includes_both_ends() {
        let mut counts = [0u32; 5];
        for index in 0..50_000 {
            let drawn = Draws::new(7, Purpose::Request, index).within(3..=7);
            counts[(drawn - 3) as usize] += 1;
        }
        // 10,000 expected, standard deviation 89: five of them is a limit that a fair generator keeps.
        assert!(
            counts.iter().all(|count| count.abs_diff(10_000) < 450),
            "{counts:?}"
        );
        assert_eq!(Draws::new(7, Purpose::Request, 0).within(9..=9), 9);
    }

    #[test]
    fn the_moments_are_those_of_the_distributions() {
        let n = 100_000;
        let (mut normal, mut squares, mut exponential) = (0.0, 0.0, 0.0);
        for index in 0..n {
            let mut draws = Draws::new(11, Purpose::Arrival, index);
            let z = draws.normal();
            normal += z;
            squares += z * z;
            exponential += draws.exponential();
        }
        let n = n as f64;
        assert!((normal / n).abs() < 0.02, "mean of the normal: {}", normal / n);
        assert!(
            (squares / n - 1.0).abs() < 0.03,
            "variance of the normal: {}",
            squares / n
        );
        assert!(
            (exponential / n - 1.0).abs() < 0.02,
            "mean of the exponential: {}",
            exponential / n
        );
    }
}
