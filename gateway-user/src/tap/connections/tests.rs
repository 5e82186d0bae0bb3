//! What becomes of exchanges when connections begin, end, break, fall silent and lose bytes.

use super::*;
use crate::wire::exchange::Outcome;
use Direction::{ToClient, ToServer};
use proptest::prelude::*;
use std::collections::HashMap;

/// A connection between two requests; thousands are open at once.
const FOLLOWED_BYTES_MAX: usize = 320;

const _: () = assert!(size_of::<Followed<u64>>() <= FOLLOWED_BYTES_MAX);

/// Notes the path of each request and how it ended.
#[derive(Default)]
struct Notes {
    began: usize,
    ended: Vec<(String, Facts)>,
    unreadable: Vec<(u16, Unreadable)>,
}

impl TapWatcher for Notes {
    type Tag = (String, SocketAddr);

    fn began(&mut self, _: At, client: SocketAddr, _: SocketAddr, head: &RequestHead) -> Self::Tag {
        self.began += 1;
        (head.target().to_owned(), client)
    }

    fn ended(&mut self, (path, began_by): Self::Tag, client: SocketAddr, _: SocketAddr, facts: Facts) {
        assert_eq!(began_by, client);
        self.ended.push((path, facts));
    }

    fn unreadable(&mut self, server: SocketAddr, protocol: Unreadable) {
        self.unreadable.push((server.port(), protocol));
    }
}

/// All connections, and the numbers of the one that speaks.
struct Net {
    tap: Connections<(String, SocketAddr)>,
    notes: Notes,
    now: u64,
    client: SocketAddr,
    server: SocketAddr,
    next: [u32; 2],
    /// Those of the others, by the client's port.
    others: HashMap<u16, [u32; 2]>,
}

/// The client's numbers wrap around soon.
const FIRST: [u32; 2] = [u32::MAX - 90, 7_000];

const MS: u64 = 1_000_000;

fn short_limits() -> Limits {
    Limits {
        connections: 4,
        idle: Duration::from_millis(100),
        silent: Duration::from_millis(500),
        drain: Duration::from_millis(20),
        ..Limits::default()
    }
}

impl Net {
    fn new() -> Net {
        Net {
            tap: Connections::new(short_limits()),
            notes: Notes::default(),
            now: 0,
            client: SocketAddr::from(([10, 0, 0, 1], 40_000)),
            server: SocketAddr::from(([10, 0, 0, 2], 8_000)),
            next: FIRST,
            others: HashMap::new(),
        }
    }

    /// With a connection that has just begun.
    fn connected() -> Net {
        let mut net = Net::new();
        net.connect();
        net
    }

    fn connect(&mut self) -> &mut Net {
        for direction in [Direction::ToServer, Direction::ToClient] {
            self.raw(direction, |segment| segment.syn = true);
            self.next[direction as usize] = self.next[direction as usize].wrapping_add(1);
        }
        self
    }

    /// Another client's port, or the same.
    fn port(&mut self, port: u16) -> &mut Net {
        self.others.insert(self.client.port(), self.next);
        self.next = self.others.get(&port).copied().unwrap_or(FIRST);
        self.client.set_port(port);
        self
    }

    fn raw(&mut self, direction: Direction, change: impl FnOnce(&mut Segment<'_>)) -> &mut Net {
        self.push(direction, b"", change)
    }

    fn push<'a>(
        &mut self,
        direction: Direction,
        captured: &'a [u8],
        change: impl FnOnce(&mut Segment<'a>),
    ) -> &mut Net {
        self.now += MS;
        let mut segment = Segment {
            at: At(self.now),
            client: self.client,
            server: self.server,
            direction,
            syn: false,
            fin: false,
            rst: false,
            sequence: self.next[direction as usize],
            len_bytes: captured.len() as u32,
            captured,
        };
        change(&mut segment);
        self.tap.push(&segment, &mut self.notes);
        self
    }

    fn advance(&mut self, direction: Direction, len: usize) -> &mut Net {
        let next = &mut self.next[direction as usize];
        *next = next.wrapping_add(len as u32);
        self
    }

    fn client(&mut self, text: &str) -> &mut Net {
        self.push(Direction::ToServer, text.as_bytes(), |_| {})
            .advance(Direction::ToServer, text.len())
    }

    fn server(&mut self, text: &str) -> &mut Net {
        self.push(Direction::ToClient, text.as_bytes(), |_| {})
            .advance(Direction::ToClient, text.len())
    }

    /// Bytes of which only the first were captured.
    fn client_prefix(&mut self, text: &str, captured: usize) -> &mut Net {
        let seen = &text.as_bytes()[..captured];
        self.push(Direction::ToServer, seen, |segment| {
            segment.len_bytes = text.len() as u32;
        })
        .advance(Direction::ToServer, text.len())
    }

    /// Bytes of which the record is lost.
    fn lose(&mut self, direction: Direction, text: &str) -> &mut Net {
        self.advance(direction, text.len())
    }

    fn fin(&mut self, direction: Direction) -> &mut Net {
        self.raw(direction, |segment| segment.fin = true)
    }

    fn rst(&mut self, direction: Direction) -> &mut Net {
        self.raw(direction, |segment| segment.rst = true)
    }

    /// Lets time pass.
    fn wait(&mut self, ms: u64) -> &mut Net {
        self.now += ms * MS;
        self.tap.tick(At(self.now), &mut self.notes);
        self
    }

    fn ended(&self) -> Vec<(&str, Outcome)> {
        let ended = self.notes.ended.iter();
        ended.map(|(path, facts)| (&path[..], facts.outcome)).collect()
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")
}

fn post(path: &str, body: &str) -> String {
    let len = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len}\r\n\r\n{body}")
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
const UNTIL_CLOSE: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it";

#[test]
fn a_connection_lives_from_its_first_syn_to_its_last_fin() {
    let mut net = Net::connected();
    for path in ["/a", "/b"] {
        net.client(&get(path)).server(OK);
    }
    assert_eq!(
        net.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Completed)]
    );
    net.fin(ToServer);
    assert_eq!(net.tap.stats().live, 1);
    net.fin(ToClient);
    let stats = net.tap.stats();
    assert_eq!((stats.live, stats.opened, stats.joined), (0, 1, 0));
    assert_eq!(
        (stats.retired(Retired::Finished), stats.began, stats.ended),
        (1, 2, 2)
    );
    // Echoes of it begin nothing.
    net.fin(ToClient)
        .rst(ToServer)
        .push(ToServer, b"GET / HTTP/1.1\r\n", |segment| segment.fin = true);
    assert_eq!((net.tap.stats().live, net.tap.stats().stray_segments), (0, 3));
    // The next connection at the same addresses is another.
    net.next = [5, 6];
    net.connect().client(&get("/c")).server(OK);
    assert_eq!(net.ended()[2..], [("/c", Outcome::Completed)]);
}

#[test]
fn who_ends_the_connection_decides_how_an_exchange_ended() {
    /// Who ends it, and whether by a reset.
    type Ends<'a> = &'a [(Direction, bool)];
    let cases: [(&str, Ends<'_>, Outcome); 8] = [
        (CHUNKED, &[(ToClient, false)], Outcome::Truncated),
        (CHUNKED, &[(ToClient, true)], Outcome::Truncated),
        (CHUNKED, &[(ToServer, true)], Outcome::Aborted),
        (CHUNKED, &[(ToServer, false), (ToClient, false)], Outcome::Aborted),
        (CHUNKED, &[(ToServer, false), (ToClient, true)], Outcome::Aborted),
        (UNTIL_CLOSE, &[(ToClient, false)], Outcome::Completed),
        (
            UNTIL_CLOSE,
            &[(ToServer, false), (ToClient, false)],
            Outcome::Aborted,
        ),
        ("", &[(ToClient, false)], Outcome::Truncated),
    ];
    for (response, ends, outcome) in cases {
        let mut net = Net::connected();
        net.client(&get("/a")).server(response);
        for (direction, is_reset) in ends {
            assert_eq!(net.ended(), [], "{response} {ends:?}");
            match is_reset {
                true => net.rst(*direction),
                false => net.fin(*direction),
            };
        }
        assert_eq!(net.ended(), [("/a", outcome)], "{response} {ends:?}");
    }
}

#[test]
fn a_request_behind_the_servers_end_is_cut_off() {
    let mut net = Net::connected();
    net.client(&get("/a")).server(OK).fin(ToClient).client(&get("/b"));
    assert_eq!(net.ended(), [("/a", Outcome::Completed)]);
    net.fin(ToServer);
    assert_eq!(net.ended()[1..], [("/b", Outcome::Truncated)]);
    assert_eq!(net.tap.stats().live, 0);
}

#[test]
fn what_the_server_sends_behind_a_client_that_left_still_counts() {
    let mut net = Net::connected();
    net.client(&get("/a"))
        .server(CHUNKED)
        .fin(ToServer)
        .server("5\r\nhello\r\n");
    let last = net.now;
    net.wait(18);
    assert_eq!(net.ended(), []);
    net.wait(1);
    assert_eq!(net.ended(), [("/a", Outcome::Aborted)]);
    let facts = &net.notes.ended[0].1;
    assert_eq!((facts.response_bytes, facts.ended), (5, At(last)));
    // A client may end its bytes and still read: what comes whole is whole.
    let mut net = Net::connected();
    net.client(&get("/a")).fin(ToServer).server(CHUNKED).wait(8);
    net.server("2\r\n{}\r\n").wait(8).server("0\r\n\r\n");
    assert_eq!(net.ended(), [("/a", Outcome::Completed)]);
    // As for the proxy, not for however long it takes; also where nobody has looked at the clock since.
    let mut net = Net::connected();
    net.client(&get("/a")).fin(ToServer).server(CHUNKED);
    net.now += 19 * MS;
    net.server("2\r\n{}\r\n0\r\n\r\n");
    assert_eq!(net.ended(), [("/a", Outcome::Aborted)]);
    assert_eq!(net.notes.ended[0].1.response_bytes, 0);
}

#[test]
fn a_fin_ahead_of_the_last_bytes_waits_for_them() {
    let mut net = Net::connected();
    net.client(&get("/a")).server("HTTP/1.1 200 OK\r\n\r\nall ");
    let late = net.next[1];
    net.lose(ToClient, "of it").fin(ToClient);
    assert_eq!(net.ended(), []);
    net.push(ToClient, b"of it", |segment| segment.sequence = late);
    assert_eq!(net.ended(), [("/a", Outcome::Completed)]);
    assert_eq!(net.notes.ended[0].1.response_bytes, 9);
}

#[test]
fn a_reset_that_no_kernel_would_heed_is_none() {
    let mut net = Net::connected();
    net.client(&get("/a"));
    net.raw(ToServer, |segment| {
        segment.rst = true;
        segment.sequence = segment.sequence.wrapping_add(1 << 30);
    });
    net.server(OK);
    assert_eq!(net.ended(), [("/a", Outcome::Completed)]);
}

#[test]
fn other_numbers_at_the_same_addresses_are_a_new_connection() {
    for is_syn_seen in [true, false] {
        let mut net = Net::connected();
        net.client(&get("/a")).server(CHUNKED);
        net.next = [1 << 30, 1 << 31];
        if is_syn_seen {
            net.connect();
        }
        net.client(&get("/b")).server(OK);
        assert_eq!(
            net.ended(),
            [("/a", Outcome::Incomplete), ("/b", Outcome::Completed)]
        );
        let stats = net.tap.stats();
        assert_eq!((stats.live, stats.retired(Retired::Superseded)), (1, 1));
        assert_eq!(
            (stats.opened, stats.joined),
            if is_syn_seen { (2, 0) } else { (1, 1) }
        );
    }
}

#[test]
fn a_syn_that_comes_again_changes_nothing() {
    let mut net = Net::new();
    let first = net.next;
    net.connect().client(&get("/a"));
    for direction in [ToServer, ToClient] {
        net.raw(direction, |segment| {
            segment.syn = true;
            segment.sequence = first[direction as usize];
        });
    }
    net.server(OK);
    assert_eq!(net.ended(), [("/a", Outcome::Completed)]);
    assert_eq!(net.tap.stats().opened, 1);
}

#[test]
fn a_connection_seen_from_its_middle_is_read_from_its_next_request() {
    let mut net = Net::new();
    net.server("a\":1}").client("of a prompt\"}").server(OK);
    net.client(&get("/a")).server(OK);
    assert_eq!(net.ended(), [("/a", Outcome::Completed)]);
    let stats = net.tap.stats();
    assert_eq!((stats.joined, stats.opened), (1, 0));
    assert_eq!(
        stats.opaque_bytes,
        ("a\":1}of a prompt\"}".len() + OK.len()) as u64
    );
}

#[test]
fn only_a_prefix_of_a_request_need_be_captured() {
    let prompt = format!("{{\"model\":\"m\",\"prompt\":\"{}\"}}", "long ".repeat(100));
    let request = post("/v1/completions", &prompt);
    let mut net = Net::connected();
    for _ in 0..2 {
        net.client_prefix(&request, 90).server(OK);
    }
    for (path, facts) in &net.notes.ended {
        assert_eq!(
            (&path[..], facts.outcome),
            ("/v1/completions", Outcome::Completed)
        );
        assert_eq!(facts.model.as_deref(), Some("m"));
        assert_eq!(facts.request_bytes, prompt.len() as u64);
        assert_eq!(facts.request_whole, Some(facts.started));
    }
    assert_eq!(net.notes.ended.len(), 2);
}

#[test]
fn lost_records_cost_the_exchange_that_they_belong_to_and_no_other() {
    let head = "HTTP/1.1 200 OK\r\n";
    let rest = "Content-Length: 2\r\n\r\n{}";
    let request = post("/b", "{}");
    let (begin, end) = request.split_at(10);
    type Step<'a> = (Direction, &'a str, bool);
    let cases: [(&[Step<'_>], Option<Outcome>); 9] = [
        // All of the request; its beginning; the end of its body.
        (&[(ToServer, &request, false), (ToClient, OK, true)], None),
        (
            &[
                (ToServer, begin, false),
                (ToServer, end, true),
                (ToClient, OK, true),
            ],
            None,
        ),
        (
            &[
                (ToServer, begin, true),
                (ToServer, end, false),
                (ToClient, OK, true),
            ],
            None,
        ),
        // The response's head; its body.
        (
            &[
                (ToServer, &request, true),
                (ToClient, head, false),
                (ToClient, rest, true),
            ],
            Some(Outcome::Incomplete),
        ),
        (
            &[
                (ToServer, &request, true),
                (ToClient, head, true),
                (ToClient, rest, false),
            ],
            Some(Outcome::Incomplete),
        ),
        // Chunked: framing, and the end of it.
        (
            &[
                (ToServer, &request, true),
                (ToClient, CHUNKED, true),
                (ToClient, "1\r\na\r\n", false),
                (ToClient, "0\r\n\r\n", true),
            ],
            Some(Outcome::Incomplete),
        ),
        (
            &[
                (ToServer, &request, true),
                (ToClient, CHUNKED, true),
                (ToClient, "0\r\n\r\n", false),
            ],
            Some(Outcome::Incomplete),
        ),
        // A payload of known length.
        (
            &[
                (ToServer, &request, true),
                (ToClient, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", true),
                (ToClient, "{}", false),
            ],
            Some(Outcome::Completed),
        ),
        (
            &[
                (ToServer, &request, true),
                (ToClient, CHUNKED, true),
                (ToClient, "5\r\nh", true),
                (ToClient, "ell", false),
                (ToClient, "o\r\n0\r\n\r\n", true),
            ],
            Some(Outcome::Completed),
        ),
    ];
    for (steps, outcome) in cases {
        let mut net = Net::connected();
        net.client(&get("/a")).server(OK);
        for (direction, text, is_told) in steps {
            match (direction, is_told) {
                (ToServer, true) => net.client(text),
                (ToClient, true) => net.server(text),
                (direction, false) => net.lose(*direction, text),
            };
        }
        // Where the end of a response is missing, that shows with the next one, which waits for it for a while.
        net.client(&get("/c")).server(OK).wait(50);
        let mut expected = vec![("/a", Outcome::Completed)];
        expected.extend(outcome.map(|outcome| ("/b", outcome)));
        expected.push(("/c", Outcome::Completed));
        assert_eq!(net.ended(), expected, "{steps:?}");
        assert_eq!(net.tap.stats().streams.held_bytes, 0, "{steps:?}");
    }
}

#[test]
fn who_speaks_next_shows_what_was_only_not_seen() {
    let mut net = Net::connected();
    net.client(&get("/a"))
        .server(CHUNKED)
        .lose(ToClient, "1\r\na\r\n")
        .server("0\r\n\r\n");
    assert_eq!(net.tap.stats().streams.gap_bytes, 0, "it may still come");
    net.client(&get("/b"));
    assert_eq!(net.tap.stats().streams.gaps(GiveUp::Overtaken), 1);
    net.server(OK);
    // The request was not seen, but that it is answered shows that the server has it.
    net.lose(ToServer, "xx").client(&get("/c")).server(OK);
    assert_eq!(net.tap.stats().streams.gaps(GiveUp::Overtaken), 2);
    let expected = [
        ("/a", Outcome::Incomplete),
        ("/b", Outcome::Completed),
        ("/c", Outcome::Completed),
    ];
    assert_eq!(net.ended(), expected);
    // The answer to an earlier request shows nothing of a later one's bytes.
    net.client(&get("/d"));
    let late = net.next[0];
    net.lose(ToServer, "GET /e HT")
        .client("TP/1.1\r\nHost: a\r\n\r\n")
        .server(OK);
    net.push(ToServer, b"GET /e HT", |segment| segment.sequence = late)
        .server(OK);
    assert_eq!(
        net.ended()[3..],
        [("/d", Outcome::Completed), ("/e", Outcome::Completed)]
    );
}

#[test]
fn time_and_the_caller_end_the_wait_for_lost_records() {
    for is_told in [true, false] {
        let mut net = Net::connected();
        net.client(&get("/a"))
            .server(CHUNKED)
            .lose(ToClient, "1\r\na\r\n")
            .server("0\r\n\r\n");
        let cause = match is_told {
            true => {
                net.tap.records_lost(&mut net.notes);
                GiveUp::Told
            }
            false => {
                net.wait(50);
                GiveUp::TimedOut
            }
        };
        assert_eq!(net.ended(), [("/a", Outcome::Incomplete)]);
        assert_eq!(net.tap.stats().streams.gaps(cause), 1);
        assert!(net.tap.waiting.is_empty());
    }
}

#[test]
fn idle_connections_are_forgotten_and_taken_up_again() {
    let mut net = Net::connected();
    net.client(&get("/a")).server(OK);
    net.port(41_000).connect().client(&get("/b"));
    net.wait(96);
    assert_eq!(net.tap.stats().live, 2);
    net.wait(2);
    assert_eq!(
        net.tap.stats().retired(Retired::Idle),
        1,
        "the other waits for its answer"
    );
    net.wait(500);
    assert_eq!(net.tap.stats().live, 0);
    assert_eq!(
        net.ended(),
        [("/a", Outcome::Completed), ("/b", Outcome::Incomplete)]
    );
    net.client(&get("/c")).server(OK);
    assert_eq!(net.ended()[2..], [("/c", Outcome::Completed)]);
}

#[test]
fn one_too_many_takes_the_place_of_the_most_idle_one() {
    let mut net = Net::new();
    net.connect().client(&get("/waits"));
    for port in 1..=3 {
        net.port(port).connect();
    }
    net.port(1).client(&get("/1")).server(OK);
    net.port(4).connect();
    assert_eq!(
        (net.tap.stats().live, net.tap.stats().retired(Retired::Crowded)),
        (4, 1)
    );
    let of = |net: &Net, port| {
        let client = SocketAddr::from(([10, 0, 0, 1], port));
        net.tap
            .table
            .find(&Peers {
                client,
                server: net.server,
            })
            .is_some()
    };
    assert_eq!(
        [40_000, 1, 2, 3, 4].map(|port| of(&net, port)),
        [true, true, false, true, true]
    );
    // Where all wait for answers, the one goes that has waited for longest.
    for port in [1, 3, 4] {
        net.port(port).client(&get("/x"));
    }
    net.port(5).connect();
    assert_eq!(net.ended().last(), Some(&("/waits", Outcome::Incomplete)));
}

#[test]
fn what_cannot_be_read_is_said_once_for_each_port() {
    let mut net = Net::new();
    let mut bytes = 0;
    for (port, server, hello) in [
        (1, 8_000, "\u{16}\u{3}\u{1}\u{2}"),
        (2, 8_000, "\u{16}\u{3}\u{3}\u{2}"),
        (3, 8_001, "\u{16}\u{3}\u{1}\u{2}"),
        (4, 8_001, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ] {
        net.server.set_port(server);
        net.port(port)
            .connect()
            .client(hello)
            .server(OK)
            .client(&get("/not/read"));
        bytes += (hello.len() + OK.len() + get("/not/read").len()) as u64;
    }
    let said = [
        (8_000, Unreadable::Tls),
        (8_001, Unreadable::Tls),
        (8_001, Unreadable::Http2),
    ];
    assert_eq!(net.notes.unreadable, said);
    let stats = net.tap.stats();
    assert_eq!((stats.unreadable, stats.opaque_bytes, stats.began), (4, bytes, 0));
}

#[test]
fn when_watching_ends_all_end() {
    let mut net = Net::connected();
    net.client(&get("/a")).lose(ToServer, "x").client("y");
    net.port(1).connect().client(&get("/b")).fin(ToServer);
    net.tap.stop(At(net.now), &mut net.notes);
    assert_eq!(
        net.ended(),
        [("/a", Outcome::Incomplete), ("/b", Outcome::Aborted)]
    );
    let stats = net.tap.stats();
    assert_eq!(
        (
            stats.live,
            stats.retired(Retired::Stopped),
            stats.streams.held_bytes
        ),
        (0, 2, 0)
    );
}

#[test]
fn a_thousand_requests_on_one_connection() {
    let mut net = Net::connected();
    for index in 0..1_000 {
        let path = format!("/{index}");
        net.client(&post(&path, &"x".repeat(index % 50))).server(OK);
        assert_eq!(net.ended().last(), Some(&(&path[..], Outcome::Completed)));
    }
    // Asked ahead, in one segment.
    net.client(&(get("/x") + &get("/y") + &get("/z")))
        .server(&OK.repeat(2))
        .server(OK);
    assert_eq!(
        net.ended()[1_000..],
        ["/x", "/y", "/z"].map(|path| (path, Outcome::Completed))
    );
    assert_eq!(net.tap.stats().opaque_bytes, 0);
}

/// What segments are made of.
const WORDS: &[&str] = &[
    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "hello",
    "5\r\nhello\r\n0\r\n\r\n",
    "",
];

proptest! {
    #[test]
    fn whatever_comes_each_exchange_ends_once_and_memory_is_bounded(
        steps in prop::collection::vec(
            (0u16..6, any::<bool>(), prop::sample::select(WORDS), 0u8..30, 0u32..40, 0u64..60),
            0..150,
        ),
    ) {
        let mut net = Net::new();
        net.tap.pool.limits.held_bytes_total = 900;
        for (port, is_client, word, flags, skip, ms) in steps {
            let direction = if is_client { ToServer } else { ToClient };
            net.port(port);
            let late = flags == 4;
            net.push(direction, word.as_bytes(), |segment| {
                segment.syn = flags == 1;
                segment.fin = flags == 2;
                segment.rst = flags == 3;
                segment.sequence = segment.sequence.wrapping_sub(if late { skip } else { 0 });
            });
            if !late {
                net.advance(direction, word.len() + if skip > 30 { skip as usize } else { 0 });
            }
            if ms > 50 {
                net.wait(ms);
            }
            let stats = net.tap.stats();
            prop_assert!(stats.live <= 4 && stats.streams.held_bytes <= 900);
            prop_assert!(net.tap.waiting.len() <= stats.live);
        }
        net.tap.stop(At(net.now), &mut net.notes);
        let stats = net.tap.stats();
        prop_assert_eq!((stats.live, stats.streams.held_bytes, net.tap.waiting.len()), (0, 0, 0));
        prop_assert_eq!(net.notes.began, net.notes.ended.len());
        prop_assert_eq!(stats.opened + stats.joined, stats.retired.iter().sum::<u64>());
    }
}
