//! The task that reads one upstream's `/metrics` over and over, and the page it remembers.

use super::delta::Growth;
use super::families::{Model, Page, PageError};
use super::fetch::{self, FetchError};
use super::{SampleSink, SystemSample};
use crate::config::{UpstreamConfig, UpstreamUrl};
use crate::metrics::ScrapeMetrics;
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, ACCEPT_ENCODING};
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// Where vLLM's families are.
const PATH: &str = "/metrics";

/// Bounds on one scrape.
#[derive(Clone, Copy, Debug)]
struct Limits {
    connect: Duration,
    whole: Duration,
    body_bytes_max: usize,
}

const LIMITS: Limits = Limits {
    // As for requests: a host that does not answer by then is not there.
    connect: Duration::from_secs(2),
    // vLLM renders its page between two tokens within milliseconds; a server that takes longer than this is stuck.
    whole: Duration::from_secs(5),
    // A page of one engine is 60 kB. This is room for 250 of them.
    body_bytes_max: 16 * 1024 * 1024,
};

/// Why a scrape gave no page.
#[derive(Debug, thiserror::Error)]
pub enum ScrapeError {
    /// The server cannot be reached.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The page did not come in time.
    #[error("expected the whole page within {0:?}; the server is stuck or overloaded")]
    Timeout(Duration),
    /// The connection broke, or what came is no HTTP.
    #[error("no whole response: {0}")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server answers something else than 200.
    #[error("expected status 200 at {PATH}, found {0}")]
    Status(StatusCode),
    /// The page is too long.
    #[error("expected a page of at most {0} bytes")]
    TooLarge(usize),
    /// The page cannot be used.
    #[error(transparent)]
    Page(#[from] PageError),
}

impl ScrapeError {
    /// Every [`ScrapeError::reason`].
    pub const REASONS: [&'static str; 7] = [
        "connect",
        "timeout",
        "broken",
        "status",
        "too_large",
        "not_prometheus",
        "not_vllm",
    ];

    /// The name in metrics and rows.
    pub fn reason(&self) -> &'static str {
        match self {
            ScrapeError::Connect(_) => "connect",
            ScrapeError::Timeout(_) => "timeout",
            ScrapeError::Broken(_) => "broken",
            ScrapeError::Status(_) => "status",
            ScrapeError::TooLarge(_) => "too_large",
            ScrapeError::Page(PageError::NotPrometheus { .. }) => "not_prometheus",
            ScrapeError::Page(PageError::NotVllm) => "not_vllm",
        }
    }
}

/// Scrapes one upstream.
pub struct Scraper {
    gateway_id: Box<str>,
    upstream: Box<str>,
    url: UpstreamUrl,
    limits: Limits,
    metrics: ScrapeMetrics,
    sinks: Vec<Arc<dyn SampleSink>>,
    /// The last page, and when it was there. A scrape that fails leaves it, so that the next difference covers the gap.
    last: Option<(Page, Instant)>,
    /// Whether the last scrape failed: the log tells only changes.
    failing: bool,
}

impl Scraper {
    /// A scraper of `upstream`, whose samples go to `sinks`.
    pub fn new(
        gateway_id: &str,
        upstream: &UpstreamConfig,
        metrics: ScrapeMetrics,
        sinks: Vec<Arc<dyn SampleSink>>,
    ) -> Scraper {
        Scraper {
            gateway_id: gateway_id.into(),
            upstream: upstream.name.as_str().into(),
            url: upstream.url.clone(),
            limits: LIMITS,
            metrics,
            sinks,
            last: None,
            failing: false,
        }
    }

    /// Scrapes every `every` until the task is ended. A scrape that takes longer makes the next ones fall out.
    pub async fn run(mut self, every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            self.scrape().await;
        }
    }

    /// Scrapes once: a sample for each model, by name, or one that says why there is none. The metrics and the sinks have them too.
    pub async fn scrape(&mut self) -> Vec<SystemSample> {
        let started = Instant::now();
        let fetched = timeout(self.limits.whole, fetch(&self.url, self.limits)).await;
        let (arrived, scraped_at_ms) = (Instant::now(), wall_ms());
        let page = match fetched {
            Ok(Ok(body)) => read(body).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ScrapeError::Timeout(self.limits.whole)),
        };
        let base = SystemSample {
            scraped_at_ms,
            gateway_id: self.gateway_id.clone(),
            upstream: self.upstream.clone(),
            scrape_us: u64::try_from((arrived - started).as_micros()).unwrap_or(u64::MAX),
            ..SystemSample::default()
        };
        self.log_change(page.as_ref().err());
        let samples = match page {
            Ok(page) => self.samples(page, arrived, &base),
            Err(error) => vec![SystemSample {
                error: error.reason(),
                ..base
            }],
        };
        self.metrics.record(&samples);
        for sample in &samples {
            self.sinks.iter().for_each(|sink| sink.record(sample));
        }
        samples
    }

    /// The samples of `page`, which becomes the one that the next is compared with.
    fn samples(&mut self, page: Page, arrived: Instant, base: &SystemSample) -> Vec<SystemSample> {
        let samples = page.models.iter().map(|(name, model)| {
            let mut sample = base.clone();
            sample.describe(name, model);
            if let Some((before, since, is_same_process)) = self.before(name, &page) {
                match Growth::between(before, model).filter(|_| is_same_process) {
                    Some(growth) => sample.compare(growth, arrived - since),
                    None => sample.counter_reset = true,
                }
            }
            sample
        });
        let samples = samples.collect();
        if page.left_out > 0 {
            tracing::debug!(
                upstream = &*self.upstream,
                samples = page.left_out,
                "too many models; some were left out"
            );
        }
        self.last = Some((page, arrived));
        samples
    }

    /// What the last page said of a model, when that was, and whether `page` is by the same process.
    fn before(&self, model: &str, page: &Page) -> Option<(&Model, Instant, bool)> {
        let (last, since) = self.last.as_ref()?;
        Some((
            last.models.get(model)?,
            *since,
            last.process_start_s == page.process_start_s,
        ))
    }

    fn log_change(&mut self, error: Option<&ScrapeError>) {
        let upstream = &*self.upstream;
        match error {
            Some(error) if !self.failing => {
                tracing::warn!(upstream, url = %self.url, %error, "no metrics of the upstream")
            }
            Some(error) => tracing::debug!(upstream, %error, "still no metrics of the upstream"),
            None if self.failing => tracing::info!(upstream, "the upstream's metrics can be read again"),
            None => {}
        }
        self.failing = error.is_some();
    }
}

/// Wall clock, milliseconds since 1970.
fn wall_ms() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX)
}

/// Gets the page on a connection of its own: scrapes are farther apart than vLLM keeps an idle connection.
async fn fetch(url: &UpstreamUrl, limits: Limits) -> Result<Bytes, ScrapeError> {
    let request = fetch::get(url, PATH)
        .header(ACCEPT, "text/plain;version=0.0.4")
        .header(ACCEPT_ENCODING, "identity");
    let answer = fetch::send(url, request, Bytes::new(), limits.connect).await?;
    if answer.status() != StatusCode::OK {
        return Err(ScrapeError::Status(answer.status()));
    }
    Ok(answer.body(limits.body_bytes_max).await?)
}

impl From<FetchError> for ScrapeError {
    fn from(error: FetchError) -> ScrapeError {
        match error {
            FetchError::Connect(source) => ScrapeError::Connect(source),
            FetchError::Broken(source) => ScrapeError::Broken(source),
            FetchError::TooLarge(bytes_max) => ScrapeError::TooLarge(bytes_max),
        }
    }
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> ScrapeError {
    ScrapeError::Broken(error.into())
}

/// Reads the page beside the runtime's threads: the largest allowed takes a tenth of a second, and these threads carry requests.
async fn read(body: Bytes) -> Result<Page, ScrapeError> {
    let read = tokio::task::spawn_blocking(move || Page::read(&body)).await;
    Ok(read.map_err(broken)??)
}

#[cfg(test)]
mod tests;
