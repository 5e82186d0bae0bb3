//! The gateway's own start on a spool that a power cut left, and what it made of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::watched::Watched;

/// The gateway in the guest, and the one that takes over its spool.
pub const GATEWAY_ID: &str = "cut";

/// What the gateway says when its spool is recovered and its sockets are bound.
pub const IS_UP: &str = "gateway is up";

/// How long a start may take, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What requests of this test are called, wherever a spool names one.
const REQUEST_ID_START: &str = "cut-";

/// A row of the spool, as far as it matters here.
#[derive(Clone, Debug)]
pub struct Row {
    /// The gateway's name for the request.
    pub event_id: String,
    /// The client's.
    pub request_id: String,
    /// Whether it says only that the gateway died meanwhile.
    pub is_crash: bool,
}

/// What a start made of a spool.
#[derive(Debug, Default)]
pub struct Recovered {
    /// What would be sent.
    pub rows: Vec<Row>,
    /// How many pieces were put aside as torn.
    pub torn: usize,
    /// Requests that the spool's files named before, and that neither rows nor quarantine name now.
    pub vanished: Vec<String>,
}

/// Starts `gateway` on the spool in `directory` and reads what it has then. A directory without a spool has no rows.
///
/// # Errors
/// When it does not start, or a batch is not what would be sent: JSON objects, one a line.
pub fn recover(gateway: &Path, directory: &Path) -> Result<Recovered> {
    let own = directory.join("spool").join(GATEWAY_ID);
    let before = ids_in(&files(&own)?, &["open", "jsonl"])?;
    start_once(gateway, directory)?;
    let quarantined = files(&own.join("quarantine"))?;
    let batches = files(&own)?;
    let mut recovered = Recovered::default();
    for batch in batches.iter().filter(|path| has_ending(path, &["jsonl"])) {
        let text = fs::read_to_string(batch).with_context(|| format!("{} is no text", batch.display()))?;
        ensure!(
            text.ends_with('\n'),
            "{} ends in the middle of a row",
            batch.display()
        );
        for line in text.lines() {
            let row = row_of(line).with_context(|| format!("{} holds no row: {line:?}", batch.display()))?;
            recovered.rows.push(row);
        }
    }
    for aside in &quarantined {
        recovered.torn += fs::read_to_string(aside)?.lines().count();
    }
    let mut after = ids_in(&batches, &["jsonl"])?;
    after.extend(ids_in(&quarantined, &["jsonl"])?);
    recovered.vanished = before.difference(&after).cloned().collect();
    Ok(recovered)
}

/// Lets the gateway recover and kills it: what it found is settled by then.
fn start_once(gateway: &Path, directory: &Path) -> Result<()> {
    let config = directory.join("config.yaml");
    let spool = directory.join("spool");
    let text = format!(
        "gateway: {{listen: \"127.0.0.1:0\", id: {GATEWAY_ID}}}\nadmin: {{listen: \"127.0.0.1:0\"}}\ncapture: proxy\n\
         store: {{url: \"http://127.0.0.1:9\"}}\nspool: {{dir: {}}}\n",
        spool.display()
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let mut command = Command::new(gateway);
    command
        .args(["run", "--config"])
        .arg(&config)
        .env_remove("RUST_LOG")
        .current_dir(directory);
    let mut gateway = Watched::start("gateway", command, START_LIMIT)?;
    gateway.wait_for(IS_UP)?;
    gateway.kill().map(drop)
}

fn row_of(line: &str) -> Result<Row> {
    let row: Value = serde_json::from_str(line)?;
    let text = |key: &str| {
        let value = row.get(key).and_then(Value::as_str);
        value
            .map(str::to_owned)
            .with_context(|| format!("it has no {key}"))
    };
    Ok(Row {
        event_id: text("event_id")?,
        request_id: text("request_id")?,
        is_crash: text("outcome")? == "gateway_crash",
    })
}

/// The requests that files with these endings name.
fn ids_in(files: &[PathBuf], endings: &[&str]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for path in files.iter().filter(|path| has_ending(path, endings)) {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        found.extend(ids_of(&String::from_utf8_lossy(&bytes)));
    }
    Ok(found)
}

fn ids_of(text: &str) -> impl Iterator<Item = String> {
    text.match_indices(REQUEST_ID_START).map(|(at, _)| {
        let name = |character: &char| character.is_ascii_alphanumeric() || *character == '-';
        text[at..].chars().take_while(name).collect()
    })
}

fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| endings.contains(&ending))
}

/// The files in a directory, which may be missing.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        found.extend(Some(entry?.path()).filter(|path| path.is_file()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_found_in_rows_torn_rows_and_quarantined_text() {
        let whole = r#"{"request_id":"cut-each-1-17","x":"cut-each-1-18"}"#;
        assert_eq!(
            ids_of(whole).collect::<Vec<_>>(),
            ["cut-each-1-17", "cut-each-1-18"]
        );
        let torn = "\0\0quest_id\":\"cut-each-2-3\0\0";
        let quarantined = serde_json::json!({"reason": "torn", "text": torn}).to_string();
        assert_eq!(
            ids_of(torn).collect::<Vec<_>>(),
            ids_of(&quarantined).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_row_needs_its_names_and_its_outcome() {
        let row = row_of(r#"{"event_id":"e","request_id":"r","outcome":"gateway_crash"}"#).expect("a row");
        assert!(row.is_crash && row.event_id == "e" && row.request_id == "r");
        assert!(row_of(r#"{"event_id":"e","outcome":"completed"}"#).is_err());
        assert!(row_of("{").is_err());
    }
}
