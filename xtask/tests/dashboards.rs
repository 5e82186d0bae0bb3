//! What every dashboard must keep to, so that people can read it and Grafana can load it. Grafana's own types of dashboards are checked by
//! `cargo xtask check-dashboards`, and the queries by `xtask/tests/dashboards_live.rs`.

mod panels;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use panels::{CLICKHOUSE, PROMETHEUS, dashboard, list, panels, query, root, string, variables};
use serde_json::Value;

const DASHBOARDS: [&str; 2] = ["live", "history"];

/// What Grafana knows by itself.
const BUILT_IN: [&str; 5] = [
    "__from",
    "__to",
    "__interval_ms",
    "__url_time_range",
    "__value.raw",
];

fn each(check: impl Fn(&str, &Value)) {
    for name in DASHBOARDS {
        check(name, &dashboard(name));
    }
}

#[test]
fn each_file_is_tested() {
    let entries = fs::read_dir(root().join("grafana/dashboards")).expect("a directory");
    let mut found: Vec<_> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("a name")
        })
        .collect();
    found.sort();
    assert_eq!(found, ["history.json", "live.json"]);
}

#[test]
fn each_panel_has_a_title_a_description_a_unit_and_a_source() {
    each(|name, dashboard| {
        let source = if name == "live" { PROMETHEUS } else { CLICKHOUSE };
        let mut titles = BTreeSet::new();
        for panel in panels(dashboard) {
            let title = string(panel, "/title");
            assert!(
                !title.is_empty() && titles.insert(title),
                "{name}: the title {title:?} is empty or there twice"
            );
            let description = string(panel, "/description");
            assert!(
                description.len() > 20 && description.ends_with('.'),
                "{name}, {title}: {description:?} describes little"
            );
            assert!(
                !string(panel, "/fieldConfig/defaults/unit").is_empty(),
                "{name}, {title}: no unit"
            );
            assert_eq!(string(panel, "/datasource/uid"), source, "{name}, {title}");
            let mut letters = BTreeSet::new();
            for target in list(panel, "/targets") {
                assert_eq!(target["datasource"], panel["datasource"], "{name}, {title}");
                assert!(
                    letters.insert(string(target, "/refId")),
                    "{name}, {title}: two targets have one letter"
                );
                assert!(!query(target).is_empty());
            }
            assert!(!letters.is_empty(), "{name}, {title}: no query");
        }
    });
}

#[test]
fn panels_lie_side_by_side_and_have_numbers_of_their_own() {
    each(|name, dashboard| {
        let (mut ids, mut taken) = (BTreeSet::new(), BTreeMap::new());
        for panel in list(dashboard, "/panels") {
            let title = string(panel, "/title");
            assert!(
                ids.insert(panel["id"].as_u64().expect("a number")),
                "{name}, {title}: the id is there twice"
            );
            let at = |key: &str| {
                panel["gridPos"][key]
                    .as_u64()
                    .unwrap_or_else(|| panic!("{name}, {title}: no {key}"))
            };
            assert!(
                at("w") > 0 && at("h") > 0 && at("x") + at("w") <= 24,
                "{name}, {title}: beyond the grid"
            );
            for cell in
                (at("x")..at("x") + at("w")).flat_map(|x| (at("y")..at("y") + at("h")).map(move |y| (x, y)))
            {
                if let Some(other) = taken.insert(cell, title) {
                    panic!("{name}: {title} lies over {other} at {cell:?}");
                }
            }
        }
        let first = list(dashboard, "/panels").next().expect("a panel");
        assert_eq!(first["type"], "row", "{name}: panels stand in rows");
    });
}

#[test]
fn every_variable_that_is_used_exists_and_the_other_way_round() {
    each(|name, dashboard| {
        let defined: BTreeSet<_> = list(dashboard, "/templating/list")
            .map(|variable| string(variable, "/name"))
            .collect();
        let panels = dashboard["panels"].to_string();
        let used: BTreeSet<_> = variables(&panels)
            .into_iter()
            .filter(|name| !BUILT_IN.contains(name))
            .map(|name| name.split(':').next().unwrap_or(name))
            .collect();
        assert_eq!(used, defined, "{name}: left is used in panels, right is defined");
        for variable in list(dashboard, "/templating/list") {
            for key in ["/label", "/description"] {
                assert!(
                    !string(variable, key).is_empty(),
                    "{name}: a variable without {key}: {variable}"
                );
            }
        }
    });
}

#[test]
fn links_lead_to_dashboards_that_exist() {
    let uids: BTreeSet<_> = DASHBOARDS
        .map(|name| string(&dashboard(name), "/uid").to_owned())
        .into();
    assert_eq!(uids.len(), 2);
    each(|name, dashboard| {
        let text = dashboard.to_string();
        let linked: BTreeSet<_> = text
            .split("\"/d/")
            .skip(1)
            .filter_map(|rest| rest.split(['"', '?']).next())
            .map(str::to_owned)
            .collect();
        assert!(linked.is_subset(&uids), "{name}: {linked:?}");
        let others: Vec<_> = list(dashboard, "/links")
            .map(|link| string(link, "/url").trim_start_matches("/d/"))
            .collect();
        assert!(
            matches!(others[..], [uid] if uid != string(dashboard, "/uid")),
            "{name} does not lead to the other one: {others:?}"
        );
        for link in list(dashboard, "/links") {
            assert!(
                link["keepTime"] == true && link["includeVars"] == true,
                "{name}: a link that forgets what was chosen"
            );
        }
    });
}

#[test]
fn sources_are_provisioned_as_panels_name_them() {
    let path = root().join("grafana/provisioning/datasources/vllm-gateway.yaml");
    let sources: serde_yaml::Value =
        serde_yaml::from_str(&fs::read_to_string(path).expect("a file")).expect("YAML");
    let sources: BTreeMap<_, _> = sources["datasources"]
        .as_sequence()
        .expect("a list")
        .iter()
        .map(|source| {
            (
                source["uid"].as_str().expect("a uid").to_owned(),
                source["type"].as_str().expect("a type").to_owned(),
            )
        })
        .collect();
    each(|name, dashboard| {
        let variables = list(dashboard, "/templating/list").filter(|variable| variable["type"] == "query");
        for panel in panels(dashboard).into_iter().chain(variables) {
            let uid = string(panel, "/datasource/uid");
            let kind = sources.get(uid).map(String::as_str);
            assert_eq!(kind, Some(string(panel, "/datasource/type")), "{name}: {uid}");
        }
    });
}

#[test]
fn names_that_clients_give_come_into_sql_quoted_by_the_plugin() {
    // It escapes quotes and backslashes; Grafana's own formats leave backslashes, so that a team called `\` would end the text too late.
    let dashboard = dashboard("history");
    for panel in panels(&dashboard) {
        for target in list(panel, "/targets") {
            let text = query(target);
            for name in variables(text) {
                let is_number = name.starts_with("__") || ["bucket:raw", "slo_ms:raw"].contains(&name);
                let quoted = text.matches(&format!("IN (${{{name}}})")).count();
                let all =
                    text.matches(&format!("${{{name}}}")).count() + text.matches(&format!("${name}")).count();
                assert!(
                    is_number || quoted == all,
                    "{}: ${{{name}}} must stand as `IN (${{{name}}})`",
                    panel["title"]
                );
            }
        }
    }
}
