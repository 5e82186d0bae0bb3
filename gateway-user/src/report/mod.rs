//! `vllm-gateway report`: what each team, project, user or model used, and how it was served, in a period.
//!
//! Figures come from ClickHouse ([`store::figures`](crate::store::figures) says what each of them means), deduplicated; a request counts in the
//! period in which it ended. With them comes what they lack: rows that still wait in this host's spool. That is looked at first, so that a row on
//! its way shows in both places rather than in none. Left out: requests that still run, and spools of gateways on other hosts.
//!
//! All three formats print the same columns.

mod column;
mod csv;
mod json;
pub(crate) mod period;
mod reconciliation;
mod table;
mod time;

use crate::cli::ConfigSource;
use crate::config::{Config, EXIT_CONFIG, Env};
use crate::store::StoreError;
use crate::store::figures::{Dimension, FiguresReader, GroupedFigures, Period, ReadError};
use crate::store::{Backlog, Waiting};
use clap::{Args, ValueEnum};
use period::{Moment, PeriodError};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

/// The arguments are wrong; what clap itself exits with then.
pub const EXIT_USAGE: u8 = 2;
/// The database is not there, or not one that this program reads (`EX_DATAERR` of sysexits).
pub const EXIT_DATABASE: u8 = 65;
/// ClickHouse does not answer, or not this question (`EX_UNAVAILABLE`).
pub const EXIT_UNAVAILABLE: u8 = 69;
/// The spool cannot be read (`EX_IOERR`).
pub const EXIT_SPOOL: u8 = 74;
/// ClickHouse refuses the user (`EX_NOPERM`).
pub const EXIT_REFUSED: u8 = 77;

/// What is said below the options.
const AFTER_HELP: &str = "\
A request counts in the period in which it ended, and periods end before --to. TTFT is the time to the first token, ITL a request's mean gap between \
chunks with content, E2E the duration of completed requests. Tokens are sums of what is known; requests with unknown tokens are counted apart.

Exit codes: 0 a report was printed; 2 the arguments are wrong; 65 the database is not there, or of another version; 69 ClickHouse does not answer; \
74 the spool cannot be read; 77 ClickHouse refuses the user or password; 78 the config is wrong, or keeps no rows";

/// What to report, and how.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ReportArgs {
    #[command(flatten)]
    source: ConfigSource,
    /// The time up to now, such as 15m or 24h [default: 24h].
    #[arg(long, value_name = "TIME", value_parser = crate::config::units::parse_duration, conflicts_with = "from")]
    since: Option<Duration>,
    /// First moment: a date, which begins at 00:00 UTC, or a time in RFC 3339 (2026-11-24T08:00:00Z).
    #[arg(long, value_name = "TIME", value_parser = Moment::parse)]
    from: Option<Moment>,
    /// First moment that is not in it any more [default: now].
    #[arg(long, value_name = "TIME", value_parser = Moment::parse, requires = "from")]
    to: Option<Moment>,
    /// What to group by; several, separated by commas, make a line for each combination.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "team")]
    by: Vec<Dimension>,
    /// How to print it.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Instead: what the engines counted against what requests are known to have used, for each upstream, and where a gap may come from.
    #[arg(long, conflicts_with = "by")]
    reconciliation: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// RFC 4180, with a line of names; what the figures lack goes to standard error.
    Csv,
    /// One object.
    Json,
}

/// All that is printed.
#[derive(Debug)]
struct Report {
    period: Period,
    by: Vec<Dimension>,
    figures: GroupedFigures,
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
}

impl ReportError {
    fn exit_code(&self) -> u8 {
        match self {
            ReportError::Period(_) => EXIT_USAGE,
            ReportError::Spool(_) => EXIT_SPOOL,
            ReportError::Read(error) => match error {
                ReadError::NoStore => EXIT_CONFIG,
                ReadError::NoAnswer { .. } | ReadError::Failed { .. } => EXIT_UNAVAILABLE,
                ReadError::Refused { .. } => EXIT_REFUSED,
                ReadError::NoDatabase { .. } | ReadError::OtherSchema { .. } => EXIT_DATABASE,
            },
        }
    }
}

/// Prints the report to `out`, and what stands in its way to `err`. Returns the exit code.
///
/// # Errors
/// When the output cannot be written. A reader that has seen enough (`| head`) is none.
pub async fn run(
    arguments: &ReportArgs,
    env: Env<'_>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<u8> {
    let config = match arguments.source.load(env) {
        Ok(config) => config,
        Err(error) => {
            writeln!(err, "{error}")?;
            return Ok(EXIT_CONFIG);
        }
    };
    if arguments.reconciliation {
        let text = match reconcile(arguments, &config).await {
            Ok(text) => text,
            Err(error) => {
                writeln!(err, "{error}")?;
                return Ok(error.exit_code());
            }
        };
        return write(out, &text);
    }
    let report = match gather(arguments, &config).await {
        Ok(report) => report,
        Err(error) => {
            writeln!(err, "{error}")?;
            return Ok(error.exit_code());
        }
    };
    let text = match arguments.format {
        Format::Table => table::print(&report),
        Format::Csv => {
            writeln!(err, "{}", report.lacks())?;
            csv::print(&report)
        }
        Format::Json => json::print(&report),
    };
    write(out, &text)
}

/// What `--reconciliation` prints.
async fn reconcile(arguments: &ReportArgs, config: &Config) -> Result<String, ReportError> {
    let period = period::of(arguments.since, arguments.from, arguments.to, time::now_us())?;
    let found = FiguresReader::new(&config.store)?.reconciliation(period).await?;
    Ok(reconciliation::print(
        period,
        &found,
        &config.reconciliation,
        arguments.format,
    ))
}

fn write(out: &mut dyn Write, text: &str) -> io::Result<u8> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(0),
    }
}

async fn gather(arguments: &ReportArgs, config: &Config) -> Result<Report, ReportError> {
    let now_us = time::now_us();
    let period = period::of(arguments.since, arguments.from, arguments.to, now_us)?;
    let mut by = Vec::new();
    for dimension in &arguments.by {
        if !by.contains(dimension) {
            by.push(*dimension);
        }
    }
    let reader = FiguresReader::new(&config.store)?;
    let waiting = Waiting::below(&config.spool.dir)?;
    let figures = reader.read(period, &by).await?;
    Ok(Report {
        period,
        by,
        figures,
        spool_dir: config.spool.dir.clone(),
        waiting,
        now_us,
    })
}

impl Report {
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
    use crate::store::figures::{Figures, Group, Percentiles};

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
        let group = |team: &str, model: &str, figures: &Figures| Group {
            keys: vec![team.to_owned(), model.to_owned()],
            figures: figures.clone(),
        };
        Report {
            period: Period::new(1_764_547_200_000_000, 1_764_547_200_000_001).expect("not empty"),
            by: vec![Dimension::Team, Dimension::Model],
            figures: GroupedFigures {
                groups: vec![
                    group("", "\u{1b}[2J", &Figures::default()),
                    group("a,\"b\"", "m", &known),
                ],
                total: known.clone(),
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
