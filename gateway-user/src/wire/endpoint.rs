//! vLLM's routes: which cost tokens, which serve the operator, and what to call them.
//!
//! uvicorn percent-decodes a path before it is routed, and Starlette redirects a path with a trailing slash, so a route is
//! recognised here after the same steps: whoever writes `/%73leep` means `/sleep`.

use std::borrow::Cow;

/// What a route is for; it decides which upstreams can serve it and how its response is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Text is generated; tokens are counted.
    Generate,
    /// Vectors, scores or classes of the input; prompt tokens are counted.
    Pool,
    /// Costs nothing worth billing: lists, health, tokenizer.
    Free,
    /// Changes or reveals the server for everyone: for operators, not for tenants.
    Administer,
    /// Unknown: passed through and recorded without tokens.
    Other,
}

macro_rules! endpoints {
    ($($(#[$doc:meta])* $name:ident = $purpose:ident, $canonical:literal $(| $alias:literal)*;)*) => {
        /// A route of vLLM's server. Routes with several spellings have one name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Endpoint { $($(#[$doc])* $name,)* /// Any other path.
            Other }

        impl Endpoint {
            /// Every known route.
            pub const ALL: &'static [Endpoint] = &[$(Endpoint::$name,)* Endpoint::Other];

            fn of_path(path: &str) -> Endpoint {
                match path { $($canonical $(| $alias)* => Endpoint::$name,)* _ => Endpoint::Other }
            }

            /// The route's canonical path, or `other`. A bounded set: fit for a metric label.
            pub fn name(self) -> &'static str {
                match self { $(Endpoint::$name => $canonical,)* Endpoint::Other => "other" }
            }

            /// What the route is for.
            pub fn purpose(self) -> Purpose {
                match self { $(Endpoint::$name => Purpose::$purpose,)* Endpoint::Other => Purpose::Other }
            }
        }
    };
}

endpoints! {
    /// OpenAI chat.
    ChatCompletions = Generate, "/v1/chat/completions";
    /// Several chats in one request.
    ChatBatch = Generate, "/v1/chat/completions/batch";
    /// OpenAI text completion.
    Completions = Generate, "/v1/completions";
    /// OpenAI Responses.
    Responses = Generate, "/v1/responses";
    /// Anthropic Messages.
    Messages = Generate, "/v1/messages";
    /// vLLM's own token-in, token-out route.
    Generate = Generate, "/inference/v1/generate";
    /// SageMaker: the body decides which route it stands for.
    Invocations = Generate, "/invocations";
    /// Speech to text.
    Transcriptions = Generate, "/v1/audio/transcriptions";
    /// Speech to English text.
    Translations = Generate, "/v1/audio/translations";
    /// Speech over a WebSocket.
    Realtime = Generate, "/v1/realtime";
    /// Embeddings.
    Embeddings = Pool, "/v1/embeddings" | "/v2/embed";
    /// Hidden states.
    Pooling = Pool, "/pooling";
    /// Classes of a text.
    Classify = Pool, "/classify";
    /// Similarity of texts.
    Score = Pool, "/score" | "/v1/score";
    /// Documents in the order of a query.
    Rerank = Pool, "/rerank" | "/v1/rerank" | "/v2/rerank";
    /// The list of models.
    Models = Free, "/v1/models";
    /// Text to token ids.
    Tokenize = Free, "/tokenize";
    /// Token ids to text.
    Detokenize = Free, "/detokenize";
    /// Anthropic's token count.
    CountTokens = Free, "/v1/messages/count_tokens";
    /// Liveness.
    Health = Free, "/health" | "/ping";
    /// The server's version.
    Version = Free, "/version";
    /// Prometheus metrics of the engine.
    Metrics = Administer, "/metrics";
    /// Load of the server.
    Load = Free, "/load";
    /// Adds an adapter for everyone.
    LoadLora = Administer, "/v1/load_lora_adapter";
    /// Takes an adapter from everyone.
    UnloadLora = Administer, "/v1/unload_lora_adapter";
    /// Profiling of the engine.
    Profile = Administer, "/start_profile" | "/stop_profile";
    /// Changes the number of engines.
    ScaleElastic = Administer, "/scale_elastic_ep" | "/is_scaling_elastic_ep";
    /// Stops and starts the engine (development mode).
    Sleep = Administer, "/sleep" | "/wake_up" | "/is_sleeping" | "/pause" | "/resume" | "/is_paused";
    /// Empties caches (development mode).
    ResetCache = Administer, "/reset_prefix_cache" | "/reset_mm_cache" | "/reset_encoder_cache";
    /// Calls into the workers, shows the configuration, replaces weights (development mode).
    Internals = Administer, "/collective_rpc" | "/server_info" | "/init_weight_transfer_engine"
        | "/update_weights" | "/get_world_size";
}

impl Endpoint {
    /// The route of that [name](Endpoint::name).
    pub fn of_name(name: &str) -> Endpoint {
        // A name is a path that leads to its route, but for `other`, which is none.
        Endpoint::of_path(name)
    }

    /// The route that a server behind this gateway would take for `path` (no query).
    pub fn classify(path: &str) -> Endpoint {
        match Endpoint::of_path(path) {
            Endpoint::Other => Endpoint::of_unusual(path),
            known => known,
        }
    }

    fn of_unusual(path: &str) -> Endpoint {
        // vLLM mounts its metrics at whatever begins like this, `/metricsX` and `/metrics/../x` included.
        let is_metrics = |path: &str| path.starts_with(Endpoint::Metrics.name());
        if is_normal(path) {
            return if is_metrics(path) {
                Endpoint::Metrics
            } else {
                Endpoint::Other
            };
        }
        let normalized = normalized(path);
        if is_metrics(&percent_decoded(path)) || is_metrics(&normalized) {
            return Endpoint::Metrics;
        }
        Endpoint::of_path(&normalized)
    }
}

/// Whether [`normalized`] would leave `path` as it is.
fn is_normal(path: &str) -> bool {
    let is_plain = |segment: &str| !matches!(segment, "" | "." | "..");
    let segments = path.strip_prefix('/').map(|rest| rest.split('/'));
    path == "/" || (!path.contains('%') && segments.is_some_and(|mut segments| segments.all(is_plain)))
}

/// `path` as a router sees it: percent-decoded once, without empty and dot segments and without a trailing slash.
fn normalized(path: &str) -> String {
    let decoded = percent_decoded(path);
    let mut kept: Vec<&str> = Vec::new();
    for segment in decoded.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(kept.pop()),
            other => kept.push(other),
        }
    }
    format!("/{}", kept.join("/"))
}

fn percent_decoded(path: &str) -> Cow<'_, str> {
    if !path.contains('%') {
        return Cow::Borrowed(path);
    }
    let hex = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let (bytes, mut out, mut at) = (path.as_bytes(), Vec::with_capacity(path.len()), 0);
    while at < bytes.len() {
        let escape = match bytes[at..] {
            [b'%', high, low, ..] => hex(high).zip(hex(low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        out.push(escape.unwrap_or(bytes[at]));
        at += if escape.is_some() { 3 } else { 1 };
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_recognised_however_it_is_spelled() {
        for spelled in [
            "/sleep",
            "/%73leep",
            "/sleep/",
            "//sleep",
            "/./sleep",
            "/v1/../sleep",
            "/%2e/sleep",
            "/metrics/",
            "/metricsX",
            "/%6detrics/x",
            "/metrics/../v1/models",
            "//metrics/x",
        ] {
            assert_eq!(
                Endpoint::classify(spelled).purpose(),
                Purpose::Administer,
                "{spelled}"
            );
        }
        assert_eq!(
            Endpoint::classify("/v1/chat%2Fcompletions"),
            Endpoint::ChatCompletions
        );
        assert_eq!(Endpoint::classify("/v1/rerank").name(), "/rerank");
        assert_eq!(Endpoint::classify("/%zz%"), Endpoint::Other);
        assert_eq!(
            Endpoint::classify("/SLEEP"),
            Endpoint::Other,
            "routes are case-sensitive"
        );
    }

    #[test]
    fn a_path_is_normal_if_a_router_sees_it_as_it_is() {
        for path in ["/", "/x", "/v1/models", "/a.b/..c", "/metricsX"] {
            assert!(is_normal(path) && normalized(path) == path, "{path}");
        }
        for path in ["", "x", "/x/", "//x", "/.", "/x/../y", "/%78", "/100%"] {
            assert!(!is_normal(path), "{path}");
        }
    }

    #[test]
    fn every_name_leads_back_to_its_route() {
        for endpoint in Endpoint::ALL
            .iter()
            .filter(|endpoint| **endpoint != Endpoint::Other)
        {
            assert_eq!(Endpoint::classify(endpoint.name()), *endpoint);
        }
    }
}
