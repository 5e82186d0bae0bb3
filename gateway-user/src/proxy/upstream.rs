//! The servers behind the gateway: which of them can take a request, and connections to them.
//!
//! A request goes to the upstreams that serve its route and its model, those that answer their health check first, then the one with the
//! fewest requests in flight. Idle connections are kept shorter than vLLM's keep-alive, and dropped when the server closed them.

use super::refusal::Refusal;
use crate::config::{Config, Serves, UpstreamConfig};
use crate::metrics::{InflightGuard, Metrics, UpstreamMetrics};
use crate::wire::endpoint::{Endpoint, Purpose};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Most idle connections kept to one upstream by one worker. vLLM runs a few hundred sequences at a time.
const IDLE_MAX: usize = 512;

/// One server.
pub struct Upstream {
    config: UpstreamConfig,
    index: usize,
    up: AtomicBool,
    inflight: AtomicUsize,
    metrics: UpstreamMetrics,
}

impl Upstream {
    /// Its configured name.
    pub fn name(&self) -> &str {
        self.config.name.as_str()
    }

    /// Its configuration.
    pub fn config(&self) -> &UpstreamConfig {
        &self.config
    }

    /// Whether the last health check or connection succeeded.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Its metrics.
    pub fn metrics(&self) -> &UpstreamMetrics {
        &self.metrics
    }

    /// Takes note of a check; tells whether that changed anything.
    pub fn set_up(&self, up: bool) -> bool {
        self.metrics.set_up(up);
        self.up.swap(up, Ordering::Relaxed) != up
    }

    /// Requests that it works on for this gateway.
    pub fn inflight(&self) -> usize {
        self.inflight.load(Ordering::Relaxed)
    }

    /// A place for one more request, unless `max_connections` are taken.
    pub fn reserve(self: &Arc<Self>) -> Option<Place> {
        let cap = match self.config.max_connections {
            0 => usize::MAX,
            cap => cap as usize,
        };
        let taken = self
            .inflight
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                (now < cap).then_some(now + 1)
            });
        taken.ok().map(|_| Place {
            upstream: Arc::clone(self),
            _counted: self.metrics.inflight(),
        })
    }

    fn can_serve(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Generate => self.config.serves == Serves::Generate,
            Purpose::Pool => self.config.serves == Serves::Embeddings,
            Purpose::Free | Purpose::Administer | Purpose::Other => true,
        }
    }

    fn names_model(&self, model: &str) -> bool {
        self.config.models.iter().any(|name| name == model)
    }
}

/// A request's place at an upstream; given back when dropped.
pub struct Place {
    upstream: Arc<Upstream>,
    _counted: InflightGuard,
}

impl Place {
    /// Where the place is.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.upstream.inflight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All servers, in the order of the configuration.
pub struct Upstreams {
    all: Vec<Arc<Upstream>>,
}

impl Upstreams {
    /// Those of the configuration. They count as up until a check says otherwise, so that the first request need not wait for one.
    pub fn new(config: &Config, metrics: &Metrics) -> Upstreams {
        let all = config.upstreams.iter().enumerate().map(|(index, upstream)| {
            upstream
                .models
                .iter()
                .for_each(|model| metrics.reserve_model(model));
            let (up, inflight) = (AtomicBool::new(true), AtomicUsize::new(0));
            let metrics = metrics.upstream(upstream.name.as_str());
            metrics.set_up(true);
            Arc::new(Upstream {
                config: upstream.clone(),
                index,
                up,
                inflight,
                metrics,
            })
        });
        Upstreams { all: all.collect() }
    }

    /// Every server.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.all.iter()
    }

    /// The servers that can take a request for `model` at `endpoint`, best first.
    ///
    /// An upstream that lists the model comes before those that take any. A route that no purpose is known for goes to the upstreams of the
    /// model if it names one, else to the first configured.
    ///
    /// # Errors
    /// [`Refusal::NoUpstream`] or [`Refusal::UnknownModel`] when none is configured for it.
    pub fn candidates(&self, endpoint: Endpoint, model: Option<&str>) -> Result<Vec<Arc<Upstream>>, Refusal> {
        let purpose = endpoint.purpose();
        let serving: Vec<_> = self
            .all
            .iter()
            .filter(|upstream| upstream.can_serve(purpose))
            .collect();
        if serving.is_empty() {
            return Err(Refusal::NoUpstream(endpoint));
        }
        let named: Vec<_> = match model {
            Some(model) => serving
                .iter()
                .filter(|upstream| upstream.names_model(model))
                .copied()
                .collect(),
            None => Vec::new(),
        };
        let any: Vec<_> = serving
            .iter()
            .filter(|upstream| upstream.config.models.is_empty())
            .copied()
            .collect();
        let mut chosen = match (named.is_empty(), any.is_empty(), model) {
            (false, _, _) => named,
            (true, false, _) => any,
            (true, true, Some(model)) => return Err(Refusal::UnknownModel(model.to_owned())),
            (true, true, None) => serving,
        };
        if matches!(purpose, Purpose::Free | Purpose::Other | Purpose::Administer) {
            // Routes that any server has: the replicas of the first one's kind, not a mixture of models.
            let first = chosen
                .first()
                .map(|upstream| (upstream.config.serves, upstream.config.models.clone()));
            chosen.retain(|upstream| {
                first.as_ref().is_some_and(|(serves, models)| {
                    upstream.config.serves == *serves && upstream.config.models == *models
                })
            });
        }
        let mut chosen: Vec<_> = chosen.into_iter().map(Arc::clone).collect();
        chosen.sort_by_key(|upstream| (!upstream.is_up(), upstream.inflight()));
        Ok(chosen)
    }
}

/// A connection to an upstream, and whether it has served a request before.
pub struct UpstreamConnection {
    /// The socket.
    pub stream: TcpStream,
    /// Whether it comes from the pool: the server may have closed it in the meantime.
    pub reused: bool,
    _counted: InflightGuard,
}

struct Idle {
    stream: TcpStream,
    since: Instant,
    _counted: InflightGuard,
}

/// Idle connections of one worker. They belong to the runtime that made them, hence a pool each.
pub struct ConnectionPool {
    idle: Vec<Mutex<Vec<Idle>>>,
    idle_max: Duration,
    connect_timeout: Duration,
}

impl ConnectionPool {
    /// An empty pool for all `upstreams`.
    pub fn new(upstreams: &Upstreams, config: &Config) -> ConnectionPool {
        ConnectionPool {
            idle: upstreams.iter().map(|_| Mutex::default()).collect(),
            idle_max: config.proxy.upstream_idle,
            connect_timeout: config.proxy.connect_timeout,
        }
    }

    /// An idle connection to `upstream` that the server has not closed, the last used first.
    pub fn take(&self, upstream: &Upstream) -> Option<UpstreamConnection> {
        loop {
            let idle = self.slot(upstream).pop()?;
            let is_open = matches!(idle.stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
            if is_open && idle.since.elapsed() < self.idle_max {
                let counted = upstream.metrics.active_connection();
                return Some(UpstreamConnection {
                    stream: idle.stream,
                    reused: true,
                    _counted: counted,
                });
            }
        }
    }

    /// Opens a new connection to `upstream`.
    ///
    /// # Errors
    /// Those of name resolution and of `connect`, and `TimedOut`.
    pub async fn connect(&self, upstream: &Upstream) -> io::Result<UpstreamConnection> {
        let url = &upstream.config.url;
        let connecting = TcpStream::connect((url.host(), url.port()));
        let stream = tokio::time::timeout(self.connect_timeout, connecting).await??;
        stream.set_nodelay(true)?;
        Ok(UpstreamConnection {
            stream,
            reused: false,
            _counted: upstream.metrics.active_connection(),
        })
    }

    /// Keeps `connection` for the next request.
    pub fn put(&self, upstream: &Upstream, connection: UpstreamConnection) {
        let mut slot = self.slot(upstream);
        if slot.len() < IDLE_MAX {
            let counted = upstream.metrics.idle_connection();
            slot.push(Idle {
                stream: connection.stream,
                since: Instant::now(),
                _counted: counted,
            });
        }
    }

    /// Closes the connections that have been idle for too long, before the server does.
    pub fn sweep(&self) {
        for slot in &self.idle {
            let mut slot = slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            slot.retain(|idle| idle.since.elapsed() < self.idle_max);
        }
    }

    fn slot(&self, upstream: &Upstream) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle[upstream.index]
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
