//! How good the ledger's shares are: what `cargo xtask bench allocation` prints.
//!
//! An engine runs in virtual time under loads of several teams, and what each team took of it is measured; beside it stands what the ledger has each team
//! pay. Then the same for an engine with a long queue, whose waits the gateway has to estimate. Everything follows from the seed.

#[path = "../tests/trials/mod.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod trials;

use clap::Parser;
use trials::Engine;
use trials::books::{fit, misallocated, parts, segments, shares, told};
use trials::mix::Mix;
use trials::queue;
use trials::truth::Trial;
use vllm_gateway::calibrate::{Fit, Part};
use vllm_gateway::ledger::{Wait, Weights};

/// Seconds of the load that weights are fitted to, which is another one than they are tried on.
const FITTED_S: u64 = 3_600;

#[derive(Parser)]
struct Options {
    /// What all loads follow from.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Seconds of each load, in virtual time.
    #[arg(long, default_value_t = 900)]
    seconds: u64,
}

fn main() {
    let options = Options::parse();
    let engine = Engine::h100();
    println!(
        "Costs: parts of what all teams pay. Wrong: the part of all cost that is with another team than measured."
    );
    for mix in Mix::all() {
        for factor in [0.25, 1.0, 2.0] {
            let trial = Trial {
                engine: &engine,
                mix: &mix,
                seed: options.seed,
                seconds: options.seconds,
                factor,
            };
            compare(&trial);
        }
    }
    let mut small = engine;
    small.limits.max_num_seqs = 64;
    println!(
        "\nA queue: at most 64 run. Starts: how far estimated starts of runs are off. Wrong: against costs by the true starts."
    );
    for mix in Mix::all() {
        for streamed in [1.0, 0.0] {
            wait_in_line(&small, &mix, streamed, &options);
        }
    }
}

fn compare(trial: &Trial<'_>) {
    let truth = trial.truth();
    let ran = trial.run();
    println!(
        "\n{}, {} times its rates: busy for {:.0} of {} s",
        trial.mix.name,
        trial.factor,
        ran.busy_us / 1e6,
        trial.seconds
    );
    let [left_out, in_any_order, by_step] =
        [truth.left_out, truth.in_any_order, truth.by_step].map(|truth| parts(&truth));
    let head: String = trial
        .mix
        .teams
        .iter()
        .map(|team| format!("{:>9}", team.name))
        .collect();
    println!("  {:<34}{head}   wrong: left out  in any order  by step", "");
    let line = |name: &str, shares: &[f64]| {
        let wrong = |right: &[f64]| percent(misallocated(shares, right));
        println!(
            "  {name:<34}{}            {:>8}      {:>8} {:>8}",
            shares
                .iter()
                .map(|share| format!("{:>9}", percent(*share)))
                .collect::<String>(),
            wrong(&left_out),
            wrong(&in_any_order),
            wrong(&by_step)
        );
    };
    line("measured, left out", &left_out);
    line("measured, in any order", &in_any_order);
    line("measured, by step", &by_step);
    let windows = segments(&ran, &told);
    let pay = |theta: f64, weights| shares(&windows, trial.mix.teams.len(), |_| theta, weights);
    line("theta 0", &pay(0.0, Weights::ASSUMED));
    line("defaults (theta 0.5)", &pay(0.5, Weights::ASSUMED));
    line("theta 1", &pay(1.0, Weights::ASSUMED));
    let other = Trial {
        seed: trial.seed + 1,
        seconds: FITTED_S,
        ..*trial
    };
    match fit(&other.run(), &Weights::ASSUMED) {
        Ok(fit) => {
            let theta = fit.theta.unwrap_or(0.5);
            let name = if fit.theta.is_some() {
                "calibrated"
            } else {
                "calibrated but for theta"
            };
            line(&format!("{name} (theta {theta:.2})"), &pay(theta, fit.weights()));
            describe(&fit);
        }
        Err(error) => println!("  {error}"),
    }
}

fn describe(fit: &Fit) {
    let found =
        [Part::Prompt, Part::Completion, Part::Kv, Part::Step].map(|part| fit.estimate(part).seconds * 1e6);
    let weights = fit.weights();
    println!(
        "  fitted: {:.1} µs a prompt token, {:.1} a completion token, {:.2} a KV token-second, {:.0} a step; weights {} {} {}; error {} (defaults: {})",
        found[0],
        found[1],
        found[2],
        found[3],
        weights.prompt,
        weights.completion,
        weights.kv,
        percent(fit.unseen.relative_error),
        percent(fit.in_force.relative_error)
    );
}

fn wait_in_line(engine: &Engine, mix: &Mix, streamed: f64, options: &Options) {
    let mut mix = mix.clone();
    mix.teams.iter_mut().for_each(|team| team.streamed = streamed);
    let factor = queue::twice_what_it_can_bear(engine, &mix, options.seed);
    let trial = Trial {
        engine,
        mix: &mix,
        seed: options.seed,
        seconds: options.seconds / 3,
        factor,
    };
    let ran = trial.run();
    let pay = |waits: &[Wait]| {
        let of = |index: usize, _: &trials::Lived| waits[index];
        shares(&segments(&ran, &of), mix.teams.len(), |_| 0.5, Weights::ASSUMED)
    };
    let right = shares(&segments(&ran, &told), mix.teams.len(), |_| 0.5, Weights::ASSUMED);
    let kind = if streamed > 0.5 {
        "streamed"
    } else {
        "not streamed"
    };
    println!(
        "\n{}, {kind}, {factor:.1} times its rates: busy for {:.0} s, mean wait {:.1} s",
        mix.name,
        ran.busy_us / 1e6,
        queue::mean_wait_s(&ran)
    );
    let unknown = vec![Wait::default(); ran.requests.len()];
    for (name, waits) in [("taken for runs", unknown), ("estimated", queue::waits(&ran))] {
        let off = queue::errors_s(&ran, &waits);
        let at = |part: f64| off[(off.len() as f64 * part) as usize];
        let mean = off.iter().sum::<f64>() / off.len() as f64;
        println!(
            "  waits {name:<16} starts: mean {mean:>8.3} s, median {:>8.3} s, p95 {:>8.3} s; wrong {}",
            at(0.5),
            at(0.95),
            percent(misallocated(&pay(&waits), &right))
        );
    }
}

fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}
