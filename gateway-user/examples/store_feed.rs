//! Feeds a store as fast as it takes events: what `cargo xtask bench store` measures without a network in front.
//!
//! The store, its spool and its sender are the gateway's own. Each event is announced twice and recorded once, as for a request that went to one
//! upstream. Its parent tells by a line on standard input when to begin, and reads a line on standard output at each step: `warm`, then two JSON
//! objects, when the last event was taken in and when the last one was stored. It ends with its input.

use anyhow::{Context as _, ensure};
use clap::Parser;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use std::fmt::Write as _;
use std::io::{self, BufRead};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vllm_gateway::config::Config;
use vllm_gateway::event::{Begin, CapturedBy, Context, EventSink, RequestEvent, Sinks};
use vllm_gateway::store::service::{StoreCounts, StoreService};
use vllm_gateway::wire::At;
use vllm_gateway::wire::endpoint::Endpoint;
use vllm_gateway::wire::exchange::{Ending, Facts, Outcome, UsageSource};

/// Events that are stored before anything is measured: some batches, so that schema, connection and caches are there.
const WARM_UP: u64 = 20_000;

/// Between two looks at how much is stored.
const POLL: Duration = Duration::from_millis(10);

/// How long storing may take before something must be wrong.
const STORED_WITHIN: Duration = Duration::from_secs(600);

/// Teams that share the events.
const TEAMS: u64 = 50;

#[derive(Parser)]
struct Options {
    /// A gateway's config, with `store.url` of a ClickHouse that runs.
    #[arg(long)]
    config: PathBuf,
    /// Events to feed.
    #[arg(long)]
    events: u64,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let config = Config::load(Some(&options.config), &|_| None)?;
    let store = StoreService::open(&config)?.context("expected a store.url, found `none`")?;
    let (sink, counts) = (Sinks::new(store.outlets().events), store.counts());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let program = std::env::current_exe()?;
    let running = runtime.block_on(async { store.start(program, |_| None) });

    let mut feeder = Feeder::new(sink);
    feeder.feed(WARM_UP);
    wait_until_stored(&counts, WARM_UP)?;
    println!("warm");
    let mut lines = io::stdin().lock().lines();
    lines
        .next()
        .context("expected a line that says when to begin")??;

    let (began, cpu_before) = (Instant::now(), thread_cpu());
    feeder.feed(options.events);
    let fed = json!({"fed_s": began.elapsed().as_secs_f64(), "feeding_cpu_s": (thread_cpu() - cpu_before).as_secs_f64()});
    println!("{fed}");
    wait_until_stored(&counts, WARM_UP + options.events)?;
    println!("{}", json!({"stored_s": began.elapsed().as_secs_f64()}));
    let dropped: u64 = counts.spool.stats().dropped.iter().sum();
    ensure!(
        dropped == 0,
        "expected every event to be kept, found {dropped} dropped"
    );
    while lines.next().is_some() {}
    drop((feeder, counts));
    runtime.block_on(running.finish());
    Ok(())
}

fn wait_until_stored(counts: &StoreCounts, rows: u64) -> anyhow::Result<()> {
    let started = Instant::now();
    while counts.sender.rows.load(Ordering::Relaxed) < rows {
        ensure!(
            started.elapsed() < STORED_WITHIN,
            "expected {rows} rows to be stored, found {:?}",
            counts.sender.rows
        );
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// CPU time of this thread, user and system.
fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// One streamed chat request after the other, which differ as those of a gateway do.
struct Feeder {
    sink: Sinks,
    event: RequestEvent,
    sequence: u64,
}

impl Feeder {
    fn new(sink: Sinks) -> Feeder {
        let mut facts = Facts::unread(At(0), At(612_345), Ending::Complete);
        facts.endpoint = Endpoint::ChatCompletions;
        facts.outcome = Outcome::Completed;
        facts.usage_source = UsageSource::Reported;
        facts.model = Some("meta-llama/Llama-3.3-70B-Instruct".into());
        facts.finish_reason = Some("stop".into());
        facts.streamed = true;
        facts.ttft_us = Some(81_234);
        facts.chunks = 64;
        let context = Context {
            event_id: "".into(),
            started_at_us: 0,
            gateway_id: "gateway-1".into(),
            team: Some("team-1".into()),
            project: Some("project-1".into()),
            user: Some("user-1".into()),
            upstream: Some("chat".into()),
            request_id: "req-4f1c2b7a9d3e4f60a1b2c3d4e5f60718".into(),
            trace_id: Some("4bf92f3577b34da6a3ce929d0e0e4736".into()),
            status: Some(200),
            error_type: None,
            gateway_overhead_us: Some(74),
            tap: None,
        };
        let event = RequestEvent::new(context, facts, CapturedBy::Proxy);
        Feeder {
            sink,
            event,
            sequence: 0,
        }
    }

    fn feed(&mut self, events: u64) {
        let (mut id, mut team) = (String::new(), String::new());
        let boot_us = now_us();
        for _ in 0..events {
            self.sequence += 1;
            let n = self.sequence;
            id.clear();
            team.clear();
            // A String takes everything.
            let _ = write!(id, "gateway-1-{boot_us:x}-{n:x}");
            let _ = write!(team, "team-{}", n % TEAMS);
            let event = &mut self.event;
            event.event_id = id.as_str().into();
            event.team_id = team.as_str().into();
            event.started_at_us = boot_us + i64::try_from(n).unwrap_or(0);
            event.duration_us = 400_000 + n % 400_000;
            event.ttft_us = Some(50_000 + n % 30_000);
            event.itl_mean_us = Some(9_000 + n % 2_000);
            event.prompt_tokens = Some(100 + n % 900);
            event.cached_tokens = Some(n % 64);
            event.completion_tokens = Some(10 + n % 90);
            event.engine_prompt_tokens = event.prompt_tokens;
            event.engine_completion_tokens = event.completion_tokens;
            self.sink.began(&begin(event, None));
            self.sink.began(&begin(event, Some("chat")));
            self.sink.record(event);
        }
    }
}

fn begin<'e>(event: &'e RequestEvent, upstream: Option<&'e str>) -> Begin<'e> {
    Begin {
        event_id: &event.event_id,
        started_at_us: event.started_at_us,
        gateway_id: &event.gateway_id,
        capture: event.capture,
        team_id: &event.team_id,
        project: Some(&event.project),
        user_id: Some(&event.user_id),
        endpoint: event.endpoint,
        request_id: &event.request_id,
        trace_id: Some(&event.trace_id),
        upstream,
        model: upstream.map(|_| &*event.model),
    }
}

fn now_us() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX)
}
