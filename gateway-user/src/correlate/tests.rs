use super::*;
use crate::config::Config;
use crate::event::Sinks;
use crate::wire::exchange::{Ending, Outcome};
use std::sync::{Mutex, PoisonError};

const SECRET: &str = "a secret of the whole cluster";

#[derive(Default)]
struct Kept {
    began: Mutex<Vec<String>>,
    events: Mutex<Vec<RequestEvent>>,
    timings: Mutex<Vec<TapTiming>>,
}

fn push<T>(list: &Mutex<Vec<T>>, entry: T) {
    list.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
}

fn all<T: Clone>(list: &Mutex<Vec<T>>) -> Vec<T> {
    list.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

impl EventSink for Kept {
    fn began(&self, begin: &Begin<'_>) {
        push(&self.began, begin.event_id.to_owned());
    }

    fn record(&self, event: &RequestEvent) {
        push(&self.events, event.clone());
    }
}

impl TimingSink for Kept {
    fn record(&self, timing: &TapTiming) {
        push(&self.timings, timing.clone());
    }
}

fn books(gateway: &str, kept: &Arc<Kept>) -> Books {
    let yaml = format!("gateway: {{id: {gateway}, secret: \"{SECRET}\"}}\n");
    let config = Config::parse("test.yaml", &yaml, &|_| None).expect("it is valid");
    Books::new(&config, Sinks::new([Arc::clone(kept) as Arc<dyn EventSink>]))
}

fn correlator() -> (Correlator, Arc<Kept>) {
    let kept = Arc::new(Kept::default());
    let timings = Arc::clone(&kept) as Arc<dyn TimingSink>;
    (Correlator::new(books("gw-1", &kept), Some(timings)), kept)
}

fn head(path: &str, fields: &str) -> RequestHead {
    let text = format!("POST {path} HTTP/1.1\r\nHost: vllm\r\n{fields}\r\n");
    let parsed = RequestHead::parse(text.as_bytes(), 8192).expect("it is well formed");
    parsed.expect("it is whole").0
}

fn chat(fields: &str) -> RequestHead {
    head("/v1/chat/completions", fields)
}

fn ended() -> Facts {
    let mut facts = Facts::unread(At(1_000), At(5_001_000), Ending::Complete);
    (facts.status, facts.outcome) = (Some(200), Outcome::Completed);
    facts.ttft_us = Some(2_000);
    facts
}

/// Lets one exchange begin and end.
fn pass(correlator: &mut Correlator, head: &RequestHead) {
    let whose = correlator.began(At(1_000), "chat", head);
    correlator.ended(whose, ended());
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn an_own_request_gets_its_times_and_no_event() {
    let (mut correlator, kept) = correlator();
    let ids = Arc::clone(&correlator.books.ids);
    let id = ids.next();
    correlator.joins().sent(&id);
    pass(
        &mut correlator,
        &chat(&format!("x-gateway-request-id: {}\r\n", ids.signed(&id))),
    );
    let times = TapTimes {
        arrived: At(1_000),
        ended: At(5_001_000),
        ttft_us: Some(2_000),
    };
    assert_eq!(correlator.joins().end(&id), Some(times));
    assert!(all(&kept.events).is_empty() && all(&kept.began).is_empty() && all(&kept.timings).is_empty());
    assert_eq!(read(&correlator.counts.joined), 1);
}

#[test]
fn direct_traffic_is_an_event_for_the_team_that_its_headers_name() {
    let (mut correlator, kept) = correlator();
    let fields = "X-Team-ID: search\r\nX-Project: p\r\nX-User-ID: u\r\nX-Request-Id: r-1\r\n\
                  traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";
    pass(&mut correlator, &chat(fields));
    let events = all(&kept.events);
    let [event] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(all(&kept.began), [event.event_id.to_string()]);
    assert_eq!(
        (&*event.team_id, &*event.project, &*event.user_id),
        ("search", "p", "u")
    );
    assert_eq!(
        (&*event.request_id, &*event.trace_id),
        ("r-1", "4bf92f3577b34da6a3ce929d0e0e4736")
    );
    assert_eq!(
        (event.capture, &*event.upstream, event.status_code),
        (CapturedBy::Tap, "chat", 200)
    );
    assert_eq!((event.ttft_us, event.duration_us), (Some(2_000), 5_000));
    assert_eq!(
        (event.tap_ttft_us, event.tap_duration_us),
        (Some(2_000), Some(5_000))
    );
}

#[test]
fn who_does_not_say_a_team_or_claims_a_reserved_one_is_direct_traffic_by_name() {
    let (mut correlator, kept) = correlator();
    for fields in ["", "X-Team-ID: __idle__\r\n", "X-Team-ID: a\r\nX-Team-ID: b\r\n"] {
        pass(&mut correlator, &chat(fields));
    }
    let teams: Vec<_> = all(&kept.events).into_iter().map(|event| event.team_id).collect();
    assert_eq!(teams, [DIRECT.into(), DIRECT.into(), DIRECT.into()]);
}

#[test]
fn a_forged_or_replayed_id_is_direct_traffic() {
    let (mut correlator, kept) = correlator();
    let ids = Arc::clone(&correlator.books.ids);
    let id = ids.next();
    let signed = format!("x-gateway-request-id: {}\r\n", ids.signed(&id));
    correlator.joins().sent(&id);
    pass(&mut correlator, &chat(&signed));
    correlator.joins().end(&id);
    assert!(all(&kept.events).is_empty());
    pass(&mut correlator, &chat(&signed));
    pass(
        &mut correlator,
        &chat("x-gateway-request-id: gw-1-0-1.0123456789abcdef\r\n"),
    );
    pass(&mut correlator, &chat("x-gateway-request-id: \u{e9}\r\n"));
    assert_eq!(all(&kept.events).len(), 3);
    assert_eq!(
        (read(&correlator.counts.direct), read(&correlator.counts.forged)),
        (3, 3)
    );
}

#[test]
fn another_gateways_request_becomes_a_timing_once() {
    let (mut correlator, kept) = correlator();
    let sibling = books("gw-2", &Arc::default()).ids;
    let id = sibling.next();
    let signed = format!("x-gateway-request-id: {}\r\n", sibling.signed(&id));
    pass(&mut correlator, &chat(&signed));
    let timings = all(&kept.timings);
    let [timing] = &timings[..] else {
        panic!("{timings:?}")
    };
    assert_eq!((&*timing.event_id, &*timing.seen_by), (&*id, "gw-1"));
    assert_eq!((timing.ttft_us, timing.duration_us), (Some(2_000), 5_000));
    assert!(all(&kept.events).is_empty());
    pass(&mut correlator, &chat(&signed));
    assert_eq!((all(&kept.timings).len(), all(&kept.events).len()), (1, 1));
}

#[test]
fn a_probe_of_an_operator_is_no_traffic_unless_a_team_is_named() {
    let (mut correlator, kept) = correlator();
    pass(&mut correlator, &head("/health", ""));
    pass(&mut correlator, &head("/metrics", ""));
    assert!(all(&kept.events).is_empty());
    pass(&mut correlator, &head("/v1/models", "X-Team-ID: search\r\n"));
    pass(&mut correlator, &head("/v1/load_lora_adapter", ""));
    assert_eq!(all(&kept.events).len(), 2);
    assert_eq!(read(&correlator.counts.operational), 2);
}

#[test]
fn chunks_without_usage_are_no_tokens() {
    let (mut correlator, kept) = correlator();
    let whose = correlator.began(At(0), "chat", &chat(""));
    let counted = Facts {
        usage_source: UsageSource::Counted,
        chunks: 7,
        ..ended()
    };
    correlator.ended(whose, counted);
    let events = all(&kept.events);
    assert_eq!((events[0].usage_source, events[0].chunks), (UsageSource::None, 7));
}
