//! What of a request and of a response's head may differ on the two sides of a gateway: all else is equal, byte for byte.

use super::{body, head};
use vllm_gateway::event::RequestEvent;

/// Bytes as text, one to one: all captures are UTF-8.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Holds bytes against each other, and shows only where they part.
pub fn assert_same(got: &str, wanted: &str, what: &str) {
    let parts = got
        .bytes()
        .zip(wanted.bytes())
        .position(|(got, wanted)| got != wanted);
    let parts = parts.unwrap_or_else(|| got.len().min(wanted.len()));
    let near = |text: &str| {
        String::from_utf8_lossy(&text.as_bytes()[parts.saturating_sub(150)..text.len().min(parts + 100)])
            .into_owned()
    };
    assert!(
        got == wanted,
        "{what}: at byte {parts}, got\n{:?}\nwanted\n{:?}",
        near(got),
        near(wanted)
    );
}

/// The head that the client gets for the upstream's: as it came, and behind it the request id if the upstream sent none.
pub fn delivered_head(upstream: &[u8], event: &RequestEvent) -> String {
    let head = text(upstream);
    if head.to_lowercase().contains("\r\nx-request-id: ") {
        return head;
    }
    let fields = head.strip_suffix("\r\n").expect("a blank line");
    format!("{fields}x-request-id: {}\r\n\r\n", event.request_id)
}

/// The head that the upstream gets for the client's. Fields that stay keep order, case and spaces.
fn upstream_head(
    client: &[u8],
    event: &RequestEvent,
    traceparent: &str,
    signed: &str,
    edited: Option<usize>,
) -> String {
    let mut gone = vec!["x-team-id", "x-project", "x-user-id", "x-request-id"];
    if edited.is_some() {
        gone.extend(["content-length", "accept-encoding"]);
    }
    let head = text(client);
    let kept = head
        .strip_suffix("\r\n")
        .expect("a blank line")
        .split_inclusive("\r\n")
        .filter(|line| {
            let name = line.split(':').next().expect("a name").to_lowercase();
            !gone.contains(&name.as_str())
        });
    let mut expected: String = kept.collect();
    if let Some(len) = edited {
        expected += &format!("Content-Length: {len}\r\nAccept-Encoding: identity\r\n");
    }
    expected
        + &format!(
            "X-Request-Id: {}\r\nX-Gateway-Request-Id: {signed}\r\ntraceparent: {traceparent}\r\n\r\n",
            event.request_id
        )
}

/// Holds the upstream's view of a request against the client's.
pub fn assert_request_kept(name: &str, sent: &[u8], received: &[u8], event: &RequestEvent, edited: bool) {
    let field = |wanted: &str| {
        let lines = text(head(received));
        let value = lines
            .lines()
            .find_map(|line| line.strip_prefix(wanted).map(str::to_owned));
        value.unwrap_or_else(|| panic!("{name}: no {wanted:?} in {lines}"))
    };
    let (signed, traceparent) = (field("X-Gateway-Request-Id: "), field("traceparent: "));
    let mac = signed
        .strip_prefix(&*event.event_id)
        .unwrap_or_else(|| panic!("{name}: {signed} of another event"));
    assert!(
        mac.len() > 16 && mac.starts_with('.'),
        "{name}: {signed} is not signed"
    );
    assert!(
        traceparent.starts_with(&format!("00-{}-", event.trace_id)),
        "{name}: {traceparent}"
    );
    let len = edited.then_some(body(received).len());
    let expected = upstream_head(head(sent), event, &traceparent, &signed, len);
    assert_eq!(text(head(received)), expected, "{name}: the upstream's head");
    if !edited {
        assert_eq!(
            text(body(received)),
            text(body(sent)),
            "{name}: the upstream's body"
        );
    }
}
