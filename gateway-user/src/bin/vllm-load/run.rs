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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::plan;
    use crate::target::tests::target;
    use std::collections::BTreeSet;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    /// No run of these tests takes as long; one that does ends with a failed assertion instead of hanging.
    const TIMEOUT: Duration = Duration::from_secs(10);

    /// A server that answers every request with `answer`, or never when it is empty, until the sender is dropped.
    fn serve(answer: &'static [u8]) -> (SocketAddr, watch::Sender<()>) {
        let (until, mut over) = watch::channel(());
        let (bound, address) = std::sync::mpsc::channel();
        thread::spawn(move || {
            block_on(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
                bound
                    .send(listener.local_addr().expect("an address"))
                    .expect("a test");
                loop {
                    tokio::select! {
                        accepted = listener.accept() => { tokio::spawn(answer_all(accepted.expect("a client").0, answer)); }
                        _ = over.changed() => return,
                    }
                }
            })
        });
        (address.recv().expect("a server"), until)
    }

    async fn answer_all(mut socket: TcpStream, answer: &'static [u8]) {
        let mut seen = Vec::new();
        while socket.read_buf(&mut seen).await.unwrap_or(0) > 0 {
            // Bodies end with the only `"max_tokens":1…}` of a request, and hold no other closing brace but that.
            if seen.ends_with(b"}") {
                seen.clear();
                let _ = socket.write_all(answer).await;
            }
        }
    }

    fn run(address: SocketAddr, pace: Pace, requests: u64) -> Arc<Run> {
        let plan = Plan {
            endpoints: "completions".parse().expect("a mix"),
            stream_fraction: 0.0,
            abort_fraction: 0.0,
            ..plan()
        };
        Arc::new(Run {
            plan,
            target: Arc::new(target(vec![address], &[])),
            pace,
            goal: Goal {
                requests: Some(requests),
                duration: Some(TIMEOUT),
            },
            timeout: TIMEOUT,
            live: Live::default(),
            next: 0.into(),
        })
    }

    /// Runs it and returns what was counted, and the index of each record.
    fn collect(run: Arc<Run>, threads: usize) -> (Stats, Vec<u64>) {
        let (_stop, stopped) = watch::channel(false);
        let (sender, mut receiver) = mpsc::channel(1000);
        let stats = execute(run, threads, stopped, Some(sender)).expect("a run");
        let mut indices = Vec::new();
        while let Some(line) = receiver.blocking_recv() {
            let record: serde_json::Value = serde_json::from_slice(&line).expect("a record");
            assert_eq!(record["request_id"], format!("load-42-{}", record["index"]));
            indices.push(record["index"].as_u64().expect("an index"));
        }
        (stats, indices)
    }

    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";

    #[track_caller]
    fn assert_each_once(stats: &Stats, indices: &[u64], requests: u64) {
        let distinct: BTreeSet<_> = indices.iter().copied().collect();
        assert!(
            indices.len() == distinct.len() && distinct.into_iter().eq(0..requests),
            "{indices:?}"
        );
        assert_eq!(
            (stats.requests, stats.outcome(Outcome::Ok)),
            (requests, requests),
            "{stats:?}"
        );
        assert_eq!(
            stats.by_team.iter().map(|team| team.requests).sum::<u64>(),
            requests
        );
    }

    #[test]
    fn a_closed_loop_sends_each_request_once_over_its_connections() {
        let (address, _server) = serve(ANSWER);
        let run = run(address, Pace::Closed { concurrency: 3 }, 60);
        let (stats, indices) = collect(run.clone(), 2);
        assert_each_once(&stats, &indices, 60);
        assert!(
            stats.connects <= 3,
            "{} connections for three workers",
            stats.connects
        );
        assert_eq!(run.live.ended.load(Ordering::Relaxed), 60);
    }

    #[test]
    fn an_open_loop_sends_each_request_once_when_it_is_due() {
        let (address, _server) = serve(ANSWER);
        let run = run(
            address,
            Pace::Open {
                rate_per_s: 400.0,
                max_in_flight: 4,
            },
            60,
        );
        let due = Arrivals::new(42, 400.0).nth(59).expect("an arrival").1;
        let started = Instant::now();
        let (stats, indices) = collect(run, 2);
        assert_each_once(&stats, &indices, 60);
        assert!(started.elapsed() >= due, "the last was due after {due:?}");
        assert!(
            stats.connects <= 4,
            "{} connections for four slots",
            stats.connects
        );
    }

    #[test]
    fn stopping_ends_both_loops_while_the_server_is_silent() {
        let (address, _server) = serve(b"");
        for pace in [
            Pace::Closed { concurrency: 2 },
            Pace::Open {
                rate_per_s: 200.0,
                max_in_flight: 2,
            },
        ] {
            let (stop, stopped) = watch::channel(false);
            let running = thread::spawn({
                let run = run(address, pace, 1_000_000);
                move || execute(run, 1, stopped, None)
            });
            stop.send_replace(true);
            let stats = running.join().expect("no panic").expect("a run");
            assert_eq!(stats.outcome(Outcome::Aborted), stats.requests, "{stats:?}");
        }
    }
}
