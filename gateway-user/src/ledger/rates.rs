//! What a request is charged by its tokens, at prices that are agreed on beforehand.
//!
//! A charge is known as soon as a request has ended, which is why limits and budgets go by it; the allocated cost is known later and
//! differs. It is `prompt·uncached + cached·cached + completion·completion` at a price for a million tokens each, rounded up to the nano-USD
//! once for each request: a request that used anything at a price costs something.

use serde::Serialize;

use super::money::NanoUsd;
use super::time::Micros;

/// Tokens that a price is for.
const MILLION: u128 = 1_000_000;

/// What a million tokens of each kind cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PerMillion {
    /// Prompt tokens that did not come out of the prefix cache.
    pub prompt: NanoUsd,
    /// Those that did.
    pub cached: NanoUsd,
    /// Generated tokens.
    pub completion: NanoUsd,
}

/// One entry of the rate card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rate {
    /// The model, as requests name it; `None` for all that have no entry of their own.
    pub model: Option<String>,
    /// The moment from which it holds.
    pub from: Micros,
    /// The prices.
    pub usd_per_million: PerMillion,
}

/// The tokens of a request, as billed. What is unknown is charged nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: u64,
    /// Those out of the prefix cache.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
}

/// Which rate holds for which model from when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateCard(Vec<Rate>);

/// Two rates of one model hold from one moment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two rates of {} hold from {from}: leave one of them out", model.as_deref().unwrap_or("all other models"))]
pub struct RateTwice {
    /// The model.
    pub model: Option<String>,
    /// The moment.
    pub from: Micros,
}

impl Rate {
    /// For all models: a GPU at [`Price::ASSUMED`](super::Price::ASSUMED) that makes 1 700 tokens a second, or reads four times as many,
    /// earns what it costs. One from the cache saves the reading: a tenth.
    pub const ASSUMED: Rate = Rate {
        model: None,
        from: Micros(0),
        usd_per_million: PerMillion {
            prompt: NanoUsd(NanoUsd::USD / 10),
            cached: NanoUsd(NanoUsd::USD / 100),
            completion: NanoUsd(NanoUsd::USD / 10 * 4),
        },
    };
}

impl PerMillion {
    /// What so many tokens are charged.
    pub fn charge(&self, usage: Usage) -> NanoUsd {
        let cached = usage.cached_tokens.min(usage.prompt_tokens);
        let of = |price: NanoUsd, tokens: u64| u128::from(price.0) * u128::from(tokens);
        let millionths = [
            of(self.prompt, usage.prompt_tokens - cached),
            of(self.cached, cached),
            of(self.completion, usage.completion_tokens),
        ];
        let sum = millionths.into_iter().fold(0_u128, u128::saturating_add);
        NanoUsd(u64::try_from(sum.div_ceil(MILLION)).unwrap_or(u64::MAX))
    }
}

impl RateCard {
    /// The card of these rates, in any order.
    ///
    /// # Errors
    /// When two of one model hold from the same moment.
    pub fn new(mut rates: Vec<Rate>) -> Result<RateCard, RateTwice> {
        rates.sort_by(|left, right| (&left.model, left.from).cmp(&(&right.model, right.from)));
        let key = |rate: &Rate| (rate.model.clone(), rate.from);
        match rates.windows(2).find(|pair| key(&pair[0]) == key(&pair[1])) {
            Some(pair) => {
                let (model, from) = key(&pair[0]);
                Err(RateTwice { model, from })
            }
            None => Ok(RateCard(rates)),
        }
    }

    /// The rate of a model at a moment: its own if it has one by then, else that of all others.
    pub fn rate(&self, model: &str, at: Micros) -> Option<&Rate> {
        let last = |wanted: Option<&str>| {
            let holds = |rate: &&Rate| rate.model.as_deref() == wanted && rate.from <= at;
            self.0.iter().rfind(holds)
        };
        last(Some(model)).or_else(|| last(None))
    }

    /// What a request is charged that began at `at`. Without a rate it is charged nothing.
    pub fn charge(&self, model: &str, at: Micros, usage: Usage) -> NanoUsd {
        self.rate(model, at)
            .map_or(NanoUsd(0), |rate| rate.usd_per_million.charge(usage))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(model: Option<&str>, from: u64, completion: u64) -> Rate {
        Rate {
            model: model.map(str::to_owned),
            from: Micros(from),
            usd_per_million: PerMillion {
                prompt: NanoUsd(0),
                cached: NanoUsd(0),
                completion: NanoUsd(completion),
            },
        }
    }

    #[test]
    fn a_million_tokens_of_each_kind_cost_their_prices() {
        let usage = Usage {
            prompt_tokens: 2_000_000,
            cached_tokens: 1_000_000,
            completion_tokens: 1_000_000,
        };
        let charge = Rate::ASSUMED.usd_per_million.charge(usage);
        assert_eq!(charge, NanoUsd::from_usd("0.51").unwrap());
    }

    #[test]
    fn the_rate_is_the_models_own_by_its_date_else_that_of_all_others() {
        let card = RateCard::new(vec![
            rate(Some("a"), 20, 3_000_000),
            rate(None, 0, 1_000_000),
            rate(Some("a"), 10, 2_000_000),
        ])
        .unwrap();
        let one = Usage {
            completion_tokens: 1,
            ..Usage::default()
        };
        for (model, at, nano) in [
            ("a", 9, 1),
            ("a", 10, 2),
            ("a", 19, 2),
            ("a", 20, 3),
            ("b", 99, 1),
        ] {
            assert_eq!(
                card.charge(model, Micros(at), one),
                NanoUsd(nano),
                "{model} at {at}"
            );
        }
        assert_eq!(RateCard::default().charge("a", Micros(0), one), NanoUsd(0));
        assert!(RateCard::new(vec![rate(None, 5, 1), rate(None, 5, 2)]).is_err());
    }

    #[test]
    fn a_charge_is_rounded_up_once() {
        let one = Usage {
            prompt_tokens: 1,
            cached_tokens: 0,
            completion_tokens: 1,
        };
        let cheap = PerMillion {
            prompt: NanoUsd(1),
            cached: NanoUsd(1),
            completion: NanoUsd(1),
        };
        assert_eq!(cheap.charge(one), NanoUsd(1));
        assert_eq!(cheap.charge(Usage::default()), NanoUsd(0));
    }

    proptest! {
        #[test]
        fn more_tokens_are_never_charged_less_but_cached_ones(
            prompt_tokens: u64,
            cached_tokens: u64,
            completion_tokens in 0..u64::MAX,
        ) {
            let usage = Usage { prompt_tokens, cached_tokens, completion_tokens };
            let more = Usage { completion_tokens: completion_tokens + 1, ..usage };
            let price = Rate::ASSUMED.usd_per_million;
            prop_assert!(price.charge(usage) <= price.charge(more));
        }
    }
}
