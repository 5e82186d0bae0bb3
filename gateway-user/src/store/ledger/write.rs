//! Statements, written.

use super::{LedgerError, LedgerStore};
use crate::ledger::{Head, Statement};
use bytes::Bytes;
use clickhouse::error::Error;
use serde::Serialize;
use std::time::Duration;

/// How long ClickHouse may take to take in a piece of an insert, and to answer.
const SEND_MAX: Duration = Duration::from_secs(30);
const ANSWER_MAX: Duration = Duration::from_secs(120);

impl LedgerStore {
    /// Writes statements of one upstream or several, each whole: one insert a table, the heads last.
    ///
    /// # Errors
    /// [`LedgerError::Write`]. Some of it may be there then; to write it again, or another revision, is always right.
    pub async fn write(&self, statements: &[(Head, Statement)]) -> Result<(), LedgerError> {
        let rows = statements.iter().flat_map(|(_, statement)| &statement.rows);
        self.insert("cost_ledger", rows).await?;
        let items = statements.iter().flat_map(|(_, statement)| &statement.segments);
        self.insert("segment_costs", items).await?;
        self.insert("ledger_windows", statements.iter().map(|(head, _)| head))
            .await
    }

    pub(super) async fn insert(
        &self,
        table: &str,
        rows: impl Iterator<Item = &(impl Serialize + 'static)>,
    ) -> Result<(), LedgerError> {
        let mut text = Vec::new();
        for row in rows {
            let written = serde_json::to_writer(&mut text, row);
            written.map_err(|error| LedgerError::Write(Error::Custom(error.to_string())))?;
            text.push(b'\n');
        }
        if text.is_empty() {
            return Ok(());
        }
        self.insert_text(table, Bytes::from(text))
            .await
            .map_err(LedgerError::Write)
    }

    async fn insert_text(&self, table: &str, text: Bytes) -> Result<(), Error> {
        let mut insert = self
            .client
            .insert_formatted_with(format!("INSERT INTO {table} FORMAT JSONEachRow"))
            .with_timeouts(Some(SEND_MAX), Some(ANSWER_MAX))
            // One block, so that it is there as a whole or not at all.
            .with_setting("async_insert", "0")
            .with_setting("input_format_parallel_parsing", "0")
            // What was inserted before and is superseded may be right again: it must not be taken for a retry.
            .with_setting("insert_deduplicate", "0")
            .with_setting("input_format_skip_unknown_fields", "0");
        insert.send(text).await?;
        insert.end().await
    }
}
