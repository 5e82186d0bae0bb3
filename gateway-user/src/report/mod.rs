//! `vllm-gateway report`: what each team, project, user or model used, how it was served and what it cost, in a period or a month.
//!
//! Figures come from ClickHouse ([`store::figures`](crate::store::figures) says what each of them means), deduplicated; a request counts in the
//! period in which it ended. With them comes what they lack: rows that still wait in this host's spool. That is looked at first, so that a row on
//! its way shows in both places rather than in none. Left out: requests that still run, and spools of gateways on other hosts.
//!
//! Costs come from the ledger, by 15-second windows: those that begin in the period, each a whole one. So a request that runs on from one period
//! into the next has a part of its cost in each, and its charge in the second. Lines that nobody has stand below the groups, and all lines sum to
//! the bill of the windows, which is proved and not supposed: where it is not so, the report says it and exits with [`exit::UNEVEN`]. Amounts are
//! whole nano-USD until they are written.
//!
//! All formats print the same columns, but for FOCUS, whose columns are those of another house.

mod amount;
mod bill;
mod column;
mod csv;
mod focus;
mod json;
mod line;
mod proof;
mod reconciliation;
mod table;

use crate::command::period::{PeriodArgs, PeriodError};
use crate::command::{Answer, ConfigSource, Failure, exit, time};
use crate::config::{Config, Env};
use crate::ledger::NanoUsd;
use crate::store::StoreError;
use crate::store::figures::{ChargeRow, Dimension, FiguresReader, LedgerFigures, Period, ReadError};
use crate::store::{Backlog, Waiting};
use bill::{Bill, Month, NothingToShareBy};
use clap::{Args, ValueEnum};
use column::{COLUMNS, Column, Shown};
use line::{Line, lines_of};
use proof::Proof;
use std::path::PathBuf;

/// What is said below the options.
const AFTER_HELP: &str = "\
A request counts in the period in which it ended, and periods end before --to. TTFT is the time to the first token, ITL a request's mean gap between \
chunks with content, E2E the duration of completed requests. Tokens are sums of what is known; requests with unknown tokens are counted apart.

The charge is by tokens and known when a request ends. The cost is its share of what the upstreams cost, by windows of 15 s: a period that cuts \
windows has those that begin in it, whole. Over or under is the charge less the cost. USD per 1M tokens is the cost by the tokens that were worked on in \
these windows. What nobody pays has lines of its own (__idle__, __unattributed__, __loading__, __down__, __scaled_to_zero__), and all lines sum to the bill. \
Users and endpoints have the costs of their requests, and no shares of idle time: what is left is the line __without_request__. `-` is unknown, such as \
the cost of who has no rows in a period that is not all booked.

CSV has USD to the last of nine places, JSON whole nano-USD. FOCUS is a row for each day, upstream, team, project and model.

Exit codes: 0 a report was printed; 2 the arguments are wrong; 65 the database is not there, or of another version; 69 ClickHouse does not answer; \
70 a report was printed, and the ledger's lines do not sum to its bill, so that nobody should be billed by it; 74 the spool cannot be read; 77 ClickHouse \
refuses the user or password; 78 the config is wrong, or keeps no rows";

/// What to report, and how.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ReportArgs {
    #[command(flatten)]
    source: ConfigSource,
    #[command(flatten)]
    period: PeriodArgs,
    /// The bill of a month (UTC), such as 2026-11, and the proof that it adds up; a month that still runs is said to.
    #[arg(long, value_name = "MONTH", value_parser = Month::parse, conflicts_with_all = ["since", "from", "to"])]
    bill: Option<Month>,
    /// What the month did cost, in USD: its invoice is shared out in proportion to the costs.
    #[arg(long, value_name = "AMOUNT", value_parser = bill::parse_amount, requires = "bill")]
    actual: Option<NanoUsd>,
    /// What to group by; several, separated by commas, make a line for each combination [default: team].
    #[arg(long, value_enum, value_delimiter = ',')]
    by: Vec<Dimension>,
    /// How to print it.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Who provides and bills the upstreams, for the columns of FOCUS that name it [default: vllm-gateway].
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,
    /// Instead: what the engines counted against what requests are known to have used, for each upstream, and where a gap may come from.
    #[arg(long, conflicts_with_all = ["by", "actual", "issuer"])]
    reconciliation: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// RFC 4180, with a line of names; what the figures lack, and the proof, go to standard error.
    Csv,
    /// One object.
    Json,
    /// Costs as rows of the FinOps Open Cost and Usage Specification (FOCUS 1.3), in CSV.
    Focus,
}

/// All that is printed.
#[derive(Debug)]
struct Report {
    period: Period,
    by: Vec<Dimension>,
    /// What the lines are of; `None` for a report that is no bill.
    bill: Option<Bill>,
    /// The total last.
    lines: Vec<Line>,
    /// The finest rows, for FOCUS, with what the invoice says of each.
    charges: Vec<(ChargeRow, i64)>,
    proof: Proof,
    spool_dir: PathBuf,
    /// `None` when there is no spool to look into.
    waiting: Option<Waiting>,
    /// When it was looked at, microseconds since 1970.
    now_us: i64,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error(transparent)]
    Period(#[from] PeriodError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Spool(#[from] StoreError),
    #[error(transparent)]
    Invoice(#[from] NothingToShareBy),
    #[error(
        "expected --by team, project, model or day with --bill, found {found}: the ledger has no {found}, and single requests are kept shorter than bills"
    )]
    NotBilled { found: &'static str },
    #[error(
        "expected no --by with --format focus: its rows are always by day, upstream, team, project and model"
    )]
    GroupedFocus,
    #[error("expected --format focus with --issuer: no other format names who bills")]
    NoIssuer,
    #[error(
        "expected --format table, csv or json with --reconciliation: FOCUS has costs, and no counters of engines"
    )]
    NoCosts,
}

impl ReportError {
    fn exit_code(&self) -> u8 {
        match self {
            ReportError::Period(_)
            | ReportError::Invoice(_)
            | ReportError::NotBilled { .. }
            | ReportError::GroupedFocus
            | ReportError::NoIssuer
            | ReportError::NoCosts => exit::USAGE,
            ReportError::Spool(_) => exit::SPOOL,
            ReportError::Read(error) => exit::of_read(error),
        }
    }
}

impl From<ReportError> for Failure {
    fn from(error: ReportError) -> Failure {
        let code = error.exit_code();
        Failure::new(error, code)
    }
}

/// The report, as it is printed.
///
/// # Errors
/// What stands in its way.
pub async fn run(arguments: &ReportArgs, env: Env<'_>) -> Result<Answer, Failure> {
    let config = arguments.source.load(env)?;
    if arguments.reconciliation {
        return Ok(Answer::of(reconcile(arguments, &config).await?));
    }
    let report = gather(arguments, &config).await?;
    let mut notes = Vec::new();
    let text = match arguments.format {
        Format::Table => table::print(&report),
        Format::Csv => {
            notes.extend([report.lacks(), report.explained()]);
            csv::print(&report)
        }
        Format::Json => json::print(&report),
        Format::Focus => {
            notes.push(report.explained());
            let issuer = arguments.issuer.as_deref().unwrap_or(focus::ISSUER_DEFAULT);
            focus::print(&report, &config.store.database, issuer)
        }
    };
    let wrong = report.proof.wrong();
    let code = if wrong.is_empty() { 0 } else { exit::UNEVEN };
    notes.extend(wrong);
    let notes = notes.into_iter().map(|note| note + "\n").collect();
    Ok(Answer { text, notes, code })
}

/// What `--reconciliation` prints.
async fn reconcile(arguments: &ReportArgs, config: &Config) -> Result<String, ReportError> {
    if arguments.format == Format::Focus {
        return Err(ReportError::NoCosts);
    }
    let period = period_of(arguments, time::now_us())?;
    let found = FiguresReader::new(&config.store)?.reconciliation(period).await?;
    Ok(reconciliation::print(
        period,
        &found,
        &config.reconciliation,
        arguments.format,
    ))
}

/// The month that was asked for, or the period.
fn period_of(arguments: &ReportArgs, now_us: i64) -> Result<Period, PeriodError> {
    match arguments.bill.and_then(Month::period) {
        Some(month) => Ok(month),
        None => arguments.period.of(now_us),
    }
}

async fn gather(arguments: &ReportArgs, config: &Config) -> Result<Report, ReportError> {
    let now_us = time::now_us();
    let period = period_of(arguments, now_us)?;
    let by = dimensions(arguments)?;
    let reader = FiguresReader::new(&config.store)?;
    let waiting = Waiting::below(&config.spool.dir)?;
    let mut report = Report {
        period,
        bill: arguments.bill.map(|month| Bill {
            month,
            is_over: month.to_us() <= now_us,
            invoice: None,
        }),
        lines: Vec::new(),
        charges: Vec::new(),
        proof: Proof::default(),
        spool_dir: config.spool.dir.clone(),
        waiting,
        now_us,
        by,
    };
    if arguments.format == Format::Focus {
        let ledger = reader.read_charges(period).await?;
        let costs: Vec<i64> = ledger.charges.iter().map(|row| row.cost_nano_usd).collect();
        let billed = match arguments.actual {
            Some(actual) => bill::share_out(actual, &costs)?,
            None => costs,
        };
        report.prove(&reader, &ledger, config).await?;
        report.charges = ledger.charges.into_iter().zip(billed).collect();
        return Ok(report);
    }
    let figures = reader.read(period, &report.by).await?;
    let ledger = reader.read_ledger(period, &report.by).await?;
    report.prove(&reader, &ledger, config).await?;
    report.lines = lines_of(figures, &ledger, report.proof.is_complete);
    if let (Some(bill), Some(actual)) = (&mut report.bill, arguments.actual) {
        bill.invoice = Some(bill::true_up(&mut report.lines, actual)?);
    }
    Ok(report)
}

/// What to group by, each once.
fn dimensions(arguments: &ReportArgs) -> Result<Vec<Dimension>, ReportError> {
    if arguments.format == Format::Focus && !arguments.by.is_empty() {
        return Err(ReportError::GroupedFocus);
    }
    if arguments.format != Format::Focus && arguments.issuer.is_some() {
        return Err(ReportError::NoIssuer);
    }
    let mut by = Vec::new();
    for dimension in &arguments.by {
        if arguments.bill.is_some() && !dimension.is_in_the_ledger() {
            let found = dimension.name();
            return Err(ReportError::NotBilled { found });
        }
        if !by.contains(dimension) {
            by.push(*dimension);
        }
    }
    if by.is_empty() {
        by.push(Dimension::Team);
    }
    Ok(by)
}

impl Report {
    async fn prove(
        &mut self,
        reader: &FiguresReader,
        ledger: &LedgerFigures,
        config: &Config,
    ) -> Result<(), ReadError> {
        let closed = match self.bill {
            Some(_) => reader.read_closing(self.period).await?,
            None => None,
        };
        self.proof = Proof::of(ledger, closed, self.period, self.now_us, config);
        Ok(())
    }

    /// The columns that this report has, in a table or beside.
    fn columns(&self, in_table: bool) -> impl Iterator<Item = &'static Column> {
        let is_bill = self.bill.is_some();
        let has_invoice = self.bill.is_some_and(|bill| bill.invoice.is_some());
        let some = |column: &Column| self.lines.iter().any(|line| (column.value)(line).magnitude() > 0);
        let shown: Vec<&Column> = COLUMNS
            .iter()
            .filter(|column| match column.shown {
                Shown::Always => true,
                Shown::NotInBills => !is_bill,
                Shown::InTables => in_table,
                Shown::WhereThereIsSome => !in_table || some(column),
                Shown::WithInvoice => has_invoice,
            })
            .collect();
        shown.into_iter()
    }

    /// What a reader must know to read the costs: a sentence a line, and the reconciliation.
    fn explained(&self) -> String {
        let proof = &self.proof;
        let mut sentences: Vec<String> = self.bill.iter().flat_map(|bill| self.said_of(bill)).collect();
        sentences.push(proof.coverage());
        if !proof.upstreams.is_empty() {
            sentences.push(proof.verdict());
        }
        sentences.extend(proof.notes());
        let reconciliation = proof.reconciliation();
        let gap = if reconciliation.is_empty() { "" } else { "\n" };
        sentences.join("\n") + "\n" + gap + &reconciliation
    }

    fn said_of(&self, bill: &Bill) -> Vec<String> {
        let state = match (&self.proof.closed, bill.is_over) {
            (Some(closed), _) => format!(
                "closed at {} by {}",
                time::format(closed.closed_at_us),
                closed.closed_by
            ),
            (None, true) => "over, and not closed: what comes late still changes it".to_owned(),
            (None, false) => format!(
                "UNFINISHED: the month runs until {}",
                time::format(bill.month.to_us())
            ),
        };
        let mut said = vec![format!("Bill of {}: {state}.", bill.month.name())];
        said.extend(bill.invoice.map(|invoice| {
            format!(
                "Invoice: {} USD for costs of {} USD, {:.6} for each dollar, shared out to the last nano-USD.",
                amount::exact(invoice.actual_nano_usd),
                amount::exact(invoice.cost_nano_usd),
                invoice.factor()
            )
        }));
        said
    }

    /// What is not in the figures, as far as this host can tell.
    fn lacks(&self) -> String {
        let dir = self.spool_dir.display();
        let Some(waiting) = &self.waiting else {
            return format!(
                "unknown, for there is no spool in {dir}: ask on the gateway's host, in its directory, or set spool.dir (SPOOL_DIR)"
            );
        };
        let (events, segments) = (self.said(&waiting.events), self.said(&waiting.segments));
        format!(
            "rows that wait in {dir} to be stored: {events}. Segments of requests, of which costs are made: {segments}"
        )
    }

    fn said(&self, backlog: &Backlog) -> String {
        let Backlog {
            rows,
            bytes,
            batches,
            quarantined_rows,
            ..
        } = backlog;
        let oldest = match self.oldest_age_s(backlog) {
            Some(age_s) => format!(", the oldest for {age_s:.1} s"),
            None => String::new(),
        };
        format!("{rows} (batches: {batches}, bytes: {bytes}){oldest}; in quarantine: {quarantined_rows}")
    }

    /// How long the oldest batch has been waiting.
    fn oldest_age_s(&self, backlog: &Backlog) -> Option<f64> {
        let since = backlog.oldest_at_us?;
        Some(self.now_us.saturating_sub(since).max(0) as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::figures::{Cost, Figures, Percentiles};
    use line::Whose;

    /// A report with what is hard to print: no name, a name with separators and quotes, one that would clear the screen, unknown figures.
    pub(super) fn report() -> Report {
        let known = Figures {
            requests: 12,
            ok: 9,
            errors: 1,
            aborted: 1,
            refused: 1,
            prompt_tokens: Some(1_000),
            cached_tokens: Some(0),
            completion_tokens: Some(250),
            reasoning_tokens: None,
            unknown_token_requests: 1,
            charge_nano_usd: 2_000_000_001,
            ttft: Percentiles {
                p50_us: Some(20_040),
                p95_us: Some(1_000_000),
            },
            itl: Percentiles::default(),
            e2e: Percentiles {
                p50_us: Some(600_000),
                p95_us: Some(600_001),
            },
        };
        let cost = Cost {
            nano_usd: 1_000_000_000,
            idle_nano_usd: Some(250_000_000),
            tokens: Some(2_000_000),
        };
        let line = |whose, figures: Option<&Figures>, cost| Line {
            whose,
            figures: figures.cloned(),
            cost,
            bill_nano_usd: Some(1_000_000_007),
            actual_nano_usd: None,
        };
        let group = |team: &str, model: &str| Whose::Group(vec![team.to_owned(), model.to_owned()]);
        let of_nobody = Cost {
            nano_usd: 7,
            idle_nano_usd: None,
            tokens: None,
        };
        Report {
            period: Period::new(1_764_547_200_000_000, 1_764_547_200_000_001).expect("not empty"),
            by: vec![Dimension::Team, Dimension::Model],
            bill: None,
            lines: vec![
                line(group("", "\u{1b}[2J"), Some(&Figures::default()), None),
                line(group("a,\"b\"", "m"), Some(&known), Some(cost)),
                line(Whose::Nobody("__down__".to_owned()), None, Some(of_nobody)),
                line(
                    Whose::Total,
                    Some(&known),
                    Some(Cost {
                        nano_usd: 1_000_000_007,
                        ..cost
                    }),
                ),
            ],
            charges: Vec::new(),
            proof: Proof {
                cost_nano_usd: 1_000_000_007,
                bill_nano_usd: 1_000_000_007,
                ..Proof::default()
            },
            spool_dir: "spool".into(),
            waiting: Some(Waiting {
                events: Backlog {
                    rows: 3,
                    bytes: 99,
                    batches: 1,
                    oldest_at_us: Some(1_000_000),
                    quarantined_rows: 2,
                },
                segments: Backlog {
                    rows: 5,
                    bytes: 70,
                    batches: 1,
                    oldest_at_us: Some(3_000_000),
                    quarantined_rows: 0,
                },
            }),
            now_us: 3_500_000,
        }
    }

    #[test]
    fn what_the_figures_lack_is_said_and_unknown_is_not_nothing() {
        let mut report = report();
        assert_eq!(
            report.lacks(),
            "rows that wait in spool to be stored: 3 (batches: 1, bytes: 99), the oldest for 2.5 s; in quarantine: 2. Segments of \
             requests, of which costs are made: 5 (batches: 1, bytes: 70), the oldest for 0.5 s; in quarantine: 0"
        );
        report.waiting = Some(Waiting::default());
        assert_eq!(
            report.lacks(),
            "rows that wait in spool to be stored: 0 (batches: 0, bytes: 0); in quarantine: 0. Segments of requests, of which costs are made: 0 \
             (batches: 0, bytes: 0); in quarantine: 0"
        );
        report.waiting = None;
        assert!(report.lacks().contains("unknown") && report.lacks().contains("SPOOL_DIR"));
    }
}
