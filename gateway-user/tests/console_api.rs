//! The API of the console, asked as anyone on the network could: who gets to see what, and that its description is true.

mod support;

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use support::{DEADLINE, Sim, TestGateway, eventually, exchange, metric_sum, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const API: [&str; 5] = [
    "/api/teams",
    "/api/upstreams",
    "/api/requests",
    "/api/reconciliation",
    "/api/live",
];

/// Status and body of the answer to a request with these fields.
async fn ask(addr: SocketAddr, method: &str, path: &str, fields: &str) -> (u16, String, String) {
    let request = format!("{method} {path} HTTP/1.1\r\n{fields}Connection: close\r\n\r\n");
    let answer = exchange(addr, request.as_bytes()).await;
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head
        .split(' ')
        .nth(1)
        .expect("a status")
        .parse()
        .expect("a number");
    (status, head.to_ascii_lowercase(), body.to_owned())
}

async fn get(addr: SocketAddr, path: &str, fields: &str) -> (u16, Value) {
    let (status, _, body) = ask(addr, "GET", path, fields).await;
    (status, serde_json::from_str(&body).unwrap_or(Value::Null))
}

const LOCAL: &str = "Host: localhost:9464\r\n";

fn bearer(token: &str) -> String {
    format!("Host: console.example\r\nAuthorization: Bearer {token}\r\n")
}

fn tokens(tokens: &[(&str, &str)]) -> String {
    let mut yaml = "admin:\n  tokens:\n".to_owned();
    for (number, (token, scope)) in tokens.iter().enumerate() {
        let digest = Sha256::digest(token.as_bytes());
        let digest = digest.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a text takes all");
            text
        });
        writeln!(
            yaml,
            "    - {{name: t{number}, sha256: \"{digest}\", scope: \"{scope}\"}}"
        )
        .expect("a text takes all");
    }
    yaml
}

/// The next event of a stream of them.
async fn event(stream: &mut TcpStream, read: &mut String) -> Value {
    let next = async {
        loop {
            if let Some((event, rest)) = read.split_once("\n\n") {
                // Chunk sizes stand on lines of their own.
                let data = event.lines().find_map(|line| line.strip_prefix("data: "));
                let data = data.map(|data| serde_json::from_str(data).expect("JSON"));
                *read = rest.to_owned();
                if let Some(data) = data {
                    return data;
                }
                continue;
            }
            let mut bytes = [0; 64 * 1024];
            let count = stream.read(&mut bytes).await.expect("more of the stream");
            assert!(count > 0, "the stream ended: {read}");
            read.push_str(std::str::from_utf8(&bytes[..count]).expect("text"));
        }
    };
    tokio::time::timeout(DEADLINE, next).await.expect("an event")
}

async fn live(addr: SocketAddr, fields: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).await.expect("a connection");
    let request = format!("GET /api/live HTTP/1.1\r\n{fields}\r\n");
    stream.write_all(request.as_bytes()).await.expect("it is taken");
    stream
}

const ASK: &str = r#"{"model": "tiny", "max_tokens": 5, "stream": true, "messages": [{"role": "user", "content": "a prompt that nobody may see"}]}"#;

async fn send(gateway: &TestGateway, team: &str, count: usize) {
    let before = gateway.events.now().len();
    for _ in 0..count {
        exchange(gateway.addr, &post("/v1/chat/completions", team, ASK)).await;
    }
    gateway.events.wait_for(before + count);
}

/// Every path of a document, such as `teams[].team`.
fn paths(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                paths(value, &path, into);
            }
        }
        Value::Array(items) => items
            .iter()
            .for_each(|item| paths(item, &format!("{path}[]"), into)),
        _ => {
            into.insert(path.to_owned());
        }
    }
}

#[tokio::test]
async fn what_is_described_is_what_is_served() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let limits = "limits: {default: {requests_per_minute: 60, tokens_per_minute: 100000, concurrent_requests: 9, budget: {usd: 5}}}";
    let more = format!("vllm: {{scrape_interval: 100ms}}\n{limits}\n");
    let gateway = TestGateway::before(sim.addr, None, &more);
    send(&gateway, "search", 2).await;
    // Once the engine was scraped there is something in each list.
    eventually("the models of the engine", async || {
        let (_, upstreams) = get(gateway.admin, "/api/upstreams", LOCAL).await;
        (!upstreams["upstreams"][0]["models"].as_array()?.is_empty()).then_some(())
    })
    .await;
    // A request counts in its second once that is over.
    eventually("a second that has passed", async || {
        let (_, teams) = get(gateway.admin, "/api/teams", LOCAL).await;
        (!teams["teams"][0]["requests_by_second"].as_array()?.is_empty()).then_some(())
    })
    .await;
    let mut served = BTreeSet::new();
    for path in &API[..4] {
        let (status, document) = get(gateway.admin, path, LOCAL).await;
        assert_eq!((status, &document["version"]), (200, &1.into()), "{path}");
        paths(&document, "", &mut served);
    }
    let mut stream = live(gateway.admin, LOCAL).await;
    let snapshot = event(&mut stream, &mut String::new()).await;
    paths(&snapshot, "", &mut served);
    assert!(!snapshot.to_string().contains("nobody may see"), "{snapshot}");

    let text = include_str!("../../docs/API.md");
    let shapes = text.split_once("## Shapes").expect("a chapter").1;
    let described = shapes
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let described: BTreeSet<String> = described.map(str::to_owned).collect();
    // What a gateway without probe and store has no values of.
    let absent = |path: &str| {
        path.starts_with("reconciliation.tap.")
            || path.starts_with("reconciliation.store.")
            || path.starts_with("reconciliation.costs[].")
            || path.ends_with("likely_causes[]")
    };
    let expected: BTreeSet<String> = described.iter().filter(|path| !absent(path)).cloned().collect();
    assert_eq!(served, expected);
    let fields_of = |row: &str| described.iter().filter(|path| path.starts_with(row)).count();
    assert_eq!(
        (
            fields_of("reconciliation.tap."),
            fields_of("reconciliation.store."),
            fields_of("reconciliation.costs[].")
        ),
        (7, 7, 9)
    );
}

#[tokio::test]
async fn totals_are_those_of_the_metrics_and_the_stream_only_adds_what_is_new() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "");
    send(&gateway, "red", 3).await;
    send(&gateway, "blue", 2).await;
    let (_, document) = get(gateway.admin, "/api/teams", LOCAL).await;
    let metrics = gateway.metrics().await;
    for row in document["teams"].as_array().expect("a list") {
        let team = format!("team={}", row["team"]);
        let requests = metric_sum(&metrics, "gateway_requests_total", &[&team]);
        assert_eq!(row["requests_total"].as_f64(), Some(requests), "{row}");
        for kind in ["prompt", "completion"] {
            let tokens = metric_sum(
                &metrics,
                "gateway_tokens_total",
                &[&team, &format!("type=\"{kind}\"")],
            );
            assert_eq!(
                row[format!("{kind}_tokens_total")].as_f64(),
                Some(tokens),
                "{row}"
            );
        }
    }
    let (mut stream, mut read) = (live(gateway.admin, LOCAL).await, String::new());
    let numbers = |snapshot: &Value| -> Vec<u64> {
        let rows = snapshot["requests"].as_array().expect("a list").iter();
        rows.map(|row| row["sequence"].as_u64().expect("a number"))
            .collect()
    };
    let first = event(&mut stream, &mut read).await;
    assert_eq!(numbers(&first), [5, 4, 3, 2, 1]);
    send(&gateway, "red", 1).await;
    let started = Instant::now();
    loop {
        let next = numbers(&event(&mut stream, &mut read).await);
        if next == [6] {
            break;
        }
        assert!(next.is_empty(), "old ones come again: {next:?}");
    }
    assert!(started.elapsed() < Duration::from_secs(5));
    for (query, status, count) in [
        ("?limit=2", 200, 2),
        ("?limit=0", 400, 0),
        ("?limit=x", 400, 0),
        ("?limit=201", 400, 0),
    ] {
        let (found, document) = get(gateway.admin, &format!("/api/requests{query}"), LOCAL).await;
        assert_eq!(found, status, "{query}");
        assert_eq!(
            document["requests"].as_array().map_or(0, Vec::len),
            count,
            "{query}"
        );
    }
}

#[tokio::test]
async fn a_token_shows_what_it_is_for_and_nothing_else() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let yaml = tokens(&[("ops-secret", "admin"), ("red-secret", "team:red")]);
    // Of one team there is a budget and nothing else.
    let limits =
        "limits: {default: {budget: {usd: 1}}, teams: [{team: blue-idle, budget: {usd: 2, period: day}}]}\n";
    let gateway = TestGateway::before(sim.addr, None, &(yaml + limits));
    send(&gateway, "red", 2).await;
    send(&gateway, "blue", 3).await;
    let (ops, red) = (bearer("ops-secret"), bearer("red-secret"));
    for path in API.iter().chain(&["/metrics"]) {
        for (fields, kind) in [
            (LOCAL, "token_missing"),
            (&*bearer("red-secre"), "token_unknown"),
            (&*bearer(""), "token_missing"),
            (
                "Host: a\r\nAuthorization: Basic b3BzLXNlY3JldA==\r\n",
                "token_missing",
            ),
        ] {
            let (status, head, body) = ask(gateway.admin, "GET", path, fields).await;
            assert_eq!(status, 401, "{path} with {fields}");
            assert!(head.contains("www-authenticate: bearer"), "{head}");
            let body: Value = serde_json::from_str(&body).expect("JSON");
            assert_eq!(body["error"]["type"], kind, "{path} with {fields}");
        }
    }
    let (status, all) = get(gateway.admin, "/api/teams", &ops).await;
    assert_eq!((status, all["teams"].as_array().map(Vec::len)), (200, Some(3)));
    let idle = &all["teams"][1];
    assert_eq!(
        (&idle["team"], &idle["budget"]["usd"], &idle["budget"]["period"]),
        (&"blue-idle".into(), &2.0.into(), &"day".into())
    );
    assert_eq!(ask(gateway.admin, "GET", "/metrics", &ops).await.0, 200);
    for path in ["/metrics", "/api/reconciliation"] {
        let (status, body) = get(gateway.admin, path, &red).await;
        assert_eq!(
            (status, &body["error"]["type"]),
            (403, &"not_for_teams".into()),
            "{path}"
        );
    }
    for path in ["/api/teams", "/api/upstreams", "/api/requests"] {
        let (status, document) = get(gateway.admin, path, &red).await;
        assert_eq!((status, &document["scope"]), (200, &"team:red".into()));
        assert!(!document.to_string().contains("blue"), "{document}");
    }
    let (_, own) = get(gateway.admin, "/api/teams", &red).await;
    assert_eq!(own["teams"][0]["budget"]["usd"], 1.0, "{own}");
    assert_eq!(
        own["teams"].as_array().map(Vec::len),
        Some(1),
        "another's budget: {own}"
    );
    let budget = |team: &str| {
        let rows = all["teams"].as_array().expect("a list").iter();
        let mut of_team = rows.filter(|row| row["team"] == team);
        of_team.next().expect("a row")["budget"].clone()
    };
    let (_, _, metrics) = ask(gateway.admin, "GET", "/metrics", &ops).await;
    for team in ["red", "blue"] {
        for (field, name) in [
            ("usd", "gateway_budget_usd"),
            ("spent_usd", "gateway_budget_spent_usd"),
        ] {
            let in_metrics = metric_sum(&metrics, name, &[&format!("team=\"{team}\"")]);
            assert!(in_metrics > 0.0, "{team}: {name}");
            assert_eq!(budget(team)[field].as_f64(), Some(in_metrics), "{team}: {field}");
        }
    }
    let (_, requests) = get(gateway.admin, "/api/requests", &red).await;
    assert_eq!(requests["requests"].as_array().map(Vec::len), Some(2));
    let mut stream = live(gateway.admin, &red).await;
    let snapshot = event(&mut stream, &mut String::new()).await;
    assert!(!snapshot.to_string().contains("blue"), "{snapshot}");
    assert_eq!(
        (&snapshot["reconciliation"], &snapshot["upstreams"][0]["running"]),
        (&Value::Null, &Value::Null)
    );
    for path in ["/health", "/ready", "/", "/console.js"] {
        let (status, _, body) = ask(gateway.admin, "GET", path, "Host: any\r\n").await;
        assert_eq!(status, 200, "{path} takes no token");
        assert!(!body.contains("red") || !path.starts_with("/h"), "{body}");
    }
}

#[tokio::test]
async fn without_tokens_only_this_machine_is_shown_anything() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "");
    for path in API[..4].iter().chain(&["/", "/console.js"]) {
        for host in [
            "Host: evil.example:9464\r\n",
            "Host: 127.0.0.1.evil.example\r\n",
            "Host: localhost\r\nHost: evil.example\r\n",
        ] {
            let (status, _, body) = ask(gateway.admin, "GET", path, host).await;
            assert_eq!(status, 403, "{path} for {host}: {body}");
            assert!(
                body.contains("host_not_loopback") && body.contains("admin.tokens"),
                "{body}"
            );
        }
        assert_eq!(
            ask(gateway.admin, "GET", path, "Host: 127.0.0.1\r\n").await.0,
            200,
            "{path}"
        );
    }
    assert_eq!(
        ask(gateway.admin, "GET", "/metrics", "Host: prometheus\r\n")
            .await
            .0,
        200
    );

    let open = TestGateway::reachable(&format!(
        "upstreams: [{{name: chat, url: \"http://{}\", serves: generate}}]\n",
        sim.addr
    ));
    for path in API.iter().chain(&["/"]) {
        let (status, body) = get(open.admin, path, LOCAL).await;
        assert_eq!(
            (status, &body["error"]["type"]),
            (403, &"tokens_not_configured".into()),
            "{path}"
        );
        let message = body["error"]["message"].as_str().expect("a text");
        assert!(
            message.contains("configure tokens") && message.contains("127.0.0.1"),
            "{message}"
        );
    }
    for path in ["/metrics", "/health", "/ready"] {
        assert_eq!(ask(open.admin, "GET", path, LOCAL).await.0, 200, "{path} as ever");
    }
}

#[tokio::test]
async fn nothing_can_be_changed_and_the_page_brings_its_policy() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "");
    for path in API.iter().chain(&["/", "/metrics"]) {
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let (status, head, body) = ask(gateway.admin, method, path, LOCAL).await;
            assert_eq!(status, 405, "{method} {path}");
            assert!(
                head.contains("allow: get, head") && body.contains("method_not_allowed"),
                "{body}"
            );
            assert!(
                !head.contains("access-control"),
                "no other origin is let in: {head}"
            );
        }
        let (status, _, body) = ask(gateway.admin, "HEAD", path, LOCAL).await;
        assert_eq!((status, body.as_str()), (200, ""), "{path}");
    }
    for (path, content_type) in [
        ("/", "text/html"),
        ("/console.js", "text/javascript"),
        ("/console.css", "text/css"),
        ("/console.svg", "image/svg+xml"),
    ] {
        let (status, head, body) = ask(gateway.admin, "GET", path, LOCAL).await;
        assert_eq!(status, 200, "{path}");
        for part in [
            &format!("content-type: {content_type}"),
            "content-security-policy: default-src 'none'; script-src 'self'",
            "x-content-type-options: nosniff",
            "cache-control: no-store",
        ] {
            assert!(head.contains(part), "{part} in {head}");
        }
        assert!(!body.is_empty());
    }
    assert_eq!(
        get(gateway.admin, "/api/nothing", LOCAL).await.1["error"]["type"],
        "not_found"
    );
}

#[tokio::test]
async fn streams_are_counted_and_end_with_the_gateway() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "");
    let mut streams = Vec::new();
    for _ in 0..32 {
        let mut stream = live(gateway.admin, LOCAL).await;
        event(&mut stream, &mut String::new()).await;
        streams.push(stream);
    }
    let (status, body) = get(gateway.admin, "/api/live", LOCAL).await;
    assert_eq!(
        (status, &body["error"]["type"]),
        (503, &"too_many_streams".into())
    );
    assert_eq!(
        ask(gateway.admin, "GET", "/metrics", LOCAL).await.0,
        200,
        "scrapers have their place"
    );
    streams.truncate(31);
    // The place is given back when the server sees that the reader has gone.
    eventually("a place for a stream", async || {
        let mut stream = live(gateway.admin, LOCAL).await;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.ok()?;
        (&head == b"HTTP/1.1 200").then_some(())
    })
    .await;
    let started = Instant::now();
    let drained = tokio::task::spawn_blocking(|| gateway.drained());
    assert_eq!(drained.await.expect("it ends"), 0);
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "open consoles held the gateway for {:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn a_killed_upstream_shows_within_five_seconds() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(sim.addr, None, "");
    let up = async || get(gateway.admin, "/api/upstreams", LOCAL).await.1["upstreams"][0].clone();
    assert_eq!(up().await["up"], true);
    drop(sim);
    let killed = Instant::now();
    let row = eventually("it is down", async || {
        Some(up().await).filter(|row| row["up"] == false)
    })
    .await;
    assert_eq!(
        (&row["condition"], &row["running"]),
        (&"down".into(), &Value::Null)
    );
    assert!(
        killed.elapsed() < Duration::from_secs(4),
        "{:?}, and the page a second later",
        killed.elapsed()
    );
}
