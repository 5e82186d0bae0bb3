//! The scanner against a tree, and against what is no JSON.

use super::*;
use proptest::prelude::*;
use serde_json::Value;

/// Wants everything to a depth of a few levels, and writes down what it is told.
#[derive(Default)]
struct Everything(Vec<String>);

impl Reader for Everything {
    type Place = u8;

    const ROOT: u8 = 0;

    fn member(&mut self, object: u8, key: &[u8]) -> Option<u8> {
        self.0
            .push(format!("{object} {:?}", String::from_utf8_lossy(key)));
        (object < 5).then_some(object + 1)
    }

    fn element(&mut self, array: u8) -> Option<u8> {
        self.0.push(format!("{array} element"));
        (array < 5).then_some(array + 1)
    }

    fn wants_text(&self, _place: u8) -> bool {
        true
    }

    fn scalar(&mut self, place: u8, scalar: Scalar<'_>) {
        let number = |text: &str| {
            serde_json::from_str::<Value>(text).map_or_else(|_| text.to_owned(), |number| number.to_string())
        };
        self.0.push(match scalar {
            Scalar::Null => format!("{place} null"),
            Scalar::Bool(yes) => format!("{place} {yes}"),
            Scalar::Number(text) => format!("{place} {}", number(text)),
            Scalar::String { empty, text } => format!("{place} {text:?} {empty}"),
        });
    }

    fn begin(&mut self, place: u8, container: Container) {
        self.0.push(format!("{place} begin {container:?}"));
    }

    fn end(&mut self, place: u8) {
        self.0.push(format!("{place} end"));
    }
}

/// What a walk over the tree would tell.
fn walk(place: u8, value: &Value, told: &mut Everything) {
    match value {
        Value::Object(members) => {
            told.begin(place, Container::Object);
            for (key, value) in members {
                if let Some(below) = told.member(place, key.as_bytes()) {
                    walk(below, value, told);
                }
            }
            told.end(place);
        }
        Value::Array(elements) => {
            told.begin(place, Container::Array);
            for value in elements {
                if let Some(below) = told.element(place) {
                    walk(below, value, told);
                }
            }
            told.end(place);
        }
        Value::String(text) => {
            let (empty, text) = (
                text.is_empty(),
                (text.len() <= MAX_TEXT_BYTES).then_some(&text[..]),
            );
            told.scalar(place, Scalar::String { empty, text });
        }
        Value::Number(number) => told.scalar(place, Scalar::Number(&number.to_string())),
        Value::Bool(yes) => told.scalar(place, Scalar::Bool(*yes)),
        Value::Null => told.scalar(place, Scalar::Null),
    }
}

fn scan(pieces: &[&[u8]]) -> (Scanner<u8>, Vec<String>) {
    let (mut scanner, mut told) = (Scanner::new(), Everything::default());
    for piece in pieces {
        scanner.push(piece, &mut told);
    }
    (scanner, told.0)
}

/// A document with values of every kind, nested a few levels.
fn documents() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        any::<String>(),
        "[a-z]{200,300}",
        Just("\"\\/\u{8}\u{0}😀".to_owned())
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    let tree = leaf.prop_recursive(7, 60, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    });
    prop::collection::vec(tree, 0..4).prop_map(Value::from)
}

/// Writes everything that is not ASCII as `\u` escapes, as Python's `json.dumps` does.
fn escaped(text: &str) -> String {
    let mut units = [0; 2];
    let escape = |c: char| match c {
        ' '..='~' => c.to_string(),
        c => c
            .encode_utf16(&mut units)
            .iter()
            .map(|unit| format!("\\u{unit:04x}"))
            .collect(),
    };
    text.chars().map(escape).collect()
}

#[test]
fn broken_documents_stop_the_scanner() {
    for text in [
        "{]",
        "[}",
        "{\"a\" 1}",
        "{\"a\":}",
        "{,}",
        "[1 2]",
        "[1,,2]",
        "{1:2}",
        "{} {}",
        "{}x",
        "[\"\\x\"]",
        "[\"\\u12g4\"]",
        "}",
        ":",
        ",",
        "{\"a\":1,}",
    ] {
        assert!(scan(&[text.as_bytes()]).0.is_broken(), "{text}");
    }
    for text in ["", "{", "[1", "[\"a", "{\"a\":"] {
        let (scanner, _) = scan(&[text.as_bytes()]);
        assert!(!scanner.is_broken() && !scanner.is_done(), "{text}");
    }
}

#[test]
fn nesting_is_bounded() {
    let nested = |depth: usize| scan(&[&vec![b'['; depth]]).0.is_broken();
    assert!(!nested(usize::from(MAX_DEPTH)));
    assert!(nested(usize::from(MAX_DEPTH) + 1));
}

#[test]
fn half_a_surrogate_pair_becomes_a_replacement() {
    let text = |json: &str| scan(&[json.as_bytes()]).1[2].clone();
    assert_eq!(text(r#"["\ud83d\ude00"]"#), "1 Some(\"😀\") false");
    assert_eq!(text(r#"["\ud83dx"]"#), "1 Some(\"\u{fffd}x\") false");
    assert_eq!(text(r#"["\ud83d\ud83d\ude00"]"#), "1 Some(\"\u{fffd}😀\") false");
    assert_eq!(text(r#"["\ude00\ud83d"]"#), "1 Some(\"\u{fffd}\u{fffd}\") false");
    assert_eq!(text(r#"["\ud83d\n"]"#), "1 Some(\"\u{fffd}\\n\") false");
    assert_eq!(text(r#"["\u0000"]"#), "1 Some(\"\\0\") false");
}

#[test]
fn a_long_text_is_a_string_without_text() {
    let json = format!("[\"{}\"]", "a".repeat(MAX_TEXT_BYTES + 1));
    assert_eq!(scan(&[json.as_bytes()]).1[2], "1 None false");
    assert_eq!(
        scan(&[&json.as_bytes()[..9], &json.as_bytes()[9..]]).1[2],
        "1 None false"
    );
}

proptest! {
    #[test]
    fn it_finds_what_a_tree_holds(document in documents(), cuts in prop::collection::vec(1usize..20, 0..60)) {
        let plain = document.to_string();
        let mut expected = Everything::default();
        walk(0, &document, &mut expected);
        for text in [escaped(&plain), plain, serde_json::to_string_pretty(&document).unwrap()] {
            let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
            for cut in &cuts {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let (scanner, told) = scan(&pieces);
            prop_assert!(scanner.is_done());
            prop_assert_eq!(&told, &expected.0);
        }
    }

    #[test]
    fn no_input_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        scan(&[&bytes]);
    }

    #[test]
    fn nothing_that_looks_like_json_makes_it_panic(text in "[\\[\\]{}:,\"\\\\u0-9a-f \\-]{0,80}") {
        let (scanner, _) = scan(&[text.as_bytes()]);
        if serde_json::from_str::<Value>(&text).is_ok_and(|value| value.is_array() || value.is_object()) {
            prop_assert!(scanner.is_done());
        }
    }

    #[test]
    fn a_string_ends_where_a_search_byte_by_byte_says(
        // Neighbours of both bytes in value, and those that differ in the top bit alone, are what a search by words could mistake.
        bytes in prop::collection::vec(
            prop::sample::select(vec![b'a', 0, 0x21, b'"', 0x23, 0x5B, b'\\', 0x5D, 0x7F, 0x80, 0xA2, 0xDC, 0xFF]),
            0..40,
        ),
    ) {
        let expected = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\'));
        prop_assert_eq!(string_end(&bytes), expected);
    }
}
