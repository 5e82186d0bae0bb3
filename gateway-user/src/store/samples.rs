//! What vLLM says of itself, on its way to ClickHouse.
//!
//! Samples are few (some an upstream and scrape) and describe a moment that passes, so they wait in memory and not on disk: through an outage of
//! hours, and not through a restart. Past a bound (30,000) the oldest go, counted.

use super::sender::told;
use crate::vllm::{SampleSink, SystemSample};
use bytes::Bytes;
use clickhouse::{Client, error::Error};
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

/// Most samples that wait: half a day of ten upstreams at 15 s, in some 15 MB.
const WAITING_MAX: usize = 30_000;

/// Most samples in one insert.
const INSERT_MAX: usize = 1_000;

/// Between two tries. Scrapes come every few seconds, so nothing is gained by hurrying.
const RETRY: Duration = Duration::from_secs(5);

/// How long the last insert may take when the gateway ends.
const LAST_LIMIT: Duration = Duration::from_secs(2);

/// Samples that wait to be stored.
#[derive(Debug, Default)]
pub struct SampleQueue {
    waiting: Mutex<VecDeque<String>>,
    arrived: Notify,
    dropped: AtomicU64,
}

impl SampleQueue {
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

impl SampleSink for SampleQueue {
    fn record(&self, sample: &SystemSample) {
        // A sample is numbers and names: there is nothing in it that JSON cannot say.
        let Ok(line) = serde_json::to_string(sample) else {
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
}

/// Stores samples.
pub struct SampleSender {
    queue: Arc<SampleQueue>,
    client: Client,
}

impl SampleSender {
    /// A sender to the database that `client` has set.
    pub fn new(queue: Arc<SampleQueue>, client: Client) -> SampleSender {
        SampleSender { queue, client }
    }

    /// Stores samples until `stop` holds `true`.
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
        if let Err(error) = self.store_first().await {
            tracing::debug!(%error, waiting = self.queue.len(), "samples of vLLM wait");
            sleep(RETRY).await;
        }
    }

    /// A retry after a lost answer may store a sample twice; the table keeps one row for one moment of one upstream.
    async fn store_first(&self) -> Result<(), Error> {
        let lines = self.queue.first(INSERT_MAX);
        if lines.is_empty() {
            return Ok(());
        }
        let statement = "INSERT INTO vllm_system_metrics FORMAT JSONEachRow";
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
