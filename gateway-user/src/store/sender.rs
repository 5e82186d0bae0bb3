//! Sealed batches on their way to ClickHouse: each stored once, whatever happens in between.
//!
//! A batch is sent under its name as deduplication token, and its rows carry that name. When an answer is lost nobody knows whether the
//! rows are in, so they are counted by that name before anything is sent again: all of them, and the batch is acknowledged; none, and it
//! is sent again; some, and the missing ones are sent. What ClickHouse refuses for good is halved until the row that it refuses stands alone, and is
//! put aside. Everything else is tried again for ever, more and more slowly.

use super::migrate::{self, Layout, MigrateError};
use super::{Batch, Spool};
use crate::config::StoreConfig;
use bytes::Bytes;
use clickhouse::{Client, Compression, error::Error};
use serde::Deserialize;
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

/// How long one insert may take, sending and waiting for the answer: a batch is a few megabytes.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(120);

/// Batches looked at at a time.
const LOOK_AHEAD: usize = 64;

/// Codes with which ClickHouse refuses the data itself: the same bytes will be refused again. Every other code is taken to pass, since a row put aside by
/// mistake needs a person, and a retry does not. (`src/Common/ErrorCodes.cpp`)
const REFUSED_ROWS: [u32; 14] = [
    6,   // CANNOT_PARSE_TEXT
    7,   // INCORRECT_NUMBER_OF_COLUMNS
    26,  // CANNOT_PARSE_QUOTED_STRING
    27,  // CANNOT_PARSE_INPUT_ASSERTION_FAILED
    32,  // ATTEMPT_TO_READ_AFTER_EOF
    33,  // CANNOT_READ_ALL_DATA
    38,  // CANNOT_PARSE_DATE
    41,  // CANNOT_PARSE_DATETIME
    53,  // TYPE_MISMATCH
    70,  // CANNOT_CONVERT_TYPE
    72,  // CANNOT_PARSE_NUMBER
    117, // INCORRECT_DATA
    131, // TOO_LARGE_STRING_SIZE
    349, // CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN
];

/// Codes that say that the schema is not there (any more): it is made again before the next try.
pub(super) const NO_SCHEMA: [u32; 2] = [
    60, // UNKNOWN_TABLE
    81, // UNKNOWN_DATABASE
];

/// What the sender has done, for metrics.
#[derive(Debug, Default)]
pub struct SenderStats {
    /// Batches stored.
    pub batches: AtomicU64,
    /// Rows in them.
    pub rows: AtomicU64,
    /// Tries that failed and are made again.
    pub retries: AtomicU64,
    /// Batches whose rows were found to be there already, after a lost answer.
    pub found: AtomicU64,
    /// Batches of which a part was there.
    pub repaired: AtomicU64,
    /// Rows that were put aside.
    pub refused: AtomicU64,
}

/// Stores the batches of one spool.
pub struct Sender {
    spool: Arc<Spool>,
    client: Client,
    layout: Layout,
    stats: Arc<SenderStats>,
}

/// What a failed insert means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nobody knows whether the rows are in.
    Unknown,
    /// They are not, and will not be: the data is refused.
    Refused,
    /// The schema is missing.
    NoSchema,
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
    /// A sender of what `spool` seals, to the ClickHouse behind `client`.
    pub fn new(spool: Arc<Spool>, client: Client, layout: Layout) -> Sender {
        Sender {
            spool,
            client,
            layout,
            stats: Arc::default(),
        }
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
            let step = async {
                if !ready {
                    self.migrate().await?;
                    ready = true;
                }
                self.spool.wait_for_sealed().await;
                for batch in self.spool.sealed(LOOK_AHEAD) {
                    let id = batch.id.to_string();
                    let in_doubt = doubtful.contains(&id);
                    match self.store(&batch, in_doubt).await {
                        Ok(()) => drop(doubtful.remove(&id)),
                        Err(error) => {
                            doubtful.insert(id);
                            return Err(error);
                        }
                    }
                }
                Ok(())
            };
            let outcome = tokio::select! {
                outcome = step => outcome,
                () = told(&mut stop) => break,
            };
            match outcome {
                Ok(()) => backoff = Backoff::default(),
                Err(Failure::Migrate(error @ MigrateError::TooNew { .. })) => return Err(error),
                Err(error) => {
                    ready &= !error.wants_schema();
                    self.stats.retries.fetch_add(1, Ordering::Relaxed);
                    backoff.report(&error);
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
        let applied = migrate::migrate(&self.client, &self.layout)
            .await
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
        let lines = Lines::of(Bytes::from(text));
        let mut token = batch.id.to_string();
        let mut rows: Vec<usize> = (0..lines.len()).collect();
        if in_doubt {
            let there = self.stored(&token).await?;
            rows.retain(|at| !there.contains(lines.event_id(*at)));
            if rows.is_empty() {
                self.stats.found.fetch_add(1, Ordering::Relaxed);
                return self.acknowledge(batch);
            }
            if rows.len() < lines.len() {
                self.stats.repaired.fetch_add(1, Ordering::Relaxed);
                token = format!("{token}+{}", rows.len());
            }
        }
        match self.insert(lines.only(&rows), &token).await {
            Ok(()) => self.acknowledge(batch),
            Err(error) if verdict(&error) == Verdict::Refused => {
                self.set_aside(batch, &lines, &rows, &error).await
            }
            Err(error) => Err(Failure::Insert(error)),
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
                Err(error) if verdict(&error) != Verdict::Refused => return Err(Failure::Insert(error)),
                Err(_) if part.len() == 1 => refused.push(*first as u64),
                Err(_) => {
                    let (front, back) = part.split_at(part.len() / 2);
                    suspects.extend([back, front]);
                }
            }
        }
        let reason = reason_of(error);
        tracing::error!(
            batch = token,
            rows = refused.len(),
            reason,
            "ClickHouse refuses rows; they are in quarantine"
        );
        self.stats
            .refused
            .fetch_add(refused.len() as u64, Ordering::Relaxed);
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
            .insert_formatted_with("INSERT INTO request_events FORMAT JSONEachRow")
            .with_timeouts(Some(SEND_TIMEOUT), Some(END_TIMEOUT))
            .with_setting("insert_deduplication_token", token)
            .with_setting("deduplicate_blocks_in_dependent_materialized_views", "1")
            // One file is one block, so that it is in as a whole or not at all.
            .with_setting("async_insert", "0")
            .with_setting("input_format_parallel_parsing", "0")
            .with_setting("input_format_skip_unknown_fields", "0");
        insert.send(text).await?;
        insert.end().await
    }

    /// The events of a batch that are stored.
    async fn stored(&self, batch: &str) -> Result<HashSet<String>, Failure> {
        let client = self.database_client();
        let query = client
            .query("SELECT DISTINCT event_id FROM request_events WHERE batch = ?")
            .bind(batch);
        let ids: Vec<String> = query.fetch_all().await.map_err(Failure::Insert)?;
        Ok(ids.into_iter().collect())
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
    Insert(Error),
    #[error("a batch cannot be read or deleted: {0}")]
    File(io::Error),
}

impl Failure {
    fn wants_schema(&self) -> bool {
        matches!(self, Failure::Insert(error) if verdict(error) == Verdict::NoSchema)
    }
}

/// The rows of a batch.
struct Lines {
    text: Bytes,
    ends: Vec<usize>,
}

impl Lines {
    fn of(text: Bytes) -> Lines {
        let ends = memchr::memchr_iter(b'\n', &text).map(|at| at + 1).collect();
        Lines { text, ends }
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn line(&self, at: usize) -> &[u8] {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.text[start..self.ends[at]]
    }

    /// The event of a row; empty when it has none, so that such a row counts as missing.
    fn event_id(&self, at: usize) -> &str {
        #[derive(Deserialize)]
        struct Row<'r> {
            #[serde(borrow)]
            event_id: &'r str,
        }
        serde_json::from_slice::<Row<'_>>(self.line(at)).map_or("", |row| row.event_id)
    }

    /// The text of these rows, which are in order; nothing is copied when it is all of them, as it nearly always is.
    fn only(&self, rows: &[usize]) -> Bytes {
        if rows.len() == self.len() {
            return self.text.slice(..self.ends.last().copied().unwrap_or(0));
        }
        let mut text = Vec::with_capacity(rows.iter().map(|at| self.line(*at).len()).sum());
        for at in rows {
            text.extend_from_slice(self.line(*at));
        }
        Bytes::from(text)
    }
}

/// The code of an exception, if ClickHouse sent one.
pub(super) fn code_of(error: &Error) -> Option<u32> {
    let Error::BadResponse(text) = error else {
        return None;
    };
    let digits = text.split("Code: ").nth(1)?;
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn verdict(error: &Error) -> Verdict {
    match code_of(error) {
        Some(code) if REFUSED_ROWS.contains(&code) => Verdict::Refused,
        Some(code) if NO_SCHEMA.contains(&code) => Verdict::NoSchema,
        _ => Verdict::Unknown,
    }
}

/// What may be logged of an error: its code and name. Its text quotes the data.
pub(super) fn reason_of(error: &Error) -> String {
    let Some(code) = code_of(error) else {
        return match error {
            Error::BadResponse(_) => "an answer that is no exception of ClickHouse".to_owned(),
            other => other.to_string(),
        };
    };
    let name = match error {
        Error::BadResponse(text) => text.rsplit('(').find_map(|part| {
            let name = part.split(')').next()?;
            let is_name = name.len() > 3
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_uppercase() || byte == b'_' || byte.is_ascii_digit());
            is_name.then_some(name)
        }),
        _ => None,
    };
    format!("code {code} {}", name.unwrap_or_default())
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

    fn report(&self, error: &Failure) {
        match self.failures {
            0 => tracing::warn!(%error, "rows wait in the spool; trying again"),
            n if n % 10 == 0 => tracing::warn!(%error, failures = n, "rows still wait in the spool"),
            _ => tracing::debug!(%error, "rows wait in the spool"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exception(text: &str) -> Error {
        Error::BadResponse(text.to_owned())
    }

    #[test]
    fn only_what_will_always_be_refused_is_put_aside() {
        let parse = exception(
            "Code: 27. DB::Exception: Cannot parse input: expected '\"' before: 'my secret' (CANNOT_PARSE_INPUT_ASSERTION_FAILED)",
        );
        assert_eq!(verdict(&parse), Verdict::Refused);
        assert_eq!(
            verdict(&exception(
                "Code: 243. DB::Exception: Cannot reserve (NOT_ENOUGH_SPACE)"
            )),
            Verdict::Unknown
        );
        assert_eq!(
            verdict(&exception("Code: 516. DB::Exception: (AUTHENTICATION_FAILED)")),
            Verdict::Unknown
        );
        assert_eq!(
            verdict(&exception(
                "Code: 60. DB::Exception: Unknown table (UNKNOWN_TABLE)"
            )),
            Verdict::NoSchema
        );
        assert_eq!(verdict(&exception("upstream connect error")), Verdict::Unknown);
        let reason = reason_of(&parse);
        assert_eq!(reason, "code 27 CANNOT_PARSE_INPUT_ASSERTION_FAILED");
        assert!(!reason.contains("secret"), "an exception quotes the data");
    }

    #[test]
    fn rows_are_known_by_their_event() {
        let text = "{\"batch\":\"b\",\"event_id\":\"a\"}\n{\"batch\":\"b\"}\n{\"event_id\":\"c\"}\n";
        let lines = Lines::of(Bytes::from_static(text.as_bytes()));
        assert_eq!((lines.len(), lines.event_id(0), lines.event_id(1)), (3, "a", ""));
        assert_eq!(&lines.only(&[2])[..], b"{\"event_id\":\"c\"}\n");
        assert_eq!(lines.only(&[0, 1, 2]), text);
        assert_eq!(lines.only(&[1, 2]), text.split_once('\n').expect("lines").1);
    }

    #[test]
    fn waits_grow_to_a_limit() {
        let mut backoff = Backoff::default();
        let waits: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] < Duration::from_millis(115) && waits[19] > Duration::from_secs(8));
        assert!(waits.iter().all(|wait| *wait <= BACKOFF_MAX.mul_f64(1.125)));
    }
}
