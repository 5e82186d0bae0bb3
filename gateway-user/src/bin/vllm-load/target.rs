//! The server under load, and the bytes of the requests that go to it.

use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

use crate::draws::{Draws, Purpose};
use crate::mix::Endpoint;
use crate::plan::{Fate, Planned};

/// Common English words of three to five letters: with the space between them four to six characters, which is
/// about what a token of English text has.
const WORDS: [&str; 32] = [
    "team", "cost", "for", "each", "word", "that", "line", "we", "read", "time", "of", "the", "queue", "and",
    "one", "more", "gpu", "is", "to", "share", "load", "bill", "day", "note", "sum", "new", "plan", "sort",
    "page", "list", "by", "two",
];

/// Characters of prompt text for each token that was asked for: the usual rule of thumb for English.
const CHARS_PER_TOKEN: usize = 4;

/// `http://HOST[:PORT][/BASE]`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUrl {
    /// `HOST:PORT`, as the Host header shows it and as it is resolved.
    pub authority: String,
    /// What stands before `/v1/…`, without a slash at its end.
    pub base: String,
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = |why: &str| format!("expected http://HOST[:PORT][/BASE], found `{text}`: {why}");
        let rest = text.strip_prefix("http://").ok_or_else(|| {
            expected("only http:// is spoken; put a proxy that ends TLS in between for https")
        })?;
        let (authority, base) = rest
            .split_once('/')
            .map_or((rest, ""), |(host, path)| (host, path));
        let sound = |part: &str| part.bytes().all(|byte| byte.is_ascii_graphic());
        if authority.is_empty() || authority.contains('@') || !sound(authority) || !sound(base) {
            return Err(expected("the host is missing, or holds what a host cannot"));
        }
        let base = base.trim_end_matches('/');
        // A colon within brackets belongs to an IPv6 address.
        let has_port = authority
            .rsplit(']')
            .next()
            .is_some_and(|after| after.contains(':'));
        let authority = if has_port {
            authority.to_owned()
        } else {
            format!("{authority}:80")
        };
        Ok(Self {
            authority,
            base: if base.is_empty() {
                String::new()
            } else {
                format!("/{base}")
            },
        })
    }
}

/// A header that the user adds to every request. Its value may be a key, so it has no `Debug` that shows it.
#[derive(Clone)]
pub struct ExtraHeader {
    name: String,
    value: String,
}

impl std::fmt::Debug for ExtraHeader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: …", self.name)
    }
}

impl FromStr for ExtraHeader {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The text is not quoted in messages: it may hold a key.
        let (name, value) = text
            .split_once(':')
            .ok_or("expected `Name: value`, found no colon")?;
        let (name, value) = (name.trim(), value.trim());
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if name.is_empty() || !name.bytes().all(is_token) {
            return Err(format!("`{name}` is not a header name"));
        }
        if value
            .bytes()
            .any(|byte| byte != b'\t' && (byte < 0x20 || byte == 0x7f))
        {
            return Err(format!("the value of `{name}` holds a control character"));
        }
        if ["content-length", "transfer-encoding", "connection"].contains(&name.to_ascii_lowercase().as_str())
        {
            return Err(format!(
                "`{name}` is set by vllm-load itself, since it says where a request ends"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            value: value.to_owned(),
        })
    }
}

/// The server and everything that is the same in all requests.
#[derive(Debug)]
pub struct Target {
    /// Where to connect; the first that answers is used.
    pub addresses: Vec<SocketAddr>,
    /// What the URL said.
    pub url: ServerUrl,
    seed: u64,
    /// The model's name as a JSON string.
    model_json: String,
    embeddings_model_json: String,
    extra: Vec<ExtraHeader>,
    ignore_eos: bool,
}

/// What a [`Target`] is made of.
#[derive(Debug)]
pub struct TargetOptions {
    /// The server.
    pub url: ServerUrl,
    /// The seed of the run.
    pub seed: u64,
    /// The model to ask for.
    pub model: String,
    /// The model to ask for embeddings.
    pub embeddings_model: String,
    /// Headers that the user wants on each request.
    pub extra: Vec<ExtraHeader>,
    /// Whether to ask vLLM to go on to `max_tokens`.
    pub ignore_eos: bool,
}

impl Target {
    /// Looks the server's name up.
    ///
    /// # Errors
    /// When the name cannot be resolved.
    pub async fn resolve(options: TargetOptions) -> Result<Self> {
        let TargetOptions {
            url,
            seed,
            model,
            embeddings_model,
            extra,
            ignore_eos,
        } = options;
        let addresses: Vec<_> = tokio::net::lookup_host(&url.authority)
            .await
            .with_context(|| format!("cannot resolve `{}`", url.authority))?
            .collect();
        ensure!(
            !addresses.is_empty(),
            "`{}` resolves to no address",
            url.authority
        );
        let model_json = serde_json::to_string(&model)?;
        let embeddings_model_json = serde_json::to_string(&embeddings_model)?;
        Ok(Self {
            addresses,
            url,
            seed,
            model_json,
            embeddings_model_json,
            extra,
            ignore_eos,
        })
    }

    /// Replaces what `out` holds by the bytes of a request.
    pub fn render(&self, request: &Planned, out: &mut Vec<u8>) {
        let body = self.body(request);
        let path = request.endpoint.path();
        out.clear();
        out.extend_from_slice(format!("POST {}{path} HTTP/1.1\r\n", self.url.base).as_bytes());
        self.header(out, "Host", &self.url.authority);
        self.header(
            out,
            "User-Agent",
            concat!("vllm-load/", env!("CARGO_PKG_VERSION")),
        );
        self.header(out, "Content-Type", "application/json");
        self.header(out, "X-Request-Id", &request_id(self.seed, request.index));
        self.header(out, "X-Team-ID", &team_name(request.team));
        if let Some(project) = request.project {
            self.header(out, "X-Project", &project_name(project));
        }
        if let Some(user) = request.user {
            self.header(out, "X-User-ID", &user_name(user));
        }
        if request.fate == Fate::Fail {
            self.header(out, "X-Sim-Fault", "status=500");
        }
        for ExtraHeader { name, value } in &self.extra {
            out.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
        out.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
        out.extend_from_slice(body.as_bytes());
    }

    /// A generated header gives way to the user's of the same name.
    fn header(&self, out: &mut Vec<u8>, name: &str, value: &str) {
        if !self
            .extra
            .iter()
            .any(|extra| extra.name.eq_ignore_ascii_case(name))
        {
            out.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
    }

    fn body(&self, request: &Planned) -> String {
        let prompt = self.prompt(request);
        let model = &self.model_json;
        let tokens = request.output_tokens;
        let stream = if request.stream { ",\"stream\":true" } else { "" };
        let usage = if request.include_usage {
            ",\"stream_options\":{\"include_usage\":true}"
        } else {
            ""
        };
        let eos = if self.ignore_eos {
            ",\"ignore_eos\":true"
        } else {
            ""
        };
        let messages = format!("\"messages\":[{{\"role\":\"user\",\"content\":\"{prompt}\"}}]");
        match request.endpoint {
            Endpoint::Chat => {
                format!("{{\"model\":{model},{messages},\"max_tokens\":{tokens}{eos}{stream}{usage}}}")
            }
            Endpoint::Completions => {
                format!(
                    "{{\"model\":{model},\"prompt\":\"{prompt}\",\"max_tokens\":{tokens}{eos}{stream}{usage}}}"
                )
            }
            Endpoint::Embeddings => {
                format!(
                    "{{\"model\":{},\"input\":\"{prompt}\"}}",
                    self.embeddings_model_json
                )
            }
            // These two report usage unasked and know no `ignore_eos`.
            Endpoint::Responses => {
                format!("{{\"model\":{model},\"input\":\"{prompt}\",\"max_output_tokens\":{tokens}{stream}}}")
            }
            Endpoint::Messages => format!("{{\"model\":{model},{messages},\"max_tokens\":{tokens}{stream}}}"),
        }
    }

    /// Words without quotes or backslashes, so that they need no escaping in JSON.
    fn prompt(&self, request: &Planned) -> String {
        let wanted = request.prompt_tokens as usize * CHARS_PER_TOKEN;
        let mut draws = Draws::new(self.seed, Purpose::Prompt, request.index);
        let mut prompt = String::with_capacity(wanted + 8);
        while prompt.len() < wanted {
            let mut bits = draws.bits();
            // One draw is good for eight words: five bits choose one.
            for _ in 0..8 {
                prompt.push_str(WORDS[(bits & 31) as usize]);
                prompt.push(' ');
                bits >>= 5;
            }
        }
        prompt.truncate(wanted);
        prompt
    }
}

/// The value of `X-Request-Id`: what a test joins the gateway's events by.
pub fn request_id(seed: u64, index: u64) -> String {
    format!("load-{seed}-{index}")
}

/// The team's name in the header and in reports.
pub fn team_name(position: usize) -> String {
    format!("team-{}", position + 1)
}

/// The project's name.
pub fn project_name(number: u32) -> String {
    format!("project-{number}")
}

/// The user's name.
pub fn user_name(number: u32) -> String {
    format!("user-{number}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::plan::tests::plan;

    pub(crate) fn target(addresses: Vec<SocketAddr>, extra: &[&str]) -> Target {
        Target {
            addresses,
            url: "http://127.0.0.1:8000/llm/".parse().expect("a URL"),
            seed: 42,
            model_json: "\"a \\\"b\\\"\"".to_owned(),
            embeddings_model_json: "\"e\"".to_owned(),
            extra: extra
                .iter()
                .map(|header| header.parse().expect("a header"))
                .collect(),
            ignore_eos: true,
        }
    }

    /// Renders a request and takes it apart again: its head's lines, and its body.
    fn rendered(request: &Planned, extra: &[&str]) -> (Vec<String>, serde_json::Value) {
        let mut out = b"left over".to_vec();
        target(vec![], extra).render(request, &mut out);
        let text = String::from_utf8(out).expect("ASCII");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{head}"
        );
        (
            head.split("\r\n").map(str::to_owned).collect(),
            serde_json::from_str(body).expect("JSON"),
        )
    }

    fn request(endpoint: Endpoint) -> Planned {
        Planned {
            endpoint,
            stream: endpoint.streams(),
            include_usage: true,
            ..plan().request(7)
        }
    }

    #[test]
    fn urls_are_taken_apart_or_refused_with_a_reason() {
        let parse = |text: &str| text.parse::<ServerUrl>().map(|url| (url.authority, url.base));
        assert_eq!(
            parse("http://vllm:8000"),
            Ok(("vllm:8000".to_owned(), String::new()))
        );
        assert_eq!(
            parse("http://vllm/a/b/"),
            Ok(("vllm:80".to_owned(), "/a/b".to_owned()))
        );
        assert_eq!(
            parse("http://[::1]:1/"),
            Ok(("[::1]:1".to_owned(), String::new()))
        );
        assert_eq!(parse("http://[::1]"), Ok(("[::1]:80".to_owned(), String::new())));
        assert!(parse("https://vllm").expect_err("no TLS").contains("TLS"));
        for wrong in ["vllm:8000", "http://", "http:///x", "http://u@h", "http://a b"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_request_carries_who_it_is_for_and_its_id() {
        let planned = Planned {
            team: 2,
            project: Some(3),
            user: None,
            ..request(Endpoint::Chat)
        };
        let (head, _) = rendered(&planned, &[]);
        assert_eq!(head[0], "POST /llm/v1/chat/completions HTTP/1.1");
        for line in [
            "X-Team-ID: team-3",
            "X-Project: project-3",
            "X-Request-Id: load-42-7",
        ] {
            assert!(head.iter().any(|found| found == line), "no `{line}` in {head:?}");
        }
        assert!(
            !head
                .iter()
                .any(|line| line.starts_with("X-User-ID") || line.starts_with("X-Sim-Fault"))
        );
        let (head, _) = rendered(
            &Planned {
                fate: Fate::Fail,
                ..planned
            },
            &[],
        );
        assert!(head.iter().any(|line| line == "X-Sim-Fault: status=500"));
    }

    #[test]
    fn a_header_of_the_user_replaces_ours() {
        let (head, _) = rendered(
            &request(Endpoint::Chat),
            &["x-team-id: other", "Authorization: Bearer k"],
        );
        let teams: Vec<_> = head
            .iter()
            .filter(|line| line.to_ascii_lowercase().starts_with("x-team-id"))
            .collect();
        assert_eq!(teams, ["x-team-id: other"]);
        assert!(head.iter().any(|line| line == "Authorization: Bearer k"));
        let header: ExtraHeader = "Authorization: Bearer k".parse().expect("a header");
        assert!(!format!("{header:?}").contains("Bearer"));
        for wrong in ["nothing", ": x", "a b: x", "A: x\r\nB: y", "content-length: 5"] {
            assert!(wrong.parse::<ExtraHeader>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_endpoint_gets_a_body_of_its_own_shape() {
        let prompt_chars = request(Endpoint::Chat).prompt_tokens as usize * CHARS_PER_TOKEN;
        let length = |value: &serde_json::Value| value.as_str().expect("text").len();
        let (_, chat) = rendered(&request(Endpoint::Chat), &[]);
        assert_eq!(length(&chat["messages"][0]["content"]), prompt_chars);
        assert_eq!(
            (&chat["model"], &chat["ignore_eos"]),
            (&"a \"b\"".into(), &true.into())
        );
        assert_eq!(chat["stream_options"]["include_usage"], true);
        let (_, completion) = rendered(&request(Endpoint::Completions), &[]);
        assert_eq!(length(&completion["prompt"]), prompt_chars);
        let (_, embedding) = rendered(&request(Endpoint::Embeddings), &[]);
        assert_eq!(
            (&embedding["model"], embedding.get("stream")),
            (&"e".into(), None)
        );
        let (_, response) = rendered(&request(Endpoint::Responses), &[]);
        assert_eq!(
            response["max_output_tokens"],
            request(Endpoint::Chat).output_tokens
        );
        let (_, message) = rendered(&request(Endpoint::Messages), &[]);
        assert_eq!(
            (&message["stream"], message.get("stream_options")),
            (&true.into(), None)
        );
    }

    #[test]
    fn prompts_repeat_by_seed_and_differ_by_index() {
        let target = target(vec![], &[]);
        let at = |index| {
            target.prompt(&Planned {
                prompt_tokens: 30,
                ..plan().request(index)
            })
        };
        assert_eq!(at(1), at(1));
        assert_ne!(at(1), at(2));
    }
}
