//! What request `index` is: a pure function of the seed and the index.
//!
//! So a run can be repeated, two threads need not agree on anything but who takes which index, and a test
//! can compute what it expects without asking the program that sent it.
//!
//! The fractions are of **all** requests and exact in expectation: an endpoint that cannot stream makes the
//! others stream more often, and the share that is aborted is taken half from streamed and half from unstreamed
//! requests (or more from one side when the other has not enough).

use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::draws::{Draws, Purpose};
use crate::mix::{Endpoint, EndpointMix, Lengths, Weights};

/// The shape of a whole run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Everything below is drawn from this.
    pub seed: u64,
    /// Who pays: team 1, 2, … by weight.
    pub teams: Weights,
    /// How many projects there are; 0 sends no project.
    pub projects: u32,
    /// How many users there are; 0 sends no user.
    pub users: u32,
    /// Where requests go.
    pub endpoints: EndpointMix,
    /// The share of all requests that is streamed.
    pub stream_fraction: f64,
    /// The share of all requests that the client gives up.
    pub abort_fraction: f64,
    /// The share of all requests that asks the simulator for an error.
    pub fail_fraction: f64,
    /// The share of streams that asks for usage.
    pub include_usage_fraction: f64,
    /// Prompt lengths.
    pub prompt_tokens: Lengths,
    /// Output lengths.
    pub output_tokens: Lengths,
    /// After how many milliseconds an unstreamed request is given up.
    pub abort_after_ms: RangeInclusive<u32>,
}

/// One request, before it is sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Its position in the run, from 0.
    pub index: u64,
    /// The team's position, from 0; `team-1` is 0.
    pub team: usize,
    /// The project's number, from 1.
    pub project: Option<u32>,
    /// The user's number, from 1.
    pub user: Option<u32>,
    /// Where it goes.
    pub endpoint: Endpoint,
    /// Whether the response is streamed.
    pub stream: bool,
    /// Whether a streamed request asks for usage.
    pub include_usage: bool,
    /// How it is meant to end.
    pub fate: Fate,
    /// The prompt's approximate length.
    pub prompt_tokens: u32,
    /// How much it asks for.
    pub output_tokens: u32,
}

/// How a request is meant to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs to its end.
    Complete,
    /// It asks the simulator to answer with an error.
    Fail,
    /// The client closes the socket after this many chunks with content; a stream that has fewer runs to its end.
    AbortAfterChunks(u32),
    /// The client closes the socket after this time; a response that is faster comes whole.
    AbortAfter(Duration),
}

impl Plan {
    /// Refuses fractions that cannot all be had at once.
    pub fn validate(&self) -> Result<()> {
        let can_stream = self.endpoints.streaming_share();
        ensure!(
            self.stream_fraction <= can_stream + f64::EPSILON * 8.0,
            "--stream-fraction {} cannot be reached: only {can_stream:.3} of the requests go to an endpoint that \
             streams; lower it, or give embeddings less weight",
            self.stream_fraction,
        );
        ensure!(
            self.abort_fraction + self.fail_fraction <= 1.0,
            "--abort-fraction {} and --fail-fraction {} add up to more than 1: a request has one end",
            self.abort_fraction,
            self.fail_fraction,
        );
        Ok(())
    }

    /// What request `index` is.
    pub fn request(&self, index: u64) -> Planned {
        let mut draws = Draws::new(self.seed, Purpose::Request, index);
        let team = self.teams.draw(&mut draws);
        let project = (self.projects > 0).then(|| draws.within(1..=self.projects));
        let user = (self.users > 0).then(|| draws.within(1..=self.users));
        let endpoint = self.endpoints.draw(&mut draws);
        let stream =
            endpoint.streams() && draws.chance(self.stream_fraction / self.endpoints.streaming_share());
        let include_usage = draws.chance(self.include_usage_fraction) && stream;
        let prompt_tokens = self.prompt_tokens.draw(&mut draws);
        let output_tokens = self.output_tokens.draw(&mut draws);
        let fate = self.fate(stream, output_tokens, &mut draws);
        Planned {
            index,
            team,
            project,
            user,
            endpoint,
            stream,
            include_usage,
            fate,
            prompt_tokens,
            output_tokens,
        }
    }

    fn fate(&self, stream: bool, output_tokens: u32, draws: &mut Draws) -> Fate {
        if draws.chance(self.abort_probability(stream)) {
            return if stream {
                Fate::AbortAfterChunks(draws.within(1..=output_tokens.saturating_sub(1).max(1)))
            } else {
                let after_ms = draws.within(self.abort_after_ms.clone());
                Fate::AbortAfter(Duration::from_millis(u64::from(after_ms)))
            };
        }
        // Only requests that are not aborted can fail, so they fail the more often: the share of all is exact.
        if draws.chance(self.fail_fraction / (1.0 - self.abort_fraction)) {
            Fate::Fail
        } else {
            Fate::Complete
        }
    }

    /// The probability that a streamed (or unstreamed) request is aborted.
    fn abort_probability(&self, stream: bool) -> f64 {
        let (abort, streamed) = (self.abort_fraction, self.stream_fraction);
        let unstreamed = 1.0 - streamed;
        let streamed_aborts = (abort / 2.0).max(abort - unstreamed).min(streamed);
        let (aborts, of) = if stream {
            (streamed_aborts, streamed)
        } else {
            (abort - streamed_aborts, unstreamed)
        };
        if of > 0.0 { (aborts / of).min(1.0) } else { 0.0 }
    }
}

/// When requests arrive in an open loop: a Poisson process, as offsets from the start of the run.
#[derive(Debug)]
pub struct Arrivals {
    seed: u64,
    rate_per_s: f64,
    index: u64,
    at_s: f64,
}

impl Arrivals {
    /// Arrivals at this mean rate, which must be above 0.
    pub fn new(seed: u64, rate_per_s: f64) -> Self {
        Self {
            seed,
            rate_per_s,
            index: 0,
            at_s: 0.0,
        }
    }
}

impl Iterator for Arrivals {
    type Item = (u64, Duration);

    fn next(&mut self) -> Option<(u64, Duration)> {
        let index = self.index;
        self.at_s += Draws::new(self.seed, Purpose::Arrival, index).exponential() / self.rate_per_s;
        self.index += 1;
        Duration::try_from_secs_f64(self.at_s).ok().map(|at| (index, at))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn plan() -> Plan {
        Plan {
            seed: 42,
            teams: Weights::equal(5),
            projects: 3,
            users: 20,
            endpoints: "chat=6,completions=3,embeddings=1".parse().expect("a mix"),
            stream_fraction: 0.33,
            abort_fraction: 0.1,
            fail_fraction: 0.05,
            include_usage_fraction: 0.5,
            prompt_tokens: Lengths::Uniform { min: 20, max: 200 },
            output_tokens: Lengths::Uniform { min: 2, max: 64 },
            abort_after_ms: 1..=50,
        }
    }

    /// The share of the first `n` requests for which `test` holds.
    fn share(plan: &Plan, test: impl Fn(&Planned) -> bool) -> f64 {
        let n = 40_000;
        (0..n).filter(|index| test(&plan.request(*index))).count() as f64 / n as f64
    }

    fn is_abort(request: &Planned) -> bool {
        matches!(request.fate, Fate::AbortAfter(_) | Fate::AbortAfterChunks(_))
    }

    #[track_caller]
    fn assert_near(found: f64, expected: f64) {
        // Five standard deviations of a share of 40,000 draws.
        let tolerance = 5.0 * (expected * (1.0 - expected) / 40_000.0).sqrt() + 1e-9;
        assert!(
            (found - expected).abs() <= tolerance,
            "expected {expected} ± {tolerance}, found {found}"
        );
    }

    #[test]
    fn a_request_depends_on_the_seed_and_its_index_alone() {
        let (one, same) = (plan(), plan());
        let backwards: Vec<_> = (0..200).rev().map(|index| same.request(index)).collect();
        let forwards: Vec<_> = (0..200).map(|index| one.request(index)).collect();
        assert!(forwards.iter().eq(backwards.iter().rev()));
        let other = Plan { seed: 43, ..plan() };
        assert_ne!(
            forwards,
            (0..200).map(|index| other.request(index)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_sequence_of_a_seed_never_changes() {
        // Somebody compares a run with last year's: a change here is a break, to be made on purpose.
        let seen = (0..4).map(|index| plan().request(index));
        let seen: Vec<_> = seen
            .map(|r| (r.team, r.endpoint, r.stream, r.prompt_tokens))
            .collect();
        let expected = [
            (2, Endpoint::Completions, false, 39),
            (3, Endpoint::Chat, true, 41),
            (3, Endpoint::Chat, false, 63),
            (2, Endpoint::Chat, false, 115),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn fractions_are_of_all_requests() {
        let plan = plan();
        assert_near(share(&plan, |r| r.stream), 0.33);
        assert_near(share(&plan, |r| r.endpoint == Endpoint::Embeddings), 0.1);
        assert_near(share(&plan, is_abort), 0.1);
        assert_near(share(&plan, |r| is_abort(r) && r.stream), 0.05);
        assert_near(share(&plan, |r| r.fate == Fate::Fail), 0.05);
        assert_near(share(&plan, |r| r.include_usage), 0.165);
        assert_near(share(&plan, |r| r.team == 4), 0.2);
    }

    #[test]
    fn embeddings_never_stream_and_aborts_fit_their_kind() {
        let plan = Plan {
            stream_fraction: 0.9,
            abort_fraction: 0.5,
            ..plan()
        };
        plan.validate().expect("0.9 of the requests can stream");
        for request in (0..5_000).map(|index| plan.request(index)) {
            assert!(!(request.stream && request.endpoint == Endpoint::Embeddings));
            match request.fate {
                Fate::AbortAfterChunks(chunks) => {
                    assert!(request.stream && (1..=request.output_tokens).contains(&chunks));
                }
                Fate::AbortAfter(after) => assert!(!request.stream && after <= Duration::from_millis(50)),
                Fate::Complete | Fate::Fail => {}
            }
        }
    }

    #[test]
    fn aborts_come_from_one_kind_when_the_other_is_absent() {
        for (stream_fraction, streamed_aborts) in [(0.0, 0.0), (0.02, 0.02), (0.9, 0.3)] {
            let plan = Plan {
                stream_fraction,
                abort_fraction: 0.4,
                fail_fraction: 0.6,
                ..plan()
            };
            assert_near(share(&plan, is_abort), 0.4);
            assert_near(share(&plan, |r| is_abort(r) && r.stream), streamed_aborts);
            assert_near(share(&plan, |r| r.fate == Fate::Fail), 0.6);
        }
    }

    #[test]
    fn fractions_that_cannot_be_had_are_refused() {
        let message = Plan {
            stream_fraction: 0.95,
            ..plan()
        }
        .validate()
        .expect_err("0.9 can stream");
        assert!(message.to_string().contains("0.900"), "{message}");
        let message = Plan {
            abort_fraction: 0.6,
            fail_fraction: 0.6,
            ..plan()
        }
        .validate()
        .expect_err("1.2");
        assert!(message.to_string().contains("more than 1"), "{message}");
    }

    #[test]
    fn arrivals_are_a_poisson_process_of_the_rate() {
        let arrivals: Vec<_> = Arrivals::new(1, 200.0).take(20_000).collect();
        let last = arrivals.last().expect("arrivals");
        assert_eq!(last.0, 19_999);
        assert!(
            (last.1.as_secs_f64() - 100.0).abs() < 4.0,
            "20,000 at 200/s took {:?}",
            last.1
        );
        // In a Poisson process the number in an interval has a variance equal to its mean (here 20).
        let mut counts = vec![0f64; 1000];
        for (_, at) in &arrivals {
            if let Some(count) = counts.get_mut((at.as_secs_f64() * 10.0) as usize) {
                *count += 1.0;
            }
        }
        let counts = &counts[..900];
        let mean = counts.iter().sum::<f64>() / 900.0;
        let variance = counts.iter().map(|count| (count - mean).powi(2)).sum::<f64>() / 900.0;
        assert!(
            (variance / mean - 1.0).abs() < 0.25,
            "variance {variance}, mean {mean}"
        );
    }
}
