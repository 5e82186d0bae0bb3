//! What budgets are told of the world beyond this process: what other gateways charged, and what this one did before it was started.
//!
//! Three sums that do not overlap make what a team has spent: what this process charged, which a [`Limiter`] counts by itself; what earlier runs had
//! left in the spool, read once before anything is sent; and what is in ClickHouse in batches of neither kind, read every `metrics.emit_interval`.
//! A batch belongs to one of them for good, so that nothing is counted twice or missed while rows are on their way.
//!
//! How far off it is: by what others have not stored yet, which is `spool.seal_after` and some while ClickHouse takes rows, and by one interval.
//! What comes later than an hour after its request ended is seen within another hour, since older time is read once an hour only. While ClickHouse
//! is away the last sums stand, and this process's own goes on. From its start to the first answer a gateway knows what it wrote down of the
//! sums itself ([`Memo`]), which lacks an interval at most.

use super::budget::period_at;
use super::memo::Memo;
use super::{Elsewhere, Limiter, Now};
use crate::config::{BudgetPeriod, Config};
use crate::ledger::{Micros, NanoUsd, Span};
use crate::store::figures::{Charges, FiguresReader, ReadError, Whose};
use crate::store::service::StoreService;
use crate::store::{Counted, LeftCharge};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// What is older than this is read again once an hour only: a month's windows are not to be read every 15 seconds.
const SETTLED_US: u64 = 3_600_000_000;

/// Between two tries before the first answer: the embedded engine takes a second to start.
const FIRST_TRIES: Duration = Duration::from_millis(250);

/// How many there are of them: a minute's worth.
const FIRST_TRIES_MAX: u32 = 240;

/// Failures between two lines in the log.
const FAILURES_A_LINE: u32 = 20;

/// Keeps a [`Limiter`] informed.
pub struct BudgetKeeper {
    reader: FiguresReader,
    limiter: Arc<Limiter>,
    counted: Counted,
    accounts: Vec<Account>,
    whose: Whose,
    teams_max: usize,
    every: Duration,
    memo: Memo,
    failures: u32,
    has_read: bool,
}

/// What is known of one kind of period.
struct Account {
    kind: BudgetPeriod,
    /// What earlier runs had left, of the period that it was read in.
    left: Elsewhere,
    settled: Option<(Span, Charges)>,
}

/// A keeper at work.
pub struct Keeping {
    task: JoinHandle<()>,
}

impl BudgetKeeper {
    /// The keeper of the budgets of a configuration, which has told `limiter` already what is known without ClickHouse. `None` when there is nothing
    /// to keep: no budget, or no store, which is said.
    pub fn of(config: &Config, limiter: &Arc<Limiter>, store: Option<&StoreService>) -> Option<BudgetKeeper> {
        config.limits.budgets().next()?;
        let opened = store.zip(FiguresReader::new(&config.store).ok());
        let Some((store, reader)) = opened else {
            tracing::warn!(
                "nothing is stored (store.url: none): budgets count from the start of this process"
            );
            return None;
        };
        let now = Now::read().wall;
        let mut accounts: Vec<Account> = Vec::new();
        for budget in config.limits.budgets() {
            if !accounts.iter().any(|account| account.kind == budget.period) {
                accounts.push(Account::new(budget.period, now));
            }
        }
        let counted = store.leftover(|charge| accounts.iter_mut().for_each(|account| account.left(charge)));
        let names = config
            .limits
            .teams
            .iter()
            .map(|entry| entry.team.as_str().to_owned());
        let names: Vec<String> = names.collect();
        let keeper = BudgetKeeper {
            reader,
            limiter: Arc::clone(limiter),
            counted,
            teams_max: config.metrics.max_teams as usize + names.len(),
            // Whoever has no entry can have a budget only by default.
            whose: match config.limits.default.budget {
                Some(_) => Whose::All,
                None => Whose::Of(names),
            },
            every: config.metrics.emit_interval,
            memo: Memo::at(&config.spool.dir, config.gateway.id_or_host_name().as_str()),
            accounts,
            failures: 0,
            has_read: false,
        };
        keeper.remember(now);
        Some(keeper)
    }

    /// Tells what is known before ClickHouse has answered: of each team what was written down, or what waits in the spool if that is more. The two
    /// overlap, and a budget must not be taken for spent that is not.
    fn remember(&self, now: Micros) {
        for account in &self.accounts {
            let from = period_at(account.kind, now).from();
            let mut known = account.left.clone();
            for (team, amount) in self.memo.read(account.kind, from) {
                let most = known.by_team.entry(team).or_default();
                *most = amount.max(*most);
            }
            self.limiter.learn(account.kind, known);
        }
    }

    /// Begins to read. Must be called on a tokio runtime.
    pub fn start(self) -> Keeping {
        Keeping {
            task: tokio::spawn(self.run()),
        }
    }

    async fn run(mut self) {
        loop {
            let read = self.round(Now::read().wall).await;
            self.report(&read);
            let is_starting = !self.has_read && self.failures < FIRST_TRIES_MAX;
            if !is_starting {
                let (memo, limiter) = (self.memo.clone(), Arc::clone(&self.limiter));
                // It has its own words for what goes wrong.
                let _ = tokio::task::spawn_blocking(move || memo.write(&limiter, Now::read())).await;
            }
            sleep(if is_starting { FIRST_TRIES } else { self.every }).await;
        }
    }

    /// Reads what is stored, and tells.
    ///
    /// # Errors
    /// When ClickHouse does not answer; what was known stands.
    pub async fn round(&mut self, now: Micros) -> Result<(), ReadError> {
        self.reader.check_schema().await?;
        for account in &mut self.accounts {
            let period = period_at(account.kind, now);
            let hour = now.0 - now.0 % SETTLED_US;
            let cut = Micros(hour.saturating_sub(SETTLED_US)).max(period.from());
            let (old, recent) = (Span::new(period.from(), cut), Span::new(cut, period.to()));
            let read = async |span: Span| match span.is_empty() {
                true => Ok(Charges::default()),
                false => {
                    let (counted, whose) = (&self.counted, &self.whose);
                    self.reader
                        .charged_elsewhere(span, counted, whose, self.teams_max)
                        .await
                }
            };
            let settled = match account.settled.take().filter(|(span, _)| *span == old) {
                Some(settled) => settled,
                None => (old, read(old).await?),
            };
            let recent = read(recent).await?;
            let mut known = Elsewhere {
                from: period.from(),
                ..Elsewhere::default()
            };
            add(&mut known, &settled.1);
            add(&mut known, &recent);
            account.settled = Some(settled);
            if account.left.from == period.from() {
                let left = Charges {
                    by_team: account.left.by_team.clone(),
                    rest: account.left.rest,
                };
                add(&mut known, &left);
            }
            self.limiter.learn(account.kind, known);
        }
        Ok(())
    }

    fn report(&mut self, read: &Result<(), ReadError>) {
        match read {
            Ok(()) => {
                if self.failures > 0 && self.has_read {
                    tracing::info!(failures = self.failures, "budgets are read again");
                }
                (self.failures, self.has_read) = (0, true);
            }
            Err(error) => {
                // That the engine is only starting is no news.
                let is_news = self.has_read || self.failures > 0;
                if is_news && self.failures.is_multiple_of(FAILURES_A_LINE) {
                    tracing::warn!(%error, "what budgets have spent elsewhere cannot be read; what was known stands, and this gateway's own counts");
                }
                self.failures += 1;
            }
        }
    }
}

impl Keeping {
    /// Stops.
    pub fn finish(self) {
        self.task.abort();
    }
}

impl Account {
    fn new(kind: BudgetPeriod, now: Micros) -> Account {
        Account {
            kind,
            left: Elsewhere {
                from: period_at(kind, now).from(),
                by_team: BTreeMap::new(),
                rest: NanoUsd(0),
            },
            settled: None,
        }
    }

    /// Takes note of what was left in the spool, if it is of this period.
    fn left(&mut self, charge: LeftCharge<'_>) {
        let ended = super::micros(charge.ended_us);
        if period_at(self.kind, ended).from() == self.left.from {
            *self.left.by_team.entry(charge.team.into()).or_default() += NanoUsd(charge.nano_usd);
        }
    }
}

fn add(known: &mut Elsewhere, more: &Charges) {
    for (team, amount) in &more.by_team {
        *known.by_team.entry(team.clone()).or_default() += *amount;
    }
    known.rest += more.rest;
}
