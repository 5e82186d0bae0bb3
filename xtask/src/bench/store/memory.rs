//! Whether memory stays flat while a gateway stores what it serves.

use std::io::Read;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Figures;
use super::site::{Seen, Site};
use crate::bench::process::{Killed, free_addr};
use crate::bench::report::slope;

/// Between two looks at the memory.
const TICK: Duration = Duration::from_secs(1);

/// How long the last rows may take to be stored.
const STORED_WITHIN: Duration = Duration::from_secs(60);

/// Measures, and prints what was found.
///
/// # Errors
/// When something cannot be started, a request failed, or rows were not stored.
pub fn measure(site: &Site<'_>, minutes: u32, rate_per_s: u32) -> Result<Value> {
    let clickhouse = free_addr()?;
    let engine = site.engine("memory", clickhouse)?;
    let served = site.serve("memory", clickhouse)?;
    println!("memory: {rate_per_s} requests/s for {minutes} minutes");
    let before = (served.gateway.cpu_time()?, engine.cpu_time()?);
    let mut command = site.clients(served.gateway.addr(), rate_per_s, minutes * 60);
    let load = command.stdout(Stdio::piped()).spawn();
    let mut load = Killed(load.with_context(|| format!("cannot start {command:?}"))?);
    let mut samples = Vec::new();
    let started = Instant::now();
    while load.0.try_wait()?.is_none() {
        samples.push((
            started.elapsed().as_secs_f64(),
            served.gateway.rss_bytes()? as f64,
        ));
        thread::sleep(TICK);
    }
    let mut summary = String::new();
    let output = load.0.stdout.as_mut().context("its output is a pipe")?;
    output.read_to_string(&mut summary)?;
    let seen = Seen::of(&summary)?;
    let after = (served.gateway.cpu_time()?, engine.cpu_time()?);
    let deadline = Instant::now() + STORED_WITHIN;
    while served.counted_events("gateway_store_rows_total")? < seen.requests as f64 {
        ensure!(
            Instant::now() < deadline,
            "expected {} rows to be stored, found {}",
            seen.requests,
            served.counted_events("gateway_store_rows_total")?
        );
        thread::sleep(TICK);
    }
    let steady = samples.split_off(samples.len() / 5);
    let us_each = |time: Duration| time.as_secs_f64() * 1e6 / seen.requests as f64;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let mut figures = Figures::default();
    Figures::head(&format!(
        "memory, {minutes} minutes at {rate_per_s} requests/s asked for"
    ));
    let mut one = |name: &str, value: f64, decimals| figures.add(name, std::iter::once(value), decimals);
    one("requests/s borne", seen.rate_per_s, 0);
    one("requests, each of them stored", seen.requests as f64, 0);
    one("RSS slope, KiB/minute", slope(&steady) * 60.0 / 1024.0, 2);
    one("CPU us/request, gateway", us_each(after.0 - before.0), 1);
    one("CPU us/request, engine", us_each(after.1 - before.1), 1);
    one("E2E p50, us", seen.e2e_p50_us, 0);
    one("E2E p99, us", seen.e2e_p99_us, 0);
    figures.add("RSS, MiB", steady.iter().map(|(_, bytes)| mib(*bytes)), 2);
    Ok(figures.json())
}
