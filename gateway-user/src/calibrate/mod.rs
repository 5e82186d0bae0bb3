//! `vllm-gateway calibrate`: weights of the ledger, fitted to what the engines did.
//!
//! [`fit`] says how. Facts come from ClickHouse: what requests had done in each window, in what time, and, where the upstream tells, in how many steps.
//! Nothing is written: what is found is printed as `ledger.weights` takes it, beside what is in force, with what to think of it.
//!
//! vLLM tells no time of its steps, so that an engine's time is the time in which any request ran. That an engine which is always busy has the same
//! time in every window is no obstacle: it did different things in it.

pub mod fit;
mod solve;
mod text;

use std::collections::BTreeMap;

use clap::{Args, ValueEnum};

pub use self::fit::{Estimate, Fit, Observation, Part, Quality, TooLittle, Trust};
use crate::command::period::{PeriodArgs, PeriodError};
use crate::command::{Answer, ConfigSource, Failure, exit, time};
use crate::config::{Config, Env, LedgerConfig};
use crate::store::figures::{FiguresReader, Period, ReadError, WindowWork};

/// No upstream had enough to fit anything to.
pub const EXIT_TOO_LITTLE: u8 = 1;

/// Windows that are taken together: a minute. Scrapes are not in step with windows, so that a single window has steps of its neighbours.
const WINDOWS_TOGETHER: usize = 4;

const AFTER_HELP: &str = "\
For each upstream: what a prompt token, a generated token, a token in the KV cache for a second, and a step of the engine take of its time, by non-negative \
least squares over the minutes in which it ran. Fitted on every other minute, tested on the rest. A step's own time is shared out by presence: its part \
of all time suggests theta.

Exit codes: 0 at least one upstream was fitted; 1 none had enough to fit; 2 the arguments are wrong; 65 the database is not there, or of another version; \
69 ClickHouse does not answer; 77 ClickHouse refuses the user or password; 78 the config is wrong, or keeps no rows";

/// What to fit to, and how to print it.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CalibrateArgs {
    #[command(flatten)]
    source: ConfigSource,
    #[command(flatten)]
    period: PeriodArgs,
    /// How to print it.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// One object.
    Json,
}

/// Why nothing could be read.
#[derive(Debug, thiserror::Error)]
enum CalibrateError {
    #[error(transparent)]
    Period(#[from] PeriodError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// All that is printed.
#[derive(Debug)]
struct Calibration {
    period: Period,
    in_force: LedgerConfig,
    by_upstream: BTreeMap<String, Result<Fit, TooLittle>>,
}

impl From<CalibrateError> for Failure {
    fn from(error: CalibrateError) -> Failure {
        let code = match &error {
            CalibrateError::Period(_) => exit::USAGE,
            CalibrateError::Read(error) => exit::of_read(error),
        };
        Failure::new(error, code)
    }
}

/// The fits, as they are printed.
///
/// # Errors
/// What stands in their way.
pub async fn run(arguments: &CalibrateArgs, env: Env<'_>) -> Result<Answer, Failure> {
    let config = arguments.source.load(env)?;
    let calibration = calibrate(arguments, config).await?;
    let text = match arguments.format {
        Format::Text => text::text(&calibration),
        Format::Json => text::json(&calibration),
    };
    let is_fitted = calibration.by_upstream.values().any(Result::is_ok);
    let code = if is_fitted { 0 } else { EXIT_TOO_LITTLE };
    Ok(Answer {
        code,
        ..Answer::of(text)
    })
}

async fn calibrate(arguments: &CalibrateArgs, config: Config) -> Result<Calibration, CalibrateError> {
    let period = arguments.period.of(time::now_us())?;
    let work = FiguresReader::new(&config.store)?.work(period).await?;
    let mut by_upstream: BTreeMap<String, Result<Fit, TooLittle>> = config
        .upstreams
        .iter()
        .map(|upstream| {
            (
                upstream.name.as_str().to_owned(),
                Err(TooLittle::Windows { found: 0 }),
            )
        })
        .collect();
    for (upstream, windows) in work {
        let observations = observe(&windows);
        by_upstream.insert(upstream, Fit::of(&observations, &config.ledger.weights));
    }
    Ok(Calibration {
        period,
        in_force: config.ledger,
        by_upstream,
    })
}

/// Windows, which are in order of time, taken together by the minute; what is left at the end of a run of them is left out.
pub fn observe(windows: &[WindowWork]) -> Vec<Observation> {
    let follows = |one: &WindowWork, other: &WindowWork| one.window.next() == other.window;
    let runs = windows.chunk_by(follows);
    let minutes = runs.flat_map(|run| run.chunks_exact(WINDOWS_TOGETHER));
    minutes.map(together).collect()
}

fn together(windows: &[WindowWork]) -> Observation {
    let sum = |of: fn(&WindowWork) -> f64| windows.iter().map(of).sum();
    Observation {
        busy_s: sum(|window| window.busy_us as f64 / 1e6),
        prompt_tokens: sum(|window| window.prompt_tokens as f64),
        completion_tokens: sum(|window| window.completion_tokens as f64),
        kv_token_seconds: sum(|window| window.kv_token_seconds),
        steps: windows.iter().map(|window| window.steps).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Micros, Window};

    #[test]
    fn whole_minutes_are_taken_together_and_gaps_are_not_bridged() {
        let work = |index: u64| WindowWork {
            window: Window::at(Micros((100 + index) * Window::LEN_US)),
            busy_us: 1_000_000,
            prompt_tokens: index,
            completion_tokens: 1,
            kv_token_seconds: 2.0,
            steps: (index != 12).then_some(3.0),
        };
        let windows: Vec<WindowWork> = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13].map(work).to_vec();
        let minutes = observe(&windows);
        assert_eq!(minutes.len(), 2, "windows 4 and 5 are no minute");
        let first = Observation {
            busy_s: 4.0,
            prompt_tokens: 6.0,
            completion_tokens: 4.0,
            kv_token_seconds: 8.0,
            steps: Some(12.0),
        };
        assert_eq!(minutes[0], first);
        assert_eq!((minutes[1].prompt_tokens, minutes[1].steps), (46.0, None));
    }
}
