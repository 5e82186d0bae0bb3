//! Requests that two readers could understand differently, and what becomes of each.
//!
//! [`SMUGGLED`] stands in the ambiguous place of each: it must reach the upstream only where the bytes really are a request of its own.

/// The request that must not get through.
pub const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\nX-Team-ID: mallory\r\n\r\n";

/// Which configuration a case is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gateway {
    /// The defaults, with short timeouts.
    Plain,
    /// Bodies up to 1 KiB, and no larger ones.
    Small,
    /// As plain, but what cannot be inspected is refused.
    Inspecting,
}

/// How the client ends a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The gateway must close the connection.
    Closed,
    /// The connection must still carry another request.
    Kept,
    /// The client goes away without an answer, and the request is recorded as aborted.
    ClientLeaves,
}

/// Bytes, and what must become of them.
pub struct Case {
    /// What is odd about them.
    pub name: &'static str,
    /// What the client sends.
    pub bytes: Vec<u8>,
    /// To whom.
    pub gateway: Gateway,
    /// The status codes it gets, in order.
    pub statuses: Vec<u16>,
    /// How it ends.
    pub ending: Ending,
    /// The requests that the upstream sees: method and target.
    pub forwarded: Vec<&'static str>,
    /// What the upstream must get, in lower case.
    pub has: &'static str,
    /// What the upstream must not get, in lower case.
    pub lacks: &'static str,
    /// `code` of the last refusal.
    pub code: &'static str,
}

impl Case {
    fn of(name: &'static str, bytes: impl Into<Vec<u8>>) -> Case {
        Case {
            name,
            bytes: bytes.into(),
            gateway: Gateway::Plain,
            statuses: Vec::new(),
            ending: Ending::Closed,
            forwarded: Vec::new(),
            has: "",
            lacks: "",
            code: "",
        }
    }

    fn to(self, gateway: Gateway) -> Case {
        Case { gateway, ..self }
    }

    fn closed(self) -> Case {
        Case {
            ending: Ending::Closed,
            ..self
        }
    }

    fn has(self, has: &'static str) -> Case {
        Case { has, ..self }
    }

    fn lacks(self, lacks: &'static str) -> Case {
        Case { lacks, ..self }
    }

    fn code(self, code: &'static str) -> Case {
        Case { code, ..self }
    }

    fn smuggling(mut self) -> Case {
        self.bytes.extend_from_slice(SMUGGLED.as_bytes());
        self
    }
}

/// Answered by the gateway; then the connection ends, and nothing behind it is a request. [`SMUGGLED`] follows the bytes.
fn refused(name: &'static str, status: u16, bytes: impl Into<Vec<u8>>) -> Case {
    Case {
        statuses: vec![status],
        ..Case::of(name, bytes).smuggling()
    }
}

/// Answered by the gateway; the connection goes on.
fn declined(name: &'static str, status: u16, bytes: impl Into<Vec<u8>>) -> Case {
    Case {
        statuses: vec![status],
        ending: Ending::Kept,
        ..Case::of(name, bytes)
    }
}

/// Answered by the upstream; the connection goes on.
fn served(name: &'static str, forwarded: &[&'static str], bytes: impl Into<Vec<u8>>) -> Case {
    let statuses = vec![200; forwarded.len()];
    Case {
        statuses,
        ending: Ending::Kept,
        forwarded: forwarded.to_vec(),
        ..Case::of(name, bytes)
    }
}

/// The client leaves without an answer.
fn aborted(name: &'static str, bytes: impl Into<Vec<u8>>) -> Case {
    Case {
        ending: Ending::ClientLeaves,
        ..Case::of(name, bytes)
    }
}

const POSTED: &str = "POST /v1/completions";
const LISTED: &str = "GET /v1/models";

fn post(fields: &str, body: &str) -> String {
    format!("POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Team-ID: t\r\n{fields}\r\n{body}")
}

fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked\r\n", body)
}

fn get(fields: &str) -> String {
    format!("GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Team-ID: t\r\n{fields}\r\n")
}

fn line(line: &str) -> String {
    format!("{line}\r\nHost: a\r\nX-Team-ID: t\r\n\r\n")
}

/// All of them.
pub fn all() -> Vec<Case> {
    let groups = [
        lengths(),
        codings(),
        lines(),
        heads(),
        targets(),
        versions(),
        sizes(),
        chunks(),
        bodies(),
        fields(),
        teams(),
    ];
    groups.into_iter().flatten().collect()
}

fn lengths() -> Vec<Case> {
    let with = |name, value: &str| refused(name, 400, post(&format!("Content-Length: {value}\r\n"), "hello"));
    vec![
        refused(
            "two equal lengths",
            400,
            post("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"),
        ),
        refused(
            "two differing lengths",
            400,
            post("Content-Length: 5\r\nContent-Length: 0\r\n", "hello"),
        ),
        with("a list of lengths", "5, 5").code("bad_head"),
        with("a length with a plus", "+5"),
        with("a negative length", "-5"),
        with("a length with a space", "5 5"),
        with("a hexadecimal length", "0x5"),
        with("a length beyond 64 bits", "18446744073709551621"),
        with("an empty length", ""),
        with("a length with a point", "5.0"),
        with("a length in other digits", "٥"),
    ]
}

fn codings() -> Vec<Case> {
    let with = |name, value: &str| {
        refused(
            name,
            400,
            post(&format!("Transfer-Encoding: {value}\r\n"), "0\r\n\r\n"),
        )
        .code("bad_head")
    };
    let payload = format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len());
    let both = ["Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"];
    vec![
        refused("length before coding", 400, post(&both.concat(), "0\r\n\r\n")),
        refused(
            "coding before length",
            400,
            post(&format!("{}{}", both[1], both[0]), "0\r\n\r\n"),
        ),
        refused("the coding twice", 400, post(&both[1].repeat(2), "0\r\n\r\n")),
        with("another coding", "gzip"),
        with("two codings", "gzip, chunked"),
        with("chunked, twice in one field", "chunked, chunked"),
        with("chunked, then identity", "chunked, identity"),
        with("identity", "identity"),
        with("an unknown coding that ends like chunked", "xchunked"),
        with("a coding with a trailing comma", "chunked,"),
        with("a coding in quotes", "\"chunked\""),
        with("an empty coding", ""),
        with("a coding behind a vertical tab", "\x0bchunked"),
        refused(
            "a coding with a space before its colon",
            400,
            post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"),
        ),
        served(
            "a tab before the coding is white space",
            &[POSTED],
            post("Transfer-Encoding:\tchunked\r\n", &payload),
        )
        .has("content-length: 55\r\n")
        .lacks("transfer-encoding"),
        refused(
            "chunked in HTTP/1.0",
            400,
            "POST /v1/completions HTTP/1.0\r\nX-Team-ID: t\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
    ]
}

fn lines() -> Vec<Case> {
    let odd = |name, fields: &str| refused(name, 400, get(fields)).code("bad_head");
    vec![
        odd(
            "a coding folded with a space",
            "Transfer-Encoding:\r\n chunked\r\n",
        ),
        odd(
            "a coding folded with a tab",
            "Transfer-Encoding:\r\n\tchunked\r\n",
        ),
        odd("a team folded", "X-User-ID: a\r\n b\r\n"),
        refused(
            "a folded first field",
            400,
            "GET / HTTP/1.1\r\n Host: a\r\nHost: a\r\nX-Team-ID: t\r\n\r\n",
        ),
        refused("line feeds alone", 400, get("").replace('\r', "")),
        odd("one line feed alone", "A: b\n"),
        refused(
            "a blank line of a line feed alone",
            400,
            get("").replace("\r\n\r\n", "\r\n\n"),
        ),
        refused("a line feed before the request", 400, format!("\n{}", get(""))),
        served(
            "an empty line before the request is skipped",
            &[LISTED],
            format!("\r\n{}", get("")),
        ),
        odd("a carriage return in a value", "A: b\rc\r\n"),
        odd(
            "a carriage return as a line end",
            "A: b\rTransfer-Encoding: chunked\r\n",
        ),
        odd("NUL in a value", "A: b\0c\r\n"),
        odd("NUL in a name", "A\0: b\r\n"),
        odd("a control character in a value", "A: \x01\r\n"),
        odd("a space before the colon", "A : b\r\n"),
        odd("a tab before the colon", "A\t: b\r\n"),
        odd("a space before a name", " A: b\r\n"),
        odd("an empty name", ": b\r\n"),
        odd("a field without a colon", "A\r\n"),
        odd("a name beyond ASCII", "Ä: b\r\n"),
    ]
}

fn heads() -> Vec<Case> {
    vec![
        refused("no host", 400, "GET /v1/models HTTP/1.1\r\nX-Team-ID: t\r\n\r\n").code("bad_head"),
        refused("two hosts", 400, get("Host: b\r\n")).code("bad_head"),
        refused("two equal hosts", 400, get("Host: a\r\n")),
        refused("a method that is no token", 400, line("GE@T /v1/models HTTP/1.1")),
        served(
            "a method in lower case is another method",
            &["get /v1/models"],
            line("get /v1/models HTTP/1.1"),
        ),
        refused(
            "two spaces behind the method",
            400,
            line("GET  /v1/models HTTP/1.1"),
        ),
        refused("a tab behind the method", 400, line("GET\t/v1/models HTTP/1.1")),
        refused("a third word", 505, line("GET /v1/models /x HTTP/1.1")),
        refused("CONNECT to an authority", 405, line("CONNECT vllm:8000 HTTP/1.1")).code("method"),
        refused("CONNECT to a path", 405, line("CONNECT /v1/models HTTP/1.1")).code("method"),
    ]
}

fn targets() -> Vec<Case> {
    let at =
        |name, target: &str| refused(name, 400, line(&format!("GET {target} HTTP/1.1"))).code("bad_head");
    let admin = |target: &'static str| {
        declined(target, 403, line(&format!("POST {target} HTTP/1.1"))).code("admin_route")
    };
    vec![
        refused("the server itself", 400, line("OPTIONS * HTTP/1.1")),
        at("a relative target", "v1/models"),
        at("an authority", "a:80"),
        at("another scheme", "ftp://a/v1/models"),
        at("no authority", "http:///v1/models"),
        at("a query where the path should begin", "http://a?b=/sleep"),
        at("a fragment", "/v1/models#x"),
        at("a target beyond ASCII", "/v1/modèls"),
        at("a control character in the target", "/v1/\x7fmodels"),
        served(
            "an absolute target",
            &[LISTED],
            line("GET http://other:1/v1/models HTTP/1.1"),
        )
        .has("get /v1/models http/1.1\r\nhost: a\r\n"),
        served(
            "an absolute target without a path",
            &["GET /"],
            line("GET HTTP://other HTTP/1.1"),
        ),
        served(
            "a query",
            &["GET /v1/models?a=/sleep"],
            line("GET /v1/models?a=/sleep HTTP/1.1"),
        ),
        admin("/sleep"),
        admin("//sleep"),
        admin("/./sleep"),
        admin("/%2e/sleep"),
        admin("/%73leep"),
        admin("/v1/../sleep"),
        admin("/v1/%2E%2e/sleep"),
        admin("/sleep/"),
        admin("/sleep%2F"),
        admin("/sleep?level=2"),
        admin("http://a/sleep"),
        admin("/v1//load_lora_adapter"),
        admin("/metrics"),
        admin("/metricsX"),
        admin("/metrics/../v1/models"),
    ]
}

fn versions() -> Vec<Case> {
    let tls = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03".to_vec();
    vec![
        refused("HTTP/0.9", 400, "GET /v1/models\r\n\r\n"),
        refused("HTTP/1.2", 505, line("GET /v1/models HTTP/1.2")).code("bad_head"),
        refused("HTTP/2.0", 505, line("GET /v1/models HTTP/2.0")),
        refused("a version in lower case", 505, line("GET /v1/models http/1.1")),
        refused("HTTP/2 with prior knowledge", 505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        refused("TLS", 400, tls),
        served("HTTP/1.0", &[LISTED], "GET /v1/models HTTP/1.0\r\nX-Team-ID: t\r\n\r\n").has("host: localhost").closed(),
        served("HTTP/1.0 asks in vain to stay", &[LISTED], {
            format!("GET /v1/models HTTP/1.0\r\nX-Team-ID: t\r\nConnection: keep-alive\r\n\r\n{SMUGGLED}")
        })
        .closed(),
        served("HTTP/1.0 gets no chunks", &["GET /chunked"], "GET /chunked HTTP/1.0\r\nX-Team-ID: t\r\n\r\n").closed(),
        served("an expectation of HTTP/1.0 is ignored", &[POSTED], {
            "POST /v1/completions HTTP/1.0\r\nX-Team-ID: t\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
        })
        .lacks("expect")
        .closed(),
    ]
}

fn sizes() -> Vec<Case> {
    let many = "A: b\r\n".repeat(99);
    vec![
        refused("101 fields", 431, get(&many)).code("head_too_large"),
        served("100 fields", &[LISTED], get(&many[6..])),
        refused(
            "a head that is too long",
            431,
            get(&format!("A: {}\r\n", "b".repeat(900)).repeat(80)),
        ),
        refused(
            "a value that is too long",
            431,
            get(&format!("A: {}\r\n", "b".repeat(70_000))),
        ),
        refused(
            "a target that is too long",
            431,
            line(&format!("GET /{} HTTP/1.1", "a".repeat(70_000))),
        ),
    ]
}

fn chunks() -> Vec<Case> {
    let bad = |name, body: &str| refused(name, 400, chunked(body)).code("bad_body");
    vec![
        bad("a negative chunk", "-5\r\nhello\r\n0\r\n\r\n"),
        bad(
            "a chunk size beyond 64 bits",
            "10000000000000005\r\nhello\r\n0\r\n\r\n",
        ),
        bad(
            "a chunk size with leading zeros beyond reason",
            "00000000000000005\r\nhello\r\n0\r\n\r\n",
        ),
        refused(
            "a chunk of nearly 64 bits swallows all",
            408,
            chunked("ffffffffffffffff\r\n"),
        )
        .code("slow_request"),
        bad("a space before a chunk size", " 5\r\nhello\r\n0\r\n\r\n"),
        bad("a space behind a chunk size", "5 \r\nhello\r\n0\r\n\r\n"),
        bad("a chunk size with 0x", "0x5\r\nhello\r\n0\r\n\r\n"),
        bad("an empty chunk size", "\r\nhello\r\n0\r\n\r\n"),
        bad("a line feed in a chunk extension", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
        bad("a line feed behind a chunk size", "5\nhello\r\n0\r\n\r\n"),
        bad(
            "a carriage return alone behind a chunk size",
            "5\rhello\r\n0\r\n\r\n",
        ),
        bad("no line end behind a chunk", "5\r\nhello0\r\n\r\n"),
        bad("a line feed behind a chunk", "5\r\nhello\n0\r\n\r\n"),
        bad("a line feed behind a trailer", "0\r\nA: b\n\r\n"),
        bad(
            "an extension without an end",
            &format!("5;{}\r\n", "a".repeat(9_000)),
        ),
        served(
            "a chunk extension stays here",
            &[POSTED],
            chunked("5;a=\"b\"\r\nhello\r\n0\r\n\r\n"),
        )
        .has("\r\n\r\nhello")
        .lacks(";a="),
        served(
            "trailers name neither length nor team",
            &[POSTED],
            chunked("5\r\nhello\r\n0\r\nContent-Length: 0\r\nX-Team-ID: mallory\r\n\r\n"),
        )
        .has("content-length: 5\r\n")
        .lacks("mallory"),
        served("a request as the payload of a chunk", &[POSTED], {
            chunked(&format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len()))
        }),
        aborted("chunks without an end", chunked("5\r\nhello\r\n")),
        aborted("a chunk cut short", chunked("5\r\nhe")),
    ]
}

fn bodies() -> Vec<Case> {
    let small = "Content-Length: 5\r\n";
    let large = "x".repeat(2_000);
    let inspected = "x".repeat(5 << 20);
    let expecting = format!("Expect: 100-continue\r\n{small}");
    let continued = |case: Case| Case {
        statuses: vec![100, 200],
        ..case
    };
    vec![
        aborted("a body cut short", post("Content-Length: 50\r\n", "hello")),
        served("a length hides a request in the body", &[POSTED], {
            post(&format!("Content-Length: {}\r\n", SMUGGLED.len()), SMUGGLED)
        }),
        Case {
            statuses: vec![200, 400],
            ..served(
                "a body longer than its length",
                &[POSTED],
                post(small, "helloGARBAGE\r\n\r\n"),
            )
        }
        .closed(),
        served(
            "two good requests",
            &[POSTED, "GET /smuggled"],
            post(small, "hello"),
        )
        .smuggling(),
        served("an answer for each of three", &[LISTED, POSTED, LISTED], {
            format!("{}{}{}", get(""), post(small, "hello"), get(""))
        }),
        Case {
            statuses: vec![200, 400],
            ..served(
                "a good request and a bad one",
                &[LISTED],
                get("") + "GET / HTTP/1.1\r\n\r\n",
            )
        }
        .closed()
        .smuggling(),
        served(
            "close means that nothing follows",
            &[LISTED],
            get("Connection: close\r\n"),
        )
        .closed()
        .smuggling(),
        served("GET with a body", &[LISTED], get(small) + "hello").has("\r\n\r\nhello"),
        continued(served("an expected 100", &[POSTED], post(&expecting, "hello")).lacks("expect:")),
        continued(served("an expected 100, chunked", &[POSTED], {
            post(
                "EXPECT: 100-Continue\r\nTransfer-Encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\n\r\n",
            )
        })),
        refused(
            "another expectation",
            417,
            post(&format!("Expect: 200-ok\r\n{small}"), "hello"),
        )
        .code("expectation"),
        refused("a body above the limit by its length", 413, {
            post(&format!("Content-Length: {}\r\n", large.len()), &large)
        })
        .to(Gateway::Small)
        .code("body_too_large"),
        refused(
            "a body above the limit by its chunks",
            413,
            chunked(&format!("7d0\r\n{large}\r\n0\r\n\r\n")),
        )
        .to(Gateway::Small)
        .code("body_too_large"),
        refused("a body that cannot be inspected", 413, {
            post(&format!("Content-Length: {}\r\n", inspected.len()), "")
        })
        .to(Gateway::Inspecting)
        .code("uninspectable"),
        refused(
            "chunks that cannot be inspected",
            413,
            chunked(&format!("{:x}\r\n{inspected}\r\n", inspected.len())),
        )
        .to(Gateway::Inspecting)
        .code("uninspectable"),
        refused(
            "a compressed body",
            413,
            post(&format!("Content-Encoding: gzip\r\n{small}"), "hello"),
        )
        .to(Gateway::Inspecting)
        .code("uninspectable"),
        served(
            "a compressed body elsewhere",
            &[POSTED],
            post(&format!("Content-Encoding: gzip\r\n{small}"), "hello"),
        )
        .has("content-encoding: gzip"),
    ]
}

fn fields() -> Vec<Case> {
    let named = |name, field: &str| {
        let fields = format!("Connection: {field}\r\nContent-Length: {}\r\n", SMUGGLED.len());
        served(name, &[POSTED], post(&fields, SMUGGLED)).has("content-length: 55\r\n")
    };
    vec![
        named("a connection that names the length", "Content-Length"),
        named("a connection that names the coding", "transfer-encoding"),
        named("a connection that names the team", "X-Team-ID"),
        named("a connection that names the host", "Host").has("\r\nhost: a\r\n"),
        served(
            "a connection that names another field",
            &[LISTED],
            get("Connection: X-Odd\r\nX-Odd: 1\r\n"),
        )
        .lacks("x-odd"),
        served(
            "a forged gateway id",
            &[LISTED],
            get("X-Gateway-Request-Id: forged\r\n"),
        )
        .lacks("forged"),
        served(
            "a request id with spaces",
            &[LISTED],
            get("X-Request-Id: o d d\r\n"),
        )
        .lacks("o d d"),
        served(
            "a request id that is too long",
            &[LISTED],
            get(&format!("X-Request-Id: {}\r\n", "r".repeat(129))),
        )
        .lacks("rrr"),
        served("a good request id", &[LISTED], get("X-Request-Id: r-1\r\n")).has("\r\nx-request-id: r-1\r\n"),
        served(
            "a place in the queue of one's own",
            &[LISTED],
            get("X-Vllm-Priority: -9\r\n"),
        )
        .lacks("priority"),
        served(
            "an upgrade to HTTP/2",
            &[LISTED],
            get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"),
        )
        .lacks("upgrade"),
        served("an upgrade with a body", &[POSTED], {
            post(
                "Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n",
                "{}",
            )
        })
        .lacks("upgrade"),
        served("a websocket that the server does not want", &[LISTED], {
            get("Connection: Upgrade\r\nUpgrade: websocket\r\n")
        })
        .has("connection: upgrade"),
    ]
}

fn teams() -> Vec<Case> {
    let team = |fields: &str| format!("GET /v1/models HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    let bad = |name, fields: &str| declined(name, 400, team(fields)).code("bad_identity");
    vec![
        bad("no team", ""),
        bad("an empty team", "X-Team-ID:\r\n"),
        bad("a team of spaces", "X-Team-ID:  \t \r\n"),
        bad("one team twice", "X-Team-ID: t\r\nX-Team-ID: t\r\n"),
        bad("two teams", "X-Team-ID: t\r\nx-team-id: u\r\n"),
        bad(
            "a team that is too long",
            &format!("X-Team-ID: {}\r\n", "t".repeat(129)),
        ),
        bad("a team with a space", "X-Team-ID: t u\r\n"),
        bad("two teams in a list", "X-Team-ID: t, u\r\n"),
        bad("a team beyond ASCII", "X-Team-ID: tëam\r\n"),
        bad("a team of the gateway's own", "X-Team-ID: __idle__\r\n"),
        bad("a project with a space", "X-Team-ID: t\r\nX-Project: p q\r\n"),
        bad("two projects", "X-Team-ID: t\r\nX-Project: p\r\nX-Project: p\r\n"),
        refused(
            "a team with a control character",
            400,
            team("X-Team-ID: t\x07\r\n"),
        )
        .code("bad_head"),
        refused("no team, and a body", 400, {
            format!(
                "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
                SMUGGLED.len()
            )
        })
        .code("bad_identity"),
        Case {
            statuses: vec![400, 200],
            forwarded: vec!["GET /smuggled"],
            ..bad("no team, then another request", "")
        }
        .smuggling(),
        refused("no team for Messages, and a body", 400, {
            "POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
        }),
        declined(
            "no team for Messages",
            400,
            "POST /v1/messages HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        declined(
            "no team, and no body wanted",
            400,
            "HEAD /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
    ]
}
