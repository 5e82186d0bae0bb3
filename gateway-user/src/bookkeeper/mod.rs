//! The bill, made of what is stored: windows computed as soon as they are over, corrected while facts come in, and settled.
//!
//! Every gateway keeps the books of the upstreams that it knows, and none has to be the only one: a statement follows from facts that all of them read
//! from the same tables, so that who computes a window twice writes nothing, and who computes it at the same time writes the same. Only what cannot be
//! read from tables is left to chance: when a window is looked at.
//!
//! * [`job`] runs beside the gateway; `desk` computes a chunk of windows, for the job and for the command alike.
//! * [`command`] is `vllm-gateway ledger`, with `month` for closing months.
//!
//! Promises: nothing in here is in the way of a request; an error is waited out; memory is bounded, by a chunk of windows and the segments of a few of
//! them. Left out: the rules themselves, which are in [`ledger`](crate::ledger), and ClickHouse, which only [`store`](crate::store) knows.

pub mod command;
mod desk;
pub mod job;
mod month;
mod stats;

pub use stats::LedgerStats;

use crate::config::{Config, UpstreamConfig};
use crate::ledger::{Method, PriceList, Window};
use crate::store::ledger::LedgerStore;
use std::time::Duration;

/// How much earlier than ClickHouse begins to delete raw rows they are no longer believed to be complete: a day, or less where they are kept for days.
const RAW_MARGIN: Duration = Duration::from_hours(24);

/// By which rules this gateway computes.
#[derive(Clone, Debug)]
struct Rules {
    method: Method,
    settle_us: u64,
    /// How long raw rows are there to compute from.
    raw_us: u64,
}

/// An upstream that books are kept of.
#[derive(Clone, Debug)]
struct Upstream {
    name: Box<str>,
    prices: PriceList,
}

impl Rules {
    /// The rules of a config; `None` when they are none, which a validated config's are not.
    fn of(config: &Config) -> Option<Rules> {
        let ledger = &config.ledger;
        let kept = Duration::from_hours(24 * u64::from(config.store.raw_days));
        let raw = kept - RAW_MARGIN.min(kept / 4);
        Some(Rules {
            method: Method::new(ledger.theta, ledger.weights, ledger.idle)?,
            settle_us: micros(ledger.settle_after),
            raw_us: micros(raw),
        })
    }

    /// How many windows on each side decide what is a gap.
    fn reach(&self) -> u64 {
        self.settle_us.div_ceil(Window::LEN_US)
    }
}

impl Upstream {
    /// The upstreams of a config.
    fn all_of(config: &Config) -> Vec<Upstream> {
        let upstream = |upstream: &UpstreamConfig| {
            Some(Upstream {
                name: upstream.name.as_str().into(),
                prices: PriceList::new(upstream.price.clone()).ok()?,
            })
        };
        config.upstreams.iter().filter_map(upstream).collect()
    }
}

/// What it takes to keep books by a config; `None` when it keeps no rows.
fn opened(config: &Config) -> Option<(LedgerStore, Rules, Vec<Upstream>)> {
    Some((
        LedgerStore::new(&config.store)?,
        Rules::of(config)?,
        Upstream::all_of(config),
    ))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
