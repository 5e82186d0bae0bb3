//! Puts together what is asked for: all of it, or what one team may see.

use super::allowance::limit_rows;
use super::engines::EngineState;
use super::recent::RequestRow;
use super::shape::{
    CostRow, EngineRow, GatewayRow, Head, Reconciliation, ReconciliationPage, Requests, Snapshot, StoreRow,
    TapRow, TeamRow, Teams, UpstreamList, UpstreamRow, VERSION,
};
use super::window::WINDOW_S;
use super::{Live, REQUESTS_MAX, Team};
use crate::bookkeeper::LedgerStats;
use crate::clock;
use crate::identity::{TeamId, WithoutTeam};
use crate::ledger::{Line, Micros};
use crate::limits::Now;
use crate::proxy::Shared;
use crate::proxy::upstream::Upstream;
use crate::store::Table;
use crate::store::service::StoreCounts;
use crate::tap::agent::Agent;
use crate::wire::At;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// How often it is looked whether an upstream has anything to do: four times a second tells shares to half a per cent.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Looks in a window, each a bit.
const LOOKS: usize = WINDOW_S * 4;

/// Who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Show {
    /// Somebody who may see everything.
    All,
    /// Somebody who may see what this team has done.
    Team(TeamId),
}

impl Show {
    fn name(&self) -> String {
        match self {
            Show::All => "admin".to_owned(),
            Show::Team(team) => format!("team:{team}"),
        }
    }
}

/// All that there is to show of a gateway.
pub struct View {
    live: Arc<Live>,
    shared: Arc<Shared>,
    clients: Option<SocketAddr>,
    /// Weak: the tap has sinks, and they have what this shows.
    tap: Option<Weak<Agent>>,
    store: OnceLock<StoreCounts>,
    ledger: OnceLock<Arc<LedgerStats>>,
    busy: Vec<Mutex<Busy>>,
    started: At,
}

/// Whether an upstream was busy at the last looks.
#[derive(Debug)]
struct Busy {
    looks: [bool; LOOKS],
    taken: usize,
}

impl View {
    /// What `live` and `shared` know. `clients` is where these connect.
    pub fn new(
        live: Arc<Live>,
        shared: Arc<Shared>,
        clients: Option<SocketAddr>,
        tap: Option<Weak<Agent>>,
    ) -> View {
        let busy = shared.upstreams.iter().map(|_| Mutex::default()).collect();
        View {
            live,
            shared,
            clients,
            tap,
            store: OnceLock::new(),
            ledger: OnceLock::new(),
            busy,
            started: clock::now(),
        }
    }

    /// Shows a store's numbers too; a second store is not shown.
    pub fn show_store(&self, counts: StoreCounts) {
        drop(self.store.set(counts));
    }

    /// Shows a bookkeeper's numbers too; a second one is not shown.
    pub fn show_ledger(&self, stats: Arc<LedgerStats>) {
        drop(self.ledger.set(stats));
    }

    /// Looks at the upstreams, over and over, until the task is ended.
    pub async fn watch(self: Arc<View>) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            self.look();
        }
    }

    fn look(&self) {
        for (upstream, busy) in self.shared.upstreams.iter().zip(&self.busy) {
            // What passes through is known at once; of what does not, only the last scrape tells.
            let is_busy = match self.clients {
                Some(_) => upstream.inflight() > 0,
                None => self.runs(upstream),
            };
            busy.lock().unwrap_or_else(PoisonError::into_inner).add(is_busy);
        }
    }

    /// Whether the engine said at the last scrape that requests ran.
    fn runs(&self, upstream: &Upstream) -> bool {
        let engine = self.live.engines.state(upstream.name());
        engine.ok
            && engine
                .sum(|model| model.running)
                .is_some_and(|running| running > 0.0)
    }

    /// `/api/teams`.
    pub fn teams(&self, show: &Show) -> Teams {
        Teams {
            head: head(show),
            window_s: self.window_s(),
            teams: self.team_rows(show),
        }
    }

    /// `/api/upstreams`.
    pub fn upstreams(&self, show: &Show) -> UpstreamList {
        UpstreamList {
            head: head(show),
            upstreams: self.upstream_rows(show),
        }
    }

    /// `/api/requests`: at most `rows_max`.
    pub fn requests(&self, show: &Show, rows_max: usize) -> Requests {
        Requests {
            head: head(show),
            requests: self.request_rows(show, 0, rows_max),
        }
    }

    /// `/api/reconciliation`, which tells of all teams together.
    pub fn reconciliation(&self) -> ReconciliationPage {
        ReconciliationPage {
            head: head(&Show::All),
            reconciliation: self.reconciliation_now(),
        }
    }

    /// One event of `/api/live`, with the requests after number `after`.
    pub fn snapshot(&self, show: &Show, after: u64) -> Snapshot {
        Snapshot {
            head: head(show),
            gateway: self.gateway_row(),
            window_s: self.window_s(),
            teams: self.team_rows(show),
            upstreams: self.upstream_rows(show),
            requests: self.request_rows(show, after, REQUESTS_MAX),
            reconciliation: (*show == Show::All).then(|| self.reconciliation_now()),
        }
    }

    /// What rates are of: the window, or the time since the start while that is less.
    fn window_s(&self) -> u64 {
        (clock::now().micros_since(self.started) / 1_000_000).clamp(1, WINDOW_S as u64)
    }

    fn gateway_row(&self) -> GatewayRow {
        let config = &self.shared.config;
        GatewayRow {
            gateway_version: env!("CARGO_PKG_VERSION"),
            gateway_id: config.gateway.id_or_host_name().to_string(),
            uptime_s: clock::now().micros_since(self.started) / 1_000_000,
            capture: config.capture.as_str(),
            clients: self.clients.map(|addr| addr.to_string()),
            team_header: config.identity.team_header.to_string(),
            teamless: match config.identity.without_team {
                WithoutTeam::Refuse => "refused",
                WithoutTeam::NameByKey => "named",
            },
            is_draining: self.shared.phase.is_draining(),
        }
    }

    fn team_rows(&self, show: &Show) -> Vec<TeamRow> {
        let (now, window_s) = (clock::now(), self.window_s());
        let live = &self.live;
        let in_flight = live.metrics.inflight_by_team();
        let teams: BTreeMap<Box<str>, Arc<Mutex<Team>>> = {
            let teams = live.teams.read().unwrap_or_else(PoisonError::into_inner);
            let known = teams.iter().filter(|(name, _)| may_see(show, name));
            known
                .map(|(name, team)| (name.clone(), Arc::clone(team)))
                .collect()
        };
        let mut rows: Vec<TeamRow> = teams
            .iter()
            .map(|(name, team)| TeamRow {
                in_flight: in_flight.get(&**name).copied().unwrap_or(0),
                ..team_row(
                    name,
                    &team.lock().unwrap_or_else(PoisonError::into_inner),
                    now,
                    window_s,
                )
            })
            .collect();
        // A team whose first request still runs has nothing else to show.
        let only_begun = in_flight
            .iter()
            .filter(|(name, _)| may_see(show, name) && !teams.contains_key(name.as_str()));
        rows.extend(only_begun.map(|(name, count)| TeamRow {
            team: name.clone(),
            in_flight: *count,
            ..TeamRow::default()
        }));
        // And what of a budget is spent is worth knowing also while the team does nothing here.
        let limits = &self.shared.limiter;
        let idle = limits.teams().into_iter().filter(|team| {
            let is_listed = teams.contains_key(team.name()) || in_flight.contains_key(team.name());
            team.budget().is_some() && !is_listed && may_see(show, team.name())
        });
        rows.extend(idle.map(|team| TeamRow {
            team: team.name().to_owned(),
            ..TeamRow::default()
        }));
        let now = Now::read();
        for row in &mut rows {
            if let Some(team) = limits.team(&row.team) {
                (row.budget, row.limits) = limit_rows(&team, now);
            }
        }
        rows.sort_by(|left, right| left.team.cmp(&right.team));
        rows
    }

    fn request_rows(&self, show: &Show, after: u64, rows_max: usize) -> Vec<Arc<RequestRow>> {
        let live = &self.live;
        match show {
            Show::All => live.recent.after(after, rows_max),
            Show::Team(team) => match live.recent_of.get(team.as_str()) {
                Some(recent) => recent.after(after, rows_max),
                None => Vec::new(),
            },
        }
    }

    fn upstream_rows(&self, show: &Show) -> Vec<UpstreamRow> {
        let now = clock::now();
        let upstreams = self.shared.upstreams.iter().zip(&self.busy);
        let rows = upstreams.map(|(upstream, busy)| {
            let engine = self.live.engines.state(upstream.name());
            let row = upstream_row(upstream, engine, busy, now);
            if *show == Show::All {
                row
            } else {
                without_load(row)
            }
        });
        rows.collect()
    }

    fn reconciliation_now(&self) -> Reconciliation {
        let engines = self.shared.upstreams.iter().map(|upstream| {
            let figures = self.live.metrics.reconciliation(upstream.name()).figures();
            EngineRow {
                upstream: upstream.name().to_owned(),
                engine_prompt_tokens: figures.engine.prompt_tokens,
                engine_completion_tokens: figures.engine.completion_tokens,
                attributed_prompt_tokens: figures.attributed.prompt_tokens,
                attributed_completion_tokens: figures.attributed.completion_tokens,
                gap_prompt_tokens: figures.gap.prompt_tokens,
                gap_completion_tokens: figures.gap.completion_tokens,
                gap_exceeded: figures.is_exceeded,
                likely_causes: figures.causes,
            }
        });
        Reconciliation {
            engines: engines.collect(),
            tap: self.tap.as_ref().and_then(Weak::upgrade).map(|tap| tap_row(&tap)),
            store: self.store.get().map(store_row),
            costs: self.ledger.get().map(|stats| cost_rows(stats)),
        }
    }
}

impl Default for Busy {
    fn default() -> Busy {
        Busy {
            looks: [false; LOOKS],
            taken: 0,
        }
    }
}

impl Busy {
    fn add(&mut self, is_busy: bool) {
        self.looks[self.taken % LOOKS] = is_busy;
        self.taken += 1;
    }

    /// `None` before the first look.
    fn share(&self) -> Option<f64> {
        let taken = self.taken.min(LOOKS);
        let busy = self.looks[..taken].iter().filter(|look| **look).count();
        (taken > 0).then(|| rounded(busy as f64 / taken as f64))
    }
}

fn head(show: &Show) -> Head {
    Head {
        version: VERSION,
        at_us: clock::wall_now_us(),
        scope: show.name(),
    }
}

fn may_see(show: &Show, team: &str) -> bool {
    match show {
        Show::All => true,
        Show::Team(own) => own.as_str() == team,
    }
}

fn team_row(name: &str, team: &Team, now: At, window_s: u64) -> TeamRow {
    let view = team.window.view(now);
    let (minute, totals) = (view.counts, &team.totals);
    let per_second = |count: u64| rounded(count as f64 / window_s as f64);
    let usd_per_nano = 1e-9 * 3_600.0 / window_s as f64;
    TeamRow {
        team: name.to_owned(),
        in_flight: 0,
        requests_per_second: per_second(minute.requests),
        errors: minute.errors,
        aborted: minute.aborted,
        refused: minute.refused,
        ttft_p50_us: view.ttft_p50_us,
        ttft_p95_us: view.ttft_p95_us,
        itl_p95_us: view.itl_p95_us,
        prompt_tokens_per_second: per_second(minute.prompt_tokens),
        completion_tokens_per_second: per_second(minute.completion_tokens),
        charge_usd_per_hour: rounded(minute.charge_nano_usd as f64 * usd_per_nano),
        requests_by_second: view.requests_by_second,
        requests_total: totals.counts.requests,
        errors_total: totals.counts.errors,
        prompt_tokens_total: totals.counts.prompt_tokens,
        cached_tokens_total: totals.cached_tokens,
        completion_tokens_total: totals.counts.completion_tokens,
        engine_prompt_tokens_total: totals.engine_prompt_tokens,
        engine_completion_tokens_total: totals.engine_completion_tokens,
        charge_nano_usd_total: totals.counts.charge_nano_usd,
        ..TeamRow::default()
    }
}

fn upstream_row(upstream: &Upstream, engine: EngineState, busy: &Mutex<Busy>, now: At) -> UpstreamRow {
    let (running, waiting) = (
        engine.sum(|model| model.running),
        engine.sum(|model| model.waiting),
    );
    let up = upstream.is_up();
    // What a server that is gone said last is no longer so.
    let now_known = |value: Option<f64>| value.filter(|_| up && engine.ok);
    let some = |value: Option<f64>| now_known(value).is_some_and(|value| value > 0.0);
    let condition = if !up {
        "down"
    } else if some(waiting) {
        "queueing"
    } else if some(running) || upstream.inflight() > 0 {
        "running"
    } else {
        "idle"
    };
    UpstreamRow {
        upstream: upstream.name().to_owned(),
        url: Some(upstream.config().url.to_string()),
        serves: upstream.config().serves.as_str(),
        up,
        condition,
        in_flight: Some(upstream.inflight() as u64),
        running: now_known(running),
        waiting: now_known(waiting),
        kv_cache_usage: now_known(engine.kv_cache_usage_max()).map(rounded),
        busy_share: busy.lock().unwrap_or_else(PoisonError::into_inner).share(),
        models: Some(engine.models.keys().map(|name| name.to_string()).collect()),
        scrape_ok: engine.at.map(|_| engine.ok),
        scrape_age_s: engine.at.map(|at| rounded(now.micros_since(at) as f64 / 1e6)),
    }
}

/// What a team may know of a server: how busy it is tells what the others do.
fn without_load(row: UpstreamRow) -> UpstreamRow {
    UpstreamRow {
        url: None,
        condition: if row.up { "up" } else { "down" },
        in_flight: None,
        running: None,
        waiting: None,
        kv_cache_usage: None,
        busy_share: None,
        models: None,
        scrape_ok: None,
        scrape_age_s: None,
        ..row
    }
}

fn tap_row(tap: &Agent) -> TapRow {
    let counts = tap.counts();
    let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
    TapRow {
        is_in_place: counts.probe.is_in_place,
        own_exchanges: read(&counts.correlated.joined) + read(&counts.correlated.unjoined),
        direct_exchanges: read(&counts.correlated.direct),
        foreign_exchanges: read(&counts.correlated.foreign),
        incomplete_exchanges: counts.followed.incomplete,
        forged_ids: read(&counts.correlated.forged),
        lost_records: counts.probe.lost(),
    }
}

/// Upstreams whose last hour is known.
fn cost_rows(stats: &LedgerStats) -> Vec<CostRow> {
    let now = Micros(u64::try_from(clock::wall_now_us()).unwrap_or(0));
    let known = stats
        .last_hours(now)
        .filter_map(|(upstream, hour)| Some((upstream, hour?)));
    known
        .map(|(upstream, hour)| CostRow {
            upstream: upstream.to_owned(),
            from_us: hour.span.from().0,
            to_us: hour.span.to().0,
            teams_nano_usd: hour.cost(Line::Teams).0,
            idle_nano_usd: hour.cost(Line::Idle).0,
            unattributed_nano_usd: hour.cost(Line::Unattributed).0,
            loading_nano_usd: hour.cost(Line::Loading).0,
            down_nano_usd: hour.cost(Line::Down).0,
            scaled_to_zero_nano_usd: hour.cost(Line::ScaledToZero).0,
        })
        .collect()
}

/// Requests and their segments together.
fn store_row(counts: &StoreCounts) -> StoreRow {
    let mut row = StoreRow {
        waiting_rows: 0,
        waiting_bytes: 0,
        oldest_age_s: 0.0,
        stored_rows: 0,
        dropped_rows: 0,
        quarantined_rows: 0,
        disk_failures: 0,
    };
    for table in Table::ALL {
        let of_table = match table {
            Table::Events => &counts.events,
            Table::Segments => &counts.segments,
        };
        let spool = of_table.spool.stats();
        let age_us = spool
            .oldest_sealed_at_us
            .map_or(0, |sealed_us| clock::wall_now_us() - sealed_us);
        row.waiting_rows += spool.rows;
        row.waiting_bytes += spool.bytes;
        row.oldest_age_s = row.oldest_age_s.max(rounded(age_us as f64 / 1e6));
        row.stored_rows += of_table.sender.rows.load(Ordering::Relaxed);
        row.dropped_rows += spool.dropped.iter().sum::<u64>();
        row.quarantined_rows += spool.quarantined;
        row.disk_failures += spool.failures;
    }
    row
}

/// To six places: more are noise, and each is sent every second.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}
