//! What the tap adds to a server at the pace of a busy engine.

use anyhow::{Result, ensure};

use super::figures::{Figures, Target};
use super::site::Site;
use super::turns;
use crate::bench::load::Load;
use crate::bench::process::{Server, free_addr};

/// CPU time of the server, with the tap to without.
const SERVER: Target = Target::AtMost(1.03);

/// Two rounds of 200 streams at a time: ten seconds.
const LOAD: Load = Load::Streams { requests: 400 };

/// Measures.
///
/// # Errors
/// When something cannot be started, a stream failed, or the tap saw none of them.
pub fn measure(site: &Site<'_>, rounds: u32, figures: &mut Figures) -> Result<()> {
    let addr = free_addr()?;
    let mut sim = Server::start("vllm-sim", site.programs.sim(LOAD, addr), addr)?;
    site.programs.warm_up(LOAD, addr)?;
    let mut pairs = Vec::new();
    let mut taps = Vec::new();
    for round in 0..rounds {
        let mut cpu_us = [f64::NAN; 2];
        for position in turns(round) {
            let mut tapped = (position == 0).then(|| site.tapped(addr)).transpose()?;
            let cpu_before = sim.cpu_time()?;
            let done = site.programs.run(LOAD, addr)?;
            cpu_us[position] = (sim.cpu_time()? - cpu_before).as_secs_f64() * 1e6 / done.units as f64;
            if let Some(tapped) = &mut tapped {
                let counted = tapped.counted()?;
                ensure!(
                    counted.exchanges > 0.0,
                    "expected the tap to see streams, found none"
                );
                taps.push(counted);
            }
        }
        sim.check_alive()?;
        println!(
            "streams, round {} of {rounds}: {:.2} us CPU a chunk with the tap, {:.2} us without",
            round + 1,
            cpu_us[0],
            cpu_us[1]
        );
        pairs.push(cpu_us);
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
        "CPU us/record, whole gateway, vllm-sim",
        taps.iter().map(|tap| tap.cpu_us_a_record()),
        2,
        None,
    );
    figures.add("  records lost", taps.iter().map(|tap| tap.lost), 0, None);
    Ok(())
}
