//! Handles of all series of one (team, model, endpoint), resolved once.
//!
//! Resolving labels in a dozen families costs microseconds a request; a look-up in here and a few atomic additions cost a tenth.
//! A handle is only made when there is something to put into it: what was never observed has no series, rather than a zero.

use super::families::Families;
use super::gaps::GapHistogram;
use super::labels;
use crate::event::RequestEvent;
use crate::ledger::NanoUsd;
use crate::wire::endpoint::{Endpoint, Purpose};
use crate::wire::exchange::{Outcome, UsageSource};
use foldhash::quality::RandomState;
use prometheus::{Counter, Histogram, HistogramVec, IntCounter, IntCounterVec};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// Finds or makes the [`Series`] of three labels; their number is limited.
pub(super) struct SeriesCache {
    known: RwLock<Known>,
    limit: usize,
}

/// By model, then endpoint. The inner list has few entries, and a scan of those beats a hash.
type OfTeam = HashMap<Box<str>, Vec<Arc<Series>>, RandomState>;

#[derive(Default)]
struct Known {
    by_team: HashMap<Box<str>, OfTeam, RandomState>,
    count: usize,
}

impl SeriesCache {
    pub(super) fn up_to(limit: usize) -> SeriesCache {
        SeriesCache {
            known: RwLock::default(),
            limit,
        }
    }

    /// The series of these labels. Past the limit a new pair of team and model is booked under the team's `__other__` model, so
    /// that a team's sums stay right.
    pub(super) fn get(
        &self,
        families: &Families,
        team: &str,
        model: &str,
        endpoint: &'static str,
    ) -> Arc<Series> {
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(series) = known.find(team, self.bounded(&known, team, model), endpoint) {
                return series;
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let model = self.bounded(&known, team, model);
        known.find(team, model, endpoint).unwrap_or_else(|| {
            let series = Arc::new(Series::new(families, team, model, endpoint));
            known.insert(Arc::clone(&series));
            series
        })
    }

    fn bounded<'m>(&self, known: &Known, team: &str, model: &'m str) -> &'m str {
        let has_room =
            known.count < self.limit || known.by_team.get(team).is_some_and(|t| t.contains_key(model));
        if has_room || [labels::NONE, labels::UNKNOWN].contains(&model) {
            model
        } else {
            labels::OTHER
        }
    }
}

impl Known {
    fn find(&self, team: &str, model: &str, endpoint: &str) -> Option<Arc<Series>> {
        let of_model = self.by_team.get(team)?.get(model)?;
        of_model
            .iter()
            .find(|series| series.endpoint == endpoint)
            .cloned()
    }

    fn insert(&mut self, series: Arc<Series>) {
        let of_team = self.by_team.entry(series.team.clone()).or_default();
        of_team.entry(series.model.clone()).or_default().push(series);
        self.count += 1;
    }
}

/// All series of one (team, model, endpoint).
pub(super) struct Series {
    team: Box<str>,
    model: Box<str>,
    endpoint: &'static str,
    billable: bool,
    /// By status and outcome: few, since a route answers with few codes.
    ended: RwLock<Vec<(u16, Outcome, Ended)>>,
    prompt: OnceLock<IntCounter>,
    cached: OnceLock<IntCounter>,
    completion: OnceLock<IntCounter>,
    engine_prompt: OnceLock<IntCounter>,
    engine_completion: OnceLock<IntCounter>,
    charge: OnceLock<Counter>,
    request_body: IntCounter,
    response_body: IntCounter,
    ttft: OnceLock<Histogram>,
    per_token: OnceLock<Histogram>,
    gaps: OnceLock<Arc<GapHistogram>>,
}

struct Ended {
    requests: IntCounter,
    duration: Histogram,
}

impl Ended {
    fn record(&self, duration_s: f64) {
        self.requests.inc();
        self.duration.observe(duration_s);
    }
}

impl Series {
    fn new(families: &Families, team: &str, model: &str, endpoint: &'static str) -> Series {
        let purpose = Endpoint::of_name(endpoint).purpose();
        Series {
            team: team.into(),
            model: model.into(),
            endpoint,
            billable: matches!(purpose, Purpose::Generate | Purpose::Pool),
            ended: RwLock::default(),
            prompt: OnceLock::new(),
            cached: OnceLock::new(),
            completion: OnceLock::new(),
            engine_prompt: OnceLock::new(),
            engine_completion: OnceLock::new(),
            charge: OnceLock::new(),
            request_body: families.request_body.with_label_values(&[team]),
            response_body: families.response_body.with_label_values(&[team]),
            ttft: OnceLock::new(),
            per_token: OnceLock::new(),
            gaps: OnceLock::new(),
        }
    }

    pub(super) fn record(&self, families: &Families, event: &RequestEvent) {
        self.record_end(families, event);
        self.request_body.inc_by(event.request_bytes);
        self.response_body.inc_by(event.response_bytes);
        self.record_phases(families, event);
        if may_be_billed(event.usage_source) {
            self.record_tokens(families, event);
        }
        if event.charge > NanoUsd(0) {
            let labels = [&*self.team, &*self.model];
            self.charge
                .get_or_init(|| families.charge.with_label_values(&labels))
                .inc_by(event.charge.0 as f64 / NanoUsd::USD as f64);
        }
        if self.billable && reached_an_engine(event.outcome) {
            families
                .usage_source
                .with_label_values(&[event.usage_source.name()])
                .inc();
        }
    }

    fn record_phases(&self, families: &Families, event: &RequestEvent) {
        if let Some(ttft_us) = event.ttft_us {
            self.histogram(&self.ttft, &families.ttft)
                .observe(seconds(ttft_us));
        }
        if let Some(per_token_s) = per_token_s(event) {
            self.histogram(&self.per_token, &families.per_token)
                .observe(per_token_s);
        }
        if event.gaps.count > 0 {
            self.gaps
                .get_or_init(|| families.gaps.series(&self.team, &self.model))
                .add(&event.gaps);
        }
    }

    fn record_tokens(&self, families: &Families, event: &RequestEvent) {
        let add = |cell: &OnceLock<IntCounter>, family: &IntCounterVec, kind, tokens: Option<u64>| {
            if let Some(tokens) = tokens {
                let labels = [&*self.team, &*self.model, kind];
                cell.get_or_init(|| family.with_label_values(&labels))
                    .inc_by(tokens);
            }
        };
        add(&self.prompt, &families.tokens, "prompt", event.prompt_tokens);
        add(&self.cached, &families.tokens, "cached", event.cached_tokens);
        add(
            &self.completion,
            &families.tokens,
            "completion",
            event.completion_tokens,
        );
        let engine = &families.engine_tokens;
        add(&self.engine_prompt, engine, "prompt", event.engine_prompt_tokens);
        add(
            &self.engine_completion,
            engine,
            "completion",
            event.engine_completion_tokens,
        );
    }

    fn record_end(&self, families: &Families, event: &RequestEvent) {
        let (status, outcome) = (event.status_code, event.outcome);
        let record = |known: &[(u16, Outcome, Ended)]| {
            let mut known = known.iter();
            let found = known.find(|known| known.0 == status && known.1 == outcome);
            found
                .map(|(_, _, ended)| ended.record(seconds(event.duration_us)))
                .is_some()
        };
        if record(&self.ended.read().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        let mut known = self.ended.write().unwrap_or_else(PoisonError::into_inner);
        if record(&known) {
            return;
        }
        let (team, model, code) = (&*self.team, &*self.model, status.to_string());
        let requests = [team, model, self.endpoint, &code, outcome.name()];
        let ended = Ended {
            requests: families.requests.with_label_values(&requests),
            duration: families
                .duration
                .with_label_values(&[team, model, self.endpoint, outcome.name()]),
        };
        ended.record(seconds(event.duration_us));
        known.push((status, outcome, ended));
    }

    fn histogram<'c>(&self, cell: &'c OnceLock<Histogram>, family: &HistogramVec) -> &'c Histogram {
        cell.get_or_init(|| family.with_label_values(&[&*self.team, &*self.model, self.endpoint]))
    }
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

/// A count of chunks is a lower bound of the tokens, and a bill is no place for one.
pub(crate) fn may_be_billed(source: UsageSource) -> bool {
    matches!(source, UsageSource::Reported | UsageSource::Continuous)
}

/// Whether tokens may have been spent, so that the lack of a count is worth seeing.
fn reached_an_engine(outcome: Outcome) -> bool {
    !matches!(
        outcome,
        Outcome::Refused | Outcome::ClientError | Outcome::Unreachable
    )
}

/// Mean time of a token after the first, for the streams that OpenTelemetry defines it for: those that succeeded.
fn per_token_s(event: &RequestEvent) -> Option<f64> {
    if event.outcome != Outcome::Completed || !may_be_billed(event.usage_source) {
        return None;
    }
    let tokens_after_first = event
        .completion_tokens?
        .checked_sub(1)
        .filter(|tokens| *tokens > 0)?;
    let decode_us = event.duration_us.checked_sub(event.ttft_us?)?;
    Some(seconds(decode_us) / tokens_after_first as f64)
}
