//! What every vLLM server says of itself at `/metrics`, read every `vllm.scrape_interval`.
//!
//! * [`exposition`] reads Prometheus' text format, [`families`] knows which of vLLM's families means what.
//! * [`delta`] compares two pages: differences of counters, percentiles out of differences of histograms.
//! * [`fetch`] asks a server one thing on a connection of its own.
//! * [`scrape`] fetches, remembers the page before, and hands out [`SystemSample`]s.
//!
//! Promises: what a server does not say is unknown (`None`), never 0; a difference is exact or unknown; a scrape that failed is told as
//! such; nothing here touches a request. Sums of differences are what the engine's counters grew by, also across failed scrapes.
//!
//! Left out: what other exporters say (GPU, node), and several processes that answer in turn behind one address. Their counters
//! go up and down, which shows as a reset at almost every scrape (`gateway_scrape_resets_total`); scrape each by its own address.

pub mod delta;
pub mod exposition;
pub mod families;
pub mod fetch;
mod sample;
pub mod scrape;

pub use sample::{Percentiles, SampleSink, SystemSample};
