//! What the gateway answers by itself, in the shape that the client's library understands.
//!
//! Every refusal has a status, a reason out of a bounded set (a metric label, and mostly `code` in the body), and a message that says what was
//! expected, what was found and what to do. `/v1/messages` gets Anthropic's shape, everything else OpenAI's.

use crate::limits::Denial;
use crate::wire::body::BodyError;
use crate::wire::endpoint::Endpoint;
use crate::wire::exchange::Ending;
use crate::wire::head::HeadError;
use serde_json::json;
use std::borrow::Cow;

/// Why the gateway answers instead of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The head cannot be read in exactly one way.
    Head(HeadError),
    /// The body's framing is broken.
    Body(BodyError),
    /// The client did not say, or not properly, who it is.
    Identity(String),
    /// The client took too long to send its request.
    SlowRequest,
    /// The body is larger than `proxy.max_body`.
    BodyTooLarge(u64),
    /// The body is larger than `proxy.inspect_max`, and such bodies are refused here.
    Uninspectable(u64),
    /// An expectation other than `100-continue`.
    Expectation,
    /// `CONNECT`: this is no forward proxy.
    Method,
    /// A route for operators.
    AdminRoute,
    /// A limit of the team stands in the way.
    Limited(Box<Denial>),
    /// No upstream serves this model.
    UnknownModel(String),
    /// No upstream is configured for such a route.
    NoUpstream(Endpoint),
    /// No upstream could be reached.
    Unreachable,
    /// Every upstream has as many requests as `max_connections` allows.
    Busy,
    /// The upstream closed the connection before it answered.
    UpstreamClosed,
    /// The upstream's answer is no HTTP/1.1.
    BadUpstream,
    /// The upstream did not begin to answer in time.
    UpstreamTimeout,
}

impl Refusal {
    /// The status code and its reason phrase.
    pub fn status(&self) -> (u16, &'static str) {
        match self {
            Refusal::Head(HeadError::TooLarge(_) | HeadError::TooManyFields) => {
                (431, "Request Header Fields Too Large")
            }
            Refusal::Head(HeadError::Version) => (505, "HTTP Version Not Supported"),
            Refusal::Head(_) | Refusal::Body(_) | Refusal::Identity(_) => (400, "Bad Request"),
            Refusal::SlowRequest => (408, "Request Timeout"),
            Refusal::BodyTooLarge(_) | Refusal::Uninspectable(_) => (413, "Content Too Large"),
            Refusal::Expectation => (417, "Expectation Failed"),
            Refusal::Method => (405, "Method Not Allowed"),
            Refusal::AdminRoute => (403, "Forbidden"),
            Refusal::Limited(_) => (429, "Too Many Requests"),
            Refusal::UnknownModel(_) | Refusal::NoUpstream(_) => (404, "Not Found"),
            Refusal::Unreachable | Refusal::Busy => (503, "Service Unavailable"),
            Refusal::UpstreamClosed | Refusal::BadUpstream => (502, "Bad Gateway"),
            Refusal::UpstreamTimeout => (504, "Gateway Timeout"),
        }
    }

    /// The reason, as metrics and events name it.
    pub fn reason(&self) -> &'static str {
        match self {
            Refusal::Head(HeadError::TooLarge(_) | HeadError::TooManyFields) => "head_too_large",
            Refusal::Head(_) => "bad_head",
            Refusal::Body(_) => "bad_body",
            Refusal::Identity(_) => "bad_identity",
            Refusal::SlowRequest => "slow_request",
            Refusal::BodyTooLarge(_) => "body_too_large",
            Refusal::Uninspectable(_) => "uninspectable",
            Refusal::Expectation => "expectation",
            Refusal::Method => "method",
            Refusal::AdminRoute => "admin_route",
            Refusal::Limited(denial) => denial.reason(),
            Refusal::UnknownModel(_) => "model_not_found",
            Refusal::NoUpstream(_) => "no_upstream",
            Refusal::Unreachable => "upstream_unreachable",
            Refusal::Busy => "upstream_busy",
            Refusal::UpstreamClosed => "upstream_closed",
            Refusal::BadUpstream => "upstream_bad_response",
            Refusal::UpstreamTimeout => "upstream_timeout",
        }
    }

    /// `code` of the error in OpenAI's shape: the reason, or what their library knows it as.
    fn code(&self) -> &'static str {
        match self {
            Refusal::Limited(denial) => denial.code(),
            _ => self.reason(),
        }
    }

    /// How the exchange is booked.
    pub fn ending(&self) -> Ending {
        match self {
            Refusal::Unreachable => Ending::Unreachable,
            Refusal::UpstreamClosed | Refusal::BadUpstream => Ending::UpstreamClosed,
            Refusal::UpstreamTimeout | Refusal::SlowRequest => Ending::TimedOut,
            _ => Ending::Refused,
        }
    }

    /// Whether the client's bytes can still be followed after this, so that the connection may be kept.
    /// The caller knows whether the request's body was read to its end, which is the other half of the question.
    pub fn keeps_connection(&self) -> bool {
        !matches!(
            self,
            Refusal::Head(_)
                | Refusal::Body(_)
                | Refusal::SlowRequest
                | Refusal::Expectation
                | Refusal::Method
        )
    }

    fn message(&self) -> Cow<'static, str> {
        match self {
            Refusal::Head(error) => format!("The request was not understood: {error}.").into(),
            Refusal::Body(error) => format!("The request's body was not understood: {error}.").into(),
            Refusal::Identity(message) => message.clone().into(),
            Refusal::SlowRequest => "The request did not arrive within the time limit.".into(),
            Refusal::BodyTooLarge(limit) => {
                format!("The request's body is larger than the gateway's limit of {limit} bytes (proxy.max_body).").into()
            }
            Refusal::Uninspectable(limit) => format!(
                "The request's body is larger than {limit} bytes (proxy.inspect_max), or compressed, and this gateway does not \
                 forward what it cannot inspect."
            )
            .into(),
            Refusal::Expectation => "The only expectation understood is `Expect: 100-continue`.".into(),
            Refusal::Method => "CONNECT is not supported: this is a gateway to vLLM, not a forward proxy.".into(),
            Refusal::AdminRoute => {
                "This route administers the server. The gateway does not forward it (proxy.allow_admin_routes).".into()
            }
            Refusal::Limited(denial) => denial.message().to_owned().into(),
            Refusal::UnknownModel(model) => {
                format!("The model `{}` is served by no upstream of this gateway.", model.escape_debug()).into()
            }
            Refusal::NoUpstream(endpoint) => {
                format!("No upstream of this gateway serves {}.", endpoint.name()).into()
            }
            Refusal::Unreachable => "No upstream could be reached. Try again later.".into(),
            Refusal::Busy => {
                "Every upstream is at its limit of requests (upstreams[].max_connections). Try again later.".into()
            }
            Refusal::UpstreamClosed => "The upstream closed the connection before it answered.".into(),
            Refusal::BadUpstream => "The upstream answered with something that is not HTTP/1.1.".into(),
            Refusal::UpstreamTimeout => "The upstream did not begin to answer within the time limit.".into(),
        }
    }

    /// `type` of the error; in OpenAI's shape a spent budget has one of its own.
    fn kind(&self) -> &'static str {
        match self.status().0 {
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// The whole response. `close` adds `Connection: close`; a `HEAD` request gets no body.
    pub fn response(&self, endpoint: Endpoint, request_id: &str, method: &str, close: bool) -> Vec<u8> {
        let error = if endpoint == Endpoint::Messages || endpoint == Endpoint::CountTokens {
            json!({"type": "error", "error": {"type": self.kind(), "message": self.message()}, "request_id": request_id})
        } else {
            let kind = match self {
                Refusal::Limited(denial) => denial.kind(),
                _ => self.kind(),
            };
            json!({"error": {"message": self.message(), "type": kind, "param": null, "code": self.code()}})
        };
        let body = error.to_string();
        let (status, phrase) = self.status();
        let mut response = format!(
            "HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nx-request-id: {request_id}\r\n",
            body.len()
        );
        if status == 503 {
            response.push_str("retry-after: 1\r\n");
        }
        if let Refusal::Limited(denial) = self {
            response.push_str(denial.fields());
        }
        if status == 405 {
            response.push_str("allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n");
        }
        if close {
            response.push_str("connection: close\r\n");
        }
        response.push_str("\r\n");
        if method != "HEAD" {
            response.push_str(&body);
        }
        response.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(refusal: &Refusal, endpoint: Endpoint) -> serde_json::Value {
        let response = String::from_utf8(refusal.response(endpoint, "r-1", "POST", true)).expect("text");
        let (head, body) = response.split_once("\r\n\r\n").expect("a head and a body");
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{head}"
        );
        assert!(head.contains("\r\nconnection: close"), "{head}");
        serde_json::from_str(body).expect("JSON")
    }

    #[test]
    fn both_libraries_find_the_error_where_they_look() {
        let refusal = Refusal::UnknownModel("a\"b\n".into());
        let openai = body(&refusal, Endpoint::ChatCompletions);
        assert_eq!(openai["error"]["code"], "model_not_found");
        assert_eq!(openai["error"]["type"], "not_found_error");
        let anthropic = body(&refusal, Endpoint::Messages);
        assert_eq!(anthropic["type"], "error");
        assert_eq!(anthropic["error"]["type"], "not_found_error");
    }

    #[test]
    fn a_head_request_gets_no_body() {
        let response = Refusal::Unreachable.response(Endpoint::Other, "r", "HEAD", false);
        assert!(response.ends_with(b"\r\n\r\n"));
        assert!(response.starts_with(b"HTTP/1.1 503 "));
    }
}
