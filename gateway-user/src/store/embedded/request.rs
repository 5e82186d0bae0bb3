//! What an HTTP request asks for, as ClickHouse's HTTP interface defines it: URL parameters, headers, and a multipart body.

use super::engine::{EngineError, Parameters};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use hyper::{Method, Uri};

/// The format of an answer when nothing names one.
const DEFAULT_FORMAT: &str = "TabSeparated";

/// URL parameters of the HTTP interface itself that change nothing here.
const IGNORED: [&str; 6] = [
    "buffer_size",
    "stacktrace",
    "quota_key",
    "session_timeout",
    "session_check",
    "close_session",
];

/// A request, its body aside.
#[derive(Debug, Default)]
pub struct Asked {
    /// The `query` parameter.
    pub query: String,
    /// Settings, in their order.
    pub settings: Vec<(String, String)>,
    /// Values for `{name:Type}`.
    pub parameters: Parameters,
    /// The session's database.
    pub database: Option<String>,
    /// The format for a statement that names none.
    pub default_format: Option<String>,
    /// Named by the client, else random.
    pub query_id: Option<String>,
    /// Who asks.
    pub user: Option<String>,
    /// With which password.
    pub password: Option<String>,
    /// The answer is to be in compressed blocks.
    pub compress: bool,
    /// The body is in compressed blocks.
    pub decompress: bool,
    /// The answer starts when the query has succeeded.
    pub wait_end_of_query: bool,
    /// A GET, which must change nothing.
    pub read_only: bool,
    /// The version of Native that the client wants.
    pub protocol_version: u64,
}

impl Asked {
    /// Reads method, URL and headers.
    ///
    /// # Errors
    /// When it asks for what is not supported or cannot be read.
    pub fn parse(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Asked, EngineError> {
        let mut asked = Asked {
            read_only: method == Method::GET || method == Method::HEAD,
            ..Asked::default()
        };
        let header = |name: &str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        asked.default_format = header("x-clickhouse-format");
        asked.database = header("x-clickhouse-database");
        if let Some((user, password)) = header(AUTHORIZATION.as_str()).as_deref().and_then(basic) {
            (asked.user, asked.password) = (Some(user), Some(password));
        }
        for pair in uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty())
        {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            asked.set(percent_decode(name)?, percent_decode(value)?)?;
        }
        asked.user = header("x-clickhouse-user").or(asked.user);
        asked.password = header("x-clickhouse-key").or(asked.password);
        Ok(asked)
    }

    /// Takes one parameter, of the URL or of a multipart body.
    ///
    /// # Errors
    /// When it is one that is not supported.
    pub fn set(&mut self, name: String, value: String) -> Result<(), EngineError> {
        let yes = |value: &str| matches!(value, "1" | "true");
        match name.as_str() {
            "query" => self.query = value,
            "database" => self.database = Some(value),
            "default_format" => self.default_format = Some(value),
            "query_id" => self.query_id = Some(value),
            "user" => self.user = Some(value),
            "password" => self.password = Some(value),
            "compress" => self.compress = yes(&value),
            "decompress" => self.decompress = yes(&value),
            "wait_end_of_query" => self.wait_end_of_query = yes(&value),
            "client_protocol_version" => self.protocol_version = value.parse().unwrap_or(u64::MAX),
            "session_id" | "role" => {
                let message = format!(
                    "`{name}` is not supported by the embedded ClickHouse: send what a query needs with it"
                );
                return Err(EngineError::new(48, "NOT_IMPLEMENTED", &message));
            }
            ignored if IGNORED.contains(&ignored) => {}
            other => match other.strip_prefix("param_") {
                Some(parameter) => self.parameters.0.push((parameter.to_owned(), value)),
                None => self.settings.push((name, value)),
            },
        }
        Ok(())
    }

    /// The format for a statement that names none.
    pub fn format(&self) -> &str {
        self.default_format.as_deref().unwrap_or(DEFAULT_FORMAT)
    }

    /// The statements that prepare a session for this request.
    ///
    /// # Errors
    /// When a setting's name is none.
    pub fn preparation(&self) -> Result<Vec<String>, EngineError> {
        // What `clickhouse local` has on and a server has off.
        let mut set = "SET implicit_select = 0, allow_introspection_functions = 0".to_owned();
        for (name, value) in &self.settings {
            if name.is_empty()
                || !name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            {
                return Err(EngineError::new(
                    115,
                    "UNKNOWN_SETTING",
                    &format!("Unknown setting {name:?}"),
                ));
            }
            set += &format!(", {name} = {}", string_literal(value));
        }
        if self.read_only
            && !self
                .settings
                .iter()
                .any(|(name, value)| name == "readonly" && value != "0")
        {
            set += ", readonly = 2";
        }
        let database = self.database.iter().filter(|name| !name.is_empty());
        let mut statements: Vec<_> = database
            .map(|name| format!("USE {}", quoted_name(name)))
            .collect();
        statements.push(set);
        Ok(statements)
    }
}

/// `text` as a string in SQL.
pub fn string_literal(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn quoted_name(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}

/// `%41` and `+`, as browsers and clients write them.
fn percent_decode(text: &str) -> Result<String, EngineError> {
    let bad = || EngineError::new(36, "BAD_ARGUMENTS", "the URL is not percent-encoded UTF-8");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let mut digit = || {
            rest.next()
                .and_then(|digit| char::from(digit).to_digit(16))
                .ok_or_else(bad)
        };
        bytes.push(match byte {
            b'+' => b' ',
            // PROOF of the cast: two hexadecimal digits are below 256.
            b'%' => (digit()? * 16 + digit()?) as u8,
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// User and password of basic authentication.
fn basic(header: &str) -> Option<(String, String)> {
    let (scheme, encoded) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(base64_decode(encoded.trim())?).ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// RFC 4648; too little of it is needed for a dependency.
fn base64_decode(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

/// The boundary, when the body is `multipart/form-data`: clients send parameters so that are too long for a URL.
pub fn multipart_boundary(headers: &HeaderMap) -> Option<String> {
    let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameters
        .split(';')
        .find_map(|parameter| parameter.trim().strip_prefix("boundary="))?;
    Some(boundary.trim_matches('"').to_owned())
}

/// The fields of a multipart body, by name.
///
/// # Errors
/// When it is not one, or holds a file.
pub fn multipart_fields(body: &[u8], boundary: &str) -> Result<Vec<(String, String)>, EngineError> {
    let bad = |what: &str| EngineError::new(36, "BAD_ARGUMENTS", &format!("multipart/form-data: {what}"));
    let delimiter = format!("\r\n--{boundary}");
    // The first one has no line before it.
    let body = [b"\r\n", body].concat();
    let mut ends = memchr::memmem::find_iter(&body, delimiter.as_bytes());
    let mut start = ends.next().ok_or_else(|| bad("the boundary is missing"))? + delimiter.len();
    let mut fields = Vec::new();
    while !body[start..].starts_with(b"--") {
        let end = ends.next().ok_or_else(|| bad("the last boundary is missing"))?;
        let part = body[start..end]
            .strip_prefix(b"\r\n")
            .ok_or_else(|| bad("a boundary ends no line"))?;
        let gap = memchr::memmem::find(part, b"\r\n\r\n").ok_or_else(|| bad("a part has no end of head"))?;
        let head = String::from_utf8_lossy(&part[..gap]);
        if head.contains("filename=") {
            return Err(EngineError::new(
                48,
                "NOT_IMPLEMENTED",
                "external tables are not supported by the embedded ClickHouse",
            ));
        }
        let name = head
            .split(';')
            .find_map(|item| item.trim().strip_prefix("name=\"")?.split('"').next());
        let name = name.ok_or_else(|| bad("a part has no name"))?;
        let value = str::from_utf8(&part[gap + 4..]).map_err(|_| bad("a field is not UTF-8"))?;
        fields.push((name.to_owned(), value.to_owned()));
        start = end + delimiter.len();
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(uri: &str, headers: &[(&'static str, &str)]) -> Result<Asked, EngineError> {
        let headers = headers
            .iter()
            .map(|(name, value)| ((*name).parse().unwrap(), value.parse().unwrap()))
            .collect();
        Asked::parse(&Method::POST, &uri.parse().unwrap(), &headers)
    }

    #[test]
    fn parameters_go_where_they_belong() {
        let asked = parse(
            "/?query=SELECT+%7Bx%3AString%7D&param_x=a%27b&max_threads=1&database=d&default_format=CSV&compress=1&buffer_size=3",
            &[("x-clickhouse-user", "me"), ("x-clickhouse-key", "secret")],
        )
        .unwrap();
        assert_eq!(asked.query, "SELECT {x:String}");
        assert_eq!(asked.parameters.0, [("x".to_owned(), "a'b".to_owned())]);
        assert_eq!(asked.settings, [("max_threads".to_owned(), "1".to_owned())]);
        assert_eq!(
            (asked.format(), asked.database.as_deref(), asked.compress),
            ("CSV", Some("d"), true)
        );
        assert_eq!(
            (asked.user.as_deref(), asked.password.as_deref()),
            (Some("me"), Some("secret"))
        );
        assert_eq!(parse("/?query=%zz", &[]).unwrap_err().code, 36);
        assert_eq!(parse("/?session_id=1", &[]).unwrap_err().code, 48);
    }

    #[test]
    fn basic_authentication_is_read() {
        let asked = parse("/", &[("authorization", "Basic dXNlcjpwYTpzcw==")]).unwrap();
        assert_eq!(
            (asked.user.as_deref(), asked.password.as_deref()),
            (Some("user"), Some("pa:ss"))
        );
        assert_eq!(base64_decode("YQ==").unwrap(), b"a");
        assert_eq!(base64_decode("!"), None);
    }

    #[test]
    fn values_cannot_leave_their_quotes() {
        let mut asked = parse("/?a=%27%2C+b%3D1+%5C&database=x%60y", &[]).unwrap();
        let statements = asked.preparation().unwrap();
        assert_eq!(statements[0], "USE `x\\`y`");
        assert!(
            statements[1].ends_with(r", a = '\', b=1 \\'"),
            "{}",
            statements[1]
        );
        asked.settings.push(("a = 1, b".into(), "1".into()));
        assert_eq!(asked.preparation().unwrap_err().code, 115);
        asked = Asked {
            read_only: true,
            ..Asked::default()
        };
        assert!(asked.preparation().unwrap()[0].ends_with(", readonly = 2"));
    }

    #[test]
    fn multipart_fields_are_read_and_files_refused() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, "multipart/form-data; boundary=XX".parse().unwrap());
        assert_eq!(multipart_boundary(&headers).as_deref(), Some("XX"));
        let part = |name: &str, value: &str| {
            format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
        };
        let body = part("query", "SELECT 1\r\n\r\n--X") + &part("param_x", "") + "--XX--\r\n";
        let fields = multipart_fields(body.as_bytes(), "XX").unwrap();
        assert_eq!(
            fields,
            [
                ("query".into(), "SELECT 1\r\n\r\n--X".into()),
                ("param_x".into(), String::new())
            ]
        );
        for bad in ["", "--XX", "--XX\r\nhead", "--XX\r\n\r\n\r\n--XX--"] {
            assert_eq!(
                multipart_fields(bad.as_bytes(), "XX").unwrap_err().code,
                36,
                "{bad:?}"
            );
        }
        let file = "--XX\r\nContent-Disposition: form-data; name=\"t\"; filename=\"f\"\r\n\r\n1\r\n--XX--";
        assert_eq!(multipart_fields(file.as_bytes(), "XX").unwrap_err().code, 48);
    }
}
