//! What each team took of an engine, measured: by leaving it out, by adding it to whom else may be there, and step by step.

use super::mix::Mix;
use super::{Engine, Ran};

/// A load of a mix, for so long.
#[derive(Clone, Copy, Debug)]
pub struct Trial<'a> {
    pub engine: &'a Engine,
    pub mix: &'a Mix,
    pub seed: u64,
    pub seconds: u64,
    /// How many times the mix's rates.
    pub factor: f64,
}

/// Seconds of the engine by team, each in its own sense.
#[derive(Clone, Debug)]
pub struct Truth {
    /// How much less the engine was busy without the team. These do not sum to what it was busy: at a half-empty engine all teams but one can go,
    /// and it is busy for almost as long.
    pub left_out: Vec<f64>,
    /// How much more it was busy with the team, on average over all orders in which the teams could have come (Shapley's value). These sum to what it was
    /// busy.
    pub in_any_order: Vec<f64>,
    /// What each step took for the team's requests, and their part, by requests in it, of what it takes whatever is in it. These sum, too.
    pub by_step: Vec<f64>,
}

impl Trial<'_> {
    /// With all teams.
    pub fn run(&self) -> Ran {
        self.of(|_| true)
    }

    fn of(&self, is_there: impl Fn(usize) -> bool) -> Ran {
        self.engine
            .run(&self.mix.load(self.seed, self.seconds, self.factor, is_there))
    }

    /// Runs it once for each set of teams.
    pub fn truth(&self) -> Truth {
        let teams = self.mix.teams.len();
        let has = |set: usize, team: usize| set >> team & 1 == 1;
        let sets = 1_usize << teams;
        let busy: Vec<f64> = (0..sets)
            .map(|set| self.of(|team| has(set, team)).busy_us / 1e6)
            .collect();
        let factorial = |n: usize| (1..=n).map(|n| n as f64).product::<f64>();
        let added = |team: usize| -> f64 {
            let without = (0..sets).filter(|set| !has(*set, team));
            let part = |set: usize| {
                let before = set.count_ones() as usize;
                factorial(before) * factorial(teams - before - 1) / factorial(teams)
            };
            without
                .map(|set| part(set) * (busy[set | 1 << team] - busy[set]))
                .sum()
        };
        let all = self.run();
        Truth {
            left_out: (0..teams)
                .map(|team| busy[sets - 1] - busy[(sets - 1) & !(1 << team)])
                .collect(),
            in_any_order: (0..teams).map(added).collect(),
            by_step: (0..teams)
                .map(|team| all.by_team_us.get(&team).copied().unwrap_or(0.0) / 1e6)
                .collect(),
        }
    }
}
