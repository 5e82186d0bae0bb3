//! The head of a window's statement, and when a statement is made anew.
//!
//! A statement is written when there is none, when its facts are others now, when what stands of it does not fit together, or when its time to settle has come;
//! otherwise nothing is, so that to compute a window again and again changes nothing. Facts are compared by what a head says of them, sums and a hash of
//! every segment: were the hash of two different sets of segments ever the same, a window would keep a statement that adds up and was true once.
//!
//! Nothing is ever computed from fewer segments than before: what is missing then has been deleted, and would make idle time of what somebody had used.
//!
//! What was computed by other rules (another price or method) stays as it is while its facts do, unless it is asked for: otherwise two gateways
//! that were configured differently would correct each other for ever.

use cityhash_rs::cityhash_102_128;
use serde::{Serialize, Serializer};

use super::facts::{Condition, EngineSpan, Work};
use super::money::NanoUsd;
use super::row::{Edition, State, as_i64, in_seconds, name_of_state};
use super::time::{Micros, Window};

/// Revisions of a window are `n` millions and a number out of what the statement says, see [`Inputs::edition`].
const REVISION: u64 = 1_000_000;

/// A window's segments, taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many.
    pub segments: u64,
    /// The sum of their tokens: prompt, cached and completion.
    pub work: Work,
    /// A hash of all that they say, whatever their order.
    pub hash: u64,
}

/// All that a statement follows from but the rules, the upstream, and whom it must name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// The window.
    pub window: Window,
    /// Its segments.
    pub tally: Tally,
    /// How the engine was: in order, without overlaps, joined where they touch.
    pub spans: Vec<EngineSpan>,
    /// What its counters grew by, where that is known.
    pub counted: Option<Work>,
    /// What is settled of that beyond the segments.
    pub gap: Work,
}

/// A row of `ledger_windows`, name for name, but for the time at which it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Head {
    /// Start of the window.
    #[serde(serialize_with = "in_seconds")]
    pub window_start: Window,
    /// The upstream.
    pub upstream: Box<str>,
    /// Price times time: what the rows sum to.
    #[serde(rename = "bill_nano_usd", serialize_with = "as_i64")]
    pub bill: NanoUsd,
    /// What their busy time sums to.
    pub busy_us: u64,
    /// How many segments it was computed from.
    pub segments: u64,
    /// Their prompt tokens.
    pub prompt_tokens: u64,
    /// Their completion tokens.
    pub completion_tokens: u64,
    /// What the engine counted; `None` where that is not known.
    pub engine_prompt_tokens: Option<u64>,
    /// See there.
    pub engine_completion_tokens: Option<u64>,
    /// What is settled of the difference.
    pub unattributed_prompt_tokens: u64,
    /// See there.
    pub unattributed_completion_tokens: u64,
    /// [`Inputs::facts`].
    pub facts: u64,
    /// By which price and method, in words.
    pub rules: Box<str>,
    /// The highest counts.
    pub revision: u64,
    /// How final it is.
    #[serde(serialize_with = "state_name")]
    pub state: State,
    /// Who wrote it.
    pub gateway_id: Box<str>,
}

/// What stands of a window: its head, and what there is of its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The head; `None` when rows stand without one, as of a writer that was killed.
    pub head: Option<Head>,
    /// The highest revision of anything that stands.
    pub revision: u64,
    /// Whether all rows are of the head's revision and sum to what it says.
    pub is_whole: bool,
}

/// Whether what was computed by other rules is computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Only where facts have changed.
    ByFacts,
    /// Also where rules have.
    ByRules,
}

/// When windows settle, seen from a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// The moment.
    pub now: Micros,
    /// How long after its end a window settles.
    pub settle_us: u64,
}

impl Clock {
    /// Whether a window's time to settle has come.
    pub fn has_settled(&self, window: Window) -> bool {
        window.span().to().0.saturating_add(self.settle_us) <= self.now.0
    }
}

impl Inputs {
    /// A hash of the segments and of how the engine was. The gap is not in it: a head has that in columns of its own, since it depends on the rules.
    pub fn facts(&self) -> u64 {
        let mut bytes = Vec::with_capacity(48 + 24 * self.spans.len());
        let mut put = |number: u64| bytes.extend(number.to_le_bytes());
        put(self.tally.segments);
        put(self.tally.hash);
        for seen in &self.spans {
            put(seen.span.from().0);
            put(seen.span.to().0);
            put(if seen.condition == Condition::Running {
                seen.at.0
            } else {
                0
            });
            put(code(seen.condition));
        }
        hash(&bytes)
    }

    /// Whether `head` was computed from these facts, as far as its own rules would have it: a gap that other rules find is no other fact.
    fn are_of(&self, head: &Head, rules: &str) -> bool {
        let gap = (self.gap.prompt_tokens, self.gap.completion_tokens);
        let has_gap = gap
            == (
                head.unattributed_prompt_tokens,
                head.unattributed_completion_tokens,
            );
        head.segments == self.tally.segments
            && head.prompt_tokens == self.tally.work.prompt_tokens
            && head.completion_tokens == self.tally.work.completion_tokens
            && head.facts == self.facts()
            && (has_gap || &*head.rules != rules)
    }

    /// Whether there are fewer segments than what stands was computed from. Segments only ever come, so that these are not all: they have grown old and
    /// were deleted, or another replica has the others.
    pub fn are_short_of(&self, standing: Option<&Standing>) -> bool {
        let head = standing.and_then(|standing| standing.head.as_ref());
        head.is_some_and(|head| head.segments > self.tally.segments)
    }

    /// The edition in which the window is to be written, or `None` when what stands is right, or is of more facts than there are.
    ///
    /// The `n`th statement of a window has revision `n·1 000 000 + k`, where `k` is a hash of what it says. So two gateways that write at the same time
    /// write the same when they know the same, and when they do not, one's rows stand in all tables alike, and what is left of the other's has a lower
    /// revision than the head, by which it is found.
    pub fn edition(
        &self,
        standing: Option<&Standing>,
        rules: &str,
        clock: Clock,
        recompute: Recompute,
    ) -> Option<Edition> {
        if self.are_short_of(standing) {
            return None;
        }
        let due = match clock.has_settled(self.window) {
            true => State::Settled,
            false => State::Provisional,
        };
        let head = standing.and_then(|standing| standing.head.as_ref());
        let state = match head.map(|head| head.state) {
            None | Some(State::Provisional) => due,
            Some(State::Settled | State::Restated) => State::Restated,
        };
        if let (Some(standing), Some(head)) = (standing, head) {
            let same_rules = recompute == Recompute::ByFacts || &*head.rules == rules;
            let is_due = head.state == State::Provisional && state != State::Provisional;
            if standing.is_whole && same_rules && !is_due && self.are_of(head, rules) {
                return None;
            }
        }
        let before = standing.map_or(0, |standing| standing.revision / REVISION);
        let said = format!("{:x} {:?} {} {rules}", self.facts(), self.gap, state.name());
        Some(Edition {
            revision: (before + 1) * REVISION + hash(said.as_bytes()) % REVISION,
            state,
        })
    }
}

/// What a condition counts as in a hash: it must never change.
fn code(condition: Condition) -> u64 {
    match condition {
        Condition::Down => 1,
        Condition::ScaledToZero => 2,
        Condition::Loading => 3,
        Condition::Up => 4,
        Condition::Running => 5,
        Condition::Asleep => 6,
    }
}

/// The same on every machine and in every version of this program.
fn hash(bytes: &[u8]) -> u64 {
    cityhash_102_128(bytes) as u64
}

fn state_name<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    name_of_state(state, serializer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Span;
    use crate::ledger::tests::columns_in;

    const MINUTE: u64 = 60_000_000;

    const RULES: &str = "v1 theta=0.5";

    fn window() -> Window {
        Window::at(Micros(1_780_000_005_000_000))
    }

    fn inputs() -> Inputs {
        Inputs {
            window: window(),
            tally: Tally {
                segments: 2,
                work: Work {
                    prompt_tokens: 7,
                    completion_tokens: 8,
                    ..Work::default()
                },
                hash: 99,
            },
            spans: Vec::new(),
            counted: None,
            gap: Work::default(),
        }
    }

    fn after(minutes: u64) -> Clock {
        Clock {
            now: Micros(window().span().to().0 + minutes * MINUTE),
            settle_us: 15 * MINUTE,
        }
    }

    fn head(inputs: &Inputs, edition: Edition) -> Head {
        Head {
            window_start: inputs.window,
            upstream: "chat".into(),
            bill: NanoUsd(15),
            busy_us: 0,
            segments: inputs.tally.segments,
            prompt_tokens: inputs.tally.work.prompt_tokens,
            completion_tokens: inputs.tally.work.completion_tokens,
            engine_prompt_tokens: None,
            engine_completion_tokens: None,
            unattributed_prompt_tokens: inputs.gap.prompt_tokens,
            unattributed_completion_tokens: inputs.gap.completion_tokens,
            facts: inputs.facts(),
            rules: RULES.into(),
            revision: edition.revision,
            state: edition.state,
            gateway_id: "gw".into(),
        }
    }

    fn standing(inputs: &Inputs, edition: Edition) -> Standing {
        Standing {
            head: Some(head(inputs, edition)),
            revision: edition.revision,
            is_whole: true,
        }
    }

    fn edition(inputs: &Inputs, standing: Option<&Standing>, minutes: u64) -> Option<Edition> {
        inputs.edition(standing, RULES, after(minutes), Recompute::ByFacts)
    }

    #[test]
    fn a_window_is_provisional_then_settled_then_restated_and_equal_facts_write_nothing() {
        let facts = inputs();
        let first = edition(&facts, None, 1).unwrap();
        assert_eq!((first.state, first.revision / REVISION), (State::Provisional, 1));
        let stands = standing(&facts, first);
        assert_eq!(edition(&facts, Some(&stands), 14), None);
        let second = edition(&facts, Some(&stands), 15).unwrap();
        assert_eq!((second.state, second.revision / REVISION), (State::Settled, 2));
        let stands = standing(&facts, second);
        assert_eq!(edition(&facts, Some(&stands), 999), None);
        let more = Inputs {
            gap: Work {
                completion_tokens: 1,
                ..Work::default()
            },
            ..facts
        };
        let third = edition(&more, Some(&stands), 999).unwrap();
        assert_eq!((third.state, third.revision / REVISION), (State::Restated, 3));
        assert_eq!(edition(&more, Some(&standing(&more, third)), 999), None);
        // A window that was never looked at while it was provisional.
        assert_eq!(
            edition(&inputs(), None, 20).map(|edition| edition.state),
            Some(State::Settled)
        );
    }

    #[test]
    fn anything_that_rows_follow_from_is_another_fact() {
        let facts = inputs();
        let stands = standing(&facts, edition(&facts, None, 20).unwrap());
        let changes: [fn(&mut Inputs); 6] = [
            |facts| facts.tally.hash += 1,
            |facts| facts.tally.segments += 1,
            |facts| facts.tally.work.prompt_tokens += 1,
            |facts| facts.tally.work.completion_tokens += 1,
            |facts| facts.gap.prompt_tokens += 1,
            |facts| {
                facts.spans.push(EngineSpan {
                    at: window().start(),
                    span: Span::new(window().start(), window().span().to()),
                    condition: Condition::Down,
                })
            },
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut changed = facts.clone();
            change(&mut changed);
            assert!(edition(&changed, Some(&stands), 20).is_some(), "change {number}");
        }
    }

    #[test]
    fn what_other_rules_computed_stays_until_it_is_asked_for() {
        let facts = inputs();
        let stands = standing(&facts, edition(&facts, None, 20).unwrap());
        let by = |facts: &Inputs, recompute| facts.edition(Some(&stands), "v1 theta=1", after(20), recompute);
        assert_eq!(by(&facts, Recompute::ByFacts), None);
        // By other rules the same differences can be another gap.
        let mut other_gap = facts.clone();
        other_gap.gap.completion_tokens += 1;
        assert_eq!(by(&other_gap, Recompute::ByFacts), None);
        let again = by(&facts, Recompute::ByRules).unwrap();
        assert_eq!(again.state, State::Restated);
        let mut late = facts;
        late.tally.segments += 1;
        assert!(by(&late, Recompute::ByFacts).is_some());
    }

    #[test]
    fn what_does_not_fit_together_is_written_anew_above_all_that_stands() {
        let facts = inputs();
        let mut stands = standing(&facts, edition(&facts, None, 20).unwrap());
        stands.is_whole = false;
        stands.revision = 7 * REVISION + 5;
        let healed = edition(&facts, Some(&stands), 20).unwrap();
        assert_eq!((healed.state, healed.revision / REVISION), (State::Restated, 8));
        stands.head = None;
        let healed = edition(&facts, Some(&stands), 20).unwrap();
        assert_eq!((healed.state, healed.revision / REVISION), (State::Settled, 8));
    }

    #[test]
    fn segments_that_are_gone_change_no_bill() {
        let facts = inputs();
        let mut stands = standing(&facts, edition(&facts, None, 1).unwrap());
        let mut fewer = facts;
        fewer.tally.segments -= 1;
        stands.is_whole = false;
        assert!(fewer.are_short_of(Some(&stands)));
        for recompute in [Recompute::ByFacts, Recompute::ByRules] {
            assert_eq!(fewer.edition(Some(&stands), "other", after(20), recompute), None);
        }
    }

    #[test]
    fn who_knows_the_same_writes_the_same_revision_and_who_does_not_another() {
        let mut other = inputs();
        other.tally.hash += 1;
        let (one, same) = (edition(&inputs(), None, 1), edition(&inputs(), None, 1));
        assert_eq!(one, same);
        assert_ne!(one, edition(&other, None, 1));
    }

    #[test]
    fn a_head_has_the_tables_columns() {
        let facts = inputs();
        let row = serde_json::to_value(head(&facts, edition(&facts, None, 1).unwrap())).unwrap();
        let mut fields: Vec<String> = row.as_object().unwrap().keys().cloned().collect();
        fields.push("computed_at".to_owned());
        fields.sort_unstable();
        let sql = include_str!("../../../sql/0005_ledger_windows.sql");
        assert_eq!(fields, columns_in(sql, "ledger_windows"));
    }

    #[test]
    fn facts_have_the_same_hash_in_every_version_of_the_program() {
        // Otherwise an upgrade would restate every window.
        assert_eq!(inputs().facts(), 14_725_836_323_768_279_940);
    }
}
