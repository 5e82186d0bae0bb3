//! What is prefilled: templates applied, token ids turned back into bytes, and lengths checked.

use std::sync::Arc;

use serde_json::Value;

use crate::options::Options;
use crate::request::Endpoint;
use crate::shapes::error::ApiError;
use crate::tokens::Prompt;

/// Refuses a prompt that leaves no room for an answer.
///
/// # Errors
/// vLLM's message.
pub fn check_length(prompt: &Prompt, options: &Options) -> Result<(), ApiError> {
    let longest = options.max_model_len;
    if prompt.tokens < longest {
        return Ok(());
    }
    let value = longest + 1;
    Err(ApiError::bad_request(
        format!(
            "This model's maximum context length is {longest} tokens. However, your prompt contains at least {value} \
             input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the \
             input prompt. (parameter=input_tokens, value={value})"
        ),
        "input_tokens",
    ))
}

/// The prompts of a generating request.
///
/// # Errors
/// When an input has the wrong type or is too long.
pub fn prompts(
    endpoint: Endpoint,
    body: &Value,
    salt: u64,
    options: &Options,
) -> Result<Vec<Arc<Prompt>>, ApiError> {
    let texts = match endpoint {
        Endpoint::Chat => vec![render_chat(body)?],
        Endpoint::Messages => vec![render_messages(body)?],
        Endpoint::Responses => vec![render_input(body)],
        Endpoint::Completions => prompt_inputs(&body["prompt"], "prompt")?,
    };
    texts
        .into_iter()
        .map(|text| {
            let prompt = Prompt::new(&text, salt, options.block_size);
            check_length(&prompt, options).map(|()| Arc::new(prompt))
        })
        .collect()
}

/// The prompt of a chat request, template applied.
///
/// # Errors
/// When `messages` is not a list.
pub fn render_chat(body: &Value) -> Result<Vec<u8>, ApiError> {
    let Value::Array(messages) = &body["messages"] else {
        return Err(ApiError::wrong_type("messages", "list", &body["messages"]));
    };
    let mut out = Vec::with_capacity(256);
    if body["tools"].as_array().is_some_and(|tools| !tools.is_empty()) {
        turn(&mut out, "tools", &body["tools"]);
    }
    for message in messages {
        turn(
            &mut out,
            message["role"].as_str().unwrap_or("user"),
            &message["content"],
        );
        if let Value::Array(calls) = &message["tool_calls"] {
            out.extend(Value::from(calls.as_slice()).to_string().bytes());
        }
    }
    out.extend_from_slice(b"<|assistant|>\n");
    Ok(out)
}

/// The prompt of a Messages request.
///
/// # Errors
/// When `messages` is not a list.
pub fn render_messages(body: &Value) -> Result<Vec<u8>, ApiError> {
    let mut out = Vec::new();
    if !body["system"].is_null() {
        turn(&mut out, "system", &body["system"]);
    }
    out.extend(render_chat(body)?);
    Ok(out)
}

fn render_input(body: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    if body["instructions"].is_string() {
        turn(&mut out, "system", &body["instructions"]);
    }
    match &body["input"] {
        Value::Array(items) => {
            for item in items {
                turn(
                    &mut out,
                    item["role"].as_str().unwrap_or("user"),
                    &item["content"],
                );
            }
        }
        text => turn(&mut out, "user", text),
    }
    out.extend_from_slice(b"<|assistant|>\n");
    out
}

fn turn(out: &mut Vec<u8>, role: &str, content: &Value) {
    out.extend_from_slice(b"<|");
    out.extend_from_slice(role.as_bytes());
    out.extend_from_slice(b"|>\n");
    match content {
        Value::String(text) => out.extend_from_slice(text.as_bytes()),
        Value::Null => {}
        Value::Array(parts) => {
            for part in parts {
                match part["text"].as_str() {
                    Some(text) => out.extend_from_slice(text.as_bytes()),
                    None => out.extend(part.to_string().bytes()),
                }
            }
        }
        other => out.extend(other.to_string().bytes()),
    }
    out.push(b'\n');
}

/// One or several prompts: a text, token ids, or a list of either.
///
/// # Errors
/// When it is none of these, or nothing at all.
pub fn prompt_inputs(input: &Value, field: &str) -> Result<Vec<Vec<u8>>, ApiError> {
    let ids = |list: &[Value]| -> Option<Vec<u8>> {
        let ids: Option<Vec<u32>> = list
            .iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect();
        ids.map(|ids| crate::tokens::decode(&ids))
    };
    let wrong = || ApiError::wrong_type(field, "string", input);
    match input {
        Value::String(text) => Ok(vec![text.clone().into_bytes()]),
        Value::Array(list) if list.is_empty() => Err(ApiError::bad_request(
            "Either prompt or prompt_embeds must be provided and non-empty.".to_owned(),
            field,
        )),
        Value::Array(list) if list[0].is_number() => Ok(vec![ids(list).ok_or_else(wrong)?]),
        Value::Array(list) => list
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(text.clone().into_bytes()),
                Value::Array(list) => ids(list).ok_or_else(wrong),
                _ => Err(wrong()),
            })
            .collect(),
        _ => Err(wrong()),
    }
}
