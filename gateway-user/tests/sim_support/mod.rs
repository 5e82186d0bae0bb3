//! Starts the simulator, talks raw HTTP to it, and reduces answers to their structure.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Far beyond what any answer takes, so that a hang fails instead of hanging.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// A running simulator, killed when it goes out of scope.
pub struct Sim {
    child: Child,
    pub addr: String,
}

impl Sim {
    pub fn start(args: &[&str]) -> Sim {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vllm-sim"))
            .args(["--listen", "127.0.0.1:0"])
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the simulator starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("the first line is text");
        let addr = line
            .trim()
            .strip_prefix("listening on http://")
            .expect("the first line names the address");
        Sim {
            addr: addr.to_owned(),
            child,
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.addr).expect("the simulator accepts");
        stream
            .set_read_timeout(Some(DEADLINE))
            .expect("a timeout can be set");
        stream
    }

    /// Sends raw bytes on a connection of their own and reads one answer.
    pub fn send(&self, request: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request).expect("the request is taken");
        read_answer(&mut stream)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: sim\r\n\r\n").as_bytes())
    }

    pub fn post(&self, path: &str, headers: &str, body: &str) -> Answer {
        self.send(&post(path, headers, body))
    }

    /// Every sample of `/metrics`, by series.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let page = self.get("/metrics").body;
        page.lines()
            .filter(|line| line.starts_with("vllm:") && !line.contains("_created{"))
            .map(|line| line.rsplit_once(' ').expect("a sample has a value"))
            .map(|(series, value)| (series.to_owned(), value.parse().expect("a value is a number")))
            .collect()
    }

    /// One sample without labels beyond the model.
    pub fn metric(&self, family: &str) -> f64 {
        self.metrics()
            .iter()
            .filter(|(series, _)| series.starts_with(&format!("{family}{{")))
            .map(|(_, v)| v)
            .sum()
    }

    /// Waits until nothing runs or waits.
    pub fn wait_idle(&self) {
        let deadline = Instant::now() + DEADLINE;
        while self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") > 0.0 {
            assert!(Instant::now() < deadline, "the engine never became idle");
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn wait_exit(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "the simulator never ended");
            std::thread::yield_now();
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // Either may fail only because it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn post(path: &str, headers: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nHost: sim\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A response taken apart.
#[derive(Debug)]
pub struct Answer {
    pub status: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
    /// The chunks of a chunked body.
    pub chunks: Vec<String>,
    /// Whether the body came to its proper end.
    pub complete: bool,
}

impl Answer {
    pub fn header_names(&self) -> Vec<&str> {
        self.headers.iter().map(|(name, _)| name.as_str()).collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(header, _)| header == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).expect("the body is JSON")
    }

    /// The `data:` of every event, as JSON; `[DONE]` left out.
    pub fn events(&self) -> Vec<serde_json::Value> {
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).expect("an event is JSON"))
            .collect()
    }
}

/// Reads one answer; what is missing at the connection's end shows in `complete`.
pub fn read_answer(stream: &mut TcpStream) -> Answer {
    read_pipelined(stream, &mut Vec::new())
}

/// Reads one answer of several; `bytes` keeps what came of the next one.
pub fn read_pipelined(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Answer {
    loop {
        if let Some((answer, length)) = parse_answer(bytes)
            && answer.complete
        {
            bytes.drain(..length);
            return answer;
        }
        let mut buffer = [0; 65536];
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(error) => panic!("no complete answer: {error}\n{}", String::from_utf8_lossy(bytes)),
        }
    }
    parse_answer(bytes).expect("an answer has a head").0
}

/// Takes the first answer off `bytes`; the second part is how long it was.
pub fn parse_answer(bytes: &[u8]) -> Option<(Answer, usize)> {
    let head_end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..head_end - 4]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next()?.to_owned();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .collect();
    let mut answer = Answer {
        status,
        headers,
        body: String::new(),
        chunks: Vec::new(),
        complete: false,
    };
    let rest = &bytes[head_end..];
    let used = match answer
        .header("content-length")
        .map(|length| length.parse::<usize>().expect("a length"))
    {
        Some(length) => {
            answer.complete = rest.len() >= length;
            let body = &rest[..length.min(rest.len())];
            answer.body = String::from_utf8_lossy(body).into_owned();
            body.len()
        }
        None => read_chunks(rest, &mut answer),
    };
    Some((answer, head_end + used))
}

fn read_chunks(mut rest: &[u8], answer: &mut Answer) -> usize {
    let all = rest.len();
    while let Some(line_end) = rest.windows(2).position(|window| window == b"\r\n") {
        let size = std::str::from_utf8(&rest[..line_end]).expect("a chunk size is text");
        let size = usize::from_str_radix(size, 16).expect("a chunk size is hexadecimal");
        let end = line_end + 2 + size;
        if rest.len() < end + 2 {
            break;
        }
        let chunk = String::from_utf8_lossy(&rest[line_end + 2..end]).into_owned();
        rest = &rest[end + 2..];
        if size == 0 {
            answer.complete = true;
            break;
        }
        answer.body.push_str(&chunk);
        answer.chunks.push(chunk);
    }
    all - rest.len()
}

/// JSON reduced to member names in order and kinds of values; equal elements of an array are named once.
pub fn structure(json: &str) -> String {
    let mut input = json.trim();
    let out = value(&mut input);
    assert!(input.trim().is_empty(), "something follows the JSON: {input}");
    out
}

fn value(input: &mut &str) -> String {
    match input.chars().next().expect("a value") {
        '{' => {
            let members = items(input, '}', |input| {
                let name = string(input);
                *input = input.strip_prefix(':').expect("a colon").trim_start();
                let kind = value(input);
                // A token may have no bytes of its own, which says nothing about the structure.
                if name == "bytes" {
                    "bytes:[n]".to_owned()
                } else {
                    format!("{name}:{kind}")
                }
            });
            format!("{{{}}}", members.join(","))
        }
        '[' => {
            let mut kinds = items(input, ']', value);
            kinds.dedup();
            format!("[{}]", kinds.join(","))
        }
        '"' => {
            string(input);
            "s".to_owned()
        }
        _ => {
            let end = input.find([',', '}', ']', ' ']).unwrap_or(input.len());
            let (literal, rest) = input.split_at(end);
            *input = rest;
            match literal {
                "null" => "null".to_owned(),
                "true" | "false" => "b".to_owned(),
                number => {
                    number.parse::<f64>().expect("a number");
                    "n".to_owned()
                }
            }
        }
    }
}

fn items(input: &mut &str, close: char, mut item: impl FnMut(&mut &str) -> String) -> Vec<String> {
    *input = input[1..].trim_start();
    let mut out = Vec::new();
    while !input.starts_with(close) {
        out.push(item(input));
        *input = input.trim_start();
        *input = input.strip_prefix(',').unwrap_or(input).trim_start();
    }
    *input = &input[1..];
    out
}

fn string(input: &mut &str) -> String {
    let mut escaped = false;
    let end = input[1..]
        .find(|letter| {
            let closes = letter == '"' && !escaped;
            escaped = letter == '\\' && !escaped;
            closes
        })
        .expect("a closing quote");
    let text = input[1..=end].to_owned();
    *input = input[end + 2..].trim_start();
    text
}

/// The sequence of a stream's events, by name and structure, equal neighbours named once.
///
/// Whether the chunk that finishes a choice carries text depends on the last token alone, and chunks without text
/// and without an end come from tokens that the real tokenizer does not print; neither is structure.
pub fn event_sequence(body: &str) -> Vec<String> {
    let mut sequence: Vec<String> = body
        .split("\n\n")
        .filter(|event| !event.is_empty())
        .map(|event| {
            let (name, data) = event.split_once("data: ").expect("an event has data");
            if data == "[DONE]" {
                data.to_owned()
            } else {
                format!("{name}{}", without_delta(&structure(data)))
            }
        })
        .filter(|event| !event.contains("delta:{},") || event.contains("finish_reason:s"))
        .collect();
    sequence.dedup();
    sequence
}

fn without_delta(event: &str) -> String {
    match (event.find("delta:{"), event.find(",logprobs:")) {
        (Some(from), Some(to)) if event.contains("finish_reason:s") && from < to => {
            format!("{}delta:_{}", &event[..from], &event[to..])
        }
        _ => event.to_owned(),
    }
}
