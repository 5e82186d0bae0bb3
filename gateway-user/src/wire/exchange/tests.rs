//! What an exchange makes of every shape of response, of breaks and of holes.

use super::*;
use proptest::prelude::*;

/// Memory of one exchange: thousands of streams idle at once, and each holds one of these.
const MAX_EXCHANGE_BYTES: usize = 1_024;

const _: () = assert!(size_of::<Exchange>() <= MAX_EXCHANGE_BYTES);

const SSE_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
const JSON_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n";

fn exchange(path: &str, request: &str, head: &str) -> Exchange {
    let text = format!("POST {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let (parsed, _) = RequestHead::parse(text.as_bytes(), 1_024).unwrap().unwrap();
    let mut exchange = Exchange::begin(At(0), &parsed);
    exchange.request_body(Piece::Bytes(request.as_bytes()));
    let (parsed, _) = ResponseHead::parse(head.as_bytes(), 1_024, "POST")
        .unwrap()
        .unwrap();
    exchange.response_head(At(1_000), &parsed);
    exchange
}

/// Feeds the events a microsecond apart from 10 µs on.
fn stream(path: &str, request: &str, events: &[&str], ending: Ending) -> Facts {
    let mut exchange = exchange(path, request, SSE_HEAD);
    for (event, at_us) in events.iter().zip(10..) {
        let text = format!("data: {}\n\n", event.replace('\n', "\ndata: "));
        exchange.response_body(At(at_us * 1_000), Piece::Bytes(text.as_bytes()));
    }
    exchange.finish(At(99_000), ending)
}

fn document(path: &str, request: &str, body: &str) -> Facts {
    let mut exchange = exchange(path, request, JSON_HEAD);
    exchange.response_body(At(2_000), Piece::Bytes(body.as_bytes()));
    exchange.finish(At(3_000), Ending::Complete)
}

fn chat_chunk(index: u32, delta: &str, usage: &str) -> String {
    format!(r#"{{"model":"m","choices":[{{"index":{index},"delta":{delta}}}],"usage":{usage}}}"#)
}

const CHAT: &str = "/v1/chat/completions";

#[test]
fn only_generated_content_makes_a_first_token() {
    for silent in [
        r#"{"role":"assistant","content":""}"#,
        "{}",
        r#"{"content":null,"tool_calls":[],"reasoning":"","function_call":null}"#,
    ] {
        let facts = stream(CHAT, "{}", &[&chat_chunk(0, silent, "null")], Ending::Complete);
        assert_eq!((facts.chunks, facts.ttft_us), (0, None), "{silent}");
    }
    for said in [
        r#"{"content":"a"}"#,
        r#"{"content":"\n"}"#,
        r#"{"reasoning":"a"}"#,
        r#"{"reasoning_content":"a"}"#,
        r#"{"refusal":"no"}"#,
        r#"{"content":null,"tool_calls":[{"index":0,"function":{"name":"f"}}]}"#,
        r#"{"function_call":{"name":"f"}}"#,
    ] {
        let facts = stream(
            CHAT,
            "{}",
            &["{}", &chat_chunk(0, said, "null")],
            Ending::Complete,
        );
        assert_eq!((facts.chunks, facts.ttft_us), (1, Some(11)), "{said}");
    }
}

#[test]
fn gaps_lie_between_chunks_with_content() {
    let (said, silent) = (
        chat_chunk(0, r#"{"content":"a"}"#, "null"),
        chat_chunk(0, "{}", "null"),
    );
    let facts = stream(CHAT, "{}", &[&said, &silent, &said, &said], Ending::Complete);
    assert_eq!(
        (facts.gaps.count, facts.gaps.sum_us, facts.gaps.max_us),
        (2, 3, 2)
    );
    assert_eq!(facts.usage_source, UsageSource::Counted);
    assert_eq!(facts.tokens, Tokens::default());
}

#[test]
fn a_chunk_without_text_may_carry_token_ids_instead() {
    let ids = r#"{"choices":[{"index":0,"token_ids":[7,8]}]}"#;
    let empty = r#"{"choices":[{"index":0,"token_ids":[]}]}"#;
    let facts = stream("/inference/v1/generate", "{}", &[empty, ids], Ending::Complete);
    assert_eq!((facts.chunks, facts.ttft_us), (1, Some(11)));
    // In chat they stand beside the text, which decides.
    let beside = r#"{"choices":[{"index":0,"delta":{"content":""},"token_ids":[7]}]}"#;
    assert_eq!(stream(CHAT, "{}", &[beside], Ending::Complete).chunks, 0);
}

fn choice_usage(index: u32, prompt: u64, completion: u64) -> String {
    let usage = format!(r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion}}}"#);
    chat_chunk(index, r#"{"content":"a"}"#, &usage)
}

#[test]
fn a_stream_that_breaks_off_has_the_sum_of_its_choices() {
    let chunks = [
        choice_usage(0, 19, 1),
        choice_usage(1, 19, 5),
        choice_usage(0, 19, 2),
    ];
    let chunks = chunks.each_ref().map(String::as_str);
    let expected = Tokens {
        prompt: Some(19),
        completion: Some(7),
        engine_prompt: Some(38),
        engine_completion: Some(7),
        ..Tokens::default()
    };
    // With the request unseen, the choices themselves tell how many there are.
    for request in [r#"{"n":2}"#, ""] {
        let facts = stream(CHAT, request, &chunks, Ending::ClientGone);
        assert_eq!(
            (facts.tokens, facts.usage_source),
            (expected, UsageSource::Continuous)
        );
        assert_eq!(facts.outcome, Outcome::Aborted);
    }
}

#[test]
fn choices_of_several_prompts_have_their_own_prompts() {
    let request = r#"{"n":2,"prompt":["a","b"]}"#;
    let chunk = |index, prompt| choice_usage(index, prompt, 1);
    let all = [chunk(0, 5), chunk(1, 5), chunk(3, 7), chunk(2, 7)];
    let all = all.each_ref().map(String::as_str);
    let facts = stream("/v1/completions", request, &all, Ending::ClientGone);
    assert_eq!(
        (facts.tokens.prompt, facts.tokens.engine_prompt),
        (Some(12), Some(24))
    );
    assert_eq!(facts.tokens.completion, Some(4));
    // The second prompt has not been heard of: its length is unknown, and so is the sum.
    let facts = stream("/v1/completions", request, &all[..2], Ending::ClientGone);
    assert_eq!((facts.tokens.prompt, facts.tokens.completion), (None, Some(2)));
    // Unseen requests of this route may have several prompts or several choices.
    let facts = stream("/v1/completions", "", &all, Ending::ClientGone);
    assert_eq!((facts.tokens.prompt, facts.tokens.completion), (None, Some(4)));
}

#[test]
fn a_stream_with_too_many_choices_has_unknown_tokens() {
    let chunks = [choice_usage(0, 3, 1), choice_usage(400, 3, 1)];
    let chunks = chunks.each_ref().map(String::as_str);
    let facts = stream(CHAT, r#"{"n":500}"#, &chunks, Ending::ClientGone);
    assert_eq!(
        (facts.tokens, facts.usage_source),
        (Tokens::default(), UsageSource::Counted)
    );
}

#[test]
fn the_final_usage_counts_whatever_comes_after_it() {
    let last = r#"{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":9,
        "prompt_tokens_details":{"cached_tokens":2},"completion_tokens_details":{"reasoning_tokens":3}}}"#;
    let chunk = choice_usage(0, 4, 8);
    for ending in [Ending::Complete, Ending::ClientGone, Ending::UpstreamClosed] {
        let facts = stream(CHAT, "{}", &[&chunk, last], ending);
        assert_eq!(facts.usage_source, UsageSource::Reported);
        let tokens = facts.tokens;
        assert_eq!((tokens.prompt, tokens.cached), (Some(4), Some(2)));
        assert_eq!((tokens.completion, tokens.reasoning), (Some(9), Some(3)));
    }
    // Ended whole, but never summed up.
    let facts = stream(CHAT, "{}", &[&chunk, "[DONE]"], Ending::Complete);
    assert_eq!(
        (facts.usage_source, facts.outcome),
        (UsageSource::Continuous, Outcome::Completed)
    );
    assert_eq!(facts.tokens.completion, Some(8));
}

#[test]
fn anthropic_input_leaves_out_what_the_cache_gave_and_took() {
    let body = r#"{"type":"message","model":"m","stop_reason":"end_turn","usage":{"input_tokens":10,
        "output_tokens":5,"cache_read_input_tokens":30,"cache_creation_input_tokens":2}}"#;
    let facts = document("/v1/messages", "{}", body);
    assert_eq!((facts.tokens.prompt, facts.tokens.cached), (Some(42), Some(30)));
    assert_eq!(
        (facts.tokens.engine_prompt, facts.tokens.engine_completion),
        (Some(42), Some(5))
    );
    assert_eq!(facts.finish_reason.as_deref(), Some("end_turn"));
}

#[test]
fn anthropic_streams_tell_input_first_and_output_last() {
    let start = r#"{"type":"message_start","message":{"model":"m","content":[],"usage":{"input_tokens":10,
        "cache_read_input_tokens":3,"output_tokens":0}}}"#;
    let delta = |delta: &str| format!(r#"{{"type":"content_block_delta","index":0,"delta":{delta}}}"#);
    let (thinking, json, signature) = (
        delta(r#"{"type":"thinking_delta","thinking":"a"}"#),
        delta(r#"{"type":"input_json_delta","partial_json":"{"}"#),
        delta(r#"{"type":"signature_delta","signature":"a"}"#),
    );
    let end = r#"{"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":6}}"#;
    let events = [
        start,
        &signature,
        &thinking,
        &json,
        end,
        r#"{"type":"message_stop"}"#,
    ];
    let facts = stream("/v1/messages", "{}", &events, Ending::Complete);
    assert_eq!((facts.chunks, facts.ttft_us), (2, Some(12)));
    assert_eq!(
        (facts.tokens.prompt, facts.tokens.completion),
        (Some(13), Some(6))
    );
    assert_eq!(facts.usage_source, UsageSource::Reported);
    assert_eq!(facts.finish_reason.as_deref(), Some("tool_use"));
    // Broken off: the prompt is known, what was generated is not, and half a usage is not billed as a whole one.
    let facts = stream("/v1/messages", "{}", &events[..4], Ending::ClientGone);
    assert_eq!((facts.tokens.prompt, facts.tokens.completion), (Some(13), None));
    assert_eq!(facts.usage_source, UsageSource::Counted);
}

#[test]
fn responses_streams_count_every_kind_of_generated_delta() {
    let delta = |kind: &str, text: &str| format!(r#"{{"delta":"{text}","type":"response.{kind}.delta"}}"#);
    for kind in [
        "output_text",
        "reasoning_text",
        "reasoning_summary_text",
        "function_call_arguments",
        "refusal",
    ] {
        let events = [delta(kind, ""), delta(kind, "a")];
        let facts = stream(
            "/v1/responses",
            "{}",
            &events.each_ref().map(String::as_str),
            Ending::Complete,
        );
        assert_eq!((facts.chunks, facts.ttft_us), (1, Some(11)), "{kind}");
    }
    let end = r#"{"response":{"model":"m","status":"completed","incomplete_details":null,"error":null,"usage":
        {"input_tokens":7,"output_tokens":9,"output_tokens_details":{"reasoning_tokens":4}}},
        "type":"response.completed"}"#;
    let facts = stream("/v1/responses", "{}", &[end], Ending::Complete);
    assert_eq!((facts.tokens.prompt, facts.tokens.reasoning), (Some(7), Some(4)));
    assert_eq!(
        (facts.outcome, facts.usage_source),
        (Outcome::Completed, UsageSource::Reported)
    );
    assert_eq!(facts.finish_reason.as_deref(), Some("completed"));
}

#[test]
fn pooling_routes_report_in_four_ways() {
    let prompt = |path: &str, body: &str| {
        let tokens = document(path, r#"{"n":3}"#, body).tokens;
        assert_eq!(
            tokens.engine_prompt, tokens.prompt,
            "no choices here, whatever the body says"
        );
        tokens.prompt
    };
    let usage = r#"{"data":[{"embedding":[NaN,-1.5e-7]}],"usage":{"prompt_tokens":6,"total_tokens":6}}"#;
    assert_eq!(prompt("/v1/embeddings", usage), Some(6));
    assert_eq!(
        prompt("/rerank", r#"{"results":[],"usage":{"total_tokens":8}}"#),
        Some(8)
    );
    let billed = r#"{"embeddings":{},"meta":{"billed_units":{"input_tokens":9,"image_tokens":null}}}"#;
    assert_eq!(prompt("/v2/embed", billed), Some(9));
    assert_eq!(prompt("/score", r#"{"data":[],"usage":null}"#), None);
}

#[test]
fn seconds_of_audio_are_no_tokens() {
    let facts = document(
        "/v1/audio/transcriptions",
        "",
        r#"{"text":"a","usage":{"type":"duration","seconds":3}}"#,
    );
    assert_eq!(
        (facts.tokens, facts.usage_source),
        (Tokens::default(), UsageSource::None)
    );
    let delta = r#"{"object":"transcription.chunk","choices":[{"delta":{"content":" a"}}]}"#;
    assert_eq!(
        stream("/v1/audio/transcriptions", "", &[delta], Ending::Complete).chunks,
        1
    );
}

#[test]
fn an_error_in_mid_stream_is_the_servers() {
    let chunk = choice_usage(0, 4, 8);
    for (path, error, name) in [
        (
            CHAT,
            r#"{"error":{"message":"secret","type":"Internal Server/Error","code":500}}"#,
            "Internal_Server_Error",
        ),
        (
            CHAT,
            r#"{"error":{"message":"secret","type":null,"code":500}}"#,
            "500",
        ),
        (
            CHAT,
            r#"{"object":"error","message":"secret","type":"Overload","code":503}"#,
            "Overload",
        ),
        (
            "/v1/messages",
            r#"{"type":"error","error":{"type":"api_error","message":"secret"}}"#,
            "api_error",
        ),
        (
            "/v1/responses",
            r#"{"type":"error","code":"oops","message":"secret"}"#,
            "oops",
        ),
        (
            "/v1/responses",
            r#"{"type":"response.failed","response":{"error":{"code":"oops"}}}"#,
            "oops",
        ),
    ] {
        let facts = stream(path, "{}", &[&chunk, error, "[DONE]"], Ending::Complete);
        assert_eq!(facts.outcome, Outcome::ServerError, "{error}");
        assert_eq!(facts.error_type.as_deref(), Some(name), "{error}");
        assert!(!format!("{facts:?}").contains("secret"));
    }
    let unnamed = stream(CHAT, "{}", &[r#"{"error":"secret"}"#], Ending::Complete);
    assert_eq!(
        (unnamed.outcome, unnamed.error_type),
        (Outcome::ServerError, None)
    );
    let none = stream(CHAT, "{}", &[r#"{"error":null,"choices":[]}"#], Ending::Complete);
    assert_eq!(none.outcome, Outcome::Completed);
}

#[test]
fn an_error_body_has_a_type_and_no_tokens() {
    let head = "HTTP/1.1 500 X\r\ncontent-type: application/json\r\n\r\n";
    let read = |body: &str| {
        let mut exchange = exchange(CHAT, "{}", head);
        exchange.response_body(At(2_000), Piece::Bytes(body.as_bytes()));
        let facts = exchange.finish(At(3_000), Ending::Complete);
        assert_eq!(
            (facts.outcome, facts.tokens),
            (Outcome::ServerError, Tokens::default())
        );
        facts.error_type.map(String::from)
    };
    assert_eq!(
        read(r#"{"error":{"type":"T","code":1},"usage":{"prompt_tokens":3}}"#).as_deref(),
        Some("T")
    );
    assert_eq!(
        read(r#"{"error":{"code":"c d","type":""}}"#).as_deref(),
        Some("c_d")
    );
    assert_eq!(
        read(r#"{"object":"error","type":"Old","code":500}"#).as_deref(),
        Some("Old")
    );
    assert_eq!(
        read(r#"{"type":"error","error":{"type":"overloaded_error"}}"#).as_deref(),
        Some("overloaded_error")
    );
    assert_eq!(read(r#"{"detail":"Not Found"}"#), None);
    assert_eq!(read("<html>"), None);
    let long = format!(r#"{{"error":{{"type":"{}"}}}}"#, "a".repeat(200));
    assert_eq!(read(&long).map(|name| name.len()), Some(64));
}

#[test]
fn a_hole_in_a_stream_costs_one_event_and_all_that_may_be_stale() {
    let mut exchange = exchange(CHAT, "{}", SSE_HEAD);
    let event = |completion| format!("data: {}\n\n", choice_usage(0, 4, completion));
    exchange.response_body(At(10_000), Piece::Bytes(event(1).as_bytes()));
    exchange.response_body(At(11_000), Piece::Bytes(&event(2).as_bytes()[..20]));
    exchange.response_body(At(11_000), Piece::Hole(50));
    let broken_off = exchange.clone().finish(At(12_000), Ending::Complete);
    assert_eq!(
        (broken_off.tokens, broken_off.usage_source),
        (Tokens::default(), UsageSource::Counted)
    );
    exchange.response_body(At(13_000), Piece::Bytes(&event(2).as_bytes()[70..]));
    exchange.response_body(At(14_000), Piece::Bytes(event(3).as_bytes()));
    let facts = exchange.finish(At(15_000), Ending::Complete);
    assert_eq!((facts.chunks, facts.tokens.completion), (2, Some(3)));
    assert_eq!(facts.outcome, Outcome::Incomplete, "an event was not seen");
    assert_eq!(
        (facts.ttft_us, facts.gaps.count),
        (Some(10), 0),
        "no gap across the hole"
    );
    assert_eq!(facts.response_bytes, 3 * event(1).len() as u64);
}

#[test]
fn a_hole_in_a_document_leaves_what_came_before_it() {
    let mut exchange = exchange(CHAT, r#"{"model":"asked"}"#, JSON_HEAD);
    exchange.response_body(
        At(2_000),
        Piece::Bytes(br#"{"id":"x","model":"said","choices":["#),
    );
    exchange.response_body(At(2_000), Piece::Hole(9));
    exchange.response_body(At(2_000), Piece::Bytes(br#"],"usage":{"prompt_tokens":3}}"#));
    let facts = exchange.finish(At(3_000), Ending::Complete);
    assert_eq!(
        (facts.model.as_deref(), facts.tokens),
        (Some("said"), Tokens::default())
    );
}

#[test]
fn an_event_without_its_blank_line_counts_when_the_stream_is_whole() {
    let text = r#"data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":2}}"#;
    for (ending, source) in [
        (Ending::Complete, UsageSource::Reported),
        (Ending::UpstreamClosed, UsageSource::None),
    ] {
        let mut exchange = exchange(CHAT, "{}", SSE_HEAD);
        exchange.response_body(At(2_000), Piece::Bytes(text.as_bytes()));
        assert_eq!(exchange.finish(At(3_000), ending).usage_source, source);
    }
}

#[test]
fn an_encoded_body_is_passed_over() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\n\r\n";
    let mut exchange = exchange(CHAT, r#"{"model":"asked"}"#, head);
    exchange.response_body(
        At(2_000),
        Piece::Bytes(br#"{"model":"said","usage":{"prompt_tokens":3}}"#),
    );
    let facts = exchange.finish(At(3_000), Ending::Complete);
    assert_eq!(
        (facts.model.as_deref(), facts.usage_source),
        (Some("asked"), UsageSource::None)
    );
    assert_eq!((facts.response_bytes, facts.response_head_us), (44, Some(1)));
}

#[test]
fn interim_heads_count_for_nothing() {
    let mut exchange = exchange(CHAT, "{}", JSON_HEAD);
    let (interim, _) = ResponseHead::parse(b"HTTP/1.1 100 Continue\r\n\r\n", 1_024, "POST")
        .unwrap()
        .unwrap();
    exchange.response_head(At(5_000), &interim);
    let facts = exchange.finish(At(9_000), Ending::Complete);
    assert_eq!((facts.status, facts.response_head_us), (Some(200), Some(1)));
}

#[test]
fn without_a_response_everything_is_unknown() {
    let text = "POST /v1/completions HTTP/1.1\r\nHost: a\r\n\r\n";
    let (head, _) = RequestHead::parse(text.as_bytes(), 1_024).unwrap().unwrap();
    for (ending, outcome) in [
        (Ending::Unreachable, Outcome::Unreachable),
        (Ending::TimedOut, Outcome::TimedOut),
        (Ending::Refused, Outcome::Refused),
        (Ending::Unseen, Outcome::Incomplete),
    ] {
        let facts = Exchange::begin(At(5_000), &head).finish(At(6_000), ending);
        assert_eq!(
            (facts.outcome, facts.status, facts.usage_source),
            (outcome, None, UsageSource::None)
        );
        assert_eq!((facts.started, facts.ended), (At(5_000), At(6_000)));
    }
}

/// What events are made of.
const WORDS: &[&str] = &[
    "data: ",
    "\n\n",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "7",
    "null",
    "\"choices\"",
    "\"delta\"",
    "\"usage\"",
    "\"index\"",
    "\"prompt_tokens\"",
    "\"type\"",
    "\"error\"",
    "\"response\"",
    "\"message\"",
    "\"content\"",
];

proptest! {
    #[test]
    fn no_body_makes_it_panic(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..8),
        is_stream: bool,
    ) {
        let mut exchange = exchange(CHAT, "", if is_stream { SSE_HEAD } else { JSON_HEAD });
        for (piece, at) in pieces.iter().zip(2_000..) {
            exchange.request_body(Piece::Bytes(piece));
            exchange.response_body(At(at), Piece::Bytes(piece));
            exchange.response_body(At(at), Piece::Hole(piece.len() as u64 / 2));
        }
        exchange.finish(At(9_000), Ending::Complete);
    }

    #[test]
    fn no_event_of_these_words_makes_it_panic(
        words in prop::collection::vec(prop::sample::select(WORDS), 0..60),
    ) {
        let text = words.concat();
        let mut exchange = exchange(CHAT, "", SSE_HEAD);
        exchange.response_body(At(2_000), Piece::Bytes(text.as_bytes()));
        let facts = exchange.finish(At(9_000), Ending::ClientGone);
        prop_assert_eq!(facts.response_bytes, text.len() as u64);
    }
}

#[test]
fn half_a_usage_is_not_a_continuous_one() {
    let start = r#"{"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":0}}}"#;
    let text = r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}"#;
    let facts = stream("/v1/messages", "{}", &[start, text], Ending::ClientGone);
    assert_eq!(facts.usage_source, UsageSource::Counted);
    assert_eq!(
        (facts.tokens.prompt, facts.tokens.completion, facts.chunks),
        (Some(7), None, 1)
    );
}

#[test]
fn behind_a_hole_no_first_token_is_timed() {
    let mut exchange = exchange(CHAT, "{}", SSE_HEAD);
    let said = format!("data: {}\n\n", chat_chunk(0, r#"{"content":"a"}"#, "null"));
    exchange.response_body(At(9_000), Piece::Hole(20));
    exchange.response_body(At(9_000), Piece::Bytes(b"\n\n"));
    for at in [10_000, 12_000] {
        exchange.response_body(At(at), Piece::Bytes(said.as_bytes()));
    }
    let facts = exchange.finish(At(13_000), Ending::Complete);
    assert_eq!((facts.ttft_us, facts.chunks, facts.gaps.sum_us), (None, 2, 2));
}

/// A request of which only the beginning was captured.
fn prefix(path: &str, request: &str, head: &str) -> Exchange {
    let mut exchange = exchange(path, request, head);
    exchange.request_body(Piece::Hole(1_000));
    exchange
}

#[test]
fn what_a_request_asked_behind_its_captured_prefix_is_not_guessed() {
    let usage = r#""usage":{"prompt_tokens":6,"completion_tokens":4}"#;
    let one = format!(r#"{{"choices":[{{"index":0,"text":"a"}}],{usage}}}"#);
    let two = format!(r#"{{"choices":[{{"index":0,"text":"a"}},{{"index":1,"text":"a"}}],{usage}}}"#);
    for (path, request, answer, engine_prompt) in [
        // The answer itself says how many choices chat made.
        (CHAT, r#"{"messages":[{"content":"long"#, &two, Some(12)),
        (CHAT, r#"{"n":3,"messages":["#, &two, Some(18)),
        // Two choices of a completion may be those of two prompts.
        ("/v1/completions", r#"{"prompt":"long"#, &two, None),
        ("/v1/completions", r#"{"prompt":"long"#, &one, Some(6)),
        ("/v1/completions", r#"{"n":2,"prompt":"long"#, &two, Some(12)),
    ] {
        let mut exchange = prefix(path, request, JSON_HEAD);
        exchange.response_body(At(2_000), Piece::Bytes(answer.as_bytes()));
        let facts = exchange.finish(At(3_000), Ending::Complete);
        let found = (facts.tokens.prompt, facts.tokens.engine_prompt);
        assert_eq!(found, (Some(6), engine_prompt), "{path} {request}");
    }
}

#[test]
fn a_completion_that_breaks_off_unseen_requests_may_have_had_more_prompts() {
    let chunk = choice_usage(0, 6, 2);
    for (request, prompt, engine_prompt) in [
        (r#"{"n":1,"prompt":["first","sec"#, None, None),
        (r#"{"n":1,"prompt":"long"#, None, None),
        (r#"{"prompt":"one","n":1,"user":"#, Some(6), Some(6)),
        // The other choice has not been heard of, and nothing says that there is none.
        (r#"{"prompt":"one","user":"#, None, None),
    ] {
        let mut exchange = prefix("/v1/completions", request, SSE_HEAD);
        let event = format!("data: {chunk}\n\n");
        exchange.response_body(At(2_000), Piece::Bytes(event.as_bytes()));
        let facts = exchange.finish(At(3_000), Ending::ClientGone);
        let found = (facts.tokens.prompt, facts.tokens.engine_prompt);
        assert_eq!(found, (prompt, engine_prompt), "{request}");
        assert_eq!(facts.tokens.completion, Some(2), "{request}");
    }
}

#[test]
fn choices_behind_a_hole_in_the_answer_are_not_counted() {
    let mut exchange = prefix(CHAT, r#"{"messages":["#, JSON_HEAD);
    let answer = br#"{"usage":{"prompt_tokens":6,"completion_tokens":4},"choices":[{"index":0}"#;
    exchange.response_body(At(2_000), Piece::Bytes(answer));
    exchange.response_body(At(2_000), Piece::Hole(9));
    let tokens = exchange.finish(At(3_000), Ending::Complete).tokens;
    assert_eq!((tokens.prompt, tokens.engine_prompt), (Some(6), None));
}

#[test]
fn a_request_is_whole_when_it_is_first_said_to_be() {
    let mut exchange = exchange(CHAT, "{}", JSON_HEAD);
    assert_eq!(exchange.clone().finish(At(9), Ending::Unseen).request_whole, None);
    exchange.request_end(At(5));
    exchange.request_end(At(6));
    assert_eq!(exchange.finish(At(9), Ending::Unseen).request_whole, Some(At(5)));
}

#[test]
fn where_the_end_was_not_seen_the_last_usage_is_no_usage() {
    let chunk = choice_usage(0, 4, 8);
    let facts = stream(CHAT, "{}", &[&chunk], Ending::Unseen);
    assert_eq!((facts.tokens.prompt, facts.tokens.completion), (Some(4), None));
    assert_eq!(facts.usage_source, UsageSource::Counted);
    let last = r#"{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":9}}"#;
    let facts = stream(CHAT, "{}", &[&chunk, last], Ending::Unseen);
    assert_eq!(
        (facts.tokens.completion, facts.usage_source),
        (Some(9), UsageSource::Reported)
    );
}
