//! A server that answers as fast as it can, with the tap and without.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use super::figures::{Figures, Target};
use super::site::{Counted, Nginx, Site, Tapped};
use super::turns;

/// Throughput that must be left to a server whose port is watched, and to any other.
const WATCHED: Target = Target::AtLeast(0.90);
const OTHERS: Target = Target::AtLeast(0.98);

/// Fills caches and opens whatever is opened once.
const WARM_UP_S: u32 = 1;

/// One measurement of nginx.
#[derive(Clone, Copy)]
struct Sample {
    per_s: f64,
    cpu_us: f64,
    /// What the tap counted, where there was one.
    tap: Option<Counted>,
}

/// Measures.
///
/// # Errors
/// When something cannot be started, a request failed, or the tap did not see them.
pub fn measure(site: &Site<'_>, rounds: u32, seconds: u32, figures: &mut Figures) -> Result<()> {
    let mut nginx = site.nginx()?;
    site.programs.pages(WARM_UP_S, nginx.server.addr())?;
    let (own, other) = (nginx.server.addr(), nginx.other);
    let (mut watched, mut others, mut controls) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        for (port, name, pairs) in [
            (Some(own), "with the tap on its port", &mut watched),
            (Some(other), "with the tap on another port", &mut others),
            (None, "without", &mut controls),
        ] {
            let pair = pair(site, &mut nginx, port, turns(round), seconds)?;
            println!(
                "requests, round {} of {rounds}: {:.0}/s {name}, {:.0}/s without",
                round + 1,
                pair[0].per_s,
                pair[1].per_s
            );
            pairs.push(pair);
        }
    }
    let ratio = |pairs: &[[Sample; 2]], of: fn(&Sample) -> f64| {
        pairs
            .iter()
            .map(|[with, without]| of(with) / of(without))
            .collect::<Vec<_>>()
            .into_iter()
    };
    let per_s = |sample: &Sample| sample.per_s;
    let cpu_us = |sample: &Sample| sample.cpu_us;
    let without = || {
        let pairs = watched.iter().chain(&others).chain(&controls);
        pairs.map(|[_, without]| without)
    };
    figures.add("requests/s of nginx without a tap", without().map(per_s), 0, None);
    figures.add(
        "  ratio with the tap on its port",
        ratio(&watched, per_s),
        3,
        Some(WATCHED),
    );
    figures.add(
        "  ratio with the tap on another port",
        ratio(&others, per_s),
        3,
        Some(OTHERS),
    );
    figures.add(
        "  ratio without to without (noise)",
        ratio(&controls, per_s),
        3,
        None,
    );
    figures.add(
        "CPU us/request of nginx without a tap",
        without().map(cpu_us),
        2,
        None,
    );
    figures.add(
        "  ratio with the tap on its port",
        ratio(&watched, cpu_us),
        3,
        None,
    );
    figures.add(
        "  ratio with the tap on another port",
        ratio(&others, cpu_us),
        3,
        None,
    );
    figures.add(
        "  ratio without to without (noise)",
        ratio(&controls, cpu_us),
        3,
        None,
    );
    let taps = || watched.iter().filter_map(|[with, _]| with.tap);
    figures.add(
        "CPU us/record, whole gateway, small requests",
        taps().map(|tap| tap.cpu_us_a_record()),
        2,
        None,
    );
    figures.add(
        "  records/s",
        taps().map(|tap| tap.records / f64::from(seconds)),
        0,
        None,
    );
    figures.add(
        "  of one core",
        taps().map(|tap| tap.cpu_time.as_secs_f64() / f64::from(seconds)),
        3,
        None,
    );
    figures.add("  records lost", taps().map(|tap| tap.lost), 0, None);
    Ok(())
}

/// nginx with the tap on `port` of its own, and without; twice without when there is no port.
fn pair(
    site: &Site<'_>,
    nginx: &mut Nginx,
    port: Option<SocketAddr>,
    turns: [usize; 2],
    seconds: u32,
) -> Result<[Sample; 2]> {
    let mut taken = [None; 2];
    for position in turns {
        let mut tapped = port
            .filter(|_| position == 0)
            .map(|port| site.tapped_in(&nginx.cgroup, port))
            .transpose()?;
        taken[position] = Some(sample(site, nginx, tapped.as_mut(), seconds)?);
        if let Some(tap) = taken[position].and_then(|sample| sample.tap) {
            // The gateway itself asks after the server's health once in a while.
            let sees = tap.records + tap.lost > f64::from(seconds) * 100.0;
            ensure!(
                sees == (port == Some(nginx.server.addr())),
                "expected the tap to see the port that it watches and no other, found {} records",
                tap.records
            );
        }
    }
    let [Some(with), Some(without)] = taken else {
        anyhow::bail!("expected both to be measured in {turns:?}");
    };
    Ok([with, without])
}

fn sample(
    site: &Site<'_>,
    Nginx { server: nginx, .. }: &mut Nginx,
    mut tapped: Option<&mut Tapped>,
    seconds: u32,
) -> Result<Sample> {
    site.programs.pages(WARM_UP_S, nginx.addr())?;
    let before = tapped.as_mut().map(|tapped| tapped.counted()).transpose()?;
    let cpu_before = nginx.cpu_time()?;
    let done = site.programs.pages(seconds, nginx.addr())?;
    let cpu_time = nginx.cpu_time()? - cpu_before;
    nginx.check_alive()?;
    let tap = match (tapped, before) {
        (Some(tapped), Some(before)) => Some(tapped.counted()?.since(before)),
        _ => None,
    };
    Ok(Sample {
        per_s: done.units as f64 / done.seconds,
        cpu_us: cpu_time.as_secs_f64() * 1e6 / done.units as f64,
        tap,
    })
}
