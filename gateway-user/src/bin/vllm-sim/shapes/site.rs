//! The routes about the server itself: models, tokenizer.

use super::json::{Js, List, OrNull};
use crate::options::Options;
use crate::tokens::{hash_bytes, mix};

/// `/v1/models`.
pub fn models(options: &Options, created: u64) -> String {
    let base = options.models.iter().map(|name| (name, None));
    let loras = options
        .loras
        .iter()
        .map(|name| (name, Some(options.models[0].as_str())));
    let entries = base.chain(loras).map(|(name, parent)| {
        // vLLM gives no length for an adapter: its parent's holds.
        let length = parent.is_none().then_some(options.max_model_len);
        format!(
            r#"{{"id":{},"object":"model","created":{created},"owned_by":"vllm","root":{},"parent":{},"max_model_len":{},"permission":[{{"id":"modelperm-{:016x}","object":"model_permission","created":{created},"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,"is_blocking":false}}]}}"#,
            Js(name),
            Js(&format!("/models/{name}")),
            OrNull(parent.map(Js)),
            OrNull(length),
            mix(hash_bytes(4, name.as_bytes()), created)
        )
    });
    format!(r#"{{"object":"list","data":{}}}"#, List(entries))
}

/// `/tokenize`.
pub fn tokenize(ids: &[u32], options: &Options) -> String {
    format!(
        r#"{{"count":{},"max_model_len":{},"tokens":{},"token_strs":null}}"#,
        ids.len(),
        options.max_model_len,
        List(ids)
    )
}
