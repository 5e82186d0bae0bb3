//! W3C trace context: the gateway is a span between the client's and vLLM's.

use crate::ids::random_hex;

/// The trace that a request belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// 32 hexadecimal digits.
    pub trace_id: Box<str>,
    /// `traceparent` for the upstream: the same trace, with a span of the gateway's own as the parent.
    pub traceparent: Box<str>,
}

impl Trace {
    /// Continues the trace of a client's `traceparent`; begins a new, unsampled one when there is none or it is malformed.
    pub fn child_of(traceparent: Option<&[u8]>) -> Trace {
        let parent = traceparent
            .and_then(|value| std::str::from_utf8(value).ok())
            .and_then(parse);
        let (trace_id, flags) = match parent {
            Some((trace_id, flags)) => (trace_id.to_owned(), flags),
            None => (random_hex::<16>(), "00"),
        };
        let traceparent = format!("00-{trace_id}-{}-{flags}", random_hex::<8>()).into();
        Trace {
            trace_id: trace_id.into(),
            traceparent,
        }
    }
}

/// The trace id of a well-formed `traceparent`.
pub fn trace_id_of(traceparent: &[u8]) -> Option<&str> {
    std::str::from_utf8(traceparent)
        .ok()
        .and_then(parse)
        .map(|(trace_id, _)| trace_id)
}

/// Trace id and flags of a version-00 `traceparent` (later versions begin with the same four fields).
fn parse(value: &str) -> Option<(&str, &str)> {
    let mut parts = value.split('-');
    let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, len: usize| {
        text.len() == len
            && text
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let is_zero = |text: &str| text.bytes().all(|byte| byte == b'0');
    let good = is_hex(version, 2)
        && version != "ff"
        && is_hex(trace_id, 32)
        && is_hex(span_id, 16)
        && is_hex(flags, 2);
    let whole = version != "00" || parts.next().is_none();
    (good && whole && !is_zero(trace_id) && !is_zero(span_id)).then_some((trace_id, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn a_good_parent_is_continued() {
        let trace = Trace::child_of(Some(format!("00-{TRACE}-00f067aa0ba902b7-01").as_bytes()));
        assert_eq!(&*trace.trace_id, TRACE);
        assert_eq!(
            trace_id_of(format!("00-{TRACE}-00f067aa0ba902b7-01").as_bytes()),
            Some(TRACE)
        );
        assert!(trace.traceparent.starts_with(&format!("00-{TRACE}-")) && trace.traceparent.ends_with("-01"));
        assert!(
            !trace.traceparent.contains("00f067aa0ba902b7"),
            "the gateway is a span of its own"
        );
    }

    #[test]
    fn a_bad_parent_begins_a_new_trace() {
        let upper = format!("00-{}-00f067aa0ba902b7-01", TRACE.to_uppercase());
        let zero = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        for bad in [
            "",
            "00",
            "x",
            &upper,
            &zero,
            &format!("00-{TRACE}-00f067aa0ba902b7-01-more"),
        ] {
            let trace = Trace::child_of(Some(bad.as_bytes()));
            assert_ne!(&*trace.trace_id, TRACE, "{bad}");
            assert_eq!(trace.traceparent.len(), 55, "{bad}");
        }
    }
}
