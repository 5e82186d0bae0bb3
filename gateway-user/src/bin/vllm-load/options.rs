//! The command line, and what it means.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use clap::{ArgAction, ArgGroup, Parser};

use crate::mix::{Endpoint, EndpointMix, Lengths, Weights, parse_fraction};
use crate::plan::Plan;
use crate::progress::Goal;
use crate::run::Pace;
use crate::target::{ExtraHeader, ServerUrl, TargetOptions};

/// Loads a server that speaks the OpenAI API, and says what its clients would have seen.
#[derive(Debug, Parser)]
#[command(name = "vllm-load", version, max_term_width = 110)]
#[command(group = ArgGroup::new("end").required(true).multiple(true).args(["requests", "duration"]))]
pub struct Options {
    /// The server, as `http://HOST[:PORT][/BASE]`; `/v1/…` is added.
    #[arg(long, value_name = "URL")]
    pub url: ServerUrl,
    /// The model to ask for.
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// The model to ask for embeddings [default: that of --model].
    #[arg(long, value_name = "NAME")]
    pub embeddings_model: Option<String>,

    /// Stop after this many requests.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,
    /// Start no request after this time, such as 500ms, 20s, 2m; those under way may end.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// Closed loop: this many requests at a time.
    #[arg(long, value_name = "C", default_value_t = 8, value_parser = parse_count, conflicts_with = "rate")]
    pub concurrency: usize,
    /// Open loop: this many requests a second, arriving at random (Poisson).
    #[arg(long, value_name = "R", value_parser = parse_rate)]
    pub rate: Option<f64>,
    /// Open loop: how many requests may be under way; further ones wait, and their latency counts it.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = parse_count)]
    pub max_in_flight: usize,
    /// Threads that send.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_count)]
    pub threads: usize,
    /// What is sent depends on this and on nothing else.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Teams, named team-1 to team-N.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub teams: u32,
    /// How often each team asks, such as 5,3,1 [default: all as often].
    #[arg(long, value_name = "W,…", value_delimiter = ',')]
    pub team_weights: Vec<f64>,
    /// Projects, named project-1 to project-N; 0 sends none.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub projects: u32,
    /// Users, named user-1 to user-N; 0 sends none.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub users: u32,
    /// How often each endpoint is called: chat, completions, embeddings, responses, messages.
    #[arg(
        long,
        value_name = "NAME=W,…",
        default_value = "chat=6,completions=3,embeddings=1"
    )]
    pub endpoints: EndpointMix,

    /// The share of all requests that is streamed.
    #[arg(long, value_name = "F", default_value_t = 0.33, value_parser = parse_fraction)]
    pub stream_fraction: f64,
    /// The share that the client gives up: half of them streams, after some chunks; half unstreamed, after a time.
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = parse_fraction)]
    pub abort_fraction: f64,
    /// After how many milliseconds an unstreamed request is given up: N or MIN..MAX.
    #[arg(long, value_name = "MS", default_value = "1..50", value_parser = parse_millis)]
    pub abort_after_ms: RangeInclusive<u32>,
    /// The share that asks the simulator for an error (X-Sim-Fault: status=500).
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = parse_fraction)]
    pub fail_fraction: f64,
    /// The share of streams that asks for usage (stream_options.include_usage).
    #[arg(long, value_name = "F", default_value_t = 0.5, value_parser = parse_fraction)]
    pub include_usage_fraction: f64,
    /// Prompt lengths in tokens of about four characters: N, MIN..MAX, or lognormal:MEDIAN,SIGMA.
    #[arg(long, value_name = "DIST", default_value = "20..200")]
    pub prompt_tokens: Lengths,
    /// Output lengths in tokens, likewise.
    #[arg(long, value_name = "DIST", default_value = "8..64")]
    pub output_tokens: Lengths,
    /// The same output length for all: short for --output-tokens N.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "output_tokens")]
    pub max_tokens: Option<u32>,
    /// Ask the model to go on until the output length is reached.
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true",
          action = ArgAction::Set)]
    pub ignore_eos: bool,

    /// How long a request may take.
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = parse_duration)]
    pub timeout: Duration,
    /// A header for every request; it replaces a generated one of the same name. Repeatable.
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub headers: Vec<ExtraHeader>,
    /// Write the summary here as JSON; `-` is stdout, in place of the table.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write one JSON line a request here.
    #[arg(long, value_name = "FILE")]
    pub records: Option<PathBuf>,
    /// Show no progress.
    #[arg(long)]
    pub no_progress: bool,
}

impl Options {
    /// What is sent.
    ///
    /// # Errors
    /// When options contradict each other.
    pub fn plan(&self) -> Result<Plan> {
        let plan = Plan {
            seed: self.seed,
            teams: self.team_weights()?,
            projects: self.projects,
            users: self.users,
            endpoints: self.endpoints.clone(),
            stream_fraction: self.stream_fraction,
            abort_fraction: self.abort_fraction,
            fail_fraction: self.fail_fraction,
            include_usage_fraction: self.include_usage_fraction,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self
                .max_tokens
                .map_or(self.output_tokens, |n| Lengths::Uniform { min: n, max: n }),
            abort_after_ms: self.abort_after_ms.clone(),
        };
        plan.validate()?;
        Ok(plan)
    }

    fn team_weights(&self) -> Result<Weights> {
        if self.team_weights.is_empty() {
            return Ok(Weights::equal(self.teams));
        }
        ensure!(
            self.team_weights.len() == self.teams as usize,
            "--team-weights has {} weights, but there are {} teams: give as many, or set --teams",
            self.team_weights.len(),
            self.teams,
        );
        Weights::new(&self.team_weights)
            .ok_or_else(|| anyhow!("--team-weights must not be negative, and one must be above 0"))
    }

    /// Where it goes.
    pub fn target(&self) -> TargetOptions {
        let embeddings_model = self
            .embeddings_model
            .clone()
            .filter(|_| self.endpoints.uses(Endpoint::Embeddings));
        TargetOptions {
            url: self.url.clone(),
            seed: self.seed,
            model: self.model.clone(),
            embeddings_model: embeddings_model.unwrap_or_else(|| self.model.clone()),
            extra: self.headers.clone(),
            ignore_eos: self.ignore_eos,
        }
    }

    /// When it is sent.
    pub fn pace(&self) -> Pace {
        match self.rate {
            Some(rate_per_s) => Pace::Open {
                rate_per_s,
                max_in_flight: self.max_in_flight,
            },
            None => Pace::Closed {
                concurrency: self.concurrency,
            },
        }
    }

    /// When it is over.
    pub fn goal(&self) -> Goal {
        Goal {
            requests: self.requests,
            duration: self.duration,
        }
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds_a_unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        unit => {
            return Err(format!(
                "expected a time in ms, s, m or h, found the unit `{unit}`"
            ));
        }
    };
    let amount = digits.parse::<f64>().ok().filter(|amount| *amount > 0.0);
    amount
        .and_then(|amount| Duration::try_from_secs_f64(amount * seconds_a_unit).ok())
        // Beyond a year the clock's arithmetic could overflow, and no load test is as long.
        .filter(|duration| *duration <= Duration::from_secs(365 * 86_400))
        .ok_or_else(|| format!("expected a time above zero such as 500ms, 20s or 2m, found `{text}`"))
}

/// Workers, requests under way, or threads: more than this is a slip of the finger.
const COUNT_MAX: usize = 100_000;

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=COUNT_MAX).contains(&count) => Ok(count),
        _ => Err(format!("expected a number from 1 to {COUNT_MAX}, found `{text}`")),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 1e6 => Ok(rate),
        _ => Err(format!(
            "expected requests a second, above 0 and up to 1000000, found `{text}`"
        )),
    }
}

fn parse_millis(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (min, max) = text.split_once("..").unwrap_or((text, text));
    match (min.parse::<u32>(), max.parse::<u32>()) {
        (Ok(min), Ok(max)) if min <= max => Ok(min..=max),
        _ => Err(format!("expected N or MIN..MAX in milliseconds, found `{text}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(more: &[&str]) -> Result<Options, clap::Error> {
        let base = ["vllm-load", "--url", "http://127.0.0.1:1", "--model", "m"];
        Options::try_parse_from(base.iter().chain(more))
    }

    #[test]
    fn the_definition_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let options = parse(&["--requests", "10"]).expect("options");
        assert_eq!(
            (options.teams, options.concurrency, options.stream_fraction),
            (5, 8, 0.33)
        );
        assert!(options.ignore_eos && options.abort_fraction == 0.0);
        assert!(matches!(options.pace(), Pace::Closed { concurrency: 8 }));
        options.plan().expect("a sound plan");
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(parse(&[]).is_err(), "a run must have an end");
        assert!(parse(&["--requests", "1", "--rate", "5", "--concurrency", "2"]).is_err());
        assert!(parse(&["--requests", "1", "--max-tokens", "5", "--output-tokens", "2"]).is_err());
        let options = parse(&["--requests", "1", "--team-weights", "5,3"]).expect("options");
        assert!(
            options
                .plan()
                .expect_err("five teams")
                .to_string()
                .contains("2 weights")
        );
        let options = parse(&["--requests", "1", "--stream-fraction", "1"]).expect("options");
        assert!(
            options
                .plan()
                .expect_err("embeddings")
                .to_string()
                .contains("embeddings")
        );
    }

    #[test]
    fn values_reach_the_plan() {
        let more = [
            "--duration",
            "2m",
            "--rate",
            "5",
            "--teams",
            "2",
            "--team-weights",
            "3,1",
            "--max-tokens",
            "7",
        ];
        let options = parse(&[&more[..], &["--ignore-eos", "false"]].concat()).expect("options");
        let plan = options.plan().expect("a plan");
        assert_eq!(options.goal().duration, Some(Duration::from_secs(120)));
        assert_eq!(
            (plan.teams.share(0), plan.output_tokens),
            (0.75, Lengths::Uniform { min: 7, max: 7 })
        );
        assert!(!options.target().ignore_eos);
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1.5h"), Ok(Duration::from_secs(5400)));
        for wrong in ["", "0s", "-1s", "5d", "inf", "NaN", "1e300h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
