//! Whether the ledger's shares are those that an engine's time is really taken in, on an engine in virtual time: exact, and the same each time.

#[allow(dead_code, reason = "the bench uses the rest")]
mod trials;

use trials::Engine;
use trials::books::parts;
use trials::books::{fit, misallocated, segments, shares, told};
use trials::mix::{Mix, Team};
use trials::queue;
use trials::truth::Trial;
use vllm_gateway::calibrate::{Part, Trust};
use vllm_gateway::ledger::{Wait, Weights};

const SEED: u64 = 7;

fn mix(name: &str) -> Mix {
    Mix::all()
        .into_iter()
        .find(|mix| mix.name == name)
        .expect("a mix of that name")
}

#[test]
fn measured_sums_are_what_the_engine_was_busy() {
    let (engine, mix) = (Engine::h100(), mix("prefill-heavy and decode-heavy"));
    let trial = Trial {
        engine: &engine,
        mix: &mix,
        seed: SEED,
        seconds: 60,
        factor: 1.0,
    };
    let (truth, busy_s) = (trial.truth(), trial.run().busy_us / 1e6);
    for sums in [&truth.in_any_order, &truth.by_step] {
        assert!(
            (sums.iter().sum::<f64>() / busy_s - 1.0).abs() < 1e-9,
            "{truth:?}, busy for {busy_s} s"
        );
    }
    assert!(
        truth.left_out.iter().sum::<f64>() < busy_s,
        "teams share steps: {truth:?}"
    );
}

/// The fit is of another load than the one that is paid for.
#[test]
fn calibrated_weights_are_those_of_the_engine_and_share_its_time_better_than_presence_or_tokens_do() {
    let (engine, mix) = (Engine::h100(), mix("prefill-heavy and chat"));
    let trial = Trial {
        engine: &engine,
        mix: &mix,
        seed: SEED,
        seconds: 300,
        factor: 1.0,
    };
    let fitted = Trial {
        seed: SEED + 1,
        seconds: 3_600,
        ..trial
    };
    let fit = fit(&fitted.run(), &Weights::ASSUMED).expect("an hour is enough");
    let (prompt, step) = (fit.estimate(Part::Prompt), fit.estimate(Part::Step));
    // Scrapes are not in step with windows, so that some of a minute's steps are its neighbours'.
    assert!(
        (prompt.seconds * 1e6 / engine.cost.prefill_us_per_token - 1.0).abs() < 0.05,
        "{fit:?}"
    );
    assert!(
        (step.seconds * 1e6 / engine.cost.base_us - 1.0).abs() < 0.1,
        "{fit:?}"
    );
    assert_eq!((prompt.trust(), step.trust()), (Trust::Good, Trust::Good));
    assert!(fit.unseen.relative_error < fit.in_force.relative_error, "{fit:?}");

    let right = parts(&trial.truth().by_step);
    let windows = segments(&trial.run(), &told);
    let wrong = |theta, weights| misallocated(&shares(&windows, 2, |_| theta, weights), &right);
    let calibrated = wrong(fit.theta.expect("steps are known"), fit.weights());
    assert!(calibrated < wrong(0.5, Weights::ASSUMED), "{calibrated}");
    assert!(calibrated < wrong(0.0, Weights::ASSUMED), "{calibrated}");
}

/// An engine has twice the work that it can do, so that requests wait for much longer than they run, and those of one team run for a fraction of the time of
/// the other's: were waits paid for, it would pay several times too much.
///
/// With the true starts nothing of a wait is in a cost. An estimated start is off by what is not known of a request: how much longer or shorter its prefill
/// and its tokens took than they do on average. That is less than a run, whatever the wait was, and falls on both sides. A fiftieth of the cost is what
/// is left of that, and a start is off by less than a twentieth of a wait.
#[test]
fn who_waits_pays_nothing_for_waiting() {
    let mut engine = Engine::h100();
    engine.limits.max_num_seqs = 32;
    for streamed in [1.0, 0.0] {
        let mut mix = mix("prefill-heavy and decode-heavy");
        mix.teams
            .iter_mut()
            .for_each(|team: &mut Team| team.streamed = streamed);
        let trial = Trial {
            engine: &engine,
            mix: &mix,
            seed: SEED,
            seconds: 120,
            factor: queue::twice_what_it_can_bear(&engine, &mix, SEED),
        };
        let ran = trial.run();
        let pay = |waits: &[Wait]| {
            shares(
                &segments(&ran, &|index, _| waits[index]),
                2,
                |_| 0.5,
                Weights::ASSUMED,
            )
        };
        let right = shares(&segments(&ran, &told), 2, |_| 0.5, Weights::ASSUMED);
        let estimated = queue::waits(&ran);
        let wrong = misallocated(&pay(&estimated), &right);
        let as_runs = misallocated(&pay(&vec![Wait::default(); ran.requests.len()]), &right);
        assert!(as_runs > 0.1, "the trial has no queue to speak of: {as_runs}");
        assert!(
            wrong < 0.02,
            "streamed {streamed}: {wrong}, and {as_runs} with waits as runs"
        );
        let off = queue::errors_s(&ran, &estimated);
        let median_s = off[off.len() / 2];
        assert!(
            median_s < queue::mean_wait_s(&ran) / 20.0,
            "streamed {streamed}: {median_s} s"
        );
    }
}
