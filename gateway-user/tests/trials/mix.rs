//! Loads: who sends what, and how often.

use std::ops::RangeInclusive;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::Request;

/// What a team sends.
#[derive(Clone, Debug)]
pub struct Team {
    pub name: &'static str,
    /// Requests a second, on average.
    pub rate: f64,
    pub prompt_tokens: RangeInclusive<u32>,
    pub output_tokens: RangeInclusive<u32>,
    /// The part of its requests that is streamed.
    pub streamed: f64,
}

/// Teams that share an engine.
#[derive(Clone, Debug)]
pub struct Mix {
    pub name: &'static str,
    pub teams: Vec<Team>,
}

/// How a team's requests vary in the course of time, so that windows differ: each minute it sends between none and twice its rate.
const TIDE_S: u64 = 60;

impl Mix {
    /// The requests of some of the teams, in the order of arrival. Those of a team follow from the seed and its name alone.
    pub fn load(
        &self,
        seed: u64,
        seconds: u64,
        factor: f64,
        is_there: impl Fn(usize) -> bool,
    ) -> Vec<Request> {
        let mut load: Vec<Request> = Vec::new();
        for (index, team) in self
            .teams
            .iter()
            .enumerate()
            .filter(|(index, _)| is_there(*index))
        {
            team.send(index, seed, seconds, factor, &mut load);
        }
        load.sort_by_key(|request| (request.at_ns, request.team));
        load
    }

    /// The kinds of teams that a cluster has, against each other.
    pub fn all() -> Vec<Mix> {
        let team = |name, rate, prompt_tokens, output_tokens| Team {
            name,
            rate,
            prompt_tokens,
            output_tokens,
            streamed: 0.7,
        };
        let mix = |name, teams: &[Team]| Mix {
            name,
            teams: teams.to_vec(),
        };
        let extract = team("extract", 3.0, 1_500..=6_000, 10..=60);
        let write = team("write", 2.0, 50..=300, 400..=1_200);
        let chat = team("chat", 4.0, 200..=900, 80..=400);
        let agent = team("agent", 0.25, 12_000..=28_000, 200..=700);
        let small = Team {
            name: "small",
            rate: 0.2,
            ..chat.clone()
        };
        let alike = |name| Team { name, ..chat.clone() };
        vec![
            mix(
                "prefill-heavy and decode-heavy",
                &[extract.clone(), write.clone()],
            ),
            mix("prefill-heavy and chat", &[extract.clone(), chat.clone()]),
            mix("long contexts and chat", &[agent.clone(), chat.clone()]),
            mix("a small team beside a large one", &[small, chat.clone()]),
            mix("three of a kind", &[alike("one"), alike("two"), alike("three")]),
            mix("mixed", &[extract, write, chat, agent]),
        ]
    }
}

impl Team {
    fn send(&self, index: usize, seed: u64, seconds: u64, factor: f64, load: &mut Vec<Request>) {
        let own = self
            .name
            .bytes()
            .fold(seed, |own, byte| own.wrapping_mul(257) ^ u64::from(byte));
        let mut random = SmallRng::seed_from_u64(own);
        let mut at_s = 0.0_f64;
        let tides: Vec<f64> = (0..=seconds / TIDE_S)
            .map(|_| random.random_range(0.0..2.0))
            .collect();
        loop {
            // At twice the rate, of which the tide takes its part away.
            at_s += -(1.0 - random.random::<f64>()).ln() / (2.0 * self.rate * factor);
            if at_s >= seconds as f64 {
                return;
            }
            let tide = tides[at_s as usize / TIDE_S as usize];
            let request = Request {
                at_ns: (at_s * 1e9) as u64,
                team: index,
                prompt_tokens: random.random_range(self.prompt_tokens.clone()),
                output_tokens: random.random_range(self.output_tokens.clone()),
                is_streamed: random.random_bool(self.streamed),
            };
            if random.random_bool(tide / 2.0) {
                load.push(request);
            }
        }
    }
}
