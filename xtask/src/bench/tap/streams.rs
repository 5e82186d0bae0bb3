//! What the tap adds to a server at the pace of a busy engine.

use anyhow::{Result, ensure};

use super::figures::{Figures, Target};
use super::site::Site;
use super::turns;
use crate::bench::load::Load;

/// CPU time of the server, with the tap to without.
const SERVER: Target = Target::AtMost(1.03);

/// Two rounds of 200 streams at a time: ten seconds.
const LOAD: Load = Load::Streams { requests: 400 };

/// Measures.
///
/// # Errors
/// When something cannot be started, a stream failed, or the tap saw none of them.
pub fn measure(site: &Site<'_>, rounds: u32, figures: &mut Figures) -> Result<()> {
    let mut sim = site.sim(LOAD)?;
    let addr = sim.server.addr();
    site.programs.warm_up(LOAD, addr)?;
    let mut pairs = Vec::new();
    let mut controls = Vec::new();
    let mut taps = Vec::new();
    for round in 0..rounds {
        // The second without is compared with the first.
        let mut cpu_us = [f64::NAN; 3];
        for position in turns(round).into_iter().chain([2]) {
            let mut tapped = (position == 0)
                .then(|| site.tapped_in(&sim.cgroup, addr))
                .transpose()?;
            let cpu_before = sim.server.cpu_time()?;
            let done = site.programs.run(LOAD, addr)?;
            let cpu_time = sim.server.cpu_time()? - cpu_before;
            cpu_us[position] = cpu_time.as_secs_f64() * 1e6 / done.units as f64;
            if let Some(tapped) = &mut tapped {
                let counted = tapped.counted()?;
                ensure!(
                    counted.exchanges > 0.0,
                    "expected the tap to see streams, found none"
                );
                taps.push(counted);
            }
        }
        sim.server.check_alive()?;
        println!(
            "streams, round {} of {rounds}: {:.2} us CPU a chunk with the tap, {:.2} us and {:.2} us without",
            round + 1,
            cpu_us[0],
            cpu_us[1],
            cpu_us[2]
        );
        pairs.push([cpu_us[0], cpu_us[1]]);
        controls.push(cpu_us[2] / cpu_us[1]);
    }
    figures.add(
        "CPU us/chunk of vllm-sim without a tap",
        pairs.iter().map(|[_, without]| *without),
        2,
        None,
    );
    figures.add(
        "  ratio with the tap on its port",
        pairs.iter().map(|[with, without]| with / without),
        3,
        Some(SERVER),
    );
    figures.add(
        "  ratio without to without (noise)",
        controls.into_iter(),
        3,
        None,
    );
    figures.add(
        "CPU us/record, whole gateway, vllm-sim",
        taps.iter().map(|tap| tap.cpu_us_a_record()),
        2,
        None,
    );
    figures.add("  records lost", taps.iter().map(|tap| tap.lost), 0, None);
    Ok(())
}
