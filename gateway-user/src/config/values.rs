//! The kinds of value that a setting can have, beyond numbers and units: parsed once, so that the rest of the
//! program never meets a malformed one.

use std::{fmt, str::FromStr};

use serde::{Serialize, Serializer};

/// What stands in place of a secret wherever one would be shown.
pub const MASK: &str = "***";

/// A password or key. `Debug` and `Serialize` show [`MASK`]; only [`Secret::expose`] gives the value.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value that must not be shown.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the place that authenticates with it and nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

/// The address of an upstream: `http://host:port`, nothing else.
///
/// Requests are forwarded with the path the client sent, so that a path here could only be wrong; TLS to the upstream
/// is not spoken. The host may be a name, which is resolved when a connection is made.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamUrl {
    host: String,
    port: u16,
}

impl UpstreamUrl {
    /// An upstream on this machine.
    pub(super) fn local(port: u16) -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port,
        }
    }

    /// Host name or IP address; an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host:port` as the `Host` header and a resolver take it: an IPv6 address in brackets.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority())
    }
}

impl Serialize for UpstreamUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for UpstreamUrl {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.starts_with("https://") {
            return Err(ValueError(
                "TLS to an upstream is not supported: give its http:// address".into(),
            ));
        }
        let Some(rest) = text.strip_prefix("http://") else {
            return Err(ValueError("it must start with http://".into()));
        };
        // One slash at the end names the same place as none.
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('@') {
            return Err(ValueError("user and password have no place in it".into()));
        }
        if authority.contains(['/', '?', '#']) {
            return Err(ValueError(
                "it must end after the port: the path is taken from each request".into(),
            ));
        }
        let (host, port) = split_authority(authority)?;
        let port =
            port.ok_or_else(|| ValueError("the port is missing, for example http://127.0.0.1:8000".into()))?;
        Ok(Self { host, port })
    }
}

/// Where events are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// ClickHouse's own engine in a child process, on loopback.
    Embedded,
    /// A server's HTTP interface, without a slash at the end: `http://clickhouse:8123`.
    Server(String),
    /// Nowhere: metrics only, and nothing is kept.
    None,
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::Server(url) => f.write_str(url),
            Self::None => f.write_str("none"),
        }
    }
}

impl Serialize for StoreUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for StoreUrl {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        if text == "none" {
            return Ok(Self::None);
        }
        let Some(rest) = text
            .strip_prefix("http://")
            .or_else(|| text.strip_prefix("https://"))
        else {
            return Err(ValueError(
                "it must be the word embedded or none, or start with http:// or https://".into(),
            ));
        };
        if text.contains('@') {
            let message = "credentials go into store.username and store.password, where they are masked";
            return Err(ValueError(message.into()));
        }
        if text.contains(['?', '#']) {
            return Err(ValueError(
                "it must not have a query or fragment: the gateway adds its own".into(),
            ));
        }
        split_authority(rest.split('/').next().unwrap_or(rest))?;
        if text.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(ValueError("it must be visible ASCII characters only".into()));
        }
        Ok(Self::Server(text.trim_end_matches('/').to_owned()))
    }
}

/// The name of an HTTP header in the spelling of the config; names are compared without regard to case.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct HeaderName(String);

impl HeaderName {
    /// A default, which is right because a test parses it.
    pub(super) fn from_static(name: &'static str) -> Self {
        Self(name.to_owned())
    }

    /// The name as it was configured.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl PartialEq for HeaderName {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl Eq for HeaderName {}

impl fmt::Display for HeaderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HeaderName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        // RFC 9110 §5.6.2: token = 1*tchar.
        let is_token_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if text.is_empty() || !text.bytes().all(is_token_byte) {
            return Err(ValueError(
                "a header name is letters, digits and any of !#$%&'*+-.^_`|~".into(),
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// The name of something in the config or of the gateway itself: it becomes a label, a directory and part of row keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Name(String);

impl Name {
    /// Longest name, as long as a team's id may be.
    pub const LEN_MAX: usize = 128;

    /// A default, which is right because a test parses it.
    pub(super) fn from_static(name: &'static str) -> Self {
        Self(name.to_owned())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name made from any text, each byte that a name cannot hold replaced by `-`. `None` if nothing is left to replace.
    pub(super) fn from_lossy(text: &str) -> Option<Self> {
        let keep = |byte: u8| if Self::holds(byte) { byte as char } else { '-' };
        let name: String = text.bytes().take(Self::LEN_MAX).map(keep).collect();
        name.parse().ok()
    }

    fn holds(byte: u8) -> bool {
        byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() || text.len() > Self::LEN_MAX || !text.bytes().all(Self::holds) {
            return Err(ValueError(format!(
                "a name is 1 to {} letters, digits, '.', '_' or '-'",
                Self::LEN_MAX
            )));
        }
        // A name can become a directory, and these two already are.
        if text == "." || text == ".." {
            return Err(ValueError("'.' and '..' are no names".into()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// What is wrong with a value and what to write instead. It never quotes the value, which may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(pub(super) String);

/// Splits `host`, `host:port` or `[ipv6]:port`.
fn split_authority(authority: &str) -> Result<(String, Option<u16>), ValueError> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest
                .split_once(']')
                .ok_or_else(|| ValueError("the ']' is missing".into()))?;
            host.parse::<std::net::Ipv6Addr>()
                .map_err(|_| ValueError("between '[' and ']' there must be an IPv6 address".into()))?;
            (host, after)
        }
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let is_host_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte);
    if host.is_empty() || !host.bytes().all(is_host_byte) {
        return Err(ValueError(
            "the host must be a name or an IP address (IPv6 in brackets)".into(),
        ));
    }
    let port = match port.strip_prefix(':') {
        Some(digits) => Some(parse_port(digits)?),
        None if port.is_empty() => None,
        None => return Err(ValueError("after ']' only ':' and a port may follow".into())),
    };
    Ok((host.to_owned(), port))
}

fn parse_port(digits: &str) -> Result<u16, ValueError> {
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    match digits.parse() {
        Ok(port) if port != 0 && is_number => Ok(port),
        _ => Err(ValueError("the port must be a number from 1 to 65535".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_is_a_host_and_a_port() {
        let url: UpstreamUrl = "http://vllm-0.vllm.svc:8000/".parse().unwrap();
        assert_eq!((url.host(), url.port()), ("vllm-0.vllm.svc", 8000));
        let url: UpstreamUrl = "http://[::1]:8000".parse().unwrap();
        assert_eq!((url.host(), url.authority().as_str()), ("::1", "[::1]:8000"));
        assert_eq!(url.to_string(), "http://[::1]:8000");
    }

    #[test]
    fn an_upstream_that_could_not_work_is_refused_with_its_reason() {
        for (text, reason) in [
            ("https://vllm:8000", "TLS"),
            ("vllm:8000", "http://"),
            ("http://vllm:8000/v1", "path"),
            ("http://vllm:8000?x", "path"),
            ("http://user:pass@vllm:8000", "user and password"),
            ("http://vllm", "port is missing"),
            ("http://vllm:0", "1 to 65535"),
            ("http://vllm:+80", "1 to 65535"),
            ("http://vllm:65536", "1 to 65535"),
            ("http://:8000", "host"),
            ("http://::1:8000", "IPv6 in brackets"),
            ("http://[vllm]:8000", "IPv6"),
            ("http://[::1]8000", "after ']'"),
            ("http://a b:8000", "host"),
        ] {
            let message = text.parse::<UpstreamUrl>().unwrap_err().to_string();
            assert!(message.contains(reason), "{text}: {message}");
            assert!(!message.contains("pass@"), "{message}");
        }
    }

    #[test]
    fn a_store_is_embedded_or_a_server() {
        assert_eq!("embedded".parse(), Ok(StoreUrl::Embedded));
        assert_eq!(
            "https://ch.example:8443/".parse(),
            Ok(StoreUrl::Server("https://ch.example:8443".into()))
        );
        assert_eq!(
            "http://ch/proxy".parse(),
            Ok(StoreUrl::Server("http://ch/proxy".into()))
        );
        for text in [
            "tcp://ch:9000",
            "http://u:hunter2@ch:8123",
            "http://ch:8123/?password=hunter2",
            "http://",
            "",
        ] {
            let message = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn header_names_are_tokens_and_ignore_case() {
        let name: HeaderName = "X-Team-ID".parse().unwrap();
        assert_eq!(name, "x-team-id".parse().unwrap());
        for text in ["", "X Team", "X-Team:", "Ünïcode"] {
            assert!(text.parse::<HeaderName>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_host_name_becomes_a_name() {
        assert_eq!(Name::from_lossy("mac book (2)").unwrap().as_str(), "mac-book--2-");
        assert_eq!(Name::from_lossy(""), None);
        assert!("..".parse::<Name>().is_err());
        assert!("a/b".parse::<Name>().is_err());
    }

    #[test]
    fn a_secret_never_shows() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?}"), MASK);
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"***\"");
        assert_eq!(secret.expose(), "hunter2");
    }
}
