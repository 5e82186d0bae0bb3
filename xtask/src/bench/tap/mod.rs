//! What the kernel tap costs, and whether it loses anything.
//!
//! The gateway runs with `capture: tap` and the default configuration, but for addresses and without the helper that would attach it anew, so
//! that with the process the probe is gone too. Every ratio is of two neighbours, which take turns in coming first. nginx and vllm-sim are
//! each in a cgroup of their own, as services and containers are, and it is made sure that the tap has found that one by itself: the load's
//! sockets, which would be on another machine, are not watched.
//!
//! * **requests**: nginx answers a small page as fast as wrk asks (the worst case: an engine's server answers a hundredth of that), with the tap on
//!   its port, with the tap on another port of the same process, and without any. Everything shares the machine's cores, so that the reader's CPU
//!   time shows in the throughput, too: how much that is stands beside it, and so does nginx's own CPU time for a request, which has the probe
//!   in it and not the reader. Two measurements without a tap are compared like the others: what their ratio is off by is noise.
//! * **drain**: the same traffic, the ring read but not understood (`gateway-user/examples/tap_drain.rs`).
//! * **rate**: streams of events at 50,000 records a second: none may be lost.
//! * **streams**: 200 streams of the simulated server with a chunk every 20 ms each; its CPU time with and without the tap.
//! * **soak**, with `--soak` and in place of the others: 5,000 records a second on connections that open and close.
//!
//! All figures are of the machine that it runs on. Left out: latency, and packets as long as a network card makes them.

mod cgroup;
mod drain;
mod figures;
mod rate;
mod requests;
mod sender;
mod site;
mod soak;
mod streams;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};

use self::figures::Figures;
use self::site::Site;
use super::build_release;
use super::load::Programs;
use super::scratch::Scratch;
use crate::tools;

/// What is measured, and how much of it.
#[derive(Debug, Args)]
pub struct Options {
    /// Only these parts.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "requests,drain,rate,streams"
    )]
    only: Vec<Part>,
    /// How often each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Watch memory for so long instead, such as 10m or 90s.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    soak: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Requests,
    Drain,
    Rate,
    Streams,
}

/// Builds, measures, prints figures beside their targets and writes `target/bench/tap.json` (or `tap-soak.json`). A target that is
/// missed is a result like another.
///
/// # Errors
/// When something cannot be built, installed or started, or when a load did not go through whole.
pub fn run(root: &Path, options: &Options) -> Result<()> {
    tools::ensure_installed(&tools::FOR_BENCHES)?;
    build_release(root, &["--example", "tap_drain"])?;
    let scratch = Scratch::new()?;
    let release = root.join("target/release");
    let programs = Programs::new(&release, scratch.path())?;
    let site = Site::new(&programs, &release);
    let mut figures = Figures::default();
    let file = root.join("target/bench").join(match options.soak {
        Some(_) => "tap-soak.json",
        None => "tap.json",
    });
    match options.soak {
        Some(duration) => soak::measure(&site, duration, &mut figures)?,
        None => options
            .only
            .iter()
            .try_for_each(|part| part.measure(&site, options, &mut figures))?,
    }
    figures.write(&file)?;
    println!("\n{figures}\nwritten to {}", file.display());
    Ok(())
}

impl Part {
    fn measure(self, site: &Site<'_>, options: &Options, figures: &mut Figures) -> Result<()> {
        let &Options { rounds, seconds, .. } = options;
        match self {
            Part::Requests => requests::measure(site, rounds, seconds, figures),
            Part::Drain => drain::measure(site, rounds, seconds, figures),
            Part::Rate => rate::measure(site, rounds, seconds, figures),
            Part::Streams => streams::measure(site, rounds, figures),
        }
    }
}

/// Which of two neighbours comes first in a round: whoever comes second finds a warmer or a more tired machine, so they take turns.
fn turns(round: u32) -> [usize; 2] {
    if round.is_multiple_of(2) { [0, 1] } else { [1, 0] }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, seconds_a_unit) = match text.strip_suffix('m') {
        Some(digits) => (digits, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let seconds = digits
        .parse::<u64>()
        .ok()
        .and_then(|amount| amount.checked_mul(seconds_a_unit));
    seconds
        .filter(|seconds| (10..=86_400).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| format!("expected a time from 10s to 1440m, found `{text}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_soak_is_as_long_as_it_says() {
        assert_eq!(parse_duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        for bad in ["", "m", "9s", "1h", "-1m", "99999m", "18446744073709551615m"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
