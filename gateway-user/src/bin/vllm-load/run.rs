//! Who sends which request when.
//!
//! **Closed loop**: as many workers as `--concurrency` says, each with a connection, take the next index as soon
//! as their last request ended. **Open loop**: requests arrive when the plan says, whatever the server does, and
//! latency counts from then. At most `--max-in-flight` are under way; those beyond it wait, and their waiting counts.
//!
//! Each thread is a runtime of its own with its own statistics, and shares with the others an index and two counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::client::{Client, Observation};
use crate::failure::Outcome;
use crate::plan::{Arrivals, Plan, Planned};
use crate::progress::{Goal, Live};
use crate::records::{self, RecordSender};
use crate::stats::{SharedStats, Stats, lock};
use crate::target::Target;

/// How long a worker waits after it could not connect: a server that is down is no reason for a busy loop.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);

/// Arrivals that the scheduler may be ahead of a thread that takes no more: then it waits, and is late.
const ARRIVALS_QUEUED_MAX: usize = 1024;

/// How long the scheduler sleeps at most before it looks whether the run was stopped.
const SCHEDULER_NAP: Duration = Duration::from_millis(50);

/// When requests are sent.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// This many at a time.
    Closed {
        /// Workers.
        concurrency: usize,
    },
    /// At this rate.
    Open {
        /// Arrivals a second.
        rate_per_s: f64,
        /// How many may be under way.
        max_in_flight: usize,
    },
}

/// A run, ready to start.
#[derive(Debug)]
pub struct Run {
    /// What is sent.
    pub plan: Plan,
    /// Where to.
    pub target: Arc<Target>,
    /// When.
    pub pace: Pace,
    /// Until when.
    pub goal: Goal,
    /// How long a request may take.
    pub timeout: Duration,
    /// Counters for the progress display.
    pub live: Live,
    /// The next index of the closed loop.
    pub next: AtomicU64,
}

/// What the threads of a run have in common.
#[derive(Clone)]
struct Shared {
    run: Arc<Run>,
    started: Instant,
    stop: watch::Receiver<bool>,
    records: Option<RecordSender>,
}

/// What one thread has.
#[derive(Clone)]
struct Lane {
    shared: Shared,
    stats: SharedStats,
}

/// A request that is due.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    index: u64,
    at: Instant,
}

/// Runs it on this many threads until its goal is met or `stop` turns true; returns what was counted.
///
/// # Errors
/// When a thread or a runtime cannot be started.
pub fn execute(
    run: Arc<Run>,
    threads: usize,
    stop: watch::Receiver<bool>,
    records: Option<RecordSender>,
) -> Result<Stats> {
    let pace = run.pace;
    let shared = Shared {
        run,
        started: Instant::now(),
        stop,
        records,
    };
    let lanes: Vec<_> = (0..threads)
        .map(|_| Lane {
            shared: shared.clone(),
            stats: SharedStats::default(),
        })
        .collect();
    thread::scope(|scope| -> Result<()> {
        let mut running = Vec::new();
        let mut queues = Vec::new();
        for (position, lane) in lanes.iter().enumerate() {
            let part = |whole: usize| whole / threads + usize::from(position < whole % threads);
            running.push(match pace {
                Pace::Closed { concurrency } => {
                    let workers = part(concurrency);
                    scope.spawn(move || block_on(lane.clone().closed_loop(workers)))
                }
                Pace::Open { max_in_flight, .. } => {
                    let (queue, arrivals) = mpsc::channel(ARRIVALS_QUEUED_MAX);
                    queues.push(queue);
                    let permits = part(max_in_flight).max(1);
                    scope.spawn(move || block_on(lane.clone().open_loop(arrivals, permits)))
                }
            });
        }
        if let Pace::Open { rate_per_s, .. } = pace {
            schedule(&shared, rate_per_s, queues);
        }
        running
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a load thread panicked"))?)
    })?;
    let mut total = Stats::default();
    lanes.iter().for_each(|lane| total.merge(&lock(&lane.stats)));
    Ok(total)
}

/// Runs a future to its end on a runtime of this thread's own.
fn block_on(future: impl Future<Output = ()>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime for a load thread")?;
    runtime.block_on(future);
    Ok(())
}

/// Hands out arrivals when they are due. This is a thread and not a task since the runtime's timer has a
/// resolution of a millisecond, by which every request would be late.
fn schedule(shared: &Shared, rate_per_s: f64, queues: Vec<mpsc::Sender<Arrival>>) {
    let goal = shared.run.goal;
    for (index, offset) in Arrivals::new(shared.run.plan.seed, rate_per_s) {
        let over = goal.requests.is_some_and(|requests| index >= requests)
            || goal.duration.is_some_and(|duration| offset >= duration);
        if over {
            return;
        }
        let at = shared.started + offset;
        loop {
            if *shared.stop.borrow() {
                return;
            }
            match at
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            {
                Some(left) => thread::sleep(left.min(SCHEDULER_NAP)),
                None => break,
            }
        }
        let queue = &queues[(index % queues.len() as u64) as usize];
        // A lane that takes no more has been stopped.
        if queue.blocking_send(Arrival { index, at }).is_err() {
            return;
        }
    }
}

impl Lane {
    async fn closed_loop(self, workers: usize) {
        let workers: Vec<_> = (0..workers)
            .map(|_| tokio::spawn(self.clone().worker()))
            .collect();
        for worker in workers {
            // A worker that panicked has nothing to say that its thread's panic message has not said.
            let _ = worker.await;
        }
    }

    async fn worker(self) {
        let mut client = self.client();
        while let Some(index) = self.take_index() {
            let seen = self.perform(&mut client, index, Instant::now()).await;
            if seen.failure.is_some_and(|failure| failure.is_connect()) {
                tokio::time::sleep(CONNECT_PAUSE).await;
            }
        }
    }

    /// The next request of the closed loop, or `None` when the run is over.
    fn take_index(&self) -> Option<u64> {
        let Shared {
            run, started, stop, ..
        } = &self.shared;
        let late = run
            .goal
            .duration
            .is_some_and(|duration| started.elapsed() >= duration);
        if late || *stop.borrow() {
            return None;
        }
        let index = run.next.fetch_add(1, Ordering::Relaxed);
        run.goal
            .requests
            .is_none_or(|requests| index < requests)
            .then_some(index)
    }

    async fn open_loop(self, mut arrivals: mpsc::Receiver<Arrival>, permits: usize) {
        let slots = Arc::new(Semaphore::new(permits));
        // Idle clients, the warmest on top. There are never more than permits.
        let idle: Arc<Mutex<Vec<Client>>> = Arc::default();
        let mut stop = self.shared.stop.clone();
        loop {
            let arrival = tokio::select! {
                arrival = arrivals.recv() => arrival,
                _ = stop.wait_for(|stopped| *stopped) => None,
            };
            // The semaphore is never closed; were it, there would be nobody left to serve.
            let (Some(Arrival { index, at }), Ok(slot)) = (arrival, slots.clone().acquire_owned().await)
            else {
                break;
            };
            let client = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let (lane, idle) = (self.clone(), idle.clone());
            tokio::spawn(async move {
                let mut client = client.unwrap_or_else(|| lane.client());
                lane.perform(&mut client, index, at).await;
                idle.lock().unwrap_or_else(PoisonError::into_inner).push(client);
                drop(slot);
            });
        }
        // All permits are back when the last request has ended.
        let _ = slots
            .acquire_many(u32::try_from(permits).unwrap_or(u32::MAX))
            .await;
    }

    fn client(&self) -> Client {
        let Shared { run, stop, .. } = &self.shared;
        Client::new(run.target.clone(), self.stats.clone(), stop.clone(), run.timeout)
    }

    async fn perform(&self, client: &mut Client, index: u64, due: Instant) -> Observation {
        let run = &self.shared.run;
        let planned = run.plan.request(index);
        let seen = client.perform(&planned, due).await;
        lock(&self.stats).count(&planned, &seen);
        run.live.ended.fetch_add(1, Ordering::Relaxed);
        if !matches!(seen.outcome, Outcome::Ok | Outcome::Aborted) {
            run.live.failed.fetch_add(1, Ordering::Relaxed);
        }
        self.record(&planned, &seen).await;
        seen
    }

    async fn record(&self, planned: &Planned, seen: &Observation) {
        if let Some(records) = &self.shared.records {
            let line = records::line(self.shared.run.plan.seed, planned, seen);
            // The writer is gone only after a write error, which its own end reports.
            let _ = records.send(line).await;
        }
    }
}
