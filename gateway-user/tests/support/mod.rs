//! What the integration tests share: the real programs on free ports, and ways to look at them.
//!
//! Everything started here is stopped by its own handle when the test ends, also when it fails.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use vllm_gateway::books::Outlets;
use vllm_gateway::config::Config;
use vllm_gateway::event::{EventSink, RequestEvent};
use vllm_gateway::gateway::{self, Gateway};
use vllm_gateway::ledger::{Segment, SegmentRow, Window};
#[cfg(target_os = "linux")]
use vllm_gateway::tap::Tap;
use vllm_gateway::tap::agent::Source;

pub mod front;
pub mod installed;
pub mod upstream;

/// How long a test waits for something that must happen. Far above what it takes, for a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The simulator, as a process of its own.
pub struct Sim {
    child: Child,
    /// Where it listens.
    pub addr: SocketAddr,
}

impl Sim {
    /// Starts it on a free port with `options` besides `--listen`.
    pub fn start(options: &[&str]) -> Sim {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-sim"));
        command.args(["--listen", "127.0.0.1:0"]).args(options);
        let (child, addr) = spawn_listening(command);
        Sim { child, addr }
    }

    /// Its address as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a program whose first line on standard output is `listening on http://ADDR`.
fn spawn_listening(mut command: Command) -> (Child, SocketAddr) {
    let mut child = command
        .stdout(Stdio::piped())
        .stdin(Stdio::null())
        .spawn()
        .expect("the program starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("a pipe");
    BufReader::new(stdout).read_line(&mut line).expect("a first line");
    let addr = line
        .trim()
        .strip_prefix("listening on http://")
        .and_then(|addr| addr.parse().ok());
    let addr = addr.unwrap_or_else(|| panic!("expected `listening on http://ADDR`, got {line:?}"));
    (child, addr)
}

/// A segment that a request has had.
#[derive(Clone, Debug)]
pub struct KeptSegment {
    /// Where it ran.
    pub upstream: Box<str>,
    /// In which window.
    pub window: Window,
    /// The rest of the row.
    pub segment: Segment,
}

/// Keeps every event, and every segment.
#[derive(Default)]
pub struct Collector {
    events: Mutex<Vec<RequestEvent>>,
    segments: Mutex<Vec<KeptSegment>>,
    arrived: Condvar,
}

impl EventSink for Collector {
    fn segment(&self, row: &SegmentRow<'_>) {
        let mut segments = self.segments.lock().expect("no panic while segments are held");
        segments.push(KeptSegment {
            upstream: row.upstream.into(),
            window: row.window_start,
            segment: row.to_segment(),
        });
    }

    fn record(&self, event: &RequestEvent) {
        self.events
            .lock()
            .expect("no panic while events are held")
            .push(event.clone());
        self.arrived.notify_all();
    }
}

impl Collector {
    /// Waits until there are `count` events, and returns all of them.
    pub fn wait_for(&self, count: usize) -> Vec<RequestEvent> {
        let events = self.events.lock().expect("no panic while events are held");
        let waited = self
            .arrived
            .wait_timeout_while(events, DEADLINE, |events| events.len() < count);
        let (events, _) = waited.expect("no panic while events are held");
        assert!(
            events.len() >= count,
            "expected {count} events, got {}",
            events.len()
        );
        events.clone()
    }

    /// The segments so far.
    pub fn segments(&self) -> Vec<KeptSegment> {
        let segments = self.segments.lock().expect("no panic while segments are held");
        segments.clone()
    }

    /// The events so far.
    pub fn now(&self) -> Vec<RequestEvent> {
        self.events
            .lock()
            .expect("no panic while events are held")
            .clone()
    }
}

fn parse(yaml: &str) -> Config {
    Config::parse("test.yaml", yaml, &|_| None).unwrap_or_else(|error| panic!("{error}"))
}

/// A gateway inside the test's process, on threads of its own.
pub struct TestGateway {
    /// Where clients connect.
    pub addr: SocketAddr,
    /// Where operators connect.
    pub admin: SocketAddr,
    /// Every event so far.
    pub events: Arc<Collector>,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<usize>>,
}

impl TestGateway {
    /// Starts one with this configuration (YAML) on free ports; `gateway.listen` and `admin.listen` are set by this function.
    pub fn start(yaml: &str) -> TestGateway {
        TestGateway::of(parse(yaml), None)
    }

    /// Starts one whose address for operators other machines could reach.
    pub fn reachable(yaml: &str) -> TestGateway {
        let mut gateway = TestGateway::with_admin(parse(yaml), None, SocketAddr::from(([0, 0, 0, 0], 0)));
        gateway.admin.set_ip([127, 0, 0, 1].into());
        gateway
    }

    /// Starts one with a kernel probe on the ports of its upstreams; `capture: tap` has no address for clients, and then `addr` is unspecified.
    /// Panics where the probe cannot be loaded: these tests need root and a kernel.
    #[cfg(target_os = "linux")]
    pub fn tapping(yaml: &str) -> TestGateway {
        let mut config = parse(yaml);
        // The tests' own process keeps its capabilities, and the servers stay where they are.
        config.tap.reattach = false;
        let tap = Tap::attach(&config, Command::new("nothing")).unwrap_or_else(|error| panic!("{error}"));
        let source = tap.into_source(&config);
        TestGateway::of(config, Some(source))
    }

    fn of(config: Config, source: Option<Box<dyn Source>>) -> TestGateway {
        TestGateway::with_admin(config, source, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    fn with_admin(mut config: Config, source: Option<Box<dyn Source>>, admin: SocketAddr) -> TestGateway {
        config.gateway.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.admin.listen = admin;
        let events = Arc::new(Collector::default());
        let outlets = Outlets {
            events: vec![Arc::clone(&events) as Arc<dyn EventSink>],
            ..Outlets::default()
        };
        let listeners = gateway::bind_for_clients(&config).expect("a free port");
        let gateway = Gateway::build(config, listeners, outlets, source).expect("it starts");
        let none = SocketAddr::from(([0, 0, 0, 0], 0));
        let (addr, admin) = (gateway.client_addr().unwrap_or(none), gateway.admin_addr());
        let (stop, stopped) = oneshot::channel();
        let running = std::thread::spawn(move || {
            let runtime = gateway.runtime().expect("a runtime");
            let run = gateway.run(async { drop(stopped.await) });
            runtime.block_on(run).expect("it runs")
        });
        TestGateway {
            addr,
            admin,
            events,
            stop: Some(stop),
            running: Some(running),
        }
    }

    /// Starts one in front of one upstream for text and, if given, one for embeddings; `more` is further YAML.
    pub fn before(generate: SocketAddr, embeddings: Option<SocketAddr>, more: &str) -> TestGateway {
        let mut yaml =
            format!("upstreams:\n  - {{name: chat, url: \"http://{generate}\", serves: generate}}\n");
        if let Some(embeddings) = embeddings {
            yaml += &format!("  - {{name: embed, url: \"http://{embeddings}\", serves: embeddings}}\n");
        }
        TestGateway::start(&format!("{yaml}{more}"))
    }

    /// Its address as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Tells it to drain, as SIGTERM does.
    pub fn drain(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until it has drained; returns how many requests it had to cut off.
    pub fn drained(mut self) -> usize {
        self.drain();
        let running = self.running.take().expect("it runs");
        running.join().expect("it does not panic")
    }

    /// The text of `/metrics`.
    pub async fn metrics(&self) -> String {
        let response = exchange(
            self.admin,
            b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        )
        .await;
        let text = String::from_utf8(response).expect("text");
        text.split_once("\r\n\r\n")
            .expect("a head and a body")
            .1
            .to_owned()
    }
}

impl Drop for TestGateway {
    fn drop(&mut self) {
        self.drain();
        if let Some(running) = self.running.take() {
            let _ = running.join();
        }
    }
}

/// Sends `request` on a connection of its own and reads until the server closes it.
pub async fn exchange(addr: SocketAddr, request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(addr).await.expect("a connection");
    stream.write_all(request).await.expect("the request is taken");
    let mut response = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut response)).await;
    // A reset behind the response is how some refusals end.
    let _ = read.expect("the server closes the connection");
    response
}

/// A `POST` of `body` as `team`, to be closed after the response.
pub fn post(path: &str, team: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nHost: a\r\nX-Team-ID: {team}\r\nContent-Type: application/json\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Waits until `check` gives something.
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    loop {
        ticks.tick().await;
        if let Some(found) = check().await {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
    }
}

/// The sum of all samples of `family` whose labels contain every one of `labels` (such as `team="a"`).
pub fn metric_sum(text: &str, family: &str, labels: &[&str]) -> f64 {
    let samples = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '));
    samples
        .filter(|(series, _)| {
            let name = series.split('{').next().unwrap_or_default();
            name == family && labels.iter().all(|label| series.contains(label))
        })
        .map(|(_, value)| value.parse::<f64>().expect("a number"))
        .sum()
}
