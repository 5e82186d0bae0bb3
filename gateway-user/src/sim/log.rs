//! What each request used: a bounded ring, for tests that compare a gateway's books with the engine's.

use std::collections::VecDeque;

use serde::{Serialize, Serializer};

/// Requests remembered: several minutes of the heaviest load, in well under 100 MB.
pub const LOG_REQUESTS_MAX: usize = 200_000;

/// One request as the engine saw it. Times are CLOCK_MONOTONIC; zero means that it never came so far.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// Request id, path, model.
    #[serde(flatten, serialize_with = "by_name")]
    pub label: [String; 3],
    /// Prompt tokens counted by the engine, once for each sequence that was prefilled.
    pub prompt_tokens: u64,
    /// Tokens generated, over all choices.
    pub completion_tokens: u64,
    /// `stop`, `length` or `abort`.
    pub finished_reason: &'static str,
    /// The request was complete.
    pub arrived_ns: u64,
    /// Its first choice entered a step.
    pub scheduled_ns: u64,
    /// Its first choice had a token.
    pub first_token_ns: u64,
    /// Its last choice ended.
    pub ended_ns: u64,
}

/// The most recent requests.
#[derive(Debug, Default)]
pub struct RequestLog(VecDeque<Record>);

impl RequestLog {
    /// Adds a request, forgetting the oldest when full.
    pub fn push(&mut self, record: Record) {
        if self.0.len() == LOG_REQUESTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(record);
    }

    /// The requests that have ended, oldest first.
    pub fn records(&self) -> impl ExactSizeIterator<Item = &Record> {
        self.0.iter()
    }

    /// One JSON object a line, oldest first.
    pub fn to_json_lines(&self) -> String {
        let mut out = Vec::with_capacity(self.0.len() * 256);
        for record in &self.0 {
            // A Vec takes everything, and there is nothing in a record that is no JSON.
            let _ = serde_json::to_writer(&mut out, record);
            out.push(b'\n');
        }
        String::from_utf8_lossy(&out).into_owned()
    }
}

fn by_name<S: Serializer>(label: &[String; 3], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(["request_id", "path", "model"].into_iter().zip(label))
}
