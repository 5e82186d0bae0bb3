//! What goes back to whoever asked.

use super::access::Denied;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::json;
use std::convert::Infallible;

/// A response; all but one are whole.
pub(super) type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

const JSON: &str = "application/json";

/// A document.
pub(super) fn document(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(mut text) => {
            text.push(b'\n');
            respond(status, JSON, Bytes::from(text))
        }
        Err(failure) => {
            tracing::error!(%failure, "an answer cannot be written as JSON");
            respond(StatusCode::INTERNAL_SERVER_ERROR, JSON, Bytes::new())
        }
    }
}

/// An error: `type` is for programs, `message` for people.
pub(super) fn error(status: StatusCode, kind: &str, message: &str) -> Answer {
    document(status, &json!({"error": {"type": kind, "message": message}}))
}

pub(super) fn not_found() -> Answer {
    let message = "no such page here; there are / (the console), /metrics, /health, /ready, and /api/teams, /api/upstreams, \
                   /api/requests, /api/reconciliation and /api/live";
    error(StatusCode::NOT_FOUND, "not_found", message)
}

pub(super) fn not_allowed() -> Answer {
    let message = "this page is only there to be read: GET or HEAD";
    let mut answer = error(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
    let methods = HeaderValue::from_static("GET, HEAD");
    answer.headers_mut().insert(ALLOW, methods);
    answer
}

pub(super) fn denied(why: &Denied) -> Answer {
    let (status, kind) = match why {
        Denied::NoToken => (StatusCode::UNAUTHORIZED, "token_missing"),
        Denied::WrongToken => (StatusCode::UNAUTHORIZED, "token_unknown"),
        Denied::NotForTeams(_) => (StatusCode::FORBIDDEN, "not_for_teams"),
        Denied::Exposed => (StatusCode::FORBIDDEN, "tokens_not_configured"),
        Denied::OtherHost => (StatusCode::FORBIDDEN, "host_not_loopback"),
    };
    let message = match why {
        Denied::NoToken => {
            "expected `Authorization: Bearer TOKEN` with one of admin.tokens, found none".to_owned()
        }
        Denied::WrongToken => "the token is none of those in admin.tokens".to_owned(),
        Denied::NotForTeams(team) => {
            format!(
                "this is about all teams, and the token is for team {team} alone: use one with scope admin"
            )
        }
        Denied::Exposed => {
            "figures of all teams are not shown on an address that other machines reach, unless admin.tokens \
                            says to whom: configure tokens, or set admin.listen to 127.0.0.1:9464"
                .to_owned()
        }
        Denied::OtherHost => {
            "expected a Host of this machine's own (localhost, 127.0.0.1 or [::1]): open the page by such an \
                              address, or configure admin.tokens"
                .to_owned()
        }
    };
    let mut answer = error(status, kind, &message);
    if status == StatusCode::UNAUTHORIZED {
        let scheme = HeaderValue::from_static("Bearer realm=\"vllm-gateway\"");
        answer.headers_mut().insert(WWW_AUTHENTICATE, scheme);
    }
    answer
}

pub(super) fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Answer {
    with_body(status, content_type, Full::new(body).boxed_unsync())
}

pub(super) fn with_body(
    status: StatusCode,
    content_type: &'static str,
    body: UnsyncBoxBody<Bytes, Infallible>,
) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let fields = [
        (CONTENT_TYPE, content_type),
        // A proxy that kept one of these would tell of a gateway that has long since changed.
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ];
    for (name, value) in fields {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}
