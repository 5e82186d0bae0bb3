//! The dashboards as the tests read them: panels, their queries, and variables.
#![allow(dead_code, reason = "no test uses all of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

pub const PROMETHEUS: &str = "vllm-gateway-prometheus";
pub const CLICKHOUSE: &str = "vllm-gateway-clickhouse";

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask stands in the workspace")
}

pub fn dashboard(name: &str) -> Value {
    let path = root()
        .join("grafana/dashboards")
        .join(name)
        .with_extension("json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

pub fn list<'v>(value: &'v Value, pointer: &str) -> impl Iterator<Item = &'v Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

pub fn string<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// All panels but rows.
pub fn panels(dashboard: &Value) -> Vec<&Value> {
    let found: Vec<_> = list(dashboard, "/panels")
        .filter(|panel| panel["type"] != "row")
        .collect();
    assert!(found.len() > 10, "a dashboard of {} panels", found.len());
    found
}

/// The query of a target: PromQL or SQL.
pub fn query(target: &Value) -> &str {
    let found = [string(target, "/expr"), string(target, "/query")].concat();
    assert!(!found.is_empty(), "a target without a query: {target}");
    if target["expr"].is_string() {
        string(target, "/expr")
    } else {
        string(target, "/query")
    }
}

/// The variables that a text uses, with how they are to be written: `${team:raw}` is `team:raw`, and `$team` is `team`.
pub fn variables(text: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for rest in text.split('$').skip(1) {
        let name = match rest.strip_prefix('{') {
            Some(braced) => braced.split('}').next(),
            None => rest
                .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                .next(),
        };
        found.extend(name.filter(|name| !name.is_empty()));
    }
    found
}

/// A query with values in place of its variables, as Grafana and its plugin put them in.
pub fn filled(query: &str, values: &BTreeMap<&str, String>) -> String {
    let mut text = query.to_owned();
    // The longest first, so that `$team` is not found in `$teams`.
    let mut names: Vec<_> = variables(query).into_iter().collect();
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    for name in names {
        let value = values
            .get(name)
            .unwrap_or_else(|| panic!("no value for ${name} of {query}"));
        text = text
            .replace(&format!("${{{name}}}"), value)
            .replace(&format!("${name}"), value);
    }
    text
}
