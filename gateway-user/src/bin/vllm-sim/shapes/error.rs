//! Error answers: FastAPI's validation errors, vLLM's own, Starlette's, and Anthropic's.

use serde_json::Value;

use super::json::{Js, OrNull};

/// A refused request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// For people.
    pub message: String,
    /// vLLM's name of the error.
    pub kind: &'static str,
    /// The parameter at fault.
    pub param: Option<String>,
}

impl ApiError {
    /// The body as OpenAI's API has it.
    pub fn openai_body(&self) -> String {
        format!(
            r#"{{"error":{{"message":{},"type":{},"param":{},"code":{}}}}}"#,
            Js(&self.message),
            Js(self.kind),
            OrNull(self.param.as_deref().map(Js)),
            self.status
        )
    }

    /// The body as Anthropic's API has it. Validation errors come before the route and keep the other shape.
    pub fn anthropic_body(&self) -> String {
        if self.kind == VALIDATION {
            return self.openai_body();
        }
        format!(
            r#"{{"type":"error","error":{{"type":{},"message":{}}}}}"#,
            Js(self.kind),
            Js(&self.message)
        )
    }

    /// A request that vLLM's own checks refuse.
    pub fn bad_request(message: String, param: &str) -> Self {
        ApiError {
            status: 400,
            message,
            kind: "BadRequestError",
            param: Some(param.to_owned()),
        }
    }

    /// A model that is not served.
    pub fn unknown_model(model: &str, served: &str) -> Self {
        ApiError {
            status: 404,
            message: format!("The model `{model}` does not exist. Valid aliases: {served}."),
            kind: "NotFoundError",
            param: Some("model".to_owned()),
        }
    }

    /// A field that has to be there and is not.
    pub fn missing(field: &str, fields: usize) -> Self {
        Self::validation(
            format!("body.{field}"),
            &format!(
                "{{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required', 'input': '<dict of {fields} \
                 items>'}}"
            ),
        )
    }

    /// A field of the wrong type.
    pub fn wrong_type(field: &str, wanted: &str, found: &Value) -> Self {
        let kind = match wanted {
            "integer" => "int_type",
            "boolean" => "bool_type",
            "list" => "list_type",
            _ => "string_type",
        };
        Self::validation(
            format!("body.{field}"),
            &format!(
                "{{'type': '{kind}', 'loc': 'body.{field}', 'msg': 'Input should be a valid {wanted}', 'input': \
                 '{}'}}",
                match found {
                    Value::Null => "None".to_owned(),
                    Value::Object(map) => format!("<dict of {} items>", map.len()),
                    Value::Array(list) => format!("<list of {} items>", list.len()),
                    other => other.to_string(),
                }
            ),
        )
    }

    /// A body that is not JSON.
    pub fn not_json(body: &[u8], error: &serde_json::Error) -> Self {
        let line_start = body
            .split_inclusive(|byte| *byte == b'\n')
            .take(error.line().saturating_sub(1))
            .map(<[u8]>::len)
            .sum::<usize>();
        let at = (line_start + error.column()).min(body.len());
        let before = body[..at].trim_ascii_end();
        let reason = match before.last() {
            Some(b',' | b'{') => "Expecting property name enclosed in double quotes",
            _ => "Expecting value",
        };
        Self::validation(
            format!("body.{at}"),
            &format!(
                "{{'type': 'json_invalid', 'loc': 'body.{at}', 'msg': 'JSON decode error', 'input': '<dict of 0 \
                 items>', 'ctx': {{'error': '{reason}'}}}}"
            ),
        )
    }

    /// More requests wait than the server allows.
    pub fn queue_full() -> Self {
        Self::status(503)
    }

    /// An error for its status alone.
    pub fn status(status: u16) -> Self {
        let (kind, message) = match status {
            401 => ("AuthenticationError", "Unauthorized"),
            404 => ("NotFoundError", "Not found"),
            429 => ("RateLimitError", "Too many requests"),
            503 => (
                "ServiceUnavailableError",
                "The server is overloaded, please retry later",
            ),
            400..=499 => ("BadRequestError", "Bad request"),
            _ => ("InternalServerError", "Internal server error"),
        };
        ApiError {
            status,
            message: message.to_owned(),
            kind,
            param: None,
        }
    }

    fn validation(param: String, detail: &str) -> Self {
        ApiError {
            status: 400,
            message: format!("1 validation error:\n  {detail}"),
            kind: VALIDATION,
            param: Some(param),
        }
    }
}

/// The type of errors found before the route's own code runs.
const VALIDATION: &str = "Bad Request";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_json_is_located_as_python_does() {
        let body = br#"{"model": "tiny", "#;
        let error = serde_json::from_slice::<Value>(body).unwrap_err();
        let refused = ApiError::not_json(body, &error);
        assert_eq!(refused.param.as_deref(), Some("body.18"));
        assert!(
            refused.message.contains("Expecting property name"),
            "{}",
            refused.message
        );
    }
}
