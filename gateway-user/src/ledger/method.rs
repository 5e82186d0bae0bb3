//! By which rules the cost of a busy upstream is shared out, and what becomes of the rest.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::money::{NoDecimal, parse_decimal, write_decimal};
use crate::config::IdleTo;

/// The formula's version: part of every row, so that a row says by what it was computed.
const VERSION: &str = "v1";

/// A decimal of six places that is not negative: a weight, or a share of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millionths(u32);

/// How much work each thing is that a request has an engine do. Only their proportions matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Weights {
    /// A prompt token that did not come out of the prefix cache.
    pub prompt: Millionths,
    /// A generated token.
    pub completion: Millionths,
    /// A token that lay in the KV cache for a second.
    pub kv: Millionths,
}

/// The rules, which stand with every row that was computed by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    theta: Millionths,
    /// What is work.
    pub weights: Weights,
    /// Where the cost of idle time goes.
    pub idle: IdleTo,
}

impl Millionths {
    /// Decimal places.
    pub const PLACES: u32 = 6;

    /// The number 1.
    pub const ONE: Millionths = Millionths(10_u32.pow(Self::PLACES));

    /// So many millionths.
    pub const fn new(millionths: u32) -> Millionths {
        Millionths(millionths)
    }

    /// How many millionths.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl FromStr for Millionths {
    type Err = NoDecimal;

    fn from_str(text: &str) -> Result<Millionths, NoDecimal> {
        let millionths = parse_decimal(text, Self::PLACES)?;
        u32::try_from(millionths)
            .map(Millionths)
            .map_err(|_| NoDecimal::TooLarge)
    }
}

impl fmt::Display for Millionths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_decimal(f, self.0.into(), Self::PLACES)
    }
}

/// In the config: a number. All of its ten digits at most survive a float.
impl Serialize for Millionths {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / f64::from(Self::ONE.0))
    }
}

impl Weights {
    /// As numbers: prompt, completion, KV. Only their proportions mean something.
    pub fn proportions(&self) -> [f64; 3] {
        [self.prompt, self.completion, self.kv].map(|weight| f64::from(weight.get()))
    }

    /// What each kind of work costs an 8-billion-parameter model in bf16 on one H100, in prompt tokens. A prompt token is 16 GFLOP, 40 µs at
    /// 400 TFLOP/s. A generated token is its share of reading 16 GB of weights, 4.8 ms at 3.35 TB/s, which a batch of 32 divides: 150 µs, 4 in
    /// round figures. A token in the KV cache is 128 KiB (32 layers, 8 heads, 128 wide, K and V) that each of some 40 steps a second reads:
    /// 1.6 µs a second, 0.04.
    pub const ASSUMED: Weights = Weights {
        prompt: Millionths::ONE,
        completion: Millionths::new(4_000_000),
        kv: Millionths::new(40_000),
    };
}

impl Method {
    /// The share of a busy moment that goes by work, where nothing else is said; the rest goes by being there. A request holds a place in the
    /// batch whether it works or not: what a step takes whatever is in it is shared out so. Half for each was near what teams really take of a simulated
    /// engine that has room, where presence alone was not; an engine that is always full wants more (`cargo xtask bench allocation`), and
    /// `vllm-gateway calibrate` tells how much.
    pub const THETA_ASSUMED: Millionths = Millionths::new(500_000);

    /// The rules with the share `theta` by work; `None` when that is more than the whole.
    pub fn new(theta: Millionths, weights: Weights, idle: IdleTo) -> Option<Method> {
        (theta <= Millionths::ONE).then_some(Method { theta, weights, idle })
    }

    /// The share of a busy moment that goes by work, at most 1.
    pub fn theta(&self) -> Millionths {
        self.theta
    }
}

/// As it stands in a row.
impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Weights {
            prompt,
            completion,
            kv,
        } = self.weights;
        let (theta, idle) = (self.theta, self.idle);
        write!(
            f,
            "{VERSION} theta={theta} a={prompt} b={completion} c={kv} idle={idle}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_by_what_it_was_computed() {
        let method = Method::new(Method::THETA_ASSUMED, Weights::ASSUMED, IdleTo::Separate).unwrap();
        assert_eq!(method.to_string(), "v1 theta=0.5 a=1 b=4 c=0.04 idle=separate");
    }

    #[test]
    fn no_more_than_all_goes_by_work() {
        let beyond = Millionths::new(1_000_001);
        assert_eq!(Method::new(beyond, Weights::ASSUMED, IdleTo::Even), None);
    }
}
