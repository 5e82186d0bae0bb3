//! What reading the ring costs, without the reading of HTTP.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::figures::{Figures, Target};
use super::site::Site;
use crate::bench::process::Killed;

/// Microseconds of CPU time for one record.
const A_RECORD: Target = Target::AtMost(0.6);

/// What was read in one round.
struct Drained {
    records: f64,
    cpu_s: f64,
    lost: f64,
}

/// Measures.
///
/// # Errors
/// When something cannot be started, a request failed, or nothing was seen.
pub fn measure(site: &Site<'_>, rounds: u32, seconds: u32, figures: &mut Figures) -> Result<()> {
    let mut nginx = site.nginx()?;
    let mut drained = Vec::new();
    for round in 1..=rounds {
        let found = drain(site, nginx.server.addr(), seconds)?;
        println!("drain, round {round} of {rounds}: {:.0} records", found.records);
        drained.push(found);
    }
    nginx.server.check_alive()?;
    let all = || drained.iter();
    figures.add(
        "CPU us/record, reading the ring alone",
        all().map(|found| found.cpu_s * 1e6 / found.records),
        3,
        Some(A_RECORD),
    );
    figures.add(
        "  records/s",
        all().map(|found| found.records / f64::from(seconds)),
        0,
        None,
    );
    figures.add("  records lost", all().map(|found| found.lost), 0, None);
    Ok(())
}

fn drain(site: &Site<'_>, server: SocketAddr, seconds: u32) -> Result<Drained> {
    let mut command = site.drainer(server)?;
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let mut drainer = Killed(child);
    let mut said = BufReader::new(drainer.0.stdout.take().context("its output is a pipe")?);
    let mut text = String::new();
    said.read_line(&mut text)?;
    ensure!(
        text.trim() == "attached",
        "expected `attached`, found `{}`; its own message is above",
        text.trim()
    );
    site.programs.pages(seconds, server)?;
    drop(drainer.0.stdin.take());
    text.clear();
    said.read_to_string(&mut text)?;
    let found: Value = serde_json::from_str(&text).context("expected what was read as JSON")?;
    let number = |name: &str| {
        found[name]
            .as_f64()
            .with_context(|| format!("expected {name}, found `{}`", text.trim()))
    };
    let drained = Drained {
        records: number("records")?,
        cpu_s: number("cpu_s")?,
        lost: number("lost")?,
    };
    ensure!(
        drained.records > 0.0,
        "expected records of nginx's port, found none"
    );
    Ok(drained)
}
