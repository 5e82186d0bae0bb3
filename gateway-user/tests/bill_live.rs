//! A bill of real time: minutes of mixed traffic through the program, its own store and its own ledger. Then SQL says what each team paid, and the
//! engine says what it did.
//!
//! `cargo xtask test-bill` runs it for five minutes; by itself it is shorter.

mod support;

use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Child;
use std::time::{SystemTime, UNIX_EPOCH};
use support::installed::{Installed, load};
use support::{DEADLINE, Sim, eventually, exchange};
use vllm_gateway::ledger::{Micros, NanoUsd, Price, PriceList, Span, Window};

/// Seconds of traffic through the gateway alone; half as much follows with direct traffic beside it.
const SECONDS: &str = "VLLM_GATEWAY_BILL_SECONDS";

/// No probe, which would know of direct traffic. The ledger is looked at as soon as all is in it, long before it settles: what stands is right at any time, for
/// what is known by then.
const CONFIG: &str = "capture: proxy\nmetrics: {emit_interval: 5s}\n";

/// Some hundred milliseconds a request, so that the engine is idle now and then.
#[rustfmt::skip] // Options in pairs.
const SIM: &[&str] = &["--model", "tiny", "--introspect", "--step-base-us", "4000", "--prefill-us-per-token", "20", "--decode-us-per-seq", "10"];

/// Streams and others; one in ten is given up by its client.
#[rustfmt::skip]
const LOAD: &[&str] = &[
    "--rate", "4", "--stream-fraction", "0.5", "--abort-fraction", "0.1", "--teams", "4", "--output-tokens", "8..96",
    "--abort-after-ms", "20..200",
];

/// One request in ten besides.
#[rustfmt::skip]
const DIRECT: &[&str] = &["--rate", "0.4", "--stream-fraction", "0.5", "--teams", "1", "--output-tokens", "8..96"];

/// A request as the engine saw it. Times are CLOCK_MONOTONIC.
#[derive(Debug, Deserialize)]
struct Ran {
    request_id: String,
    prompt_tokens: u64,
    completion_tokens: u64,
    scheduled_ns: u64,
    ended_ns: u64,
}

/// Prompt and generated tokens.
type Tokens = [u64; 2];

#[tokio::test(flavor = "multi_thread")]
async fn what_the_teams_pay_is_what_the_engine_cost_and_direct_traffic_pays_its_own() {
    let seconds: u64 = std::env::var(SECONDS).map_or(45, |text| text.parse().expect("seconds"));
    let sim = Sim::start(SIM);
    let site = Installed::embedded("bill", sim.addr);
    site.configure(CONFIG);
    let gateway = site.start();
    let clocks = Clocks::read();

    // Alone, then with direct traffic, each from the edge of a window to an edge behind its end.
    let alone = phase(&[(gateway.clients, 1, LOAD)], seconds, &site).await;
    let beside = phase(
        &[(gateway.clients, 2, LOAD), (sim.addr, 3, DIRECT)],
        seconds / 2,
        &site,
    )
    .await;
    let whole = Span::new(alone.from(), beside.to());
    let counters = format!(
        "(SELECT countIf(engine_prompt_tokens IS NOT NULL) FROM ledger_windows FINAL WHERE {})",
        within(whole)
    );
    let windows = whole.len_us() / Window::at(whole.from()).span().len_us();
    site.until("the engine's counters of all windows", &counters, windows)
        .await;

    let prices = PriceList::new(vec![Price::ASSUMED]).expect("one price");
    let ran = ran(sim.addr).await;
    let booked = booked(&site).await;

    // What the engine did and no team had: exactly the work of requests that were given up unstreamed, and of the last steps of given-up streams.
    let mut unknown = [0, 0];
    for request in &ran {
        let Some((known, source)) = booked.get(&request.request_id) else {
            continue;
        };
        let missing = [
            request.prompt_tokens - known[0],
            request.completion_tokens - known[1],
        ];
        let may_miss = match source.as_str() {
            "none" => [u64::MAX, u64::MAX],
            "continuous" => [0, 1],
            _ => [0, 0],
        };
        assert!(
            missing[0] <= may_miss[0] && missing[1] <= may_miss[1],
            "{request:?}: {known:?} by {source}"
        );
        if clocks.wall(request.scheduled_ns) < alone.to() {
            unknown = sum(unknown, missing);
        }
    }
    until_unattributed(&site, alone, unknown).await;

    // The engine was as busy as the ledger says.
    let runs = ran
        .iter()
        .map(|request| Span::new(clocks.wall(request.scheduled_ns), clocks.wall(request.ended_ns)));
    let engine_us = union_us(runs.map(|run| run.within(alone)).collect());
    let ledger_us = site
        .number(&format!(
            "(SELECT sum(busy_us) FROM cost_ledger FINAL WHERE {})",
            within(alone)
        ))
        .await
        .expect("a sum");
    let ratio = ledger_us as f64 / engine_us as f64;
    println!(
        "busy {:.3} of the time by the ledger, {:.3} by the engine: ratio {ratio:.4}",
        ledger_us as f64 / alone.len_us() as f64,
        engine_us as f64 / alone.len_us() as f64
    );
    assert!(
        (0.99..1.01).contains(&ratio),
        "{ledger_us} µs by the ledger, {engine_us} µs by the engine"
    );

    // Direct traffic is nobody's, and pays.
    let direct = ran
        .iter()
        .filter(|request| !booked.contains_key(&request.request_id));
    let direct = direct
        .map(|request| [request.prompt_tokens, request.completion_tokens])
        .fold([0, 0], sum);
    assert!(direct[0] > 0 && direct[1] > 0);
    let gone = ran
        .iter()
        .filter(|request| clocks.wall(request.scheduled_ns) >= beside.from());
    let lost = gone.filter_map(|request| {
        let (known, _) = booked.get(&request.request_id)?;
        Some([
            request.prompt_tokens - known[0],
            request.completion_tokens - known[1],
        ])
    });
    until_unattributed(&site, beside, lost.fold(direct, sum)).await;
    for span in [alone, beside] {
        adds_up(&site, span, prices.bill(span)).await;
    }
    let paid = site
        .number(&format!(
            "(SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE team_id = '__unattributed__' AND {})",
            within(beside)
        ))
        .await
        .expect("a sum");
    let busy = site
        .number(&format!(
            "(SELECT sum(busy_us) FROM cost_ledger FINAL WHERE {})",
            within(beside)
        ))
        .await
        .expect("a sum");
    println!(
        "direct traffic: {direct:?} tokens; __unattributed__ pays {} of {} USD",
        NanoUsd(paid),
        prices.bill(Span::new(Micros(0), Micros(busy)))
    );
    assert!(paid > 0);
    gateway.stop();
}

/// The rows of a span sum to its bill, to the nano-USD, and every team has its part.
async fn adds_up(site: &Installed, span: Span, bill: NanoUsd) {
    let sums = site
        .ask(&format!(
            "SELECT sum(cost_nano_usd) AS cost, min(cost_nano_usd) AS least, uniqIf(team_id, team_id LIKE 'team-%' AND cost_nano_usd > 0) AS teams, \
             (SELECT sum(bill_nano_usd) FROM ledger_windows FINAL WHERE {0}) AS bill, \
             (SELECT sum(cost_nano_usd) FROM segment_costs FINAL WHERE {0}) AS requests, \
             sumIf(cost_nano_usd, team_id LIKE 'team-%') AS of_teams \
             FROM cost_ledger FINAL WHERE {0}",
            within(span)
        ))
        .await
        .expect("sums");
    let sums = &sums[0];
    assert_eq!(sums["cost"], bill.0, "{sums}");
    assert_eq!(sums["bill"], bill.0, "{sums}");
    assert_eq!(sums["requests"], sums["of_teams"], "{sums}");
    assert_eq!(sums["teams"], 4, "{sums}");
    assert!(sums["least"].as_i64().is_some_and(|least| least >= 0), "{sums}");
}

/// Runs loads from the beginning of a window, and waits for the beginning of the next one behind their end. The span in between.
async fn phase(loads: &[(SocketAddr, usize, &[&str])], seconds: u64, site: &Installed) -> Span {
    let from = next_edge().await;
    scraped(site, from).await;
    let duration = format!("{seconds}s");
    let children: Vec<Child> = loads
        .iter()
        .map(|(target, seed, options)| {
            // A number of requests that the time does not allow: the time ends it.
            let mut command = load(
                *target,
                *seed,
                1_000_000,
                &site.dir.join(format!("records-{seed}.jsonl")),
                options,
            );
            command.args(["--duration", &duration]);
            command.spawn().expect("the load starts")
        })
        .collect();
    for mut child in children {
        let status = tokio::task::spawn_blocking(move || child.wait())
            .await
            .expect("no panic");
        assert!(status.expect("our own process").success());
    }
    scraped(site, now()).await;
    Span::new(from, next_edge().await)
}

/// Waits until the engine was scraped after a moment. It is at rest then, at both edges of a phase: what its counters grow by between two scrapes is spread
/// evenly over the time in between, and would lie on both sides of an edge.
async fn scraped(site: &Installed, since: Micros) {
    let later = format!(
        "(SELECT count() > 0 FROM vllm_system_metrics WHERE ok AND toUnixTimestamp64Milli(scraped_at) > {})",
        since.0.div_ceil(1_000)
    );
    site.until("a scrape", &later, 1).await;
}

/// Waits for the beginning of a window, and tells when that was.
async fn next_edge() -> Micros {
    let edge = Window::at(now()).span().to();
    eventually("the next window", async || (now() >= edge).then_some(())).await;
    edge
}

fn now() -> Micros {
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock that is set");
    Micros(since_1970.as_micros().try_into().expect("it fits"))
}

/// Both clocks at one moment.
struct Clocks {
    wall: Micros,
    monotonic_ns: u64,
}

impl Clocks {
    fn read() -> Clocks {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Clocks {
            wall: now(),
            monotonic_ns: time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64,
        }
    }

    fn wall(&self, monotonic_ns: u64) -> Micros {
        let since_us = (monotonic_ns as i128 - self.monotonic_ns as i128) / 1_000;
        Micros(u64::try_from(self.wall.0 as i128 + since_us).expect("after 1970"))
    }
}

/// A span as a condition on windows.
fn within(span: Span) -> String {
    let seconds = |moment: Micros| moment.0 / 1_000_000;
    format!(
        "window_start >= toDateTime({}, 'UTC') AND window_start < toDateTime({}, 'UTC')",
        seconds(span.from()),
        seconds(span.to())
    )
}

fn sum(one: Tokens, other: Tokens) -> Tokens {
    [one[0] + other[0], one[1] + other[1]]
}

/// The length of all spans together, where they overlap once.
fn union_us(mut spans: Vec<Span>) -> u64 {
    spans.sort_unstable();
    let (mut sum, mut until) = (0, Micros(0));
    for span in spans {
        let rest = Span::new(span.from().max(until).min(span.to()), span.to());
        sum += rest.len_us();
        until = until.max(span.to());
    }
    sum
}

async fn ran(sim: SocketAddr) -> Vec<Ran> {
    let answer = exchange(
        sim,
        b"GET /sim/requests HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    )
    .await;
    let answer = String::from_utf8(answer).expect("text");
    let lines = answer.lines().filter(|line| line.starts_with('{'));
    lines
        .map(|line| serde_json::from_str(line).expect("a line of the log"))
        .collect()
}

/// What the gateway knows of each request's work, and how.
async fn booked(site: &Installed) -> BTreeMap<String, (Tokens, String)> {
    let rows = site
        .ask("SELECT request_id, ifNull(engine_prompt_tokens, 0) AS prompt, ifNull(engine_completion_tokens, 0) AS completion, usage_source FROM request_events FINAL")
        .await
        .expect("rows");
    let row = |row: &serde_json::Value| {
        let number = |name: &str| row[name].as_u64().expect("a number");
        let text = |name: &str| row[name].as_str().expect("a text").to_owned();
        (
            text("request_id"),
            ([number("prompt"), number("completion")], text("usage_source")),
        )
    };
    rows.iter().map(row).collect()
}

/// Waits until what is nobody's in a span is this much. A row's last revision may still be on its way.
async fn until_unattributed(site: &Installed, span: Span, tokens: Tokens) {
    let sums = format!(
        "SELECT sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion FROM cost_ledger FINAL WHERE team_id = '__unattributed__' AND {}",
        within(span)
    );
    let mut last = None;
    let found = tokio::time::timeout(DEADLINE, async {
        loop {
            let rows = site.ask(&sums).await.unwrap_or_default();
            last = rows
                .first()
                .map(|row| ["prompt", "completion"].map(|name| row[name].as_u64().unwrap_or(0)));
            if last == Some(tokens) {
                return;
            }
            tokio::task::yield_now().await;
        }
    });
    if found.await.is_ok() {
        return;
    }
    let heads = site
        .ask(&format!(
            "SELECT * FROM ledger_windows FINAL WHERE {} ORDER BY window_start",
            within(span)
        ))
        .await;
    panic!("expected {tokens:?} tokens to be nobody's, found {last:?} in {heads:#?}");
}
