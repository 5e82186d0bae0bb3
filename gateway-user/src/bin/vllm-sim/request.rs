//! From a request's body to a job: what to prefill, what to say, how to answer.

use std::sync::Arc;

use serde_json::Value;

use crate::engine::{Finish, SeqSpec};
use crate::options::Options;
use crate::prompts::prompts;
use crate::shapes::error::ApiError;
use crate::tokens::{Prompt, Voice, hash_bytes};
use crate::tools::{arguments, tool};

/// Completions' default when a request names no limit, as in OpenAI's API.
const COMPLETION_MAX_TOKENS: u32 = 16;
/// vLLM's default bound on `n`.
const N_MAX: u32 = 16_384;

/// A route that generates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`
    Messages,
}

/// Which usage a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsageMode {
    /// None.
    Off,
    /// On a last chunk.
    Final,
    /// On every chunk and on a last one.
    Continuous,
}

/// A checked request.
#[derive(Debug)]
pub struct Job {
    /// What came in.
    pub endpoint: Endpoint,
    /// Requested model, as it is named in the answer.
    pub model: String,
    /// All prompts.
    pub prompts: Vec<Arc<Prompt>>,
    /// Choices a prompt.
    pub n: u32,
    /// For each choice what it says.
    pub voices: Vec<Voice>,
    /// For each choice how many tokens and why no more.
    pub ends: Vec<(u32, Finish)>,
    /// The limit that applied.
    pub max_tokens: u32,
    /// Whether the answer is a stream.
    pub stream: bool,
    /// The stream's usage.
    pub usage: UsageMode,
    /// Alternatives a token, if log probabilities were asked for.
    pub logprobs: Option<u32>,
    /// The tool that has to be called.
    pub tool: Option<String>,
    /// Whether a call ends in `tool_calls` rather than `stop`.
    pub tool_required: bool,
    /// The request itself, for the members that answers repeat. Empty where none does.
    pub body: Value,
}

impl Job {
    /// Checks and interprets `body`.
    ///
    /// # Errors
    /// The answer that vLLM gives to such a request.
    pub fn parse(endpoint: Endpoint, body: &[u8], options: &Options) -> Result<Self, ApiError> {
        let body = parse_body(body)?;
        let text = match endpoint {
            Endpoint::Chat | Endpoint::Messages => None,
            Endpoint::Completions => Some("prompt"),
            Endpoint::Responses => Some("input"),
        };
        require(&body, text.unwrap_or("messages"))?;
        if endpoint == Endpoint::Messages {
            require(&body, "max_tokens")?;
        }
        let model = resolve_model(&body, options)?;
        let salt = prompt_salt(&body, &model, options);
        let prompts = prompts(endpoint, &body, salt, options)?;
        let n = match integer(&body, "n")? {
            Some(n @ 1..=N_MAX) if matches!(endpoint, Endpoint::Chat | Endpoint::Completions) => n,
            Some(n) if n == 0 || n > N_MAX => {
                return Err(ApiError::bad_request(
                    format!("n must be at least 1, got {n}."),
                    "n",
                ));
            }
            _ => 1,
        };
        let max_tokens = max_tokens(endpoint, &body, &prompts, options)?;
        let tool = tool(&body);
        let mut job = Job {
            endpoint,
            model,
            n,
            voices: Vec::new(),
            ends: Vec::new(),
            max_tokens,
            stream: boolean(&body, "stream")?.unwrap_or(false),
            usage: usage_mode(&body, options),
            logprobs: logprobs(endpoint, &body)?,
            tool_required: body["tool_choice"] == "required" || body["tool_choice"]["type"] == "any",
            tool,
            prompts,
            body: Value::Null,
        };
        job.cast(&body, options)?;
        if endpoint == Endpoint::Responses {
            job.body = body;
        }
        Ok(job)
    }

    /// Decides what each choice says and for how long.
    fn cast(&mut self, body: &Value, options: &Options) -> Result<(), ApiError> {
        let ignore_eos = boolean(body, "ignore_eos")?.unwrap_or(false);
        let min_tokens = integer(body, "min_tokens")?.unwrap_or(0);
        let arguments = self.tool.as_deref().map(|name| arguments(body, name));
        for prompt in &self.prompts {
            for choice in 0..self.n {
                let mut voice = Voice::new(options.seed, prompt.hash, choice);
                if let Some(arguments) = &arguments {
                    voice = voice.scripted(arguments);
                }
                let natural = voice.natural_len().max(min_tokens);
                let end = if ignore_eos || natural > self.max_tokens {
                    (self.max_tokens, Finish::Length)
                } else {
                    (natural, Finish::Stop)
                };
                self.voices.push(voice);
                self.ends.push(end);
            }
        }
        Ok(())
    }

    /// The sequences for the engine.
    pub fn seqs(&self) -> Vec<SeqSpec> {
        self.ends
            .iter()
            .enumerate()
            .map(|(choice, &(target, finish))| {
                let prompt = Arc::clone(&self.prompts[choice / self.n as usize]);
                SeqSpec {
                    prompt,
                    target,
                    finish,
                }
            })
            .collect()
    }

    /// Prompt tokens as they are billed: each prompt once.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompts.iter().map(|prompt| prompt.tokens).sum()
    }

    /// Prompt tokens of one choice.
    pub fn prompt_tokens_of(&self, choice: u32) -> u32 {
        self.prompts
            .get((choice / self.n) as usize)
            .map_or(0, |prompt| prompt.tokens)
    }
}

/// Parses a body as JSON object.
///
/// # Errors
/// FastAPI's validation errors.
pub fn parse_body(body: &[u8]) -> Result<Value, ApiError> {
    let value: Value = serde_json::from_slice(body).map_err(|error| ApiError::not_json(body, &error))?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(ApiError::wrong_type("body", "dictionary", &value))
    }
}

/// The requested model, or the base model if none is named.
///
/// # Errors
/// When it is not served.
pub fn resolve_model(body: &Value, options: &Options) -> Result<String, ApiError> {
    let wanted = match body.get("model") {
        None | Some(Value::Null) => return Ok(options.models[0].clone()),
        Some(Value::String(name)) => name,
        Some(other) => return Err(ApiError::wrong_type("model", "string", other)),
    };
    if options
        .models
        .iter()
        .chain(&options.loras)
        .any(|served| served == wanted)
    {
        return Ok(wanted.clone());
    }
    Err(ApiError::unknown_model(wanted, &options.models.join(", ")))
}

/// What parts prefix caches: the adapter, and the tenant's salt.
pub fn prompt_salt(body: &Value, model: &str, options: &Options) -> u64 {
    let adapter = if options.loras.iter().any(|lora| lora == model) {
        model
    } else {
        ""
    };
    let tenant = body["cache_salt"].as_str().unwrap_or("");
    hash_bytes(hash_bytes(0, adapter.as_bytes()), tenant.as_bytes())
}

/// Requires a member.
///
/// # Errors
/// When it is not there.
pub fn require(body: &Value, field: &str) -> Result<(), ApiError> {
    match body.get(field) {
        Some(_) => Ok(()),
        None => Err(ApiError::missing(
            field,
            body.as_object().map_or(0, serde_json::Map::len),
        )),
    }
}

fn max_tokens(
    endpoint: Endpoint,
    body: &Value,
    prompts: &[Arc<Prompt>],
    options: &Options,
) -> Result<u32, ApiError> {
    let names: &[&str] = match endpoint {
        Endpoint::Chat => &["max_completion_tokens", "max_tokens"],
        Endpoint::Completions | Endpoint::Messages => &["max_tokens"],
        Endpoint::Responses => &["max_output_tokens"],
    };
    let longest_prompt = prompts.iter().map(|prompt| prompt.tokens).max().unwrap_or(0);
    let room = options.max_model_len - longest_prompt;
    for name in names {
        let Some(wanted) = integer(body, name)? else {
            continue;
        };
        if wanted == 0 {
            return Err(ApiError::bad_request(
                format!("{name} must be at least 1, got 0."),
                name,
            ));
        }
        if wanted > room {
            let (longest, total) = (
                options.max_model_len,
                u64::from(wanted) + u64::from(longest_prompt),
            );
            return Err(ApiError::bad_request(
                format!(
                    "This model's maximum context length is {longest} tokens. However, you requested {wanted} output \
                     tokens and your prompt contains at least {longest_prompt} input tokens, for a total of at least \
                     {total} tokens. Please reduce the length of the input prompt or the number of requested output \
                     tokens. (parameter=input_tokens, value={longest_prompt})"
                ),
                "input_tokens",
            ));
        }
        return Ok(wanted);
    }
    Ok(if endpoint == Endpoint::Completions {
        COMPLETION_MAX_TOKENS.min(room)
    } else {
        room
    })
}

fn usage_mode(body: &Value, options: &Options) -> UsageMode {
    let asked = &body["stream_options"];
    if options.force_usage {
        return UsageMode::Continuous;
    }
    match (
        asked["include_usage"] == true,
        asked["continuous_usage_stats"] == true,
    ) {
        (false, _) => UsageMode::Off,
        (true, false) => UsageMode::Final,
        (true, true) => UsageMode::Continuous,
    }
}

fn logprobs(endpoint: Endpoint, body: &Value) -> Result<Option<u32>, ApiError> {
    match endpoint {
        Endpoint::Chat if boolean(body, "logprobs")? == Some(true) => {
            Ok(Some(integer(body, "top_logprobs")?.unwrap_or(0)))
        }
        Endpoint::Completions => integer(body, "logprobs"),
        _ => Ok(None),
    }
}

fn integer(body: &Value, field: &str) -> Result<Option<u32>, ApiError> {
    match body.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64() {
            // Negative limits are as useless as zero and are refused with it.
            Some(number) => Ok(Some(u32::try_from(number.max(0)).unwrap_or(u32::MAX))),
            None => Err(ApiError::wrong_type(field, "integer", value)),
        },
    }
}

fn boolean(body: &Value, field: &str) -> Result<Option<bool>, ApiError> {
    match body.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(ApiError::wrong_type(field, "boolean", other)),
    }
}
