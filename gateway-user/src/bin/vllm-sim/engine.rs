//! The engine: one task that owns all sequences, and the handle through which connections reach it.
//!
//! Connections leave submissions, aborts and questions in an inbox; the task empties it between steps and while a
//! step's time passes. Nothing else touches the scheduler's state, so its counters are exact. A step's tokens are
//! reported to the connections before the next step begins.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::sync::{Notify, oneshot};

pub use vllm_gateway::sim::{
    Delta, Finish, Histogram, Limits, RequestLog, Scheduler, SeqSpec, Stats, StepCost, Summary,
};
use vllm_gateway::sim::{Progress, Submission};

/// Steps that are run before other tasks get a turn when nobody waits for a single token: bounds how long a new
/// request waits, and keeps the cost of switching small against the work.
const STEPS_PER_TURN: u32 = 32;

/// Monotonic time, comparable with other processes on this machine.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: Instant,
    origin_ns: u64,
}

impl Clock {
    /// A clock in step with CLOCK_MONOTONIC.
    pub fn start() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        // Uptime is never negative.
        let origin_ns = now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs();
        Clock {
            origin: Instant::now(),
            origin_ns,
        }
    }

    /// CLOCK_MONOTONIC in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.origin_ns + self.origin.elapsed().as_nanos() as u64
    }
}

/// What a connection can ask.
enum Question {
    Stats(oneshot::Sender<Stats>),
    Log(oneshot::Sender<String>),
}

#[derive(Default)]
struct Letters {
    submissions: Vec<Submission>,
    aborts: Vec<u64>,
    questions: Vec<Question>,
    rejections: u64,
    /// Submitted and not yet ended: what bounds this inbox.
    open: usize,
}

/// What connections leave for the engine. Bounded: submissions by `open_max`, aborts by the submissions.
struct Inbox {
    letters: Mutex<Letters>,
    arrived: Notify,
    open_max: usize,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Letters> {
        // Every change under this lock is a single push or store, so a panic leaves nothing half done.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's way to the engine.
#[derive(Clone)]
pub struct Engine {
    inbox: Arc<Inbox>,
    next_id: Arc<AtomicU64>,
    lockstep: bool,
    clock: Clock,
}

/// The queue is full: the request was turned away and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueFull;

impl Engine {
    /// Starts the engine's task; `cost` is none when steps take no time.
    pub fn start(scheduler: Scheduler, cost: Option<StepCost>, open_max: usize) -> Self {
        let inbox = Arc::new(Inbox {
            letters: Mutex::new(Letters::default()),
            arrived: Notify::new(),
            open_max,
        });
        let clock = Clock::start();
        let task = Task {
            inbox: Arc::clone(&inbox),
            scheduler,
            cost,
            clock,
        };
        tokio::spawn(task.run());
        Engine {
            inbox,
            next_id: Arc::new(AtomicU64::new(1)),
            lockstep: cost.is_none(),
            clock,
        }
    }

    /// Submits sequences; `label` is request id, path and model for the request log.
    ///
    /// # Errors
    /// When too many requests wait already.
    pub fn submit(
        &self,
        seqs: Vec<SeqSpec>,
        n: u32,
        max_tokens: Option<u32>,
        stream_interval: Option<u32>,
        label: Option<Box<[String; 3]>>,
    ) -> Result<Ticket, QueueFull> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let progress = Arc::new(Progress::new(seqs.len(), stream_interval));
        let arrived_ns = self.clock.now_ns();
        let submission = Submission {
            id,
            seqs,
            n,
            max_tokens,
            progress: Arc::clone(&progress),
            arrived_ns,
            label,
        };
        {
            let mut letters = self.inbox.lock();
            if letters.open >= self.inbox.open_max {
                letters.rejections += 1;
                return Err(QueueFull);
            }
            letters.open += 1;
            letters.submissions.push(submission);
        }
        self.inbox.arrived.notify_one();
        Ok(Ticket {
            id,
            progress,
            inbox: Arc::clone(&self.inbox),
            lockstep: self.lockstep,
            ended: false,
        })
    }

    /// The counters as of now; none if the engine is gone.
    pub async fn stats(&self) -> Option<Stats> {
        let (answer, question) = oneshot::channel();
        self.ask(Question::Stats(answer));
        question.await.ok()
    }

    /// The request log as JSON lines; none if it is not kept.
    pub async fn log(&self) -> Option<String> {
        let (answer, question) = oneshot::channel();
        self.ask(Question::Log(answer));
        question.await.ok()
    }

    /// Requests submitted and not yet ended.
    pub fn open(&self) -> usize {
        self.inbox.lock().open
    }

    fn ask(&self, question: Question) {
        self.inbox.lock().questions.push(question);
        self.inbox.arrived.notify_one();
    }
}

/// A request in the engine. Dropping it before its end aborts the request.
pub struct Ticket {
    id: u64,
    progress: Arc<Progress>,
    inbox: Arc<Inbox>,
    lockstep: bool,
    ended: bool,
}

impl Ticket {
    /// The next tokens of a stream; none after the end.
    pub fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<Option<Delta>> {
        let delta = std::task::ready!(self.progress.poll_take(cx));
        if delta.is_none() {
            self.ended = true;
        } else if self.lockstep {
            self.inbox.arrived.notify_one();
        }
        Poll::Ready(delta)
    }

    /// Waits for the end: for each choice its tokens and why it ended.
    pub async fn done(&mut self) -> (Vec<(u32, Finish)>, Summary) {
        let end = std::future::poll_fn(|cx| self.progress.poll_done(cx)).await;
        self.ended = true;
        end
    }

    /// What is known after the end.
    pub fn summary(&self) -> Summary {
        self.progress.summary()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut letters = self.inbox.lock();
        letters.open -= 1;
        if !self.ended {
            letters.aborts.push(self.id);
            drop(letters);
            self.inbox.arrived.notify_one();
        }
    }
}

struct Task {
    inbox: Arc<Inbox>,
    scheduler: Scheduler,
    cost: Option<StepCost>,
    clock: Clock,
}

impl Task {
    async fn run(mut self) {
        let mut steps_in_turn = 0;
        let mut step_began = tokio::time::Instant::now();
        loop {
            self.read_inbox();
            let Some(load) = self.scheduler.plan(self.clock.now_ns()) else {
                self.inbox.arrived.notified().await;
                step_began = tokio::time::Instant::now();
                continue;
            };
            match self.cost {
                Some(cost) => {
                    step_began += cost.of(load);
                    self.pass(step_began).await;
                    self.scheduler.commit(self.clock.now_ns());
                    tokio::task::yield_now().await;
                }
                None => {
                    self.scheduler.commit(self.clock.now_ns());
                    steps_in_turn += 1;
                    if self.scheduler.has_streams() || steps_in_turn >= STEPS_PER_TURN {
                        steps_in_turn = 0;
                        tokio::task::yield_now().await;
                    }
                }
            }
        }
    }

    /// Lets a step's time pass, and reads what arrives meanwhile: an abort takes its tokens out of the step.
    async fn pass(&mut self, until: tokio::time::Instant) {
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                () = self.inbox.arrived.notified() => {}
            }
            self.read_inbox();
        }
        self.read_inbox();
    }

    fn read_inbox(&mut self) {
        let (submissions, aborts, questions, rejections) = {
            let mut letters = self.inbox.lock();
            (
                std::mem::take(&mut letters.submissions),
                std::mem::take(&mut letters.aborts),
                std::mem::take(&mut letters.questions),
                std::mem::take(&mut letters.rejections),
            )
        };
        for submission in submissions {
            self.scheduler.submit(submission);
        }
        for id in aborts {
            self.scheduler.abort(id, self.clock.now_ns());
        }
        for _ in 0..rejections {
            self.scheduler.note_rejection();
        }
        for question in questions {
            // An asker that has gone needs no answer.
            match question {
                Question::Stats(answer) => drop(answer.send(self.scheduler.stats())),
                Question::Log(answer) => {
                    if let Some(log) = self.scheduler.log() {
                        drop(answer.send(log.to_json_lines()));
                    }
                }
            }
        }
    }
}
