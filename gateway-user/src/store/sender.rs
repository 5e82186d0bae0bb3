//! Sealed batches on their way to ClickHouse: each stored once, whatever happens in between.
//!
//! A batch is sent under its name as deduplication token, and its rows carry that name. When an answer is lost nobody knows whether the
//! rows are in, so they are counted by that name before anything is sent again: all of them, and the batch is acknowledged; none, and it
//! is sent again; some, and the missing ones are sent. What ClickHouse refuses for good is halved until the row that it refuses stands alone, and is
//! put aside. Everything else is tried again for ever, more and more slowly.
//!
//! A batch of events is acknowledged when the windows have it too. An insert in one piece takes care of that by itself; after anything else
//! the windows of the batch are written again from its rows. Segments have a sender of their own, so that neither holds the other up, and are
//! in no windows.

use super::exception::{Verdict, WaitCause, reason_of, verdict};
use super::lines::{Lines, key_sql};
use super::migrate::{self, Layout, MigrateError};
use super::windows::{self, Contents, ROWS_OF_BATCH, SEGMENTS_OF_BATCH};
use super::{Batch, Spool, Table};
use crate::config::StoreConfig;
use bytes::Bytes;
use clickhouse::{Client, Compression, error::Error};
use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::sleep;

/// First and longest wait before something is tried again.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// How long the schema may take. On a cluster each statement waits for all of its servers, by default up to three minutes.
const MIGRATE_LIMIT: Duration = Duration::from_secs(1_800);

/// Batches looked at at a time.
const LOOK_AHEAD: usize = 64;

/// What the sender has done, for metrics.
#[derive(Debug, Default)]
pub struct SenderStats {
    /// Batches stored.
    pub batches: AtomicU64,
    /// Rows in them.
    pub rows: AtomicU64,
    waits: [AtomicU64; WaitCause::ALL.len()],
    /// Batches whose rows were found to be there already, after a lost answer.
    pub found: AtomicU64,
    /// Batches of which a part was there.
    pub repaired: AtomicU64,
    /// Rows that were put aside.
    pub refused: AtomicU64,
}

impl SenderStats {
    /// Tries that failed for this cause and are made again.
    pub fn waits_for(&self, cause: WaitCause) -> u64 {
        self.waits[cause as usize].load(Ordering::Relaxed)
    }

    fn waits(&self, cause: WaitCause) {
        // The discriminants count from 0 in the order of `ALL`, which a test holds.
        self.waits[cause as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// How long ClickHouse may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// To take a piece of an insert in. A batch is a few megabytes.
    pub send: Duration,
    /// To answer.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            send: Duration::from_secs(30),
            answer: Duration::from_secs(120),
        }
    }
}

/// Stores the batches of one spool, whose rows are of one table.
pub struct Sender {
    table: Table,
    spool: Arc<Spool>,
    client: Client,
    layout: Layout,
    patience: Patience,
    stats: Arc<SenderStats>,
}

/// A client for the ClickHouse of `config`, which is at `url`.
pub fn client(config: &StoreConfig, url: &str) -> Client {
    let mut client = Client::default()
        .with_url(url)
        .with_compression(Compression::None);
    if let Some(user) = &config.username {
        client = client.with_user(user);
    }
    if let Some(password) = &config.password {
        client = client.with_password(password.expose());
    }
    client
}

/// The layout that `config` asks for.
pub fn layout(config: &StoreConfig) -> Layout {
    Layout {
        database: config.database.clone(),
        cluster: config.cluster.as_ref().map(ToString::to_string),
        raw_ttl_days: config.raw_days,
        ledger_ttl_days: config.ledger_days,
    }
}

impl Sender {
    /// A sender of what `spool` seals, rows of `table`, to the ClickHouse behind `client`.
    pub fn new(table: Table, spool: Arc<Spool>, client: Client, layout: Layout) -> Sender {
        Sender {
            table,
            spool,
            client,
            layout,
            patience: Patience::default(),
            stats: Arc::default(),
        }
    }

    /// The same sender, with another patience.
    pub fn with_patience(self, patience: Patience) -> Sender {
        Sender { patience, ..self }
    }

    /// What it has done so far.
    pub fn stats(&self) -> Arc<SenderStats> {
        Arc::clone(&self.stats)
    }

    /// A client of the database that the rows go to.
    pub fn database_client(&self) -> Client {
        self.client.clone().with_database(&self.layout.database)
    }

    /// Stores batch after batch until `stop` holds `true` and there is nothing that could be stored at once.
    ///
    /// # Errors
    /// [`MigrateError::TooNew`]: nothing will ever be stored in such a database by this program.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> Result<(), MigrateError> {
        let mut backoff = Backoff::default();
        let mut ready = false;
        // What an earlier run left may be stored already.
        let mut doubtful: HashSet<String> = self
            .spool
            .sealed(usize::MAX)
            .iter()
            .map(|batch| batch.id.to_string())
            .collect();
        loop {
            let stored = self.stats.batches.load(Ordering::Relaxed);
            let step = async {
                if !ready {
                    self.migrate().await?;
                    ready = true;
                }
                self.spool.wait_for_sealed().await;
                for batch in self.spool.sealed(LOOK_AHEAD) {
                    // In doubt from the moment at which it is tried: this step can be cut off anywhere.
                    let in_doubt = !doubtful.insert(batch.id.to_string());
                    self.store(&batch, in_doubt).await?;
                    doubtful.remove(&batch.id.to_string());
                }
                Ok(())
            };
            let outcome = tokio::select! {
                outcome = step => outcome,
                () = told(&mut stop) => break,
            };
            match outcome {
                Ok(()) => {
                    backoff.end(self.table);
                    backoff = Backoff::default();
                }
                Err(Failure::Migrate(error @ MigrateError::TooNew { .. })) => {
                    self.stats.waits(WaitCause::SchemaTooNew);
                    return Err(error);
                }
                Err(error) => {
                    // ClickHouse was there meanwhile: this is another failure, and not the last one going on.
                    if self.stats.batches.load(Ordering::Relaxed) > stored {
                        backoff = Backoff::default();
                    }
                    ready &= !error.wants_schema();
                    self.stats.waits(error.cause());
                    backoff.report(self.table, &error);
                    tokio::select! {
                        () = sleep(backoff.next()) => {}
                        () = told(&mut stop) => return Ok(()),
                    }
                }
            }
        }
        self.last_round(ready, &doubtful).await;
        Ok(())
    }

    async fn migrate(&self) -> Result<(), Failure> {
        let applied = tokio::time::timeout(MIGRATE_LIMIT, migrate::migrate(&self.client, &self.layout))
            .await
            .unwrap_or(Err(MigrateError::Version(Error::TimedOut)))
            .map_err(Failure::Migrate)?;
        if !applied.is_empty() {
            tracing::info!(
                database = self.layout.database,
                ?applied,
                "the schema is up to date"
            );
        }
        Ok(())
    }

    /// At the end: what can be stored without waiting is, and the rest stays in the spool.
    async fn last_round(&self, ready: bool, doubtful: &HashSet<String>) {
        if !ready {
            return;
        }
        for batch in self.spool.sealed(LOOK_AHEAD) {
            let in_doubt = doubtful.contains(&batch.id.to_string());
            if self.store(&batch, in_doubt).await.is_err() {
                return;
            }
        }
    }

    /// Stores one batch; `in_doubt` when rows of it may be there.
    async fn store(&self, batch: &Arc<Batch>, in_doubt: bool) -> Result<(), Failure> {
        let text = tokio::fs::read(&batch.path).await.map_err(Failure::File)?;
        let lines = Lines::of(self.table, Bytes::from(text));
        let name = batch.id.to_string();
        let mut token = name.clone();
        let mut rows: Vec<usize> = (0..lines.len()).collect();
        if in_doubt {
            let there = self.stored(&name, lines.contents(0..lines.len())).await?;
            rows.retain(|at| !there.contains(&*lines.key(*at)));
            if rows.is_empty() {
                self.rewrite_windows(&name, &lines, &[]).await?;
                self.stats.found.fetch_add(1, Ordering::Relaxed);
                return self.acknowledge(batch);
            }
            if rows.len() < lines.len() {
                self.stats.repaired.fetch_add(1, Ordering::Relaxed);
                token = format!("{name}+{}", rows.len());
            }
        }
        match self.insert(lines.only(&rows), &token).await {
            Ok(()) => {
                if rows.len() < lines.len() {
                    self.rewrite_windows(&name, &lines, &[]).await?;
                }
                self.acknowledge(batch)
            }
            Err(error) if verdict(&error) == Verdict::Refused => {
                self.set_aside(batch, &lines, &rows, &error).await
            }
            Err(error) => Err(Failure::ClickHouse(error)),
        }
    }

    fn acknowledge(&self, batch: &Batch) -> Result<(), Failure> {
        self.stats.batches.fetch_add(1, Ordering::Relaxed);
        self.stats.rows.fetch_add(batch.rows, Ordering::Relaxed);
        // A file is deleted in microseconds; a thread for it would cost more.
        self.spool.acknowledge(batch).map_err(Failure::File)
    }

    /// Stores those of `rows` that are not refused, and puts the others aside.
    async fn set_aside(
        &self,
        batch: &Batch,
        lines: &Lines,
        rows: &[usize],
        error: &Error,
    ) -> Result<(), Failure> {
        let mut refused = Vec::new();
        let mut suspects = vec![rows];
        let token = batch.id.to_string();
        while let Some(part) = suspects.pop() {
            let (Some(first), Some(last)) = (part.first(), part.last()) else {
                continue;
            };
            match self
                .insert(lines.only(part), &format!("{token}+{first}-{last}"))
                .await
            {
                Ok(()) => {}
                Err(error) if verdict(&error) != Verdict::Refused => return Err(Failure::ClickHouse(error)),
                Err(_) if part.len() == 1 => refused.push(*first),
                Err(_) => {
                    let (front, back) = part.split_at(part.len() / 2);
                    suspects.extend([back, front]);
                }
            }
        }
        self.rewrite_windows(&token, lines, &refused).await?;
        let reason = reason_of(error);
        tracing::error!(
            table = self.table.name(),
            batch = token,
            rows = refused.len(),
            reason,
            "ClickHouse refuses rows; they are in quarantine/ of the spool, with the reason"
        );
        self.stats
            .refused
            .fetch_add(refused.len() as u64, Ordering::Relaxed);
        let refused: Vec<u64> = refused.into_iter().map(|at| at as u64).collect();
        // The good rows are in: what is left of the batch is acknowledged.
        match self
            .spool
            .quarantine(batch, &refused, &reason)
            .map_err(Failure::File)?
        {
            Some(rest) => self.acknowledge(&rest),
            None => Ok(()),
        }
    }

    async fn insert(&self, text: Bytes, token: &str) -> Result<(), Error> {
        let client = self.database_client();
        let mut insert = client
            .insert_formatted_with(format!("INSERT INTO {} FORMAT JSONEachRow", self.table.name()))
            .with_timeouts(Some(self.patience.send), Some(self.patience.answer))
            .with_setting("insert_deduplication_token", token)
            .with_setting("deduplicate_blocks_in_dependent_materialized_views", "1")
            // One file is one block, so that it is in as a whole or not at all, and is one row of each of its windows.
            .with_setting("async_insert", "0")
            .with_setting("input_format_parallel_parsing", "0")
            .with_setting("input_format_skip_unknown_fields", "0");
        insert.send(text).await?;
        insert.end().await
    }

    /// The keys of the rows of a batch that are stored.
    async fn stored(&self, batch: &str, contents: Contents) -> Result<HashSet<String>, Failure> {
        let client = self.database_client();
        let rows = match self.table {
            Table::Events => ROWS_OF_BATCH,
            Table::Segments => SEGMENTS_OF_BATCH,
        };
        let (key, table) = (key_sql(self.table), self.table.name());
        let statement = format!("SELECT DISTINCT {key} FROM {table} WHERE {rows}");
        let query = client
            .query_raw(&statement)
            .param("batch", batch)
            .param("from_us", contents.from_us)
            .param("to_us", contents.to_us);
        let keys = self.answered(query.fetch_all::<String>()).await?;
        Ok(keys.into_iter().collect())
    }

    /// Makes the windows of a batch what its rows are, of which some are `refused`. Segments are in none.
    async fn rewrite_windows(&self, batch: &str, lines: &Lines, refused: &[usize]) -> Result<(), Failure> {
        if self.table == Table::Segments {
            return Ok(());
        }
        let stored = (0..lines.len()).filter(|at| !refused.contains(at));
        let contents = lines.contents(stored);
        self.answered(windows::rewrite(&self.database_client(), batch, contents))
            .await
    }

    /// What ClickHouse answers, if it does in time: a query has no limit of its own, and a server can fall silent.
    async fn answered<T>(&self, query: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        tokio::time::timeout(self.patience.answer, query)
            .await
            .unwrap_or(Err(Error::TimedOut))
            .map_err(Failure::ClickHouse)
    }
}

/// Done when `stop` holds `true`, or nobody is left who could say so.
pub(super) async fn told(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Why a step did not come to its end.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Migrate(MigrateError),
    #[error("ClickHouse does not take rows: {}", reason_of(.0))]
    ClickHouse(Error),
    #[error("a batch cannot be read or deleted: {0}")]
    File(io::Error),
}

impl Failure {
    fn wants_schema(&self) -> bool {
        matches!(self, Failure::ClickHouse(error) if verdict(error) == Verdict::NoSchema)
    }

    fn cause(&self) -> WaitCause {
        match self {
            Failure::Migrate(MigrateError::TooNew { .. }) => WaitCause::SchemaTooNew,
            Failure::Migrate(
                MigrateError::Statement { source: error, .. } | MigrateError::Version(error),
            )
            | Failure::ClickHouse(error) => WaitCause::of(error),
            Failure::File(_) => WaitCause::SpoolFile,
        }
    }
}

/// Waits that double, and reports that do not flood the log.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let wait = BACKOFF_FIRST
            .saturating_mul(1 << self.failures.min(10))
            .min(BACKOFF_MAX);
        self.failures += 1;
        // Spread over a quarter, so that gateways that lost the same server do not come back as one.
        wait.mul_f64(rand::random_range(0.875..1.125))
    }

    fn report(&self, table: Table, error: &Failure) {
        let table = table.name();
        let (cause, advice) = (error.cause().name(), error.cause().advice());
        match self.failures {
            0 => tracing::warn!(%error, table, cause, advice, "rows wait in the spool; trying again"),
            n if n % 10 == 0 => {
                tracing::warn!(%error, table, cause, advice, failures = n, "rows still wait in the spool")
            }
            _ => tracing::debug!(%error, table, cause, "rows wait in the spool"),
        }
    }

    /// Says that it is over, to whoever was told that it had begun.
    fn end(&self, table: Table) {
        if self.failures > 0 {
            tracing::info!(
                table = table.name(),
                failures = self.failures,
                "ClickHouse takes rows again"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit() {
        let mut backoff = Backoff::default();
        let waits: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] < Duration::from_millis(115) && waits[19] > Duration::from_secs(8));
        assert!(waits.iter().all(|wait| *wait <= BACKOFF_MAX.mul_f64(1.125)));
    }
}
