//! What is counted while a run goes on. Each thread has its own, so that nobody waits for a lock; they are
//! merged at the end. Its size depends on the number of teams and status codes, not on that of requests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::client::Observation;
use crate::failure::Outcome;
use crate::histogram::Histogram;
use crate::mix::Endpoint;
use crate::plan::Planned;

/// A thread's statistics, shared by the clients on it.
pub type SharedStats = Arc<Mutex<Stats>>;

/// Locks statistics. Counting does not panic half way, so what a poisoned lock guards is still sound.
pub fn lock(stats: &SharedStats) -> MutexGuard<'_, Stats> {
    stats.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts, and distributions of times.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests that ended, however.
    pub requests: u64,
    /// Requests that went out whole.
    pub sent: u64,
    /// By how they ended, in the order of [`Outcome::ALL`].
    pub by_outcome: [u64; Outcome::ALL.len()],
    /// By the response's status.
    pub by_status: BTreeMap<u16, u64>,
    /// By why they failed.
    pub by_error: BTreeMap<&'static str, u64>,
    /// By endpoint.
    pub by_endpoint: BTreeMap<Endpoint, u64>,
    /// By the team's position; as long as the last team that was seen.
    pub by_team: Vec<TeamStats>,
    /// Requests that were streamed.
    pub streamed: u64,
    /// Chunks with content.
    pub chunks: u64,
    /// Requests sent a second time.
    pub retries: u64,
    /// Connections opened, or tried.
    pub connects: u64,
    /// Bytes written.
    pub bytes_sent: u64,
    /// Bytes read.
    pub bytes_received: u64,
    /// Until the response's first byte, of all that have one.
    pub first_byte: Histogram,
    /// Until the first chunk with content, of all streams that have one.
    pub ttft: Histogram,
    /// Between chunks with content, of all streams.
    pub itl: Histogram,
    /// Until the end, of what ended well.
    pub e2e: Histogram,
    /// From when a request was due to when we began with it.
    pub lag: Histogram,
}

/// What is counted of one team.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TeamStats {
    /// Requests that ended, however.
    pub requests: u64,
    /// Those that ended well.
    pub ok: u64,
    /// Prompt tokens, as far as usage was seen.
    pub prompt_tokens: u64,
    /// Completion tokens, as far as usage was seen.
    pub completion_tokens: u64,
}

impl TeamStats {
    /// Adds another's counts.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.ok += other.ok;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
    }
}

impl Stats {
    /// Counts a request that ended.
    pub fn count(&mut self, planned: &Planned, seen: &Observation) {
        self.requests += 1;
        self.sent += u64::from(seen.sent);
        for (outcome, count) in Outcome::ALL.iter().zip(&mut self.by_outcome) {
            *count += u64::from(*outcome == seen.outcome);
        }
        if let Some(status) = seen.status {
            *self.by_status.entry(status).or_default() += 1;
        }
        if let Some(failure) = seen.failure {
            *self.by_error.entry(failure.name()).or_default() += 1;
        }
        *self.by_endpoint.entry(planned.endpoint).or_default() += 1;
        self.team(planned.team).add(&TeamStats {
            requests: 1,
            ok: u64::from(seen.outcome == Outcome::Ok),
            prompt_tokens: seen.content.tokens.prompt.unwrap_or(0),
            completion_tokens: seen.content.tokens.completion.unwrap_or(0),
        });
        self.streamed += u64::from(planned.stream);
        self.chunks += seen.content.chunks;
        self.retries += u64::from(seen.retried);
        self.connects += u64::from(seen.connects);
        self.bytes_sent += seen.bytes_sent;
        self.bytes_received += seen.bytes_received;
        self.time(seen);
    }

    fn time(&mut self, seen: &Observation) {
        self.lag.record(seen.lag_us);
        if let Some(first_byte_us) = seen.first_byte_us {
            self.first_byte.record(first_byte_us);
        }
        if let Some(ttft_us) = seen.ttft_us {
            self.ttft.record(ttft_us);
        }
        if seen.outcome == Outcome::Ok {
            self.e2e.record(seen.e2e_us);
        }
    }

    fn team(&mut self, position: usize) -> &mut TeamStats {
        if self.by_team.len() <= position {
            self.by_team.resize(position + 1, TeamStats::default());
        }
        &mut self.by_team[position]
    }

    /// Adds what another thread counted.
    pub fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.sent += other.sent;
        self.by_outcome
            .iter_mut()
            .zip(&other.by_outcome)
            .for_each(|(mine, theirs)| *mine += theirs);
        other
            .by_status
            .iter()
            .for_each(|(key, n)| *self.by_status.entry(*key).or_default() += n);
        other
            .by_error
            .iter()
            .for_each(|(key, n)| *self.by_error.entry(key).or_default() += n);
        other
            .by_endpoint
            .iter()
            .for_each(|(key, n)| *self.by_endpoint.entry(*key).or_default() += n);
        other
            .by_team
            .iter()
            .enumerate()
            .for_each(|(team, n)| self.team(team).add(n));
        self.streamed += other.streamed;
        self.chunks += other.chunks;
        self.retries += other.retries;
        self.connects += other.connects;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.first_byte.merge(&other.first_byte);
        self.ttft.merge(&other.ttft);
        self.itl.merge(&other.itl);
        self.e2e.merge(&other.e2e);
        self.lag.merge(&other.lag);
    }

    /// How many requests ended this way.
    pub fn outcome(&self, outcome: Outcome) -> u64 {
        Outcome::ALL
            .iter()
            .zip(&self.by_outcome)
            .find(|(known, _)| **known == outcome)
            .map_or(0, |(_, n)| *n)
    }
}
