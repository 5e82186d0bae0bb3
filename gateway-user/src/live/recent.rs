//! The last requests, for a look at single ones. They hold no text of a prompt or a completion.

use crate::event::{CapturedBy, RequestEvent};
use crate::ledger::NanoUsd;
use serde::{Serialize, Serializer};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Longest text of a field that a client or a server can make up.
const TEXT_BYTES_MAX: usize = 128;

/// A request that has ended, as `docs/API.md` describes it. Absent values are unknown.
#[derive(Clone, Debug, Serialize)]
pub struct RequestRow {
    /// Counts up from 1 since the start.
    pub sequence: u64,
    /// Its row's key in ClickHouse.
    pub event_id: Box<str>,
    /// Wall clock at its first byte.
    pub started_at_us: i64,
    /// Who pays; empty when it never said so.
    pub team: Box<str>,
    /// The model, cut.
    pub model: Box<str>,
    /// The upstream; empty when it got to none.
    pub upstream: Box<str>,
    /// The route.
    pub endpoint: &'static str,
    /// Whether it was streamed.
    pub stream: bool,
    /// Which path saw it.
    pub capture: CapturedBy,
    /// The response's; 0 for none.
    pub status_code: u16,
    /// How it ended.
    pub outcome: &'static str,
    /// Type of the error, cut; empty for none.
    pub error_type: Box<str>,
    /// Where the tokens come from.
    pub usage_source: &'static str,
    /// Billed prompt tokens.
    pub prompt_tokens: Option<u64>,
    /// Those out of the prefix cache.
    pub cached_tokens: Option<u64>,
    /// Billed completion tokens.
    pub completion_tokens: Option<u64>,
    /// What it is charged.
    #[serde(serialize_with = "as_number")]
    pub charge_nano_usd: NanoUsd,
    /// What the gateway itself took.
    pub gateway_overhead_us: Option<u64>,
    /// Time in vLLM's queue, when vLLM says so.
    pub queue_us: Option<u64>,
    /// Start to the first chunk with content.
    pub ttft_us: Option<u64>,
    /// Start to end.
    pub duration_us: u64,
}

impl RequestRow {
    /// What is shown of an event. It has no number yet.
    pub fn of(event: &RequestEvent) -> RequestRow {
        RequestRow {
            sequence: 0,
            event_id: event.event_id.clone(),
            started_at_us: event.started_at_us,
            team: event.team_id.clone(),
            model: cut(&event.model),
            upstream: event.upstream.clone(),
            endpoint: event.endpoint,
            stream: event.stream,
            capture: event.capture,
            status_code: event.status_code,
            outcome: event.outcome.name(),
            error_type: cut(&event.error_type),
            usage_source: event.usage_source.name(),
            prompt_tokens: event.prompt_tokens,
            cached_tokens: event.cached_tokens,
            completion_tokens: event.completion_tokens,
            charge_nano_usd: event.charge,
            gateway_overhead_us: event.gateway_overhead_us,
            queue_us: event.queue_us,
            ttft_us: event.ttft_us,
            duration_us: event.duration_us,
        }
    }
}

/// The last rows, up to a number of them.
#[derive(Debug)]
pub struct Recent {
    rows_max: usize,
    rows: Mutex<Numbered>,
}

#[derive(Debug, Default)]
struct Numbered {
    rows: VecDeque<Arc<RequestRow>>,
    last: u64,
}

impl Recent {
    /// Room for `rows_max`.
    pub fn up_to(rows_max: usize) -> Recent {
        Recent {
            rows_max,
            rows: Mutex::default(),
        }
    }

    /// Adds a row, which gets its number; the oldest makes room. The lock is held for no more than that.
    pub fn push(&self, row: RequestRow) -> Arc<RequestRow> {
        let mut row = Arc::new(row);
        let mut held = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        held.last += 1;
        if let Some(row) = Arc::get_mut(&mut row) {
            row.sequence = held.last;
        }
        let oldest = (held.rows.len() >= self.rows_max)
            .then(|| held.rows.pop_front())
            .flatten();
        held.rows.push_back(Arc::clone(&row));
        drop(held);
        drop(oldest);
        row
    }

    /// Keeps a row that has a number already.
    pub fn keep(&self, row: &Arc<RequestRow>) {
        let mut held = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if held.rows.len() >= self.rows_max {
            held.rows.pop_front();
        }
        held.rows.push_back(Arc::clone(row));
    }

    /// The rows with numbers above `after`, at most `rows_max`, newest first.
    pub fn after(&self, after: u64, rows_max: usize) -> Vec<Arc<RequestRow>> {
        let held = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let newest_first = held.rows.iter().rev().filter(|row| row.sequence > after);
        newest_first.take(rows_max).cloned().collect()
    }
}

/// The beginning of a text.
fn cut(text: &str) -> Box<str> {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].into()
}

/// Rows as JSON.
pub(super) fn as_objects<S: Serializer>(rows: &[Arc<RequestRow>], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(rows.iter().map(|row| &**row))
}

fn as_number<S: Serializer>(amount: &NanoUsd, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(amount.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(&*cut("opt"), "opt");
        let long = "ü".repeat(1_000_000);
        assert_eq!(cut(&long).len(), TEXT_BYTES_MAX);
        assert_eq!(cut(&format!("a{long}")).len(), TEXT_BYTES_MAX - 1);
    }
}
