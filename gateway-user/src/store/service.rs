//! The store while the gateway runs: rows into the spool, the engine kept alive, batches and samples on their way to it.
//!
//! Nothing here can keep a request waiting or a gateway from starting, but for a spool directory that cannot be used: an engine that is
//! missing, down or full only means that rows wait.

use super::embedded::{EmbeddedOptions, EmbeddedServer};
use super::queue::{RowQueue, RowSender};
use super::sender::{self, Sender, SenderStats};
use super::{Counted, LeftCharge, Spool, Store, StoreError, Table};
use crate::books::Outlets;
use crate::config::{Config, StoreConfig, StoreUrl};
use crate::event::{EventSink, TimingSink};
use crate::vllm::SampleSink;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long rows wait for an engine that is only starting, before that is worth a word in the log.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long the last batches may take at the end; what is not stored by then waits in the spool for the next start.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

/// The store of one gateway, open and not sending yet.
pub struct StoreService {
    store: Arc<Store>,
    samples: Arc<RowQueue>,
    timings: Arc<RowQueue>,
    config: StoreConfig,
    events: Sender,
    segments: Sender,
}

/// A store that sends.
pub struct RunningStore {
    store: Arc<Store>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl StoreService {
    /// Opens the spool of `config`, with what earlier runs left. `None` when nothing is to be kept.
    ///
    /// # Errors
    /// When the spool's directory cannot be used.
    pub fn open(config: &Config) -> Result<Option<StoreService>, StoreError> {
        let Some(url) = url_of(&config.store) else {
            return Ok(None);
        };
        let gateway = config.gateway.id_or_host_name();
        let store = Arc::new(Store::open(&config.spool, gateway.as_str())?);
        let client = sender::client(&config.store, &url);
        let layout = sender::layout(&config.store);
        let sender = |table| {
            Sender::new(
                table,
                Arc::clone(store.spool_of(table)),
                client.clone(),
                layout.clone(),
            )
        };
        let (events, segments) = (sender(Table::Events), sender(Table::Segments));
        Ok(Some(StoreService {
            store,
            samples: Arc::new(RowQueue::of("vllm_system_metrics")),
            timings: Arc::new(RowQueue::of("tap_timings")),
            config: config.store.clone(),
            events,
            segments,
        }))
    }

    /// Where what the gateway learns goes.
    pub fn outlets(&self) -> Outlets {
        Outlets {
            events: vec![Arc::clone(&self.store) as Arc<dyn EventSink>],
            samples: vec![Arc::clone(&self.samples) as Arc<dyn SampleSink>],
            timings: Some(Arc::clone(&self.timings) as Arc<dyn TimingSink>),
        }
    }

    /// Tells what is charged in events that earlier runs left, and which batches are counted by that, or by this process. To be asked before it
    /// starts to send, and before the first request comes.
    pub fn leftover(&self, each: impl FnMut(LeftCharge<'_>)) -> Counted {
        self.store.spool_of(Table::Events).leftover(each)
    }

    /// What there is to count.
    pub fn counts(&self) -> StoreCounts {
        StoreCounts {
            events: self.counts_of(&self.events, Table::Events),
            segments: self.counts_of(&self.segments, Table::Segments),
            samples: Arc::clone(&self.samples),
            timings: Arc::clone(&self.timings),
        }
    }

    fn counts_of(&self, sender: &Sender, table: Table) -> TableCounts {
        TableCounts {
            spool: Arc::clone(self.store.spool_of(table)),
            sender: sender.stats(),
        }
    }

    /// Begins to send. Must be called on a tokio runtime; `program` is what the embedded engine is started with.
    pub fn start(self, program: PathBuf, variable: fn(&str) -> Option<OsString>) -> RunningStore {
        let StoreService {
            store,
            samples,
            timings,
            config,
            events,
            segments,
        } = self;
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let engine = match config.url {
                StoreUrl::Embedded => start_engine(&config, program, variable).await,
                _ => None,
            };
            let samples = RowSender::new(samples, events.database_client());
            let timings = RowSender::new(timings, events.database_client());
            tokio::join!(
                send(events, stopped.clone()),
                send(segments, stopped.clone()),
                samples.run(stopped.clone()),
                timings.run(stopped.clone())
            );
            if let Some(engine) = engine {
                engine.stop().await;
            }
        });
        RunningStore { store, stop, task }
    }
}

impl RunningStore {
    /// Stores what can be stored at once, and ends the engine. Every sink must be gone by then. What is left waits for the next start.
    pub async fn finish(self) {
        let RunningStore { store, stop, task } = self;
        // The last rows are sealed with the store.
        drop(store);
        stop.send_replace(true);
        if tokio::time::timeout(FINISH_LIMIT, task).await.is_err() {
            tracing::warn!("not all rows could be stored in time; they wait in the spool");
        }
    }
}

async fn send(sender: Sender, stopped: watch::Receiver<bool>) {
    if let Err(error) = sender.run(stopped).await {
        tracing::error!(%error, "nothing is stored; rows wait in the spool");
    }
}

/// The numbers of one table, for metrics.
#[derive(Clone)]
pub struct TableCounts {
    /// The spool.
    pub spool: Arc<Spool>,
    /// What was sent.
    pub sender: Arc<SenderStats>,
}

/// The numbers of a store, for metrics.
#[derive(Clone)]
pub struct StoreCounts {
    /// Requests.
    pub events: TableCounts,
    /// Their segments.
    pub segments: TableCounts,
    /// Samples that wait.
    pub samples: Arc<RowQueue>,
    /// Times of other gateways' requests that wait.
    pub timings: Arc<RowQueue>,
}

/// Where the ClickHouse of a config is; `None` when there is none.
pub(super) fn url_of(config: &StoreConfig) -> Option<String> {
    match &config.url {
        StoreUrl::Embedded => Some(format!("http://{}", config.embedded_listen)),
        StoreUrl::Server(url) => Some(url.clone()),
        StoreUrl::None => None,
    }
}

async fn start_engine(
    config: &StoreConfig,
    program: PathBuf,
    variable: fn(&str) -> Option<OsString>,
) -> Option<EmbeddedServer> {
    let options = EmbeddedOptions {
        program,
        listen: config.embedded_listen,
        data_dir: config.embedded_dir.clone(),
        libchdb: None,
        user: config.username.clone(),
        password: config.password.clone(),
    };
    let engine = match EmbeddedServer::spawn(options, &variable) {
        Ok(engine) => engine,
        Err(error) => {
            // Said once and in full: the message names the command that gets the library.
            tracing::error!(%error, "there is no embedded ClickHouse; rows wait in the spool");
            return None;
        }
    };
    // That it is up, it says itself.
    if let Err(error) = engine.ready(START_LIMIT).await {
        tracing::error!(%error, "rows wait in the spool");
    }
    Some(engine)
}
