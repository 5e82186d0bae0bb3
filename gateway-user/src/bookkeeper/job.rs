//! The job that keeps the books while a gateway runs.
//!
//! Each cycle looks at windows that can have changed: those that ended lately, those to which a segment came (a row knows when it was stored), the
//! neighbours of both, since a gap is decided by what lies near, and those that were written last, should two gateways have written at once. In
//! between a few glances at the newest windows are enough, which read a part of that. From time to time a cycle also looks for holes: windows that nobody
//! booked, because no gateway ran. They are booked a few hours' worth a cycle.

use super::desk::{CHUNK, Desk, Outcome};
use super::{LedgerStats, Rules, Upstream, opened};
use crate::clock;
use crate::config::Config;
use crate::ledger::due::{around, chunks, holes, joined, open_parts, windows};
use crate::ledger::{Bounds, Clock, Micros, Month, Recompute, Span, State, Window};
use crate::store::ledger::{LedgerError, LedgerStore};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// How long after its end a window is first computed: as long as rows take to be stored (`spool.seal_after`, and some). Earlier, each would be written
/// twice for nothing.
const BOOKED_AFTER_US: u64 = 5_000_000;

/// How far back of the last cycle rows can have been stored that it could not see: an insert is stamped when it begins, and may take
/// some minutes.
const OVERLAP_US: u64 = 300_000_000;

/// How far back of the last statement the first cycle looks for rows: what an earlier run had seen and not come to.
const FIRST_LOOK_US: u64 = 86_400_000_000;

/// Between two looks for holes.
const SURVEY_US: u64 = 600_000_000;

/// Chunks of holes in one cycle.
const HOLES_MAX: usize = 4;

/// Windows that ended lately, beyond those that can still change: a cycle can be late.
const SLACK: u64 = 8;

/// Of so many looks one is a whole cycle, and the others are at the newest windows alone.
const LOOKS_A_CYCLE: u32 = 4;

/// Longest wait after failures.
const BACKOFF_MAX: Duration = Duration::from_secs(120);

/// How long a cycle may still take when the gateway ends. Cut off, it leaves a statement that the next one mends.
const FINISH_LIMIT: Duration = Duration::from_secs(5);

/// Sets of rules that are remembered to have been warned of.
const WARNED_MAX: usize = 64;

/// Keeps the books of a gateway's upstreams.
pub struct Bookkeeper {
    store: LedgerStore,
    rules: Rules,
    gateway_id: Box<str>,
    accounts: Vec<Account>,
    stats: Arc<LedgerStats>,
    every: Duration,
    warned: BTreeSet<(Box<str>, String)>,
    is_short: bool,
    looks: u32,
}

/// How much of the books is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// The newest windows.
    Glance,
    /// All that can have changed.
    Cycle,
}

/// What is known of an upstream between two cycles.
struct Account {
    upstream: Upstream,
    /// When its account begins, once that is known.
    opened: Option<Micros>,
    /// From when on, by ClickHouse's clock, rows may be there that no cycle has seen.
    unseen: Option<Micros>,
    surveyed: Option<Micros>,
    last_cycle: Option<Micros>,
    holes: Vec<Span>,
    /// Written, and not looked at since.
    unchecked: BTreeSet<Micros>,
    /// Segments that came too late, by window: of those there are as many as raw rows are kept of, at most.
    late: BTreeMap<Micros, u64>,
}

/// A bookkeeper at work.
pub struct Bookkeeping {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Bookkeeper {
    /// The bookkeeper of a gateway; `None` when it keeps no rows.
    pub fn of(config: &Config) -> Option<Bookkeeper> {
        let (store, rules, upstreams) = opened(config)?;
        let stats = LedgerStats::of(upstreams.iter().map(|upstream| &*upstream.name));
        let account = |upstream| Account {
            upstream,
            opened: None,
            unseen: None,
            surveyed: None,
            last_cycle: None,
            holes: Vec::new(),
            unchecked: BTreeSet::new(),
            late: BTreeMap::new(),
        };
        Some(Bookkeeper {
            store,
            rules,
            gateway_id: config.gateway.id_or_host_name().as_str().into(),
            accounts: upstreams.into_iter().map(account).collect(),
            stats: Arc::new(stats),
            every: config.metrics.emit_interval,
            warned: BTreeSet::new(),
            is_short: false,
            looks: 0,
        })
    }

    /// What it counts.
    pub fn stats(&self) -> Arc<LedgerStats> {
        Arc::clone(&self.stats)
    }

    /// Begins to keep books. Must be called on a tokio runtime.
    pub fn start(self) -> Bookkeeping {
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(self.run(stopped));
        Bookkeeping { stop, task }
    }

    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut failures = Failures::default();
        loop {
            let ended = {
                let round = self.round();
                tokio::pin!(round);
                let ended = tokio::select! {
                    ended = &mut round => Some(ended),
                    () = told(&mut stop) => None,
                };
                let Some(ended) = ended else {
                    let _ = timeout(FINISH_LIMIT, round).await;
                    return;
                };
                ended
            };
            let wait = match ended {
                Ok(()) => {
                    failures.end();
                    self.every
                }
                Err(error) => {
                    self.stats.failed(error.cause());
                    failures.report(&error);
                    failures.wait(self.every)
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = told(&mut stop) => return,
            }
        }
    }

    async fn round(&mut self) -> Result<(), LedgerError> {
        let started = Instant::now();
        self.store.check_schema().await?;
        // A clock that runs ahead would book and settle windows that have not come yet. Two clocks seldom do.
        let own = Micros(clock::wall_now_us().max(0) as u64);
        let now = own.min(self.store.now().await?);
        let depth = match self.looks.is_multiple_of(LOOKS_A_CYCLE) {
            true => Depth::Cycle,
            false => Depth::Glance,
        };
        self.look(now, depth).await?;
        // Only now: after a failure the next look is a whole one again, if this one was.
        self.looks = self.looks.wrapping_add(1);
        self.stats
            .took(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// Brings the books up to `now`, as far as one cycle does. Returns how many windows it wrote.
    ///
    /// # Errors
    /// When ClickHouse does not let it. What is not written then is due in the next cycle.
    pub async fn cycle(&mut self, now: Micros) -> Result<u64, LedgerError> {
        self.look(now, Depth::Cycle).await
    }

    async fn look(&mut self, now: Micros, depth: Depth) -> Result<u64, LedgerError> {
        let closed = self.store.closed_months().await?;
        let (mut written, mut short) = (0, 0);
        for account in &mut self.accounts {
            let desk = Desk {
                store: &self.store,
                rules: &self.rules,
                upstream: &account.upstream.clone(),
                gateway_id: &self.gateway_id,
                recompute: Recompute::ByFacts,
                writes: true,
            };
            let outcome = match account.newest(now).filter(|_| depth == Depth::Glance) {
                Some(newest) => {
                    desk.book(&open_parts(&[newest], newest, &closed), now, &self.stats)
                        .await?
                }
                None => account.cycle(&desk, now, &closed, &self.stats).await?,
            };
            // The last hour moves slowly: a whole cycle is often enough, but for one that is not known yet.
            if depth == Depth::Cycle || !self.stats.knows_hour(&account.upstream.name) {
                account.tell_last_hour(&self.store, now, &self.stats).await?;
            }
            written += outcome.changed();
            short += outcome.short;
            for (theirs, ours) in outcome.other_rules {
                let is_news =
                    self.warned.len() < WARNED_MAX && self.warned.insert((theirs.clone(), ours.clone()));
                if is_news {
                    tracing::warn!(
                        upstream = &*account.upstream.name,
                        computed_by = &*theirs,
                        configured = ours,
                        "windows were computed by other rules than those of this config, and stay so; `vllm-gateway ledger` computes them anew"
                    );
                }
            }
        }
        if short > 0 && !self.is_short {
            tracing::warn!(
                windows = short,
                "there are fewer segments than windows were computed from: they were deleted, or the replica that answers is behind; the bill stays as it is"
            );
        }
        self.is_short = short > 0;
        Ok(written)
    }
}

/// Done when it holds `true`, or nobody is left who could say so.
async fn told(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

impl Desk<'_> {
    /// Computes spans of whole windows, chunk by chunk.
    async fn book(&self, due: &[Span], now: Micros, stats: &LedgerStats) -> Result<Outcome, LedgerError> {
        let mut outcome = Outcome::default();
        let clock = Clock {
            now,
            settle_us: self.rules.settle_us,
        };
        for chunk in chunks(due, CHUNK) {
            let mut of_chunk = Outcome::default();
            self.compute(chunk, clock, &mut of_chunk).await?;
            for state in State::ALL {
                stats.wrote(state, of_chunk.in_state(state));
            }
            stats.booked(&self.upstream.name, chunk.to());
            outcome.add(of_chunk);
        }
        Ok(outcome)
    }
}

impl Account {
    /// The newest windows, when they adjoin what was looked at before.
    fn newest(&self, now: Micros) -> Option<Span> {
        let over = Micros(now.0.saturating_sub(BOOKED_AFTER_US));
        let from = Micros(now.0.saturating_sub(SLACK * Window::LEN_US));
        let adjoins = self.last_cycle.is_some_and(|last| from <= last && last <= now);
        let bounds = Bounds {
            opened: Window::at(self.opened?).start(),
            kept: from,
            over,
        };
        adjoins.then_some(bounds.span())
    }

    async fn cycle(
        &mut self,
        desk: &Desk<'_>,
        now: Micros,
        closed: &BTreeSet<Month>,
        stats: &LedgerStats,
    ) -> Result<Outcome, LedgerError> {
        let (store, rules) = (desk.store, desk.rules);
        let seen_at = store.now().await?;
        let name = self.upstream.name.clone();
        let since = match self.unseen {
            Some(since) => since,
            None => match store.last_computed(&name).await? {
                Some(computed) => Micros(computed.0.saturating_sub(FIRST_LOOK_US)),
                // Nothing was ever computed: all of it are holes.
                None => seen_at,
            },
        };
        let touched = store.touched(&name, since).await?;
        let needs_survey = self.needs_survey(rules, now);
        if needs_survey {
            self.opened = store.first_fact(&name).await?;
        }
        self.opened = self.opened.into_iter().chain(touched.first().copied()).min();
        let Some(opened) = self.opened else {
            return Ok(Outcome::default());
        };
        let bounds = Bounds {
            opened: Window::at(opened).start(),
            kept: Micros(now.0.saturating_sub(rules.raw_us)),
            over: Micros(now.0.saturating_sub(BOOKED_AFTER_US)),
        };
        let span = bounds.span();
        let recent = recent(now, rules).within(span);
        if needs_survey {
            self.survey(store, Span::new(span.from(), recent.from()), closed)
                .await?;
            self.surveyed = Some(now);
        }
        self.count_late(store, &touched, closed, stats).await?;

        let mut due = around(&touched, rules.reach());
        due.extend(around(&self.unchecked, 0));
        due.push(recent);
        let mut due = open_parts(&joined(due), span, closed);
        let filled = chunks(&open_parts(&self.holes, span, closed), CHUNK);
        due.extend(filled.iter().take(HOLES_MAX));
        let mut outcome = desk.book(&due, now, stats).await?;
        self.holes = filled.into_iter().skip(HOLES_MAX).collect();
        self.unchecked = std::mem::take(&mut outcome.starts);
        self.unseen = Some(Micros(seen_at.0.saturating_sub(OVERLAP_US)));
        self.last_cycle = Some(now);
        Ok(outcome)
    }

    async fn tell_last_hour(
        &self,
        store: &LedgerStore,
        now: Micros,
        stats: &LedgerStats,
    ) -> Result<(), LedgerError> {
        if let Some(opened) = self.opened {
            let name = &*self.upstream.name;
            stats.hour_was(name, store.last_hour(name, opened, now).await?);
        }
        Ok(())
    }

    /// Whether holes can be there that are not known of: also when the clock has made a step, or nobody was awake.
    fn needs_survey(&self, rules: &Rules, now: Micros) -> bool {
        let (Some(surveyed), Some(last), Some(_)) = (self.surveyed, self.last_cycle, self.opened) else {
            return true;
        };
        now < last || now.0 - last.0 > rules.settle_us || now < surveyed || now.0 - surveyed.0 > SURVEY_US
    }

    /// Finds the windows of `span` that nobody has booked, and those that nobody has settled.
    async fn survey(
        &mut self,
        store: &LedgerStore,
        span: Span,
        closed: &BTreeSet<Month>,
    ) -> Result<(), LedgerError> {
        let name = &*self.upstream.name;
        let booked = store.booked_by_day(name, span).await?;
        let mut found = Vec::new();
        for day in open_parts(&days(span), span, closed) {
            let first = Micros(day.from().0 - day.from().0 % DAY_US);
            if booked.get(&first).copied().unwrap_or(0) < windows(day).count() as u64 {
                found.extend(holes(day, &store.booked(name, day).await?));
            }
        }
        let unsettled = store.provisional(name, span).await?;
        self.holes = joined(found);
        self.unchecked.extend(unsettled);
        Ok(())
    }

    /// Counts segments that came for months that are closed, each once.
    async fn count_late(
        &mut self,
        store: &LedgerStore,
        touched: &BTreeSet<Micros>,
        closed: &BTreeSet<Month>,
        stats: &LedgerStats,
    ) -> Result<(), LedgerError> {
        let late: BTreeSet<Micros> = touched
            .iter()
            .copied()
            .filter(|start| closed.contains(&Month::of(*start)))
            .collect();
        let name = &*self.upstream.name;
        let mut count = 0;
        for chunk in chunks(&around(&late, 0), CHUNK) {
            let (tallies, standing) =
                tokio::try_join!(store.tallies(name, chunk), store.standing(name, chunk))?;
            for (window, tally) in tallies {
                let head = standing.get(&window).and_then(|standing| standing.head.as_ref());
                let billed = head.map_or(0, |head| head.segments);
                let counted = self.late.entry(window.start()).or_insert(0);
                let beyond = tally.segments.saturating_sub(billed);
                count += beyond.saturating_sub(*counted);
                *counted = beyond.max(*counted);
            }
        }
        if count > 0 {
            stats.came_late(count);
            tracing::warn!(
                upstream = name,
                segments = count,
                "segments came for a month that is closed: its bill stays as it is, and they are in none"
            );
        }
        Ok(())
    }
}

impl Outcome {
    fn add(&mut self, other: Outcome) {
        for (state, windows) in other.written {
            *self.written.entry(state).or_default() += windows;
        }
        self.windows += other.windows;
        self.short += other.short;
        self.starts.extend(other.starts);
        self.other_rules.extend(other.other_rules);
    }
}

impl Bookkeeping {
    /// Lets the cycle that runs come to its end, if that is near, and stops.
    pub async fn finish(self) {
        self.stop.send_replace(true);
        let _ = self.task.await;
    }
}

/// Microseconds of a day.
const DAY_US: u64 = 86_400_000_000;

/// The windows that can still change without any row being stored late: those that are not settled, and those whose contexts these are in.
fn recent(now: Micros, rules: &Rules) -> Span {
    let back_us = rules.settle_us + (rules.reach() + SLACK) * Window::LEN_US;
    let from = Window::at(Micros(now.0.saturating_sub(back_us)));
    Span::new(from.start(), now)
}

/// A span by days.
fn days(span: Span) -> Vec<Span> {
    let mut days = Vec::new();
    let mut from = span.from();
    while from < span.to() {
        let to = Micros(from.0 - from.0 % DAY_US + DAY_US).min(span.to());
        days.push(Span::new(from, to));
        from = to;
    }
    days
}

/// Failures one after the other, and what was said of them.
#[derive(Default)]
struct Failures {
    count: u32,
    said: Option<&'static str>,
}

impl Failures {
    fn wait(&self, every: Duration) -> Duration {
        let wait = every.saturating_mul(1 << self.count.saturating_sub(1).min(6));
        wait.min(BACKOFF_MAX.max(every))
            .mul_f64(rand::random_range(0.875..1.125))
    }

    /// Each cause is said once. That there is no schema yet, when a gateway has only begun, is none of anybody's business.
    fn report(&mut self, error: &LedgerError) {
        self.count += 1;
        let cause = error.cause();
        let is_start =
            self.count < 3 && matches!(error, LedgerError::OtherSchema { .. } | LedgerError::Read(_));
        if is_start || self.said == Some(cause.name()) {
            tracing::debug!(%error, cause = cause.name(), "the ledger waits");
            return;
        }
        self.said = Some(cause.name());
        if error.is_read_only() {
            tracing::warn!(
                %error,
                "the ledger cannot be written: the user of store.username may read and not INSERT; requests and their segments are not affected"
            );
        } else {
            tracing::warn!(%error, cause = cause.name(), advice = cause.advice(), "the ledger waits; trying again");
        }
    }

    fn end(&mut self) {
        if self.said.take().is_some() {
            tracing::info!(failures = self.count, "the ledger is kept again");
        }
        self.count = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_cover_a_span() {
        let span = Span::new(Micros(DAY_US / 2), Micros(3 * DAY_US));
        let lens: Vec<u64> = days(span).iter().map(|day| day.len_us()).collect();
        assert_eq!(lens, [DAY_US / 2, DAY_US, DAY_US]);
        assert!(days(Span::new(Micros(7), Micros(7))).is_empty());
    }

    #[test]
    fn waits_grow_to_a_limit_and_begin_with_a_cycle() {
        let every = Duration::from_secs(15);
        let of = |count| Failures { count, said: None }.wait(every);
        assert!(of(1) < Duration::from_secs(17) && of(30) > Duration::from_secs(100));
        assert!(of(30) <= BACKOFF_MAX.mul_f64(1.125));
    }
}
