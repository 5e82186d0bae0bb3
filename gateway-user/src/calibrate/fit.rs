//! What each kind of work takes of an engine's time, by least squares over windows in which it did different things.
//!
//! The time in which an engine ran is taken to be `a·uncached prompt tokens + b·completion tokens + c·KV token-seconds + d·steps`. The last part is what
//! each step of the engine takes whatever is in it (it reads all of the model's weights): nobody's in particular, and needed as soon as anybody runs.
//! So it is no work, and has no weight: it is what the ledger shares out by presence. Its part of the time suggests `θ = 1 − d·steps / time`. Where
//! steps are not known it goes into the weights of what it came with, and nothing can be said of θ.
//!
//! A fit is judged by windows that it has not seen: fitted on every other window, tested on the rest.

use super::solve::{Row, Solution, UNKNOWNS, product, solve};
use crate::ledger::{Millionths, Weights};

/// Fewer minutes say nothing: five for each unknown, in each half.
pub const MINUTES_MIN: usize = 40;

/// The standard error, as a part of the weight, beyond which a weight is not to be trusted by itself.
const ERROR_MAX: f64 = 0.25;

/// How many times the variance may be larger for a part's likeness to others before that is said to be the reason. 10 is what is usual.
const INFLATION_MAX: f64 = 10.0;

/// What an engine did in a minute, or in any other stretch of time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observation {
    /// Seconds in which any request ran.
    pub busy_s: f64,
    /// Prompt tokens that did not come out of the prefix cache.
    pub prompt_tokens: f64,
    /// Tokens generated.
    pub completion_tokens: f64,
    /// Tokens in the KV cache, times seconds.
    pub kv_token_seconds: f64,
    /// Steps of the engine; `None` where they are not known.
    pub steps: Option<f64>,
}

/// Something that has a cost; also its place among the unknowns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A prompt token.
    Prompt,
    /// A generated token.
    Completion,
    /// A token in the KV cache for a second.
    Kv,
    /// A step.
    Step,
}

/// What was found of one part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Seconds of the engine for each.
    pub seconds: f64,
    /// Standard error of that.
    pub error_s: f64,
    /// By how many times its variance is larger because it comes and goes with other parts; 1 at best.
    pub inflation: f64,
}

/// What to think of an estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Its standard error is small.
    Good,
    /// Its standard error is large, since it comes and goes with other parts: the sum of them may be right while each is not.
    Entangled,
    /// Its standard error is large, or nothing of it was seen.
    Poor,
}

impl Estimate {
    /// Whether it can be relied on by itself.
    pub fn trust(&self) -> Trust {
        let is_good = self.seconds > 0.0 && self.error_s <= ERROR_MAX * self.seconds;
        match self.inflation > INFLATION_MAX {
            _ if is_good => Trust::Good,
            true => Trust::Entangled,
            false => Trust::Poor,
        }
    }
}

/// How well something explains the windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// Sum of absolute errors, by the sum of times.
    pub relative_error: f64,
    /// The part of the windows' differences in time that is explained; `None` when they do not differ: an engine that is always busy has the same
    /// time in each window, whatever it does.
    pub r_squared: Option<f64>,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// How many windows it was made of.
    pub windows: usize,
    /// Those, of all that were there, whose steps are known; the fit is made of them alone when there are enough.
    pub windows_with_steps: usize,
    /// The estimates, by [`Part`]; that of a step is 0 where steps are not known.
    estimates: [Estimate; UNKNOWNS],
    /// θ, where the time of steps is known and to be trusted.
    pub theta: Option<f64>,
    /// On windows that it was not made of: both halves, each by the fit of the other.
    pub unseen: Quality,
    /// On the same windows, of the weights that it is compared with, stretched to fit these windows best.
    pub in_force: Quality,
}

/// Why there is no fit.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TooLittle {
    /// There is not enough.
    #[error(
        "expected at least {MINUTES_MIN} whole minutes in which requests ran, found {found}: ask for a longer period"
    )]
    Windows {
        /// How many minutes there are.
        found: usize,
    },
    /// Their mixes are too alike.
    #[error(
        "expected minutes that differ in what was done, found that in all of them {what}: ask for a period with other traffic in it, or send some of one \
         kind alone for ten minutes (long prompts with short answers, then short prompts with long ones)"
    )]
    Alike {
        /// What is alike.
        what: &'static str,
    },
}

impl Observation {
    fn row(&self, with_steps: bool) -> Row {
        let steps = self.steps.filter(|_| with_steps).unwrap_or(0.0);
        (
            [
                self.prompt_tokens,
                self.completion_tokens,
                self.kv_token_seconds,
                steps,
            ],
            self.busy_s,
        )
    }
}

impl Fit {
    /// Fits windows, which should be in the order of time, and compares with `in_force`.
    ///
    /// # Errors
    /// [`TooLittle`].
    pub fn of(windows: &[Observation], in_force: &Weights) -> Result<Fit, TooLittle> {
        let busy = || windows.iter().filter(|window| window.busy_s > 0.0);
        let stepped: Vec<&Observation> = busy().filter(|window| window.steps.is_some()).collect();
        let windows_with_steps = stepped.len();
        let with_steps = windows_with_steps >= MINUTES_MIN;
        let used: Vec<&Observation> = if with_steps { stepped } else { busy().collect() };
        if used.len() < MINUTES_MIN {
            return Err(TooLittle::Windows { found: used.len() });
        }
        let rows: Vec<Row> = used.iter().map(|window| window.row(with_steps)).collect();
        let found = solve(&rows);
        check_that_they_differ(&rows)?;
        let estimates = std::array::from_fn(|at| Estimate {
            seconds: found.values[at],
            error_s: found.errors[at],
            inflation: found.inflations[at],
        });
        let time_s: f64 = rows.iter().map(|(_, busy_s)| busy_s).sum();
        let stepping_s: f64 = rows
            .iter()
            .map(|(row, _)| row[Part::Step as usize] * found.values[Part::Step as usize])
            .sum();
        let [prompt, completion, kv] = in_force.proportions();
        let by_weights = |(row, busy_s): &Row| -> Row {
            let work = row[0] * prompt + row[1] * completion + row[2] * kv;
            ([work, 0.0, 0.0, row[Part::Step as usize]], *busy_s)
        };
        let mut fit = Fit {
            windows: used.len(),
            windows_with_steps,
            estimates,
            theta: None,
            unseen: across(&rows),
            in_force: across(&rows.iter().map(by_weights).collect::<Vec<_>>()),
        };
        if with_steps && fit.estimate(Part::Step).trust() == Trust::Good {
            fit.theta = Some((1.0 - stepping_s / time_s).clamp(0.0, 1.0));
        }
        Ok(fit)
    }

    /// Why it tells no θ.
    pub fn why_no_theta(&self) -> &'static str {
        if self.windows_with_steps < MINUTES_MIN {
            "not known, since the engine's steps are not (vllm:iteration_tokens_total at too few scrapes): what they take is in the weights above"
        } else {
            "not known, since what steps take could not be told from the rest: ask for a period that has quiet hours and busy ones"
        }
    }

    /// What was found of a part.
    pub fn estimate(&self, part: Part) -> Estimate {
        self.estimates[part as usize]
    }

    /// The weights as `ledger.weights` takes them: a prompt token is 1, unless it costs nothing or next to nothing.
    pub fn weights(&self) -> Weights {
        let seconds = [Part::Prompt, Part::Completion, Part::Kv].map(|part| self.estimate(part).seconds);
        let largest = seconds.iter().copied().fold(0.0, f64::max);
        let unit = if seconds[0] > largest / f64::from(WEIGHT_MAX) {
            seconds[0]
        } else {
            largest
        };
        let [prompt, completion, kv] = seconds.map(|seconds| {
            let millionths = if unit > 0.0 {
                seconds / unit * f64::from(Millionths::ONE.get())
            } else {
                0.0
            };
            // At most WEIGHT_MAX, and not negative.
            Millionths::new(millionths.round() as u32)
        });
        Weights {
            prompt,
            completion,
            kv,
        }
    }
}

/// The largest proportion that a weight can state is a little above this.
const WEIGHT_MAX: u32 = 4_000;

fn check_that_they_differ(rows: &[Row]) -> Result<(), TooLittle> {
    let has = |at: usize| rows.iter().any(|(row, _)| row[at] > 0.0);
    let alike = |one: usize, other: usize| {
        let pair = rows.iter().map(|(row, right)| {
            let mut only = [0.0; UNKNOWNS];
            (only[one], only[other]) = (row[one], row[other]);
            (only, *right)
        });
        likeness(&pair.collect::<Vec<_>>(), one, other) > LIKENESS_MAX
    };
    let (prompt, completion) = (Part::Prompt as usize, Part::Completion as usize);
    if has(prompt) && has(completion) && alike(prompt, completion) {
        return Err(TooLittle::Alike {
            what: "prompt and completion tokens come in the same proportion",
        });
    }
    Ok(())
}

/// The cosine between two columns above which they are one: their ratio then differs between windows by some 2 %.
const LIKENESS_MAX: f64 = 0.9998;

fn likeness(rows: &[Row], one: usize, other: usize) -> f64 {
    let sum = |of: &dyn Fn(&[f64; UNKNOWNS]) -> f64| rows.iter().map(|(row, _)| of(row)).sum::<f64>();
    let lengths = sum(&|row| row[one].powi(2)) * sum(&|row| row[other].powi(2));
    sum(&|row| row[one] * row[other]) / lengths.sqrt()
}

/// Every other window by the fit of the rest.
fn across(rows: &[Row]) -> Quality {
    let half = |odd: bool| -> Vec<Row> {
        let of_half = rows.iter().enumerate().filter(|(at, _)| (at % 2 == 1) == odd);
        of_half.map(|(_, row)| *row).collect()
    };
    let halves: [Solution; 2] = [solve(&half(true)), solve(&half(false))];
    let errors = || {
        rows.iter()
            .enumerate()
            .map(|(at, (row, busy_s))| busy_s - product(row, &halves[at % 2].values))
    };
    let time_s: f64 = rows.iter().map(|(_, busy_s)| busy_s).sum();
    let mean_s = time_s / rows.len() as f64;
    let spread: f64 = rows.iter().map(|(_, busy_s)| (busy_s - mean_s).powi(2)).sum();
    // Windows whose times differ by less than a thousandth do not differ.
    let differ = spread > rows.len() as f64 * (mean_s / 1e3).powi(2);
    Quality {
        relative_error: errors().map(f64::abs).sum::<f64>() / time_s,
        r_squared: differ.then(|| 1.0 - errors().map(|error| error.powi(2)).sum::<f64>() / spread),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows of an engine whose costs are known, in mixes that vary.
    fn windows(count: usize, alike: bool) -> Vec<Observation> {
        let of = |n: usize| {
            let vary = |factor: usize, by: usize| {
                if alike {
                    1.0
                } else {
                    (n * factor % by) as f64 / by as f64 + 0.1
                }
            };
            let (prompt_tokens, completion_tokens) = (40_000.0 * vary(7, 11), 3_000.0 * vary(5, 13));
            let (kv_token_seconds, steps) = (500_000.0 * vary(3, 17), 600.0 * vary(11, 19));
            Observation {
                busy_s: 40e-6 * prompt_tokens
                    + 30e-6 * completion_tokens
                    + 2e-6 * kv_token_seconds
                    + 4.8e-3 * steps,
                prompt_tokens,
                completion_tokens,
                kv_token_seconds,
                steps: Some(steps),
            }
        };
        (0..count).map(of).collect()
    }

    #[test]
    fn the_costs_of_an_engine_are_found_and_stated_as_the_config_takes_them() {
        let fit = Fit::of(&windows(100, false), &Weights::ASSUMED).unwrap();
        let seconds =
            [Part::Prompt, Part::Completion, Part::Kv, Part::Step].map(|part| fit.estimate(part).seconds);
        for (found, truth) in seconds.into_iter().zip([40e-6, 30e-6, 2e-6, 4.8e-3]) {
            assert!((found / truth - 1.0).abs() < 1e-6, "{fit:?}");
        }
        let expected = Weights {
            prompt: Millionths::ONE,
            completion: Millionths::new(750_000),
            kv: Millionths::new(50_000),
        };
        assert_eq!(fit.weights(), expected);
        assert!(
            fit.unseen.relative_error < 1e-9 && fit.unseen.r_squared > Some(0.999),
            "{fit:?}"
        );
        assert!(fit.in_force.relative_error > 0.01, "{fit:?}");
        let (stepping, time): (f64, f64) = windows(100, false).iter().fold((0.0, 0.0), |sum, window| {
            (sum.0 + window.steps.unwrap() * 4.8e-3, sum.1 + window.busy_s)
        });
        assert!((fit.theta.unwrap() - (1.0 - stepping / time)).abs() < 1e-6);
    }

    #[test]
    fn without_steps_the_data_does_not_tell_theta() {
        let mut windows = windows(100, false);
        windows.iter_mut().for_each(|window| window.steps = None);
        let fit = Fit::of(&windows, &Weights::ASSUMED).unwrap();
        assert_eq!((fit.theta, fit.windows_with_steps), (None, 0));
        assert_eq!(fit.estimate(Part::Step).seconds, 0.0);
        assert!(
            fit.unseen.relative_error > 0.01,
            "what steps cost is not in there"
        );
    }

    #[test]
    fn too_few_and_too_uniform_windows_are_told() {
        let few = Fit::of(&windows(39, false), &Weights::ASSUMED).unwrap_err();
        assert_eq!(few, TooLittle::Windows { found: 39 });
        let alike = Fit::of(&windows(100, true), &Weights::ASSUMED).unwrap_err();
        assert!(matches!(alike, TooLittle::Alike { .. }), "{alike}");
    }

    #[test]
    fn an_engine_that_is_always_busy_has_no_differences_to_explain() {
        let mut windows = windows(100, false);
        for window in &mut windows {
            let scale = 15.0 / window.busy_s;
            window.busy_s = 15.0;
            window.prompt_tokens *= scale;
            window.completion_tokens *= scale;
            window.kv_token_seconds *= scale;
            window.steps = window.steps.map(|steps| steps * scale);
        }
        let fit = Fit::of(&windows, &Weights::ASSUMED).unwrap();
        assert_eq!(fit.unseen.r_squared, None);
        assert!(
            (fit.estimate(Part::Prompt).seconds / 40e-6 - 1.0).abs() < 1e-6,
            "it is still found: {fit:?}"
        );
    }

    #[test]
    fn a_prompt_that_costs_nothing_is_not_the_unit() {
        let mut windows = windows(100, false);
        for window in &mut windows {
            window.busy_s -= 40e-6 * window.prompt_tokens;
        }
        let weights = Fit::of(&windows, &Weights::ASSUMED).unwrap().weights();
        assert_eq!((weights.prompt.get(), weights.completion), (0, Millionths::ONE));
    }
}
