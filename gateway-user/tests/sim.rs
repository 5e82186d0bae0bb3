//! Replays what was sent to a real vLLM to the simulator, and compares the answers' structure and what was counted.

#[path = "sim_support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::path::PathBuf;
use std::process::Command;

use support::{DEADLINE, Sim, event_sequence, parse_answer, post, read_answer, read_pipelined, structure};

const STREAM: &str = r#"{"model":"tiny","prompt":"Shared GPUs","max_tokens":2000,"ignore_eos":true,"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}}"#;

/// Slow enough that a client can leave in mid-stream, fast enough for a test.
const TIMED: [&str; 8] = [
    "--model",
    "tiny",
    "--introspect",
    "--step-base-us",
    "10000",
    "--prefill-us-per-token",
    "1",
    "--decode-us-per-seq=1",
];

struct Fixture {
    name: String,
    request: Vec<u8>,
    response: Vec<u8>,
    delta: BTreeMap<String, f64>,
    aborted: bool,
}

fn fixture_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vllm-0.32.0")
}

fn fixture(name: &str) -> Fixture {
    let read =
        |ext: &str| std::fs::read(fixture_dir().join(format!("{name}.{ext}"))).expect("the fixture is there");
    let about: serde_json::Value = serde_json::from_slice(&read("json")).expect("the fixture's JSON");
    Fixture {
        name: name.to_owned(),
        request: read("request"),
        response: read("response"),
        delta: serde_json::from_value(about["metrics_delta"].clone()).expect("deltas are numbers"),
        aborted: about["aborted_by_client"] == true,
    }
}

fn all_fixtures() -> Vec<Fixture> {
    let mut names: Vec<String> = std::fs::read_dir(fixture_dir())
        .expect("the fixtures are there")
        .filter_map(|entry| {
            Some(
                entry
                    .ok()?
                    .file_name()
                    .to_str()?
                    .strip_suffix(".request")?
                    .to_owned(),
            )
        })
        .collect();
    names.sort();
    assert!(names.len() > 40, "only {} fixtures found", names.len());
    names.iter().map(|name| fixture(name)).collect()
}

/// A simulator set up as the server was that gave the fixture.
fn server_of(fixture: &Fixture) -> Sim {
    let mut args = vec!["--max-model-len", "2048", "--instant"];
    if fixture.name.starts_with("embeddings") {
        args.extend(["--model", "tiny-embed", "--kind", "embed"]);
    } else {
        args.extend(["--model", "tiny"]);
    }
    if fixture.name.starts_with("triple_") || fixture.name == "chat_request_metrics" {
        args.extend(["--request-metrics", "--request-id-headers"]);
    }
    Sim::start(&args)
}

#[test]
fn every_answer_is_built_as_the_real_ones() {
    for fixture in all_fixtures().iter().filter(|fixture| !fixture.aborted) {
        let sim = server_of(fixture);
        let mut stream = sim.connect();
        stream.write_all(&fixture.request).unwrap();
        let mut real = fixture.response.as_slice();
        let mut received = Vec::new();
        while !real.is_empty() {
            let (expected, length) = parse_answer(real).expect("the fixture is an answer");
            real = &real[length..];
            let answer = read_pipelined(&mut stream, &mut received);
            let name = &fixture.name;
            assert_eq!(answer.status, expected.status, "{name}");
            assert_eq!(answer.header_names(), expected.header_names(), "{name}");
            assert_eq!(
                answer.header("content-type"),
                expected.header("content-type"),
                "{name}"
            );
            assert_eq!(
                answer.header("x-request-id"),
                expected.header("x-request-id"),
                "{name}"
            );
            if expected.chunks.is_empty() {
                let of = |body: &str| {
                    if body.is_empty() {
                        String::new()
                    } else {
                        structure(body)
                    }
                };
                assert_eq!(of(&answer.body), of(&expected.body), "{name}");
                continue;
            }
            let sequences = [&answer.body, &expected.body].map(|body| match name.contains("n2") {
                true => first_of_each(event_sequence(body)),
                false => event_sequence(body),
            });
            assert_eq!(sequences[0], sequences[1], "{name}");
            for chunk in &answer.chunks {
                assert!(
                    chunk.ends_with("\n\n") && chunk.matches("\n\n").count() == 1,
                    "{name}: {chunk:?}"
                );
            }
        }
    }
}

/// How two choices take turns is chance in the real server; only which events come first is not.
fn first_of_each(sequence: Vec<String>) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    sequence
        .into_iter()
        .filter(|event| seen.insert(event.clone()))
        .collect()
}

#[test]
fn errors_say_what_the_real_server_says() {
    for name in [
        "error_bad_json",
        "error_missing_field",
        "error_too_long",
        "error_unknown_model",
    ] {
        let fixture = fixture(name);
        let answer = server_of(&fixture).send(&fixture.request);
        assert_eq!(
            answer.json(),
            parse_answer(&fixture.response).unwrap().0.json(),
            "{name}"
        );
    }
}

/// Sums that depend on the tokenizer or on time.
fn depends_on_size_or_time(series: &str) -> bool {
    series.contains("prompt_tokens") && !series.contains("_count")
        || series.contains("seconds_sum")
        || series.contains("prefix_cache")
        || series.contains("iteration_tokens_total")
        || series.contains("prefill_kv_computed_tokens_sum")
}

#[test]
fn every_exchange_moves_the_counters_as_the_real_one_did() {
    for fixture in all_fixtures().iter().filter(|fixture| !fixture.aborted) {
        let sim = server_of(fixture);
        if fixture.name == "chat_prefix_cached" {
            sim.send(&self::fixture("chat_prefix_cold").request);
        }
        let before = sim.metrics();
        let mut stream = sim.connect();
        stream.write_all(&fixture.request).unwrap();
        let mut received = Vec::new();
        read_pipelined(&mut stream, &mut received);
        if fixture.name == "keepalive_two_requests" {
            read_pipelined(&mut stream, &mut received);
        }
        let after = sim.metrics();
        let name = &fixture.name;
        let moved: BTreeMap<&String, f64> = after
            .iter()
            .filter(|(series, _)| !series.contains("_bucket{"))
            .map(|(series, value)| (series, value - before[series]))
            .filter(|(_, delta)| *delta != 0.0)
            .collect();
        // The simulator's tools are not parsed out of text, so nothing invokes a parser.
        let real: BTreeMap<&String, f64> = fixture
            .delta
            .iter()
            .filter(|(series, _)| !series.contains("tool_call_parser"))
            .map(|(series, delta)| (series, *delta))
            .collect();
        let counted = |deltas: &BTreeMap<&String, f64>| -> Vec<String> {
            let timeless = deltas.keys().filter(|series| !series.contains("seconds_sum"));
            timeless.map(|series| reason_free(series)).collect()
        };
        assert_eq!(counted(&moved), counted(&real), "{name}: which series moved");
        // A tool's arguments end by themselves here; the fixture's model never closed them.
        if name.starts_with("triple_tool") {
            continue;
        }
        for (series, delta) in real.iter().filter(|(series, _)| !depends_on_size_or_time(series)) {
            assert_eq!(moved[*series], *delta, "{name}: {series}");
        }
    }
}

fn reason_free(series: &str) -> String {
    series
        .replace(r#"finished_reason="stop","#, "")
        .replace(r#"finished_reason="length","#, "")
}

#[test]
fn usage_and_counters_stand_in_the_same_relation() {
    for (name, choices) in [
        ("chat", 1.0),
        ("chat_stream_n2", 2.0),
        ("completion_two_prompts", 1.0),
        ("embeddings", 1.0),
    ] {
        let fixture = fixture(name);
        let sim = server_of(&fixture);
        let answer = sim.send(&fixture.request);
        let usage = match answer.chunks.is_empty() {
            true => answer.json()["usage"].clone(),
            false => answer.events().last().unwrap()["usage"].clone(),
        };
        let tokens = |member: &str| usage[member].as_f64().unwrap();
        assert_eq!(
            sim.metric("vllm:prompt_tokens_total"),
            choices * tokens("prompt_tokens"),
            "{name}"
        );
        assert_eq!(
            sim.metric("vllm:generation_tokens_total"),
            tokens("completion_tokens"),
            "{name}"
        );
        let step_tokens = sim.metric("vllm:iteration_tokens_total_sum");
        assert_eq!(
            step_tokens,
            choices * tokens("prompt_tokens") + tokens("completion_tokens"),
            "{name}"
        );
    }
}

/// Reads events until `count` of them have come, then closes or half-closes; returns the last `completion_tokens` that
/// came before the connection's end.
fn abort_after(sim: &Sim, count: usize, half_close: bool) -> u64 {
    let mut stream = sim.connect();
    stream
        .write_all(&post("/v1/completions", "X-Request-Id: gone\r\n", STREAM))
        .unwrap();
    let (mut bytes, mut buffer, mut left) = (Vec::new(), [0; 4096], false);
    loop {
        let events = bytes.windows(2).filter(|window| window == b"\n\n").count();
        if events >= count && !left {
            left = true;
            if !half_close {
                break;
            }
            stream.shutdown(Shutdown::Write).unwrap();
        }
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
                break;
            }
        }
    }
    drop(stream);
    sim.wait_idle();
    let answer = parse_answer(&bytes).unwrap().0;
    assert!(
        !answer.complete,
        "an aborted stream must not end as if it were whole"
    );
    answer.events().last().unwrap()["usage"]["completion_tokens"]
        .as_u64()
        .unwrap()
}

#[test]
fn an_abort_stops_the_engine_and_keeps_what_ran() {
    for (half_close, threads) in [(false, "1"), (true, "1"), (false, "2"), (true, "2")] {
        let sim = Sim::start(&[TIMED.as_slice(), &["--threads", threads]].concat());
        let read = abort_after(&sim, 6, half_close);
        let engine = sim.metric("vllm:generation_tokens_total") as u64;
        // The step that ends while the client leaves may count and not arrive; no later one may run.
        assert!(
            engine == read || engine == read + 1,
            "half_close {half_close}: read {read}, engine {engine}"
        );
        assert_eq!(sim.metric("vllm:request_success_total"), 0.0);
        assert_eq!(sim.metric("vllm:e2e_request_latency_seconds_count"), 0.0);
        assert_eq!(sim.metric("vllm:prompt_tokens_total"), 3.0);
        let log = sim.get("/sim/requests").json();
        assert_eq!(
            (&log["request_id"], &log["finished_reason"]),
            (&"gone".into(), &"abort".into())
        );
        assert_eq!(log["completion_tokens"], engine);
    }
}

#[test]
fn aborts_of_instant_streams_and_of_whole_answers_are_noticed() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let read = abort_after(&sim, 30, true);
    assert!(sim.metric("vllm:generation_tokens_total") as u64 >= read);
    let sim = Sim::start(&TIMED);
    let mut stream = sim.connect();
    stream
        .write_all(&post(
            "/v1/completions",
            "",
            &STREAM.replace(r#""stream":true"#, r#""stream":false"#),
        ))
        .unwrap();
    let deadline = std::time::Instant::now() + DEADLINE;
    while sim.metric("vllm:generation_tokens_total") < 3.0 {
        assert!(std::time::Instant::now() < deadline, "generation never began");
    }
    stream.shutdown(Shutdown::Write).unwrap();
    sim.wait_idle();
    assert!(sim.metric("vllm:generation_tokens_total") < 2000.0);
    assert_eq!(sim.metric("vllm:request_success_total"), 0.0);
}

#[test]
fn the_head_of_a_stream_leaves_before_its_first_token() {
    let sim = Sim::start(&["--model", "tiny", "--step-base-us", "200000"]);
    let mut stream = sim.connect();
    stream
        .write_all(&post("/v1/completions", "", &STREAM.replace("2000", "2")))
        .unwrap();
    let mut buffer = [0; 4096];
    let read = stream.read(&mut buffer).unwrap();
    assert!(
        buffer[..read].ends_with(b"\r\n\r\n"),
        "{}",
        String::from_utf8_lossy(&buffer[..read])
    );
    assert_eq!(sim.metric("vllm:generation_tokens_total"), 0.0);
}

#[test]
fn faults_happen_on_demand() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let body = STREAM.replace("2000", "9");
    let ask = |fault: &str| sim.post("/v1/completions", &format!("X-Sim-Fault: {fault}\r\n"), &body);
    let refused = ask("status=503");
    assert_eq!(refused.status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(refused.json()["error"]["code"], 503);
    assert_eq!(
        sim.metric("vllm:prompt_tokens_total"),
        0.0,
        "a refused request costs nothing"
    );

    let closed = ask("close-after=4");
    assert_eq!((closed.complete, closed.chunks.len()), (false, 4));
    let malformed = ask("malformed");
    assert!(malformed.complete);
    let broken = malformed
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let broken =
        broken.filter(|data| serde_json::from_str::<serde_json::Value>(data).is_err() && *data != "[DONE]");
    assert_eq!(broken.count(), 1);
    let failed = ask("error-event");
    assert!(failed.complete && failed.body.ends_with("data: [DONE]\n\n"));
    assert_eq!(failed.events().last().unwrap()["error"]["code"], 500);
    assert!(ask("nonsense").status.contains("400"));

    let whole = body.replace(r#""stream":true"#, r#""stream":false"#);
    let cut = sim.post("/v1/completions", "X-Sim-Fault: close\r\n", &whole);
    assert!(!cut.complete && !cut.body.is_empty());
    sim.wait_idle();
    let mut stalled = sim.connect();
    stalled
        .write_all(&post("/v1/completions", "X-Sim-Fault: stall\r\n", &body))
        .unwrap();
    let mut buffer = [0; 4096];
    let read = stalled.read(&mut buffer).unwrap();
    assert!(
        buffer[..read].ends_with(b"\r\n\r\n"),
        "a stalled stream has its head and nothing more"
    );
    stalled
        .set_read_timeout(Some(std::time::Duration::from_millis(100)))
        .unwrap();
    assert!(stalled.read(&mut buffer).is_err());
}

#[test]
fn other_routes_answer_as_vllm_does() {
    let sim = Sim::start(&[
        "--model",
        "tiny",
        "--lora",
        "tuned",
        "--instant",
        "--force-usage",
        "--version",
        "9.9",
    ]);
    assert!(sim.get("/v1/chat/completions").status.contains("405"));
    assert_eq!(sim.get("/v1/chat/completions").header("allow"), Some("POST"));
    assert_eq!(
        sim.get("/sim/totals").status,
        "HTTP/1.1 404 Not Found",
        "introspection is off by default"
    );
    assert_eq!(sim.get("/version").json()["version"], "9.9");
    assert_eq!(sim.get("/load").json()["server_load"], 0);
    assert_eq!(sim.post("/ping", "", "").status, "HTTP/1.1 200 OK");
    let models = sim.get("/v1/models").json();
    assert_eq!(
        (&models["data"][1]["id"], &models["data"][1]["parent"]),
        (&"tuned".into(), &"tiny".into())
    );
    let ids = sim.post("/tokenize", "", r#"{"prompt":"Shared GPUs, é"}"#).json()["tokens"].clone();
    let text = sim
        .post("/detokenize", "", &format!(r#"{{"tokens":{ids}}}"#))
        .json();
    assert_eq!(text["prompt"], "Shared GPUs, é");
    let counted = r#"{"model":"tiny","messages":[{"role":"user","content":"hello"}]}"#;
    assert_eq!(
        sim.post("/v1/messages/count_tokens", "", counted).json()["input_tokens"],
        8
    );

    let plain =
        r#"{"model":"tuned","messages":[{"role":"user","content":"hi"}],"max_tokens":3,"stream":true}"#;
    let forced = sim.post("/v1/chat/completions", "", plain).events();
    assert!(
        forced
            .iter()
            .all(|event| event["usage"].is_object() && event["model"] == "tuned")
    );
    assert_eq!(sim.metric("vllm:generation_tokens_total"), 3.0);
    assert!(
        sim.metrics().keys().all(|series| !series.contains("tuned")),
        "adapters count under their base"
    );
}

#[test]
fn tools_are_called_with_arguments_that_fit() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let body = r#"{"model":"tiny","messages":[{"role":"user","content":"hi"}],"tools":[{"type":"function","function":{"name":"price","parameters":{"type":"object","properties":{"gpus":{"type":"integer"}},"required":["gpus"]}}}],"tool_choice":"required"}"#;
    let answer = sim.post("/v1/chat/completions", "", body).json();
    let choice = &answer["choices"][0];
    let call = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(
        (&choice["finish_reason"], &call["name"]),
        (&"tool_calls".into(), &"price".into())
    );
    let arguments: serde_json::Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["gpus"].is_i64(), "{arguments}");

    let body = r#"{"model":"tiny","max_tokens":50,"messages":[{"role":"user","content":"hi"}],"tools":[{"name":"price","input_schema":{"type":"object","properties":{"gpus":{"type":"integer"}},"required":["gpus"]}}],"tool_choice":{"type":"tool","name":"price"}}"#;
    let answer = sim.post("/v1/messages", "", body).json();
    assert_eq!(
        (&answer["stop_reason"], &answer["content"][0]["input"]["gpus"]),
        (&"tool_use".into(), &8.into())
    );
}

#[test]
fn pooling_routes_score_and_rank() {
    let sim = Sim::start(&["--model", "e", "--kind", "embed", "--instant"]);
    let base64 = sim
        .post(
            "/v1/embeddings",
            "",
            r#"{"input":["a","b"],"encoding_format":"base64"}"#,
        )
        .json();
    // 128 floats of four bytes make 684 letters.
    assert_eq!(base64["data"][1]["embedding"].as_str().unwrap().len(), 684);
    let scores = sim
        .post("/v1/score", "", r#"{"text_1":"q","text_2":["a","b","c"]}"#)
        .json();
    assert_eq!(scores["data"].as_array().unwrap().len(), 3);
    let ranked = sim
        .post(
            "/rerank",
            "",
            r#"{"query":"q","documents":["a","b","c"],"top_n":2}"#,
        )
        .json();
    let relevance = |at: usize| ranked["results"][at]["relevance_score"].as_f64().unwrap();
    assert!(relevance(0) >= relevance(1) && ranked["results"].as_array().unwrap().len() == 2);
    assert_eq!(
        sim.post("/v1/chat/completions", "", "{}").status,
        "HTTP/1.1 404 Not Found"
    );
}

#[test]
fn a_taken_port_is_named_and_signals_end_it() {
    let mut sim = Sim::start(&["--model", "tiny"]);
    let second = Command::new(env!("CARGO_BIN_EXE_vllm-sim"))
        .args(["--listen", &sim.addr])
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        !second.status.success() && message.contains(&sim.addr),
        "{message}"
    );
    assert!(
        Command::new("kill")
            .args(["-TERM", &sim.pid().to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert!(sim.wait_exit().success());
}

#[test]
fn an_idle_connection_is_closed_after_its_keep_alive() {
    let sim = Sim::start(&["--model", "tiny", "--instant", "--keep-alive", "200ms"]);
    let mut stream = sim.connect();
    stream
        .write_all(b"GET /health HTTP/1.1\r\nHost: sim\r\n\r\n")
        .unwrap();
    assert!(read_answer(&mut stream).complete);
    let answered = std::time::Instant::now();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "closed without a word");
    assert!(answered.elapsed() >= std::time::Duration::from_millis(150));
}

#[test]
fn a_full_queue_refuses_and_counts() {
    let sim = Sim::start(&["--model", "tiny", "--max-num-queued-reqs", "0"]);
    assert!(sim.post("/v1/completions", "", STREAM).status.contains("503"));
    assert_eq!(sim.metric("vllm:admission_rejections_total"), 1.0);
}
