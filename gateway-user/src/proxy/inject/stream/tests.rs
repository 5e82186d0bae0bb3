use super::*;
use proptest::prelude::*;

const USAGE: &str = r#""usage":{"prompt_tokens":1,"completion_tokens":2}"#;
const FINAL: &str = r#"data: {"id":"x","choices":[],"usage":{"prompt_tokens":1},"system_fingerprint":"new"}"#;
const DONE: &str = "data: [DONE]\n\n";

fn token(text: &str) -> String {
    format!(r#"data: {{"id":"x","choices":[{{"index":0,"text":{text:?},"finish_reason":null}}],{USAGE}}}"#)
        + "\n\n"
}

fn finish(index: u8) -> String {
    let choice = format!(r#"{{"index":{index},"text":"","finish_reason":"stop"}}"#);
    format!(r#"data: {{"id":"x","choices":[{choice}],{USAGE}}}"#) + "\n\n"
}

fn final_usage() -> String {
    format!("{FINAL}\n\n")
}

fn without_usage(event: &str) -> String {
    event.replace(&format!(",{USAGE}"), "")
}

fn with_fingerprint(event: &str, text: &str) -> String {
    without_usage(event).replace("}\n\n", &format!(",\"system_fingerprint\":\"{text}\"}}\n\n"))
}

fn strip(keeps_final: bool, single_choice: bool, fingerprint: &str) -> Strip {
    let fingerprint = match fingerprint {
        "" => Fingerprint::Unknown,
        text => Fingerprint::Text(format!("\"{text}\"").into()),
    };
    Strip {
        keeps_final,
        single_choice,
        known: Known {
            fingerprint,
            reports_reasoning: None,
        },
    }
}

fn run(strip: Strip, pieces: &[&[u8]]) -> String {
    let mut editor = StreamEditor::new(strip);
    let mut out = Vec::new();
    pieces.iter().for_each(|piece| editor.push(piece, &mut out));
    editor.finish(&mut out);
    String::from_utf8(out).unwrap()
}

fn run_one(fingerprint: &str, stream: &str) -> String {
    run(strip(false, true, fingerprint), &[stream.as_bytes()])
}

#[test]
fn text_that_looks_like_an_edit_is_left_alone() {
    let tricky = token("\"usage\":{} ,\"choices\":[],\"finish_reason\":\"stop\"}\n\n data: {");
    assert_eq!(run_one("f", &tricky), without_usage(&tricky));
    for stream in [
        r#"data: {"choices":[{"text":"\"usage\":{\"a\":1}","finish_reason":null}]}"#,
        r#"data: {"choices":[{"usage":{"a":1},"finish_reason":null}]}"#,
        r#"data: {"choices":[{"text":"\"choices\":[]","finish_reason":null}],"x":{"usage":{}}}"#,
        r#"data: {"choices":[]}"#,
        r#"data: {"error":{"message":"\"finish_reason\":\"stop\""},"usage":{"a":1}}"#,
        r#"data: {"choices":[{"finish_reason":"stop"}],"usage":{"a":1}"#,
        r#"data: {"choices":[{"finish_reason":"stop"}],"usage":{"a":1},"usage":{}}"#,
    ] {
        let stream = format!("{stream}\n\n");
        assert_eq!(run_one("f", &stream), stream);
    }
}

#[test]
fn other_shapes_of_event_streams_pass() {
    let event = token("a");
    let line = event.trim_end();
    for stream in [
        format!("{line}\r\n\r\n"),
        format!("{line}\r\r"),
        format!("{line}\nid: 1\n\n"),
        format!("id: 1\n{line}\n\n"),
        format!("event: x\n{line}\n\n"),
        format!("{}\n\n", line.replacen("data: ", "data:", 1)),
        format!("\u{feff}{line}\n\n"),
        ": keep-alive\n\n".to_owned(),
        "\n\n\n".to_owned(),
        DONE.to_owned(),
        line.to_owned(),
    ] {
        assert_eq!(run_one("f", &stream), stream);
        // The next block is read again.
        if stream.ends_with("\n\n") || stream.ends_with("\r\n\r\n") {
            assert_eq!(
                run_one("f", &(stream.clone() + &event)),
                stream + &without_usage(&event)
            );
        }
    }
}

#[test]
fn a_block_that_passes_ends_at_a_blank_line_only() {
    let (event, bare) = (token("a"), without_usage(&token("a")));
    for (passes, blank) in [
        ("data: {}\n\r\n", true),
        ("data: {}\r\n\n", true),
        (": a\n\rb\n", false),
        (": a\n\r\r\n", false),
        (": a\n", false),
    ] {
        let stream = passes.to_owned() + &event;
        let want = passes.to_owned() + if blank { &bare } else { &event };
        for cut in 0..stream.len() {
            let (front, back) = stream.as_bytes().split_at(cut);
            assert_eq!(run(strip(false, true, "f"), &[front, back]), want, "cut at {cut}");
        }
    }
}

#[test]
fn a_fingerprint_that_stands_in_its_place_stays_and_is_learned() {
    let event = finish(0).replace("}\n\n", ",\"system_fingerprint\":\"here\"}\n\n");
    let mut editor = StreamEditor::new(strip(false, true, "old"));
    let mut out = Vec::new();
    editor.push(event.as_bytes(), &mut out);
    assert_eq!(String::from_utf8(out).unwrap(), without_usage(&event));
    let lesson = editor.lesson().unwrap();
    assert_eq!(lesson.fingerprint, Fingerprint::Text("\"here\"".into()));
}

#[test]
fn what_passes_is_not_held() {
    let mut editor = StreamEditor::new(strip(false, true, ""));
    for piece in ["da", "ta: [D", "ONE]", "\n", "\n: keep", "-alive"] {
        let mut out = Vec::new();
        editor.push(piece.as_bytes(), &mut out);
        let expected = match piece {
            "da" => "",
            "ta: [D" => "data: [D",
            other => other,
        };
        assert_eq!(out, expected.as_bytes());
    }
}

#[test]
fn one_choice_is_held_until_the_fingerprint_in_force_is_seen() {
    let mut editor = StreamEditor::new(strip(false, true, "old"));
    let mut out = Vec::new();
    editor.push(finish(0).as_bytes(), &mut out);
    editor.push(b": keep-alive\n\n", &mut out);
    assert!(out.is_empty(), "the fingerprint is not known yet");
    editor.push(final_usage().as_bytes(), &mut out);
    let want = with_fingerprint(&finish(0), "new") + ": keep-alive\n\n";
    assert_eq!(String::from_utf8(out).unwrap(), want);
    let lesson = editor.lesson().unwrap();
    assert_eq!(lesson.fingerprint, Fingerprint::Text("\"new\"".into()));
}

#[test]
fn a_server_without_a_fingerprint_gets_none() {
    let last = final_usage().replace(r#","system_fingerprint":"new""#, "");
    let stream = finish(0) + &last + DONE;
    assert_eq!(run_one("old", &stream), without_usage(&finish(0)) + DONE);
}

#[test]
fn a_stream_that_ends_without_usage_goes_by_what_was_learned() {
    for rest in ["", DONE, "data: {\"error\":{\"message\":\"x\"}}\n\n"] {
        let stream = finish(0) + rest;
        assert_eq!(
            run_one("old", &stream),
            with_fingerprint(&finish(0), "old") + rest
        );
        assert_eq!(run_one("", &stream), without_usage(&finish(0)) + rest);
    }
}

#[test]
fn several_choices_get_the_learned_fingerprint_at_once() {
    let mut editor = StreamEditor::new(strip(false, false, "old"));
    for index in 0..2 {
        let mut out = Vec::new();
        editor.push(finish(index).as_bytes(), &mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            with_fingerprint(&finish(index), "old")
        );
    }
    let mut out = Vec::new();
    editor.push(final_usage().as_bytes(), &mut out);
    assert!(out.is_empty());
    assert!(
        editor.lesson().is_some(),
        "the server has another fingerprint now"
    );
}

#[test]
fn who_asked_for_the_final_usage_keeps_it_where_it_is() {
    let stream = token("a") + &finish(0) + &final_usage() + DONE;
    let want = without_usage(&token("a")) + &without_usage(&finish(0)) + &final_usage() + DONE;
    assert_eq!(run(strip(true, false, ""), &[stream.as_bytes()]), want);
}

#[test]
fn reasoning_is_learned_from_the_first_event_with_usage() {
    let mut editor = StreamEditor::new(strip(false, true, "f"));
    let details = r#""completion_tokens":2,"completion_tokens_details":{"reasoning_tokens":2}"#;
    let event = token("a").replace(r#""completion_tokens":2"#, details);
    editor.push(event.as_bytes(), &mut Vec::new());
    assert_eq!(editor.lesson().unwrap().reports_reasoning, Some(true));
}

#[test]
fn an_event_without_end_is_given_up_and_said_so() {
    let head = r#"data: {"choices":[{"text":""#;
    let filler = "x".repeat(64 * 1024);
    let mut editor = StreamEditor::new(strip(false, true, "old"));
    let (mut out, mut want) = (Vec::new(), with_fingerprint(&finish(0), "old") + head);
    editor.push(finish(0).as_bytes(), &mut out);
    editor.push(head.as_bytes(), &mut out);
    for _ in 0..MAX_EVENT_BYTES / filler.len() {
        assert_eq!(editor.stopped(), None);
        editor.push(filler.as_bytes(), &mut out);
        want.push_str(&filler);
    }
    assert_eq!(editor.stopped(), Some(Stopped::EventTooLong));
    let rest = "\"}]}\n\n".to_owned() + &token("a");
    editor.push(rest.as_bytes(), &mut out);
    assert!(out == (want + &rest).into_bytes(), "everything passes as it came");
}

#[test]
fn an_idle_stream_keeps_a_few_hundred_bytes() {
    let mut editor = StreamEditor::new(strip(false, true, ""));
    let long = token(&"x".repeat(100_000));
    let mut out = Vec::new();
    for event in [token("a"), long, token("b")] {
        let (front, back) = event.split_at(event.len() / 2);
        editor.push(front.as_bytes(), &mut out);
        editor.push(back.as_bytes(), &mut out);
        let held = editor.held.as_ref().map_or(0, |held| held.bytes.capacity());
        assert!(size_of::<StreamEditor>() + editor.partial.capacity() + held < 1024);
    }
}

fn any_block() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z\"{}\\\\\n]{0,6}".prop_map(|text| token(&text)),
        2 => (0u8..2).prop_map(finish),
        1 => Just(final_usage()),
        1 => Just(DONE.to_owned()),
        1 => Just(": keep-alive\n\n".to_owned()),
        1 => Just(token("a").replace('\n', "\r\n")),
        1 => Just(token("a").replace("\n\n", "\nid: 1\n\n")),
        1 => "[dat: {}\n\r]{0,12}",
        1 => Just("\n".to_owned()),
    ]
}

fn pieces<'s>(stream: &'s [u8], cuts: &[usize]) -> Vec<&'s [u8]> {
    let (mut rest, mut pieces) = (stream, Vec::new());
    for cut in cuts {
        let (piece, after) = rest.split_at((*cut).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces
}

proptest! {
    #[test]
    fn any_cut_gives_the_same_bytes(
        blocks in prop::collection::vec(any_block(), 0..12),
        cuts in prop::collection::vec(0usize..90, 0..60),
        (keeps_final, single_choice) in any::<(bool, bool)>(),
        fingerprint in prop_oneof![Just(""), Just("old")],
    ) {
        let stream = blocks.concat();
        let strip = strip(keeps_final, single_choice, fingerprint);
        let whole = run(strip.clone(), &[stream.as_bytes()]);
        prop_assert_eq!(run(strip.clone(), &pieces(stream.as_bytes(), &cuts)), &whole[..]);
        // Apart from usage and fingerprints nothing comes, goes or moves.
        let bare = |text: &str| {
            let text = text.replace(&final_usage(), "").replace(&format!(",{USAGE}"), "");
            text.replace(",\"system_fingerprint\":\"new\"", "").replace(",\"system_fingerprint\":\"old\"", "")
        };
        prop_assert_eq!(bare(&whole), bare(&stream));
    }

    #[test]
    fn bytes_that_are_no_chunks_pass_identical(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"data: {}\n\r:\""[..])], 0..400),
        cuts in prop::collection::vec(0usize..20, 0..40),
    ) {
        let mut editor = StreamEditor::new(strip(false, true, "old"));
        let mut out = Vec::new();
        pieces(&bytes, &cuts).iter().for_each(|piece| editor.push(piece, &mut out));
        editor.finish(&mut out);
        prop_assert_eq!(out, bytes);
    }
}
