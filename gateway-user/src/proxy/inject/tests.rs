//! Injection against captures of a real vLLM: one request sent three ways (`triple_*`), so that what the editor makes of the answer to
//! an edited request can be compared with what the server itself answers to the unedited one.

use super::*;
use crate::wire::endpoint::Endpoint;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

const TRIPLES: [&str; 5] = ["chat", "completion", "chat_n2", "tool", "logprobs"];

fn fixture(name: &str, variant: &str, extension: &str) -> Vec<u8> {
    let file = format!("tests/fixtures/vllm-0.32.0/triple_{name}_{variant}.{extension}");
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

fn body(message: &[u8]) -> &[u8] {
    &message[memchr::memmem::find(message, b"\r\n\r\n").unwrap() + 4..]
}

/// The payloads of the HTTP chunks of a response.
fn chunks(name: &str, variant: &str) -> Vec<Vec<u8>> {
    let response = fixture(name, variant, "response");
    let (mut rest, mut chunks) = (body(&response), Vec::new());
    loop {
        let line = memchr::memmem::find(rest, b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        let (chunk, after) = rest[line + 2..].split_at(size);
        if size == 0 {
            return chunks;
        }
        chunks.push(chunk.to_vec());
        rest = &after[2..];
    }
}

fn endpoint(name: &str) -> Endpoint {
    match name {
        "completion" => Endpoint::Completions,
        _ => Endpoint::ChatCompletions,
    }
}

/// What an n = 1 request to the captured server would have taught.
fn known() -> Known {
    Known {
        fingerprint: Fingerprint::Text("\"vllm-0.32.0-42cbcd32\"".into()),
        reports_reasoning: Some(false),
    }
}

fn plan_of(name: &str, variant: &str, mode: InjectMode, known: Known) -> Plan {
    plan(
        body(&fixture(name, variant, "request")),
        endpoint(name),
        mode,
        known,
    )
}

fn editor(name: &str, variant: &str, mode: InjectMode) -> StreamEditor {
    match plan_of(name, variant, mode, known()) {
        Plan::Edited { strip, .. } => StreamEditor::new(strip),
        Plan::Untouched(why) => panic!("{name}: {why:?}"),
    }
}

/// The HTTP chunks that the client gets.
fn edited(mut editor: StreamEditor, upstream: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut chunks = Vec::new();
    for chunk in upstream {
        let mut out = Vec::new();
        editor.push(chunk, &mut out);
        chunks.push(out);
    }
    let mut out = Vec::new();
    editor.finish(&mut out);
    assert_eq!(editor.stopped(), None);
    chunks.push(out);
    chunks.retain(|chunk| !chunk.is_empty());
    chunks
}

/// Blanks out what differs from one request to the next even without a proxy. Every byte else stays.
fn masked(chunks: &[Vec<u8>]) -> Vec<String> {
    let mask = |text: &str, key: &str, ends: &[char]| {
        let mut parts = text.split(key);
        let mut out = parts.next().unwrap().to_owned();
        for part in parts {
            out.push_str(key);
            out.push_str(&part[part.find(ends).unwrap()..]);
        }
        out
    };
    let mask_all = |chunk: &Vec<u8>| {
        let text = std::str::from_utf8(chunk).unwrap();
        let text = mask(text, "\"created\":", &[',']);
        mask(&mask(&text, "chatcmpl-tool-", &['"']), "\"metrics\":", &['}'])
    };
    chunks.iter().map(mask_all).collect()
}

/// The order in which choices take turns is the engine's whim; within a choice it is not.
fn by_choice(chunks: Vec<String>) -> BTreeMap<Option<u64>, Vec<String>> {
    let mut sequences: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for chunk in chunks {
        let json: Option<Value> = serde_json::from_str(chunk["data: ".len()..].trim()).ok();
        let index = json.and_then(|json| json["choices"][0]["index"].as_u64());
        sequences.entry(index).or_default().push(chunk);
    }
    sequences
}

fn assert_same_stream(name: &str, got: &[Vec<u8>], want: &[Vec<u8>]) {
    let (got, want) = (masked(got), masked(want));
    assert!(
        want.len() > 5,
        "{name}: a capture without a stream proves nothing"
    );
    if name == "chat_n2" {
        // Masking takes values out of the JSON, so the sequences are told apart by text that is JSON still.
        let valid = |chunks: Vec<String>| {
            chunks
                .into_iter()
                .map(|c| c.replace("\"created\":,", "\"created\":0,"))
        };
        assert_eq!(
            by_choice(valid(got).collect()),
            by_choice(valid(want).collect()),
            "{name}"
        );
    } else {
        assert_eq!(got, want, "{name}");
    }
}

#[test]
fn a_client_that_asked_for_nothing_gets_what_it_would_have_got_chunk_by_chunk() {
    for name in TRIPLES {
        let want = chunks(name, "none");
        for (asked, mode) in [("continuous", InjectMode::Auto), ("final", InjectMode::Final)] {
            let got = edited(editor(name, "none", mode), &chunks(name, asked));
            assert_same_stream(name, &got, &want);
        }
    }
}

#[test]
fn a_client_that_asked_for_the_final_usage_gets_that_and_no_more() {
    for name in TRIPLES {
        let got = edited(
            editor(name, "final", InjectMode::Auto),
            &chunks(name, "continuous"),
        );
        assert_same_stream(name, &got, &chunks(name, "final"));
    }
}

#[test]
fn without_a_learned_fingerprint_one_choice_is_edited_and_teaches_it() {
    for name in TRIPLES.into_iter().filter(|name| *name != "chat_n2") {
        let Plan::Edited { strip, .. } = plan_of(name, "none", InjectMode::Auto, Known::default()) else {
            panic!("{name} was not edited");
        };
        let mut editor = StreamEditor::new(strip);
        let mut out = Vec::new();
        editor.push(&chunks(name, "continuous").concat(), &mut out);
        assert_eq!(editor.lesson(), Some(&known()), "{name}");
        assert_eq!(masked(&[out]), masked(&[chunks(name, "none").concat()]), "{name}");
    }
}

#[test]
fn several_choices_wait_until_the_fingerprint_is_known_and_teach_it_unedited() {
    let unknown = plan_of("chat_n2", "none", InjectMode::Auto, Known::default());
    assert_eq!(unknown, Plan::Untouched(Untouched::FingerprintUnknown));
    let lessons: Vec<_> = chunks("chat_n2", "none")
        .iter()
        .filter_map(|chunk| Known::of_unedited(chunk))
        .collect();
    assert_eq!(lessons.len(), 2);
    assert!(
        lessons
            .iter()
            .all(|lesson| lesson.fingerprint == known().fingerprint)
    );
    // What the client asked for itself moves no fingerprint, so nothing has to be known.
    let asked = plan_of("chat_n2", "final", InjectMode::Auto, Known::default());
    assert!(matches!(asked, Plan::Edited { .. }));
}

#[test]
fn an_unstreamed_response_teaches_too() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vllm-0.32.0/chat.response");
    let response = std::fs::read(file).unwrap();
    assert_eq!(Known::of_document(body(&response)), Some(known()));
    assert_eq!(Known::of_document(br#"{"error":{"message":"x"}}"#), None);
    assert_eq!(Known::of_document(b"data: {}"), None);
}

#[test]
fn an_edited_request_asks_what_the_captured_one_asked() {
    for name in TRIPLES {
        for variant in ["none", "final"] {
            for (mode, want) in [
                (InjectMode::Continuous, "continuous"),
                (InjectMode::Final, "final"),
            ] {
                let plan = plan_of(name, variant, mode, known());
                if variant == want {
                    assert_eq!(plan, Plan::Untouched(Untouched::AlreadyAsked));
                    continue;
                }
                let Plan::Edited { body: sent, .. } = plan else {
                    panic!("{name} {variant} was not edited");
                };
                let sent: Value = serde_json::from_slice(&sent).unwrap();
                let captured: Value = serde_json::from_slice(body(&fixture(name, want, "request"))).unwrap();
                assert_eq!(sent, captured, "{name}");
            }
        }
        let all = plan_of(name, "continuous", InjectMode::Auto, known());
        assert_eq!(all, Plan::Untouched(Untouched::AlreadyAsked));
    }
}

#[test]
fn every_cut_gives_the_same_bytes() {
    for name in TRIPLES {
        for (variant, upstream) in [("none", "continuous"), ("final", "continuous")] {
            let payload = chunks(name, upstream).concat();
            let mut whole = Vec::new();
            let mut once = editor(name, variant, InjectMode::Auto);
            once.push(&payload, &mut whole);
            once.finish(&mut whole);
            let mut bytewise = editor(name, variant, InjectMode::Auto);
            let mut out = Vec::new();
            payload.iter().for_each(|byte| bytewise.push(&[*byte], &mut out));
            bytewise.finish(&mut out);
            assert!(out == whole, "{name}: byte by byte");
            for cut in 0..payload.len() {
                let mut editor = editor(name, variant, InjectMode::Auto);
                let mut out = Vec::new();
                editor.push(&payload[..cut], &mut out);
                editor.push(&payload[cut..], &mut out);
                editor.finish(&mut out);
                assert!(out == whole, "{name}: cut at {cut}");
            }
        }
    }
}
