//! What the gateway costs in the path, beside nginx as a plain reverse proxy.
//!
//! Both stand in turn between the same load and the same simulated server, which answers at once; each has one worker, keep-alive on
//! both legs, no access log and no buffering of responses. Measured is the CPU time of the proxy's process, user and system, which
//! other work on the machine distorts far less than it does latency. Rounds alternate and every ratio is of two neighbours, so that a
//! drift of the machine falls on both.
//!
//! * **requests**: small unstreamed chat requests from 32 connections as fast as they go (wrk), for `--seconds`.
//! * **chunks**: 200 streams at a time with a chunk every 20 ms each (vllm-load), until `--requests` streams have ended. The cost of
//!   a stream's request is spread over its 250 chunks.
//!
//! What is compared is not the same work. nginx moves bytes; the gateway also tells whose request it is, asks the server for usage on
//! each chunk and takes it out again, reads every chunk for tokens and times, and books the result. The gateway runs with the default
//! configuration but for addresses and workers. Left out: latency (the load is at the limit, where it shows the queue), TLS, and
//! large bodies.
//!
//! With `--runtimes` the gateway is compared with itself instead: a runtime for each core, against one for all of them.

use std::path::Path;

use anyhow::Result;
use clap::Args;

use super::build_release;
use super::contender::Contender;
use super::load::{Load, Programs};
use super::process::{Server, free_addr};
use super::report::{Measured, Report, Sample};
use super::scratch::Scratch;
use crate::tools;

/// How much is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Streams in each measurement of the cost of a chunk.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(200..))]
    requests: u32,
    /// Seconds of each measurement of the cost of a request.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// How often each of the two is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Compare the gateway's two kinds of runtime with a worker for each core, instead of the gateway with nginx.
    #[arg(long)]
    runtimes: bool,
}

/// Builds, measures, prints a table and writes `target/bench/proxy.json` (or `runtimes.json`).
///
/// # Errors
/// When something cannot be built, installed or started, or when a load did not go through whole.
pub fn run(root: &Path, options: &Options) -> Result<()> {
    tools::ensure_installed(&tools::FOR_BENCHES)?;
    build_release(root, &[])?;
    let scratch = Scratch::new()?;
    let programs = Programs::new(&root.join("target/release"), scratch.path())?;
    let (pair, name) = match options.runtimes {
        false => ([Contender::GATEWAY, Contender::Nginx], "proxy"),
        true => (
            [Contender::GATEWAY_PER_CORE, Contender::GATEWAY_SHARED],
            "runtimes",
        ),
    };
    let loads = [
        Load::Requests {
            seconds: options.seconds,
        },
        Load::Streams {
            requests: options.requests,
        },
    ];
    let mut report = Report::default();
    for load in loads {
        let samples = compare(&programs, pair, load, options.rounds)?;
        report.add(Measured {
            unit: load.unit(),
            names: pair.map(Contender::name),
            samples,
        });
        println!();
    }
    let file = root.join("target/bench").join(format!("{name}.json"));
    report.write(&file)?;
    println!("{report}\nwritten to {}", file.display());
    Ok(())
}

/// The samples of both, round by round.
fn compare(programs: &Programs, pair: [Contender; 2], load: Load, rounds: u32) -> Result<Vec<[Sample; 2]>> {
    let sim_addr = free_addr()?;
    let mut sim = Server::start("vllm-sim", programs.sim(load, sim_addr), sim_addr)?;
    let mut proxies = Vec::new();
    for contender in pair {
        let addr = free_addr()?;
        proxies.push(Server::start(
            contender.name(),
            contender.command(programs, addr, sim_addr)?,
            addr,
        )?);
    }
    for proxy in &proxies {
        programs.warm_up(load, proxy.addr())?;
    }
    let mut samples = Vec::new();
    for round in 0..rounds {
        let mut taken = [None, None];
        // Whoever comes second finds a warmer or a more tired machine: they take turns.
        for position in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let sample = measure(programs, &mut proxies[position], load)?;
            println!(
                "round {} {:<18} {}",
                round + 1,
                pair[position].name(),
                sample.line(load.unit())
            );
            taken[position] = Some(sample);
        }
        samples.push(taken.map(Option::unwrap_or_default));
    }
    sim.check_alive()?;
    Ok(samples)
}

fn measure(programs: &Programs, proxy: &mut Server, load: Load) -> Result<Sample> {
    let before = proxy.cpu_time()?;
    let done = programs.run(load, proxy.addr())?;
    let cpu_time = proxy.cpu_time()? - before;
    proxy.check_alive()?;
    Ok(Sample {
        cpu_us_per_unit: cpu_time.as_secs_f64() * 1e6 / done.units as f64,
        units_per_s: done.units as f64 / done.seconds,
        rss_max_bytes: proxy.rss_max_bytes()?,
    })
}
