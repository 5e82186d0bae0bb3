//! What every vLLM server says of itself at `/metrics`, read every `vllm.scrape_interval`.
//!
//! * [`exposition`] reads Prometheus' text format, [`names`] knows which of vLLM's families means what, [`page`] what all of a page says.
//! * [`delta`] compares two pages: differences of counters, percentiles out of differences of histograms.
//! * [`origin`] tells several processes behind one address from one that was restarted.
//! * [`fetch`] asks a server one thing on a connection of its own.
//! * [`scrape`] fetches, remembers the page before, and hands out [`SystemSample`]s.
//!
//! Promises: what a server does not say is unknown (`None`), never 0; a difference is exact or unknown; a scrape that failed is told as
//! such; nothing here touches a request. Sums of differences are what the engine's counters grew by, also across failed scrapes.
//!
//! A server that does not answer was loading its model if it says so later: vLLM binds its port before that and listens only after, so that
//! connections are refused, and its first page tells when its process started. Rows of that time are then written again.
//!
//! Left out: what other exporters say (GPU, node), and the counters of several processes that answer in turn behind one address: they go up and
//! down, which shows as a reset at almost every scrape (`gateway_scrape_resets_total`); scrape each by its own address.

pub mod delta;
pub mod exposition;
pub mod fetch;
pub mod names;
pub mod origin;
pub mod page;
mod sample;
pub mod scrape;

pub use sample::{Means, Percentiles, SampleSink, SystemSample};
