//! The gateway as a whole: what is bound and built before it runs, how it runs, and how it ends.

use crate::admin::{AdminServer, Readiness, State};
use crate::bookkeeper::LedgerStats;
use crate::books::{Books, Outlets};
use crate::config::{Capture, Config, LimitsConfig, RuntimeKind, TokenScope};
use crate::correlate::Beside;
use crate::event::{EventSink, Sinks};
use crate::limits::Limiter;
use crate::live::{Live, View};
use crate::metrics::{Limits, Metrics, MetricsError};
use crate::net::{self, BindError};
use crate::proxy::{Shared, Worker, accept, health};
use crate::reconcile::{Bounds, Reconciler};
use crate::store::service::StoreCounts;
use crate::tap::agent::{Agent, Source};
use crate::vllm::{SampleSink, scrape::Scraper};
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::sync::Arc;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot, watch};

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The registry of metrics is broken.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The system gave no threads, timers or sockets.
    #[error("the gateway's runtime could not be started: {0}")]
    Runtime(#[from] io::Error),
}

/// A gateway whose addresses are bound, and that serves nobody yet.
pub struct Gateway {
    shared: Arc<Shared>,
    /// None when there is no proxy.
    listeners: Vec<TcpListener>,
    admin: AdminServer,
    readiness: Readiness,
    view: Arc<View>,
    samples: Vec<Arc<dyn SampleSink>>,
    tap: Option<Arc<Agent>>,
}

impl Gateway {
    /// A gateway behind `listeners`, as [`bind_for_clients`] makes them; binds the address for operators. `source` is the kernel probe,
    /// where there is one: what it sees is booked like what passes through.
    ///
    /// # Errors
    /// [`StartError`], which names the address and who holds it.
    pub fn build(
        config: Config,
        listeners: Vec<TcpListener>,
        outlets: Outlets,
        source: Option<Box<dyn Source>>,
    ) -> Result<Gateway, StartError> {
        let max_teams = config.metrics.max_teams as usize;
        let metrics = Metrics::new(Limits {
            max_teams,
            ..Limits::default()
        })?;
        // Without a source `auto` has come to be the proxy alone.
        metrics.capture(match (config.capture, &source) {
            (Capture::Auto, None) => Capture::Proxy,
            (capture, _) => capture,
        });
        let live = Arc::new(live(&config, &metrics));
        let limiter = Arc::new(Limiter::new(&config.limits, metrics.clone()));
        metrics.show_limits(Arc::downgrade(&limiter))?;
        if listeners.is_empty() && config.limits != LimitsConfig::default() {
            tracing::warn!(
                "nothing passes through a proxy (capture: tap): limits are counted, and nothing can be refused"
            );
        }
        // The live state and the limits take their labels from the metrics, which must have seen an event by then.
        let own: [Arc<dyn EventSink>; 3] = [
            Arc::new(metrics.clone()),
            Arc::clone(&live) as _,
            Arc::clone(&limiter) as _,
        ];
        let books = Books::new(&config, Sinks::new(own.into_iter().chain(outlets.events)));
        let tap = source.map(|source| Arc::new(Agent::new(&config, source, &books, outlets.timings)));
        if let Some(tap) = &tap {
            metrics.show_tap(Arc::downgrade(tap))?;
        }
        let waits = Arc::clone(&books.waits) as Arc<dyn SampleSink>;
        let beside = tap.clone().map(|tap| tap as Arc<dyn Beside>);
        let own_samples = [waits, Arc::clone(&live) as _];
        let shared = Shared::new(config, metrics.clone(), books, limiter, beside);
        let clients = listeners.first().and_then(|listener| listener.local_addr().ok());
        let seen_by_tap = tap.as_ref().map(Arc::downgrade);
        let view = Arc::new(View::new(live, Arc::clone(&shared), clients, seen_by_tap));
        let readiness = Readiness::default();
        let admin = AdminServer::bind(
            &shared.config.admin,
            metrics,
            readiness.clone(),
            Arc::clone(&view),
        )?;
        Ok(Gateway {
            shared,
            listeners,
            admin,
            readiness,
            view,
            samples: own_samples.into_iter().chain(outlets.samples).collect(),
            tap,
        })
    }

    /// How much each team may take.
    pub fn limiter(&self) -> &Arc<Limiter> {
        &self.shared.limiter
    }

    /// The configuration that it runs with.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// The registry of metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Shows a store's numbers too.
    ///
    /// # Errors
    /// When they are shown already, which is a defect of this program.
    pub fn show_store(&self, counts: StoreCounts) -> Result<(), MetricsError> {
        self.view.show_store(counts.clone());
        self.shared.metrics.show_store(counts)
    }

    /// Shows a bookkeeper's numbers too.
    ///
    /// # Errors
    /// When they are shown already, which is a defect of this program.
    pub fn show_ledger(&self, stats: Arc<LedgerStats>) -> Result<(), MetricsError> {
        self.view.show_ledger(Arc::clone(&stats));
        self.shared.metrics.show_ledger(stats)
    }

    /// Where clients connect, if there is a proxy.
    pub fn client_addr(&self) -> Option<SocketAddr> {
        self.listeners.first()?.local_addr().ok()
    }

    /// Where operators connect.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.local_addr()
    }

    /// The runtime that [`Gateway::run`] wants to be driven by.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn runtime(&self) -> io::Result<Runtime> {
        let config = &self.shared.config;
        let threads = match config.gateway.runtime {
            RuntimeKind::Shared => workers(config).get(),
            // The cores belong to the workers; one thread is left for the admin server and the health checks.
            RuntimeKind::PerCore => 1,
        };
        Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("gateway")
            .enable_all()
            .build()
    }

    /// Serves until `stop` is done, then lets the requests in flight end within the configured grace. Returns how many it had to
    /// cut off.
    ///
    /// # Errors
    /// When the system gives no threads or sockets.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<usize, StartError> {
        let Gateway {
            shared,
            listeners,
            admin,
            readiness,
            view,
            samples,
            tap,
        } = self;
        let tapping = tap.map(Agent::run).transpose()?;
        let (admin_end, admin_ended) = watch::channel(false);
        let admin = tokio::spawn(admin.run(admin_ended));
        let mut checks = tokio::task::JoinSet::new();
        checks.spawn(view.watch());
        for upstream in shared.upstreams.iter() {
            checks.spawn(health::watch(Arc::clone(&shared), Arc::clone(upstream)));
            let metrics = shared.metrics.scrape(upstream.name());
            let scraper = Scraper::new(
                shared.books.ids.gateway_id(),
                upstream.config(),
                metrics,
                samples.clone(),
            );
            let scraper = match shared.books.tallies.of(upstream.name()) {
                Some(tally) => {
                    let reconciler = Reconciler::new(
                        upstream.name(),
                        Arc::clone(tally),
                        shared.beside.clone(),
                        Bounds::of(&shared.config),
                        shared.metrics.reconciliation(upstream.name()),
                    );
                    scraper.reconciling(Arc::clone(tally), reconciler)
                }
                None => scraper,
            };
            checks.spawn(scraper.run(shared.config.vllm.scrape_interval));
        }
        let serving = start_workers(&shared, listeners)?;
        readiness.set(State::Ready);
        stop.await;
        readiness.set(State::Draining);
        shared.phase.drain();
        let mut cut_off = 0;
        for worker in serving {
            cut_off += worker.await.unwrap_or(0);
        }
        // What the kernel has seen so far is booked before the sinks go.
        if let Some(tapping) = tapping {
            tapping.finish();
        }
        // The admin server goes last, so that `/ready` and the last counts can be read until the end.
        admin_end.send_replace(true);
        if let Ok(ended) = admin.await {
            ended?;
        }
        Ok(cut_off)
    }
}

/// The live state of a gateway with this configuration.
fn live(config: &Config, metrics: &Metrics) -> Live {
    let upstreams = config.upstreams.iter().map(|upstream| upstream.name.as_str());
    let teams = config.admin.tokens.iter().filter_map(|token| match &token.scope {
        TokenScope::Team(team) => Some(team.as_str()),
        TokenScope::Admin => None,
    });
    Live::new(metrics.clone(), upstreams, teams)
}

/// Binds the address for clients, once for each worker that has a listener of its own. None without a proxy.
///
/// # Errors
/// [`BindError`], which names the address and who holds it.
pub fn bind_for_clients(config: &Config) -> Result<Vec<TcpListener>, BindError> {
    if config.capture == Capture::Tap {
        return Ok(Vec::new());
    }
    let count = match config.gateway.runtime {
        RuntimeKind::Shared => NonZeroUsize::MIN,
        RuntimeKind::PerCore => workers(config),
    };
    let setting = "gateway.listen or GATEWAY_LISTEN_ADDR";
    net::bind_listeners(config.gateway.listen, "gateway", setting, count)
}

/// Starts what serves each listener; each tells in the end how many requests it had to cut off.
fn start_workers(
    shared: &Arc<Shared>,
    listeners: Vec<TcpListener>,
) -> Result<Vec<oneshot::Receiver<usize>>, StartError> {
    let permits = Arc::new(Semaphore::new(shared.config.proxy.max_connections as usize));
    let per_core = shared.config.gateway.runtime == RuntimeKind::PerCore;
    let start = |listener: TcpListener| -> Result<oneshot::Receiver<usize>, StartError> {
        let (done, ended) = oneshot::channel();
        let (worker, permits) = (Worker::new(shared), Arc::clone(&permits));
        let serve = async move {
            match tokio::net::TcpListener::from_std(listener) {
                // Whoever waits for the number may have gone; then nobody wants it.
                Ok(listener) => drop(done.send(accept::serve(worker, listener, permits).await)),
                Err(error) => tracing::error!(%error, "a listener was lost at start"),
            }
        };
        if per_core {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            std::thread::Builder::new()
                .name("gateway-core".into())
                .spawn(move || runtime.block_on(serve))?;
        } else {
            tokio::spawn(serve);
        }
        Ok(ended)
    };
    listeners.into_iter().map(start).collect()
}

fn workers(config: &Config) -> NonZeroUsize {
    let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    NonZeroUsize::new(config.gateway.workers as usize).unwrap_or_else(cores)
}
