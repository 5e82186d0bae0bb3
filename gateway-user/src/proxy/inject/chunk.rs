//! One chunk of a chat or text completion: an event of a stream, and where in it stands what may have to go.

use super::object::{is_empty_array, members, span};
use memchr::memmem;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::ops::Range;

/// How an event that may need an edit begins.
pub(super) const EVENT_START: &[u8] = b"data: {";

/// An event with `choices`.
pub(super) struct Chunk<'e> {
    /// The whole event, from `data:` to the blank line.
    pub(super) event: &'e str,
    pub(super) usage: Option<Usage<'e>>,
    /// The value of `system_fingerprint`.
    pub(super) fingerprint: Option<&'e str>,
    /// Whether a choice has a `finish_reason`.
    pub(super) finishes: bool,
    has_choices: bool,
}

/// A `usage` other than `null`.
#[derive(Clone, Copy)]
pub(super) struct Usage<'e> {
    pub(super) value: &'e str,
    /// Where the value of the member before it ends; `None` when it is the first.
    before: Option<usize>,
}

#[derive(Deserialize)]
struct Choice {
    finish_reason: Option<IgnoredAny>,
}

impl<'e> Chunk<'e> {
    /// Reads a whole event (`data: {…}`, LF, LF). `None` when it is anything else than a chunk: then it passes as it is. Choices are
    /// only looked into when the event `may_finish`.
    pub(super) fn read(event: &'e str, may_finish: bool) -> Option<Chunk<'e>> {
        let (mut usage, mut fingerprint, mut choices) = (None, None, None);
        let (mut repeated, mut before) = (false, None);
        members(&event[EVENT_START.len() - 1..], |key, value| {
            match &*key {
                "usage" => repeated |= usage.replace(Usage { value, before }).is_some(),
                "system_fingerprint" => repeated |= fingerprint.replace(value).is_some(),
                "choices" => repeated |= choices.replace(value).is_some(),
                _ => {}
            }
            before = Some(span(event, value).end);
        })?;
        let choices = choices.filter(|_| !repeated)?;
        Some(Chunk {
            event,
            usage: usage.filter(|usage| usage.value != "null"),
            fingerprint,
            finishes: may_finish && has_finish_reason(choices)?,
            has_choices: !is_empty_array(choices)?,
        })
    }

    /// Whether this is the last chunk, which only a request for usage brings about.
    pub(super) fn is_final_usage(&self) -> bool {
        !self.has_choices && self.usage.is_some()
    }

    /// Appends the event without its usage. Returns the place, counted from where the event begins in `out`, at which one more
    /// member can be put last.
    pub(super) fn write_without_usage(&self, out: &mut Vec<u8>) -> usize {
        let gone = self.usage.map_or(0..0, |usage| self.member(usage));
        let closing_brace = self.event.trim_ascii_end().len() - 1;
        out.extend_from_slice(&self.event.as_bytes()[..gone.start]);
        out.extend_from_slice(&self.event.as_bytes()[gone.end..]);
        closing_brace - gone.len()
    }

    /// Where the member stands, with one comma: the one before it or, for the first member, the one behind it.
    fn member(&self, usage: Usage<'_>) -> Range<usize> {
        let end = span(self.event, usage.value).end;
        if let Some(before) = usage.before {
            return before..end;
        }
        let behind = &self.event[end..];
        let spaces = behind.len() - behind.trim_ascii_start().len();
        let comma = behind[spaces..].starts_with(',');
        EVENT_START.len()..if comma { end + spaces + 1 } else { end }
    }
}

fn has_finish_reason(choices: &str) -> Option<bool> {
    let choices: Vec<Choice> = serde_json::from_str(choices).ok()?;
    Some(choices.iter().any(|choice| choice.finish_reason.is_some()))
}

/// Whether an event shows a `finish_reason` other than `null`: most do not, and are spared a closer look.
pub(super) fn finish_reason_shows(event: &[u8]) -> bool {
    const KEY: &[u8] = b"\"finish_reason\"";
    memmem::find_iter(event, KEY).any(|at| !event[at + KEY.len()..].starts_with(b":null"))
}

/// Puts the member behind all others; `slot` is the place of the object's closing brace.
pub(super) fn put_fingerprint(bytes: &mut Vec<u8>, slot: usize, text: &str) {
    let member = [r#","system_fingerprint":"#, text].concat();
    bytes.splice(slot..slot, member.into_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_usage(json: &str) -> Option<String> {
        let (event, mut out) = (format!("data: {json}\n\n"), Vec::new());
        let slot = Chunk::read(&event, true)?.write_without_usage(&mut out);
        assert_eq!(out[slot], b'}', "{json}");
        let text = String::from_utf8(out).unwrap();
        Some(text.strip_prefix("data: ")?.strip_suffix("\n\n")?.to_owned())
    }

    #[test]
    fn usage_goes_with_one_comma_wherever_it_stands() {
        for (with, without) in [
            (r#"{"choices":[1],"usage":{"a":1}}"#, r#"{"choices":[1]}"#),
            (
                r#"{"choices":[1],"usage":{"a":1},"x":null}"#,
                r#"{"choices":[1],"x":null}"#,
            ),
            (r#"{"usage":{"a":{}},"choices":[1]}"#, r#"{"choices":[1]}"#),
            (r#"{ "usage" : {"a":1} , "choices":[1]}"#, r#"{ "choices":[1]}"#),
            (r#"{"choices":[1] , "usage" : {"a":1} }"#, r#"{"choices":[1] }"#),
            (r#"{"choices":[1],"us\u0061ge":{"a":1}}"#, r#"{"choices":[1]}"#),
            (
                r#"{"choices":[1],"usage":null}"#,
                r#"{"choices":[1],"usage":null}"#,
            ),
        ] {
            let with = with.replace("[1]", r#"[{"index":0}]"#);
            let without = without.replace("[1]", r#"[{"index":0}]"#);
            assert_eq!(without_usage(&with), Some(without));
        }
    }

    #[test]
    fn what_is_no_chunk_is_not_read() {
        for json in [
            r#"{"usage":{"a":1}}"#,
            r#"{"error":{"message":"\"usage\""},"usage":{}}"#,
            r#"{"choices":{},"usage":{}}"#,
            r#"{"choices":[],"choices":[],"usage":{}}"#,
            r#"{"choices":[],"usage":{},"usage":{}}"#,
            r#"{"choices":[],"usage":{}"#,
            r#"{"choices":["finish_reason"],"usage":{}}"#,
        ] {
            assert_eq!(without_usage(json), None, "{json}");
        }
    }

    #[test]
    fn only_a_reason_that_is_one_finishes() {
        let finishes = |json: &str| {
            let event = format!("data: {json}\n\n");
            finish_reason_shows(event.as_bytes()) && Chunk::read(&event, true).unwrap().finishes
        };
        assert!(finishes(r#"{"choices":[{"finish_reason":"stop"}]}"#));
        assert!(finishes(
            r#"{"choices":[{"finish_reason":null},{"finish_reason": "length"}]}"#
        ));
        assert!(!finishes(r#"{"choices":[{"finish_reason":null}]}"#));
        assert!(!finishes(r#"{"choices":[{"finish_reason": null}]}"#));
        assert!(!finishes(
            r#"{"choices":[{"text":"\"finish_reason\":\"stop\"","finish_reason":null}]}"#
        ));
        assert!(!finishes(r#"{"choices":[{"delta":{"finish_reason":"stop"}}]}"#));
    }
}
