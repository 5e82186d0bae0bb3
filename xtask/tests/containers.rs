//! All that the images run, as Compose starts it: entry points, commands and health checks are taken from `Dockerfile` and `docker-compose.yml`,
//! and run as processes on a machine of their own with the same environment, paths, users and names of hosts.
//!
//! There is no container engine where the tests run, so that no image is built, and the programs are this build's. ClickHouse's engine in a process
//! stands in for ClickHouse's server, and Debian's Prometheus for the image's. Grafana is not run.
#![cfg(target_os = "linux")]

mod host;
mod packaged;
mod system;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use host::{Host, Process, Running, is_clean};
use packaged::{Stage, engine, list, program, root, scratch, seconds, stages, string, understood, words};
use serde_json::Value;
use system::within_deadline;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// Not run: nothing here is Grafana, and the other gateway is the same image with another upstream.
const LEFT_OUT: [&str; 2] = ["grafana", "gateway-vllm"];

/// A service as it is run here.
struct Service {
    process: Process,
    health_check: Vec<String>,
    /// Files and directories, and where they are mounted.
    mounts: Vec<(PathBuf, String)>,
    needs: Vec<String>,
}

/// The services of the Compose file that are run; `scratch` gets what is made for them.
fn services(compose: &Value, scratch: &Path) -> BTreeMap<String, Service> {
    let stages = stages();
    let all = compose["services"].as_object().expect("services");
    let run = all.iter().filter(|(name, _)| !LEFT_OUT.contains(&name.as_str()));
    run.map(|(name, service)| {
        let stage = match service.pointer("/build/target") {
            Some(target) => stages[target.as_str().expect("text")].clone(),
            None => stand_in(name),
        };
        (
            name.clone(),
            resolve(service, &stage, compose, &scratch.join(name)),
        )
    })
    .collect()
}

/// What stands in for an image of somebody else's.
fn stand_in(service: &str) -> Stage {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let (entrypoint, user, directory) = match service {
        "prometheus" => (words(&["/bin/prometheus"]), "65534:65534", "/prometheus"),
        "clickhouse" => (
            words(&[
                "vllm-gateway",
                "embedded-clickhouse",
                "--listen=0.0.0.0:8123",
                "--data-dir=/var/lib/clickhouse",
                "--library=/opt/libchdb.so",
            ]),
            "65533:65533",
            "/",
        ),
        other => panic!("nothing stands in for {other}"),
    };
    Stage {
        entrypoint,
        user: user.to_owned(),
        working_directory: directory.to_owned(),
        ..Stage::default()
    }
}

/// What Compose says wins over what the image says.
fn resolve(service: &Value, stage: &Stage, compose: &Value, scratch: &Path) -> Service {
    let or = |pointer: &str, image: &[String]| match service.pointer(pointer) {
        Some(Value::Array(_)) => words(service, pointer),
        _ => image.to_vec(),
    };
    let entrypoint = or("/entrypoint", &stage.entrypoint);
    // An entry point of its own takes the image's command away.
    let replaced = service.pointer("/entrypoint").is_some_and(Value::is_array);
    let command = or("/command", if replaced { &[] } else { &stage.command });
    let mut environment = stage.environment.clone();
    for (name, value) in service["environment"].as_object().into_iter().flatten() {
        environment.insert(name.clone(), value.as_str().expect("text").to_owned());
    }
    // The stand-in has other names for what the image's environment says.
    if let Some(user) = environment.get("CLICKHOUSE_USER").cloned() {
        environment.insert("CLICKHOUSE_USERNAME".to_owned(), user);
    }
    let health_check = match or("/healthcheck/test", &[]) {
        _ if service.pointer("/healthcheck/disable") == Some(&Value::Bool(true)) => Vec::new(),
        test if test.is_empty() => stage.health_check.clone(),
        test => {
            assert_eq!(test[0], "CMD", "no shell is needed: {test:?}");
            test[1..].to_vec()
        }
    };
    Service {
        mounts: mounts(service, stage, compose, scratch),
        process: Process {
            words: [entrypoint, command].concat(),
            environment,
            user: stage.user.clone(),
            working_directory: if stage.working_directory.is_empty() {
                "/".to_owned()
            } else {
                stage.working_directory.clone()
            },
            // Those that it adds; all are dropped.
            capabilities: words(service, "/cap_add"),
        },
        health_check,
        needs: service["depends_on"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, how)| {
                assert_eq!(how["condition"], "service_healthy", "{name}");
                name.clone()
            })
            .collect(),
    }
}

/// What is mounted. A volume belongs to the image's user, as one has that was made of a directory of the image.
fn mounts(service: &Value, stage: &Stage, compose: &Value, scratch: &Path) -> Vec<(PathBuf, String)> {
    let mut mounts = Vec::new();
    for volume in list(service, "/volumes") {
        let (source, target) = (string(volume, "/source"), string(volume, "/target").to_owned());
        if volume["type"] == "bind" {
            assert_eq!(volume["read_only"], true, "{source} is this repository's");
            assert!(
                Path::new(source).exists(),
                "{source} is mounted, and does not exist"
            );
            mounts.push((source.into(), target));
        } else {
            let directory = scratch.join(source);
            fs::create_dir_all(&directory).expect("a writable directory");
            let (user, group) = stage.user.split_once(':').expect("user and group");
            let number = |text: &str| text.parse::<u32>().expect("a number");
            chown(&directory, Some(number(user)), Some(number(group))).expect("the tests run as root");
            mounts.push((directory, target));
        }
    }
    for config in list(service, "/configs") {
        let source = string(config, "/source");
        let file = scratch.join(source);
        fs::create_dir_all(scratch).expect("a writable directory");
        fs::write(&file, string(compose, &format!("/configs/{source}/content")))
            .expect("a writable directory");
        mounts.push((file, string(config, "/target").to_owned()));
    }
    mounts
}

fn is_healthy(host: &Host, service: &Service) -> bool {
    let check = Process {
        words: service.health_check.clone(),
        ..service.process.clone()
    };
    host.run(&check).is_some()
}

/// Starts all services, each when those that it needs are healthy.
fn start_all(host: &Host, services: &BTreeMap<String, Service>) -> BTreeMap<String, Running> {
    let mut running = BTreeMap::new();
    while running.len() < services.len() {
        let next = services.iter().find(|(name, service)| {
            !running.contains_key(*name) && service.needs.iter().all(|needed| running.contains_key(needed))
        });
        let (name, service) = next.expect("no circle");
        if !service.health_check.is_empty() {
            assert!(
                !is_healthy(host, service),
                "{name} is healthy before it is started: its check checks nothing"
            );
        }
        let mut process = host.spawn(name, &service.process);
        if !service.health_check.is_empty() {
            within_deadline(&format!("{name} becomes healthy"), || {
                assert_eq!(process.has_ended(), None, "{name} has ended: see its log");
                is_healthy(host, service).then_some(())
            });
        }
        running.insert(name.clone(), process);
    }
    running
}

/// What Prometheus answers: the series, each with its labels and its value.
fn query(host: &Host, metric: &str) -> Vec<(Value, f64)> {
    let page = host.page(
        &format!("http://prometheus:9090/api/v1/query?query={metric}"),
        &[],
    );
    let answer: Value = serde_json::from_str(&page.expect("Prometheus answers")).expect("JSON");
    list(&answer, "/data/result")
        .iter()
        .map(|series| {
            (
                series["metric"].clone(),
                string(series, "/value/1").parse().expect("a number"),
            )
        })
        .collect()
}

#[test]
fn what_the_images_run_works_as_compose_starts_it() {
    let scratch = scratch("containers");
    let understood = understood("containers", &[("GATEWAY_ADMIN_TOKEN", TOKEN)]);
    let compose: Value =
        serde_json::from_slice(&fs::read(understood.join("compose.json")).expect("a file")).expect("JSON");
    let services = services(&compose, &scratch);
    let names: Vec<&str> = services.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "clickhouse",
            "gateway",
            "load",
            "prometheus",
            "vllm-chat",
            "vllm-embeddings"
        ]
    );
    let mut mounts: Vec<_> = services
        .values()
        .flat_map(|service| service.mounts.clone())
        .collect();
    mounts.push((engine(), "/opt/libchdb.so".to_owned()));
    let programs = ["vllm-gateway", "vllm-sim", "vllm-load"].map(program);
    let host = Host::start(&scratch, &programs, &names, &mounts);
    let mut running = start_all(&host, &services);

    // Rows: asked as an operator does, with a command in the gateway's container.
    let report = Process {
        words: [
            "vllm-gateway",
            "report",
            "--since",
            "1h",
            "--by",
            "team",
            "--format",
            "csv",
        ]
        .map(str::to_owned)
        .to_vec(),
        ..services["gateway"].process.clone()
    };
    within_deadline("a request of each team is in ClickHouse", || {
        let report = host.run(&report)?;
        (1..=5)
            .all(|team| report.contains(&format!("team-{team},")))
            .then_some(())
    });
    within_deadline("Prometheus has read the gateway and both simulators", || {
        let up = query(&host, "up");
        let teams = query(&host, "gateway_requests_total");
        let is_there = teams
            .iter()
            .any(|(labels, value)| labels["team"] == "team-1" && *value > 0.0);
        (up.len() == 3 && up.iter().all(|(_, value)| *value == 1.0) && is_there).then_some(())
    });
    let rules = host
        .page("http://prometheus:9090/api/v1/rules", &[])
        .expect("Prometheus answers");
    assert!(
        rules.contains("\"alerts.yml\"") || rules.contains("/etc/prometheus/rules/alerts.yml"),
        "{rules}"
    );

    // The console's figures are for whoever has the token.
    let figures = "http://gateway:9464/api/teams";
    assert_eq!(host.page(figures, &[]), None);
    let bearer = format!("Authorization: Bearer {TOKEN}");
    let page = host.page(figures, &[&bearer]).expect("the token opens it");
    assert!(page.contains("team-1"), "{page}");

    ends_in_time(&compose, running.remove("gateway").expect("it runs"));
}

/// An engine sends SIGTERM, and kills what has not ended after the grace period.
fn ends_in_time(compose: &Value, mut gateway: Running) {
    let grace = seconds(string(compose, "/services/gateway/stop_grace_period"));
    let started = Instant::now();
    gateway.terminate();
    let status = within_deadline("the gateway ends", || gateway.has_ended());
    assert!(is_clean(status), "{status}");
    assert!(started.elapsed() < Duration::from_secs(grace));
}

/// Kubernetes gives added capabilities to root alone, whom all others are taken from; the chart's pod for taps is such a one.
#[test]
fn a_tap_s_pod_has_the_rights_that_it_needs() {
    let understood = understood("tap-pod", &[]);
    let rendered = fs::read_to_string(understood.join("everything.yaml")).expect("a file");
    let manifests = packaged::documents(&rendered);
    let of_kind = |kind: &str| {
        manifests
            .iter()
            .find(|manifest| manifest["kind"] == kind)
            .expect("it is there")
    };
    let pod = &of_kind("DaemonSet")["spec"]["template"]["spec"]["containers"][0];
    let scratch = scratch("tap-pod");
    let (config, state) = (scratch.join("config.yaml"), scratch.join("state"));
    // The cluster's names lead nowhere here, and its cgroups are others.
    fs::write(&config, "capture: tap\nstore: {url: none}\n").expect("a writable directory");
    fs::create_dir(&state).expect("a writable directory");
    let mounted = |index: usize| string(pod, &format!("/volumeMounts/{index}/mountPath")).to_owned();
    assert_eq!(
        mounted(2),
        "/sys/fs/cgroup",
        "the node's control groups, which are only read"
    );
    let mounts = [
        (config, format!("{}/config.yaml", mounted(0))),
        (state, mounted(1)),
    ];
    let host = Host::start(&scratch, &[program("vllm-gateway")], &[], &mounts);
    let process = Process {
        words: [vec!["vllm-gateway".to_owned()], words(pod, "/args")].concat(),
        environment: [
            ("GATEWAY_CAPTURE", "tap"),
            ("SPOOL_DIR", "/var/lib/vllm-gateway/spool"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        user: "0:0".to_owned(),
        working_directory: "/".to_owned(),
        capabilities: words(pod, "/securityContext/capabilities/add")
            .iter()
            .map(|name| name.to_ascii_lowercase())
            .collect(),
    };
    let mut tap = host.spawn("tap", &process);
    within_deadline("the tap is ready", || {
        assert_eq!(tap.has_ended(), None, "see {}", scratch.join("tap.log").display());
        host.page("http://127.0.0.1:9464/ready", &[])
    });
    tap.terminate();
    let status = within_deadline("the tap ends", || tap.has_ended());
    assert!(is_clean(status), "{status}");
}

#[test]
fn what_is_mounted_and_copied_exists() {
    for (name, stage) in stages() {
        for (sources, target) in stage.copies {
            let own = sources.iter().filter(|source| !source.starts_with("/out/"));
            for source in own {
                assert!(
                    root().join(source).exists(),
                    "{name}: {source} is copied to {target}"
                );
            }
        }
    }
}
