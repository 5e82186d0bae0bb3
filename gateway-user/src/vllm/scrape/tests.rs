//! Real pages against figures worked out by hand, and what becomes of pages that do not come.

use super::*;
use crate::config::Config;
use crate::metrics::{Limits as Labels, Metrics};
use crate::reconcile::Bounds;
use crate::vllm::page::ByReason;
use crate::vllm::{Means, Percentiles};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const UNDER_LOAD: &str = include_str!("../../../tests/fixtures/vllm-0.32.0/metrics_under_load.prom");
const AFTER: &str = include_str!("../../../tests/fixtures/vllm-0.32.0/metrics_after.prom");
const POOLING: &str = include_str!("../../../tests/fixtures/vllm-0.32.0/metrics_pooling.prom");

fn metrics() -> Metrics {
    Metrics::new(Labels::default()).unwrap()
}

fn scraper(addr: SocketAddr, metrics: &Metrics) -> Scraper {
    let yaml = format!("upstreams:\n  - {{name: gpu-1, url: \"http://{addr}\", serves: generate}}\n");
    let config = Config::parse("test.yaml", &yaml, &|_| None).unwrap_or_else(|error| panic!("{error}"));
    let mut scraper = Scraper::new("gw", &config.upstreams[0], metrics.scrape("gpu-1"), Vec::new());
    // Generous, for a busy machine; the test of the timeout has its own.
    scraper.limits = Limits {
        connect: Duration::from_secs(30),
        whole: Duration::from_secs(30),
        body_bytes_max: 100_000,
    };
    scraper
}

/// The samples of pages that come `seconds` apart.
fn samples_of(pages: &[&str], seconds: u64) -> Vec<Vec<SystemSample>> {
    let mut scraper = scraper(SocketAddr::from(([127, 0, 0, 1], 1)), &metrics());
    let start = Instant::now();
    let base = SystemSample {
        upstream: "gpu-1".into(),
        ..SystemSample::default()
    };
    let each = pages.iter().zip(0..).map(|(text, index)| {
        let page = Page::read(text.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
        scraper.samples(page, start + Duration::from_secs(seconds * index), &base)
    });
    each.collect()
}

fn at(p50_us: u64, p95_us: u64, p99_us: u64) -> Percentiles {
    Percentiles {
        p50_us: Some(p50_us),
        p95_us: Some(p95_us),
        p99_us: Some(p99_us),
    }
}

fn reasons(counts: [u64; 5]) -> ByReason {
    ["stop", "length", "abort", "error", "repetition"]
        .map(Box::from)
        .into_iter()
        .zip(counts)
        .collect()
}

/// A page whose counters and buckets all begin at 0, as before the first request: the difference to it is the page itself.
fn zeroed(page: &str) -> String {
    let counts =
        |line: &str| !line.starts_with('#') && (line.contains("_bucket{") || line.contains("_total{"));
    let line = |line: &str| match line.rsplit_once(' ') {
        Some((series, _)) if counts(line) => format!("{series} 0.0\n"),
        _ => format!("{line}\n"),
    };
    page.lines().map(line).collect()
}

#[test]
fn the_page_under_load_says_what_stands() {
    let [sample] = samples_of(&[UNDER_LOAD], 15).remove(0).try_into().unwrap();
    let expected = SystemSample {
        upstream: "gpu-1".into(),
        model: "tiny".into(),
        ok: true,
        condition: Some(Condition::Running),
        engines: 1,
        running: Some(24.0),
        waiting: Some(0.0),
        kv_cache_usage: Some(0.0014649331624244644),
        preemptions_total: Some(0),
        prompt_tokens_total: Some(1780),
        generation_tokens_total: Some(599),
        engine_steps_total: Some(250),
        ..SystemSample::default()
    };
    assert_eq!(
        sample, expected,
        "at the first scrape nothing is known of any interval"
    );
}

#[test]
fn between_the_two_pages_24_requests_ended() {
    let [sample] = samples_of(&[UNDER_LOAD, AFTER], 2).remove(1).try_into().unwrap();
    let expected = SystemSample {
        upstream: "gpu-1".into(),
        model: "tiny".into(),
        ok: true,
        condition: Some(Condition::Up),
        interval_us: Some(2_000_000),
        engines: 1,
        running: Some(0.0),
        waiting: Some(0.0),
        kv_cache_usage: Some(0.0),
        // 1780 tokens had been looked up before as after.
        prefix_cache_hit_ratio: None,
        preemptions_total: Some(0),
        preemptions_delta: Some(0),
        prompt_tokens_total: Some(1780),
        prompt_tokens_delta: Some(0),
        prompt_tokens_per_second: Some(0.0),
        generation_tokens_total: Some(729),
        engine_steps_total: Some(256),
        engine_steps_delta: Some(6),
        // 729 - 599, in 2 s.
        generation_tokens_delta: Some(130),
        generation_tokens_per_second: Some(65.0),
        request_success: reasons([0, 24, 0, 0, 0]),
        // 45 first tokens on both pages.
        ttft: Percentiles::default(),
        // All 130 gaps are in the bucket from 10 to 25 ms: 10 + 15·0.5, 10 + 15·0.95, 10 + 15·0.99.
        itl: at(17_500, 24_250, 24_850),
        // All 24 are in the first bucket, from 0 to 300 ms.
        queue: at(150_000, 285_000, 297_000),
        prefill: at(150_000, 285_000, 297_000),
        decode: at(150_000, 285_000, 297_000),
        // What the buckets cannot tell: 24 requests waited for 1 ms together, 24 prefills took 0.5 s, and 130 gaps 1.8 s.
        means: Means {
            queue_us: Some(48),
            prefill_us: Some(21_230),
            itl_us: Some(14_174),
        },
        ..SystemSample::default()
    };
    assert_eq!(sample, expected);
}

#[test]
fn since_its_start_the_server_has_done_what_the_page_says() {
    let [sample] = samples_of(&[&zeroed(AFTER), AFTER], 10)
        .remove(1)
        .try_into()
        .unwrap();
    assert_eq!(sample.prefix_cache_hit_ratio, Some(640.0 / 1780.0));
    assert_eq!(
        (sample.prompt_tokens_delta, sample.prompt_tokens_per_second),
        (Some(1780), Some(178.0))
    );
    // 45 first tokens. p50: rank 22.5, the 10 between 40 and 60 ms follow 18: 40 + 20·4.5/10.
    // p95: rank 42.75, the 2 between 100 and 250 ms follow 42: 100 + 150·0.75/2.
    // p99: rank 44.55, the last one is between 20 and 40 s: 20 + 20·0.55/1.
    assert_eq!(sample.ttft, at(49_000, 156_250, 31_000_000));
    // 684 gaps. p50: rank 342, the 457 between 10 and 25 ms follow 217: 10 + 15·125/457 = 14.1028.
    // p95: rank 649.8: 10 + 15·432.8/457 = 24.2057. p99: rank 677.16, 10 between 25 and 50 ms follow 674: 25 + 25·3.16/10.
    assert_eq!(sample.itl, at(14_103, 24_206, 32_900));
    // 43, all within 300 ms.
    assert_eq!(sample.queue, at(150_000, 285_000, 297_000));
    // 43, of which 42 within 300 ms: 300·21.5/42 = 153.571, 300·40.85/42 = 291.786; p99: rank 42.57 between 20 and 30 s.
    assert_eq!(sample.prefill, at(153_571, 291_786, 25_700_000));
    // As before, but the last one is between 300 and 500 ms: 300 + 200·0.57.
    assert_eq!(sample.decode, at(153_571, 291_786, 414_000));
}

#[test]
fn an_embedding_server_generates_nothing() {
    let [sample] = samples_of(&[&zeroed(POOLING), POOLING], 10)
        .remove(1)
        .try_into()
        .unwrap();
    assert_eq!(
        (&*sample.model, sample.engines, sample.running),
        ("tiny-embed", 1, Some(0.0))
    );
    assert_eq!(
        (sample.prompt_tokens_delta, sample.generation_tokens_delta),
        (Some(18), Some(0))
    );
    assert_eq!(sample.request_success, reasons([3, 0, 0, 0, 0]));
    // 3 first "tokens": 2 between 10 and 20 ms, 1 between 60 and 80. p50: 10 + 10·1.5/2; p95: 60 + 20·0.85; p99: 60 + 20·0.97.
    assert_eq!(sample.ttft, at(17_500, 77_000, 79_400));
    assert_eq!(sample.itl, Percentiles::default(), "no gap, no percentile");
}

#[test]
fn a_restart_is_a_reset_even_when_every_counter_has_grown() {
    let started = "process_start_time_seconds 1.79535524879e+09";
    assert!(AFTER.contains(started));
    let restarted = AFTER.replace(started, "process_start_time_seconds 1.79535999999e+09");
    for (pages, reset) in [
        ([UNDER_LOAD, &*restarted], true),
        ([AFTER, UNDER_LOAD], true),
        ([UNDER_LOAD, AFTER], false),
    ] {
        let [sample] = samples_of(&pages, 15).remove(1).try_into().unwrap();
        assert_eq!((sample.ok, sample.counter_reset), (true, reset));
        assert_eq!(
            (
                sample.interval_us.is_none(),
                sample.generation_tokens_delta.is_none()
            ),
            (reset, reset)
        );
        assert_eq!(
            (
                sample.request_success.is_empty(),
                sample.itl == Percentiles::default()
            ),
            (reset, reset)
        );
        assert!(
            sample.generation_tokens_total.is_some(),
            "what stands is known all the same"
        );
    }
    let third = samples_of(&[AFTER, UNDER_LOAD, AFTER], 15).remove(2).remove(0);
    assert_eq!(
        third.generation_tokens_delta,
        Some(130),
        "the page after a reset is compared again"
    );
}

#[test]
fn each_model_has_its_own_sample_and_history() {
    let both = UNDER_LOAD.to_owned() + POOLING;
    let samples = samples_of(&[UNDER_LOAD, &both, &(AFTER.to_owned() + POOLING)], 15);
    let names = |index: usize| {
        samples[index]
            .iter()
            .map(|sample| &*sample.model)
            .collect::<Vec<_>>()
    };
    assert_eq!((names(0), names(1)), (vec!["tiny"], vec!["tiny", "tiny-embed"]));
    assert_eq!(samples[2][0].generation_tokens_delta, Some(130));
    assert_eq!(samples[2][1].generation_tokens_delta, Some(0));
    assert_eq!(
        samples[1][1].generation_tokens_delta, None,
        "a model's first scrape"
    );
    assert!(!samples[1][1].counter_reset);
}

/// The row has to have the table's columns, no more and no fewer: the server refuses a name that it does not know.
#[test]
fn the_json_form_has_the_columns_of_the_table() {
    let sql = include_str!("../../../../sql/0003_vllm_system_metrics.sql");
    let body = sql
        .split_once("\n(\n")
        .and_then(|(_, rest)| rest.split_once("\n)\n"))
        .unwrap()
        .0;
    let added = concat!(
        include_str!("../../../../sql/0006_reconciliation.sql"),
        include_str!("../../../../sql/0007_engine_steps.sql"),
    );
    let added = added
        .lines()
        .filter_map(|line| line.trim().strip_prefix("ADD COLUMN IF NOT EXISTS "));
    let columns: BTreeSet<&str> = body
        .lines()
        .chain(added)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let sample = samples_of(&[UNDER_LOAD, AFTER], 15).remove(1).remove(0);
    let json = serde_json::to_value(&sample).unwrap();
    let fields: BTreeSet<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, columns);
    assert_eq!(json["itl_p95_us"], 24_250);
    assert_eq!(json["ttft_p50_us"], serde_json::Value::Null);
    assert_eq!(json["condition"], "up");
    assert_eq!(json["request_success"]["length"], 24);
    let text = serde_json::to_string(&SystemSample {
        scraped_at_ms: 1_700_000_000_123,
        ..sample
    })
    .unwrap();
    assert!(text.starts_with("{\"scraped_at\":1700000000123,"), "{text}");
}

/// Answers each connection with the next of `responses`, then closes it; keeps what was asked.
async fn server(responses: Vec<Vec<u8>>) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&asked);
    tokio::spawn(async move {
        for response in responses {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert_ne!(
                    stream.read_buf(&mut request).await.unwrap(),
                    0,
                    "a request has an end"
                );
            }
            keep.lock().unwrap().push(String::from_utf8(request).unwrap());
            // A client that has seen enough may be gone before the end.
            let _ = stream.write_all(&response).await;
        }
    });
    (addr, asked)
}

fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[derive(Default)]
struct Kept(Mutex<Vec<SystemSample>>);

impl SampleSink for Kept {
    fn record(&self, sample: &SystemSample) {
        self.0.lock().unwrap().push(sample.clone());
    }
}

#[tokio::test]
async fn every_failure_has_its_reason_and_leaves_one_row() {
    let status = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n".to_vec();
    let endless = [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), b"# padding\n".repeat(11_000)].concat();
    let torn = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nvllm:".to_vec();
    let cases = [
        ("status", status),
        ("too_large", endless),
        ("broken", torn),
        ("broken", b"SSH-2.0-x\r\n\r\n".to_vec()),
        ("not_prometheus", ok("<html>\n")),
        ("not_vllm", ok("up 1\n")),
    ];
    let (addr, asked) = server(cases.iter().map(|(_, response)| response.clone()).collect()).await;
    let (metrics, kept) = (metrics(), Arc::new(Kept::default()));
    let mut scraper = scraper(addr, &metrics);
    scraper.sinks = vec![kept.clone()];
    for (reason, _) in &cases {
        let [sample] = scraper.scrape().await.try_into().unwrap();
        let expected = SystemSample {
            error: reason,
            condition: Some(match *reason {
                // Only a server that says so itself is known to be loading.
                "status" => Condition::Loading,
                _ => Condition::Down,
            }),
            gateway_id: "gw".into(),
            upstream: "gpu-1".into(),
            scraped_at_ms: sample.scraped_at_ms,
            scrape_us: sample.scrape_us,
            ..SystemSample::default()
        };
        assert_eq!(sample, expected);
        assert!(sample.scraped_at_ms > 1_700_000_000_000 && sample.scrape_us > 0);
    }
    assert_eq!(kept.0.lock().unwrap().len(), cases.len());
    let text = metrics.encode().unwrap();
    assert!(
        text.contains("gateway_scrape_failures_total{reason=\"broken\",upstream=\"gpu-1\"} 2\n"),
        "{text}"
    );
    assert!(
        text.contains("gateway_scrape_success{upstream=\"gpu-1\"} 0\n"),
        "{text}"
    );
    let asked = asked.lock().unwrap();
    assert!(asked[0].starts_with("GET /metrics HTTP/1.1\r\n"), "{}", asked[0]);
    assert!(
        asked[0]
            .to_ascii_lowercase()
            .contains(&format!("\r\nhost: {addr}\r\n")),
        "{}",
        asked[0]
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_or_says_nothing() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut waiting = scraper(silent.local_addr().unwrap(), &metrics());
    waiting.limits.whole = Duration::from_millis(50);
    assert_eq!(waiting.scrape().await[0].error, "timeout");

    let addr = silent.local_addr().unwrap();
    drop(silent);
    let mut refused = scraper(addr, &metrics());
    let sample = refused.scrape().await.remove(0);
    assert_eq!(
        (sample.error, sample.condition),
        ("connect", Some(Condition::Down))
    );
    refused.scale_to_zero = true;
    let sample = refused.scrape().await.remove(0);
    assert_eq!(sample.condition, Some(Condition::ScaledToZero));
}

/// vLLM's port is bound and refuses connections until the model is loaded; then the page says since when the process was there.
#[tokio::test]
async fn rows_of_a_server_that_was_loading_are_written_again_when_that_is_known() {
    let (metrics, kept) = (metrics(), Arc::new(Kept::default()));
    let mut scraper = scraper(SocketAddr::from(([127, 0, 0, 1], 1)), &metrics);
    scraper.sinks = vec![kept.clone()];
    let start = Instant::now();
    let refused = |error: &ScrapeError, at_s: i64, scraper: &mut Scraper| {
        let base = SystemSample {
            scraped_at_ms: 1_795_355_248_790 + at_s * 1_000,
            ..SystemSample::default()
        };
        scraper.failed(error, start, base)
    };
    let connect = ScrapeError::Connect(io::ErrorKind::ConnectionRefused.into());
    for at_s in [-20, -5, 10, 25] {
        let sample = refused(&connect, at_s, &mut scraper);
        assert_eq!(sample.condition, Some(Condition::Down), "nobody knows yet");
    }
    let said = refused(
        &ScrapeError::Status(StatusCode::SERVICE_UNAVAILABLE),
        40,
        &mut scraper,
    );
    assert_eq!(said.condition, Some(Condition::Loading));
    // Its process started at 1795355248.79.
    scraper.explain(&Page::read(AFTER.as_bytes()).unwrap());
    let again = kept.0.lock().unwrap().clone();
    let said = |sample: &SystemSample| (sample.scraped_at_ms - 1_795_355_248_790, sample.condition);
    let loading = Some(Condition::Loading);
    assert_eq!(
        again.iter().map(said).collect::<Vec<_>>(),
        [(10_000, loading), (25_000, loading)],
        "before its process there was none"
    );
    scraper.explain(&Page::read(AFTER.as_bytes()).unwrap());
    assert_eq!(kept.0.lock().unwrap().len(), 2, "they are written again once");
}

#[test]
fn a_page_says_whether_the_engine_sleeps_and_where_its_prompts_are_prefilled() {
    let awake = "sleep_state=\"awake\"} 1.0";
    assert!(AFTER.contains(awake));
    let asleep = AFTER.replace(awake, "sleep_state=\"awake\"} 0.0");
    let transferred = "source=\"p2p\"} 0.0";
    assert!(AFTER.contains(transferred));
    let decode = AFTER.replace(transferred, "source=\"p2p\"} 9.0");
    let of = |page: &str| {
        let sample = samples_of(&[page], 15).remove(0).remove(0);
        (sample.condition, sample.unsupported)
    };
    assert_eq!(of(AFTER), (Some(Condition::Up), ""));
    assert_eq!(of(&asleep), (Some(Condition::Asleep), ""));
    assert_eq!(of(&decode), (Some(Condition::Up), "external_kv"));
}

#[tokio::test]
async fn a_failed_scrape_takes_the_series_away_and_its_tokens_come_with_the_next() {
    let failure = b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n".to_vec();
    let pages = vec![
        ok(&zeroed(UNDER_LOAD)),
        ok(UNDER_LOAD),
        failure,
        ok(AFTER),
        ok(UNDER_LOAD),
        ok(POOLING),
    ];
    let (addr, _) = server(pages).await;
    let metrics = metrics();
    let mut scraper = scraper(addr, &metrics);
    let value = |series: &str| {
        let text = metrics.encode().unwrap();
        let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        lines
            .find(|(name, _)| *name == series)
            .map(|(_, value)| value.parse::<f64>().unwrap())
    };
    let tiny = |family: &str| {
        value(&format!(
            "gateway_vllm_{family}{{model=\"tiny\",upstream=\"gpu-1\"}}"
        ))
    };
    let ended =
        || value("gateway_vllm_request_success_total{model=\"tiny\",reason=\"length\",upstream=\"gpu-1\"}");

    scraper.scrape().await;
    assert_eq!(
        (tiny("requests_running"), tiny("generation_tokens_total")),
        (Some(24.0), Some(0.0))
    );
    scraper.scrape().await;
    assert_eq!(
        (tiny("prompt_tokens_total"), tiny("generation_tokens_total")),
        (Some(1780.0), Some(599.0))
    );
    assert_eq!(
        (tiny("prefix_cache_hit_ratio"), ended()),
        (Some(640.0 / 1780.0), Some(19.0))
    );
    assert_eq!(
        (tiny("preemptions_total"), tiny("requests_waiting")),
        (Some(0.0), Some(0.0))
    );

    scraper.scrape().await;
    assert!(
        !metrics.encode().unwrap().contains("gateway_vllm_"),
        "nothing stays frozen at its last value"
    );
    assert_eq!(value("gateway_scrape_success{upstream=\"gpu-1\"}"), Some(0.0));

    let after = scraper.scrape().await;
    assert_eq!(
        after[0].generation_tokens_delta,
        Some(130),
        "across the failed scrape nothing is lost"
    );
    assert_eq!(
        (tiny("generation_tokens_total"), ended()),
        (Some(130.0), Some(24.0))
    );
    assert_eq!(
        tiny("prefix_cache_hit_ratio"),
        None,
        "no queries: unknown, not the value before"
    );
    assert_eq!(value("gateway_scrape_success{upstream=\"gpu-1\"}"), Some(1.0));

    let resets = || value("gateway_scrape_resets_total{upstream=\"gpu-1\"}");
    assert_eq!(resets(), Some(0.0));
    scraper.scrape().await;
    assert_eq!(
        (resets(), tiny("generation_tokens_total")),
        (Some(1.0), Some(130.0)),
        "a reset adds nothing"
    );

    scraper.scrape().await;
    assert!(
        !metrics.encode().unwrap().contains("model=\"tiny\""),
        "the model is gone, and so are its series"
    );
}

#[tokio::test]
async fn counters_of_several_processes_in_turn_are_compared_with_nothing() {
    let started = "process_start_time_seconds 1.79535524879e+09";
    assert!(AFTER.contains(started));
    let other = AFTER.replace(started, "process_start_time_seconds 1.79535999999e+09");
    let pages = [UNDER_LOAD, &*other, AFTER, AFTER].map(ok);
    let (addr, _) = server(pages.to_vec()).await;
    let (metrics, tally) = (metrics(), Arc::<Tally>::default());
    let bounds = Bounds::of(&Config::default());
    let reconciler = Reconciler::new(
        "gpu-1",
        Arc::clone(&tally),
        None,
        bounds,
        metrics.reconciliation("gpu-1"),
    );
    let mut scraper = scraper(addr, &metrics).reconciling(Arc::clone(&tally), reconciler);
    let shared = || {
        let text = metrics.encode().unwrap();
        text.contains("gateway_reconciliation_gap_cause{cause=\"shared_address\",upstream=\"gpu-1\"} 1\n")
    };
    let mut attributed = Vec::new();
    for is_shared in [false, false, true, true] {
        attributed.push(scraper.scrape().await[0].attributed_completion_tokens);
        assert_eq!(
            shared(),
            is_shared,
            "two processes could be a restart, three cannot"
        );
    }
    assert_eq!(attributed, [None, Some(0), Some(0), Some(0)]);
    let text = metrics.encode().unwrap();
    assert!(
        text.contains(
            "gateway_reconciliation_engine_tokens_total{type=\"completion\",upstream=\"gpu-1\"} 0\n"
        ),
        "{text}"
    );
    assert_eq!(tally.base_model().as_deref(), Some("tiny"));
}
