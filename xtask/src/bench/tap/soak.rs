//! Whether memory stays flat while connections come and go.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::figures::{Figures, Target};
use super::sender::{Sender, Shape};
use super::site::Site;
use crate::bench::report::slope;

/// What counts as flat, in KiB a minute: a leak of one byte for each connection would be eleven.
const FLAT: Target = Target::AtMost(50.0);

/// Between two looks at the memory.
const TICK: Duration = Duration::from_secs(1);

/// Some of the first streams, so that the rest finds pools and caches full.
const WARM_UP: Duration = Duration::from_secs(2);

/// How long the last ends may take.
const AT_REST_WITHIN: Duration = Duration::from_secs(10);

const SHAPE: Shape = Shape {
    records_per_s: 5_000,
    streams: 50,
    chunks: 20,
    reconnects: true,
};

/// Measures.
///
/// # Errors
/// When something cannot be started, or a stream broke off.
pub fn measure(site: &Site<'_>, duration: Duration, figures: &mut Figures) -> Result<()> {
    let mut sender = Sender::new()?;
    let mut tapped = site.tapped(sender.addr())?;
    sender.run(SHAPE, WARM_UP)?;
    let before = tapped.counted()?;
    println!("soak: {} s", duration.as_secs());
    let load = thread::spawn(move || sender.run(SHAPE, duration));
    let (started, mut samples) = (Instant::now(), Vec::new());
    while !load.is_finished() {
        samples.push((
            started.elapsed().as_secs_f64(),
            tapped.gateway.rss_bytes()? as f64,
        ));
        thread::sleep(TICK);
    }
    let sent = load
        .join()
        .ok()
        .context("the sender has panicked; its own message is above")??;
    let counted = tapped.counted_at_rest(AT_REST_WITHIN)?.since(before);
    // Pools and caches fill in the first fifth.
    let steady = samples.split_off(samples.len() / 5);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    figures.add_one("records/s sent", sent.records as f64 / sent.seconds, 0, None);
    figures.add_one("connections, one for each stream", sent.streams as f64, 0, None);
    figures.add_one(
        "RSS slope, KiB/minute",
        slope(&steady) * 60.0 / 1024.0,
        2,
        Some(FLAT),
    );
    figures.add("RSS, MiB", steady.iter().map(|(_, bytes)| mib(*bytes)), 2, None);
    figures.add_one(
        "connections followed at the end",
        counted.connections,
        0,
        Some(Target::AtMost(0.0)),
    );
    figures.add_one("records lost", counted.lost, 0, Some(Target::AtMost(0.0)));
    figures.add_one(
        "streams read whole, of those sent",
        (counted.exchanges - counted.incomplete) / sent.streams as f64,
        3,
        Some(Target::AtLeast(1.0)),
    );
    figures.add_one("CPU us/record, whole gateway", counted.cpu_us_a_record(), 2, None);
    Ok(())
}
