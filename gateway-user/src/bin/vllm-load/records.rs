//! One JSON line a request, so that a test can join what the client saw with what the gateway recorded.
//!
//! A thread of its own writes the file. The queue to it is bounded, and a client waits when it is full: between
//! two requests, so no latency is touched, and no record is lost.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::client::Observation;
use crate::failure::Outcome;
use crate::mix::Endpoint;
use crate::plan::Planned;
use crate::target::{project_name, request_id, team_name, user_name};

/// Records that may wait for the disk: about a megabyte.
const QUEUE_MAX_RECORDS: usize = 4096;

/// Where clients send their records.
pub type RecordSender = mpsc::Sender<Vec<u8>>;

/// The file and its thread.
#[derive(Debug)]
pub struct RecordWriter {
    thread: JoinHandle<Result<()>>,
}

impl RecordWriter {
    /// Creates the file and starts the thread, which ends when the last sender is gone.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn start(path: &Path) -> Result<(Self, RecordSender)> {
        let file = File::create(path)
            .with_context(|| format!("cannot create the records file {}", path.display()))?;
        let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(QUEUE_MAX_RECORDS);
        let thread = std::thread::spawn(move || {
            let mut file = BufWriter::new(file);
            while let Some(line) = receiver.blocking_recv() {
                file.write_all(&line)?;
            }
            Ok(file.flush()?)
        });
        Ok((Self { thread }, sender))
    }

    /// Waits until everything is written. All senders must be gone.
    ///
    /// # Errors
    /// When the file could not be written to.
    pub fn finish(self) -> Result<()> {
        let written = self
            .thread
            .join()
            .map_err(|_| anyhow!("the thread that writes the records panicked"))?;
        written.context("the records file is not whole")
    }
}

/// What one line says.
#[derive(Serialize)]
struct Record<'a> {
    index: u64,
    request_id: String,
    team: String,
    project: Option<String>,
    user: Option<String>,
    endpoint: Endpoint,
    stream: bool,
    status: Option<u16>,
    outcome: Outcome,
    error: Option<&'a str>,
    sent: bool,
    retried: bool,
    chunks: u64,
    events: u64,
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    max_tokens: u32,
    lag_us: u64,
    first_byte_us: Option<u64>,
    ttft_us: Option<u64>,
    e2e_us: u64,
    bytes_received: u64,
}

/// The line of one request, with its line end.
pub fn line(seed: u64, planned: &Planned, seen: &Observation) -> Vec<u8> {
    let record = Record {
        index: planned.index,
        request_id: request_id(seed, planned.index),
        team: team_name(planned.team),
        project: planned.project.map(project_name),
        user: planned.user.map(user_name),
        endpoint: planned.endpoint,
        stream: planned.stream,
        status: seen.status,
        outcome: seen.outcome,
        error: seen.failure.map(|failure| failure.name()),
        sent: seen.sent,
        retried: seen.retried,
        chunks: seen.content.chunks,
        events: seen.content.events,
        prompt_tokens: seen.content.tokens.prompt,
        completion_tokens: seen.content.tokens.completion,
        max_tokens: planned.output_tokens,
        lag_us: seen.lag_us,
        first_byte_us: seen.first_byte_us,
        ttft_us: seen.ttft_us,
        e2e_us: seen.e2e_us,
        bytes_received: seen.bytes_received,
    };
    // Numbers, names and options: nothing in a record can fail to serialise. Were it so, the line would be empty.
    let mut line = serde_json::to_vec(&record).unwrap_or_default();
    line.push(b'\n');
    line
}
