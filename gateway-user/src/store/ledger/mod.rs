//! The ledger's tables in ClickHouse: what statements are computed from, what stands, and how a new one is written.
//!
//! A window's statement is in three tables, which are three inserts: `cost_ledger`, `segment_costs`, then its head in `ledger_windows`. Each insert is
//! one block, so that it is there as a whole or not at all, and for many windows. A writer that dies in between leaves rows of another revision
//! than the head's, which whoever looks at the window next will see ([`Standing::is_whole`](crate::ledger::Standing)). Everything is read with `FINAL`.

mod hour;
mod months;
mod read;
mod write;

pub use months::{ClosedMonth, MonthOfUpstream};
pub use read::StandingRow;

use super::exception::{WaitCause, reason_of};
use super::migrate;
use super::sender;
use super::service::url_of;
use crate::config::StoreConfig;
use crate::ledger::Span;
use clickhouse::error::Error;
use clickhouse::query::Query;
use clickhouse::{Client, RowOwned, RowRead};
use std::time::Duration;
use tokio::time::timeout;

/// How long ClickHouse may take over one question. The largest, a chunk of windows with their segments, takes a second or two.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// Microseconds of a second, in which windows are stored.
const SECOND_US: u64 = 1_000_000;

/// The tables of the ledger.
#[derive(Clone)]
pub struct LedgerStore {
    client: Client,
}

/// Why the ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The schema is not the one that this program knows: a gateway makes it when it starts.
    #[error("expected schema version {known}, found {found}")]
    OtherSchema {
        /// The version that is there.
        found: u32,
        /// The version that is known.
        known: u32,
    },
    /// It could not be read.
    #[error("the ledger cannot be read: {}", reason_of(.0))]
    Read(#[source] Error),
    /// It could not be written.
    #[error("the ledger cannot be written: {}", reason_of(.0))]
    Write(#[source] Error),
}

impl LedgerError {
    /// What it stands for.
    pub fn cause(&self) -> WaitCause {
        match self {
            LedgerError::OtherSchema { found, known } if found > known => WaitCause::SchemaTooNew,
            LedgerError::OtherSchema { .. } => WaitCause::NoSchema,
            LedgerError::Read(error) | LedgerError::Write(error) => WaitCause::of(error),
        }
    }

    /// Whether reading went well and the user may not write.
    pub fn is_read_only(&self) -> bool {
        let refused = matches!(self.cause(), WaitCause::AccessDenied | WaitCause::ReadOnly);
        matches!(self, LedgerError::Write(_)) && refused
    }
}

impl LedgerStore {
    /// The ledger in the ClickHouse that `config` names; `None` when it names none. Nothing is asked yet.
    pub fn new(config: &StoreConfig) -> Option<LedgerStore> {
        let url = url_of(config)?;
        let client = sender::client(config, &url)
            .with_database(&config.database)
            // A window lies in one month, and so do all rows of it.
            .with_setting("do_not_merge_across_partitions_select_final", "1");
        Some(LedgerStore { client })
    }

    /// Checks that the tables are those that this program knows.
    ///
    /// # Errors
    /// [`LedgerError::OtherSchema`], or what ClickHouse says.
    pub async fn check_schema(&self) -> Result<(), LedgerError> {
        let (found, known) = (
            answered(migrate::version(&self.client)).await?,
            migrate::known_version(),
        );
        match found == known {
            true => Ok(()),
            false => Err(LedgerError::OtherSchema { found, known }),
        }
    }

    /// A question about the windows of an upstream that begin within a span. `upstream`, `from` and `to` are its parameters.
    fn about(&self, statement: &str, upstream: &str, span: Span) -> Query {
        self.client
            .query(statement)
            .param("upstream", upstream)
            .param("from", seconds(span.from().0))
            .param("to", seconds(span.to().0))
    }

    async fn rows<R: RowOwned + RowRead>(&self, query: Query) -> Result<Vec<R>, LedgerError> {
        answered(query.fetch_all::<R>()).await
    }
}

/// Windows that begin within the span of a question.
const IN_SPAN: &str = "upstream = {upstream:String} AND window_start >= toDateTime({from:UInt32}, 'UTC') \
                       AND window_start < toDateTime({to:UInt32}, 'UTC')";

/// As a column has it, whose end is in the year 2106.
fn seconds(us: u64) -> u32 {
    u32::try_from(us.div_ceil(SECOND_US)).unwrap_or(u32::MAX)
}

async fn answered<T>(question: impl Future<Output = Result<T, Error>>) -> Result<T, LedgerError> {
    timeout(ANSWER_MAX, question)
        .await
        .unwrap_or(Err(Error::TimedOut))
        .map_err(LedgerError::Read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_who_may_only_read_is_told_from_one_who_may_not_even_do_that() {
        let refused = || {
            Error::BadResponse("Code: 497. DB::Exception: gw: Not enough privileges (ACCESS_DENIED)".into())
        };
        assert!(LedgerError::Write(refused()).is_read_only());
        assert!(!LedgerError::Read(refused()).is_read_only());
        assert!(!LedgerError::Write(Error::TimedOut).is_read_only());
        let read_only = Error::BadResponse(
            "Code: 164. DB::Exception: Cannot execute query in readonly mode (READONLY)".into(),
        );
        assert!(LedgerError::Write(read_only).is_read_only());
    }

    #[test]
    fn a_span_that_ends_within_a_second_is_read_to_its_end() {
        assert_eq!((seconds(15_000_000), seconds(15_000_001)), (15, 16));
        assert_eq!(seconds(u64::MAX), u32::MAX);
    }
}
