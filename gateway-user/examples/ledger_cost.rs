//! What the ledger costs in the gateway and when a window is settled: what `cargo xtask bench ledger` prints.
//!
//! * **A request**: the gateway's own code at the end of a request, with its segments and without, in turns, into a spool on disk; CPU time of the thread. The
//!   difference is what is done for the ledger's sake: the run is cut, its rows are written as JSON and put into the segments' spool.
//! * **A window**: `allocate` with so many segments that overlap at random.

use anyhow::{Context as _, ensure};
use clap::Parser;
use rustix::time::{ClockId, clock_gettime};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vllm_gateway::books::Books;
use vllm_gateway::config::{Config, IdleTo};
use vllm_gateway::event::{CapturedBy, Context, Sinks};
use vllm_gateway::ledger::{
    Account, Edition, EngineView, Method, Micros, Price, PriceList, Segment, Span, State, Weights, Window,
    WindowFacts, Work, allocate,
};
use vllm_gateway::segments::Segments;
use vllm_gateway::store::service::StoreService;
use vllm_gateway::wire::exchange::{Ending, Exchange, Facts};
use vllm_gateway::wire::head::{RequestHead, ResponseHead};
use vllm_gateway::wire::{At, Piece};

/// When the requests began: a second after a window did.
const BEGAN_US: i64 = 1_780_000_006_000_000;

/// Requests in each half of a round.
const REQUESTS: usize = 20_000;

#[derive(Parser)]
struct Options {
    /// A gateway's config, with a spool that may be filled.
    #[arg(long)]
    config: PathBuf,
    /// Pairs of halves, with segments and without.
    #[arg(long, default_value_t = 11)]
    rounds: usize,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let config = Config::load(Some(&options.config), &|_| None)?;
    let store = StoreService::open(&config)?.context("expected a store.url, found `none`")?;
    let (sinks, counts) = (Sinks::new(store.outlets().events), store.counts());
    // The spool's files are made ready behind the gateway's back, on threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let program = std::env::current_exe()?;
    let _running = runtime.block_on(async { store.start(program, |_| None) });
    let books = Books::new(&config, sinks);
    let facts = stream()?;
    let mut differences = Vec::new();
    half(&books, &facts, true);
    for _ in 0..options.rounds {
        let with_us = half(&books, &facts, true);
        let without_us = half(&books, &facts, false);
        differences.push(with_us - without_us);
        println!("a request: {with_us:.3} µs with segments, {without_us:.3} µs without");
    }
    let dropped: u64 = [&counts.events, &counts.segments]
        .iter()
        .flat_map(|counts| counts.spool.stats().dropped)
        .sum();
    ensure!(
        dropped == 0,
        "expected every row to be kept, found {dropped} dropped"
    );
    differences.sort_unstable_by(f64::total_cmp);
    println!(
        "for the ledger's sake: {:.3} µs CPU a request (median; {:.3} to {:.3})",
        differences[differences.len() / 2],
        differences[0],
        differences[differences.len() - 1]
    );
    for count in [1_000, 10_000, 100_000] {
        let mut times: Vec<Duration> = (0..options.rounds).map(|_| settle(count)).collect();
        times.sort_unstable();
        println!(
            "a window of {count} segments: {:.1} ms (median)",
            times[times.len() / 2].as_secs_f64() * 1e3
        );
    }
    Ok(())
}

/// A stream of 64 chunks in two seconds, with usage at its end.
fn stream() -> anyhow::Result<Facts> {
    let head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
    let whole = || anyhow::anyhow!("the head is whole");
    let (head, _) = RequestHead::parse(head, 1_024)?.ok_or_else(whole)?;
    let mut exchange = Exchange::begin(At(0), &head);
    exchange.request_body(Piece::Bytes(b"{\"model\":\"m\",\"stream\":true}"));
    let (answer, _) = ResponseHead::parse(answer, 1_024, "POST")?.ok_or_else(whole)?;
    exchange.response_head(At(1_000_000), &answer);
    for chunk in 1..=64 {
        let text = "data: {\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"x\"}}],\"usage\":null}\n\n";
        exchange.response_body(At(chunk * 31_250_000), Piece::Bytes(text.as_bytes()));
    }
    let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":400,\"completion_tokens\":64}}\n\n";
    exchange.response_body(At(2_000_000_000), Piece::Bytes(usage.as_bytes()));
    Ok(exchange.finish(At(2_000_000_000), Ending::Complete))
}

/// CPU microseconds a request.
fn half(books: &Books, facts: &Facts, is_with: bool) -> f64 {
    let requests: Vec<_> = (0..REQUESTS).map(|n| (context(n), facts.clone())).collect();
    let before = thread_cpu();
    for (context, facts) in requests {
        let segments = is_with.then(|| {
            let mut segments = Segments::begin(At(0), BEGAN_US);
            segments.sent(At(100_000));
            segments
        });
        books.record(context, facts, CapturedBy::Proxy, segments);
    }
    (thread_cpu() - before).as_secs_f64() * 1e6 / REQUESTS as f64
}

fn context(n: usize) -> Context {
    Context {
        event_id: format!("gateway-1-18b2c3d4e5-{n:x}").into(),
        started_at_us: BEGAN_US,
        gateway_id: "gateway-1".into(),
        team: Some(format!("team-{}", n % 50).into()),
        project: Some("project-1".into()),
        user: Some("user-1".into()),
        upstream: Some("chat".into()),
        request_id: "req-4f1c2b7a9d3e4f60a1b2c3d4e5f60718".into(),
        trace_id: None,
        status: Some(200),
        error_type: None,
        gateway_overhead_us: Some(74),
        tap: None,
    }
}

/// CPU time of this thread, user and system.
fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// How long it takes to compute a window with so many segments.
fn settle(count: u64) -> Duration {
    let window = Window::at(Micros(1_780_000_005_000_000));
    // A multiplier that spreads successive numbers well, so that nobody begins in order.
    let spread = |n: u64, by: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(by as u32) % by;
    let segment = |n: u64| {
        let from = window.start().0 + spread(n, 14_000_000);
        let len_us = 1 + spread(n + 7, 15_000_000);
        Segment {
            event_id: format!("gateway-1-18b2c3d4e5-{n:x}").into(),
            account: Account {
                team_id: format!("team-{}", n % 50).into(),
                project: "project-1".into(),
                model: "m".into(),
            },
            run: Span::new(Micros(from), Micros(from + len_us)).within(window.span()),
            work: Work {
                prompt_tokens: spread(n, 4_001),
                cached_tokens: 0,
                completion_tokens: spread(n, 999),
                kv_token_us: spread(n, 1_000_000_007),
            },
        }
    };
    let segments: Vec<Segment> = (0..count).map(segment).collect();
    let prices = PriceList::new(vec![Price::ASSUMED]).expect("one price");
    let method = Method::new(Method::THETA_ASSUMED, Weights::ASSUMED, IdleTo::Separate).expect("a part of 1");
    let facts = WindowFacts {
        window,
        upstream: "chat",
        prices: &prices,
        segments: &segments,
        engine: &EngineView::default(),
        accounts_before: &[],
    };
    let edition = Edition {
        revision: 1,
        state: State::Settled,
    };
    let began = Instant::now();
    std::hint::black_box(allocate(&facts, &method, edition));
    began.elapsed()
}
