//! Heads on their way through: what is taken out, what is added, everything else byte for byte.
//!
//! Towards the upstream: hop-by-hop fields, identity headers, and the fields with which a client could step out of line in vLLM's
//! scheduler are taken out; the gateway's request id, a request id and the trace context are added. Towards the client: only
//! hop-by-hop fields are taken out, and the request id is added when the upstream did not send it.

use crate::wire::head::{Fields, Framing, RequestHead, ResponseHead};

/// Fields that speak of one connection only (RFC 9110, section 7.6.1). `Transfer-Encoding` is one too, and is handled with the framing.
const HOP_BY_HOP: [&str; 6] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "upgrade",
];

/// Fields with which vLLM lets a client choose its place in the queue, its engine, or the load report it gets.
/// Such choices are the gateway's, or one team could take another's place.
const SCHEDULER: [&str; 4] = [
    "x-vllm-priority",
    "x-session-id",
    "x-data-parallel-rank",
    "endpoint-load-metrics-format",
];

/// The gateway's own id of a request, on the way to the upstream.
pub const GATEWAY_REQUEST_ID: &str = "x-gateway-request-id";

/// The body as the upstream will get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// As the client framed it: nothing, or the client's own length.
    AsFramed,
    /// Held whole (and perhaps edited): so many bytes.
    Whole(usize),
    /// Streamed on in chunks of the gateway's making.
    Rechunked,
}

/// What is added to a request.
pub struct RequestAdditions<'a> {
    /// Signed value of `X-Gateway-Request-Id`.
    pub gateway_request_id: &'a str,
    /// `X-Request-Id`, the client's own if it was good.
    pub request_id: &'a str,
    /// `traceparent` of the span that the gateway is.
    pub traceparent: &'a str,
    /// Whether the response must come unencoded, since it will be looked into and edited.
    pub identity_encoding: bool,
}

/// Writes the head of `head` for the upstream. `strip` says which further fields (identity) stay here.
pub fn request_head(
    head: &RequestHead,
    sent: Sent,
    add: &RequestAdditions<'_>,
    strip: impl Fn(&str) -> bool,
    out: &mut Vec<u8>,
) {
    let fields = head.fields();
    let upgrade = head.wants_upgrade();
    out.extend_from_slice(head.method().as_bytes());
    out.push(b' ');
    out.extend_from_slice(head.target().as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    for field in fields.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        let is_one_of = |names: &[&str]| names.iter().any(|name| is(name));
        let replaced = is_one_of(&[
            GATEWAY_REQUEST_ID,
            "x-request-id",
            "traceparent",
            "expect",
            "transfer-encoding",
        ]) || (is("content-length") && sent != Sent::AsFramed)
            || (is("accept-encoding") && add.identity_encoding);
        if replaced || is_one_of(&SCHEDULER) || strip(field.name) || is_hop_by_hop(fields, field.name) {
            continue;
        }
        out.extend_from_slice(field.line);
    }
    if head.minor_version() == 0 && fields.get("host").is_none() {
        out.extend_from_slice(b"Host: localhost\r\n");
    }
    if upgrade {
        out.extend_from_slice(b"Connection: Upgrade\r\n");
        add_field(out, "Upgrade", fields.get("upgrade").unwrap_or_default());
    }
    match sent {
        Sent::AsFramed => {}
        Sent::Whole(bytes) => add_field(out, "Content-Length", bytes.to_string().as_bytes()),
        Sent::Rechunked => add_field(out, "Transfer-Encoding", b"chunked"),
    }
    if add.identity_encoding {
        add_field(out, "Accept-Encoding", b"identity");
    }
    add_field(out, "X-Request-Id", add.request_id.as_bytes());
    add_field(out, "X-Gateway-Request-Id", add.gateway_request_id.as_bytes());
    add_field(out, "traceparent", add.traceparent.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// How the response's body goes to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// Framed as the upstream framed it.
    AsFramed,
    /// In chunks, although the upstream used another framing.
    Chunked,
    /// Bare until the connection closes (HTTP/1.0 clients).
    UntilClose,
}

/// Writes the head of a response for the client.
pub fn response_head(
    head: &ResponseHead,
    delivered: Delivered,
    request_id: &str,
    close: bool,
    out: &mut Vec<u8>,
) {
    let fields = head.fields();
    let upgraded = head.status() == 101;
    status_line(head, out);
    for field in fields.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        let framing = is("transfer-encoding") || is("content-length");
        if framing && delivered != Delivered::AsFramed || is_hop_by_hop(fields, field.name) {
            continue;
        }
        out.extend_from_slice(field.line);
    }
    if delivered == Delivered::Chunked {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    }
    if fields.get("x-request-id").is_none() {
        add_field(out, "x-request-id", request_id.as_bytes());
    }
    if upgraded {
        out.extend_from_slice(b"connection: upgrade\r\n");
        add_field(out, "upgrade", fields.get("upgrade").unwrap_or_default());
    } else if close {
        out.extend_from_slice(b"connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes an interim head (1xx) for the client.
pub fn interim_head(head: &ResponseHead, out: &mut Vec<u8>) {
    let fields = head.fields();
    status_line(head, out);
    for field in fields.iter().filter(|field| !is_hop_by_hop(fields, field.name)) {
        out.extend_from_slice(field.line);
    }
    out.extend_from_slice(b"\r\n");
}

/// The version is the gateway's own, since it speaks for its side of the connection only: a client must not take `chunked`, or a
/// connection that is kept, for an HTTP/1.0 server's mistake.
fn status_line(head: &ResponseHead, out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1");
    out.extend_from_slice(head.status_line().get(b"HTTP/1.x".len()..).unwrap_or(b"\r\n"));
}

/// Whether a response with this framing must be delivered otherwise to a client of that version.
pub fn delivery(framing: Framing, client_minor: u8, edited: bool) -> Delivered {
    match framing {
        Framing::Chunked if client_minor == 0 => Delivered::UntilClose,
        Framing::Length(_) | Framing::UntilClose if edited && client_minor == 1 => Delivered::Chunked,
        Framing::Length(_) if edited => Delivered::UntilClose,
        _ => Delivered::AsFramed,
    }
}

fn is_hop_by_hop(fields: &Fields, name: &str) -> bool {
    // What a client names in `Connection` is hop-by-hop too, but it must not talk the framing or the host away.
    let protected = [
        "content-length",
        "transfer-encoding",
        "host",
        "content-type",
        "x-request-id",
    ];
    HOP_BY_HOP.iter().any(|hop| hop.eq_ignore_ascii_case(name))
        || (fields.lists("connection", name) && !protected.iter().any(|kept| kept.eq_ignore_ascii_case(name)))
}

fn add_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: RequestAdditions<'_> = RequestAdditions {
        gateway_request_id: "gw-1-1.abc",
        request_id: "r-1",
        traceparent: "00-t-s-01",
        identity_encoding: false,
    };

    fn rewritten(text: &str, sent: Sent, add: &RequestAdditions<'_>) -> String {
        let (head, _) = RequestHead::parse(text.as_bytes(), 8_192)
            .expect("a good head")
            .expect("a whole head");
        let mut out = Vec::new();
        request_head(
            &head,
            sent,
            add,
            |name| name.eq_ignore_ascii_case("x-team-id"),
            &mut out,
        );
        String::from_utf8(out).expect("text")
    }

    const ADDED: &str =
        "X-Request-Id: r-1\r\nX-Gateway-Request-Id: gw-1-1.abc\r\ntraceparent: 00-t-s-01\r\n\r\n";

    #[test]
    fn what_is_not_ours_passes_byte_for_byte() {
        let sent = "POST /v1/x HTTP/1.1\r\nhOST:  a:1\r\nX-Odd:\t v \r\nAuthorization: Bearer k\r\nContent-Length: 2\r\n\r\n";
        let kept = "POST /v1/x HTTP/1.1\r\nhOST:  a:1\r\nX-Odd:\t v \r\nAuthorization: Bearer k\r\nContent-Length: 2\r\n";
        assert_eq!(rewritten(sent, Sent::AsFramed, &ADD), format!("{kept}{ADDED}"));
    }

    #[test]
    fn hop_by_hop_identity_and_forged_fields_stay_here() {
        let sent = "POST / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Hop, Content-Length\r\nX-Hop: 1\r\nTE: trailers\r\n\
                    X-Team-ID: t\r\nx-gateway-request-id: forged\r\nX-Request-Id: bad\r\nX-Vllm-Priority: -9\r\nContent-Length: 2\r\n\r\n";
        let expected = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n{ADDED}");
        assert_eq!(rewritten(sent, Sent::Whole(7), &ADD), expected);
    }

    #[test]
    fn an_edited_response_is_asked_for_unencoded() {
        let add = RequestAdditions {
            identity_encoding: true,
            ..ADD
        };
        let sent = "GET / HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n\r\n";
        let expected = format!("GET / HTTP/1.1\r\nHost: a\r\nAccept-Encoding: identity\r\n{ADDED}");
        assert_eq!(rewritten(sent, Sent::AsFramed, &add), expected);
    }

    #[test]
    fn a_response_of_an_old_server_gets_the_gateways_version() {
        let text = "\r\nHTTP/1.0 200 Fine\r\nConnection: X-Hop\r\nX-Hop: 1\r\nServer: old\r\n\r\n";
        let (head, _) = ResponseHead::parse(text.as_bytes(), 8_192, "GET")
            .expect("good")
            .expect("whole");
        let mut out = Vec::new();
        interim_head(&head, &mut out);
        assert_eq!(
            String::from_utf8(out).expect("text"),
            "HTTP/1.1 200 Fine\r\nServer: old\r\n\r\n"
        );
    }

    #[test]
    fn only_a_websocket_is_upgraded_to() {
        let upgrade = |method: &str, fields: &str| {
            let sent = format!(
                "{method} / HTTP/1.1\r\nHost: a\r\nConnection: upgrade, HTTP2-Settings\r\n{fields}\r\n"
            );
            rewritten(&sent, Sent::AsFramed, &ADD)
        };
        let kept =
            format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n{ADDED}");
        assert_eq!(upgrade("GET", "Upgrade: WebSocket\r\n"), kept);
        let plain = |method: &str| format!("{method} / HTTP/1.1\r\nHost: a\r\n{ADDED}");
        assert_eq!(
            upgrade("GET", "Upgrade: h2c\r\nHTTP2-Settings: A\r\n"),
            plain("GET")
        );
        assert_eq!(upgrade("GET", "Upgrade: websocket, h2c\r\n"), plain("GET"));
        assert_eq!(upgrade("POST", "Upgrade: websocket\r\n"), plain("POST"));
    }

    #[test]
    fn a_response_keeps_its_fields_and_gains_the_request_id() {
        let text =
            "HTTP/1.1 200 OK\r\nserver: uvicorn\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n";
        let (head, _) = ResponseHead::parse(text.as_bytes(), 8_192, "GET")
            .expect("good")
            .expect("whole");
        let mut out = Vec::new();
        response_head(&head, Delivered::AsFramed, "r-1", true, &mut out);
        let expected = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: 2\r\nx-request-id: r-1\r\nconnection: close\r\n\r\n";
        assert_eq!(String::from_utf8(out).expect("text"), expected);
    }
}
