//! Every query of every panel, against a system that runs: none fails, each finds something, and what must be empty while all is well fills when it
//! is not.
#![cfg(unix)]

mod panels;
mod system;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use panels::{dashboard, filled, list, panels, query, root, string, variables};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use system::{System, port_base, target_directory};

/// How long everything may take to be seen. vLLM's metrics are read every 15 s, and a share of what passes between two reads needs three; the rest
/// is for a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// Panels that are empty while nothing is wrong, and what is done to them.
const EMPTY_WHEN_WELL: [(&str, Fault); 2] = [
    ("Errors by team", Fault::UnknownModel),
    ("Refused by the gateway", Fault::NoTeam),
];

/// Panels that only the kernel probe fills.
const OF_THE_PROBE: [&str; 2] = ["Whose exchanges the tap saw", "What the tap missed"];

/// `tap.ring_bytes` of the repository's configuration: what the kernel holds of packets that nobody has read.
const RING_BYTES: usize = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Requests that vLLM refuses: nobody serves their model.
    UnknownModel,
    /// Requests that the gateway refuses: they name no team.
    NoTeam,
}

/// A running system, and who answers where.
struct Site {
    base: u16,
    began_ms: u64,
    /// Of `team` and `model`: everything, or a choice.
    chosen: bool,
}

impl Site {
    fn prometheus(&self, path: &str) -> Value {
        let (status, body) = ask(self.base + 1090, "GET", path, &[], "");
        let answer: Value =
            serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"));
        assert!(status == 200 && answer["status"] == "success", "{path}: {body}");
        answer["data"].clone()
    }

    /// The series of a query over the last minutes, with those of their values that are numbers.
    fn range(&self, expr: &str) -> Vec<(Value, Vec<f64>)> {
        let now_s = now_ms() / 1000;
        let path = format!(
            "/api/v1/query_range?query={}&start={}&end={now_s}&step=5",
            encoded(expr),
            self.began_ms / 1000
        );
        let data = self.prometheus(&path);
        let series = list(&data, "/result").map(|series| {
            let values = list(series, "/values").filter_map(|pair| pair[1].as_str()?.parse::<f64>().ok());
            (
                series["metric"].clone(),
                values.filter(|value| !value.is_nan()).collect(),
            )
        });
        series
            .filter(|(_, values): &(Value, Vec<f64>)| !values.is_empty())
            .collect()
    }

    /// An answer in JSON, asked for as the plugin asks.
    fn clickhouse(&self, sql: &str) -> Value {
        let path = "/?output_format_json_quote_64bit_integers=1&database=vllm_attribution";
        let text = format!("/* grafana dashboard='History', user='1' */\n{sql} FORMAT JSON");
        let (status, body) = ask(self.base + 123, "POST", path, &[], &text);
        assert_eq!(status, 200, "{body} of:\n{sql}");
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"))
    }

    fn metrics_page(&self) -> String {
        ask(self.base + 1464, "GET", "/metrics", &[], "").1
    }

    /// Sends one request to a port, through the gateway or past it.
    fn send(&self, port: u16, team: Option<&str>, model: &str) -> u16 {
        let body = format!(r#"{{"model": "{model}", "prompt": "Hello", "max_tokens": 2}}"#);
        let mut fields = vec![("Content-Type", "application/json")];
        fields.extend(team.map(|team| ("X-Team-ID", team)));
        ask(port, "POST", "/v1/completions", &fields, &body).0
    }

    /// Has much embedded, past the gateway. How long the answer is, in bytes.
    fn embed_much(&self) -> usize {
        let body = serde_json::json!({"model": "sim-embed", "input": vec!["Hello"; 512]});
        let fields = [("Content-Type", "application/json")];
        let (status, answer) = ask(
            self.base + 1,
            "POST",
            "/v1/embeddings",
            &fields,
            &body.to_string(),
        );
        assert_eq!(status, 200, "{answer}");
        answer.len()
    }

    fn cause(&self, fault: Fault) {
        let gateway = self.base + 80;
        let status = match fault {
            Fault::UnknownModel => self.send(gateway, Some("team-1"), "no-such-model"),
            Fault::NoTeam => self.send(gateway, None, "sim-llm"),
        };
        let expected = match fault {
            Fault::UnknownModel => 404,
            Fault::NoTeam => 400,
        };
        assert_eq!(status, expected, "{fault:?}");
    }

    /// What stands in for variables. In SQL values are quoted by the plugin, and all is a word that no team can have.
    fn values(&self, is_sql: bool) -> BTreeMap<&'static str, String> {
        let of = |all: &str, some: &str| {
            if self.chosen {
                some.to_owned()
            } else {
                all.to_owned()
            }
        };
        if !is_sql {
            return [
                ("team", of(".*", "team-1|team-2")),
                ("model", of(".*", "sim-llm|__unknown__")),
                ("upstream", of(".*", "chat|embeddings")),
                ("interval", "30s".to_owned()),
            ]
            .into();
        }
        let all = "'__all__'";
        let event = self.clickhouse("SELECT event_id FROM request_events ORDER BY ended_at LIMIT 1");
        [
            ("team", of(all, "'team-1','team-2'")),
            ("project", of(all, "'','project-1','project-2','project-3'")),
            ("model", of(all, "'sim-llm'")),
            ("upstream", of(all, "'chat'")),
            ("bucket:raw", of("0", "60")),
            ("slo_ms:raw", "500".to_owned()),
            ("a", "'team team-1'".to_owned()),
            ("b", "'model sim-llm'".to_owned()),
            ("request", format!("'{}'", string(&event, "/data/0/event_id"))),
            ("__from", (self.began_ms - 3_600_000).to_string()),
            ("__to", (now_ms() + 60_000).to_string()),
            ("__interval_ms", "20000".to_owned()),
        ]
        .into()
    }

    /// Whether all queries of a panel find something. That none fails, and that each is what its panel takes, is asserted.
    fn has_data(&self, panel: &Value) -> bool {
        list(panel, "/targets").all(|target| {
            let is_sql = target["query"].is_string();
            let text = filled(query(target), &self.values(is_sql));
            if is_sql {
                self.has_rows(panel, target, &text)
            } else {
                self.has_series(panel, target, &text)
            }
        })
    }

    fn has_series(&self, panel: &Value, target: &Value, expr: &str) -> bool {
        let series = self.range(expr);
        let legend = string(target, "/legendFormat");
        let labels = legend
            .split("{{")
            .skip(1)
            .filter_map(|rest| rest.split("}}").next());
        for label in labels {
            let has_label = series.iter().all(|(metric, _)| metric[label].is_string());
            assert!(
                has_label,
                "{}: a series without {label}, which its legend names: {series:?}",
                panel["title"]
            );
        }
        !series.is_empty()
    }

    fn has_rows(&self, panel: &Value, target: &Value, sql: &str) -> bool {
        let answer = self.clickhouse(sql);
        let columns: Vec<_> = list(&answer, "/meta")
            .map(|column| (string(column, "/name"), string(column, "/type")))
            .collect();
        if target["format"] == "time_series" {
            assert_is_series(panel, sql, &columns);
        }
        for matcher in list(panel, "/fieldConfig/overrides") {
            let name = string(matcher, "/matcher/options");
            assert!(
                columns.iter().any(|(column, _)| *column == name),
                "{}: no column {name:?}, which has options",
                panel["title"]
            );
        }
        list(&answer, "/data").next().is_some()
    }
}

/// What the plugin makes series of: time in milliseconds first, names of series in the columns that rows are grouped by, numbers in all others.
fn assert_is_series(panel: &Value, sql: &str, columns: &[(&str, &str)]) {
    assert_eq!(columns.first(), Some(&("t", "UInt64")), "{}", panel["title"]);
    let names: BTreeSet<_> = columns
        .iter()
        .filter(|(_, kind)| kind.contains("String"))
        .map(|(name, _)| *name)
        .collect();
    // Of the outermost query: at the beginning of a line.
    let grouped = sql
        .lines()
        .filter_map(|line| line.strip_prefix("GROUP BY "))
        .next_back()
        .unwrap_or("t");
    let mut keys: BTreeSet<_> = grouped.split(", ").collect();
    assert!(keys.remove("t"), "{}: grouped by {grouped}", panel["title"]);
    assert_eq!(
        names, keys,
        "{}: left are the columns of names, right what rows are grouped by",
        panel["title"]
    );
}

fn now_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since_1970.as_millis()).expect("milliseconds fit")
}

/// Every byte but letters and digits percent-encoded.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| {
        if byte.is_ascii_alphanumeric() {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    text.bytes().map(byte).collect()
}

/// The status and body of an answer.
fn ask(port: u16, method: &str, path: &str, fields: &[(&str, &str)], body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .unwrap_or_else(|error| panic!("port {port}: {error}"));
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let mut head = format!(
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Length: {}\r\n",
        body.len()
    );
    for (name, value) in fields {
        head += &format!("{name}: {value}\r\n");
    }
    stream
        .write_all(format!("{head}\r\n{body}").as_bytes())
        .expect("a server that reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer in HTTP to {path}: {text:?}"));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .expect("a status");
    let body = if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        unchunked(body)
    } else {
        body.to_owned()
    };
    (status, body)
}

fn unchunked(body: &str) -> String {
    let (mut rest, mut text) = (body, String::new());
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
        if size == 0 {
            break;
        }
        text += &after[..size];
        rest = after[size..].trim_start_matches("\r\n");
    }
    text
}

/// Asks until it is so; `meanwhile` is done before each time but the first.
fn wait(what: &str, mut is_so: impl FnMut() -> bool, mut meanwhile: impl FnMut()) {
    let started = Instant::now();
    while !is_so() {
        assert!(
            started.elapsed() < DEADLINE,
            "not within {} s: {what}",
            DEADLINE.as_secs()
        );
        thread::park_timeout(Duration::from_millis(500));
        meanwhile();
    }
}

/// Whether the kernel probe runs here.
fn sees_from_the_kernel(metrics_page: &str) -> bool {
    metrics_page.contains("gateway_capture_info{mode=\"proxy+tap\"}")
}

/// The panel with this title.
fn titled<'d>(dashboards: &[&'d Value], title: &str) -> &'d Value {
    let all = dashboards.iter().flat_map(|dashboard| panels(dashboard));
    all.into_iter()
        .find(|panel| panel["title"] == title)
        .unwrap_or_else(|| panic!("no panel {title}"))
}

#[test]
#[cfg_attr(
    target_os = "macos",
    ignore = "it starts what only Debian's package of Prometheus brings"
)]
fn every_panel_shows_what_it_is_for() {
    let base = port_base(4);
    let system = System::start(base, &[]);
    assert!(
        system.pids.contains_key("prometheus"),
        "this test needs prometheus on PATH (Debian: apt-get install --no-install-recommends prometheus)"
    );
    let mut site = Site {
        base,
        began_ms: now_ms(),
        chosen: false,
    };
    let (live, history) = (dashboard("live"), dashboard("history"));
    let dashboards = [&live, &history];
    let has_probe = sees_from_the_kernel(&site.metrics_page());

    let lacks_probe = |title: &str| !has_probe && OF_THE_PROBE.contains(&title);
    let is_empty =
        |title: &str| EMPTY_WHEN_WELL.iter().any(|(empty, _)| *empty == title) || lacks_probe(title);
    for panel in dashboards.iter().flat_map(|dashboard| panels(dashboard)) {
        let title = string(panel, "/title");
        if !is_empty(title) {
            wait(
                &format!("{title} shows something"),
                || site.has_data(panel),
                || {},
            );
        }
    }
    // Empty as long as nothing is wrong: all others have had their time by now.
    for panel in dashboards.iter().flat_map(|dashboard| panels(dashboard)) {
        let title = string(panel, "/title");
        assert!(
            !is_empty(title) || !site.has_data(panel),
            "{title} shows something, though nothing is wrong"
        );
    }
    for (title, fault) in EMPTY_WHEN_WELL {
        let panel = titled(&dashboards, title);
        wait(
            &format!("{title} shows {fault:?}"),
            || site.has_data(panel),
            || site.cause(fault),
        );
    }
    if has_probe {
        let direct = r#"rate(gateway_tap_exchanges_total{whose="direct"}[30s]) > 0"#;
        let past = || assert_eq!(site.send(base, None, "sim-llm"), 200);
        wait(
            "traffic past the gateway shows",
            || !site.range(direct).is_empty(),
            past,
        );
    }
    the_bill_is_proven(&site, &history);
    the_last_hour_is_told_alike(&site);
    a_stopped_upstream_shows(&site, &system, &live);
    choices_are_those_that_there_are(&site, &dashboards);
    site.chosen = true;
    for panel in dashboards.iter().flat_map(|dashboard| panels(dashboard)) {
        let title = string(panel, "/title");
        assert!(
            lacks_probe(title) || site.has_data(panel),
            "{title} shows nothing of what was chosen"
        );
    }
    what_is_limited_shows(&site, &live);
    metrics_that_are_asked_for_exist(&site, &live);
    if has_probe {
        what_the_probe_loses_shows(&site, &system, &live);
    }

    kill_process(system.pid(), Signal::TERM).expect("it runs");
    let (code, said) = system.ended();
    assert_eq!(code, Some(0), "{said}");
    fs::remove_dir_all(target_directory().join(format!("dev-{base}")))
        .expect("it stays when the system has gone");
}

/// The panel that is to prove the bill says that there is one, and that its lines sum to it.
fn the_bill_is_proven(site: &Site, history: &Value) {
    let proof = query(&titled(&[history], "Proof: the lines are the bill")["targets"][0]);
    let states = query(&titled(&[history], "How final it is")["targets"][0]);
    // A statement is three tables, written one after the other: between them the sums are those of different moments.
    let is_proven = || {
        let sums = &site.clickhouse(&filled(proof, &site.values(true)))["data"][0];
        let amount = |name: &str| sums[name].as_f64().expect("an amount");
        amount("bill") > 0.0 && amount("sum of the lines") > 0.0 && amount("difference") == 0.0
    };
    wait("the lines sum to the bill", is_proven, || {});
    let sum_up = || {
        let answer = site.clickhouse(&filled(states, &site.values(true)));
        list(&answer, "/data").all(|row| row["do not sum"] == "0")
    };
    wait("each window's lines sum to its bill", sum_up, || {});
}

/// The console, the metrics and ClickHouse speak of the same hour. It goes on while they are asked, so that they may be asked again.
fn the_last_hour_is_told_alike(site: &Site) {
    let lines = [
        ("teams", "teams_nano_usd"),
        ("__idle__", "idle_nano_usd"),
        ("__unattributed__", "unattributed_nano_usd"),
        ("__loading__", "loading_nano_usd"),
        ("__down__", "down_nano_usd"),
        ("__scaled_to_zero__", "scaled_to_zero_nano_usd"),
    ];
    let is_told_alike = || {
        let page = site.metrics_page();
        let (status, console) = ask(site.base + 1464, "GET", "/api/reconciliation", &[], "");
        assert_eq!(status, 200, "{console}");
        let console: Value = serde_json::from_str(&console).expect("JSON");
        let rows: Vec<_> = list(&console, "/reconciliation/costs").collect();
        let is_alike = rows.iter().all(|row| {
            let amount = |key: &str| row[key].as_u64().unwrap_or_else(|| panic!("no {key} in {row}"));
            let of_console: u64 = lines.iter().map(|(_, key)| amount(key)).sum();
            let upstream = string(row, "/upstream");
            let in_metrics = lines.iter().all(|(line, key)| {
                let name = format!("gateway_ledger_cost_usd{{line=\"{line}\",upstream=\"{upstream}\"}} ");
                let sample = page.lines().find_map(|text| text.strip_prefix(&name));
                sample.and_then(|value| value.parse::<f64>().ok()) == Some(amount(key) as f64 / 1e9)
            });
            let sql = format!(
                "SELECT toString(sum(bill_nano_usd)) AS bill FROM ledger_windows FINAL WHERE upstream = '{upstream}' \
                 AND window_start >= toDateTime({}, 'UTC') AND window_start < toDateTime({}, 'UTC')",
                amount("from_us") / 1_000_000,
                amount("to_us") / 1_000_000
            );
            let answer = site.clickhouse(&sql);
            let bill: Option<u64> = string(&answer, "/data/0/bill").parse().ok();
            in_metrics && of_console > 0 && bill == Some(of_console)
        });
        rows.len() == 2 && is_alike
    };
    wait("the last hour is told alike", is_told_alike, || {});
}

/// An upstream that hangs is down for the gateway, and on its way to an alert.
fn a_stopped_upstream_shows(site: &Site, system: &System, live: &Value) {
    let down = filled(
        query(&titled(&[live], "Upstreams down")["targets"][0]),
        &site.values(false),
    );
    let last = |expr: &str| {
        site.range(expr)
            .first()
            .and_then(|(_, values)| values.last().copied())
    };
    assert_eq!(last(&down), Some(0.0), "no upstream is down yet");
    let upstream = Pid::from_raw(system.pids["sim-embed"]).expect("a process id");
    kill_process(upstream, Signal::STOP).expect("it runs");
    let alert = r#"ALERTS{alertname="GatewayUpstreamDown", upstream="embeddings"}"#;
    wait(
        "the upstream is down",
        || last(&down) == Some(1.0) && !site.range(alert).is_empty(),
        || {},
    );
    kill_process(upstream, Signal::CONT).expect("it is only stopped");
    wait("the upstream is up", || last(&down) == Some(0.0), || {});
}

/// A team that sends more than it may is refused, and seen to be.
fn what_is_limited_shows(site: &Site, live: &Value) {
    let panel = query(&titled(&[live], "Limited requests")["targets"][0]);
    let limited = |team: &str| {
        let chosen = [("team", team.to_owned()), ("interval", "30s".to_owned())].into();
        let series = site.range(&filled(panel, &chosen));
        series.iter().any(|(metric, rates)| {
            let is_refusal = metric["limit"] == "requests_per_minute" && metric["action"] == "refused";
            is_refusal && rates.iter().any(|rate| *rate > 0.0)
        })
    };
    assert!(!limited(".*"), "nobody is limited yet");
    let mut refused = 0;
    wait(
        "what is refused shows",
        || limited("tight"),
        || refused += u32::from(site.send(site.base + 80, Some("tight"), "sim-llm") == 429),
    );
    assert!(refused > 0, "its limit stood in the way");
    assert!(!limited("team-.*"), "one team's limit is not another's");
    let page = site.metrics_page();
    assert!(
        page.contains("\ngateway_budget_usd{period=\"day\",team=\"team-1\"} 1\n"),
        "{page}"
    );
}

/// A gateway that reads nothing for a while: the ring fills, and what does not fit into it is lost, in the kernel and for real.
fn what_the_probe_loses_shows(site: &Site, system: &System, live: &Value) {
    let lost = filled(
        query(&titled(&[live], "What the tap missed")["targets"][0]),
        &site.values(false),
    );
    let is_lost = || {
        let series = site.range(&lost);
        let ring = series
            .iter()
            .find(|(metric, _)| metric["cause"] == "ring_full")
            .unwrap_or_else(|| panic!("no series of ring_full: {series:?}"));
        ring.1.iter().any(|rate| *rate > 0.0)
    };
    assert!(!is_lost(), "nothing is lost while the gateway reads");
    let gateway = Pid::from_raw(system.pids["gateway"]).expect("a process id");
    kill_process(gateway, Signal::STOP).expect("it runs");
    let mut sent_bytes = 0;
    while sent_bytes < 2 * RING_BYTES {
        sent_bytes += site.embed_much();
    }
    kill_process(gateway, Signal::CONT).expect("it is only stopped");
    wait("what was lost shows", is_lost, || {});
}

/// What the variables offer.
fn choices_are_those_that_there_are(site: &Site, dashboards: &[&Value]) {
    for variable in dashboards
        .iter()
        .flat_map(|dashboard| list(dashboard, "/templating/list"))
        .filter(|variable| variable["type"] == "query")
    {
        let name = string(variable, "/name");
        let offered = match string(variable, "/query/query").strip_prefix("label_values(") {
            Some(of) => {
                let (metric, label) = of
                    .trim_end_matches(')')
                    .split_once(", ")
                    .expect("a metric and a label");
                site.prometheus(&format!("/api/v1/label/{label}/values?match[]={metric}"))
                    .to_string()
            }
            None => site.clickhouse(string(variable, "/query"))["data"].to_string(),
        };
        let expected = match name {
            "team" | "a" | "b" => "team-5\"",
            "project" => "\"project-3\"",
            "model" => "\"sim-embed\"",
            "upstream" => "\"embeddings\"",
            other => panic!("the variable {other} is not expected"),
        };
        assert!(offered.contains(expected), "{name} offers {offered}");
    }
}

/// Names of metrics, in panels and rules, are those of the program's own page.
fn metrics_that_are_asked_for_exist(site: &Site, live: &Value) {
    let page = site.metrics_page();
    let rules = ["alerts.yml", "recording.yml"].map(|name| {
        let path = root().join("prometheus/rules").join(name);
        fs::read_to_string(path).expect("a file")
    });
    let text = panels(live)
        .iter()
        .map(|panel| panel["targets"].to_string())
        .collect::<String>()
        + &rules.concat();
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    let names: BTreeSet<_> = words
        .filter(|word| {
            ["gateway_", "gen_ai_", "process_"]
                .iter()
                .any(|start| word.starts_with(start))
        })
        .collect();
    assert!(names.len() > 30, "{names:?}");
    // Groups of rules are named like metrics.
    let groups: BTreeSet<_> = rules
        .iter()
        .flat_map(|rules| rules.lines())
        .filter_map(|line| line.trim().strip_prefix("- name: "))
        .collect();
    let has_probe = sees_from_the_kernel(&page);
    for name in names.difference(&groups) {
        let is_there =
            page.contains(&format!("\n{name}")) || (!has_probe && name.starts_with("gateway_tap_"));
        assert!(is_there, "{name} is asked for and not on the program's page");
    }
    assert!(
        variables(&rules.concat())
            .iter()
            .all(|name| ["labels", "value"].contains(name)),
        "rules have no variables"
    );
}
