//! What a connection makes of pipelining, closes, holes and bytes that are no HTTP.

use super::*;
use crate::wire::exchange::Outcome;
use proptest::prelude::*;

/// Keeps the path of each request beside its facts.
#[derive(Default)]
struct Notes {
    began: usize,
    ended: Vec<(String, Facts)>,
}

impl Watcher for Notes {
    type Tag = String;

    fn began(&mut self, _at: At, head: &RequestHead) -> String {
        self.began += 1;
        head.target().to_owned()
    }

    fn ended(&mut self, tag: String, facts: Facts) {
        self.ended.push((tag, facts));
    }
}

/// A connection and what it has told.
struct Watched(Connection<String>, Notes);

impl Watched {
    fn new() -> Watched {
        let limits = Limits {
            head_bytes: 512,
            in_flight: 4,
        };
        Watched(Connection::new(limits), Notes::default())
    }

    fn client(&mut self, text: &str) -> &mut Watched {
        self.feed(Direction::ToServer, Piece::Bytes(text.as_bytes()))
    }

    fn server(&mut self, text: &str) -> &mut Watched {
        self.feed(Direction::ToClient, Piece::Bytes(text.as_bytes()))
    }

    fn feed(&mut self, direction: Direction, piece: Piece<'_>) -> &mut Watched {
        self.0.feed(direction, At(1_000), piece, &mut self.1);
        self
    }

    fn close(&mut self, closer: Closer) -> Vec<(&str, Outcome)> {
        self.0.close(At(2_000), closer, &mut self.1);
        self.ended()
    }

    fn ended(&self) -> Vec<(&str, Outcome)> {
        let ended = self.1.ended.iter();
        ended.map(|(tag, facts)| (&tag[..], facts.outcome)).collect()
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")
}

fn post(path: &str, framing: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n")
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

#[test]
fn pipelined_requests_are_answered_in_order() {
    let mut watched = Watched::new();
    watched.client(&(get("/a") + &post("/b", "Content-Length: 1") + "x" + &get("/c")));
    watched.server(
        &[
            OK,
            "HTTP/1.1 100 Continue\r\n\r\n",
            OK,
            "HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n",
        ]
        .concat(),
    );
    let expected = [
        ("/a", Outcome::Completed),
        ("/b", Outcome::Completed),
        ("/c", Outcome::ClientError),
    ];
    assert_eq!(watched.ended(), expected);
    assert_eq!(watched.1.ended[1].1.request_bytes, 1);
    assert_eq!((watched.0.in_flight(), watched.0.opaque_bytes()), (0, 0));
}

#[test]
fn a_response_to_head_has_no_body() {
    let mut watched = Watched::new();
    watched
        .client("HEAD /a HTTP/1.1\r\nHost: a\r\n\r\n")
        .client(&get("/b"));
    watched
        .server("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        .server(OK);
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Completed)]
    );
}

#[test]
fn trailers_belong_to_the_response() {
    let mut watched = Watched::new();
    watched
        .client(&get("/a"))
        .server(CHUNKED)
        .server("1\r\nx\r\n0\r\nA: b\r\n");
    assert_eq!(watched.ended(), []);
    watched.server("\r\n");
    assert_eq!(watched.ended(), [("/a", Outcome::Completed)]);
}

#[test]
fn a_client_that_leaves_behind_the_last_event_has_broken_off_nothing() {
    const STREAM: &str =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    let path = "/v1/chat/completions";
    for (event, ending) in [
        ("data: [DONE]\n\n", Outcome::Completed),
        ("data: {\"type\":\"message_stop\"}\n\n", Outcome::Completed),
        ("data: {\"type\":\"response.completed\"}\n\n", Outcome::Completed),
        ("data: {\"choices\":[]}\n\n", Outcome::Aborted),
        ("data: [DONE]\n", Outcome::Aborted),
    ] {
        let mut watched = Watched::new();
        let response = format!("{STREAM}{:x}\r\n{event}\r\n", event.len());
        watched.client(&get(path)).server(&response);
        assert_eq!(watched.close(Closer::Client), [(path, ending)], "{event:?}");
    }
    let mut watched = Watched::new();
    watched
        .client(&get(path))
        .server(&format!("{STREAM}e\r\ndata: [DONE]\n\n\r\n"));
    assert_eq!(watched.close(Closer::Server), [(path, Outcome::Truncated)]);
}

#[test]
fn who_closes_decides_how_it_ended() {
    for (closer, outcome) in [
        (Closer::Client, Outcome::Aborted),
        (Closer::Server, Outcome::Truncated),
        (Closer::Unknown, Outcome::Incomplete),
    ] {
        let mut watched = Watched::new();
        watched.client(&(get("/a") + &get("/b"))).server(CHUNKED);
        assert_eq!(watched.close(closer), [("/a", outcome), ("/b", outcome)]);
    }
    let mut watched = Watched::new();
    watched
        .client(&get("/a"))
        .server("HTTP/1.1 200 OK\r\n\r\nall of it");
    assert_eq!(watched.close(Closer::Server), [("/a", Outcome::Completed)]);
    let mut watched = Watched::new();
    watched
        .client(&get("/a"))
        .server("HTTP/1.1 200 OK\r\n\r\nall of it");
    assert_eq!(watched.close(Closer::Client), [("/a", Outcome::Aborted)]);
}

#[test]
fn after_an_upgrade_nothing_is_read() {
    let mut watched = Watched::new();
    watched
        .client(&get("/v1/realtime"))
        .server("HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n");
    watched.client(&get("/no")).server(OK);
    assert_eq!(
        watched.close(Closer::Client),
        [("/v1/realtime", Outcome::Completed)]
    );
    let facts = &watched.1.ended[0].1;
    assert_eq!(
        (facts.request_bytes, facts.response_bytes),
        (get("/no").len() as u64, OK.len() as u64)
    );
}

#[test]
fn a_hole_beyond_a_length_ends_that_body_and_begins_the_next_head() {
    let mut watched = Watched::new();
    watched
        .client(&(get("/a") + &get("/b")))
        .server("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nab");
    // The end of one response, and the beginning of the next one's head.
    watched
        .feed(Direction::ToClient, Piece::Hole(9))
        .server("0 OK\r\n");
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Incomplete)]
    );
    assert_eq!(watched.1.ended[0].1.response_bytes, 6);
    let mut watched = Watched::new();
    watched.client(&post("/a", "Content-Length: 6")).client("ab");
    watched
        .feed(Direction::ToServer, Piece::Hole(9))
        .client("/b HTTP/1.1\r\n\r\n")
        .server(OK);
    assert_eq!(watched.ended(), [("/a", Outcome::Completed)]);
    assert_eq!(watched.1.ended[0].1.request_whole, Some(At(1_000)));
}

#[test]
fn holes_within_a_length_lose_nothing_but_their_bytes() {
    let mut watched = Watched::new();
    watched.client(&post("/a", "Content-Length: 10")).client("ab");
    watched
        .feed(Direction::ToServer, Piece::Hole(8))
        .client(&get("/b"));
    watched.server("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n");
    watched.feed(Direction::ToClient, Piece::Hole(6)).server(OK);
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Completed)]
    );
    assert_eq!(watched.1.ended[0].1.request_bytes, 10);
}

#[test]
fn a_hole_inside_a_chunk_is_one_in_payload() {
    let mut watched = Watched::new();
    watched
        .client(&post("/a", "Transfer-Encoding: chunked"))
        .client("5\r\nab");
    watched
        .feed(Direction::ToServer, Piece::Hole(3))
        .client("\r\n0\r\n\r\n")
        .server(CHUNKED)
        .server("5\r\nab");
    watched
        .feed(Direction::ToClient, Piece::Hole(3))
        .server("\r\n0\r\n\r\n")
        .client(&get("/b"))
        .server(OK);
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Completed)]
    );
    let facts = &watched.1.ended[0].1;
    assert_eq!((facts.request_bytes, facts.response_bytes), (5, 5));
    assert!(facts.request_whole.is_some());
}

#[test]
fn a_hole_in_chunked_framing_ends_a_response_unseen_until_the_next_head() {
    let mut watched = Watched::new();
    watched.client(&get("/a")).server(CHUNKED).server("5\r\nab");
    watched.feed(Direction::ToClient, Piece::Hole(4));
    assert_eq!(watched.ended(), [("/a", Outcome::Incomplete)]);
    watched
        .server("\n0\r\n\r\n")
        .client(&get("/b"))
        .server("de\r\n")
        .server(OK);
    assert_eq!(watched.ended()[1..], [("/b", Outcome::Completed)]);
}

#[test]
fn a_response_right_behind_the_lost_end_of_another_is_the_next_requests() {
    // That the end of `/a` is missing shows only when the response to `/b` comes.
    let mut watched = Watched::new();
    watched.client(&get("/a")).server(CHUNKED).server("5\r\nab");
    watched
        .client(&get("/b"))
        .feed(Direction::ToClient, Piece::Hole(10))
        .server(OK);
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Incomplete), ("/b", Outcome::Completed)]
    );
    // With two that wait, either could be meant, and with other bytes behind the hole its head was swallowed too.
    for (waiting, behind) in [(2, OK), (1, "200 OK\r\n\r\n")] {
        let mut watched = Watched::new();
        watched.client(&get("/a")).server(CHUNKED).server("5\r\nab");
        watched
            .client(&get("/b").repeat(waiting))
            .feed(Direction::ToClient, Piece::Hole(10))
            .server(behind);
        assert_eq!(
            watched.ended(),
            [
                &[("/a", Outcome::Incomplete)][..],
                &vec![("/b", Outcome::Incomplete); waiting]
            ]
            .concat()
        );
        watched.client(&get("/c")).server(OK);
        assert_eq!(watched.ended().last(), Some(&("/c", Outcome::Completed)));
    }
}

#[test]
fn a_response_of_which_the_head_is_lost_is_not_taken_for_its_successor() {
    // The head of `/a`'s response is missing, and all of `/b`'s too.
    let mut watched = Watched::new();
    watched
        .client(&get("/a"))
        .feed(Direction::ToClient, Piece::Hole(30))
        .server("of a body\r\n")
        .client(&get("/b"))
        .feed(Direction::ToClient, Piece::Hole(30));
    watched
        .client(&get("/c"))
        .server("HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(
        watched.ended(),
        [
            ("/a", Outcome::Incomplete),
            ("/b", Outcome::Incomplete),
            ("/c", Outcome::ClientError)
        ]
    );
}

#[test]
fn a_response_whose_head_has_begun_takes_the_hole_behind_it() {
    for (head, outcome) in [
        ("HTTP/1.1 2", Outcome::Completed),
        ("HTTP/1.1 ", Outcome::Incomplete),
    ] {
        let mut watched = Watched::new();
        watched.client(&get("/a")).server(head).client(&get("/b"));
        watched.feed(Direction::ToClient, Piece::Hole(9)).server(OK);
        assert_eq!(watched.ended(), [("/a", Outcome::Incomplete), ("/b", outcome)]);
    }
}

#[test]
fn a_hole_before_a_response_spares_it() {
    let mut watched = Watched::new();
    watched.client(&get("/a")).server("HTTP/1.1 100 Con");
    watched
        .feed(Direction::ToClient, Piece::Hole(9))
        .server(OK)
        .client(&get("/b"))
        .server(OK);
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Completed)]
    );
}

#[test]
fn a_request_is_whole_with_its_last_byte() {
    let mut watched = Watched::new();
    let feed = |watched: &mut Watched, at: u64, text: &str| {
        let piece = Piece::Bytes(text.as_bytes());
        watched.0.feed(Direction::ToServer, At(at), piece, &mut watched.1);
    };
    feed(&mut watched, 1, "GET /a HTTP/1.1\r\n");
    feed(&mut watched, 2, "Host: a\r\n\r\n");
    feed(&mut watched, 3, &post("/b", "Content-Length: 2"));
    feed(&mut watched, 4, "{");
    assert_eq!((watched.0.in_flight(), watched.0.awaits_response()), (2, true));
    feed(&mut watched, 5, "}");
    feed(&mut watched, 6, &post("/c", "Transfer-Encoding: chunked"));
    feed(&mut watched, 7, "2\r\n{}\r\n0\r\n");
    watched.server(OK).server(OK);
    assert!(!watched.0.awaits_response());
    feed(&mut watched, 8, "\r\n");
    assert!(watched.0.awaits_response());
    watched.server(OK);
    let whole = watched.1.ended.iter().map(|(_, facts)| facts.request_whole);
    assert_eq!(whole.collect::<Vec<_>>(), [2, 5, 8].map(|at| Some(At(at))));
}

#[test]
fn an_idle_connection_keeps_no_buffers() {
    let mut watched = Watched::new();
    for _ in 0..3 {
        watched
            .client(&post("/a", "Content-Length: 1"))
            .client("x")
            .server(OK);
    }
    assert_eq!(watched.1.ended.len(), 3);
    let connection = &watched.0;
    let kept = [
        connection.requests.head.capacity(),
        connection.responses.head.capacity(),
    ];
    assert_eq!((kept, connection.in_flight.capacity()), ([0, 0], 0));
}

#[test]
fn a_hole_in_a_chunked_requests_framing_leaves_only_that_exchange_unseen() {
    let mut watched = Watched::new();
    watched
        .client(&post("/a", "Transfer-Encoding: chunked"))
        .client("5\r\nab");
    watched
        .feed(Direction::ToServer, Piece::Hole(4))
        .client("\n0\r\n\r\n")
        .server(OK);
    assert_eq!(watched.ended(), [("/a", Outcome::Incomplete)]);
    watched.client(&get("/b")).server(OK);
    assert_eq!(watched.ended()[1..], [("/b", Outcome::Completed)]);
}

#[test]
fn a_request_found_anew_while_others_wait_is_not_paired_with_certainty() {
    let mut watched = Watched::new();
    watched
        .client(&get("/a"))
        .feed(Direction::ToServer, Piece::Hole(40))
        .client(&get("/c"));
    watched.server(OK).server(OK);
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Incomplete), ("/c", Outcome::Incomplete)]
    );
}

#[test]
fn a_connection_seen_from_its_middle_waits_for_a_request() {
    let mut watched = Watched::new();
    watched
        .server("ab\"}]}\r\n\r\n")
        .client("rest of a body}")
        .server(OK);
    assert_eq!(watched.ended(), []);
    watched
        .client(&get("/a"))
        .server("late bytes of the old response")
        .server(OK);
    assert_eq!(watched.ended(), [("/a", Outcome::Completed)]);
    assert!(watched.0.opaque_bytes() > 0);
}

#[test]
fn what_only_looked_like_a_head_does_not_hide_the_next_one() {
    for (late, at_end) in [
        ("rest of a PROMPT", "T"),
        ("x", "POST"),
        ("OST /b HTTP/1.1\r\nHost: a\r\n\r\n", "GET"),
    ] {
        let mut watched = Watched::new();
        watched
            .client(late)
            .client(at_end)
            .client("P")
            .client(&post("/a", "Content-Length: 0")[1..]);
        watched.server("late").server("H").server(OK);
        assert_eq!(watched.ended(), [("/a", Outcome::Completed)], "{late}");
        assert_eq!(watched.0.opaque_bytes(), (late.len() + at_end.len() + 5) as u64);
    }
}

#[test]
fn other_protocols_are_opaque() {
    for bytes in [
        "\u{16}\u{3}\u{1}\u{2}",
        "PRI * HTTP/2.0\r\n\r\n",
        "GET x",
        "GETTYSBURG /",
        "get / HTTP/1.1\r\n\r\n",
    ] {
        let mut watched = Watched::new();
        watched.client(bytes).server(bytes);
        assert_eq!(watched.0.opaque_bytes(), 2 * bytes.len() as u64, "{bytes:?}");
        assert_eq!(
            (watched.1.began, watched.0.requests.head.capacity()),
            (0, 0),
            "{bytes:?}"
        );
    }
}

#[test]
fn a_head_beyond_the_limit_is_not_held() {
    let mut watched = Watched::new();
    watched.client("GET / HTTP/1.1\r\nA: ").client(&"x".repeat(2_000));
    assert_eq!((watched.1.began, watched.0.requests.head.capacity()), (0, 0));
    watched
        .client(&get("/a"))
        .server("HTTP/1.1 200 OK\r\nA: ")
        .server(&"x".repeat(2_000));
    assert_eq!(watched.close(Closer::Unknown), [("/a", Outcome::Incomplete)]);
}

#[test]
fn too_many_waiting_requests_are_given_up_together() {
    let mut watched = Watched::new();
    watched.client(&get("/a").repeat(5));
    assert_eq!(watched.ended(), [("/a", Outcome::Incomplete); 4]);
    assert_eq!((watched.1.began, watched.0.in_flight()), (4, 0));
}

#[test]
fn an_early_answer_does_not_take_the_rest_of_the_request() {
    let mut watched = Watched::new();
    watched
        .client(&post("/a", "Content-Length: 4"))
        .client("ab")
        .server(OK)
        .client("cd");
    watched.client(&get("/b")).server(OK);
    assert_eq!(
        watched.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Completed)]
    );
    assert_eq!(watched.1.ended[0].1.request_bytes, 2);
}

/// What connections are made of, and what they are not.
const WORDS: &[&str] = &[
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.1 101 X\r\n\r\n",
    "HTTP/1.1 200 OK\r\n\r\n",
    "hello",
    "5\r\nhello\r\n",
    "0\r\n\r\n",
    "\r\n",
    "\u{16}\u{3}",
    "GET",
];

proptest! {
    #[test]
    fn whatever_comes_each_exchange_ends_once(
        steps in prop::collection::vec((any::<bool>(), prop::sample::select(WORDS), 0u64..6, 1usize..90), 0..60),
    ) {
        let mut watched = Watched::new();
        for (is_client, word, hole, cut) in steps {
            let direction = if is_client { Direction::ToServer } else { Direction::ToClient };
            for piece in word.as_bytes().chunks(cut) {
                watched.feed(direction, Piece::Bytes(piece));
            }
            if hole > 3 {
                watched.feed(direction, Piece::Hole(hole));
            }
            prop_assert!(watched.0.in_flight() <= 4);
            prop_assert_eq!(watched.1.began, watched.1.ended.len() + watched.0.in_flight());
        }
        watched.close(Closer::Unknown);
        prop_assert_eq!(watched.1.began, watched.1.ended.len());
    }

    #[test]
    fn no_bytes_make_it_panic(pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..99)), 0..9)) {
        let mut watched = Watched::new();
        watched.client(&get("/a"));
        for (is_client, piece) in pieces {
            let direction = if is_client { Direction::ToServer } else { Direction::ToClient };
            watched.feed(direction, Piece::Bytes(&piece));
        }
        watched.close(Closer::Server);
        prop_assert_eq!(watched.1.began, watched.1.ended.len());
    }
}
