//! What Prometheus is given: that it takes it, that each alert comes when it should, and that somebody who is woken by one finds what to do.
#![cfg(unix)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_yaml::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask stands in the workspace")
}

fn text(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(path: impl AsRef<Path>) -> Value {
    serde_yaml::from_str(&text(path)).expect("YAML")
}

/// The YAML files of a directory below `prometheus/`.
fn files(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("prometheus").join(directory)).expect("a directory");
    let mut found: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    found.sort();
    assert!(!found.is_empty(), "prometheus/{directory} is empty");
    found
}

fn promtool(words: &[&str], files: &[PathBuf]) {
    let output = Command::new("promtool").args(words).args(files).output().unwrap_or_else(|error| {
        panic!("this test needs promtool on PATH (Debian: apt-get install --no-install-recommends prometheus): {error}")
    });
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {}: {said}", words.join(" "));
}

fn list<'v>(value: &'v Value, key: &str) -> impl Iterator<Item = &'v Value> {
    value.get(key).and_then(Value::as_sequence).into_iter().flatten()
}

fn string<'v>(value: &'v Value, key: &str) -> &'v str {
    value
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("no {key} in {value:?}"))
}

/// The alerts by name.
fn alerts() -> BTreeMap<String, Value> {
    let rules = yaml("prometheus/rules/alerts.yml");
    let all: Vec<_> = list(&rules, "groups")
        .flat_map(|group| list(group, "rules"))
        .cloned()
        .collect();
    let by_name: BTreeMap<_, _> = all
        .iter()
        .map(|rule| (string(rule, "alert").to_owned(), rule.clone()))
        .collect();
    assert_eq!(by_name.len(), all.len(), "two alerts have one name");
    by_name
}

#[test]
#[cfg_attr(
    target_os = "macos",
    ignore = "promtool comes with Debian's package of Prometheus"
)]
fn prometheus_takes_the_configuration_and_the_rules() {
    promtool(&["check", "config"], &[root().join("prometheus/prometheus.yml")]);
    promtool(&["check", "rules"], &files("rules"));
    let config = yaml("prometheus/prometheus.yml");
    let named: Vec<_> = list(&config, "rule_files").collect();
    assert_eq!(
        named,
        ["rules/*.yml"],
        "the rules that are tested are those that are used"
    );
}

#[test]
#[cfg_attr(
    target_os = "macos",
    ignore = "promtool comes with Debian's package of Prometheus"
)]
fn alerts_come_when_they_should() {
    promtool(&["test", "rules"], &files("tests"));
}

#[test]
fn each_alert_is_tested_both_ways() {
    let (mut comes, mut stays_away) = (BTreeSet::new(), BTreeSet::new());
    for file in files("tests") {
        let file = yaml(file);
        let cases = list(&file, "tests").flat_map(|test| list(test, "alert_rule_test"));
        for case in cases {
            let is_expected = list(case, "exp_alerts").next().is_some();
            let found = if is_expected { &mut comes } else { &mut stays_away };
            found.insert(string(case, "alertname").to_owned());
        }
    }
    let alerts: BTreeSet<_> = alerts().into_keys().collect();
    assert_eq!(comes, alerts, "left: alerts whose coming is tested");
    assert_eq!(stays_away, alerts, "left: alerts whose staying away is tested");
}

#[test]
fn each_alert_says_what_it_is_and_where_to_read_on() {
    for (name, alert) in alerts() {
        let annotations = &alert["annotations"];
        let (summary, description) = (string(annotations, "summary"), string(annotations, "description"));
        assert!(
            summary.ends_with('.') && !summary.contains("{{"),
            "{name}: a summary is one fixed sentence"
        );
        assert!(
            description.contains("{{ "),
            "{name}: a description says which one, and how much"
        );
        let severity = string(&alert["labels"], "severity");
        assert!(["page", "ticket"].contains(&severity), "{name}: {severity}");
        let anchor = format!("docs/RUNBOOK.md#{}", name.to_lowercase());
        assert_eq!(string(annotations, "runbook_url"), anchor, "{name}");
    }
}

#[test]
fn the_runbook_has_one_section_for_each_alert_and_none_for_others() {
    let runbook = text("docs/RUNBOOK.md");
    let sections: Vec<_> = runbook.split("\n## ").skip(1).collect();
    let names: Vec<_> = sections
        .iter()
        .map(|section| section.lines().next().unwrap_or_default())
        .collect();
    let alerts: BTreeSet<_> = alerts().into_keys().collect();
    assert_eq!(BTreeSet::from_iter(names.iter().map(ToString::to_string)), alerts);
    assert_eq!(names.len(), alerts.len(), "two sections have one name: {names:?}");
    for section in sections {
        for part in ["\n**Means**: ", "\n**Look at**: ", "\n**Do**: "] {
            assert!(section.contains(part), "no {part:?} in the section {section:?}");
        }
    }
    let anchors = runbook
        .split("](#")
        .skip(1)
        .filter_map(|rest| rest.split(')').next());
    let known: BTreeSet<_> = alerts.iter().map(|name| name.to_lowercase()).collect();
    for anchor in anchors {
        assert!(known.contains(anchor), "a link to #{anchor}, which is no section");
    }
}

#[test]
fn the_panels_that_the_runbook_names_exist() {
    let titles = [
        text("grafana/dashboards/live.json"),
        text("grafana/dashboards/history.json"),
    ]
    .concat();
    let runbook = text("docs/RUNBOOK.md");
    let looks = runbook.lines().filter(|line| !line.starts_with('#'));
    // In one line, since a name can go over the end of one.
    let looks = looks.collect::<Vec<_>>().join(" ").replace("**", "");
    let words = looks.split('*').skip(1).step_by(2);
    let dashboards = ["vLLM gateway: live", "history", "history and bill"];
    let named: BTreeSet<_> = words.filter(|name| !dashboards.contains(name)).collect();
    assert!(named.len() > 10, "{named:?}");
    for name in named {
        assert!(
            titles.contains(&format!("\"title\": \"{name}\"")),
            "no panel is called {name:?}"
        );
    }
}
