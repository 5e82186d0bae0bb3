//! An engine under a load of several teams, in virtual time: what it did for each request is known to the nanosecond, and what a gateway would
//! have seen of it follows from that.
//!
//! A trial is a pure function of its load. The requests of a team are the same whether others are there or not, so that the engine can be run without one of
//! them: the difference is what that team took.

pub mod books;
pub mod mix;
pub mod queue;
pub mod truth;

use std::collections::BTreeMap;
use std::sync::Arc;

use vllm_gateway::ledger::{Micros, Point};
use vllm_gateway::sim::tokens::Prompt;
use vllm_gateway::sim::{
    Finish, Limits, Progress, RequestLog, Scheduler, SeqSpec, Stats, StepCost, Submission,
};

/// When every trial begins: 2026-01-01, the first moment of a window.
pub const BEGIN: Micros = Micros(1_767_225_600_000_000);

/// Between two scrapes, as by default. They are not in step with windows.
const SCRAPE_NS: u64 = 15_000_000_000;

/// When the first scrape is.
const FIRST_SCRAPE_NS: u64 = 4_000_000_000;

/// How far apart a gateway notes how far a stream has come.
const POINT_NS: u64 = 2_000_000_000;

/// One request of a load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// When it arrives, after the beginning.
    pub at_ns: u64,
    /// Whose it is: an index.
    pub team: usize,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    pub is_streamed: bool,
}

/// An engine: what bounds it and how fast it is.
#[derive(Clone, Copy, Debug)]
pub struct Engine {
    pub limits: Limits,
    pub cost: StepCost,
}

/// A request as the engine ran it.
#[derive(Clone, Debug)]
pub struct Lived {
    pub request: Request,
    pub arrived: Micros,
    pub scheduled: Micros,
    pub first_token: Micros,
    pub ended: Micros,
    /// What a reader of its stream notes on the way.
    pub points: Vec<Point>,
}

/// A look at the engine's counters.
#[derive(Clone, Debug)]
pub struct Look {
    pub at: Micros,
    pub stats: Stats,
}

/// What became of a load.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Time that the engine spent in steps.
    pub busy_us: f64,
    /// The same by team: what a step took for a request's own sake, and an equal part of what it takes whatever is in it.
    pub by_team_us: BTreeMap<usize, f64>,
    /// In the order of their arrival.
    pub requests: Vec<Lived>,
    pub looks: Vec<Look>,
}

impl Engine {
    /// An 8-billion-parameter model in bf16 on one H100, as `Weights::ASSUMED` reckons it, with 30 µs of a step for each sequence.
    pub fn h100() -> Engine {
        Engine {
            limits: Limits {
                max_num_seqs: 256,
                max_num_batched_tokens: 8_192,
                kv_blocks: 30_000,
                block_size: 16,
                prefix_cache: false,
                lockstep: false,
            },
            cost: StepCost {
                base_us: 4_800.0,
                prefill_us_per_token: 40.0,
                decode_us_per_seq: 30.0,
                read_us_per_token: 0.039,
            },
        }
    }

    /// Runs a load, which is in the order of arrival, to its end.
    pub fn run(&self, load: &[Request]) -> Ran {
        let mut run = Running::new(self, load);
        while run.step() {}
        run.ran()
    }
}

struct Running<'a> {
    engine: &'a Engine,
    load: &'a [Request],
    /// How many of the load have been submitted.
    arrived: usize,
    scheduler: Scheduler,
    now_ns: u64,
    busy_ns: u64,
    by_team_us: BTreeMap<usize, f64>,
    live: BTreeMap<usize, Reader>,
    points: Vec<Vec<Point>>,
    looks: Vec<Look>,
}

/// Who reads a stream.
struct Reader {
    progress: Arc<Progress>,
    generated: u64,
    noted_ns: u64,
}

impl<'a> Running<'a> {
    fn new(engine: &'a Engine, load: &'a [Request]) -> Running<'a> {
        Running {
            engine,
            load,
            arrived: 0,
            scheduler: Scheduler::new(engine.limits, Some(RequestLog::default())),
            now_ns: 1,
            busy_ns: 0,
            by_team_us: BTreeMap::new(),
            live: BTreeMap::new(),
            points: vec![Vec::new(); load.len()],
            looks: Vec::new(),
        }
    }

    /// One step, or the wait for the next arrival; false when all is done.
    fn step(&mut self) -> bool {
        self.look();
        self.submit();
        let Some(step) = self.scheduler.plan(self.now_ns) else {
            let Some(next) = self.load.get(self.arrived) else {
                return false;
            };
            self.now_ns = next.at_ns.max(self.now_ns + 1);
            return true;
        };
        self.account();
        let took_ns = self.engine.cost.of(step).as_nanos() as u64;
        self.now_ns += took_ns;
        self.busy_ns += took_ns;
        self.scheduler.commit(self.now_ns);
        self.read();
        true
    }

    fn account(&mut self) {
        let present = self.scheduler.planned().count() as f64;
        let cost = self.engine.cost;
        for (request, load) in self.scheduler.planned() {
            let own_us = cost.of(load).as_secs_f64() * 1e6 - cost.base_us;
            let team = self.load[request as usize].team;
            *self.by_team_us.entry(team).or_default() += own_us + cost.base_us / present;
        }
    }

    fn look(&mut self) {
        let due_ns = FIRST_SCRAPE_NS + self.looks.len() as u64 * SCRAPE_NS;
        if self.now_ns >= due_ns {
            self.looks.push(Look {
                at: micros(self.now_ns),
                stats: self.scheduler.stats(),
            });
        }
    }

    fn submit(&mut self) {
        while let Some(request) = self
            .load
            .get(self.arrived)
            .filter(|request| request.at_ns <= self.now_ns)
        {
            let progress = Arc::new(Progress::new(1, Some(1)));
            let prompt = Prompt {
                tokens: request.prompt_tokens,
                hash: 0,
                blocks: Vec::new(),
            };
            self.scheduler.submit(Submission {
                id: self.arrived as u64,
                seqs: vec![SeqSpec {
                    prompt: Arc::new(prompt),
                    target: request.output_tokens,
                    finish: Finish::Length,
                }],
                n: 1,
                max_tokens: Some(request.output_tokens),
                progress: Arc::clone(&progress),
                arrived_ns: request.at_ns,
                label: Some(Box::new([self.arrived.to_string(), String::new(), String::new()])),
            });
            let reader = Reader {
                progress,
                generated: 0,
                noted_ns: 0,
            };
            self.live.insert(self.arrived, reader);
            self.arrived += 1;
        }
    }

    /// Streams are read after each step, by readers that keep up.
    fn read(&mut self) {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let (now_ns, points) = (self.now_ns, &mut self.points);
        self.live.retain(|index, reader| {
            use std::task::Poll;
            let Poll::Ready(Some(delta)) = reader.progress.poll_take(&mut context) else {
                return true;
            };
            let is_first = reader.generated == 0;
            reader.generated = delta.to.into();
            if is_first || now_ns - reader.noted_ns >= POINT_NS {
                reader.noted_ns = now_ns;
                points[*index].push(Point {
                    at: micros(now_ns),
                    units: reader.generated,
                });
            }
            delta.finish.is_none()
        });
    }

    fn ran(self) -> Ran {
        let log = self.scheduler.log().expect("it was asked for");
        let mut requests: Vec<(usize, Lived)> = log
            .records()
            .map(|record| {
                let index: usize = record.label[0].parse().expect("a number");
                let lived = Lived {
                    request: self.load[index],
                    arrived: micros(record.arrived_ns),
                    scheduled: micros(record.scheduled_ns),
                    first_token: micros(record.first_token_ns),
                    ended: micros(record.ended_ns),
                    points: self.points[index].clone(),
                };
                (index, lived)
            })
            .collect();
        assert_eq!(requests.len(), self.load.len(), "every request comes to its end");
        requests.sort_unstable_by_key(|(index, _)| *index);
        Ran {
            busy_us: self.busy_ns as f64 / 1e3,
            by_team_us: self.by_team_us,
            requests: requests.into_iter().map(|(_, lived)| lived).collect(),
            looks: self.looks,
        }
    }
}

/// By the wall clock.
fn micros(ns: u64) -> Micros {
    Micros(BEGIN.0 + ns / 1_000)
}
