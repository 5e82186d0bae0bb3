//! The members of a JSON object, where they stand in its text.
//!
//! An edit must leave every other byte as it is, so nothing is parsed and written again: an object is walked once, and each member's
//! value is handed out as a slice of the text.

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

/// Walks over the members of the object that `text` is, in order: unescaped key, and the value's text. `None` when `text` is
/// anything else than one whole, valid JSON object; `visit` may have been called by then.
pub(super) fn members<'t>(text: &'t str, visit: impl FnMut(Cow<'t, str>, &'t str)) -> Option<()> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    deserializer.deserialize_map(Walk(visit)).ok()?;
    deserializer.end().ok()
}

/// Where `part`, a slice of `whole`, stands in it.
pub(super) fn span(whole: &str, part: &str) -> Range<usize> {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    start..start + part.len()
}

/// Whether the value is an array without elements; `None` when it is no array.
pub(super) fn is_empty_array(value: &str) -> Option<bool> {
    let inside = value.strip_prefix('[')?.strip_suffix(']')?;
    Some(inside.trim_ascii().is_empty())
}

#[derive(Deserialize)]
struct Key<'t>(#[serde(borrow)] Cow<'t, str>);

struct Walk<F>(F);

impl<'t, F: FnMut(Cow<'t, str>, &'t str)> Visitor<'t> for Walk<F> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'t>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((Key(key), value)) = map.next_entry::<Key<'t>, &'t RawValue>()? {
            (self.0)(key, value.get());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(text: &str) -> Option<Vec<(String, &str)>> {
        let mut seen = Vec::new();
        members(text, |key, value| seen.push((key.into_owned(), value)))?;
        Some(seen)
    }

    #[test]
    fn members_come_in_order_with_their_text() {
        let text = r#" { "a" : [1, {"b":2}] ,"\u0062": "x\"}" } "#;
        let seen = walk(text).unwrap();
        assert_eq!(
            seen,
            [("a".to_owned(), r#"[1, {"b":2}]"#), ("b".to_owned(), r#""x\"}""#)]
        );
        assert_eq!(&text[span(text, seen[0].1)], seen[0].1);
    }

    #[test]
    fn anything_but_one_object_is_refused() {
        for text in ["", "[]", "1", "{", r#"{"a":1} {"#, r#"{"a":1,}"#, r#"{"a":NaN}"#] {
            assert_eq!(walk(text), None, "{text}");
        }
    }
}
