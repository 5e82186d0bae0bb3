//! Events a second and core, through spool and insert.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Figures;
use super::site::Site;
use crate::bench::process::{Server, cpu_time, free_addr};

/// The engine still merges parts when all rows are in. It counts as done with a second of less than this much CPU time.
const IDLE_CPU: Duration = Duration::from_millis(50);

/// How often that is looked at, and for how long.
const MERGE_TICK: Duration = Duration::from_secs(1);
const MERGES_WITHIN: Duration = Duration::from_secs(60);

/// One round. CPU times are for one event.
struct Sample {
    taken_in_per_s: f64,
    stored_per_s: f64,
    feeding_cpu_us: f64,
    gateway_cpu_us: f64,
    engine_cpu_us: f64,
    merging_cpu_us: f64,
}

/// Measures, and prints what was found.
///
/// # Errors
/// When something cannot be started, or events got lost.
pub fn measure(site: &Site<'_>, events: u64, rounds: u32) -> Result<Value> {
    let addr = free_addr()?;
    let engine = site.engine("throughput", addr)?;
    let mut samples = Vec::new();
    for round in 1..=rounds {
        let command = site.feeder(&format!("feed-{round}"), addr, events)?;
        let mut feeder = Feeder::start(command)?;
        let sample = feeder.round(&engine, events as f64)?;
        feeder.end()?;
        println!(
            "throughput, round {round} of {rounds}: {:.0} events/s stored",
            sample.stored_per_s
        );
        samples.push(sample);
    }
    let mut figures = Figures::default();
    Figures::head(&format!("throughput, {events} events a round"));
    let mut add = |name: &str, value: fn(&Sample) -> f64, decimals| {
        figures.add(name, samples.iter().map(value), decimals);
    };
    add(
        "events/s a core, spool and insert",
        |s| 1e6 / (s.gateway_cpu_us + s.engine_cpu_us),
        0,
    );
    add(
        "events/s a core, the gateway's side",
        |s| 1e6 / s.gateway_cpu_us,
        0,
    );
    add("CPU us/event, gateway", |s| s.gateway_cpu_us, 2);
    add("  of it to take it in (JSON, spool)", |s| s.feeding_cpu_us, 2);
    add("CPU us/event, engine until stored", |s| s.engine_cpu_us, 2);
    add("CPU us/event, engine merging behind it", |s| s.merging_cpu_us, 2);
    add("events/s taken in", |s| s.taken_in_per_s, 0);
    add("events/s stored", |s| s.stored_per_s, 0);
    Ok(figures.json())
}

/// The program that feeds a store, and what it says.
struct Feeder {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Feeder {
    fn start(mut command: std::process::Command) -> Result<Feeder> {
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let said = child.stdout.take().context("its output is a pipe")?;
        Ok(Feeder {
            child,
            said: BufReader::new(said),
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the feeder has ended; its own message is above");
        Ok(line)
    }

    fn number(&mut self, names: [&str; 2]) -> Result<[f64; 2]> {
        let line = self.line()?;
        let object: Value = serde_json::from_str(&line)?;
        let number = |name: &str| object[name].as_f64();
        let found = [number(names[0]), number(names[1])];
        let [Some(first), second] = found else {
            anyhow::bail!("expected {names:?} from the feeder, found `{}`", line.trim());
        };
        Ok([first, second.unwrap_or_default()])
    }

    fn round(&mut self, engine: &Server, events: f64) -> Result<Sample> {
        self.line()?;
        let before = (cpu_time(&self.child)?, engine.cpu_time()?);
        let input = self.child.stdin.as_mut().context("its input is a pipe")?;
        input.write_all(b"begin\n")?;
        let [fed_s, feeding_cpu_s] = self.number(["fed_s", "feeding_cpu_s"])?;
        let [stored_s, _] = self.number(["stored_s", ""])?;
        let after = (cpu_time(&self.child)?, engine.cpu_time()?);
        let settled = settled_cpu_time(engine)?;
        let us_each = |time: Duration| time.as_secs_f64() * 1e6 / events;
        Ok(Sample {
            taken_in_per_s: events / fed_s,
            stored_per_s: events / stored_s,
            feeding_cpu_us: feeding_cpu_s * 1e6 / events,
            gateway_cpu_us: us_each(after.0 - before.0),
            engine_cpu_us: us_each(after.1 - before.1),
            merging_cpu_us: us_each(settled - after.1),
        })
    }

    fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        ensure!(
            status.success(),
            "the feeder ended with {status}; its own message is above"
        );
        Ok(())
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        // It has ended by itself, unless something went wrong.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The engine's CPU time when it has nothing more to do.
fn settled_cpu_time(engine: &Server) -> Result<Duration> {
    let started = Instant::now();
    let mut last = engine.cpu_time()?;
    loop {
        thread::sleep(MERGE_TICK);
        let now = engine.cpu_time()?;
        if now - last < IDLE_CPU || started.elapsed() > MERGES_WITHIN {
            return Ok(now);
        }
        last = now;
    }
}
