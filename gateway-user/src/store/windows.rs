//! What a batch adds to the windows, written again from its stored rows.
//!
//! An insert fills the windows by itself (`sql/0002_request_metrics.sql`), but rows and windows are not one commit: ClickHouse can die
//! between them, and of a batch that went in in parts each part takes the other's place. After either, this makes the windows what the
//! rows are. It can be done at any time and as often as one likes, since a batch's windows replace themselves.

use clickhouse::{Client, error::Error};

/// The columns of a window, which the schema needs too.
pub(super) const COLUMNS: &str = include_str!("../../../sql/window_columns.sql");

/// What there is of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// When its first and its last request began, microseconds since 1970: rows are sorted by that, so that they are found by it.
    pub from_us: i64,
    /// See there.
    pub to_us: i64,
    /// Its rows that are in windows: all but those that were inferred from a crash.
    pub rolled_up: u64,
}

/// Where the rows of a batch are.
pub(super) const ROWS_OF_BATCH: &str = "batch = {batch:String} AND started_at BETWEEN fromUnixTimestamp64Micro({from_us:Int64}) \
                                        AND fromUnixTimestamp64Micro({to_us:Int64})";

/// Writes the windows of `batch`. `client` has the database set.
///
/// # Errors
/// Also when fewer than `rolled_up` rows are found, and then nothing is written: on a cluster another replica may answer than the one that has
/// taken the rows.
pub async fn rewrite(client: &Client, batch: &str, contents: Contents) -> Result<(), Error> {
    let statement = format!(
        "INSERT INTO request_metrics \
         WITH (SELECT throwIf(uniqExact(event_id) < {{rolled_up:UInt64}}, 'rows of a stored batch are not here yet') FROM request_events \
               WHERE {ROWS_OF_BATCH} AND outcome != 'gateway_crash') AS short \
         SELECT\n{COLUMNS},\ntoUInt8(1) AS revision FROM request_events FINAL \
         WHERE {ROWS_OF_BATCH} AND outcome != 'gateway_crash' AND short = 0 \
         GROUP BY window_start, team_id, project, model, batch"
    );
    client
        .query_raw(&statement)
        .param("batch", batch)
        .param("from_us", contents.from_us)
        .param("to_us", contents.to_us)
        .param("rolled_up", contents.rolled_up)
        .execute()
        .await
}
