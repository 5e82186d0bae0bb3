//! The routes of an embedding model: what to prefill, and the answer made from it.

use std::sync::Arc;

use serde_json::Value;

use crate::engine::{Finish, SeqSpec};
use crate::options::Options;
use crate::prompts::{check_length, prompt_inputs, render_chat};
use crate::request::{parse_body, prompt_salt, require, resolve_model};
use crate::shapes::Stamp;
use crate::shapes::error::ApiError;
use crate::shapes::pooling as shape;
use crate::tokens::{Prompt, mix};

/// A pooling route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingRoute {
    /// `/v1/embeddings`
    Embeddings,
    /// `/pooling`
    Pooling,
    /// `/score`
    Score,
    /// `/rerank`
    Rerank,
}

/// A checked pooling request.
#[derive(Debug)]
pub struct PoolingJob {
    route: PoolingRoute,
    /// Requested model.
    pub model: String,
    prompts: Vec<Arc<Prompt>>,
    /// For rerank, what is repeated in the answer.
    documents: Vec<String>,
    top_n: usize,
    base64: bool,
    dimensions: u32,
}

impl PoolingJob {
    /// Checks and interprets `body`.
    ///
    /// # Errors
    /// The answer that vLLM gives to such a request.
    pub fn parse(route: PoolingRoute, body: &[u8], options: &Options) -> Result<Self, ApiError> {
        let body = parse_body(body)?;
        let texts = texts(route, &body)?;
        let model = resolve_model(&body, options)?;
        let salt = prompt_salt(&body, &model, options);
        let prompts = texts
            .iter()
            .map(|text| {
                let prompt = Prompt::new(text, salt, options.block_size);
                check_length(&prompt, options).map(|()| Arc::new(prompt))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let documents = match route {
            PoolingRoute::Rerank => strings(&body["documents"]),
            _ => Vec::new(),
        };
        let asked = body["dimensions"]
            .as_u64()
            .and_then(|size| u32::try_from(size).ok());
        let top_n = body["top_n"]
            .as_u64()
            .filter(|top| *top > 0)
            .map_or(usize::MAX, |top| top as usize);
        Ok(PoolingJob {
            route,
            model,
            prompts,
            documents,
            top_n,
            base64: body["encoding_format"] == "base64",
            dimensions: asked
                .unwrap_or(options.embedding_size)
                .clamp(1, options.embedding_size),
        })
    }

    /// The sequences for the engine: prefilled, never decoded.
    pub fn seqs(&self) -> Vec<SeqSpec> {
        self.prompts
            .iter()
            .map(|prompt| SeqSpec {
                prompt: Arc::clone(prompt),
                target: 0,
                finish: Finish::Stop,
            })
            .collect()
    }
}

/// The answer to `job`.
pub fn answer(job: &PoolingJob, stamp: &Stamp, options: &Options) -> String {
    let tokens = job.prompts.iter().map(|prompt| prompt.tokens).sum();
    let keys = job.prompts.iter().map(|prompt| mix(options.seed, prompt.hash));
    match job.route {
        PoolingRoute::Embeddings => {
            let vectors: Vec<_> = keys.map(|key| shape::vector(key, job.dimensions)).collect();
            shape::embeddings(stamp, &job.model, &vectors, job.base64, tokens)
        }
        PoolingRoute::Pooling => {
            let vectors: Vec<_> = keys.map(|key| shape::vector(key, job.dimensions)).collect();
            shape::pooling(stamp, &job.model, &vectors, job.base64, tokens)
        }
        PoolingRoute::Score => {
            let scores: Vec<_> = keys.map(shape::score).collect();
            shape::scores(stamp, &job.model, &scores, tokens)
        }
        PoolingRoute::Rerank => {
            let mut ranked: Vec<(usize, &str, f64)> = keys
                .zip(&job.documents)
                .enumerate()
                .map(|(index, (key, text))| (index, text.as_str(), shape::score(key)))
                .collect();
            ranked.sort_by(|a, b| b.2.total_cmp(&a.2));
            ranked.truncate(job.top_n);
            shape::rerank(stamp, &job.model, &ranked, tokens)
        }
    }
}

/// What is prefilled: an input, or a pair of texts joined as a cross encoder reads them.
fn texts(route: PoolingRoute, body: &Value) -> Result<Vec<Vec<u8>>, ApiError> {
    match route {
        PoolingRoute::Embeddings | PoolingRoute::Pooling => {
            if body["messages"].is_array() {
                return Ok(vec![render_chat(body)?]);
            }
            require(body, "input")?;
            prompt_inputs(&body["input"], "input")
        }
        PoolingRoute::Score => {
            require(body, "text_1")?;
            require(body, "text_2")?;
            let (first, second) = (strings(&body["text_1"]), strings(&body["text_2"]));
            pairs(&first, &second)
        }
        PoolingRoute::Rerank => {
            require(body, "query")?;
            require(body, "documents")?;
            pairs(&strings(&body["query"]), &strings(&body["documents"]))
        }
    }
}

fn strings(value: &Value) -> Vec<String> {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Object(document) if document.contains_key("text") => {
            document["text"].as_str().unwrap_or_default().to_owned()
        }
        other => other.to_string(),
    };
    match value {
        Value::Array(list) => list.iter().map(text).collect(),
        single => vec![text(single)],
    }
}

fn pairs(first: &[String], second: &[String]) -> Result<Vec<Vec<u8>>, ApiError> {
    if second.is_empty() || (first.len() != 1 && first.len() != second.len()) {
        return Err(ApiError::bad_request(
            "Input lengths must be either 1:1, 1:N or N:N".to_owned(),
            "input",
        ));
    }
    let pair = |index: usize, right: &String| {
        let left = if first.len() == 1 {
            &first[0]
        } else {
            &first[index]
        };
        format!("{left}<|sep|>{right}").into_bytes()
    };
    Ok(second
        .iter()
        .enumerate()
        .map(|(index, right)| pair(index, right))
        .collect())
}
