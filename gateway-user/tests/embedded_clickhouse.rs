//! The embedded ClickHouse, as its clients see it: the real process, the real engine, the Rust client and plain HTTP.
//!
//! These tests need libchdb, which `cargo xtask test` fetches; without it they fail and say so.

mod support;

use bytes::Bytes;
use clickhouse::{Client, Row};
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, StatusCode};
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{DEADLINE, eventually};
use vllm_gateway::config::Secret;
use vllm_gateway::store::embedded::{EmbeddedOptions, EmbeddedServer, find_library};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vllm-gateway");

/// A table whose inserts are deduplicated by token.
const TABLE: &str = "CREATE TABLE t (k UInt32, s String) ENGINE = MergeTree ORDER BY k \
                     SETTINGS non_replicated_deduplication_window = 100";

fn variable(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name)
}

/// A directory that is removed with this.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("embedded-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The process, ended with this.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start(data_dir: &Path) -> Server {
        Server::start_with(data_dir, &[])
    }

    fn start_with(data_dir: &Path, environment: &[(&str, &str)]) -> Server {
        let library = find_library(None, &variable).unwrap_or_else(|error| panic!("{error}"));
        let mut command = Command::new(PROGRAM);
        command
            .args([
                "embedded-clickhouse",
                "--listen",
                "127.0.0.1:0",
                "--exit-with-stdin",
                "--data-dir",
            ])
            .arg(data_dir);
        command
            .arg("--library")
            .arg(library)
            .envs(environment.iter().copied());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe"))
            .read_line(&mut line)
            .expect("a first line");
        let address = line
            .trim()
            .strip_prefix("listening on http://")
            .and_then(|address| address.parse().ok());
        let address =
            address.unwrap_or_else(|| panic!("expected `listening on http://ADDRESS`, got {line:?}"));
        Server { child, address }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn client(&self) -> Client {
        Client::default().with_url(self.url())
    }

    async fn post(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        self.request(Request::post(format!("{}{path}", self.url())), body)
            .await
    }

    async fn request(&self, builder: hyper::http::request::Builder, body: impl Into<Bytes>) -> Answer {
        let client: legacy::Client<HttpConnector, Full<Bytes>> =
            legacy::Client::builder(TokioExecutor::new()).build_http();
        let response = client
            .request(builder.body(Full::new(body.into())).expect("a request"))
            .await
            .expect("an answer");
        let (head, mut body) = response.into_parts();
        let (mut bytes, mut whole) = (Vec::new(), true);
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => bytes.extend(frame.into_data().unwrap_or_default()),
                Err(_) => whole = false,
            }
        }
        Answer {
            status: head.status,
            headers: head.headers,
            text: String::from_utf8_lossy(&bytes).into_owned(),
            whole,
        }
    }

    /// The result of a query that must succeed.
    async fn ask(&self, sql: &str) -> String {
        let answer = self.post("/", sql.to_owned()).await;
        assert_eq!(answer.status, StatusCode::OK, "{sql}: {}", answer.text);
        answer.text.trim_end().to_owned()
    }

    /// Memory of the process, as the kernel counts it.
    fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("Linux");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("a line");
        line.split_whitespace()
            .nth(1)
            .and_then(|number| number.parse::<u64>().ok())
            .expect("a number")
            * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
    /// The body came to its proper end.
    whole: bool,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }
}

#[derive(Debug, Clone, PartialEq, Row, Serialize, Deserialize)]
struct Pair {
    k: u32,
    s: String,
}

fn pair(k: u32, s: &str) -> Pair {
    Pair { k, s: s.to_owned() }
}

#[tokio::test]
async fn plain_http_speaks_as_clickhouse_does() {
    let directory = Directory::new("http");
    let server = Server::start(&directory.0);
    let get = |path: &str| Request::get(format!("{}{path}", server.url()));

    let ping = server.request(get("/ping"), "").await;
    assert_eq!((ping.status, ping.text.as_str()), (StatusCode::OK, "Ok.\n"));

    let answer = server
        .request(
            get("/?query=SELECT%201,'a'&query_id=mine&default_format=JSONEachRow"),
            "",
        )
        .await;
    assert_eq!(answer.text, "{\"1\":1,\"'a'\":\"a\"}\n");
    assert_eq!(answer.header("x-clickhouse-query-id"), "mine");
    assert_eq!(answer.header("x-clickhouse-format"), "JSONEachRow");
    assert!(!answer.header("x-clickhouse-server-display-name").is_empty());
    assert!(!answer.header("x-clickhouse-timezone").is_empty());

    // Statements of every kind, also those that the engine does not stream.
    assert_eq!(server.ask("CREATE DATABASE d").await, "");
    assert_eq!(server.ask("SHOW DATABASES LIKE 'd'").await, "d");
    assert_eq!(
        server
            .post("/?database=d", "SELECT currentDatabase() FORMAT CSV")
            .await
            .text,
        "\"d\"\n"
    );
    assert_eq!(
        server
            .post("/?max_threads=3", "SELECT getSetting('max_threads')")
            .await
            .text,
        "3\n"
    );
    assert_eq!(
        server.ask("SELECT getSetting('max_threads') = 3").await,
        "0",
        "a setting outlived its request"
    );
    assert_eq!(
        server
            .post(
                "/?param_x=it's%5Cta&param_y=%5B1,2%5D",
                "SELECT {x:String}, {y:Array(UInt8)}"
            )
            .await
            .text,
        "it\\'s\\ta\t[1,2]\n"
    );

    // A GET changes nothing.
    let answer = server
        .request(get("/?query=CREATE%20TABLE%20x%20(a%20UInt8)%20ENGINE=Log"), "")
        .await;
    assert_eq!(
        answer.header("x-clickhouse-exception-code"),
        "164",
        "{}",
        answer.text
    );
    assert_eq!(server.ask("EXISTS x").await, "0");
}

#[tokio::test]
async fn errors_have_code_status_and_text() {
    let directory = Directory::new("errors");
    let server = Server::start(&directory.0);
    server.ask(TABLE).await;
    let cases = [
        ("/", "SELEKT 1", 400, "62", "SYNTAX_ERROR"),
        ("/", "", 400, "62", "Empty query"),
        ("/", "SELECT * FROM nope", 404, "60", "UNKNOWN_TABLE"),
        ("/?database=nope", "SELECT 1", 404, "81", "UNKNOWN_DATABASE"),
        ("/?nope=1", "SELECT 1", 404, "115", "UNKNOWN_SETTING"),
        ("/", "SELECT 1 FORMAT Nope", 404, "73", "UNKNOWN_FORMAT"),
        ("/", "INSERT INTO t FORMAT Nope\n1", 404, "73", "UNKNOWN_FORMAT"),
        (
            "/",
            "INSERT INTO t FORMAT JSONEachRow\nnot json",
            400,
            "27",
            "CANNOT_PARSE_INPUT_ASSERTION_FAILED",
        ),
        ("/?session_id=x", "SELECT 1", 501, "48", "NOT_IMPLEMENTED"),
        (
            "/?client_protocol_version=54485&default_format=Native",
            "SELECT 1",
            501,
            "48",
            "default_format",
        ),
        (
            "/?max_execution_time=0.2",
            "SELECT sleepEachRow(0.1) FROM numbers(30) SETTINGS max_block_size = 1 FORMAT Null",
            408,
            "159",
            "TIMEOUT",
        ),
    ];
    for (path, sql, status, code, text) in cases {
        let answer = server.post(path, sql).await;
        assert_eq!(answer.status.as_u16(), status, "{path} {sql}: {}", answer.text);
        assert_eq!(
            answer.header("x-clickhouse-exception-code"),
            code,
            "{path} {sql}: {}",
            answer.text
        );
        assert!(
            answer.text.starts_with(&format!("Code: {code}. DB::Exception: ")),
            "{}",
            answer.text
        );
        assert!(
            answer.text.contains(text) || text == "default_format",
            "{path} {sql}: {}",
            answer.text
        );
    }
    assert_eq!(
        server.ask("SELECT count() FROM t").await,
        "0",
        "a refused insert left rows"
    );
    assert_eq!(server.post("/nowhere", "").await.status, StatusCode::NOT_FOUND);
    // Half a result must not pass for a whole one, whether the client knows the exception block or not.
    let failing = "SELECT throwIf(number = 300000) FROM numbers(1000000)";
    let answer = server.post("/", failing).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(!answer.whole, "the body came to a proper end");
    let tag = answer.header("x-clickhouse-exception-tag");
    assert!(
        answer.text.contains("Code: 395.") && answer.text.ends_with(&format!(" {tag}\r\n__exception__\r\n"))
    );
    let answer = server.post("/?wait_end_of_query=1", failing).await;
    assert_eq!(
        (answer.status, answer.header("x-clickhouse-exception-code")),
        (StatusCode::INTERNAL_SERVER_ERROR, "395")
    );
    let error = server
        .client()
        .query(failing)
        .fetch_all::<u8>()
        .await
        .expect_err("it fails")
        .to_string();
    assert!(error.contains("395"), "{error}");
}

#[tokio::test]
async fn inserts_of_every_shape_arrive_whole() {
    let directory = Directory::new("inserts");
    let server = Server::start(&directory.0);
    server.ask(TABLE).await;
    let rows = "{\"k\":1,\"s\":\"a\"}\n\n\n{\"k\":2,\"s\":\"b\\n\\nc\"}\n";
    let answer = server
        .post("/?query=INSERT%20INTO%20t%20FORMAT%20JSONEachRow", rows)
        .await;
    assert!(
        answer
            .header("x-clickhouse-summary")
            .contains("\"written_rows\":\"2\""),
        "{}",
        answer.header("x-clickhouse-summary")
    );
    server
        .ask(&format!(
            "INSERT INTO t FORMAT JSONEachRow\n{}",
            rows.replace(":1", ":3").replace(":2", ":4")
        ))
        .await;
    server
        .ask("INSERT INTO t (s, k) SETTINGS max_threads = 1 VALUES ('x\n\ny', 5),\n\n('FORMAT CSV', 6);")
        .await;
    // Binary data with blank lines in lengths and strings.
    let mut binary = Vec::new();
    for _ in 0..3 {
        binary.extend([10, 10, 0, 0, 2, b'\n', b'\n']);
    }
    server
        .post("/?query=INSERT%20INTO%20t%20FORMAT%20RowBinary", binary)
        .await;
    server
        .ask("INSERT INTO t SELECT number + 100, 'q\n\nr' FROM numbers(2)")
        .await;
    assert_eq!(
        server
            .post("/?query=INSERT%20INTO%20t%20FORMAT%20CSV", "")
            .await
            .status,
        StatusCode::OK
    );
    let read = server
        .client()
        .query("SELECT ?fields FROM t ORDER BY k, s")
        .fetch_all::<Pair>()
        .await
        .expect("rows");
    let expected = [
        pair(1, "a"),
        pair(2, "b\n\nc"),
        pair(3, "a"),
        pair(4, "b\n\nc"),
        pair(5, "x\n\ny"),
        pair(6, "FORMAT CSV"),
        pair(2570, "\n\n"),
        pair(2570, "\n\n"),
        pair(2570, "\n\n"),
    ];
    let (with_select, others): (Vec<_>, Vec<_>) = read.into_iter().partition(|row| row.s == "q\n\nr");
    assert_eq!(others, expected);
    assert_eq!(with_select.len(), 2);
    let left = std::fs::read_dir(directory.0.join("uploads"))
        .expect("a directory")
        .count();
    assert_eq!(left, 0, "files of inserts are left");
}

#[tokio::test]
async fn the_rust_client_inserts_and_reads_with_and_without_compression() {
    let directory = Directory::new("client");
    let server = Server::start(&directory.0);
    server.client().query(TABLE).execute().await.expect("a table");
    for (compression, start) in [
        (clickhouse::Compression::default(), 0),
        (clickhouse::Compression::None, 1000),
    ] {
        let client = server.client().with_compression(compression);
        let mut insert = client.insert::<Pair>("t").await.expect("an insert");
        for k in start..start + 500 {
            insert.write(&pair(k, &"text ".repeat(100))).await.expect("a row");
        }
        insert.end().await.expect("the rows are stored");
        let json: String = (start + 500..start + 700)
            .map(|k| format!("{{\"k\":{k},\"s\":\"json\"}}\n"))
            .collect();
        let mut insert = client
            .insert_formatted_with("INSERT INTO t FORMAT JSONEachRow")
            .buffered();
        insert.write_buffered(json.as_bytes());
        insert.end().await.expect("the rows are stored");
        let rows = client
            .query("SELECT ?fields FROM t WHERE k >= ? AND k < {end:UInt32} ORDER BY k")
            .bind(start)
            .param("end", start + 700)
            .fetch_all::<Pair>()
            .await
            .expect("rows");
        assert_eq!(rows.len(), 700);
        assert_eq!(
            (&rows[0], &rows[699]),
            (&pair(start, &"text ".repeat(100)), &pair(start + 699, "json"))
        );
    }
    let text = "it's \\ a \t \"test\"\n\n%41 é";
    let echoed: String = server
        .client()
        .query("SELECT {x:String}")
        .param("x", text)
        .fetch_one()
        .await
        .expect("a row");
    assert_eq!(echoed, text);
    // What ClickHouse's own clients ask for with `compress=1`.
    let answer = server.post("/?compress=1", "SELECT repeat('a', 100000)").await;
    assert!(
        answer.text.len() < 2000,
        "{} bytes are not compressed",
        answer.text.len()
    );
}

#[tokio::test]
async fn a_batch_that_is_sent_twice_counts_once_in_table_and_rollup() {
    let directory = Directory::new("dedup");
    let server = Server::start(&directory.0);
    server.ask(TABLE).await;
    server
        .ask(
            "CREATE TABLE rollup (s String, n UInt64) ENGINE = SummingMergeTree ORDER BY s \
             SETTINGS non_replicated_deduplication_window = 100",
        )
        .await;
    server
        .ask("CREATE MATERIALIZED VIEW to_rollup TO rollup AS SELECT s, count() AS n FROM t GROUP BY s")
        .await;
    let client = server
        .client()
        .with_setting("deduplicate_blocks_in_dependent_materialized_views", "1");
    for (token, total) in [("gateway/1/1", "2"), ("gateway/1/1", "2"), ("gateway/1/2", "4")] {
        let mut insert = client
            .insert_formatted_with("INSERT INTO t FORMAT JSONEachRow")
            .with_setting("insert_deduplication_token", token)
            .with_setting("async_insert", "0")
            .buffered();
        insert.write_buffered(b"{\"k\":1,\"s\":\"a\"}\n{\"k\":2,\"s\":\"b\"}\n");
        insert.end().await.expect("the rows are stored");
        assert_eq!(server.ask("SELECT count() FROM t").await, total);
        assert_eq!(server.ask("SELECT sum(n) FROM rollup").await, total);
    }
}

#[tokio::test]
async fn a_killed_process_has_lost_nothing_that_it_acknowledged() {
    let directory = Directory::new("kill");
    let mut server = Server::start(&directory.0);
    server.ask(TABLE).await;
    // Inserts run when the kill comes; some are acknowledged, some are not.
    let client = server.client();
    let (sender, mut acknowledged) = tokio::sync::mpsc::unbounded_channel();
    let inserting = tokio::spawn(async move {
        for k in 0u32.. {
            let mut insert = client
                .insert_formatted_with("INSERT INTO t FORMAT JSONEachRow")
                .buffered();
            insert.write_buffered(format!("{{\"k\":{k},\"s\":\"a\"}}\n").as_bytes());
            if insert.end().await.is_err() || sender.send(k).is_err() {
                return;
            }
        }
    });
    for _ in 0..20 {
        tokio::time::timeout(DEADLINE, acknowledged.recv())
            .await
            .expect("inserts go on")
            .expect("inserts succeed");
    }
    server.child.kill().expect("it runs");
    server.child.wait().expect("it has ended");
    tokio::time::timeout(DEADLINE, inserting)
        .await
        .expect("the client notices")
        .expect("no panic");
    let mut last = 19;
    while let Ok(k) = acknowledged.try_recv() {
        last = k;
    }
    let server = Server::start(&directory.0);
    let there = server
        .ask(&format!("SELECT count() FROM t WHERE k <= {last}"))
        .await;
    assert_eq!(there, (last + 1).to_string());
}

#[tokio::test]
async fn a_body_that_breaks_off_inserts_nothing() {
    use tokio::io::AsyncWriteExt;
    let directory = Directory::new("broken");
    let server = Server::start(&directory.0);
    server.ask(TABLE).await;
    let mut stream = tokio::net::TcpStream::connect(server.address)
        .await
        .expect("a connection");
    let head = "POST /?query=INSERT+INTO+t+FORMAT+JSONEachRow HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n";
    let rows = "{\"k\":1,\"s\":\"a\"}\n".repeat(30_000);
    stream
        .write_all(format!("{head}{rows}").as_bytes())
        .await
        .expect("it is taken");
    let uploads = directory.0.join("uploads");
    let count = || std::fs::read_dir(&uploads).expect("a directory").count();
    eventually("the body to be written", async || (count() == 1).then_some(())).await;
    drop(stream);
    eventually("the broken body to be removed", async || {
        (count() == 0).then_some(())
    })
    .await;
    assert_eq!(server.ask("SELECT count() FROM t").await, "0");
}

#[tokio::test]
async fn many_queries_run_side_by_side_and_inserts_wait_for_none() {
    let directory = Directory::new("many");
    let server = Server::start(&directory.0);
    server.ask(TABLE).await;
    // More slow reads than there are places: inserts must have places of their own.
    let slow = "SELECT sum(sleepEachRow(0.5)) FROM numbers(12) SETTINGS max_block_size = 1";
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let client = server.client();
        reads.spawn(async move { client.query(slow).fetch_one::<u64>().await });
    }
    eventually("slow queries to run", async || {
        let row = "{\"k\":1,\"s\":\"a\"}\n";
        let answer = server
            .post("/?query=INSERT%20INTO%20t%20FORMAT%20JSONEachRow", row)
            .await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        (!reads.is_empty()).then_some(())
    })
    .await;
    let started = Instant::now();
    for k in 0..10 {
        server.ask(&format!("INSERT INTO t VALUES ({k}, 'x')")).await;
    }
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "ten inserts took {:?} beside reads",
        started.elapsed()
    );
    assert!(
        reads.try_join_next().is_none(),
        "the reads were over, and nothing was shown"
    );
    reads.shutdown().await;
    let mut queries = tokio::task::JoinSet::new();
    for n in 0..50u64 {
        let client = server.client();
        queries.spawn(async move {
            let sum: u64 = client
                .query("SELECT sum(number) + ? FROM numbers(1000)")
                .bind(n)
                .fetch_one()
                .await?;
            Ok::<_, clickhouse::error::Error>((n, sum))
        });
    }
    for result in queries.join_all().await {
        let (n, sum) = result.expect("a result");
        assert_eq!(sum, 499_500 + n);
    }
}

#[tokio::test]
async fn a_big_result_streams_and_its_reader_may_leave() {
    let directory = Directory::new("big");
    let server = Server::start(&directory.0);
    // A late first row: the stream must not take empty blocks for its end.
    assert_eq!(
        server
            .ask("SELECT number FROM numbers(20000000) WHERE number = 19999999")
            .await,
        "19999999"
    );
    let before = server.resident_bytes();
    let answer = server
        .post(
            "/?default_format=RowBinary",
            "SELECT number FROM numbers(40000000)",
        )
        .await;
    assert!(answer.whole);
    let growth = server.resident_bytes().saturating_sub(before);
    assert!(
        growth < 150 << 20,
        "320 MB of result grew the process by {growth} bytes"
    );
    // A reader that leaves stops its query.
    let mut cursor = server
        .client()
        .query("SELECT number FROM numbers(100000000000)")
        .fetch::<u64>()
        .expect("a query");
    assert_eq!(cursor.next().await.expect("a row"), Some(0));
    drop(cursor);
    eventually("the query to stop", async || {
        (server.ask("SELECT count() FROM system.processes WHERE query LIKE '%100000000000)%' AND query NOT LIKE '%processes%'").await == "0")
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn only_the_user_with_the_password_is_answered() {
    let directory = Directory::new("auth");
    let server = Server::start_with(
        &directory.0,
        &[
            ("CLICKHOUSE_USERNAME", "gateway"),
            ("CLICKHOUSE_PASSWORD", "hunter2"),
        ],
    );
    let refused = server.post("/", "SELECT 1").await;
    assert_eq!(
        (refused.status, refused.header("x-clickhouse-exception-code")),
        (StatusCode::FORBIDDEN, "516")
    );
    assert_eq!(
        server
            .post("/?user=gateway&password=wrong", "SELECT 1")
            .await
            .status,
        StatusCode::FORBIDDEN
    );
    assert_eq!(
        server
            .post("/?user=gateway&password=hunter2", "SELECT 1")
            .await
            .text,
        "1\n"
    );
    let basic = Request::post(server.url()).header("authorization", "Basic Z2F0ZXdheTpodW50ZXIy");
    assert_eq!(server.request(basic, "SELECT 1").await.text, "1\n");
    let client = server.client().with_user("gateway").with_password("hunter2");
    assert_eq!(
        client.query("SELECT 7").fetch_one::<u8>().await.expect("a row"),
        7
    );
    assert_eq!(
        server
            .request(Request::get(format!("{}/ping", server.url())), "")
            .await
            .text,
        "Ok.\n"
    );
    // No part of the process shows the password to other users of the machine.
    let shown = std::fs::read(format!("/proc/{}/cmdline", server.child.id())).expect("Linux");
    assert!(!String::from_utf8_lossy(&shown).contains("hunter2"));
}

#[tokio::test]
async fn a_second_process_is_told_who_has_the_data_and_the_first_ends_with_its_parent() {
    let directory = Directory::new("lock");
    let mut server = Server::start(&directory.0);
    let mut second = Command::new(PROGRAM);
    second
        .args(["embedded-clickhouse", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(&directory.0);
    let output = second.stdin(Stdio::null()).output().expect("it runs");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && message.contains(&format!("in use by process {}", server.child.id())),
        "{message}"
    );
    drop(server.child.stdin.take());
    let status = eventually("the process to end", async || {
        server.child.try_wait().expect("a child")
    })
    .await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn the_gateway_keeps_it_alive_on_one_address_and_ends_it() {
    let directory = Directory::new("supervised");
    let options = EmbeddedOptions {
        program: PROGRAM.into(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        data_dir: directory.0.clone(),
        libchdb: None,
        user: Some("gateway".into()),
        password: Some(Secret::new("hunter2")),
    };
    let server = EmbeddedServer::spawn(options.clone(), &variable).unwrap_or_else(|error| panic!("{error}"));
    let address = server.ready(DEADLINE).await.expect("it comes up");
    let client = Client::default()
        .with_url(format!("http://{address}"))
        .with_user("gateway")
        .with_password("hunter2");
    client.query(TABLE).execute().await.expect("a table");
    let first = server.state().borrow().process.expect("it runs");
    let killed = Command::new("kill")
        .args(["-9", &first.to_string()])
        .status()
        .expect("a kill");
    assert!(killed.success());
    let mut state = server.state();
    let again = state
        .wait_for(|state| state.address.is_some() && state.process.is_some_and(|process| process != first));
    let again = *tokio::time::timeout(DEADLINE, again)
        .await
        .expect("it is started again")
        .expect("it is watched");
    assert_eq!((again.address, again.restarts), (Some(address), 1));
    assert_eq!(
        client
            .query("SELECT count() FROM t")
            .fetch_one::<u64>()
            .await
            .expect("the table is there"),
        0
    );
    server.stop().await;
    let process = again.process.expect("it ran");
    assert!(
        !Path::new(&format!("/proc/{process}")).exists(),
        "process {process} is still there"
    );
    let missing = EmbeddedOptions {
        libchdb: Some("/no/such/library".into()),
        ..options
    };
    let error = EmbeddedServer::spawn(missing, &variable)
        .expect_err("there is nothing to run")
        .to_string();
    assert!(error.contains("/no/such/library"), "{error}");
}
