//! What is packaged agrees with the program and with itself: ports, paths, names, variables, times and versions.
//!
//! Whether it is what its readers take is `cargo xtask check-packaging`; whether it works, `xtask/tests/containers.rs` and `xtask/tests/unit.rs`.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod packaged;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use packaged::{
    check_config, config, documents, list, root, seconds, stages, string, text, understood, yaml,
};
use serde_json::{Value, json};

const CHART: &str = "packaging/helm/vllm-gateway";

/// Where Compose's and Helm's reading of the files is.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<std::path::PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| understood("agreement", &[("GATEWAY_ADMIN_TOKEN", "")]))
}

fn compose() -> Value {
    let text = fs::read_to_string(directory().join("compose.json")).expect("a file");
    serde_json::from_str(&text).expect("JSON")
}

/// The manifests for a set of values of the chart.
fn manifests(values: &str) -> Vec<Value> {
    documents(&fs::read_to_string(directory().join(values).with_extension("yaml")).expect("a file"))
}

/// Both sets.
fn all_manifests() -> Vec<Value> {
    [manifests("default"), manifests("everything")].concat()
}

/// The pods of the manifests: what they are part of, and their specification.
fn pods(manifests: &[Value]) -> Vec<(&str, &Value)> {
    let pods = manifests
        .iter()
        .filter(|manifest| manifest.pointer("/spec/template").is_some());
    pods.map(|manifest| (string(manifest, "/kind"), &manifest["spec"]["template"]["spec"]))
        .collect()
}

/// The variables of the pod's one container; for those out of a Secret, something that fits.
fn variables(pod: &Value) -> BTreeMap<String, String> {
    let of = |variable: &Value| {
        let value = variable["value"]
            .as_str()
            .unwrap_or("0123456789abcdef0123456789abcdef");
        (string(variable, "/name").to_owned(), value.to_owned())
    };
    list(pod, "/containers/0/env").iter().map(of).collect()
}

fn port_of(address: &str) -> u16 {
    address
        .rsplit(':')
        .next()
        .expect("a port")
        .parse()
        .expect("a port")
}

/// The ports of clients and of the admin server.
fn ports() -> [u16; 2] {
    let config = config();
    ["/gateway/listen", "/admin/listen"].map(|pointer| port_of(string(&config, pointer)))
}

/// Variables that the program reads, as config.yaml documents them.
fn known_variables() -> BTreeSet<String> {
    let is_one =
        |word: &&str| word.len() > 4 && word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    let config = text("config.yaml");
    let bracketed = config
        .split('[')
        .skip(1)
        .filter_map(|rest| rest.split(']').next());
    let known: BTreeSet<_> = bracketed
        .flat_map(|names| names.split(", "))
        .filter(is_one)
        .map(str::to_owned)
        .collect();
    assert!(
        known.contains("SPOOL_DIR") && known.contains("CLICKHOUSE_PASSWORD"),
        "{known:?}"
    );
    known
}

#[test]
fn images_and_manifests_have_the_program_s_ports() {
    let [clients, admin] = ports();
    let stages = stages();
    assert_eq!(stages["gateway"].ports, [clients, admin]);
    let url = format!("http://127.0.0.1:{admin}/health");
    assert_eq!(stages["gateway"].health_check.last(), Some(&url));
    for service in ["gateway", "gateway-vllm"] {
        let compose = compose();
        let service = &compose["services"][service];
        let published: Vec<_> = list(service, "/ports")
            .iter()
            .map(|port| port["target"].as_u64())
            .collect();
        assert_eq!(published, [Some(clients.into()), Some(admin.into())]);
        assert_eq!(port_of(string(service, "/environment/GATEWAY_ADMIN_ADDR")), admin);
    }
    let manifests = all_manifests();
    for (kind, pod) in pods(&manifests) {
        let named: BTreeMap<_, _> = list(pod, "/containers/0/ports")
            .iter()
            .map(|port| (string(port, "/name"), port["containerPort"].as_u64()))
            .collect();
        assert_eq!(named["admin"], Some(admin.into()), "{kind}");
        // A tap has no clients.
        assert_eq!(
            named.get("http").copied().flatten(),
            (kind == "StatefulSet").then_some(clients.into())
        );
        assert_eq!(port_of(&variables(pod)["GATEWAY_ADMIN_ADDR"]), admin, "{kind}");
    }
    let of_service = |manifest: &&Value| manifest["kind"] == "Service";
    for service in manifests.iter().filter(of_service) {
        for port in list(service, "/spec/ports") {
            let wanted = if port["name"] == "http" { clients } else { admin };
            assert_eq!(port["port"], wanted, "{}", service["metadata"]["name"]);
        }
    }
}

#[test]
fn every_variable_is_one_that_is_read() {
    let known = known_variables();
    let compose = compose();
    let mut given: BTreeSet<String> = stages()["gateway"].environment.keys().cloned().collect();
    for service in ["gateway", "gateway-vllm"] {
        let variables = compose["services"][service]["environment"]
            .as_object()
            .expect("variables");
        given.extend(variables.keys().cloned());
    }
    let manifests = all_manifests();
    for (_, pod) in pods(&manifests) {
        given.extend(variables(pod).into_keys());
    }
    let unknown: Vec<_> = given.difference(&known).collect();
    assert!(unknown.is_empty(), "vllm-gateway reads none of {unknown:?}");
    assert!(given.len() > 10, "{given:?}");
}

#[test]
fn each_configuration_is_one_that_the_program_runs_with() {
    let mut checked = 0;
    for values in ["default", "everything"] {
        let manifests = manifests(values);
        for (kind, pod) in pods(&manifests) {
            let name = string(pod, "/volumes/0/configMap/name");
            let map = manifests
                .iter()
                .find(|manifest| manifest["kind"] == "ConfigMap" && manifest["metadata"]["name"] == name);
            let text = string(
                map.unwrap_or_else(|| panic!("no ConfigMap {name}")),
                "/data/config.yaml",
            );
            let file = directory().join(format!("{values}-{kind}-config.yaml"));
            fs::write(&file, text).expect("a writable directory");
            let environment = variables(pod);
            let done = check_config(&file, &environment);
            assert!(
                done.status.success(),
                "{values}, {kind}: {}",
                String::from_utf8_lossy(&done.stderr)
            );
            let in_force = yaml(&String::from_utf8(done.stdout).expect("text"));
            assert_eq!(
                in_force["capture"], environment["GATEWAY_CAPTURE"],
                "{values}, {kind}"
            );
            assert_ne!(
                in_force["store"]["url"], "embedded",
                "a static program has no engine"
            );
            let mounted = string(pod, "/containers/0/volumeMounts/1/mountPath");
            assert!(
                string(&in_force, "/spool/dir").starts_with(mounted),
                "the spool must outlive the pod"
            );
            checked += 1;
        }
    }
    assert_eq!(checked, 3, "gateways twice, taps once");
    let compose = compose();
    for service in ["gateway", "gateway-vllm"] {
        let mut environment = stages()["gateway"].environment.clone();
        let own = compose["services"][service]["environment"]
            .as_object()
            .expect("variables");
        environment.extend(
            own.iter()
                .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned())),
        );
        let done = check_config(&root().join("config.yaml"), &environment);
        assert!(
            done.status.success(),
            "{service}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
}

#[test]
fn a_gateway_has_time_to_drain_before_it_is_killed() {
    let drain = seconds(string(&config(), "/gateway/drain_timeout"));
    let compose = compose();
    for service in ["gateway", "gateway-vllm"] {
        let grace = seconds(string(&compose["services"][service], "/stop_grace_period"));
        assert!(grace >= drain + 10, "{service}");
    }
    let manifests = all_manifests();
    for (kind, pod) in pods(&manifests) {
        let grace = pod["terminationGracePeriodSeconds"].as_u64().expect("seconds");
        assert!(grace >= drain + 10, "{kind}");
    }
}

#[test]
fn nothing_runs_with_more_rights_than_it_needs() {
    let user = stages()["gateway"].user.clone();
    let (number, _) = user.split_once(':').expect("user and group");
    let number: u64 = number.parse().expect("Kubernetes believes only a number");
    let manifests = all_manifests();
    for (kind, pod) in pods(&manifests) {
        let context = &pod["containers"][0]["securityContext"];
        assert_eq!(context["allowPrivilegeEscalation"], false, "{kind}");
        assert_eq!(context["readOnlyRootFilesystem"], true, "{kind}");
        assert_eq!(context["capabilities"]["drop"], json!(["ALL"]), "{kind}");
        assert_eq!(pod["automountServiceAccountToken"], false, "{kind}");
        if kind == "DaemonSet" {
            assert_eq!(context["capabilities"]["add"], json!(["BPF", "NET_ADMIN"]));
            assert_eq!(pod["hostNetwork"], false);
            assert_eq!(pod["hostPID"], false);
        } else {
            assert_eq!(context["capabilities"]["add"], Value::Null, "{kind}");
            assert_eq!(pod["securityContext"]["runAsUser"], number, "{kind}");
            assert_eq!(
                pod["securityContext"]["fsGroup"], number,
                "the spool is to be written by it"
            );
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{kind}");
        }
    }
    let compose = compose();
    for service in ["gateway", "gateway-vllm", "vllm-chat", "vllm-embeddings", "load"] {
        let service = &compose["services"][service];
        assert_eq!(service["read_only"], true);
        assert_eq!(service["cap_drop"], json!(["ALL"]));
    }
    for (name, service) in compose["services"].as_object().expect("services") {
        for port in list(service, "/ports") {
            let is_for_clients = port["target"] == ports()[0];
            let is_local = port["host_ip"] == "127.0.0.1";
            assert!(
                is_for_clients || is_local,
                "{name}: {port} is for other machines too"
            );
        }
    }
}

#[test]
fn prometheus_reads_in_containers_what_it_reads_on_a_host() {
    let strip = |file: &str| {
        let mut config = yaml(&text(file));
        for job in config["scrape_configs"].as_array_mut().expect("jobs") {
            job.as_object_mut().expect("a job").remove("authorization");
            for target in job["static_configs"].as_array_mut().expect("targets") {
                let port = port_of(string(target, "/targets/0"));
                target["targets"] = json!([port]);
            }
        }
        config
    };
    assert_eq!(
        strip("packaging/compose/prometheus.yml"),
        strip("prometheus/prometheus.yml")
    );
    let compose = compose();
    let services = compose["services"].as_object().expect("services");
    let config = yaml(&text("packaging/compose/prometheus.yml"));
    for job in list(&config, "/scrape_configs") {
        for target in list(job, "/static_configs") {
            let address = string(target, "/targets/0");
            let (host, _) = address.split_once(':').expect("host and port");
            assert!(services.contains_key(host), "no service is called {host}");
        }
    }
}

#[test]
fn grafana_has_in_containers_the_sources_that_it_has_on_a_host() {
    let strip = |file: &str| {
        let mut sources = yaml(&text(file));
        for source in sources["datasources"].as_array_mut().expect("sources") {
            let port = port_of(string(source, "/url"));
            let source = source.as_object_mut().expect("a source");
            source.insert("url".to_owned(), json!(port));
            source
                .retain(|name, _| !["basicAuth", "basicAuthUser", "secureJsonData"].contains(&name.as_str()));
        }
        sources
    };
    let on_host = "grafana/provisioning/datasources/vllm-gateway.yaml";
    assert_eq!(strip("packaging/compose/datasources.yml"), strip(on_host));
    let compose = compose();
    let clickhouse = &compose["services"]["clickhouse"]["environment"];
    let source = &yaml(&text("packaging/compose/datasources.yml"))["datasources"][1];
    assert_eq!(source["basicAuthUser"], clickhouse["CLICKHOUSE_USER"]);
    let gateway = &compose["services"]["gateway"]["environment"];
    assert_eq!(gateway["CLICKHOUSE_USERNAME"], clickhouse["CLICKHOUSE_USER"]);
    for reader in ["gateway", "gateway-vllm", "grafana"] {
        let given = &compose["services"][reader]["environment"]["CLICKHOUSE_PASSWORD"];
        assert_eq!(given, &clickhouse["CLICKHOUSE_PASSWORD"], "{reader}");
    }
}

#[test]
fn the_operator_gets_the_rules_that_are_tested_and_the_job_that_they_look_for() {
    let manifests = manifests("everything");
    let of_kind = |kind: &'static str| manifests.iter().filter(move |manifest| manifest["kind"] == kind);
    let mut names = BTreeSet::new();
    for rule in of_kind("PrometheusRule") {
        let name = string(rule, "/metadata/name")
            .rsplit('-')
            .next()
            .expect("a name")
            .to_owned();
        assert_eq!(
            rule["spec"],
            yaml(&text(format!("prometheus/rules/{name}.yml"))),
            "{name}"
        );
        names.insert(format!("{name}.yml"));
    }
    let entries = fs::read_dir(root().join("prometheus/rules")).expect("a directory");
    let files: BTreeSet<_> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    assert_eq!(names, files, "left: rules of the chart");
    let monitor = of_kind("ServiceMonitor").next().expect("one");
    let label = string(monitor, "/spec/jobLabel").replace('/', "~1");
    let watched =
        of_kind("Service").find(|service| service.pointer(&format!("/metadata/labels/{label}")).is_some());
    let watched = watched.expect("a service has the job's label");
    assert_eq!(string(watched, &format!("/metadata/labels/{label}")), "gateway");
    assert!(text("prometheus/rules/alerts.yml").contains("job=\"gateway\""));
    for (name, value) in monitor["spec"]["selector"]["matchLabels"]
        .as_object()
        .expect("labels")
    {
        assert_eq!(
            &watched["metadata"]["labels"][name], value,
            "the monitor does not find the service"
        );
    }
}

#[test]
fn versions_are_those_of_the_workspace() {
    let manifest = text("Cargo.toml");
    let of_workspace = |key: &str| {
        let line = manifest
            .lines()
            .find(|line| line.starts_with(&format!("{key} = ")));
        line.expect("it is there")
            .split('"')
            .nth(1)
            .expect("in quotes")
            .to_owned()
    };
    let chart = yaml(&text(format!("{CHART}/Chart.yaml")));
    assert_eq!(chart["appVersion"], of_workspace("version"));
    assert!(
        text("Dockerfile").contains(&format!("ARG RUST_VERSION={}", of_workspace("rust-version"))),
        "the image is built with another Rust"
    );
}

/// What the compiler reads must be in the images' build context.
#[test]
fn the_build_context_holds_what_the_program_is_made_of() {
    let ignored = text(".dockerignore");
    let kept: Vec<_> = ignored
        .lines()
        .filter_map(|line| line.strip_prefix('!'))
        .collect();
    let is_kept = |path: &str| {
        kept.iter()
            .any(|kept| path == *kept || path.starts_with(&format!("{kept}/")))
    };
    let mut waiting = vec![root().join("gateway-user/src")];
    let mut found = 0;
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(
                fs::read_dir(&path)
                    .expect("a directory")
                    .map(|entry| entry.expect("an entry").path()),
            );
            continue;
        }
        let source = fs::read_to_string(&path).unwrap_or_default();
        for marker in ["include_str!(\"", "include_bytes!(\""] {
            for rest in source.split(marker).skip(1) {
                let relative = rest.split('"').next().expect("a path");
                let file = path.parent().expect("a directory").join(relative).canonicalize();
                let file = file.unwrap_or_else(|error| panic!("{relative} of {}: {error}", path.display()));
                let file = file
                    .strip_prefix(root())
                    .expect("in the repository")
                    .to_str()
                    .expect("text")
                    .to_owned();
                assert!(
                    is_kept(&file),
                    "{file} is compiled into {}, and .dockerignore leaves it out",
                    path.display()
                );
                found += 1;
            }
        }
    }
    assert!(found > 10, "{found}");
    for needed in [
        "Cargo.toml",
        "Cargo.lock",
        "xtask/Cargo.toml",
        "gateway-common/src/lib.rs",
        "gateway-ebpf/prebuilt/x",
    ] {
        assert!(is_kept(needed), "{needed}");
    }
    assert!(!is_kept(".env") && !is_kept("target/x") && !is_kept(".git/x"));
}
