//! `vllm-gateway try`: the gateway before a server that is there already, with nothing to configure and nothing that stays.
//!
//! Nothing is stored: what has passed through is shown on the console until the program ends. Requests need not name a team, so that
//! clients work as they are.

use crate::config::{Capture, Config, ConfigError, Name, Serves, StoreUrl, UpstreamConfig, UpstreamUrl};
use crate::identity::WithoutTeam;
use crate::net::{BindError, bind_listener};
use crate::vllm::fetch::{self, FetchError};
use bytes::Bytes;
use clap::Args;
use hyper::StatusCode;
use hyper::header::AUTHORIZATION;
use serde_json::Value;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::timeout;

/// A host that does not answer by then is not there.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// For the list of models.
const ANSWER_LIMIT: Duration = Duration::from_secs(6);

/// Longest list of models that is read.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Whoever watches wants to see queues grow; vLLM makes its page within milliseconds.
const SCRAPE_INTERVAL: Duration = Duration::from_secs(2);

/// What becomes of running requests at the end: whoever tries something wants it gone at Ctrl-C.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// Models that are named; a site with adapters can have hundreds.
const NAMES_SHOWN: usize = 3;

/// What can be said of a trial.
#[derive(Args, Clone, Debug)]
pub struct TryArgs {
    /// The vLLM that requests go to, such as http://my-vllm:8000; several, separated by commas, are replicas.
    #[arg(long, value_name = "URL", value_parser = parse_url, value_delimiter = ',', required = true)]
    pub upstream: Vec<UpstreamUrl>,
    /// The vLLM for embeddings, if it is another.
    #[arg(long, value_name = "URL", value_parser = parse_url, value_delimiter = ',')]
    pub embeddings: Vec<UpstreamUrl>,
    /// Where clients connect.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Where the console is; on another address than loopback it is closed.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9464")]
    pub admin: SocketAddr,
}

/// Why there is nothing to try.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// The arguments do not fit each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A server does not answer as vLLM does.
    #[error("{url} {found}\n{advice}")]
    Upstream {
        /// The server.
        url: UpstreamUrl,
        /// What it did.
        found: String,
        /// What can be done.
        advice: String,
    },
}

/// What a server is found to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The server.
    pub url: UpstreamUrl,
    /// Its models; `None` when it lists them only for those who have a key.
    pub models: Option<Vec<String>>,
}

/// People paste the address that they give their clients.
fn parse_url(text: &str) -> Result<UpstreamUrl, String> {
    let base = text.strip_suffix('/').unwrap_or(text);
    let base = base.strip_suffix("/v1").unwrap_or(base);
    base.parse::<UpstreamUrl>().map_err(|error| error.to_string())
}

impl TryArgs {
    /// The configuration of a trial.
    ///
    /// # Errors
    /// When the arguments do not fit each other.
    pub fn config(&self) -> Result<Config, TrialError> {
        let mut config = Config::default();
        config.gateway.listen = self.listen;
        config.gateway.drain_timeout = DRAIN_TIMEOUT;
        config.admin.listen = self.admin;
        // The kernel's view takes privileges, and a trial should not.
        config.capture = Capture::Proxy;
        config.identity.without_team = WithoutTeam::NameByKey;
        config.vllm.scrape_interval = SCRAPE_INTERVAL;
        config.store.url = StoreUrl::None;
        config.upstreams = upstreams("vllm", Serves::Generate, &self.upstream)
            .chain(upstreams("embeddings", Serves::Embeddings, &self.embeddings))
            .collect();
        Ok(config.checked()?)
    }

    /// Looks whether the addresses are free, in the words of the command line.
    ///
    /// # Errors
    /// When one is not; the message names who holds it.
    pub fn check_addresses(&self) -> Result<(), BindError> {
        drop(bind_listener(self.listen, "gateway", "--listen")?);
        drop(bind_listener(self.admin, "console", "--admin")?);
        Ok(())
    }

    /// Asks each server what it serves.
    ///
    /// # Errors
    /// At the first that does not answer as vLLM does; the message says what to do.
    pub async fn look(&self, variable: fn(&str) -> Option<OsString>) -> Result<Vec<Found>, TrialError> {
        let mut found = Vec::new();
        for url in self.upstream.iter().chain(&self.embeddings) {
            found.push(look_at(url, variable).await?);
        }
        Ok(found)
    }
}

fn upstreams(name: &str, serves: Serves, urls: &[UpstreamUrl]) -> impl Iterator<Item = UpstreamConfig> {
    let named = move |number: usize| match number {
        1 => name.to_owned(),
        number => format!("{name}-{number}"),
    };
    (1..).zip(urls).filter_map(move |(number, url)| {
        // A word and a number are always a name.
        let name: Name = named(number).parse().ok()?;
        Some(UpstreamConfig::new(name, url.clone(), serves))
    })
}

async fn look_at(url: &UpstreamUrl, variable: fn(&str) -> Option<OsString>) -> Result<Found, TrialError> {
    let refuse = |found: String, advice: String| TrialError::Upstream {
        url: url.clone(),
        found,
        advice,
    };
    let mut request = fetch::get(url, "/v1/models");
    if let Some(key) = variable("VLLM_API_KEY").and_then(|key| key.into_string().ok()) {
        request = request.header(AUTHORIZATION, format!("Bearer {key}"));
    }
    let asked = timeout(ANSWER_LIMIT, async {
        let answer = fetch::send(url, request, Bytes::new(), CONNECT_LIMIT).await?;
        let status = answer.status();
        Ok((status, answer.body(BODY_BYTES_MAX).await?))
    });
    let (status, body) = match asked.await {
        Ok(Ok(answered)) => answered,
        Ok(Err(FetchError::Connect(error))) => {
            let advice = format!(
                "Is vLLM running, and done with loading its model? `curl {url}/v1/models` must answer from this machine; in a container, \
                 use the container's name or address, not localhost."
            );
            return Err(refuse(format!("cannot be connected to: {error}"), advice));
        }
        Ok(Err(error)) => {
            let advice = format!("Is it an http:// address of vLLM? Try `curl -v {url}/v1/models`.");
            return Err(refuse(format!("does not answer in HTTP: {error}"), advice));
        }
        Err(_) => {
            let advice =
                "It may still be loading its model: try again when `GET /health` answers.".to_owned();
            return Err(refuse(
                format!("does not answer within {} s", ANSWER_LIMIT.as_secs()),
                advice,
            ));
        }
    };
    match status {
        StatusCode::OK => match models_in(&body) {
            Some(models) => Ok(Found {
                url: url.clone(),
                models: Some(models),
            }),
            None => Err(refuse(
                "answers /v1/models with something else than a list of models".to_owned(),
                "Give the address of vLLM's OpenAI-compatible server itself.".to_owned(),
            )),
        },
        // Clients have the key, and it is passed on.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Ok(Found {
            url: url.clone(),
            models: None,
        }),
        status => Err(refuse(
            format!("answers /v1/models with {status}"),
            "Give the address of vLLM's OpenAI-compatible server itself, without a path.".to_owned(),
        )),
    }
}

fn models_in(body: &[u8]) -> Option<Vec<String>> {
    let list: Value = serde_json::from_slice(body).ok()?;
    let models = list["data"].as_array()?.iter();
    Some(
        models
            .filter_map(|model| model["id"].as_str().map(str::to_owned))
            .collect(),
    )
}

/// What is printed once the gateway is up: what to do next.
pub fn welcome(found: &[Found], clients: SocketAddr, admin: SocketAddr) -> String {
    let mut text = String::new();
    for Found { url, models } in found {
        let serves = match models.as_deref() {
            None => "asks for an API key; your clients' keys are passed on".to_owned(),
            Some([]) => "answers, and lists no model".to_owned(),
            Some(models) => {
                let shown = models[..models.len().min(NAMES_SHOWN)].join(", ");
                let more = models.len().saturating_sub(NAMES_SHOWN);
                let more = if more > 0 {
                    format!(" and {more} more")
                } else {
                    String::new()
                };
                format!("serves {shown}{more}")
            }
        };
        // Writing to a text cannot fail.
        let _ = writeln!(text, "  vLLM       {url}  {serves}");
    }
    let model = found.iter().find_map(|found| found.models.as_ref()?.first());
    let model = model.map_or("your-model", String::as_str);
    let _ = write!(
        text,
        "  Clients    http://{clients}/v1  <- use this as base_url, change nothing else\n\
         \x20 Console    http://{admin}/  <- open this, then send a request:\n\
         \n\
         \x20   curl http://{clients}/v1/chat/completions -H 'Content-Type: application/json' \\\n\
         \x20     -d '{{\"model\": \"{model}\", \"stream\": true, \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'\n\
         \n\
         \x20 A request is for the team in its header X-Team-ID. One without is listed by its API key, as key-xxxxxx, or as `unnamed`.\n\
         \x20 Nothing is written to disk. Ctrl-C ends it.\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: TryArgs,
    }

    fn args(words: &[&str]) -> Result<TryArgs, String> {
        let words = ["try"].iter().chain(words);
        Line::try_parse_from(words)
            .map(|line| line.args)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn an_address_as_clients_have_it_will_do() {
        for text in [
            "http://vllm:8000",
            "http://vllm:8000/",
            "http://vllm:8000/v1",
            "http://vllm:8000/v1/",
        ] {
            let args = args(&["--upstream", text]).unwrap();
            assert_eq!(args.upstream[0].to_string(), "http://vllm:8000", "{text}");
        }
        let message = args(&["--upstream", "http://vllm"]).unwrap_err();
        assert!(message.contains("the port is missing"), "{message}");
        assert!(args(&[]).unwrap_err().contains("--upstream"));
    }

    #[test]
    fn a_trial_keeps_nothing_and_names_who_names_nobody() {
        let args = args(&[
            "--upstream",
            "http://a:8000,http://b:8000",
            "--embeddings",
            "http://c:8001",
        ])
        .unwrap();
        let config = args.config().unwrap();
        let upstreams: Vec<_> = config
            .upstreams
            .iter()
            .map(|upstream| (upstream.name.as_str(), upstream.serves))
            .collect();
        assert_eq!(
            upstreams,
            [
                ("vllm", Serves::Generate),
                ("vllm-2", Serves::Generate),
                ("embeddings", Serves::Embeddings)
            ]
        );
        assert_eq!(config.store.url, StoreUrl::None);
        assert_eq!(config.capture, Capture::Proxy);
        assert_eq!(config.identity.without_team, WithoutTeam::NameByKey);
    }

    #[test]
    fn a_trial_of_itself_is_refused() {
        let args = args(&["--upstream", "http://127.0.0.1:8080"]).unwrap();
        let message = args.config().unwrap_err().to_string();
        assert!(message.contains("leads back to this gateway"), "{message}");
    }

    #[test]
    fn what_to_do_next_names_a_model_that_is_there() {
        let url: UpstreamUrl = "http://vllm:8000".parse().unwrap();
        let found = |models: Option<&[&str]>| Found {
            url: url.clone(),
            models: models.map(|models| models.iter().map(|model| (*model).to_owned()).collect()),
        };
        let (clients, admin) = (
            "127.0.0.1:8080".parse().unwrap(),
            "127.0.0.1:9464".parse().unwrap(),
        );
        let text = welcome(&[found(Some(&["a", "b", "c", "d"]))], clients, admin);
        for part in [
            "serves a, b, c and 1 more",
            "http://127.0.0.1:8080/v1 ",
            "http://127.0.0.1:9464/ ",
            "\"model\": \"a\"",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let text = welcome(&[found(None)], clients, admin);
        assert!(text.contains("your-model") && text.contains("API key"), "{text}");
    }
}
