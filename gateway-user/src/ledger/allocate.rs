//! The rows of one window of one upstream, out of all that is known of it.
//!
//! The window's bill ([`PriceList::bill`](super::PriceList::bill)) is divided twice, each time by largest remainder. First by time between the lines: busy time, and
//! idle, loading, scaled-to-zero and down. Then the busy line between those who ran ([`super::share`]), and the idle line as
//! the method says. So what the running pay is price times busy time whatever the weights are, and a request that runs alone pays all of it.
//!
//! A moment is busy when a known request runs, whatever the engine was seen to be; else when the engine said that it ran, which is then
//! somebody's whom nobody knows (`__unattributed__`); else it is what the engine was. An engine that ran at a moment at which a known request did is
//! no sign that it ran at any other: of a window in which requests come and go, most scrapes see one, and what is between them is idle all the same.
//!
//! What the engine's counters have beyond the known requests joins them as one more request, whenever one of them runs. Its work is spread
//! over all of that time. It counts as present as its rate of work is of the known ones' mean, and never more than one: otherwise a gap of
//! one token, which is only a scrape at another moment, would take half of the window's presence. Where no time is known in which it could
//! have run it has tokens and no cost.

use std::collections::BTreeMap;

use super::facts::{
    Account, Condition, DOWN, EngineSpan, IDLE, LOADING, SCALED_TO_ZERO, Segment, UNATTRIBUTED, WindowFacts,
    Work,
};
use super::method::{Method, Weights};
use super::money::{NanoUsd, apportion};
use super::price::Priced;
use super::row::{CostRow, Edition, SegmentCost, Statement};
use super::share::{Companion, PRESENT, Runner, SHARE_BITS, Shares, divide, rates};
use super::time::{Micros, Span};
use crate::config::IdleTo;

/// How exactly it is known when an engine was looked at: its page is made some milliseconds before it is there, from what its last step left.
const LOOK_US: u64 = 250_000;

/// The rows of one window of one upstream, in the order of their accounts. They sum to [`PriceList::bill`](super::PriceList::bill) of the window's span.
pub fn allocate(facts: &WindowFacts<'_>, method: &Method, edition: Edition) -> Vec<CostRow> {
    itemize(facts, method, edition).rows
}

/// The same rows, and each of them divided once more between the account's segments, by their shares. What an account's segments cost sums to its
/// row; only in `__unattributed__` most is of no segment.
pub fn itemize(facts: &WindowFacts<'_>, method: &Method, edition: Edition) -> Statement {
    let span = facts.window.span();
    let segments = once_each(facts.segments);
    let known = segments
        .iter()
        .fold(Work::default(), |sum, segment| sum.plus(segment.work));
    let gap = facts
        .engine
        .counted
        .map_or(Work::default(), |counted| counted.beyond(known));
    let mut books = Books::default();
    for account in facts.accounts_before {
        books.entry(account.clone()).is_due = true;
    }
    for segment in &segments {
        let entry = books.entry(segment.account.clone());
        entry.is_due = true;
        entry.work = entry.work.plus(segment.work);
    }
    books.line(UNATTRIBUTED).work = gap;
    let seen = beyond_known(&facts.engine.spans, &segments, span);
    books.items = vec![Item::default(); segments.len()];

    let (runners, companion) = crowd(&segments, gap, span, &seen, &method.weights);
    let parts: Vec<Part<'_>> = facts
        .prices
        .parts(span)
        .into_iter()
        .map(|priced| {
            let shares = divide(priced.span, &runners, companion, method.theta());
            Part::new(priced, &segments, &shares, &seen)
        })
        .collect();
    let teams = teams_of(&parts);
    parts
        .iter()
        .for_each(|part| part.book(method.idle, &teams, &mut books));
    Statement {
        segments: books.segments(&segments, facts, edition),
        rows: books.rows(facts, method, edition),
    }
}

/// The segments by their events, each event once.
fn once_each(segments: &[Segment]) -> Vec<&Segment> {
    let mut sorted: Vec<&Segment> = segments.iter().collect();
    sorted.sort_unstable_by(|left, right| right.cmp(left));
    sorted.dedup_by(|left, right| left.event_id == right.event_id);
    sorted
}

/// How the engine was, but for what it ran for the known. Of a look from outside the window it is not known who ran then: where there are known
/// requests, it is taken to have seen those.
fn beyond_known(engine: &[EngineSpan], segments: &[&Segment], window: Span) -> Vec<EngineSpan> {
    let is_known = |seen: &EngineSpan| {
        let near = Span::new(
            Micros(seen.at.0.saturating_sub(LOOK_US)),
            Micros(seen.at.0.saturating_add(LOOK_US)),
        );
        match window.from() <= seen.at && seen.at < window.to() {
            true => segments
                .iter()
                .any(|segment| !segment.run.within(near).is_empty()),
            false => !segments.is_empty(),
        }
    };
    let beyond = |seen: &EngineSpan| match seen.condition {
        Condition::Running if is_known(seen) => EngineSpan {
            condition: Condition::Up,
            ..*seen
        },
        _ => *seen,
    };
    engine.iter().map(beyond).collect()
}

/// Those who run, with their rates of work, and the one more that the engine's counters tell of.
fn crowd(
    segments: &[&Segment],
    gap: Work,
    span: Span,
    engine: &[EngineSpan],
    weights: &Weights,
) -> (Vec<Runner>, Companion) {
    let runs: Vec<Span> = segments.iter().map(|segment| segment.run.within(span)).collect();
    let times = Times::of(span, &merged(&runs), engine);
    let works = segments
        .iter()
        .zip(&runs)
        .map(|(segment, run)| (segment.work.amount(weights), run.len_us()))
        .chain([(gap.amount(weights), times.busy_us())]);
    let mut rates = rates(works);
    let gap_rate = rates.pop().unwrap_or(0);
    let runners: Vec<Runner> = runs
        .into_iter()
        .zip(rates)
        .map(|(run, rate)| Runner { run, rate })
        .collect();
    let (mut work, mut time_us) = (0_u128, 0_u128);
    for Runner { run, rate } in &runners {
        work += rate * u128::from(run.len_us());
        time_us += u128::from(run.len_us());
    }
    let mean_rate = work.checked_div(time_us).unwrap_or(0);
    let presence = match (gap_rate * u128::from(PRESENT)).checked_div(mean_rate) {
        Some(presence) => presence.min(PRESENT.into()) as u64,
        None if gap_rate > 0 => PRESENT,
        None => 0,
    };
    let companion = Companion {
        presence,
        rate: gap_rate,
    };
    (runners, companion)
}

/// Spans joined where they touch, in order.
fn merged(spans: &[Span]) -> Vec<Span> {
    let mut sorted: Vec<Span> = spans.iter().copied().filter(|span| !span.is_empty()).collect();
    sorted.sort_unstable();
    let mut joined: Vec<Span> = Vec::new();
    for span in sorted {
        match joined.last_mut() {
            Some(last) if span.from() <= last.to() => {
                *last = Span::new(last.from(), last.to().max(span.to()))
            }
            _ => joined.push(span),
        }
    }
    joined
}

/// How long an upstream was what.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    attributed_us: u64,
    unattributed_us: u64,
    idle_us: u64,
    loading_us: u64,
    down_us: u64,
    scaled_to_zero_us: u64,
}

impl Times {
    /// `busy` is in order, apart from each other, and within `span`.
    fn of(span: Span, busy: &[Span], engine: &[EngineSpan]) -> Times {
        let mut times = Times::default();
        let mut from = span.from();
        for run in busy {
            times.unattended(Span::new(from, run.from()), engine);
            times.attributed_us += run.len_us();
            from = run.to();
        }
        times.unattended(Span::new(from, span.to()), engine);
        times
    }

    /// Adds time in which no known request ran.
    fn unattended(&mut self, span: Span, engine: &[EngineSpan]) {
        let seen = engine.iter().map(|seen| seen.span.within(span));
        let mut cuts: Vec<_> = seen.flat_map(|seen| [seen.from(), seen.to()]).collect();
        cuts.extend([span.from(), span.to()]);
        cuts.sort_unstable();
        for pair in cuts.windows(2) {
            let piece = Span::new(pair[0], pair[1]);
            let covers = |seen: &&EngineSpan| piece.within(seen.span) == piece;
            let condition = engine.iter().filter(covers).map(|seen| seen.condition).max();
            *self.of_condition(condition.unwrap_or(Condition::Up)) += piece.len_us();
        }
    }

    fn of_condition(&mut self, condition: Condition) -> &mut u64 {
        match condition {
            Condition::Running => &mut self.unattributed_us,
            Condition::Up => &mut self.idle_us,
            Condition::Loading => &mut self.loading_us,
            Condition::ScaledToZero | Condition::Asleep => &mut self.scaled_to_zero_us,
            Condition::Down => &mut self.down_us,
        }
    }

    fn busy_us(&self) -> u64 {
        self.attributed_us + self.unattributed_us
    }
}

/// A part of the window in which one price holds.
struct Part<'a> {
    priced: Priced<'a>,
    times: Times,
    /// Shares of those who ran, at least one when there was any busy time.
    shares: BTreeMap<Account, Share>,
}

/// What an account has of a part.
#[derive(Default)]
struct Share {
    whole: u128,
    /// Its segments that ran in the part, by their places, and what they have of it.
    segments: Vec<(usize, u128)>,
}

impl<'a> Part<'a> {
    fn new(priced: Priced<'a>, segments: &[&Segment], divided: &Shares, engine: &[EngineSpan]) -> Part<'a> {
        let times = Times::of(priced.span, &divided.busy, engine);
        let mut shares: BTreeMap<Account, Share> = BTreeMap::new();
        for (place, (segment, share)) in segments.iter().zip(&divided.runners).enumerate() {
            if !segment.run.within(priced.span).is_empty() {
                let of_account = shares.entry(segment.account.clone()).or_default();
                of_account.whole += share;
                of_account.segments.push((place, *share));
            }
        }
        let unattributed = divided.companion + (u128::from(times.unattributed_us) << SHARE_BITS);
        if unattributed > 0 {
            shares.entry(Account::line(UNATTRIBUTED)).or_default().whole += unattributed;
        }
        Part {
            priced,
            times,
            shares,
        }
    }

    /// Books the bill of this part, to the last nano.
    fn book(&self, idle: IdleTo, teams: &BTreeMap<Box<str>, u128>, books: &mut Books) {
        let Times {
            idle_us,
            loading_us,
            down_us,
            scaled_to_zero_us,
            ..
        } = self.times;
        let busy_us = self.times.busy_us();
        let lines = [busy_us, idle_us, loading_us, down_us, scaled_to_zero_us].map(u128::from);
        let bill = apportion(self.priced.bill().0, &lines);
        for (line, amount) in [LOADING, DOWN, SCALED_TO_ZERO].into_iter().zip(&bill[2..]) {
            books.line(line).cost += NanoUsd(*amount);
        }
        let weights: Vec<u128> = self.shares.values().map(|share| share.whole).collect();
        let amounts = apportion(bill[0], &weights)
            .into_iter()
            .zip(apportion(busy_us, &weights));
        for ((account, share), (amount, time_us)) in self.shares.iter().zip(amounts) {
            let entry = books.entry(account.clone());
            entry.cost += NanoUsd(amount);
            entry.busy_us += time_us;
            share.book(amount, time_us, &mut books.items);
        }
        self.book_idle(bill[1], idle, teams, books);
    }

    fn book_idle(&self, amount: u64, idle: IdleTo, teams: &BTreeMap<Box<str>, u128>, books: &mut Books) {
        let owner = self.priced.price.and_then(|price| price.owner.as_ref());
        let payers: Vec<(Account, u128)> = match idle {
            IdleTo::Separate => Vec::new(),
            IdleTo::Owner => owner
                .map(|owner| (Account::idle_of(owner.as_str()), 1))
                .into_iter()
                .collect(),
            IdleTo::Proportional => teams
                .iter()
                .map(|(team, share)| (Account::idle_of(team), *share))
                .collect(),
            IdleTo::Even => teams.keys().map(|team| (Account::idle_of(team), 1)).collect(),
        };
        if payers.is_empty() {
            books.line(IDLE).cost += NanoUsd(amount);
            return;
        }
        let weights: Vec<u128> = payers.iter().map(|(_, weight)| *weight).collect();
        for ((account, _), amount) in payers.into_iter().zip(apportion(amount, &weights)) {
            books.entry(account).cost += NanoUsd(amount);
        }
    }
}

impl Share {
    /// Divides what the account got between its segments.
    fn book(&self, amount: u64, time_us: u64, items: &mut [Item]) {
        let mut weights: Vec<u128> = self.segments.iter().map(|(_, share)| *share).collect();
        // Of no segment: what only the engine's counters tell of.
        let rest = self.whole - weights.iter().sum::<u128>();
        if rest > 0 {
            weights.push(rest);
        }
        let parts = apportion(amount, &weights)
            .into_iter()
            .zip(apportion(time_us, &weights));
        for ((place, _), (amount, time_us)) in self.segments.iter().zip(parts) {
            items[*place].cost += NanoUsd(amount);
            items[*place].busy_us += time_us;
        }
    }
}

/// Each team's share of the window's busy time, of those that have any.
fn teams_of(parts: &[Part<'_>]) -> BTreeMap<Box<str>, u128> {
    let mut teams: BTreeMap<Box<str>, u128> = BTreeMap::new();
    for (account, share) in parts.iter().flat_map(|part| &part.shares) {
        if share.whole > 0 && account.is_a_teams() {
            *teams.entry(account.team_id.clone()).or_default() += share.whole;
        }
    }
    teams
}

/// What falls to each account, and of that to each of its segments.
#[derive(Default)]
struct Books {
    accounts: BTreeMap<Account, Entry>,
    /// In the order of the segments.
    items: Vec<Item>,
}

/// What falls to a segment.
#[derive(Clone, Copy, Default)]
struct Item {
    busy_us: u64,
    cost: NanoUsd,
}

#[derive(Default)]
struct Entry {
    busy_us: u64,
    work: Work,
    cost: NanoUsd,
    /// Whether there is a row even when all is 0.
    is_due: bool,
}

impl Books {
    fn entry(&mut self, account: Account) -> &mut Entry {
        self.accounts.entry(account).or_default()
    }

    fn line(&mut self, line: &str) -> &mut Entry {
        self.entry(Account::line(line))
    }

    fn segments(&self, segments: &[&Segment], facts: &WindowFacts<'_>, edition: Edition) -> Vec<SegmentCost> {
        let row = |(segment, item): (&&Segment, &Item)| SegmentCost {
            window_start: facts.window,
            upstream: facts.upstream.into(),
            event_id: segment.event_id.clone(),
            account: segment.account.clone(),
            busy_us: item.busy_us,
            cost: item.cost,
            revision: edition.revision,
            state: edition.state,
        };
        segments.iter().zip(&self.items).map(row).collect()
    }

    fn rows(self, facts: &WindowFacts<'_>, method: &Method, edition: Edition) -> Vec<CostRow> {
        let method: Box<str> = method.to_string().into();
        let row = |(account, entry): (Account, Entry)| CostRow {
            window_start: facts.window,
            upstream: facts.upstream.into(),
            account,
            busy_us: entry.busy_us,
            prompt_tokens: entry.work.prompt_tokens,
            completion_tokens: entry.work.completion_tokens,
            cost: entry.cost,
            method: method.clone(),
            revision: edition.revision,
            state: edition.state,
        };
        let is_said = |(_, entry): &(Account, Entry)| {
            entry.is_due || entry.cost > NanoUsd(0) || entry.busy_us > 0 || entry.work != Work::default()
        };
        self.accounts.into_iter().filter(is_said).map(row).collect()
    }
}
