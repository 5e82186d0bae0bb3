//! Three books of the same requests, joined by request id: what the clients saw (`vllm-load --records`), what the gateway wrote
//! (its events) and what the engines did (`vllm-sim --introspect`).

use crate::support::{self, KeptSegment, Sim, TestGateway, eventually, exchange, metric_sum};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use vllm_gateway::event::RequestEvent;
use vllm_gateway::ledger::Segment;
use vllm_gateway::wire::exchange::{Outcome, UsageSource};

/// The model that generates text, and the one that embeds it.
pub const MODELS: [&str; 2] = ["tiny", "vectors"];

/// What is run.
pub struct Trial {
    /// Seed of the load, and part of every request id.
    pub seed: u64,
    /// How many requests.
    pub requests: usize,
    /// Further options of the load generator.
    pub load: &'static [&'static str],
    /// Further options of the simulator that generates text.
    pub sim: &'static [&'static str],
    /// Further configuration of the gateway. With `capture: tap` the load goes straight to the server that generates text.
    pub yaml: &'static str,
}

impl Trial {
    fn is_direct(&self) -> bool {
        self.yaml.contains("capture: tap")
    }
}

/// One request as its client saw it: a line of `--records`, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
pub struct Seen {
    /// The join key.
    pub request_id: String,
    /// `X-Team-ID`.
    pub team: String,
    /// `X-Project`, if one was sent.
    pub project: Option<String>,
    /// `X-User-ID`, if one was sent.
    pub user: Option<String>,
    /// The route's short name.
    pub endpoint: String,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// The response's status, if its head arrived.
    pub status: Option<u16>,
    /// How it ended for the client.
    pub outcome: String,
    /// Whether the request went out whole.
    pub sent: bool,
    /// Whether it was sent twice, since the first connection had been closed.
    pub retried: bool,
    /// Chunks with content that the client took.
    pub chunks: u64,
    /// The usage that the client saw.
    pub prompt_tokens: Option<u64>,
    /// The usage that the client saw.
    pub completion_tokens: Option<u64>,
}

/// What an engine did for one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Prompt tokens, as the engine counts them.
    pub prompt: u64,
    /// Generated tokens.
    pub completion: u64,
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.prompt += other.prompt;
        self.completion += other.completion;
    }
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Work>>(all: I) -> Work {
        all.fold(Work::default(), |mut sum, work| {
            sum += work;
            sum
        })
    }
}

/// One request in all three books.
#[derive(Clone, Debug)]
pub struct Row {
    /// The client's.
    pub seen: Seen,
    /// The gateway's.
    pub event: RequestEvent,
    /// The engine's; zero if it never saw the request.
    pub work: Work,
}

impl Row {
    /// What the event says of the engine's work; what it does not know counts as zero.
    pub fn booked(&self) -> Work {
        Work {
            prompt: self.event.engine_prompt_tokens.unwrap_or(0),
            completion: self.event.engine_completion_tokens.unwrap_or(0),
        }
    }

    /// Whether the gateway may bill its counts.
    pub fn is_billable(&self) -> bool {
        matches!(
            self.event.usage_source,
            UsageSource::Reported | UsageSource::Continuous
        )
    }
}

/// Everything that is known once a trial has ended.
pub struct Books {
    /// Every request, by its id.
    pub rows: BTreeMap<String, Row>,
    /// The engines' own counters.
    pub engines: Work,
    /// The gateway's `/metrics`.
    pub metrics: String,
    /// What the gateway told the ledger.
    pub segments: Vec<KeptSegment>,
}

impl Books {
    /// Runs a trial to its end. Panics when a request has no event, or more than one.
    pub async fn keep(trial: &Trial) -> Books {
        let mut options = vec!["--model", MODELS[0], "--introspect"];
        options.extend(trial.sim);
        let generate = Sim::start(&options);
        let embed = Sim::start(&[
            "--model",
            MODELS[1],
            "--kind",
            "embed",
            "--introspect",
            "--instant",
        ]);
        let (gateway, target) = if trial.is_direct() {
            let upstream = format!(
                "upstreams: [{{name: chat, url: \"{}\", serves: generate}}]\n",
                generate.url()
            );
            (TestGateway::tapping(&(upstream + trial.yaml)), generate.url())
        } else {
            let gateway = TestGateway::before(generate.addr, Some(embed.addr), trial.yaml);
            let target = gateway.url();
            (gateway, target)
        };
        let seen = load(&target, trial);
        assert_eq!(
            seen.len(),
            trial.requests,
            "the load generator recorded each request"
        );
        let events = gateway.events.wait_for(trial.requests);
        let sims = [generate.addr, embed.addr];
        for addr in sims {
            idle(addr).await;
        }
        let metrics = gateway.metrics().await;
        assert_eq!(gateway.events.now().len(), events.len(), "no event comes late");
        let (mut works, mut engines) = (BTreeMap::new(), Work::default());
        for addr in sims {
            works.append(&mut work_by_request(addr).await);
            engines += counters(addr).await;
        }
        let rows = join(seen, events, &mut works);
        assert!(
            works.is_empty(),
            "the engines worked for requests that nobody sent: {works:?}"
        );
        Books {
            rows,
            engines,
            metrics,
            segments: gateway.events.segments(),
        }
    }

    /// Checks that each request's segments are what its event says, and that none has any that no engine ran.
    pub fn check_segments(&self) {
        let mut by_event: BTreeMap<&str, Vec<&Segment>> = BTreeMap::new();
        for kept in &self.segments {
            let of_event = by_event.entry(&kept.segment.event_id).or_default();
            of_event.push(&kept.segment);
            assert_eq!(kept.segment.run.within(kept.window.span()), kept.segment.run);
        }
        for row in self.rows.values() {
            let event = &row.event;
            let segments = by_event.remove(&*event.event_id).unwrap_or_default();
            let has_none = segments.is_empty();
            assert!(has_none || event.status_code < 400, "{event:?}");
            assert!(!has_none || event.outcome != Outcome::Completed, "{event:?}");
            let work = segments.iter().map(|segment| Work {
                prompt: segment.work.prompt_tokens,
                completion: segment.work.completion_tokens,
            });
            assert_eq!(work.sum::<Work>(), row.booked(), "{event:?}");
            let run_us: u64 = segments.iter().map(|segment| segment.run.len_us()).sum();
            assert!(run_us <= event.duration_us + 1, "{event:?} ran for {run_us} µs");
            assert!(
                segments
                    .iter()
                    .all(|segment| segment.account.team_id == event.team_id)
            );
        }
        assert!(
            by_event.is_empty(),
            "segments of requests that have no event: {by_event:?}"
        );
    }

    /// All rows whose event ended like that.
    pub fn ended(&self, outcome: Outcome) -> impl Iterator<Item = &Row> {
        self.rows.values().filter(move |row| row.event.outcome == outcome)
    }
}

/// Joins by id: each request that was sent has exactly one event.
fn join(
    seen: Vec<Seen>,
    events: Vec<RequestEvent>,
    works: &mut BTreeMap<String, Work>,
) -> BTreeMap<String, Row> {
    let mut by_id: BTreeMap<Box<str>, Vec<RequestEvent>> = BTreeMap::new();
    for event in events {
        by_id.entry(event.request_id.clone()).or_default().push(event);
    }
    let rows = seen.into_iter().map(|seen| {
        assert!(
            seen.sent && !seen.retried,
            "nothing here closes connections between requests: {seen:?}"
        );
        let events = by_id.remove(seen.request_id.as_str()).unwrap_or_default();
        let [event] = <[RequestEvent; 1]>::try_from(events)
            .unwrap_or_else(|events| panic!("expected one event of {seen:?}, got {events:?}"));
        let work = works.remove(&seen.request_id).unwrap_or_default();
        (seen.request_id.clone(), Row { seen, event, work })
    });
    let rows = rows.collect();
    assert!(by_id.is_empty(), "events of requests that nobody sent: {by_id:?}");
    rows
}

/// Runs the load generator against `target` and reads its records.
fn load(target: &str, trial: &Trial) -> Vec<Seen> {
    let records = Scratch::file(&format!("records-{}.jsonl", trial.seed));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-load"));
    command.args([
        "--url",
        target,
        "--model",
        MODELS[0],
        "--embeddings-model",
        MODELS[1],
        "--no-progress",
    ]);
    command.args([
        "--seed",
        &trial.seed.to_string(),
        "--requests",
        &trial.requests.to_string(),
    ]);
    command.args(trial.load).arg("--records").arg(&records.0);
    let output = command.output().expect("the load generator starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = std::fs::read_to_string(&records.0).expect("the records are there");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a record"))
        .collect()
}

/// A file that is removed again, also when the test fails.
struct Scratch(PathBuf);

impl Scratch {
    fn file(name: &str) -> Scratch {
        Scratch(std::env::temp_dir().join(format!("vllm-gateway-{}-{name}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Waits until a simulator works for nobody: from then on its log and its counters stand still.
pub async fn idle(addr: SocketAddr) {
    eventually("the engine to be idle", async || {
        let load: serde_json::Value = serde_json::from_str(&get(addr, "/load").await).expect("JSON");
        (load["server_load"] == 0).then_some(())
    })
    .await;
}

/// What a simulator did, request by request.
pub async fn work_by_request(addr: SocketAddr) -> BTreeMap<String, Work> {
    #[derive(Deserialize)]
    struct Line {
        request_id: String,
        prompt_tokens: u64,
        completion_tokens: u64,
    }
    let mut works: BTreeMap<String, Work> = BTreeMap::new();
    for line in get(addr, "/sim/requests").await.lines() {
        let line: Line = serde_json::from_str(line).expect("a line of the log");
        // A request that the gateway had to send twice has two lines.
        let work = Work {
            prompt: line.prompt_tokens,
            completion: line.completion_tokens,
        };
        *works.entry(line.request_id).or_default() += work;
    }
    works
}

/// What a simulator's `/metrics` says, as a Prometheus server would read it.
async fn counters(addr: SocketAddr) -> Work {
    let text = get(addr, "/metrics").await;
    let counter = |family| metric_sum(&text, family, &[]) as u64;
    Work {
        prompt: counter("vllm:prompt_tokens_total"),
        completion: counter("vllm:generation_tokens_total"),
    }
}

async fn get(addr: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: sim\r\nConnection: close\r\n\r\n");
    let response = String::from_utf8(exchange(addr, request.as_bytes()).await).expect("text");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
    body.to_owned()
}

/// Sums a counter of the gateway for a team.
pub fn of_team(metrics: &str, family: &str, team: &str, label: &str) -> u64 {
    support::metric_sum(metrics, family, &[&format!("team=\"{team}\""), label]) as u64
}
