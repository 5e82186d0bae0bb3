//! Which requests have segments, and what is in them.

use super::*;
use crate::ledger::Work;
use crate::vllm::Means;
use crate::wire::Piece;
use crate::wire::exchange::Ending;
use crate::wire::head::{RequestHead, ResponseHead};

/// Wall time of the first byte: a second after a window began.
const BEGAN_US: i64 = 1_780_000_006_000_000;

/// The same moment on the other clock.
const BEGAN: At = At(50_000_000_000);

const CHAT: &str = "/v1/chat/completions";

/// A moment, in seconds after the first byte.
fn after(seconds: f64) -> At {
    At(BEGAN.0 + (seconds * 1e9) as u64)
}

fn wall(seconds: u64) -> Micros {
    Micros(BEGAN_US as u64 + seconds * 1_000_000)
}

struct Request {
    exchange: Exchange,
    segments: Segments,
    slices: Vec<Slice>,
}

impl Request {
    /// A request that is sent on as it comes, and answered with this head after half a second.
    fn answered(path: &str, status: &str, kind: &str) -> Request {
        let text = format!("POST {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let (head, _) = RequestHead::parse(text.as_bytes(), 1_024).unwrap().unwrap();
        let mut exchange = Exchange::begin(BEGAN, &head);
        exchange.request_body(Piece::Bytes(b"{\"model\":\"m\"}"));
        let mut segments = Segments::begin(BEGAN, BEGAN_US);
        segments.sent(BEGAN);
        let text = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n\r\n");
        let (head, _) = ResponseHead::parse(text.as_bytes(), 1_024, "POST")
            .unwrap()
            .unwrap();
        exchange.response_head(after(0.5), &head);
        Request {
            exchange,
            segments,
            slices: Vec::new(),
        }
    }

    fn stream() -> Request {
        Request::answered(CHAT, "200 OK", "text/event-stream")
    }

    fn body(&mut self, at: At, text: &str) {
        self.exchange.response_body(at, Piece::Bytes(text.as_bytes()));
        if self.segments.is_due(at) {
            let slices = self.segments.advance(&mut self.exchange, at, Wait::default());
            self.slices.extend(slices);
        }
    }

    /// A chunk with some content and, if told, the tokens so far.
    fn chunk(&mut self, at: At, completion_tokens: Option<u64>) {
        let usage = completion_tokens.map_or("null".to_owned(), |tokens| {
            format!(r#"{{"prompt_tokens":40,"completion_tokens":{tokens}}}"#)
        });
        let choice = r#"{"index":0,"delta":{"content":"x"}}"#;
        self.body(
            at,
            &format!("data: {{\"model\":\"m\",\"choices\":[{choice}],\"usage\":{usage}}}\n\n"),
        );
    }

    fn finish(mut self, at: At, ending: Ending) -> Vec<Slice> {
        let facts = self.exchange.finish(at, ending);
        self.slices
            .extend(self.segments.finish(&facts, None, Wait::default()));
        self.slices
    }
}

fn sum(slices: &[Slice]) -> Work {
    slices
        .iter()
        .fold(Work::default(), |sum, slice| sum.plus(slice.work))
}

#[test]
fn a_stream_that_tells_its_tokens_is_cut_while_it_goes_on() {
    let mut request = Request::stream();
    // A token a second, for two minutes.
    for second in 1..=120 {
        request.chunk(after(second as f64), Some(second));
        // The first window ends after 14 s, and each further one 15 s later.
        let over = (second + 1) / 15;
        assert_eq!(request.slices.len() as u64, over, "after {second} s");
    }
    assert!(request.exchange.progress().marks().len() <= 8);
    let cut = sum(&request.slices);
    assert_eq!((cut.prompt_tokens, cut.completion_tokens), (40, 119));
    let tokens: Vec<u64> = request
        .slices
        .iter()
        .map(|slice| slice.work.completion_tokens)
        .collect();
    assert_eq!(tokens, [14, 15, 15, 15, 15, 15, 15, 15]);
    request.body(
        after(120.5),
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":40,\"completion_tokens\":121}}\n\n",
    );
    let slices = request.finish(after(121.0), Ending::Complete);
    let all = sum(&slices);
    assert_eq!((all.prompt_tokens, all.completion_tokens), (40, 121));
    assert_eq!(slices[0].run.from(), wall(0));
}

#[test]
fn one_that_tells_at_its_end_is_cut_by_its_chunks() {
    let mut request = Request::stream();
    for second in 1..=28 {
        request.chunk(after(second as f64), None);
    }
    assert!(request.slices.is_empty());
    request.body(
        after(28.0),
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":56}}\n\n",
    );
    let slices = request.finish(after(28.0), Ending::Complete);
    let tokens: Vec<u64> = slices.iter().map(|slice| slice.work.completion_tokens).collect();
    assert_eq!(tokens, [28, 28], "two tokens to each chunk");
}

#[test]
fn what_its_client_left_counts_as_far_as_it_was_told() {
    let mut request = Request::stream();
    request.chunk(after(1.0), Some(1));
    request.chunk(after(2.0), Some(9));
    let slices = request.finish(after(2.2), Ending::ClientGone);
    let [slice] = slices[..] else { panic!("{slices:?}") };
    assert_eq!((slice.work.prompt_tokens, slice.work.completion_tokens), (40, 9));
    assert_eq!(slice.run.len_us(), 2_200_000);
}

#[test]
fn an_unstreamed_response_is_one_run_until_its_last_byte() {
    let mut request = Request::answered(CHAT, "200 OK", "application/json");
    request.body(
        after(3.0),
        r#"{"model":"m","usage":{"prompt_tokens":30,"completion_tokens":20}}"#,
    );
    // The client takes its time.
    let slices = request.finish(after(9.0), Ending::Complete);
    let [slice] = slices[..] else { panic!("{slices:?}") };
    assert_eq!(slice.run, Span::new(wall(0), wall(3)));
    assert_eq!((slice.work.prompt_tokens, slice.work.completion_tokens), (30, 20));
}

#[test]
fn one_whose_client_left_before_the_answer_ran_without_known_tokens() {
    let request = Request::answered(CHAT, "200 OK", "application/json");
    let slices = request.finish(after(4.0), Ending::ClientGone);
    let [slice] = slices[..] else { panic!("{slices:?}") };
    assert_eq!((slice.run.len_us(), slice.work), (4_000_000, Work::default()));
}

#[test]
fn what_no_engine_ran_has_no_segments() {
    for (path, status, ending) in [
        (CHAT, "404 Not Found", Ending::Complete),
        (CHAT, "503 Service Unavailable", Ending::Complete),
        ("/v1/models", "200 OK", Ending::Complete),
        ("/tokenize", "200 OK", Ending::Complete),
        (CHAT, "200 OK", Ending::Refused),
        (CHAT, "200 OK", Ending::Unreachable),
    ] {
        let request = Request::answered(path, status, "application/json");
        assert!(
            request.finish(after(1.0), ending).is_empty(),
            "{path} {status} {ending:?}"
        );
    }
    let mut request = Request::answered(CHAT, "200 OK", "application/json");
    request.segments = Segments::begin(BEGAN, BEGAN_US);
    assert!(
        request.finish(after(1.0), Ending::ClientGone).is_empty(),
        "it was never sent"
    );
}

#[test]
fn the_kernel_knows_better_when_a_request_arrived_and_ended() {
    let mut request = Request::answered(CHAT, "200 OK", "application/json");
    request.body(
        after(5.0),
        r#"{"usage":{"prompt_tokens":1,"completion_tokens":1}}"#,
    );
    let facts = request.exchange.finish(after(5.0), Ending::Complete);
    let tap = TapTimes {
        arrived: after(1.0),
        ended: after(4.0),
        ttft_us: None,
    };
    let slices = request.segments.finish(&facts, Some(tap), Wait::default());
    assert_eq!(slices[0].run, Span::new(wall(1), wall(4)));
}

#[test]
fn what_is_known_of_waits_is_what_the_upstream_said_last() {
    let waits = Waits::default();
    assert_eq!(waits.of("chat"), Wait::default());
    let mut sample = SystemSample {
        upstream: "chat".into(),
        means: Means {
            queue_us: Some(900_000),
            prefill_us: Some(80_000),
            itl_us: Some(20_000),
        },
        ..SystemSample::default()
    };
    waits.record(&sample);
    let expected = Wait {
        told_us: None,
        queue_us: Some(900_000),
        prefill_us: Some(80_000),
        token_us: Some(20_000),
    };
    assert_eq!(waits.of("chat"), expected);
    assert_eq!(waits.of("embeddings"), Wait::default());
    sample.means = Means::default();
    waits.record(&sample);
    assert_eq!(waits.of("chat"), Wait::default(), "nothing has ended since");
}
