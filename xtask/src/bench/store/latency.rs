//! What requests notice of a ClickHouse that is away.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::Figures;
use super::site::{Seen, Served, Site};
use crate::bench::load::output_of;
use crate::bench::process::free_addr;

/// Far from the limit of a small machine, so that what shows is not a queue.
const RATE_PER_S: u32 = 500;

/// Fills pools and caches.
const WARM_UP_S: u32 = 3;

/// How long the gateway may take to catch up when the engine is back. Its longest pause between two tries is 10 s.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(60);

/// How often that is looked at.
const TICK: Duration = Duration::from_millis(200);

/// Seen with the engine there, and away; and the gateway's CPU time for a request.
struct Half {
    seen: Seen,
    cpu_us: f64,
}

/// Measures, and prints what was found.
///
/// # Errors
/// When something cannot be started, a request failed, or rows were not stored in the end.
pub fn measure(site: &Site<'_>, pairs: u32, seconds: u32) -> Result<Value> {
    let clickhouse = free_addr()?;
    let served = site.serve("latency", clickhouse)?;
    output_of(&mut site.clients(served.gateway.addr(), RATE_PER_S, WARM_UP_S))?;
    let mut taken = Vec::new();
    for pair in 0..pairs {
        // Whoever comes second finds a warmer or a more tired machine: they take turns.
        let (there, away) = if pair % 2 == 0 {
            let there = with_engine(site, &served, clickhouse, seconds)?;
            (there, half(site, &served, seconds)?)
        } else {
            let away = half(site, &served, seconds)?;
            (with_engine(site, &served, clickhouse, seconds)?, away)
        };
        println!(
            "latency, pair {} of {pairs}: p50 {:.0} us with ClickHouse there, {:.0} us with it away",
            pair + 1,
            there.seen.e2e_p50_us,
            away.seen.e2e_p50_us
        );
        taken.push([there, away]);
    }
    let mut figures = Figures::default();
    Figures::head(&format!("latency, {RATE_PER_S} requests/s, {seconds} s each"));
    let of = |who: usize, value: fn(&Half) -> f64| taken.iter().map(move |pair| value(&pair[who]));
    let ratio = |value: fn(&Half) -> f64| taken.iter().map(move |pair| value(&pair[0]) / value(&pair[1]));
    figures.add(
        "E2E p50 ratio, there to away",
        ratio(|half| half.seen.e2e_p50_us),
        3,
    );
    figures.add(
        "E2E p99 ratio, there to away",
        ratio(|half| half.seen.e2e_p99_us),
        3,
    );
    for (who, name) in ["there", "away"].into_iter().enumerate() {
        figures.add(
            &format!("E2E p50 us, {name}"),
            of(who, |half| half.seen.e2e_p50_us),
            0,
        );
        figures.add(
            &format!("E2E p99 us, {name}"),
            of(who, |half| half.seen.e2e_p99_us),
            0,
        );
        figures.add(
            &format!("CPU us/request of the gateway, {name}"),
            of(who, |half| half.cpu_us),
            1,
        );
    }
    Ok(figures.json())
}

/// Starts the engine, lets the gateway catch up, measures, and kills the engine.
fn with_engine(site: &Site<'_>, served: &Served, clickhouse: SocketAddr, seconds: u32) -> Result<Half> {
    let mut engine = site.engine("latency", clickhouse)?;
    let deadline = Instant::now() + CAUGHT_UP_WITHIN;
    // One file of each table may be on its way.
    while served.counted("gateway_spool_files")? > 2.0 || served.counted("gateway_store_rows_total")? == 0.0 {
        ensure!(
            Instant::now() < deadline,
            "expected the gateway to catch up within {} s, found {} files in its spool",
            CAUGHT_UP_WITHIN.as_secs(),
            served.counted("gateway_spool_files")?
        );
        thread::sleep(TICK);
    }
    let measured = half(site, served, seconds)?;
    engine.check_alive()?;
    Ok(measured)
}

fn half(site: &Site<'_>, served: &Served, seconds: u32) -> Result<Half> {
    let before = served.gateway.cpu_time()?;
    let seen = Seen::of(&output_of(&mut site.clients(
        served.gateway.addr(),
        RATE_PER_S,
        seconds,
    ))?)?;
    let cpu_time = served.gateway.cpu_time()? - before;
    Ok(Half {
        seen,
        cpu_us: cpu_time.as_secs_f64() * 1e6 / seen.requests as f64,
    })
}
