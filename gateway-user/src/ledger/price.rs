//! What an upstream costs at each moment, whoever uses it.
//!
//! Prices are dated: each holds from its moment until the next one's. The bill of a span is counted out at the span's edges: with `r`
//! nano-USD an hour it is `⌊r·to/h⌋ − ⌊r·from/h⌋`, moments taken since 1970 and `h` an hour in microseconds. So the bill of every window is a
//! whole number, the bills of adjoining windows sum to the bill of what they cover exactly, and the bill of any span under one price is
//! within one nano-USD of price times time. Where the price changes, a span is cut.

use serde::{Serialize, Serializer};

use super::money::NanoUsd;
use super::time::{Micros, Span};
use crate::identity::TeamId;

/// Microseconds of an hour.
const HOUR_US: u128 = 3_600_000_000;

/// What an upstream costs from a moment on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Price {
    /// The moment from which it holds.
    pub from: Micros,
    /// An hour of one GPU.
    pub usd_per_gpu_hour: NanoUsd,
    /// How many GPUs the upstream has.
    pub gpus: u32,
    /// Whose it is; only `ledger.idle: owner` asks.
    #[serde(serialize_with = "serialize_owner")]
    pub owner: Option<TeamId>,
}

/// The prices of one upstream over time; there is one at a time, and before the first of them nothing costs anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriceList(Vec<Price>);

/// A part of a span in which one price holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Priced<'a> {
    pub(super) span: Span,
    pub(super) price: Option<&'a Price>,
}

/// Why prices do not make a list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    /// Two hold from one moment.
    #[error("two prices hold from {from}: leave one of them out")]
    Twice {
        /// The moment.
        from: Micros,
    },
    /// A price that no GPU has.
    #[error(
        "expected at most {} USD for an hour of one GPU, found {found}",
        Price::PER_GPU_HOUR_MAX
    )]
    TooDear {
        /// The price.
        found: NanoUsd,
    },
    /// More GPUs than one server has.
    #[error("expected at most {} GPUs, found {found}", Price::GPUS_MAX)]
    TooMany {
        /// How many.
        found: u32,
    },
}

impl Price {
    /// Dearest hour of a GPU: a thousand times what one costs. It bounds amounts such that no sum of a window can overflow.
    pub const PER_GPU_HOUR_MAX: NanoUsd = NanoUsd(10_000 * NanoUsd::USD);

    /// Most GPUs of an upstream, for the same reason.
    pub const GPUS_MAX: u32 = 65_536;

    /// One GPU at 2.50 USD an hour, since ever: about what an hour of an H100 is rented out for, so that figures have a likely size until
    /// the real price is stated.
    pub const ASSUMED: Price = Price {
        from: Micros(0),
        usd_per_gpu_hour: NanoUsd(NanoUsd::USD / 2 * 5),
        gpus: 1,
        owner: None,
    };

    /// An hour of all GPUs.
    pub fn per_hour(&self) -> NanoUsd {
        NanoUsd(self.usd_per_gpu_hour.0.saturating_mul(self.gpus.into()))
    }

    /// Checks that a price is one that can be calculated with.
    ///
    /// # Errors
    /// Names the bound that it passes.
    pub fn check(&self) -> Result<(), PriceError> {
        if self.usd_per_gpu_hour > Self::PER_GPU_HOUR_MAX {
            return Err(PriceError::TooDear {
                found: self.usd_per_gpu_hour,
            });
        }
        if self.gpus > Self::GPUS_MAX {
            return Err(PriceError::TooMany { found: self.gpus });
        }
        Ok(())
    }

    /// What a span costs at this price.
    fn bill(&self, span: Span) -> NanoUsd {
        let until = |moment: Micros| u128::from(self.per_hour().0) * u128::from(moment.0) / HOUR_US;
        // The price's bounds leave far less for any span that fits 64 bits of microseconds and is shorter than a millennium.
        NanoUsd(u64::try_from(until(span.to()) - until(span.from())).unwrap_or(u64::MAX))
    }
}

impl PriceList {
    /// The list of these prices, in any order.
    ///
    /// # Errors
    /// When two hold from the same moment, or one is out of bounds.
    pub fn new(mut prices: Vec<Price>) -> Result<PriceList, PriceError> {
        prices.iter().try_for_each(Price::check)?;
        prices.sort_by_key(|price| price.from);
        match prices.windows(2).find(|pair| pair[0].from == pair[1].from) {
            Some(pair) => Err(PriceError::Twice { from: pair[0].from }),
            None => Ok(PriceList(prices)),
        }
    }

    /// What a span costs: the sum over each part of it in which one price holds.
    pub fn bill(&self, span: Span) -> NanoUsd {
        self.parts(span).iter().map(Priced::bill).sum()
    }

    /// What it costs in a span, in words: `2.5*8` is eight GPUs at 2.50 USD an hour each.
    pub fn words(&self, span: Span) -> String {
        let part = |priced: &Priced<'_>| match priced.price {
            Some(price) => {
                let owner = price.owner.as_ref().map(|owner| format!("({owner})"));
                let owner = owner.unwrap_or_default();
                format!("{}*{}{owner}", price.usd_per_gpu_hour, price.gpus)
            }
            None => "free".to_owned(),
        };
        let mut words = String::new();
        for (number, priced) in self.parts(span).iter().enumerate() {
            if number > 0 {
                words += &format!(" from {} ", priced.span.from());
            }
            words += &part(priced);
        }
        words
    }

    /// Cuts a span where the price changes. The parts are in order and cover it; there are none of an empty span.
    pub(super) fn parts(&self, span: Span) -> Vec<Priced<'_>> {
        let mut parts = Vec::with_capacity(1);
        let (mut from, mut price) = (span.from(), None);
        for next in &self.0 {
            let until = Span::new(from, next.from.clamp(span.from(), span.to()));
            parts.push(Priced { span: until, price });
            (from, price) = (until.to(), Some(next));
        }
        let span = Span::new(from, span.to());
        parts.push(Priced { span, price });
        parts.retain(|part| !part.span.is_empty());
        parts
    }
}

impl Priced<'_> {
    pub(super) fn bill(&self) -> NanoUsd {
        self.price.map_or(NanoUsd(0), |price| price.bill(self.span))
    }
}

fn serialize_owner<S: Serializer>(owner: &Option<TeamId>, serializer: S) -> Result<S::Ok, S::Error> {
    match owner {
        Some(team) => serializer.collect_str(team),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn price(from_us: u64, nano_usd_per_hour: u64) -> Price {
        Price {
            from: Micros(from_us),
            usd_per_gpu_hour: NanoUsd(nano_usd_per_hour),
            ..Price::ASSUMED
        }
    }

    fn span(from_us: u64, to_us: u64) -> Span {
        Span::new(Micros(from_us), Micros(to_us))
    }

    #[test]
    fn an_hour_costs_the_price_of_all_gpus() {
        let four = Price {
            gpus: 4,
            ..Price::ASSUMED
        };
        let list = PriceList::new(vec![four]).unwrap();
        let hour = span(1_800_000_000_000_000, 1_800_003_600_000_000);
        assert_eq!(list.bill(hour), NanoUsd(10 * NanoUsd::USD));
    }

    #[test]
    fn a_span_is_cut_where_the_price_changes_and_free_before_the_first() {
        let list = PriceList::new(vec![price(200, 7_200_000_000), price(100, 3_600_000_000)]).unwrap();
        assert_eq!(list.bill(span(50, 250)), NanoUsd(100 + 2 * 50));
        assert_eq!(list.bill(span(0, 100)), NanoUsd(0));
        assert_eq!(list.parts(span(50, 250)).len(), 3);
        assert!(list.parts(span(7, 7)).is_empty());
        let second = Micros(1_000_000).0;
        let list = PriceList::new(vec![price(0, 2_500_000_000), price(second, 3_000_000_000)]).unwrap();
        assert_eq!(list.words(span(0, second)), "2.5*1");
        assert_eq!(
            list.words(span(0, 2 * second)),
            "2.5*1 from 1970-01-01T00:00:01Z 3*1"
        );
    }

    #[test]
    fn what_cannot_be_calculated_with_is_refused() {
        let twice = PriceList::new(vec![price(5, 1), price(5, 2)]);
        assert_eq!(twice, Err(PriceError::Twice { from: Micros(5) }));
        let dear = PriceList::new(vec![price(5, u64::MAX)]);
        assert!(matches!(dear, Err(PriceError::TooDear { .. })));
    }

    proptest! {
        #[test]
        fn any_cut_of_a_span_sums_to_its_bill(
            rates in prop::collection::btree_map(0_u64..2_000_000_000_000_000, 0..=Price::PER_GPU_HOUR_MAX.0, 0..4),
            mut cuts in prop::collection::vec(0_u64..2_000_000_000_000_000, 2..40),
        ) {
            let list = PriceList::new(rates.into_iter().map(|(from, rate)| price(from, rate)).collect()).unwrap();
            cuts.sort_unstable();
            let pieces: NanoUsd = cuts.windows(2).map(|pair| list.bill(span(pair[0], pair[1]))).sum();
            prop_assert_eq!(pieces, list.bill(span(cuts[0], cuts[cuts.len() - 1])));
        }

        #[test]
        fn a_bill_is_within_a_nano_of_price_times_time(
            rate in 0..=Price::PER_GPU_HOUR_MAX.0,
            from in 0_u64..2_000_000_000_000_000,
            length in 0_u64..4_000_000_000_000,
        ) {
            let bill = PriceList::new(vec![price(0, rate)]).unwrap().bill(span(from, from + length));
            let exact = u128::from(rate) * u128::from(length) / HOUR_US;
            prop_assert!((exact..=exact + 1).contains(&u128::from(bill.0)));
        }
    }
}
