//! Whether records are lost at a rate that no engine reaches, with the default ring.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::figures::{Figures, Target};
use super::sender::{Sender, Shape};
use super::site::Site;

/// The rate, and how much of it must be reached for the rest to mean something.
const RECORDS_PER_S: u32 = 50_000;
const REACHED: Target = Target::AtLeast(49_000.0);

/// How long the last ends may take.
const AT_REST_WITHIN: Duration = Duration::from_secs(10);

/// Measures.
///
/// # Errors
/// When something cannot be started, a stream broke off, or the tap saw none of them.
pub fn measure(site: &Site<'_>, rounds: u32, seconds: u32, figures: &mut Figures) -> Result<()> {
    let shape = Shape {
        records_per_s: RECORDS_PER_S,
        streams: 50,
        chunks: 50,
        reconnects: false,
    };
    let mut sender = Sender::new()?;
    let mut tapped = site.tapped(sender.addr())?;
    let mut taken = Vec::new();
    for round in 1..=rounds {
        let before = tapped.counted()?;
        let sent = sender.run(shape, Duration::from_secs(seconds.into()))?;
        let counted = tapped.counted_at_rest(AT_REST_WITHIN)?.since(before);
        println!(
            "rate, round {round} of {rounds}: {:.0} records/s, {} lost",
            sent.records as f64 / sent.seconds,
            counted.lost
        );
        ensure!(
            counted.exchanges > 0.0,
            "expected {} streams, found none",
            sent.streams
        );
        taken.push((sent, counted));
    }
    let all = || taken.iter();
    figures.add(
        "records/s sent as streams",
        all().map(|(sent, _)| sent.records as f64 / sent.seconds),
        0,
        Some(REACHED),
    );
    figures.add_one(
        "  records lost, all rounds",
        all().map(|(_, counted)| counted.lost).sum(),
        0,
        Some(Target::AtMost(0.0)),
    );
    figures.add(
        "  streams read whole, of those sent",
        all().map(|(sent, counted)| (counted.exchanges - counted.incomplete) / sent.streams as f64),
        3,
        Some(Target::AtLeast(1.0)),
    );
    figures.add(
        "CPU us/record, whole gateway, streams",
        all().map(|(_, counted)| counted.cpu_us_a_record()),
        2,
        None,
    );
    Ok(())
}
