//! Two runs of one request, held against each other.
//!
//! `created`, the random ids of tool calls and the run's own timings (`metrics`) differ between them. These values alone are masked.

use super::chunks;
use super::heads::{assert_same, text};
use serde_json::Value;
use std::collections::BTreeMap;

/// Blanks out what differs between two runs of one request.
fn masked(event: &str) -> String {
    let mut event = event.to_owned();
    for (key, is_value) in [
        (
            "\"created\":",
            (|next: char| next.is_ascii_digit()) as fn(char) -> bool,
        ),
        ("\"id\":\"chatcmpl-tool-", |next| next.is_ascii_hexdigit()),
        ("\"metrics\":{", |next| next != '}'),
    ] {
        let mut parts = event.split(key);
        let first = parts.next().unwrap_or_default().to_owned();
        event = parts.fold(first, |masked, part| {
            masked + key + "~" + part.trim_start_matches(is_value)
        });
    }
    event
}

/// The chunks of a stream, masked, and told apart by choice where several take turns: whose turn comes first is the engine's whim, but
/// each choice's own chunks are in order.
fn sequences(name: &str, stream: &[u8]) -> BTreeMap<Option<u64>, Vec<String>> {
    let (chunks, _) = chunks(stream).unwrap_or_else(|| panic!("{name}: not a whole stream"));
    let framed = chunks
        .iter()
        .map(|chunk| format!("{:x}\r\n{}\r\n", chunk.len(), text(chunk)));
    assert_same(
        &text(stream),
        &(framed.collect::<String>() + "0\r\n\r\n"),
        &format!("{name}, framing as uvicorn writes it"),
    );
    let mut sequences: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for chunk in chunks {
        let event = text(chunk);
        let json: Option<Value> = event
            .strip_prefix("data: ")
            .and_then(|data| serde_json::from_str(data).ok());
        let index = json
            .and_then(|json| json["choices"][0]["index"].as_u64())
            .filter(|_| name.contains("n2"));
        sequences.entry(index).or_default().push(masked(&event));
    }
    sequences
}

pub fn assert_same_stream(name: &str, got: &[u8], wanted: &[u8]) {
    let (got, wanted) = (sequences(name, got), sequences(name, wanted));
    assert_eq!(
        wanted.len(),
        if name.contains("n2") { 3 } else { 1 },
        "{name}: the choices, and what belongs to none"
    );
    assert_eq!(
        got.keys().collect::<Vec<_>>(),
        wanted.keys().collect::<Vec<_>>(),
        "{name}"
    );
    for (choice, wanted) in wanted {
        assert!(
            name.contains("n2") || wanted.len() > 5,
            "{name}: a capture without a stream proves nothing"
        );
        // Apart from each other by a byte that no capture has, so that chunk boundaries count.
        assert_same(
            &got[&choice].join("\0"),
            &wanted.join("\0"),
            &format!("{name}, choice {choice:?}"),
        );
    }
}
