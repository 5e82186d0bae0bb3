//! The task that reads one upstream's `/metrics` over and over, and the page it remembers.

use super::delta::Growth;
use super::fetch::{self, FetchError};
use super::origin::{Origins, follows};
use super::page::{Model, Page, PageError, Unsupported};
use super::{SampleSink, SystemSample};
use crate::config::{UpstreamConfig, UpstreamUrl};
use crate::ledger::Condition;
use crate::metrics::ScrapeMetrics;
use crate::reconcile::{Outcome, Reconciler};
use crate::tally::Tally;
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, ACCEPT_ENCODING};
use std::collections::VecDeque;
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

    /// How the server is that gave this instead of a page. Whether it is loading its model is mostly known only later: vLLM does not listen
    /// before it has.
    fn condition(&self, scale_to_zero: bool) -> Condition {
        match self {
            ScrapeError::Connect(_) if scale_to_zero => Condition::ScaledToZero,
            ScrapeError::Status(StatusCode::SERVICE_UNAVAILABLE) => Condition::Loading,
            _ => Condition::Down,
        }
    }

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
    scale_to_zero: bool,
    external_kv_is_cache: bool,
    origins: Origins,
    /// Rows of scrapes that failed since the last page, which may turn out to be of a server that was loading.
    unexplained: VecDeque<SystemSample>,
    unsupported: Option<Unsupported>,
    /// What was booked of it, and what is made of that.
    reconciling: Option<(Arc<Tally>, Reconciler)>,
}

/// Most such rows: four hours at 15 s, longer than any model takes to load.
const UNEXPLAINED_MAX: usize = 1_000;

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
            scale_to_zero: upstream.scale_to_zero,
            external_kv_is_cache: upstream.external_kv_is_cache,
            origins: Origins::default(),
            unexplained: VecDeque::new(),
            unsupported: None,
            reconciling: None,
        }
    }

    /// The same, which also tells what was booked (`tally`) what it learns, and holds its counts against it.
    pub fn reconciling(mut self, tally: Arc<Tally>, reconciler: Reconciler) -> Scraper {
        self.reconciling = Some((tally, reconciler));
        self
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
            Ok(page) => {
                self.explain(&page);
                self.samples(page, arrived, &base)
            }
            Err(error) => vec![self.failed(&error, arrived, base)],
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
        let mut samples: Vec<SystemSample> = samples.collect();
        self.learn(&page, arrived, &mut samples);
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

    /// The sample of a scrape that failed.
    fn failed(&mut self, error: &ScrapeError, at: Instant, base: SystemSample) -> SystemSample {
        let sample = SystemSample {
            error: error.reason(),
            condition: Some(error.condition(self.scale_to_zero)),
            ..base
        };
        if self.unexplained.len() == UNEXPLAINED_MAX {
            self.unexplained.pop_front();
        }
        self.unexplained.push_back(sample.clone());
        if let Some((_, reconciler)) = &mut self.reconciling {
            reconciler.look(at, Outcome::Failed);
        }
        sample
    }

    /// Writes the rows of failed scrapes again that turn out to have been made while the server was loading: its process was there already, by the
    /// server's own clock.
    fn explain(&mut self, page: &Page) {
        let unexplained = std::mem::take(&mut self.unexplained);
        let Some(start_s) = page.process_start_s else {
            return;
        };
        for mut sample in unexplained {
            if sample.scraped_at_ms as f64 >= start_s * 1e3 && sample.condition != Some(Condition::Loading) {
                sample.condition = Some(Condition::Loading);
                self.sinks.iter().for_each(|sink| sink.record(&sample));
            }
        }
    }

    /// Takes note of what the page says of the server as such, and of what was booked since the page before.
    fn learn(&mut self, page: &Page, at: Instant, samples: &mut [SystemSample]) {
        let follows = self.last.as_ref().is_none_or(|(last, _)| follows(last, page));
        self.origins.note(page.process_start_s, follows);
        let unsupported = page.unsupported().filter(|_| !self.external_kv_is_cache);
        for sample in samples.iter_mut() {
            sample.unsupported = unsupported.map_or("", Unsupported::name);
        }
        self.log_unsupported(unsupported);
        let Some((tally, reconciler)) = &mut self.reconciling else {
            return;
        };
        tally.learn(page.only_model(), unsupported);
        let outcome = Outcome::of(samples, self.origins.are_several(), unsupported.is_some());
        let attributed = reconciler.look(at, outcome);
        if let ([sample], Some(attributed)) = (samples, attributed) {
            sample.attributed_prompt_tokens = Some(attributed.prompt_tokens);
            sample.attributed_completion_tokens = Some(attributed.completion_tokens);
        }
    }

    fn log_unsupported(&mut self, unsupported: Option<Unsupported>) {
        if let Some(reason) = unsupported.filter(|_| self.unsupported.is_none()) {
            tracing::warn!(
                upstream = &*self.upstream,
                reason = reason.name(),
                "prompts are prefilled on another server than the one that generates (disaggregated serving): what requests took of either is not \
                 known, so that its time goes to __unattributed__ and not to teams; if it is but a cache, set upstreams[].external_kv_is_cache"
            );
        }
        self.unsupported = unsupported;
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
