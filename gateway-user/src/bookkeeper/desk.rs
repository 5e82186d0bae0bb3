//! One chunk of windows: read, computed, and written where something is to be.

use super::{Rules, Upstream};
use crate::ledger::due::windows;
use crate::ledger::inputs::{self, inputs};
use crate::ledger::{
    Account, Clock, Edition, EngineView, Head, Inputs, Micros, NanoUsd, Observers, Recompute, Segment,
    SegmentCost, Span, Standing, State, Statement, Window, WindowFacts, Work, itemize,
};
use crate::store::ledger::{LedgerError, LedgerStore, StandingRow};
use std::collections::{BTreeMap, BTreeSet};

/// Windows looked at in one go: an hour.
pub(super) const CHUNK: u64 = 240;

/// Segments in memory at a time, some 6 MB, but for a window that has more by itself.
const SEGMENTS_MAX: u64 = 20_000;

/// Computes windows of one upstream.
pub(super) struct Desk<'a> {
    pub(super) store: &'a LedgerStore,
    pub(super) rules: &'a Rules,
    pub(super) upstream: &'a Upstream,
    pub(super) gateway_id: &'a str,
    pub(super) recompute: Recompute,
    /// Whether what is computed is written, or only told of.
    pub(super) writes: bool,
}

/// What became of windows.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Looked at.
    pub(super) windows: u64,
    /// Written, or to be, by the state that they are in then.
    pub(super) written: BTreeMap<&'static str, u64>,
    /// Those of them that had not been booked before.
    pub(super) new: u64,
    /// Which they are.
    pub(super) starts: BTreeSet<Micros>,
    /// What all the windows cost, as it stood and as it is now.
    pub(super) bill: Change,
    /// What the rows sum to.
    pub(super) rows: Change,
    /// Of the windows that were written: what falls to each team or line.
    pub(super) teams: BTreeMap<Box<str>, Change>,
    /// Windows that stay as they are since there are fewer segments than they were computed from.
    pub(super) short: u64,
    /// Rules by which something stands that is left as it is, and what they would be here.
    pub(super) other_rules: BTreeMap<Box<str>, String>,
}

/// An amount before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) before: NanoUsd,
    pub(super) after: NanoUsd,
}

/// A window that has to be written.
struct Due {
    inputs: Inputs,
    edition: Edition,
    rules: String,
    stands: bool,
}

impl Outcome {
    /// How many windows were written, or are to be.
    pub(super) fn changed(&self) -> u64 {
        self.written.values().sum()
    }
}

impl Desk<'_> {
    /// Computes the whole windows of `span`, and writes those whose statement is not what it should be.
    pub(super) async fn compute(
        &self,
        span: Span,
        clock: Clock,
        outcome: &mut Outcome,
    ) -> Result<(), LedgerError> {
        let due = self.due(span, clock, outcome).await?;
        let mut pending: Vec<(Head, Statement)> = Vec::new();
        let mut segments = 0;
        for run in runs(&due) {
            let more: u64 = run.iter().map(|due| due.inputs.tally.segments).sum();
            if segments + more > SEGMENTS_MAX {
                self.write(&mut pending, outcome).await?;
                segments = 0;
            }
            pending.extend(self.state(run, outcome).await?);
            segments += more;
        }
        self.write(&mut pending, outcome).await
    }

    /// The windows whose statement is not what it should be.
    async fn due(&self, span: Span, clock: Clock, outcome: &mut Outcome) -> Result<Vec<Due>, LedgerError> {
        let (name, reach) = (&*self.upstream.name, self.rules.reach());
        let (tallies, looks, standing) = tokio::try_join!(
            self.store.tallies(name, inputs::span_of_tallies(span, reach)),
            self.store.looks(name, inputs::span_of_scrapes(span, reach)),
            self.store.standing(name, span),
        )?;
        let mut due = Vec::new();
        for inputs in inputs(span, reach, &tallies, &Observers::of(looks)) {
            let rules = self.words(inputs.window);
            let stands = standing.get(&inputs.window);
            let head = stands.and_then(|stands| stands.head.as_ref());
            outcome.windows += 1;
            if let Some(head) = head {
                outcome.bill.before += head.bill;
                outcome.rows.before += head.bill;
            }
            outcome.short += u64::from(inputs.are_short_of(stands));
            match inputs.edition(stands, &rules, clock, self.recompute) {
                Some(edition) => due.push(Due {
                    inputs,
                    edition,
                    rules,
                    stands: stands.is_some(),
                }),
                None => self.unchanged(stands, rules, outcome),
            }
        }
        Ok(due)
    }

    fn unchanged(&self, stands: Option<&Standing>, rules: String, outcome: &mut Outcome) {
        let Some(head) = stands.and_then(|stands| stands.head.as_ref()) else {
            return;
        };
        // Its rows sum to that, or it would not be left alone.
        outcome.bill.after += head.bill;
        outcome.rows.after += head.bill;
        if *head.rules != *rules {
            outcome.other_rules.insert(head.rules.clone(), rules);
        }
    }

    /// Price and method in words.
    fn words(&self, window: Window) -> String {
        let price = self.upstream.prices.words(window.span());
        let settle_s = self.rules.settle_us / 1_000_000;
        format!("{price} {} settle={settle_s}s", self.rules.method)
    }

    /// The statements of windows one after the other.
    async fn state(&self, run: &[Due], outcome: &mut Outcome) -> Result<Vec<(Head, Statement)>, LedgerError> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            return Ok(Vec::new());
        };
        let span = Span::new(first.inputs.window.start(), last.inputs.window.next().start());
        let name = &*self.upstream.name;
        let mut segments = self.store.segments(name, span).await?;
        let (mut rows, mut orphans) = match run.iter().any(|due| due.stands) {
            true => tokio::try_join!(
                self.store.standing_rows(name, span),
                self.store.orphans(name, span)
            )?,
            false => (BTreeMap::new(), BTreeMap::new()),
        };
        let statements = run.iter().map(|due| {
            let window = due.inputs.window;
            self.state_one(
                due,
                &segments.remove(&window).unwrap_or_default(),
                &rows.remove(&window).unwrap_or_default(),
                orphans.remove(&window).unwrap_or_default(),
                outcome,
            )
        });
        Ok(statements.collect())
    }

    fn state_one(
        &self,
        due: &Due,
        segments: &[Segment],
        rows: &[StandingRow],
        orphans: Vec<SegmentCost>,
        outcome: &mut Outcome,
    ) -> (Head, Statement) {
        let Due { inputs, edition, .. } = due;
        let known = segments
            .iter()
            .fold(Work::default(), |sum, segment| sum.plus(segment.work));
        let engine = EngineView {
            spans: inputs.spans.clone(),
            counted: Some(known.plus(inputs.gap)),
        };
        let accounts: Vec<Account> = rows.iter().map(|row| row.account.clone()).collect();
        let facts = WindowFacts {
            window: inputs.window,
            upstream: &self.upstream.name,
            prices: &self.upstream.prices,
            segments,
            engine: &engine,
            accounts_before: &accounts,
        };
        let mut statement = itemize(&facts, &self.rules.method, *edition);
        statement
            .segments
            .extend(orphans.into_iter().map(|orphan| SegmentCost {
                revision: edition.revision,
                state: edition.state,
                ..orphan
            }));
        let head = Head {
            window_start: inputs.window,
            upstream: self.upstream.name.clone(),
            bill: self.upstream.prices.bill(inputs.window.span()),
            busy_us: statement.rows.iter().map(|row| row.busy_us).sum(),
            segments: segments.len() as u64,
            prompt_tokens: known.prompt_tokens,
            completion_tokens: known.completion_tokens,
            engine_prompt_tokens: inputs.counted.map(|counted| counted.prompt_tokens),
            engine_completion_tokens: inputs.counted.map(|counted| counted.completion_tokens),
            unattributed_prompt_tokens: inputs.gap.prompt_tokens,
            unattributed_completion_tokens: inputs.gap.completion_tokens,
            facts: inputs.facts(),
            rules: due.rules.as_str().into(),
            revision: edition.revision,
            state: edition.state,
            gateway_id: self.gateway_id.into(),
        };
        outcome.note(due, rows, &head, &statement);
        (head, statement)
    }

    async fn write(
        &self,
        statements: &mut Vec<(Head, Statement)>,
        outcome: &mut Outcome,
    ) -> Result<(), LedgerError> {
        if self.writes && !statements.is_empty() {
            self.store.write(statements).await?;
        }
        for (head, _) in statements.drain(..) {
            *outcome.written.entry(head.state.name()).or_default() += 1;
            outcome.starts.insert(head.window_start.start());
        }
        Ok(())
    }
}

impl Outcome {
    fn note(&mut self, due: &Due, rows: &[StandingRow], head: &Head, statement: &Statement) {
        self.new += u64::from(!due.stands);
        self.bill.after += head.bill;
        for row in rows {
            self.teams.entry(row.account.team_id.clone()).or_default().before += row.cost;
        }
        for row in &statement.rows {
            self.rows.after += row.cost;
            self.teams.entry(row.account.team_id.clone()).or_default().after += row.cost;
        }
    }

    /// How many were written in a state.
    pub(super) fn in_state(&self, state: State) -> u64 {
        self.written.get(state.name()).copied().unwrap_or(0)
    }
}

/// What is due in runs of windows that follow each other, none with many segments unless it is of one window.
fn runs(due: &[Due]) -> Vec<&[Due]> {
    let mut runs = Vec::new();
    let (mut from, mut segments) = (0, 0);
    for (at, next) in due.iter().enumerate() {
        let follows = at > from && due[at - 1].inputs.window.next() == next.inputs.window;
        if at > from && (!follows || segments + next.inputs.tally.segments > SEGMENTS_MAX) {
            runs.push(&due[from..at]);
            (from, segments) = (at, 0);
        }
        segments += next.inputs.tally.segments;
    }
    if from < due.len() {
        runs.push(&due[from..]);
    }
    runs
}

/// How many windows a span has.
pub(super) fn count(span: Span) -> u64 {
    windows(span).count() as u64
}
