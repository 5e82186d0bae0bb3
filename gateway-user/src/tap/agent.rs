//! Reads the probe's segments, puts exchanges together and hands them to the [`Correlator`].
//!
//! One thread looks at the ring every [`Source::poll_interval`]: kernel timestamps make a late look cost no accuracy, and a wake-up for each record
//! would cost the server half of its throughput. The proxy looks too, when a request has ended ([`Beside::times`]).
//!
//! Promises: bounded work under the lock (some hundred records), so that a look never takes long; what has begun ends in one
//! event also when the gateway ends.

use super::connections::{Connections, Limits, TapWatcher, Unreadable};
use super::segment::Segment;
use super::stats::{ProbeTotals, Stats};
use crate::books::Books;
use crate::clock;
use crate::config::Config;
use crate::correlate::{Beside, CorrelationCounts, Correlator, Joins, Whose};
use crate::event::{TapTimes, TimingSink};
use crate::wire::At;
use crate::wire::exchange::Facts;
use crate::wire::head::RequestHead;
use std::borrow::Cow;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most records in one look: a millisecond's work at most, while a request may wait for the lock.
const BATCH_MAX: usize = 256;

/// Most looks for one request that has ended. Its last packets lie in the ring before it can end, but behind whatever else does; a
/// server that sends more than this in one poll interval leaves the request without the kernel's times.
const LOOKS_MAX: usize = 16;

/// How often the source is kept in its place: a server that comes up in another cgroup takes longer than that to load its model.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// Where segments come from: the kernel probe, or a test.
pub trait Source: Send {
    /// Takes out up to `records_max` records, oldest first, and returns how many there were.
    fn drain(&mut self, records_max: usize, each: &mut dyn FnMut(Segment<'_>)) -> usize;

    /// What was counted on the way here.
    fn totals(&self) -> ProbeTotals;

    /// The ports that are watched: a request to any other is never seen.
    fn ports(&self) -> &[u16];

    /// Time between two looks.
    fn poll_interval(&self) -> Duration;

    /// What keeps the source where the traffic is; called every second, and may block for milliseconds.
    fn take_keeper(&mut self) -> Option<Box<dyn FnMut() + Send>>;
}

/// The tap of one gateway.
pub struct Agent {
    state: Mutex<State>,
    joins: Arc<Joins>,
    correlated: Arc<CorrelationCounts>,
    /// Names of the upstreams whose ports are watched.
    covered: Vec<Box<str>>,
    poll_interval: Duration,
    keeper: Mutex<Option<Box<dyn FnMut() + Send>>>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

struct State {
    source: Box<dyn Source>,
    connections: Connections<Whose>,
    booking: Booking,
    lost_before: u64,
}

/// An agent whose thread runs.
pub struct RunningAgent {
    agent: Arc<Agent>,
    thread: JoinHandle<()>,
}

/// What an agent has to show.
pub struct AgentCounts {
    /// What the probe counted.
    pub probe: ProbeTotals,
    /// What was made of it.
    pub followed: Stats,
    /// Whose it was.
    pub correlated: Arc<CorrelationCounts>,
}

impl Agent {
    /// An agent that reads `source` and books in `books`; other gateways' times go to `timings`.
    pub fn new(
        config: &Config,
        mut source: Box<dyn Source>,
        books: &Books,
        timings: Option<Arc<dyn TimingSink>>,
    ) -> Agent {
        let correlator = Correlator::new(books.clone(), timings);
        let seen = config
            .upstreams
            .iter()
            .filter(|upstream| source.ports().contains(&upstream.url.port()));
        Agent {
            joins: Arc::clone(correlator.joins()),
            correlated: Arc::clone(correlator.counts()),
            covered: seen.map(|upstream| upstream.name.as_str().into()).collect(),
            poll_interval: source.poll_interval(),
            keeper: Mutex::new(source.take_keeper()),
            state: Mutex::new(State {
                source,
                connections: Connections::new(Limits {
                    drain: config.proxy.abort_drain,
                    ..Limits::default()
                }),
                booking: Booking {
                    servers: Servers::of(config),
                    correlator,
                },
                lost_before: 0,
            }),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        }
    }

    /// Starts to read.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn run(self: Arc<Self>) -> io::Result<RunningAgent> {
        let agent = Arc::clone(&self);
        let thread = thread::Builder::new()
            .name("tap".into())
            .spawn(move || agent.read_until_stopped())?;
        Ok(RunningAgent { agent: self, thread })
    }

    /// What there is to show.
    pub fn counts(&self) -> AgentCounts {
        let state = self.lock();
        AgentCounts {
            probe: state.source.totals(),
            followed: state.connections.stats(),
            correlated: Arc::clone(&self.correlated),
        }
    }

    fn read_until_stopped(&self) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut kept = Instant::now();
        loop {
            while self.look() == BATCH_MAX {}
            self.lock().tick(clock::now());
            if kept.elapsed() >= KEEP_EVERY {
                kept = Instant::now();
                keeper.iter_mut().for_each(|keep| keep());
            }
            let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self
                .stopped
                .wait_timeout_while(stop, self.poll_interval, |stop| !*stop);
            if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                return;
            }
        }
    }

    /// Takes in what is in the ring, up to [`BATCH_MAX`] records; how many there were.
    fn look(&self) -> usize {
        self.lock().look()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Beside for Agent {
    fn covers(&self, upstream: &str) -> bool {
        self.covered.iter().any(|name| **name == *upstream)
    }

    fn sent(&self, event_id: &str) {
        self.joins.sent(event_id);
    }

    fn times(&self, event_id: &str) -> Option<TapTimes> {
        for _ in 0..LOOKS_MAX {
            if self.joins.has_ended(event_id) || self.look() < BATCH_MAX {
                break;
            }
        }
        self.joins.end(event_id)
    }
}

impl State {
    fn look(&mut self) -> usize {
        let State {
            source,
            connections,
            booking,
            lost_before,
        } = self;
        let taken = source.drain(BATCH_MAX, &mut |segment| connections.push(&segment, booking));
        // What was lost lies behind what is in the ring: with the ring empty, nothing that is waited for can still come.
        if taken < BATCH_MAX {
            let lost = source.totals().lost();
            if lost > *lost_before {
                *lost_before = lost;
                connections.records_lost(booking);
            }
        }
        taken
    }

    fn tick(&mut self, now: At) {
        self.connections.tick(now, &mut self.booking);
    }
}

impl RunningAgent {
    /// Reads what is left, and ends what has not ended.
    pub fn finish(self) {
        let RunningAgent { agent, thread } = self;
        *agent.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        agent.stopped.notify_all();
        if thread.join().is_err() {
            tracing::error!("the tap's thread had panicked; what it would have seen since is missing");
        }
        while agent.look() == BATCH_MAX {}
        let mut state = agent.lock();
        let State {
            connections, booking, ..
        } = &mut *state;
        connections.stop(clock::now(), booking);
    }
}

/// Knows where exchanges go.
struct Booking {
    servers: Servers,
    correlator: Correlator,
}

impl TapWatcher for Booking {
    type Tag = Whose;

    fn began(&mut self, at: At, _client: SocketAddr, server: SocketAddr, head: &RequestHead) -> Whose {
        self.correlator.began(at, &self.servers.name(server), head)
    }

    fn ended(&mut self, whose: Whose, _client: SocketAddr, _server: SocketAddr, facts: Facts) {
        self.correlator.ended(whose, facts);
    }

    fn unreadable(&mut self, server: SocketAddr, protocol: Unreadable) {
        let protocol = match protocol {
            Unreadable::Tls => "TLS",
            Unreadable::Http2 => "HTTP/2",
        };
        tracing::warn!(%server, protocol, "the tap cannot read this port's traffic; it is counted as opaque, and not recorded");
    }
}

/// Which upstream an address is. There are few: to look at each takes less than a hash.
struct Servers(Vec<Server>);

struct Server {
    port: u16,
    /// `None` where the configuration has a host name.
    address: Option<IpAddr>,
    name: Box<str>,
}

impl Servers {
    fn of(config: &Config) -> Servers {
        let servers = config.upstreams.iter().map(|upstream| Server {
            port: upstream.url.port(),
            address: upstream.url.host().parse().ok(),
            name: upstream.name.as_str().into(),
        });
        Servers(servers.collect())
    }

    /// The upstream with that address, else the first on that port (a server is reached by many addresses), else the address itself.
    fn name(&self, server: SocketAddr) -> Cow<'_, str> {
        let mut of_port = self.0.iter().filter(|known| known.port == server.port());
        let first = of_port.clone().next();
        match of_port.find(|known| known.address == Some(server.ip())).or(first) {
            Some(known) => Cow::Borrowed(&known.name),
            None => Cow::Owned(server.to_string()),
        }
    }
}
