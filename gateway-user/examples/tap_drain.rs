//! Reads the kernel probe's ring and makes nothing of it: what `cargo xtask bench tap` compares with the gateway, which reads HTTP as well.
//!
//! Probe, attachment, ring and checks of each record are the gateway's own, and it looks as often. Its parent reads a line on standard output,
//! `attached`, and ends it by closing its standard input; then it prints what it read as one JSON object.

use anyhow::ensure;
use clap::Parser;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;
use vllm_gateway::config::Config;
use vllm_gateway::tap::Tap;

/// Records between two looks at the clock and the end, as for the gateway's own thread.
const BATCH_MAX: usize = 256;

#[derive(Parser)]
struct Options {
    /// A gateway's config, with `tap.reattach: false`.
    #[arg(long)]
    config: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let config = Config::load(Some(&Options::parse().config), &|_| None)?;
    ensure!(
        !config.tap.reattach,
        "expected tap.reattach: false, found true: there is no helper here"
    );
    // Never started, as there is nothing to reattach.
    let mut tap = Tap::open(&config, Command::new("true"))?;
    let end = thread::spawn(|| io::stdin().read_to_end(&mut Vec::new()));
    println!("attached");
    let (mut records, mut bytes) = (0_u64, 0_u64);
    let before = thread_cpu();
    loop {
        let is_last = end.is_finished();
        let mut take =
            |segment: vllm_gateway::tap::segment::Segment<'_>| bytes += u64::from(segment.len_bytes);
        loop {
            let taken = tap.ring.drain(BATCH_MAX, &mut take);
            records += taken as u64;
            if taken < BATCH_MAX {
                break;
            }
        }
        if is_last {
            break;
        }
        thread::sleep(config.tap.poll_interval);
    }
    let cpu_s = (thread_cpu() - before).as_secs_f64();
    let lost = tap.counters.ingress().lost() + tap.counters.egress().lost() + tap.ring.unreadable();
    println!(
        "{}",
        json!({"records": records, "bytes": bytes, "cpu_s": cpu_s, "lost": lost})
    );
    Ok(())
}

/// CPU time of this thread, user and system.
fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
