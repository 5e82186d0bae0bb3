//! Rows that wait in memory on their way to ClickHouse: what vLLM says of itself, and the times of other gateways' requests.
//!
//! They describe a moment that passes, or add to a row that is safe elsewhere, so they do not go through the spool: they live through an outage of
//! hours, and not through a restart. Past a bound (30,000) the oldest go, counted.

use super::sender::told;
use crate::event::{TapTiming, TimingSink};
use crate::vllm::{SampleSink, SystemSample};
use bytes::Bytes;
use clickhouse::{Client, error::Error};
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

/// Most rows that wait: half a day of ten upstreams at 15 s, in some 15 MB.
const WAITING_MAX: usize = 30_000;

/// Most rows in one insert.
const INSERT_MAX: usize = 1_000;

/// Between two tries. Nobody waits for these rows, so nothing is gained by hurrying.
const RETRY: Duration = Duration::from_secs(5);

/// How long an insert may take: a server that has fallen silent would hold up all that comes after.
const INSERT_LIMIT: Duration = Duration::from_secs(60);

/// How long the last insert may take when the gateway ends.
const LAST_LIMIT: Duration = Duration::from_secs(2);

/// Rows of one table that wait to be stored.
#[derive(Debug)]
pub struct RowQueue {
    table: &'static str,
    waiting: Mutex<VecDeque<String>>,
    arrived: Notify,
    dropped: AtomicU64,
}

impl RowQueue {
    /// An empty queue of rows of `table`.
    pub fn of(table: &'static str) -> RowQueue {
        RowQueue {
            table,
            waiting: Mutex::default(),
            arrived: Notify::new(),
            dropped: AtomicU64::new(0),
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many were given up.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn push(&self, row: &impl Serialize) {
        // A row is numbers and names: there is nothing in it that JSON cannot say.
        let Ok(line) = serde_json::to_string(row) else {
            return;
        };
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == WAITING_MAX {
            waiting.pop_front();
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        waiting.push_back(line);
        drop(waiting);
        self.arrived.notify_one();
    }

    fn first(&self, count_max: usize) -> Vec<String> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.iter().take(count_max).cloned().collect()
    }

    /// Takes the first ones out, once they are stored. Some may have been given up meanwhile: then fewer are left to take.
    fn remove(&self, stored: &[String]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while waiting.front().is_some_and(|line| stored.contains(line)) {
            waiting.pop_front();
        }
    }
}

impl SampleSink for RowQueue {
    fn record(&self, sample: &SystemSample) {
        self.push(sample);
    }
}

impl TimingSink for RowQueue {
    fn record(&self, timing: &TapTiming) {
        self.push(timing);
    }
}

/// Stores the rows of a queue.
pub struct RowSender {
    queue: Arc<RowQueue>,
    client: Client,
}

impl RowSender {
    /// A sender to the database that `client` has set.
    pub fn new(queue: Arc<RowQueue>, client: Client) -> RowSender {
        RowSender { queue, client }
    }

    /// Stores rows until `stop` holds `true`.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = self.round() => {}
                () = told(&mut stop) => break,
            }
        }
        // What came last is worth one try.
        let _ = timeout(LAST_LIMIT, self.store_first()).await;
    }

    async fn round(&self) {
        if self.queue.is_empty() {
            return self.queue.arrived.notified().await;
        }
        let stored = timeout(INSERT_LIMIT, self.store_first()).await;
        if let Err(error) = stored.unwrap_or(Err(Error::TimedOut)) {
            tracing::debug!(%error, table = self.queue.table, waiting = self.queue.len(), "rows wait in memory");
            sleep(RETRY).await;
        }
    }

    /// A retry after a lost answer may store a row twice; the tables replace a row by its like.
    async fn store_first(&self) -> Result<(), Error> {
        let lines = self.queue.first(INSERT_MAX);
        if lines.is_empty() {
            return Ok(());
        }
        let statement = format!("INSERT INTO {} FORMAT JSONEachRow", self.queue.table);
        let mut insert = self
            .client
            .insert_formatted_with(statement)
            .with_setting("async_insert", "0");
        let mut text = lines.join("\n");
        text.push('\n');
        insert.send(Bytes::from(text)).await?;
        insert.end().await?;
        self.queue.remove(&lines);
        Ok(())
    }
}
