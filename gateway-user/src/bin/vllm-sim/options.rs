//! The command line: what to serve, how fast the engine is, and what should go wrong.
//!
//! Everything has a default that behaves like a mid-sized GPU server, so `vllm-sim` alone is a usable upstream.

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, ValueEnum};

/// A stand-in for a vLLM OpenAI server: same routes, same bytes, same /metrics, no GPU.
#[derive(Debug, Clone, Parser)]
#[command(name = "vllm-sim", disable_version_flag = true)]
pub struct Options {
    /// Address to listen on; with port 0 the system picks one and the first line of stdout names it.
    #[arg(long, default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,

    /// Served model names (repeat or separate by commas). The first labels /metrics; the others are aliases.
    #[arg(long = "model", value_delimiter = ',', default_value = "sim")]
    pub models: Vec<String>,

    /// Served LoRA adapters: listed with the base model as parent, counted in /metrics under the base model.
    #[arg(long = "lora", value_delimiter = ',')]
    pub loras: Vec<String>,

    /// What the model does; decides which routes exist.
    #[arg(long, value_enum, default_value_t = Kind::Generate)]
    pub kind: Kind,

    /// Steps take no time: as many requests as the machine can carry, still counted exactly.
    #[arg(long)]
    pub instant: bool,

    /// Fixes every text, length and vector. Equal prompts get equal answers whatever the temperature.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Force usage (also per chunk) on every stream, as --enable-force-include-usage does.
    #[arg(long)]
    pub force_usage: bool,

    /// Tokens that a stream gathers before it sends a chunk (the first token is always sent at once).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub stream_interval: u32,

    /// Put timings into bodies, as --enable-per-request-metrics does.
    #[arg(long)]
    pub request_metrics: bool,

    /// Echo X-Request-Id in responses, as --enable-request-id-headers does.
    #[arg(long)]
    pub request_id_headers: bool,

    /// Report cached prompt tokens in usage, as --enable-prompt-tokens-details does.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub prompt_tokens_details: bool,

    /// Longest prompt plus answer, in tokens.
    #[arg(long, default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_model_len: u32,

    /// Most sequences that run at once.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_seqs: u32,

    /// Token budget of one engine step (decodes first, prefill chunks take the rest).
    #[arg(long, default_value_t = 8_192, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_batched_tokens: u32,

    /// Requests that may wait or run before new ones are refused with 503.
    #[arg(long, default_value_t = 65_536)]
    pub max_num_queued_reqs: usize,

    /// Blocks of the KV cache.
    #[arg(long, default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..))]
    pub kv_blocks: u32,

    /// Tokens in a KV block.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub block_size: u32,

    /// Step time for each prompt token computed, in microseconds.
    #[arg(long, default_value_t = 60.0, value_parser = microseconds)]
    pub prefill_us_per_token: f64,

    /// Step time whatever is in the step, in microseconds.
    #[arg(long, default_value_t = 8_000.0, value_parser = microseconds)]
    pub step_base_us: f64,

    /// Step time for each sequence that decodes, in microseconds.
    #[arg(long, default_value_t = 50.0, value_parser = microseconds)]
    pub decode_us_per_seq: f64,

    /// Step time for each token of context that a decoding sequence reads in the KV cache, in microseconds.
    #[arg(long, default_value_t = 0.0, value_parser = microseconds)]
    pub read_us_per_token: f64,

    /// Switch the prefix cache off.
    #[arg(long)]
    pub no_prefix_cache: bool,

    /// How long an idle connection is kept (uvicorn's default).
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub keep_alive: Duration,

    /// Version reported at /version.
    #[arg(long = "version", value_name = "VERSION", default_value = "0.32.0")]
    pub vllm_version: String,

    /// `system_fingerprint` of the answers; empty for none.
    #[arg(long, default_value = "vllm-0.32.0-42cbcd32")]
    pub system_fingerprint: String,

    /// Length of an embedding.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub embedding_size: u32,

    /// Threads that serve connections. With 1 a run is deterministic in the order of its steps.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: u16,

    /// Answer a share of the requests with an error status, e.g. `500:0.02` (repeatable).
    #[arg(long = "fail-status", value_delimiter = ',')]
    pub fail_status: Vec<StatusRate>,

    /// Share of the requests that never get an answer beyond a stream's head.
    #[arg(long, default_value_t = 0.0, value_parser = probability)]
    pub fail_stall: f64,

    /// Share of the requests whose connection is closed in mid-answer.
    #[arg(long, default_value_t = 0.0, value_parser = probability)]
    pub fail_close: f64,

    /// Share of the requests that carry one malformed chunk.
    #[arg(long, default_value_t = 0.0, value_parser = probability)]
    pub fail_malformed: f64,

    /// Share of the streams that end in an error event (HTTP 200).
    #[arg(long, default_value_t = 0.0, value_parser = probability)]
    pub fail_error_event: f64,

    /// How long the model takes to load. Until then the port is bound and nobody listens, as with vLLM: connections are refused.
    #[arg(long, value_parser = duration)]
    pub load_time: Option<Duration>,

    /// Serve /sleep, /wake_up and /is_sleeping, as VLLM_SERVER_DEV_MODE=1 does. Requests to a sleeping server are served all the same.
    #[arg(long)]
    pub dev_mode: bool,

    /// Show /metrics as the decode server of a disaggregated pair does: prompts come prefilled, through NIXL.
    #[arg(long)]
    pub disaggregated: bool,

    /// Serve /sim/requests and /sim/totals: what the engine did for each request.
    #[arg(long)]
    pub introspect: bool,

    /// With --introspect: log when which bytes were read and written, and serve that at /sim/sockets. For short runs: it all stays in memory.
    #[arg(long, requires = "introspect")]
    pub log_sockets: bool,
}

/// What the served model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Chat, completions, Responses, Messages.
    Generate,
    /// Embeddings, pooling, score, rerank.
    Embed,
}

/// An error status and the share of requests that get it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StatusRate {
    /// HTTP status, 400–599.
    pub status: u16,
    /// Probability, 0–1.
    pub rate: f64,
}

impl FromStr for StatusRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (status, rate) = text
            .split_once(':')
            .ok_or_else(|| format!("expected STATUS:SHARE such as 500:0.02, found `{text}`"))?;
        let status = error_status(status)?;
        Ok(StatusRate {
            status,
            rate: probability(rate)?,
        })
    }
}

impl Options {
    /// Checks what one option cannot see of another.
    ///
    /// # Errors
    /// Says which option to change and how.
    pub fn check(&self) -> Result<(), String> {
        let kv_tokens = u64::from(self.kv_blocks) * u64::from(self.block_size);
        if kv_tokens < u64::from(self.max_model_len) {
            return Err(format!(
                "the KV cache holds {kv_tokens} tokens (--kv-blocks {} × --block-size {}) and --max-model-len is {}: \
                 raise --kv-blocks or lower --max-model-len",
                self.kv_blocks, self.block_size, self.max_model_len
            ));
        }
        if self.models.iter().any(String::is_empty) {
            return Err("--model has an empty name: name every served model".to_owned());
        }
        Ok(())
    }
}

/// Parses an error status.
///
/// # Errors
/// When it is not a number from 400 to 599.
pub fn error_status(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(status @ 400..=599) => Ok(status),
        _ => Err(format!(
            "expected an error status from 400 to 599, found `{text}`"
        )),
    }
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err(format!("expected a share from 0 to 1, found `{text}`")),
    }
}

fn microseconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(us) if us.is_finite() && us >= 0.0 => Ok(us),
        _ => Err(format!("expected microseconds, 0 or more, found `{text}`")),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let parse = |number: &str, unit_s: f64| match number.parse::<f64>() {
        Ok(n) if n > 0.0 && n < 1e9 => Ok(Duration::from_secs_f64(n * unit_s)),
        _ => Err(format!("expected a duration such as 5s or 500ms, found `{text}`")),
    };
    match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => parse(number, 0.001),
        (None, Some(number)) => parse(number, 1.0),
        (None, None) => parse(text, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_consistent() {
        let options = Options::try_parse_from(["vllm-sim"]).unwrap();
        assert_eq!(options.check(), Ok(()));
        assert!(options.prompt_tokens_details);
    }

    #[test]
    fn a_cache_smaller_than_the_longest_request_is_refused() {
        let options =
            Options::try_parse_from(["vllm-sim", "--kv-blocks", "8", "--block-size", "16"]).unwrap();
        let message = options.check().unwrap_err();
        assert!(
            message.contains("128 tokens") && message.contains("--kv-blocks"),
            "{message}"
        );
    }

    #[test]
    fn models_and_faults_parse() {
        let options = Options::try_parse_from([
            "vllm-sim",
            "--model",
            "a,b",
            "--model",
            "c",
            "--fail-status",
            "500:0.5",
            "--keep-alive",
            "250ms",
        ])
        .unwrap();
        assert_eq!(options.models, ["a", "b", "c"]);
        assert_eq!(
            options.fail_status,
            [StatusRate {
                status: 500,
                rate: 0.5
            }]
        );
        assert_eq!(options.keep_alive, Duration::from_millis(250));
        assert!(Options::try_parse_from(["vllm-sim", "--fail-status", "200:0.5"]).is_err());
        assert!(Options::try_parse_from(["vllm-sim", "--fail-stall", "2"]).is_err());
    }
}
