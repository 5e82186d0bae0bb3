//! Strict heads of HTTP/1.1 messages.
//!
//! `httparse` does the parsing; on top of it stand the rules that keep two readers of one byte stream in agreement (RFC 9112):
//! lines end in CRLF, no folded lines, one `Host`, at most one `Content-Length` and never beside `Transfer-Encoding`, `chunked` as
//! the only transfer coding. What breaks a rule is a [`HeadError`], never a guess. A head owns its bytes, and every field keeps
//! its line, so that it can be forwarded as it came: order, case and spacing included.

use std::mem::MaybeUninit;
use std::ops::Range;

/// Most header fields in one head. uvicorn and nginx stop near a hundred too; a client with more is broken or hostile.
pub const MAX_FIELDS: usize = 100;

/// Room for the fields of a head. It is not filled beforehand: that took longer than reading most heads.
const NO_FIELDS: [MaybeUninit<httparse::Header<'_>>; MAX_FIELDS] =
    [const { MaybeUninit::uninit() }; MAX_FIELDS];

/// Why a head cannot be read in exactly one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The head did not end within the limit.
    #[error("the head is longer than {0} bytes")]
    TooLarge(usize),
    /// More than [`MAX_FIELDS`] fields.
    #[error("the head has more than {MAX_FIELDS} header fields")]
    TooManyFields,
    /// A line that ends in LF alone, or a CR that ends no line.
    #[error("a line of the head does not end in CRLF")]
    BareLineEnd,
    /// What `httparse` refuses: a bad token, a folded line, a control character.
    #[error("the head is malformed: {0}")]
    Malformed(httparse::Error),
    /// Not HTTP/1.0 or HTTP/1.1.
    #[error("expected HTTP/1.1 or HTTP/1.0")]
    Version,
    /// A target that is neither a path nor an absolute URL, or holds a character no URL may hold.
    #[error("the request target must be a path such as /v1/chat/completions")]
    Target,
    /// HTTP/1.1 requires exactly one `Host` field.
    #[error("expected exactly one Host header field")]
    Host,
    /// A `Content-Length` that is not a plain decimal number.
    #[error("Content-Length must be one decimal number")]
    Length,
    /// Two `Content-Length` fields, even equal ones.
    #[error("more than one Content-Length header field")]
    TwoLengths,
    /// Both framings at once.
    #[error("Content-Length and Transfer-Encoding in one head")]
    LengthAndCoding,
    /// A transfer coding other than one `chunked`.
    #[error("the only transfer coding understood is one `chunked`")]
    Coding,
    /// Chunked framing does not exist in HTTP/1.0.
    #[error("Transfer-Encoding in an HTTP/1.0 message")]
    CodingIn10,
}

/// How the length of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// So many bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// All bytes until the connection ends (responses only).
    UntilClose,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u32,
    end: u32,
}

impl Span {
    fn of(whole: &[u8], part: &[u8]) -> Span {
        let start = part.as_ptr() as usize - whole.as_ptr() as usize;
        Span {
            start: start as u32,
            end: (start + part.len()) as u32,
        }
    }

    fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

#[derive(Clone, Copy, Debug)]
struct FieldSpan {
    name: Span,
    value: Span,
    line: Span,
}

/// One header field, as it came.
#[derive(Clone, Copy, Debug)]
pub struct Field<'h> {
    /// The name, in the sender's case.
    pub name: &'h str,
    /// The value without surrounding white space.
    pub value: &'h [u8],
    /// The whole line with its CRLF.
    pub line: &'h [u8],
}

/// The bytes of a head and where its fields lie.
#[derive(Clone, Debug)]
pub struct Fields {
    raw: Box<[u8]>,
    spans: Box<[FieldSpan]>,
}

impl Fields {
    fn new(raw: &[u8], headers: &[httparse::Header<'_>]) -> Fields {
        let spans = headers.iter().map(|header| {
            let name = Span::of(raw, header.name.as_bytes());
            let value = match header.value {
                // httparse may hand out an empty value that points nowhere in the buffer.
                [] => Span {
                    start: name.end,
                    end: name.end,
                },
                value => Span::of(raw, value),
            };
            // Two bytes further in nearly all lines, so that no search is set up for it.
            let rest = &raw[value.end as usize..];
            let end = rest.iter().position(|byte| *byte == b'\n');
            let end = value.end + end.map_or(rest.len(), |at| at + 1) as u32;
            FieldSpan {
                name,
                value,
                line: Span {
                    start: name.start,
                    end,
                },
            }
        });
        Fields {
            spans: spans.collect(),
            raw: raw.into(),
        }
    }

    /// The whole head, blank line included.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Every field in the sender's order.
    pub fn iter(&self) -> impl Iterator<Item = Field<'_>> {
        self.spans.iter().map(|span| Field {
            // httparse accepts tokens only, which are ASCII.
            name: std::str::from_utf8(&self.raw[span.name.range()]).unwrap_or(""),
            value: &self.raw[span.value.range()],
            line: &self.raw[span.line.range()],
        })
    }

    /// All values of the fields called `name`, in any case.
    pub fn all<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h [u8]> {
        self.spans
            .iter()
            .filter(move |span| self.is_named(span, name))
            .map(|span| &self.raw[span.value.range()])
    }

    /// The first value of the field called `name`, in any case.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let span = self.spans.iter().find(|span| self.is_named(span, name))?;
        Some(&self.raw[span.value.range()])
    }

    /// Compares bytes: a head is looked through dozens of times, and most names differ in length already.
    fn is_named(&self, span: &FieldSpan, name: &str) -> bool {
        self.raw[span.name.range()].eq_ignore_ascii_case(name.as_bytes())
    }

    /// Whether a comma-separated field `name` lists `token`, in any case.
    pub fn lists(&self, name: &str, token: &str) -> bool {
        self.all(name)
            .flat_map(|value| value.split(|byte| *byte == b','))
            .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    }

    /// The framing that the length fields name, before the rules for requests or responses.
    fn length_fields(&self, minor: u8) -> Result<Option<Framing>, HeadError> {
        let mut codings = self.all("transfer-encoding");
        let mut lengths = self.all("content-length");
        let (coding, length) = (codings.next(), lengths.next());
        if lengths.next().is_some() {
            return Err(HeadError::TwoLengths);
        }
        if coding.is_some() && length.is_some() {
            return Err(HeadError::LengthAndCoding);
        }
        if let Some(coding) = coding {
            if minor == 0 {
                return Err(HeadError::CodingIn10);
            }
            if codings.next().is_some() || !coding.eq_ignore_ascii_case(b"chunked") {
                return Err(HeadError::Coding);
            }
            return Ok(Some(Framing::Chunked));
        }
        length
            .map(|value| decimal(value).map(Framing::Length).ok_or(HeadError::Length))
            .transpose()
    }
}

/// The head of a request.
#[derive(Clone, Debug)]
pub struct RequestHead {
    fields: Fields,
    method: Span,
    target: Span,
    minor: u8,
    framing: Framing,
}

impl RequestHead {
    /// Reads a request head from the start of `buf`. `None` when the head is not whole yet; else the head and its length.
    ///
    /// # Errors
    /// Whatever would let two readers see two different requests; see [`HeadError`].
    pub fn parse(buf: &[u8], max_bytes: usize) -> Result<Option<(RequestHead, usize)>, HeadError> {
        let mut slots = NO_FIELDS;
        let mut request = httparse::Request::new(&mut []);
        let status = request
            .parse_with_uninit_headers(buf, &mut slots)
            .map_err(refused)?;
        let Some(len) = complete(status, buf, max_bytes)? else {
            return Ok(None);
        };
        let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version)
        else {
            return Err(HeadError::Version);
        };
        // `CONNECT` names an authority; whoever forwards requests refuses the method, and says so better than this could.
        let target_ok = target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#')
            && (target.starts_with('/') || is_http_url(target) || method == "CONNECT");
        if !target_ok {
            return Err(HeadError::Target);
        }
        let raw = &buf[..len];
        let (method, target) = (Span::of(raw, method.as_bytes()), Span::of(raw, target.as_bytes()));
        let fields = Fields::new(raw, request.headers);
        let framing = fields.length_fields(minor)?.unwrap_or(Framing::None);
        let hosts = fields.all("host").count();
        if hosts > 1 || (minor == 1 && hosts == 0) {
            return Err(HeadError::Host);
        }
        Ok(Some((
            RequestHead {
                fields,
                method,
                target,
                minor,
                framing,
            },
            len,
        )))
    }

    /// The header fields.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// The method, in the sender's case (methods are case-sensitive).
    pub fn method(&self) -> &str {
        std::str::from_utf8(&self.fields.raw[self.method.range()]).unwrap_or("")
    }

    /// The target in origin form: path and query. Of an absolute URL the scheme and the authority are left out.
    pub fn target(&self) -> &str {
        let target = std::str::from_utf8(&self.fields.raw[self.target.range()]).unwrap_or("/");
        if target.starts_with('/') {
            return target;
        }
        let after_scheme = target.find("://").map_or(target, |at| &target[at + 3..]);
        after_scheme.find('/').map_or("/", |at| &after_scheme[at..])
    }

    /// The target's path, still percent-encoded.
    pub fn path(&self) -> &str {
        let target = self.target();
        target.split_once('?').map_or(target, |(path, _)| path)
    }

    /// 0 for HTTP/1.0, 1 for HTTP/1.1.
    pub fn minor_version(&self) -> u8 {
        self.minor
    }

    /// How the body's length is found.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Whether the client wants to send another request on this connection. HTTP/1.0 keep-alive is not offered.
    pub fn keep_alive(&self) -> bool {
        self.minor == 1 && !self.fields.lists("connection", "close")
    }

    /// Whether the client waits for a `100 Continue` before it sends the body.
    pub fn expects_continue(&self) -> bool {
        self.minor == 1
            && self
                .fields
                .get("expect")
                .is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue"))
    }

    /// Whether the client asks to leave HTTP for a WebSocket, the one protocol that vLLM upgrades to. Any other, HTTP/2 above all, would be
    /// a tunnel through which requests pass unseen.
    pub fn wants_upgrade(&self) -> bool {
        let mut protocols = self.fields.all("upgrade");
        let to_websocket = protocols
            .next()
            .is_some_and(|value| value.eq_ignore_ascii_case(b"websocket"));
        self.method() == "GET"
            && self.minor == 1
            && self.framing == Framing::None
            && self.fields.lists("connection", "upgrade")
            && to_websocket
            && protocols.next().is_none()
    }
}

/// The head of a response.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    fields: Fields,
    status: u16,
    minor: u8,
    framing: Framing,
}

impl ResponseHead {
    /// Reads a response head from the start of `buf`. `None` when it is not whole yet; else the head and its length.
    /// `method` is that of the request it answers, since a response to `HEAD` has a length and no body.
    ///
    /// # Errors
    /// See [`HeadError`].
    pub fn parse(
        buf: &[u8],
        max_bytes: usize,
        method: &str,
    ) -> Result<Option<(ResponseHead, usize)>, HeadError> {
        let mut slots = NO_FIELDS;
        let mut response = httparse::Response::new(&mut []);
        let status = httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut response, buf, &mut slots)
            .map_err(refused)?;
        let Some(len) = complete(status, buf, max_bytes)? else {
            return Ok(None);
        };
        let (Some(status), Some(minor)) = (response.code, response.version) else {
            return Err(HeadError::Version);
        };
        if status < 100 {
            return Err(HeadError::Malformed(httparse::Error::Status));
        }
        let fields = Fields::new(&buf[..len], response.headers);
        let named = fields.length_fields(minor)?;
        let bodiless = method == "HEAD" || matches!(status, 100..=199 | 204 | 304);
        let framing = if bodiless {
            Framing::None
        } else {
            named.unwrap_or(Framing::UntilClose)
        };
        Ok(Some((
            ResponseHead {
                fields,
                status,
                minor,
                framing,
            },
            len,
        )))
    }

    /// The header fields.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// The status code.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The status line with its CRLF.
    pub fn status_line(&self) -> &[u8] {
        // A server may send an empty line before it.
        let line = self.fields.raw.trim_ascii_start();
        let end = memchr::memchr(b'\n', line).map_or(line.len(), |at| at + 1);
        &line[..end]
    }

    /// How the body's length is found.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Whether another head follows for the same request (1xx, but for a change of protocol).
    pub fn is_interim(&self) -> bool {
        matches!(self.status, 100..=199) && self.status != 101
    }

    /// Whether the server will take another request on this connection once this response has ended.
    pub fn keep_alive(&self) -> bool {
        self.minor == 1 && self.framing != Framing::UntilClose && !self.fields.lists("connection", "close")
    }

    /// Whether the body is a stream of server-sent events that this reader can look into.
    pub fn is_event_stream(&self) -> bool {
        let is_sse = self
            .fields
            .get("content-type")
            .is_some_and(|value| value.len() >= 17 && value[..17].eq_ignore_ascii_case(b"text/event-stream"));
        is_sse && !self.is_encoded()
    }

    /// Whether a content coding (gzip and so on) hides the payload.
    pub fn is_encoded(&self) -> bool {
        self.fields
            .get("content-encoding")
            .is_some_and(|value| !value.eq_ignore_ascii_case(b"identity"))
    }
}

/// The value of a plain decimal number. Anything else, a sign or a list included, is `None`.
fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Whether `target` is an absolute URL with an authority, followed by a path or by nothing. A query right behind the authority could
/// hold a slash, where one reader begins the path and another does not.
fn is_http_url(target: &str) -> bool {
    let Some((scheme, rest)) = target.split_once("://") else {
        return false;
    };
    let authority = rest.split('/').next().unwrap_or("");
    let known_scheme = scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    known_scheme && !authority.is_empty() && !authority.contains('?')
}

fn refused(error: httparse::Error) -> HeadError {
    match error {
        httparse::Error::TooManyHeaders => HeadError::TooManyFields,
        httparse::Error::Version => HeadError::Version,
        other => HeadError::Malformed(other),
    }
}

/// The length of a whole head that keeps the limit and ends all its lines in CRLF.
fn complete(
    status: httparse::Status<usize>,
    buf: &[u8],
    max_bytes: usize,
) -> Result<Option<usize>, HeadError> {
    let (seen, len) = match status {
        httparse::Status::Complete(len) => (&buf[..len], Some(len)),
        httparse::Status::Partial => (buf, None),
    };
    if seen.len() > max_bytes || (len.is_none() && seen.len() >= max_bytes) {
        return Err(HeadError::TooLarge(max_bytes));
    }
    let (mut lines, mut bare) = (0, false);
    for at in memchr::memchr_iter(b'\n', seen) {
        lines += 1;
        bare |= at == 0 || seen[at - 1] != b'\r';
    }
    // httparse takes a CR without LF between words of some lines for white space; no sender means that. A CR at the end may get its LF yet.
    let carriage_returns = memchr::memchr_iter(b'\r', seen).count() - usize::from(seen.ends_with(b"\r"));
    let lone_cr = carriage_returns != lines;
    if bare || lone_cr {
        Err(HeadError::BareLineEnd)
    } else {
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<RequestHead, HeadError> {
        RequestHead::parse(text.as_bytes(), 8_192).map(|parsed| parsed.expect("a whole head").0)
    }

    fn response(text: &str, method: &str) -> Result<ResponseHead, HeadError> {
        ResponseHead::parse(text.as_bytes(), 8_192, method).map(|parsed| parsed.expect("a whole head").0)
    }

    #[test]
    fn a_head_keeps_its_lines_as_they_came() {
        let head =
            request("POST /v1/x?a=1 HTTP/1.1\r\nhOsT:  a \r\nX-Empty:\r\nContent-Length: 3\r\n\r\nabc")
                .unwrap();
        assert_eq!(
            (head.method(), head.target(), head.path()),
            ("POST", "/v1/x?a=1", "/v1/x")
        );
        assert_eq!(head.framing(), Framing::Length(3));
        let lines: Vec<&[u8]> = head.fields().iter().map(|field| field.line).collect();
        assert_eq!(
            lines,
            [&b"hOsT:  a \r\n"[..], b"X-Empty:\r\n", b"Content-Length: 3\r\n"]
        );
        assert_eq!(head.fields().get("HOST"), Some(&b"a"[..]));
        assert_eq!(head.fields().get("x-empty"), Some(&b""[..]));
    }

    #[test]
    fn what_two_servers_could_read_differently_is_refused() {
        let refused =
            |fields: &str| request(&format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).unwrap_err();
        assert_eq!(
            refused("Content-Length: 1\r\nContent-Length: 1\r\n"),
            HeadError::TwoLengths
        );
        assert_eq!(refused("Content-Length: 1, 1\r\n"), HeadError::Length);
        assert_eq!(refused("Content-Length: +1\r\n"), HeadError::Length);
        assert_eq!(
            refused("Content-Length: 99999999999999999999\r\n"),
            HeadError::Length
        );
        assert_eq!(
            refused("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
            HeadError::LengthAndCoding
        );
        assert_eq!(refused("Transfer-Encoding: gzip, chunked\r\n"), HeadError::Coding);
        assert_eq!(
            refused("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
            HeadError::Coding
        );
        assert_eq!(refused("Host: b\r\n"), HeadError::Host);
        assert_eq!(refused("A: b\n"), HeadError::BareLineEnd);
        assert!(matches!(refused("A: b\r\n c\r\n"), HeadError::Malformed(_)));
        assert!(matches!(refused("A : b\r\n"), HeadError::Malformed(_)));
        assert_eq!(request("GET / HTTP/1.1\r\n\r\n").unwrap_err(), HeadError::Host);
        assert_eq!(
            request("GET x HTTP/1.1\r\nHost: a\r\n\r\n").unwrap_err(),
            HeadError::Target
        );
        assert_eq!(
            request("GET /#x HTTP/1.1\r\nHost: a\r\n\r\n").unwrap_err(),
            HeadError::Target
        );
        let chunked_10 = "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(request(chunked_10).unwrap_err(), HeadError::CodingIn10);
    }

    #[test]
    fn an_absolute_target_is_read_as_its_path() {
        let target = |line: &str| {
            request(&format!("GET {line} HTTP/1.1\r\nHost: a\r\n\r\n"))
                .unwrap()
                .target()
                .to_owned()
        };
        assert_eq!(target("http://h:1/v1/models?x"), "/v1/models?x");
        assert_eq!(target("HTTP://h"), "/");
        for bad in [
            "http://",
            "http:///v1/models",
            "http://h?a=/sleep",
            "ftp://h/",
            "h:1",
        ] {
            let refused = request(&format!("GET {bad} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap_err();
            assert_eq!(refused, HeadError::Target, "{bad}");
        }
    }

    #[test]
    fn limits_hold_before_the_head_is_whole() {
        let long = format!("GET / HTTP/1.1\r\nA: {}", "b".repeat(100));
        assert_eq!(
            RequestHead::parse(long.as_bytes(), 64).unwrap_err(),
            HeadError::TooLarge(64)
        );
        let many = format!(
            "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
            "A: b\r\n".repeat(MAX_FIELDS)
        );
        assert_eq!(request(&many).unwrap_err(), HeadError::TooManyFields);
        assert!(RequestHead::parse(b"GET / HT", 64).unwrap().is_none());
    }

    #[test]
    fn a_response_knows_its_framing() {
        let framing = |text: &str, method: &str| response(text, method).unwrap().framing();
        assert_eq!(
            framing("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", "GET"),
            Framing::Length(5)
        );
        assert_eq!(
            framing("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", "HEAD"),
            Framing::None
        );
        assert_eq!(framing("HTTP/1.1 204 No Content\r\n\r\n", "GET"), Framing::None);
        assert_eq!(framing("HTTP/1.1 200 OK\r\n\r\n", "GET"), Framing::UntilClose);
        assert_eq!(
            framing("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", "GET"),
            Framing::Chunked
        );
        assert_eq!(
            response("\r\nHTTP/1.1 200 OK\r\n\r\n", "GET")
                .unwrap()
                .status_line(),
            b"HTTP/1.1 200 OK\r\n"
        );
        assert!(matches!(
            response("HTTP/1.1 099 No\r\n\r\n", "GET"),
            Err(HeadError::Malformed(_))
        ));
        assert!(
            response("HTTP/1.1 100 Continue\r\n\r\n", "POST")
                .unwrap()
                .is_interim()
        );
        let sse = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n";
        assert!(response(&format!("{sse}\r\n"), "POST").unwrap().is_event_stream());
        assert!(
            !response(&format!("{sse}content-encoding: gzip\r\n\r\n"), "POST")
                .unwrap()
                .is_event_stream()
        );
    }
}
