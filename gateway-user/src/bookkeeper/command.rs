//! `vllm-gateway ledger`: windows of a period computed anew by the rules of this config, and months closed.
//!
//! A gateway leaves what stands by other rules as it is. So when a price was wrong this is how a bill is corrected: every window of the period is
//! computed from its stored facts, and written where that comes to something else, as a new revision of it. `--dry-run` says what would change.

use super::desk::{CHUNK, Change, Desk, Outcome, count};
use super::month::{self, CloseError};
use super::{Rules, Upstream, opened};
use crate::clock;
use crate::command::period::{self, Moment, PeriodError};
use crate::command::{Answer, ConfigSource, Failure, exit};
use crate::config::{Config, Env};
use crate::ledger::due::{chunks, open_parts};
use crate::ledger::{Bounds, Clock, Micros, Month, Recompute, Span, State, Window};
use crate::store::figures::{FiguresReader, ReadError};
use crate::store::ledger::{LedgerError, LedgerStore};
use clap::Args;
use std::fmt::Write as _;

/// What is said below the options.
const AFTER_HELP: &str = "\
Windows are 15 s long; those that begin within the period are computed, if they are over. Of windows whose segments may have been deleted \
(store.raw_days) and of closed months none is. Amounts are in USD.

Exit codes: 0 done; 2 the arguments are wrong; 65 the database is not there, or of another version; 69 ClickHouse does not answer; 75 the month cannot \
be closed yet; 77 ClickHouse refuses the user or password, or does not let it write; 78 the config is wrong, or keeps no rows";

/// What to compute anew.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct LedgerArgs {
    #[command(flatten)]
    source: ConfigSource,
    /// First moment: a date, which begins at 00:00 UTC, or a time in RFC 3339 (2026-11-24T08:00:00Z).
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, required_unless_present = "close")]
    from: Option<Moment>,
    /// First moment that is not in it any more [default: now].
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, requires = "from")]
    to: Option<Moment>,
    /// Only this upstream of the config [default: all].
    #[arg(long, value_name = "NAME")]
    upstream: Option<String>,
    /// Say what would change, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Close a month, such as 2026-10: print its bill, and never write its windows again.
    #[arg(long, value_name = "MONTH", conflicts_with_all = ["from", "to", "upstream"])]
    close: Option<Month>,
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Period(#[from] PeriodError),
    #[error("expected an upstream of the config, found `{found}`: it has {known}")]
    NoUpstream { found: String, known: String },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(
        "expected ClickHouse to let the user of store.username write the ledger, found that it refuses: grant INSERT on cost_ledger, segment_costs, \
         ledger_windows and ledger_months"
    )]
    ReadOnly,
    #[error(transparent)]
    Close(#[from] CloseError),
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Failure {
        let code = match &error {
            CommandError::Period(_) | CommandError::NoUpstream { .. } => exit::USAGE,
            CommandError::ReadOnly => exit::REFUSED,
            CommandError::Close(_) => exit::NOT_YET,
            CommandError::Read(error) => exit::of_read(error),
        };
        Failure::new(error, code)
    }
}

/// Does what is asked for, and says what it did.
///
/// # Errors
/// What stands in its way.
pub async fn run(arguments: &LedgerArgs, env: Env<'_>) -> Result<Answer, Failure> {
    let config = arguments.source.load(env)?;
    Ok(Answer::of(Command::of(&config, arguments).run().await?))
}

struct Command<'a> {
    config: &'a Config,
    arguments: &'a LedgerArgs,
    gateway_id: Box<str>,
    now: Micros,
}

impl<'a> Command<'a> {
    fn of(config: &'a Config, arguments: &'a LedgerArgs) -> Command<'a> {
        Command {
            config,
            arguments,
            gateway_id: config.gateway.id_or_host_name().as_str().into(),
            now: Micros(clock::wall_now_us().max(0) as u64),
        }
    }

    async fn run(&self) -> Result<String, CommandError> {
        // It knows how to say why ClickHouse cannot be read.
        let reader = FiguresReader::new(&self.config.store)?;
        let (store, rules, upstreams) = opened(self.config).ok_or(ReadError::NoStore)?;
        let explained = |error: LedgerError| match error {
            error if error.is_read_only() => CommandError::ReadOnly,
            LedgerError::Read(error) | LedgerError::Write(error) => {
                CommandError::Read(reader.explain(&error))
            }
            // The schema was checked by the reader: it has changed since.
            LedgerError::OtherSchema { found, known } => CommandError::Read(ReadError::OtherSchema {
                database: self.config.store.database.clone(),
                found,
                known,
                remedy: "another program has just changed it; try again",
            }),
        };
        if let Some(month) = self.arguments.close {
            reader.check_schema().await?;
            let closing = month::Closing {
                store: &store,
                rules: &rules,
                upstreams: &upstreams,
                closed_by: &self.gateway_id,
                now: self.now,
                writes: !self.arguments.dry_run,
            };
            return closing
                .close(month)
                .await
                .map_err(explained)?
                .map_err(CommandError::from);
        }
        let (from, to) = (self.arguments.from, self.arguments.to);
        let now_us = i64::try_from(self.now.0).unwrap_or(i64::MAX);
        let period = period::of(None, from, to, now_us)?;
        let moment = |us: i64| Micros(u64::try_from(us).unwrap_or(0));
        let asked = Span::new(moment(period.from_us()), moment(period.to_us()));
        let chosen = self.chosen(&upstreams)?;
        reader.check_schema().await?;
        let mut text = String::new();
        for upstream in chosen {
            text += &self
                .recompute(&store, &rules, upstream, asked)
                .await
                .map_err(explained)?;
        }
        Ok(text)
    }

    fn chosen<'u>(&self, upstreams: &'u [Upstream]) -> Result<Vec<&'u Upstream>, CommandError> {
        let Some(name) = &self.arguments.upstream else {
            return Ok(upstreams.iter().collect());
        };
        let found = upstreams.iter().find(|upstream| &*upstream.name == name.as_str());
        let known: Vec<&str> = upstreams.iter().map(|upstream| &*upstream.name).collect();
        found
            .map(|upstream| vec![upstream])
            .ok_or(CommandError::NoUpstream {
                found: name.clone(),
                known: known.join(", "),
            })
    }

    async fn recompute(
        &self,
        store: &LedgerStore,
        rules: &Rules,
        upstream: &Upstream,
        asked: Span,
    ) -> Result<String, LedgerError> {
        let Some(opened) = store.first_fact(&upstream.name).await? else {
            return Ok(format!("{}: nothing is known of it\n", upstream.name));
        };
        let bounds = Bounds {
            opened: Window::at(opened).start(),
            kept: Micros(self.now.0.saturating_sub(rules.raw_us)),
            over: self.now,
        };
        let asked = Bounds {
            opened: asked.from(),
            kept: Micros(0),
            over: Micros(asked.to().0 + Window::LEN_US - 1),
        };
        let (asked, known) = (asked.span(), bounds.span());
        let closed = store.closed_months().await?;
        let open = open_parts(&[asked], known, &closed);
        let desk = Desk {
            store,
            rules,
            upstream,
            gateway_id: &self.gateway_id,
            recompute: Recompute::ByRules,
            writes: !self.arguments.dry_run,
        };
        let clock = Clock {
            now: self.now,
            settle_us: rules.settle_us,
        };
        let mut outcome = Outcome::default();
        for chunk in chunks(&open, CHUNK) {
            desk.compute(chunk, clock, &mut outcome).await?;
        }
        let booked_before = known.within(asked);
        let in_closed = count(booked_before) - open.iter().map(|span| count(*span)).sum::<u64>();
        let too_old = count(Span::new(
            bounds.opened.max(asked.from()),
            known.from().min(asked.to()),
        ));
        Ok(self.told(&upstream.name, &outcome, in_closed, too_old))
    }

    fn told(&self, upstream: &str, outcome: &Outcome, in_closed: u64, too_old: u64) -> String {
        let verb = if self.arguments.dry_run { "would be " } else { "" };
        let unchanged = outcome.windows - outcome.changed();
        let restated = outcome.changed() - outcome.new;
        // Writing into a string cannot fail.
        let mut text = format!(
            "{upstream}: {} windows computed, {unchanged} unchanged, {restated} {verb}restated, {} {verb}booked for the first time\n",
            outcome.windows, outcome.new
        );
        for state in State::ALL {
            let windows = outcome.in_state(state);
            if windows > 0 {
                let _ = writeln!(text, "  {windows} {verb}{}", state.name());
            }
        }
        for (windows, why) in [
            (
                outcome.short,
                "have fewer segments than they were computed from (deleted, or not on this replica), and stay as they are",
            ),
            (in_closed, "are of closed months, and stay as they are"),
            (
                too_old,
                "are older than their raw rows are sure to be kept (store.raw_days), and stay as they are",
            ),
        ] {
            if windows > 0 {
                let _ = writeln!(text, "  {windows} {why}");
            }
        }
        let Change { before, after } = outcome.bill;
        let _ = writeln!(
            text,
            "  bill before {before}, after {after}; rows sum to {}",
            outcome.rows.after
        );
        let changes = outcome
            .teams
            .iter()
            .filter(|(_, change)| change.before != change.after);
        for (team, Change { before, after }) in changes {
            let (sign, by) = match after >= before {
                true => ("+", after.0 - before.0),
                false => ("-", before.0 - after.0),
            };
            let _ = writeln!(
                text,
                "  {team}: {before} -> {after} ({sign}{})",
                crate::ledger::NanoUsd(by)
            );
        }
        text
    }
}
