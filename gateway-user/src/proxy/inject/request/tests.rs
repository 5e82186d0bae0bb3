use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

const BOTH: &str = r#"{"include_usage":true,"continuous_usage_stats":true}"#;

fn plan_chat(body: &str, mode: InjectMode) -> Plan {
    plan(body.as_bytes(), Endpoint::ChatCompletions, mode, Known::default())
}

/// The edited body, and whether the final usage stays with the client; or why there is no edit.
fn edited(body: &str, mode: InjectMode) -> Result<(String, bool), Untouched> {
    match plan_chat(body, mode) {
        Plan::Edited { body, strip } => Ok((String::from_utf8(body).unwrap(), strip.keeps_final)),
        Plan::Untouched(why) => Err(why),
    }
}

#[test]
fn options_are_put_behind_stream_and_nothing_else_moves() {
    let (body, keeps_final) =
        edited("{ \"stream\" : true ,\n\"n\":1,\"x\":1.0e2 }\n", InjectMode::Auto).unwrap();
    let want = format!("{{ \"stream\" : true,\"stream_options\":{BOTH} ,\n\"n\":1,\"x\":1.0e2 }}\n");
    assert_eq!((body, keeps_final), (want, false));
    let (body, _) = edited(r#"{"stream":true}"#, InjectMode::Final).unwrap();
    assert_eq!(body, r#"{"stream":true,"stream_options":{"include_usage":true}}"#);
}

#[test]
fn options_that_are_there_keep_their_other_members() {
    let check = |options: &str, mode, want: Result<(&str, bool), Untouched>| {
        let text = |options: &str| format!(r#"{{"stream_options":{options},"stream":true}}"#);
        let want = want.map(|(options, keeps_final)| (text(options), keeps_final));
        assert_eq!(edited(&text(options), mode), want, "{options} {mode:?}");
    };
    use InjectMode::{Continuous, Final};
    check(
        r#"{"include_usage": true}"#,
        Continuous,
        Ok((r#"{"include_usage": true,"continuous_usage_stats":true}"#, true)),
    );
    check(r#"{"include_usage": true}"#, Final, Err(Untouched::AlreadyAsked));
    check(
        r#"{"continuous_usage_stats": false, "include_usage": false, "x": [1] }"#,
        Continuous,
        Ok((
            r#"{"continuous_usage_stats": true, "include_usage": true, "x": [1] }"#,
            false,
        )),
    );
    check(
        r#"{"include_usage":null}"#,
        Final,
        Ok((r#"{"include_usage":true}"#, false)),
    );
    // Without the final usage, per-event usage was never in force, and must not come into force by asking for the former.
    check(
        r#"{"include_usage":false,"continuous_usage_stats":true}"#,
        Final,
        Ok((r#"{"include_usage":true,"continuous_usage_stats":false}"#, false)),
    );
    check(
        r#"{"include_usage":false,"continuous_usage_stats":true}"#,
        Continuous,
        Ok((BOTH, false)),
    );
    check(BOTH, Continuous, Err(Untouched::AlreadyAsked));
    check(BOTH, Final, Err(Untouched::AlreadyAsked));
    // An absent `include_usage` is left to the server's default.
    check(
        "{ }",
        Continuous,
        Ok((r#"{"continuous_usage_stats":true }"#, true)),
    );
    check(
        r#"{"x":1}"#,
        Continuous,
        Ok((r#"{"x":1,"continuous_usage_stats":true}"#, true)),
    );
    check("{}", Final, Err(Untouched::AlreadyAsked));
}

#[test]
fn what_servers_could_read_differently_is_not_edited() {
    use Untouched::{DuplicateKey, NotJson, NotStreamed, StreamOptions};
    for (body, why) in [
        ("", NotJson),
        ("[]", NotJson),
        (r#"{"stream":true"#, NotJson),
        (r#"{"stream":true} {}"#, NotJson),
        (r#"{"stream":true,"temperature":NaN}"#, NotJson),
        ("{}", NotStreamed),
        (r#"{"stream":false}"#, NotStreamed),
        (r#"{"stream":"true"}"#, NotStreamed),
        (r#"{"stream":1}"#, NotStreamed),
        (r#"{"messages":[{"stream":true}]}"#, NotStreamed),
        (r#"{"stream":true,"stream":false}"#, DuplicateKey),
        (r#"{"stream":true,"\u0073tream":false}"#, DuplicateKey),
        (r#"{"stream":true,"x":1,"\u0078":2}"#, DuplicateKey),
        (
            r#"{"stream":true,"stream_options":{"include_usage":true,"include\u005fusage":false}}"#,
            DuplicateKey,
        ),
        (r#"{"stream":true,"stream_options":null}"#, StreamOptions),
        (r#"{"stream":true,"stream_options":[]}"#, StreamOptions),
        (
            r#"{"stream":true,"stream_options":{"include_usage":"true"}}"#,
            StreamOptions,
        ),
        (
            r#"{"stream":true,"stream_options":{"continuous_usage_stats":1}}"#,
            StreamOptions,
        ),
    ] {
        assert_eq!(edited(body, InjectMode::Auto), Err(why), "{body}");
    }
    let not_utf8 = plan(
        b"{\"stream\":true,\"x\":\"\xff\"}",
        Endpoint::Completions,
        InjectMode::Auto,
        Known::default(),
    );
    assert_eq!(not_utf8, Plan::Untouched(NotJson));
}

#[test]
fn a_duplicate_deeper_down_is_the_clients_own() {
    let body = r#"{"stream":true,"metadata":{"a":1,"a":2}}"#;
    assert!(edited(body, InjectMode::Auto).is_ok());
}

#[test]
fn only_chat_and_text_completions_are_edited() {
    let body = br#"{"stream":true,"prompt":"x"}"#;
    for endpoint in Endpoint::ALL {
        let plan = plan(body, *endpoint, InjectMode::Auto, Known::default());
        let can = matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions);
        assert_eq!(plan != Plan::Untouched(Untouched::Endpoint), can, "{endpoint:?}");
    }
    let off = plan_chat(r#"{"stream":true}"#, InjectMode::Off);
    assert_eq!(off, Plan::Untouched(Untouched::Off));
}

#[test]
fn a_model_that_counts_reasoning_is_asked_at_the_end_only() {
    let reasoning = |mode| {
        let known = Known {
            reports_reasoning: Some(true),
            ..Known::default()
        };
        match plan(br#"{"stream":true}"#, Endpoint::ChatCompletions, mode, known) {
            Plan::Edited { body, .. } => String::from_utf8(body).unwrap(),
            Plan::Untouched(why) => panic!("{why:?}"),
        }
    };
    assert!(!reasoning(InjectMode::Auto).contains("continuous"));
    assert!(reasoning(InjectMode::Continuous).contains("continuous"));
}

#[test]
fn several_choices_are_recognised() {
    let single = |endpoint, members: &str| {
        let text = format!(r#"{{"stream":true{members}}}"#);
        Request::read(&text).unwrap().has_single_choice(endpoint)
    };
    let chat = |members| single(Endpoint::ChatCompletions, members);
    assert!(chat("") && chat(r#","n":1"#) && chat(r#","n":null"#));
    assert!(!chat(r#","n":2"#) && !chat(r#","n":"1""#) && !chat(r#","n":1.0"#));
    let text = |members| single(Endpoint::Completions, members);
    assert!(text(r#","prompt":"x""#) && text(r#","prompt":["x"]"#) && text(r#","prompt":[1, 22]"#));
    assert!(text(r#","prompt":[[1,2]]"#));
    assert!(!text(r#","prompt":["x","y"]"#) && !text(r#","prompt":[[1],[2]]"#) && !text(r#","prompt":[]"#));
    assert!(!text("") && !text(r#","prompt":"x","prompt_embeds":"eA==""#));
    assert!(!text(r#","prompt":"x","n":2"#));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-z\"{}\\\\:,\u{e9}]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z\"]{0,6}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn any_options() -> impl Strategy<Value = Option<Value>> {
    let flag = || {
        prop_oneof![
            Just(None),
            Just(Some(json!(null))),
            any::<bool>().prop_map(|on| Some(json!(on)))
        ]
    };
    let object = (flag(), flag(), prop::option::of(any_json())).prop_map(|(include, continuous, other)| {
        let members = [
            ("include_usage", include),
            ("continuous_usage_stats", continuous),
            ("other", other),
        ];
        let members = members
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)));
        Some(Value::Object(members.collect()))
    });
    prop_oneof![Just(None), object, any_json().prop_map(Some)]
}

proptest! {
    #[test]
    fn an_edit_changes_stream_options_alone(
        others in prop::collection::hash_map("[a-z\"]{0,6}", any_json(), 0..6),
        options in any_options(),
        pretty in any::<bool>(),
        mode in prop_oneof![Just(InjectMode::Continuous), Just(InjectMode::Final)],
    ) {
        let mut request = Value::Object(others.into_iter().collect());
        request["stream"] = json!(true);
        if let Some(options) = options {
            request["stream_options"] = options;
        }
        let write = if pretty { serde_json::to_string_pretty } else { serde_json::to_string };
        let text = write(&request).unwrap();
        let Ok((edited, keeps_final)) = edited(&text, mode) else {
            return Ok(());
        };
        let mut got: Value = serde_json::from_str(&edited).unwrap();
        let asked = |value: &Value, member: &str| value["stream_options"][member].clone();
        prop_assert_eq!(asked(&got, "continuous_usage_stats") == json!(true), mode == InjectMode::Continuous);
        prop_assert_ne!(asked(&got, "include_usage"), json!(false));
        prop_assert_eq!(keeps_final, request["stream_options"].is_object()
            && matches!(asked(&request, "include_usage"), Value::Null | Value::Bool(true))
            && request["stream_options"].get("include_usage") != Some(&Value::Null));
        prop_assert_eq!(asked(&got, "other"), asked(&request, "other"));
        match request.get("stream_options") {
            Some(options) => got["stream_options"] = options.clone(),
            None => drop(got.as_object_mut().unwrap().remove("stream_options")),
        }
        prop_assert_eq!(&got, &request);
        // What surrounds the edit is the same text: a common beginning and end that cover all but a short stretch.
        let front = text.bytes().zip(edited.bytes()).take_while(|(a, b)| a == b).count();
        let back = text.bytes().rev().zip(edited.bytes().rev()).take_while(|(a, b)| a == b).count();
        let options_bytes = write(&request["stream_options"]).unwrap().len() * 2;
        prop_assert!(front + back + options_bytes + 80 >= text.len());
    }

    #[test]
    fn no_body_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(matches!(plan(&body, Endpoint::Completions, InjectMode::Auto, Known::default()), Plan::Untouched(_)));
    }

    #[test]
    fn no_text_that_is_nearly_json_makes_it_panic(body in "(\\{|\\}|\"stream\"|\"stream_options\"|:|,|true|null|\"include_usage\"| |1|\\[|\\]){0,24}") {
        let _ = edited(&body, InjectMode::Auto);
    }
}
