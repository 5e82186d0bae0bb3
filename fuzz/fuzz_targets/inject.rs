//! A stream's editor gives the same bytes for every cut, and an edited request still says what it said.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vllm_gateway::proxy::inject::{InjectMode, Known, Plan, StreamEditor, plan};
use vllm_gateway::wire::endpoint::Endpoint;

const REQUEST: &[u8] = br#"{"model":"m","stream":true}"#;

fn edited(payload: &[u8], cut: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let planned = plan(REQUEST, Endpoint::ChatCompletions, InjectMode::Continuous, Known::default());
    let Plan::Edited { strip, .. } = planned else { unreachable!("such a request is edited") };
    let mut editor = StreamEditor::new(strip);
    for piece in payload.chunks(cut.max(1)) {
        editor.push(piece, &mut out);
    }
    editor.finish(&mut out);
    out
}

fuzz_target!(|data: &[u8]| {
    let whole = edited(data, data.len());
    for cut in [1, 2, 5, 33] {
        assert_eq!(whole, edited(data, cut));
    }
    // Must not panic, whatever the body is.
    let _ = plan(data, Endpoint::ChatCompletions, InjectMode::Continuous, Known::default());
});
