//! `vllm-load`: a load generator for servers that speak the OpenAI API, vLLM and this gateway among them.
//!
//! It plays the clients of several teams: streams and plain requests, requests that are given up half way, and
//! requests that fail. What request *i* is depends on the seed alone ([`plan`]), and every request has an id
//! (`load-<seed>-<i>`), so that a test can compare what the clients saw with what the gateway recorded.
//!
//! Latencies count from the moment at which a request was due ([`run`]). It leaves out TLS and HTTP/2.

mod client;
mod content;
mod draws;
mod failure;
mod histogram;
mod http;
mod mix;
mod options;
mod plan;
mod progress;
mod records;
mod run;
mod stats;
mod summary;
mod target;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

use crate::options::Options;
use crate::progress::{Live, Progress};
use crate::records::RecordWriter;
use crate::run::Run;
use crate::summary::{RunFacts, Summary};
use crate::target::Target;

fn main() -> ExitCode {
    let options = Options::parse();
    match load(&options) {
        Ok(summary) if summary.sent > 0 => ExitCode::SUCCESS,
        Ok(_) => {
            eprintln!(
                "vllm-load: not one request could be sent to {}",
                options.url.authority
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("vllm-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does the whole run and reports it.
fn load(options: &Options) -> Result<Summary> {
    let plan = options.plan()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let target = runtime.block_on(reachable(options))?;
    let facts = |duration, interrupted| RunFacts {
        seed: plan.seed,
        teams: plan.teams.len(),
        duration,
        interrupted,
    };
    let run = Arc::new(Run {
        plan: plan.clone(),
        target: Arc::new(target),
        pace: options.pace(),
        goal: options.goal(),
        timeout: options.timeout,
        live: Live::default(),
        next: 0.into(),
    });
    let records = options.records.as_deref().map(RecordWriter::start).transpose()?;
    let (writer, sender) = records.unzip();

    let (stop, stopped) = watch::channel(false);
    let (done, ended) = oneshot::channel();
    let (work, threads) = (run.clone(), options.threads);
    let started = Instant::now();
    let thread = thread::spawn(move || {
        let stats = run::execute(work, threads, stopped, sender);
        // The other side waits for this; it is gone only when the program ends anyway.
        let _ = done.send(());
        stats
    });
    let progress = Progress::new(options.goal(), !options.no_progress);
    runtime.block_on(watch_run(&run, ended, &stop, progress))?;
    let stats = thread.join().map_err(|_| anyhow!("the load thread panicked"))??;
    let summary = Summary::new(&stats, facts(started.elapsed(), *stop.borrow()));
    report(options, &summary)?;
    writer.map_or(Ok(()), RecordWriter::finish)?;
    Ok(summary)
}

/// Finds the server, and connects once: a run against nobody should end at once and say so.
async fn reachable(options: &Options) -> Result<Target> {
    let target = Target::resolve(options.target()).await?;
    let connect = tokio::time::timeout(options.timeout, TcpStream::connect(&target.addresses[..]));
    let authority = &options.url.authority;
    connect
        .await
        .with_context(|| {
            format!(
                "{authority} does not accept a connection within {:?}",
                options.timeout
            )
        })?
        .with_context(|| format!("cannot connect to {authority} (is the server up?)"))?;
    Ok(target)
}

/// Shows progress until the run has ended; stops it at Ctrl-C.
async fn watch_run(
    run: &Run,
    mut ended: oneshot::Receiver<()>,
    stop: &watch::Sender<bool>,
    progress: Progress,
) -> Result<()> {
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let mut ticks = tokio::time::interval(progress.interval());
    // The first tick comes at once, when there is nothing to show.
    ticks.tick().await;
    loop {
        tokio::select! {
            _ = &mut ended => return Ok(()),
            _ = ticks.tick() => progress.show(&run.live),
            // The summary shows what was done until now.
            _ = interrupts.recv() => { stop.send_replace(true); }
        }
    }
}

fn report(options: &Options, summary: &Summary) -> Result<()> {
    let json = serde_json::to_string_pretty(summary).context("cannot write the summary as JSON")?;
    match options.json.as_deref() {
        Some(path) if path == Path::new("-") => println!("{json}"),
        Some(path) => {
            std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
            print!("{summary}");
        }
        None => print!("{summary}"),
    }
    Ok(())
}
