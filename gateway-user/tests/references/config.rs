//! `docs/CONFIG.md`, from the reader of the config itself and from the comments of `config.yaml`.
//!
//! The reader is asked by what it says of configs that are wrong: a key that no section has makes it name those that the section has, a section in the
//! place of a value makes it say what it takes, and values at the ends of what a type holds make it say its bounds. So nothing here has to be kept
//! up with the reader.

use super::{beginning, cell};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use vllm_gateway::config::{Config, ConfigError, effective_yaml, env};

const SHIPPED: &str = include_str!("../../../config.yaml");

/// A key that no section has, and that is like none.
const NO_KEY: &str = "zzzzzzzzzzzzzzzzzzzzzzzz";

/// Values that are in no bounds, or at their ends, by the beginning of what the reader expects.
const EXTREMES: [(&str, &[&str]); 11] = [
    ("a whole number", &["0", "4294967295"]),
    ("a duration", &["0s", "1000h", "1000000h"]),
    ("a size", &["0B", "3B", "10000000GiB"]),
    ("a number such as", &["-1", "0", "1000", "1000000000000"]),
    ("an amount in USD", &["-1", "0", "1000000000000"]),
    ("a port", &["0"]),
    ("true or false", &["true", "false"]),
    ("a secret text", &["x"]),
    ("a name", &["\"a b\""]),
    ("a text", &["\"a b\""]),
    ("the name of", &["\"a b\""]),
];

/// How reasons begin that are no bounds of the value: they say again what its type is, or are of the value that was tried.
const SAYS_NOTHING: [&str; 4] = [
    "if it is meant as text",
    "it is too large",
    "digits with at most one point",
    "visible ASCII characters only",
];

/// What stands at a key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Section,
    /// A list of sections.
    Entries,
    /// A list of values.
    Values,
    Value,
}

struct Key {
    /// As in `upstreams[].price[].gpus`.
    path: String,
    kind: Kind,
    expected: String,
    is_required: bool,
}

/// The page.
///
/// # Panics
/// When a key has no comment in `config.yaml`.
pub fn page() -> String {
    let shipped: Value = serde_yaml::from_str(SHIPPED).expect("config.yaml is YAML");
    let mut keys = Vec::new();
    walk("", &mut keys);
    assert!(
        keys.len() > 80,
        "only {} keys were found: is the walk broken?",
        keys.len()
    );
    let comments = comments(&keys);
    let missing: Vec<&str> = keys
        .iter()
        .map(|key| key.path.as_str())
        .filter(|path| !comments.contains_key(*path))
        .collect();
    assert!(
        missing.is_empty(),
        "config.yaml has no comment of its own above these keys: {missing:?}"
    );
    let variables = variables();
    let mut page = beginning(
        "Configuration",
        "the reader of the config (`gateway-user/src/config/`) and the comments of `config.yaml`",
    );
    page.push_str(
        "\nOne YAML file (`--config`), over which the environment goes. A key that is left out, or has no value, keeps its default; a key that is not known \
         is refused, with its line. An empty variable counts as unset. `vllm-gateway check-config` prints what is in force. Nothing is read again while the gateway runs.\n\n\
         Durations are written `200ms`, `15s`, `5m` or `1h`; sizes `64KiB`, `4MiB` or `1GiB`.\n",
    );
    for key in keys
        .iter()
        .filter(|key| key.kind != Kind::Value && key.kind != Kind::Values || !key.path.contains('.'))
    {
        section(&mut page, key, &keys, &comments, &variables, &shipped);
    }
    page
}

/// All keys below a section, in the order in which the reader names them.
fn walk(section: &str, keys: &mut Vec<Key>) {
    let probe = messages(&document(section, &json!({ NO_KEY: 1 })));
    let known = probe
        .iter()
        .find_map(|message| message.split_once(": known here: "));
    let (_, known) =
        known.unwrap_or_else(|| panic!("the reader does not tell the keys of `{section}`: {probe:?}"));
    let required: Vec<&str> = probe
        .iter()
        .filter_map(|message| message.split_once("` is missing"))
        .map(|(key, _)| key)
        .collect();
    for name in known.split(", ") {
        let path = if section.is_empty() {
            name.to_owned()
        } else {
            format!("{section}.{name}")
        };
        let is_required = required
            .iter()
            .any(|key| key.trim_start_matches('`').replace("[0]", "[]") == path);
        let (kind, expected) = what_is_at(&path);
        keys.push(Key {
            path: path.clone(),
            kind,
            expected,
            is_required,
        });
        match kind {
            Kind::Section => walk(&path, keys),
            Kind::Entries => walk(&format!("{path}[]"), keys),
            Kind::Values | Kind::Value => {}
        }
    }
}

fn what_is_at(path: &str) -> (Kind, String) {
    let told = about(path, &json!({ NO_KEY: 1 }));
    if told.iter().any(|message| message.starts_with("expected a list")) {
        let entries = messages(&document(&format!("{path}[]"), &json!({ NO_KEY: 1 })));
        if entries.iter().any(|message| message.contains(": known here: ")) {
            return (Kind::Entries, "a list of sections".to_owned());
        }
        return (
            Kind::Values,
            format!(
                "a list, each {}",
                expected(&about(&format!("{path}[]"), &json!({ NO_KEY: 1 })))
            ),
        );
    }
    if told.is_empty() {
        return (Kind::Section, "a section".to_owned());
    }
    (Kind::Value, expected(&told))
}

/// Out of `expected a duration such as 15s, found a section: …`.
fn expected(messages: &[String]) -> String {
    let found = messages
        .iter()
        .find_map(|message| message.strip_prefix("expected ")?.split(", found ").next());
    found
        .unwrap_or_else(|| panic!("no message says what is expected: {messages:?}"))
        .to_owned()
}

/// A config with one value in it. Entries of lists get what they must have, out of `config.yaml`.
fn document(path: &str, value: &Value) -> Value {
    let Some((first, rest)) = (!path.is_empty()).then(|| path.split_once('.').unwrap_or((path, ""))) else {
        return value.clone();
    };
    let (name, is_entry) = first
        .strip_suffix("[]")
        .map_or((first, false), |name| (name, true));
    let inner = document(rest, value);
    let inner = if is_entry { json!([inner]) } else { inner };
    json!({ name: inner })
}

/// What the reader says of a config; nothing if it takes it.
fn messages(config: &Value) -> Vec<String> {
    match Config::parse("c", &config.to_string(), &|_| None) {
        Ok(_) => Vec::new(),
        Err(ConfigError::Invalid(problems)) => problems.into_iter().map(|problem| problem.message).collect(),
        Err(error) => panic!("{config} is no YAML: {error}"),
    }
}

/// What the reader says of a value at a path, without the path.
fn about(path: &str, value: &Value) -> Vec<String> {
    told_of(path, messages(&document(path, value)))
}

fn told_of(path: &str, messages: Vec<String>) -> Vec<String> {
    let named = format!("`{}`: ", path.replace("[]", "[0]"));
    messages
        .iter()
        .filter_map(|message| message.strip_prefix(&named))
        .map(str::to_owned)
        .collect()
}

/// `config.yaml`'s own document with another value at a path: everything else is as it can be run with.
fn shipped_with(shipped: &Value, path: &str, value: Value) -> Value {
    let mut document = shipped.clone();
    let mut at = &mut document;
    for part in path.split('.') {
        let (name, is_entry) = part.strip_suffix("[]").map_or((part, false), |name| (name, true));
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        at = &mut at[name];
        if is_entry {
            if at.as_array().is_none_or(Vec::is_empty) {
                *at = json!([null]);
            }
            at = &mut at[0];
        }
    }
    *at = value;
    document
}

/// What the reader says of values at the ends of what a key's type holds.
fn bounds(key: &Key, shipped: &Value) -> String {
    let (path, expected) = match key.expected.strip_prefix("a list, each ") {
        Some(each) => (format!("{}[]", key.path), each),
        None => (key.path.clone(), key.expected.as_str()),
    };
    let extremes = EXTREMES
        .iter()
        .find(|(beginning, _)| expected.starts_with(beginning));
    let mut found: Vec<String> = Vec::new();
    for value in extremes.map_or(&[][..], |(_, values)| values) {
        let value: Value = serde_yaml::from_str(value).expect("a value");
        for message in told_of(&path, messages(&shipped_with(shipped, &path, value.clone()))) {
            let bound = match message
                .strip_prefix("expected ")
                .and_then(|rest| rest.split_once(", found "))
            {
                // What the type itself refuses: the reason says more than the type's name, which stands beside it.
                Some((what, rest)) if what == expected => {
                    rest.split_once(": ").map(|(_, reason)| reason.to_owned())
                }
                Some((what, rest)) => Some(match rest.split_once(": ") {
                    Some((_, why)) => format!("{what} ({why})"),
                    None => what.to_owned(),
                }),
                None => Some(message.replace('`', "")),
            };
            let bound = bound.map(|bound| {
                bound
                    .trim_start_matches("expected ")
                    .trim_start_matches("it must be ")
                    .to_owned()
            });
            let bound = bound.filter(|bound| !SAYS_NOTHING.iter().any(|words| bound.starts_with(words)));
            found.extend(bound.filter(|bound| !found.contains(bound)));
        }
    }
    found.join("; ")
}

/// The environment variable of each path, told by what the reader says of one that holds nonsense.
fn variables() -> BTreeMap<String, &'static str> {
    let mut found = BTreeMap::new();
    for variable in env::VARIABLES {
        let lookup = |name: &str| (name == variable).then(|| OsString::from("\u{1}"));
        let Err(ConfigError::Invalid(problems)) = Config::parse("c", "", &lookup) else {
            panic!("the reader takes nonsense from {variable}");
        };
        let message = &problems[0].message;
        let path = message.strip_prefix('`').and_then(|rest| rest.split_once('`'));
        let (path, _) = path.unwrap_or_else(|| panic!("{variable}: {message}"));
        let path = path.replace("[0]", "[]").replace("[1]", "[]");
        found
            .entry(path)
            .and_modify(|all: &mut &'static str| *all = "VLLM_URL`, `VLLM_EMBEDDINGS_URL")
            .or_insert(variable);
    }
    found
}

/// The comment that stands above each key in `config.yaml`, commented-out keys included.
fn comments(keys: &[Key]) -> BTreeMap<String, String> {
    let paths: BTreeSet<&str> = keys.iter().map(|key| key.path.as_str()).collect();
    let has_entries = |path: &str| {
        keys.iter()
            .any(|key| key.path == path && key.kind == Kind::Entries)
    };
    let mut found = BTreeMap::new();
    // Sections around the line: the column of each, and its path as that of its keys.
    let mut around: Vec<(usize, String)> = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in SHIPPED.lines() {
        let text = line.trim_start();
        let is_comment = text.starts_with('#');
        let stated = text.trim_start_matches(['#', ' ']).trim_start_matches("- ");
        let column = line.len() - stated.len();
        if text.is_empty() {
            comment.clear();
            continue;
        }
        if !is_comment {
            around.retain(|(outer, _)| *outer < column);
        }
        let name = stated
            .split_once(':')
            .map(|(name, _)| name)
            .filter(|name| !name.contains(' '));
        let path = name.and_then(|name| {
            let mut candidates = around.iter().rev().map(|(_, path)| format!("{path}.{name}"));
            let inside = candidates.find(|path| paths.contains(path.as_str()));
            inside.or_else(|| paths.contains(name).then(|| name.to_owned()))
        });
        let Some(path) = path else {
            assert!(
                is_comment,
                "config.yaml has a line that is no key and no comment: {line}"
            );
            comment.push(text.trim_start_matches('#').trim());
            continue;
        };
        if !comment.is_empty() {
            found
                .entry(path.clone())
                .or_insert_with(|| without_variables(&comment.join(" ")));
            comment.clear();
        }
        let keys_of_it = if has_entries(&path) {
            format!("{path}[]")
        } else {
            path
        };
        if keys
            .iter()
            .any(|key| key.path.starts_with(&format!("{keys_of_it}.")))
        {
            around.push((column, keys_of_it));
        }
    }
    found
}

/// A comment without the names of variables in brackets: they have a column of their own.
fn without_variables(comment: &str) -> String {
    let is_variables = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_uppercase() || b"_, ".contains(&byte))
    };
    let mut text = comment.to_owned();
    while let Some((before, _, after)) = text
        .split_once('[')
        .and_then(|(before, rest)| {
            rest.split_once(']')
                .map(|(inside, after)| (before, inside, after))
        })
        .filter(|(_, inside, _)| is_variables(inside))
    {
        text = format!("{} {}", before.trim_end(), after.trim_start());
    }
    text.trim().to_owned()
}

/// A section with a table of its values; or a value that stands at the top.
fn section(
    page: &mut String,
    of: &Key,
    keys: &[Key],
    comments: &BTreeMap<String, String>,
    variables: &BTreeMap<String, &'static str>,
    shipped: &Value,
) {
    let is_alone = of.kind == Kind::Value;
    let inside = if of.kind == Kind::Entries {
        format!("{}[]", of.path)
    } else {
        of.path.clone()
    };
    let _ = writeln!(page, "\n## `{inside}`\n\n{}", comments[&of.path]);
    if of.kind == Kind::Entries {
        let entries = value_at(&defaults(shipped, &of.path), &of.path)
            .and_then(|value| Some(value.as_array()?.len()))
            .unwrap_or(0);
        let _ = writeln!(
            page,
            "\nA list; by default it has {entries} {}. What is given replaces all of it.",
            if entries == 1 { "entry" } else { "entries" }
        );
    }
    page.push_str("\n| key | takes | default | environment | what |\n|---|---|---|---|---|\n");
    for key in keys {
        let is_child = key
            .path
            .strip_prefix(&inside)
            .and_then(|rest| rest.strip_prefix('.'))
            .is_some_and(|rest| !rest.contains('.'));
        if is_alone && key.path != of.path
            || !is_alone && !is_child
            || matches!(key.kind, Kind::Section | Kind::Entries)
        {
            continue;
        }
        let bounds = bounds(key, shipped);
        // What a duration or a size looks like is said once, at the beginning.
        let expected = match key.expected.split_once(" such as ") {
            Some((what @ ("a duration" | "a size"), _)) => what,
            _ => &key.expected,
        };
        let takes = if bounds.is_empty() {
            expected.to_owned()
        } else {
            format!("{expected}: {bounds}")
        };
        let default = if key.is_required {
            "must be given".to_owned()
        } else {
            default_of(key, shipped)
        };
        let variable = variables
            .get(&key.path)
            .map_or_else(String::new, |variable| format!("`{variable}`"));
        let name = key.path.rsplit('.').next().unwrap_or_default();
        let _ = writeln!(
            page,
            "| `{name}` | {} | {default} | {variable} | {} |",
            cell(&takes),
            cell(&comments[&key.path])
        );
    }
}

/// What is in force where a key's section says as little as it can.
fn defaults(shipped: &Value, path: &str) -> Value {
    let config = if path.contains("[]") {
        least(shipped, path)
    } else {
        json!({})
    };
    let config =
        Config::parse("c", &config.to_string(), &|_| None).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_yaml::from_str(&effective_yaml(&config)).expect("what is in force is YAML")
}

/// A config in which each list around a path has one entry with only what it must have.
fn least(shipped: &Value, path: &str) -> Value {
    let mut config = shipped_with(&json!({}), path, Value::Null);
    for _ in 0..8 {
        let missing = messages(&config).into_iter().find_map(|message| {
            let (key, _) = message.strip_prefix('`')?.split_once("` is missing")?;
            Some(key.replace("[0]", "[]"))
        });
        let Some(missing) = missing else { break };
        let sample = value_at(shipped, &missing)
            .cloned()
            .unwrap_or_else(|| sample(&missing));
        config = shipped_with(&config, &missing, sample);
    }
    config
}

/// A value for what an entry must have and `config.yaml` has only commented out.
fn sample(path: &str) -> Value {
    let name = path.rsplit('.').next().unwrap_or(path);
    let line = SHIPPED
        .lines()
        .map(|line| line.trim_start_matches([' ', '#', '-']));
    let mut values = line.filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let value = values
        .next()
        .unwrap_or_else(|| panic!("config.yaml shows no value of {path}"));
    serde_yaml::from_str(value).expect("a value")
}

fn value_at<'v>(document: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.')
        .try_fold(document, |at, part| match part.strip_suffix("[]") {
            Some(name) => at.get(name)?.get(0),
            None => at.get(part),
        })
}

fn default_of(key: &Key, shipped: &Value) -> String {
    match value_at(&defaults(shipped, &key.path), &key.path) {
        None | Some(Value::Null) => "none".to_owned(),
        Some(Value::Array(items)) if items.is_empty() => "empty".to_owned(),
        Some(Value::String(text)) => format!("`{text}`"),
        Some(value) => format!("`{value}`"),
    }
}
