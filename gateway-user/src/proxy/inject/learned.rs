//! What earlier responses told about an upstream's models, as far as injection needs it.

use super::object::members;
use memchr::memmem;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Pairs of upstream and model that are remembered. Sites have tens; adapters can make it hundreds.
const MAX_ENTRIES: usize = 1_024;

/// Longest fingerprint that is remembered, as JSON text. vLLM's have about 25 bytes.
const MAX_FINGERPRINT_BYTES: usize = 256;

/// What an upstream puts as `system_fingerprint`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fingerprint {
    /// Not seen yet.
    #[default]
    Unknown,
    /// The server sends none (older ones do not).
    Absent,
    /// The value's JSON text, quotes included, so that it goes back exactly as it came.
    Text(Arc<str>),
}

impl Fingerprint {
    /// Out of a response that would carry a fingerprint if the server had one.
    pub(super) fn of(value: Option<&str>) -> Fingerprint {
        match value {
            None | Some("null") => Fingerprint::Absent,
            Some(text) if text.len() > MAX_FINGERPRINT_BYTES => Fingerprint::Unknown,
            Some(text) => Fingerprint::Text(text.into()),
        }
    }
}

/// What is known of a model on an upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Its fingerprint.
    pub fingerprint: Fingerprint,
    /// Whether its usage has `reasoning_tokens`: then vLLM counts all of a request's tokens again for every event that carries usage.
    pub reports_reasoning: Option<bool>,
}

impl Known {
    /// Reads it off the body of an unstreamed chat or text completion. `None` when the body is not one.
    pub fn of_document(body: &[u8]) -> Option<Known> {
        let (mut fingerprint, mut usage, mut choices) = (None, None, false);
        members(std::str::from_utf8(body).ok()?, |key, value| match &*key {
            "system_fingerprint" => fingerprint = Some(value),
            "usage" => usage = Some(value),
            "choices" => choices = true,
            _ => {}
        })?;
        usage.filter(|_| choices).map(|usage| Known {
            fingerprint: Fingerprint::of(fingerprint),
            reports_reasoning: Some(reports_reasoning(usage)),
        })
    }

    /// Reads a fingerprint off a piece of payload of a stream that nobody edits, if it stands there in one whole event. That is how a
    /// request with several choices, unedited for want of a fingerprint, serves the next one.
    pub fn of_unedited(payload: &[u8]) -> Option<Known> {
        memmem::find(payload, b"\"system_fingerprint\"")?;
        let text = std::str::from_utf8(payload).ok()?;
        let mut fingerprint = None;
        for event in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
            let (mut seen, mut choices) = (None, false);
            let whole = members(event, |key, value| match &*key {
                "system_fingerprint" => seen = Some(value),
                "choices" => choices = true,
                _ => {}
            });
            fingerprint = seen.filter(|_| whole.is_some() && choices).or(fingerprint);
        }
        fingerprint.map(|text| Known {
            fingerprint: Fingerprint::of(Some(text)),
            reports_reasoning: None,
        })
    }

    /// Whether `lesson` holds anything that is not known already.
    pub fn lacks(&self, lesson: &Known) -> bool {
        let reasoning = lesson.reports_reasoning;
        (lesson.fingerprint != Fingerprint::Unknown && lesson.fingerprint != self.fingerprint)
            || (reasoning.is_some() && reasoning != self.reports_reasoning)
    }

    fn learn(&mut self, lesson: &Known) {
        if lesson.fingerprint != Fingerprint::Unknown {
            self.fingerprint = lesson.fingerprint.clone();
        }
        self.reports_reasoning = lesson.reports_reasoning.or(self.reports_reasoning);
    }
}

/// Whether the text of a `usage` counts reasoning.
pub(super) fn reports_reasoning(usage: &str) -> bool {
    let mut found = false;
    let whole = members(usage, |key, details| {
        if key == "completion_tokens_details" {
            let _ = members(details, |key, count| {
                found |= key == "reasoning_tokens" && count != "null"
            });
        }
    });
    whole.is_some() && found
}

/// What was learned, by upstream and requested model. Shared by all requests: read once when a request is planned, written only when
/// a response told something new. Nothing is ever billed by it.
///
/// A full table (1,024 pairs) learns no further pairs: their requests with several choices stay unedited, all others do not need it.
#[derive(Debug, Default)]
pub struct Learned {
    upstreams: RwLock<HashMap<Box<str>, Models>>,
}

type Models = HashMap<Box<str>, Known>;

impl Learned {
    /// What is known of `model` on `upstream`.
    pub fn known(&self, upstream: &str, model: &str) -> Known {
        let upstreams = self.upstreams.read().unwrap_or_else(PoisonError::into_inner);
        let known = upstreams.get(upstream).and_then(|models| models.get(model));
        known.cloned().unwrap_or_default()
    }

    /// Takes note of what a response told.
    pub fn note(&self, upstream: &str, model: &str, lesson: &Known) {
        if !self.known(upstream, model).lacks(lesson) {
            return;
        }
        let mut upstreams = self.upstreams.write().unwrap_or_else(PoisonError::into_inner);
        let entries: usize = upstreams.values().map(HashMap::len).sum();
        if let Some(known) = upstreams
            .get_mut(upstream)
            .and_then(|models| models.get_mut(model))
        {
            known.learn(lesson);
        } else if entries < MAX_ENTRIES {
            let models = upstreams.entry(upstream.into()).or_default();
            models.insert(model.into(), lesson.clone());
        }
    }

    /// Forgets an upstream: it went down, and may come back as another server.
    pub fn forget(&self, upstream: &str) {
        let mut upstreams = self.upstreams.write().unwrap_or_else(PoisonError::into_inner);
        upstreams.remove(upstream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(text: &str) -> Known {
        Known {
            fingerprint: Fingerprint::of(Some(text)),
            reports_reasoning: None,
        }
    }

    #[test]
    fn lessons_add_up_by_upstream_and_model() {
        let learned = Learned::default();
        learned.note("a", "m", &fingerprint("\"f1\""));
        let reasoning = Known {
            fingerprint: Fingerprint::Unknown,
            reports_reasoning: Some(true),
        };
        learned.note("a", "m", &reasoning);
        let known = learned.known("a", "m");
        assert_eq!(known.fingerprint, Fingerprint::Text("\"f1\"".into()));
        assert_eq!(known.reports_reasoning, Some(true));
        learned.note("a", "m", &fingerprint("\"f2\""));
        assert_eq!(
            learned.known("a", "m").fingerprint,
            Fingerprint::Text("\"f2\"".into())
        );
        assert_eq!(learned.known("a", "other"), Known::default());
        assert_eq!(learned.known("b", "m"), Known::default());
    }

    #[test]
    fn an_upstream_that_went_down_is_forgotten_alone() {
        let learned = Learned::default();
        learned.note("a", "m", &fingerprint("\"f\""));
        learned.note("b", "m", &fingerprint("\"f\""));
        learned.forget("a");
        assert_eq!(learned.known("a", "m"), Known::default());
        assert_eq!(learned.known("b", "m"), fingerprint("\"f\""));
    }

    #[test]
    fn a_full_table_learns_no_new_pair_but_still_updates_old_ones() {
        let learned = Learned::default();
        for model in 0..MAX_ENTRIES {
            learned.note("a", &model.to_string(), &fingerprint("\"f\""));
        }
        learned.note("b", "one more", &fingerprint("\"f\""));
        assert_eq!(learned.known("b", "one more"), Known::default());
        learned.note("a", "7", &fingerprint("\"g\""));
        assert_eq!(learned.known("a", "7"), fingerprint("\"g\""));
        learned.forget("a");
        learned.note("b", "one more", &fingerprint("\"f\""));
        assert_eq!(learned.known("b", "one more"), fingerprint("\"f\""));
    }

    #[test]
    fn an_overlong_fingerprint_is_not_remembered() {
        let long = format!("\"{}\"", "f".repeat(MAX_FINGERPRINT_BYTES));
        assert_eq!(Fingerprint::of(Some(&long)), Fingerprint::Unknown);
        assert_eq!(Fingerprint::of(Some("null")), Fingerprint::Absent);
    }

    #[test]
    fn reasoning_is_read_out_of_usage() {
        let told = |usage| reports_reasoning(usage);
        assert!(told(r#"{"completion_tokens_details":{"reasoning_tokens":0}}"#));
        assert!(!told(
            r#"{"completion_tokens_details":{"reasoning_tokens":null}}"#
        ));
        assert!(!told(
            r#"{"completion_tokens":3,"completion_tokens_details":null}"#
        ));
        assert!(!told(r#"{"reasoning_tokens":3}"#));
        assert!(!told("null"));
    }
}
