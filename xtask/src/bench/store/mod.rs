//! What storing costs, and what requests notice of it. ClickHouse's own engine runs as the gateway runs it, in a process of its own.
//!
//! * **throughput**: events go into the gateway's store as fast as it takes them (`gateway-user/examples/store_feed.rs`), through spool and sender
//!   into the engine, until all are stored. Measured is CPU time, of the gateway's side and of the engine, since other work on the machine distorts
//!   it least: events a second and core is one over their sum.
//! * **memory**: a gateway under a steady load, its resident memory each second. The slope is that of the straight line that fits best, without the
//!   first fifth, in which pools and caches fill. What the machine could not bear shows as a lower rate.
//! * **latency**: the same load in turns with the engine there and with the engine killed. Each ratio is of two neighbours, so that a drift of the
//!   machine falls on both. The simulated server answers at once, so that anything the gateway waited for would show.
//!
//! Left out: TLS to a server, clusters, and what queries cost beside inserts.

mod latency;
mod memory;
mod site;
mod throughput;

use std::path::Path;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use self::site::Site;
use super::build_release;
use super::load::Programs;
use super::report::{Range, write_json};
use super::scratch::Scratch;
use crate::clickhouse;

/// What is measured, and how much of it.
#[derive(Debug, Args)]
pub struct Options {
    /// Only these parts.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "throughput,memory,latency"
    )]
    only: Vec<Part>,
    /// Events in each round of throughput.
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(10_000..=5_000_000))]
    events: u64,
    /// How often throughput is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Minutes of load in which memory is watched.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    minutes: u32,
    /// Requests a second meanwhile.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Pairs of latency with ClickHouse there and away.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Seconds of each half of a pair, at 500 requests a second.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..))]
    seconds: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Throughput,
    Memory,
    Latency,
}

/// Builds, measures, prints figures and writes `target/bench/store.json`.
///
/// # Errors
/// When something cannot be built, fetched or started, or when events got lost or requests failed.
pub fn run(root: &Path, options: &Options) -> Result<()> {
    clickhouse::get()?;
    build_release(root, &["--example", "store_feed"])?;
    let scratch = Scratch::new()?;
    let release = root.join("target/release");
    let programs = Programs::new(&release, scratch.path())?;
    let site = Site::new(&programs, &release, scratch.path());
    let mut figures = Map::new();
    for part in &options.only {
        let (name, found) = match part {
            Part::Throughput => (
                "throughput",
                throughput::measure(&site, options.events, options.rounds)?,
            ),
            Part::Memory => ("memory", memory::measure(&site, options.minutes, options.rate)?),
            Part::Latency => (
                "latency",
                latency::measure(&site, options.pairs, options.seconds)?,
            ),
        };
        println!();
        figures.insert(name.to_owned(), found);
    }
    let file = root.join("target/bench/store.json");
    write_json(&file, &Value::Object(figures))?;
    println!("written to {}", file.display());
    Ok(())
}

/// Named ranges: printed as they are added, and JSON in the end.
#[derive(Default)]
struct Figures(Map<String, Value>);

impl Figures {
    fn add(&mut self, name: &str, values: impl Iterator<Item = f64>, decimals: usize) {
        let range = Range::of(values);
        let Range { median, min, max } = range;
        println!("{name:<42}{median:>12.decimals$}{min:>12.decimals$}{max:>12.decimals$}");
        self.0.insert(name.to_owned(), range.json());
    }

    fn head(title: &str) {
        println!("{title:<42}{:>12}{:>12}{:>12}", "median", "min", "max");
    }

    fn json(self) -> Value {
        json!(self.0)
    }
}
