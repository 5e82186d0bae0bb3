//! The schema: numbered migrations, applied at start.
//!
//! Every statement is idempotent (`IF NOT EXISTS`), so that several gateways may migrate one database at once, and one that was killed in
//! the middle goes on where it was. A database whose schema is newer than this program is refused: its rows could be read wrongly.

use super::exception::with_sources;
use super::windows;
use clickhouse::{Client, error::Error};

/// One step of the schema.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Its number; they follow each other without gaps.
    pub version: u32,
    /// Its name, for the record.
    pub name: &'static str,
    sql: &'static str,
}

/// Every step, in order. A step that has been released is never changed; what must change gets a step of its own.
pub const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "request_events",
        sql: include_str!("../../../sql/0001_request_events.sql"),
    },
    Migration {
        version: 2,
        name: "request_metrics",
        sql: include_str!("../../../sql/0002_request_metrics.sql"),
    },
    Migration {
        version: 3,
        name: "vllm_system_metrics",
        sql: include_str!("../../../sql/0003_vllm_system_metrics.sql"),
    },
    Migration {
        version: 4,
        name: "segments_and_ledger",
        sql: include_str!("../../../sql/0004_segments_and_ledger.sql"),
    },
    Migration {
        version: 5,
        name: "ledger_windows",
        sql: include_str!("../../../sql/0005_ledger_windows.sql"),
    },
    Migration {
        version: 6,
        name: "reconciliation",
        sql: include_str!("../../../sql/0006_reconciliation.sql"),
    },
    Migration {
        version: 7,
        name: "engine_steps",
        sql: include_str!("../../../sql/0007_engine_steps.sql"),
    },
];

/// What the schema depends on besides its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The database.
    pub database: String,
    /// A cluster that all statements run on, with replicated tables.
    pub cluster: Option<String>,
    /// How long raw rows are kept.
    pub raw_ttl_days: u32,
    /// How long the ledger is kept.
    pub ledger_ttl_days: u32,
}

/// Why the schema could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The database has a schema that this program does not know.
    #[error(
        "the schema of database {database} has version {found}, this program knows versions up to {known}: start a gateway at least as \
         new as the one that wrote it, or set store.database to another database"
    )]
    TooNew {
        /// The database.
        database: String,
        /// Its version.
        found: u32,
        /// The newest version that is known here.
        known: u32,
    },
    /// A statement failed.
    #[error("migration {version} ({name}) failed: {}", with_sources(source))]
    Statement {
        /// Which step.
        version: u32,
        /// Its name.
        name: &'static str,
        /// What ClickHouse said.
        source: Error,
    },
    /// The database could not be asked for its version.
    #[error("the schema's version could not be read: {}", with_sources(.0))]
    Version(#[source] Error),
}

/// Brings the schema up to date. `client` must not have a database set, since that may not exist yet. Returns the versions that were applied.
///
/// # Errors
/// [`MigrateError`]; whether trying again helps is for the caller to judge by the source.
pub async fn migrate(client: &Client, layout: &Layout) -> Result<Vec<u32>, MigrateError> {
    let prepare = Migration {
        version: 0,
        name: "schema_migrations",
        sql: BOOTSTRAP,
    };
    apply(client, &prepare, layout).await?;
    let client = client.clone().with_database(&layout.database);
    let found = version(&client).await.map_err(MigrateError::Version)?;
    let known = known_version();
    if found > known {
        return Err(MigrateError::TooNew {
            database: layout.database.clone(),
            found,
            known,
        });
    }
    let mut applied = Vec::new();
    for migration in MIGRATIONS.iter().filter(|migration| migration.version > found) {
        apply(&client, migration, layout).await?;
        let record = client
            .query("INSERT INTO schema_migrations (version, name, program) VALUES (?, ?, ?)")
            .bind(migration.version)
            .bind(migration.name)
            .bind(env!("CARGO_PKG_VERSION"));
        record
            .execute()
            .await
            .map_err(|source| failed(migration, source))?;
        applied.push(migration.version);
    }
    Ok(applied)
}

/// The version of the schema in the database that `client` has set; 0 when no step was recorded.
///
/// # Errors
/// Those of ClickHouse, among them that there is no such database, or that no gateway has made it.
pub async fn version(client: &Client) -> Result<u32, Error> {
    client
        .query("SELECT max(version) FROM schema_migrations")
        .fetch_one()
        .await
}

/// The version that this program makes, and reads.
pub fn known_version() -> u32 {
    MIGRATIONS.last().map_or(0, |migration| migration.version)
}

/// Which version of the schema a database has, without touching it; `None` when it has none yet, or does not exist.
///
/// # Errors
/// When ClickHouse cannot be asked.
pub async fn found_version(client: &Client, database: &str) -> Result<Option<u32>, Error> {
    let tables: u64 = client
        .query("SELECT count() FROM system.tables WHERE database = ? AND name = 'schema_migrations'")
        .bind(database)
        .fetch_one()
        .await?;
    if tables == 0 {
        return Ok(None);
    }
    let client = client.clone().with_database(database);
    let version = version(&client).await?;
    Ok((version > 0).then_some(version))
}

/// The database, and the table that knows its version.
const BOOTSTRAP: &str = "
CREATE DATABASE IF NOT EXISTS {database}{on_cluster};

CREATE TABLE IF NOT EXISTS {database}.schema_migrations{on_cluster}
(
    version UInt32,
    name String,
    program String,
    applied_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = {replicated}ReplacingMergeTree
ORDER BY version;
";

async fn apply(client: &Client, migration: &Migration, layout: &Layout) -> Result<(), MigrateError> {
    for statement in statements(migration.sql, layout) {
        client
            .query_raw(&statement)
            .execute()
            .await
            .map_err(|source| failed(migration, source))?;
    }
    Ok(())
}

fn failed(migration: &Migration, source: Error) -> MigrateError {
    MigrateError::Statement {
        version: migration.version,
        name: migration.name,
        source,
    }
}

/// The statements of one migration for this layout.
fn statements(sql: &str, layout: &Layout) -> Vec<String> {
    let on_cluster = layout
        .cluster
        .as_ref()
        .map(|cluster| format!(" ON CLUSTER '{cluster}'"))
        .unwrap_or_default();
    let (replicated, window) = match layout.cluster {
        Some(_) => ("Replicated", "replicated_deduplication_window"),
        None => ("", "non_replicated_deduplication_window"),
    };
    let code: String = sql
        .replace("{window_columns}", windows::COLUMNS.trim_end())
        .lines()
        .filter(|line| !line.trim_start().starts_with("--"))
        .collect::<Vec<_>>()
        .join("\n");
    code.split(";\n")
        .map(|statement| statement.trim().trim_end_matches(';'))
        .filter(|statement| !statement.is_empty())
        .map(|statement| {
            statement
                .replace("{database}", &layout.database)
                .replace("{on_cluster}", &on_cluster)
                .replace("{replicated}", replicated)
                .replace("{deduplication_window}", window)
                .replace("{raw_ttl_days}", &layout.raw_ttl_days.to_string())
                .replace("{ledger_ttl_days}", &layout.ledger_ttl_days.to_string())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(cluster: Option<&str>) -> Layout {
        let cluster = cluster.map(str::to_owned);
        Layout {
            database: "vllm_attribution".to_owned(),
            cluster,
            raw_ttl_days: 90,
            ledger_ttl_days: 1_000,
        }
    }

    fn all(layout: &Layout) -> Vec<String> {
        let texts = std::iter::once(BOOTSTRAP).chain(MIGRATIONS.iter().map(|migration| migration.sql));
        texts.flat_map(|sql| statements(sql, layout)).collect()
    }

    #[test]
    fn versions_follow_each_other() {
        let versions: Vec<u32> = MIGRATIONS.iter().map(|migration| migration.version).collect();
        let expected: Vec<u32> = (1..=MIGRATIONS.len() as u32).collect();
        assert_eq!(versions, expected);
    }

    #[test]
    fn every_statement_can_run_twice_and_has_no_hole_left() {
        for statement in all(&layout(None)) {
            assert!(statement.contains(" IF NOT EXISTS "), "{statement}");
            assert!(
                !statement.contains('{') && !statement.contains(';'),
                "{statement}"
            );
            assert!(
                !statement.contains("ON CLUSTER") && !statement.contains("Replicated"),
                "{statement}"
            );
        }
    }

    #[test]
    fn a_cluster_gets_replicated_tables_everywhere() {
        for statement in all(&layout(Some("prod"))) {
            assert!(statement.contains(" ON CLUSTER 'prod'"), "{statement}");
            let engine = statement.lines().find_map(|line| line.strip_prefix("ENGINE = "));
            assert!(
                engine.is_none_or(|engine| engine.starts_with("Replicated")),
                "{statement}"
            );
            assert!(!statement.contains("non_replicated"), "{statement}");
        }
    }

    #[test]
    fn tables_that_are_inserted_into_recognise_a_retry() {
        for table in [
            "request_events",
            "request_metrics",
            "vllm_system_metrics",
            "request_segments",
            "tap_timings",
            "ledger_windows",
            "segment_costs",
        ] {
            let create = format!("CREATE TABLE IF NOT EXISTS {table}\n");
            let found = all(&layout(None))
                .into_iter()
                .find(|statement| statement.starts_with(&create));
            let found = found.unwrap_or_else(|| panic!("no table {table}"));
            assert!(
                found.contains("non_replicated_deduplication_window = 10000"),
                "{table}"
            );
        }
    }
}
