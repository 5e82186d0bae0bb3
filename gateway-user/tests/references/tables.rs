//! `docs/TABLES.md`, from the tables as a real engine has them, and `sql/meanings.yaml`.

use super::{beginning, cell};
use crate::support::installed::{ClickHouse, free_address};
use clickhouse::{Client, Row};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use vllm_gateway::store::migrate::{self, Layout};

/// Days that are told from each other in what the engine says of a table.
const RAW_DAYS: u32 = 111;
const LEDGER_DAYS: u32 = 1_222;

const MEANINGS: &str = include_str!("../../../sql/meanings.yaml");

#[derive(Row, Deserialize)]
struct Table {
    name: String,
    engine: String,
    engine_full: String,
    partition_key: String,
    sorting_key: String,
}

#[derive(Row, Deserialize)]
struct Column {
    table: String,
    name: String,
    #[serde(rename = "type")]
    kind: String,
    default_kind: String,
    default_expression: String,
}

/// What stands in `sql/meanings.yaml` of one table or view.
struct Meaning<'a> {
    table: &'a str,
    what: &'a str,
    written_by: &'a str,
    columns: Vec<(&'a str, &'a str)>,
}

/// The page.
///
/// # Panics
/// When a table or a column has no meaning, or a meaning no table or column.
pub async fn page() -> String {
    let (tables, columns) = schema().await;
    let document: serde_yaml::Value = serde_yaml::from_str(MEANINGS).expect("sql/meanings.yaml is YAML");
    let meanings = meanings(&document);
    check(&tables, &columns, &meanings);
    let mut page = beginning(
        "Tables",
        "the migrations in `sql/` and the meanings in `sql/meanings.yaml`",
    );
    page.push_str(
        "\nAll of the database `store.database` (default `vllm_attribution`). `NULL` is unknown, never 0. Times are UTC. Units are in names: `_us` microseconds, \
         `_nano_usd` billionths of a US dollar. On a cluster (`store.cluster`) engines are the replicated ones of the same names. A ReplacingMergeTree can hold a row twice \
         until it is merged: read it with `FINAL`.\n",
    );
    for meaning in &meanings {
        let table = tables
            .iter()
            .find(|table| table.name == meaning.table)
            .expect("checked");
        write_table(&mut page, table, meaning, &columns);
    }
    page
}

async fn schema() -> (Vec<Table>, Vec<Column>) {
    let dir = std::env::temp_dir().join(format!("reference-tables-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    let engine = ClickHouse::start(free_address(), &dir, None);
    let client = Client::default().with_url(format!("http://{}", engine.addr));
    let layout = Layout {
        database: "reference".to_owned(),
        cluster: None,
        raw_ttl_days: RAW_DAYS,
        ledger_ttl_days: LEDGER_DAYS,
    };
    migrate::migrate(&client, &layout).await.expect("a schema");
    let tables = client
        .query("SELECT name, engine, engine_full, partition_key, sorting_key FROM system.tables WHERE database = 'reference' ORDER BY name")
        .fetch_all()
        .await
        .expect("tables");
    let columns = client
        .query("SELECT table, name, type, default_kind, default_expression FROM system.columns WHERE database = 'reference' ORDER BY table, position")
        .fetch_all()
        .await
        .expect("columns");
    drop(engine);
    let _ = std::fs::remove_dir_all(&dir);
    (tables, columns)
}

fn text<'a>(value: Option<&'a serde_yaml::Value>, what: &str) -> &'a str {
    let text = value.and_then(serde_yaml::Value::as_str);
    text.unwrap_or_else(|| panic!("sql/meanings.yaml: {what} has no text"))
}

fn meanings(document: &serde_yaml::Value) -> Vec<Meaning<'_>> {
    let tables = document
        .as_mapping()
        .expect("sql/meanings.yaml is a map of tables");
    let mut meanings = Vec::new();
    for (name, of) in tables {
        let table = text(Some(name), "a table's name");
        let columns = of.get("columns").and_then(serde_yaml::Value::as_mapping);
        let columns = columns.unwrap_or_else(|| panic!("sql/meanings.yaml: {table} has no columns"));
        meanings.push(Meaning {
            table,
            what: text(of.get("what"), table),
            written_by: text(of.get("written_by"), table),
            columns: columns
                .iter()
                .map(|(column, means)| (text(Some(column), table), text(Some(means), table)))
                .collect(),
        });
    }
    meanings
}

fn check(tables: &[Table], columns: &[Column], meanings: &[Meaning<'_>]) {
    let made: BTreeSet<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let explained: BTreeSet<&str> = meanings.iter().map(|meaning| meaning.table).collect();
    assert_eq!(
        made, explained,
        "tables that the migrations make (left) and those in sql/meanings.yaml (right)"
    );
    for meaning in meanings {
        let made: Vec<&str> = of(columns, meaning.table)
            .map(|column| column.name.as_str())
            .collect();
        let explained: Vec<&str> = meaning.columns.iter().map(|(name, _)| *name).collect();
        let table = meaning.table;
        assert_eq!(
            made, explained,
            "columns of {table} (left) and those in sql/meanings.yaml (right)"
        );
    }
}

fn of<'a>(columns: &'a [Column], table: &'a str) -> impl Iterator<Item = &'a Column> {
    columns.iter().filter(move |column| column.table == table)
}

fn write_table(page: &mut String, table: &Table, meaning: &Meaning<'_>, columns: &[Column]) {
    let _ = writeln!(page, "\n## `{}`\n\n{}\n", table.name, meaning.what);
    let _ = write!(
        page,
        "Written by: {}. Engine: `{}`",
        meaning.written_by,
        engine(table)
    );
    if !table.sorting_key.is_empty() {
        let _ = write!(page, ", sorted by `{}`", table.sorting_key);
    }
    if !table.partition_key.is_empty() {
        let _ = write!(page, ", partitioned by `{}`", table.partition_key);
    }
    let _ = writeln!(
        page,
        ". {}\n\n| column | type | what |\n|---|---|---|",
        kept(table)
    );
    for (column, (_, means)) in of(columns, meaning.table).zip(&meaning.columns) {
        let mut means = cell(means);
        // A view's columns have none; a table's that the writer leaves out are computed.
        if column.default_kind == "DEFAULT" {
            let _ = write!(means, " Default: `{}`.", cell(&column.default_expression));
        }
        let _ = writeln!(page, "| `{}` | `{}` | {means} |", column.name, cell(&column.kind));
    }
}

/// The engine with its arguments, without what follows them.
fn engine(table: &Table) -> &str {
    let full = table.engine_full.as_str();
    let end = [" PARTITION BY", " ORDER BY", " TTL", " SETTINGS"]
        .iter()
        .filter_map(|clause| full.find(clause))
        .min();
    match &full[..end.unwrap_or(full.len())] {
        "" => &table.engine,
        engine => engine,
    }
}

fn kept(table: &Table) -> String {
    let Some((_, ttl)) = table.engine_full.split_once(" TTL ") else {
        return if table.engine.ends_with("View") {
            "A view: it keeps nothing."
        } else {
            "Kept for ever."
        }
        .to_owned();
    };
    let by = ttl.split(" SETTINGS").next().unwrap_or(ttl);
    let key = [(RAW_DAYS, "store.raw_days"), (LEDGER_DAYS, "store.ledger_days")]
        .into_iter()
        .find_map(|(days, key)| by.contains(&format!("toIntervalDay({days})")).then_some(key));
    let key = key.unwrap_or_else(|| panic!("{}: whose days are {by}?", table.name));
    let column = by.split(" + ").next().unwrap_or(by);
    format!("Kept for `{key}` after `{column}`.")
}
