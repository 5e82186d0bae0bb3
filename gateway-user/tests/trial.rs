//! `vllm-gateway try` as somebody meets it who has a vLLM and five minutes: it says what to do, shows what passes, and leaves nothing.

mod support;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use support::installed::free_address;
use support::{Sim, eventually, exchange};

/// A directory of its own for one run, gone with its handle.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let directory = std::env::temp_dir().join(format!("vllm-gateway-try-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        Directory(directory)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"));
        command
            .arg("try")
            .args(arguments)
            .current_dir(&self.0)
            .env_remove("RUST_BACKTRACE")
            .env_remove("VLLM_API_KEY")
            .stdin(Stdio::null());
        command
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let Output {
            status,
            stdout,
            stderr,
        } = self.command(arguments).output().expect("the program starts");
        assert!(!status.success() && stdout.is_empty(), "{status}");
        let message = String::from_utf8(stderr).expect("text");
        assert!(!message.contains("panicked"), "{message}");
        message
    }

    fn entries(&self) -> usize {
        std::fs::read_dir(&self.0).expect("it is there").count()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A trial that runs.
struct Trial {
    child: Child,
    welcome: String,
    clients: SocketAddr,
    console: SocketAddr,
}

impl Trial {
    fn start(directory: &Directory, arguments: &[&str]) -> Trial {
        let more = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        let mut child = directory
            .command(&[arguments, &more].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut welcome = String::new();
        while !welcome.contains("Ctrl-C") {
            assert!(
                out.read_line(&mut welcome).expect("text") > 0,
                "it ended with: {welcome}"
            );
        }
        let after = |word: &str| {
            let line = welcome
                .lines()
                .find(|line| line.trim().starts_with(word))
                .expect("a line");
            let address = line.split_once("http://").expect("an address").1;
            address
                .split('/')
                .next()
                .expect("an address")
                .parse()
                .expect("an address")
        };
        Trial {
            clients: after("Clients"),
            console: after("Console"),
            child,
            welcome,
        }
    }

    async fn teams(&self) -> Vec<String> {
        let request = format!(
            "GET /api/teams HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.console
        );
        let answer = String::from_utf8(exchange(self.console, request.as_bytes()).await).expect("text");
        let document: Value =
            serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("JSON");
        let rows = document["teams"].as_array().expect("a list").iter();
        rows.map(|row| row["team"].as_str().expect("a name").to_owned())
            .collect()
    }

    fn stop(mut self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::INT).expect("our own process");
        assert!(self.child.wait().expect("our own process").success());
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const BODY: &str =
    r#"{"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "Hello"}]}"#;

async fn ask(clients: SocketAddr, fields: &str) {
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{fields}Content-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let answer = exchange(clients, request.as_bytes()).await;
    assert!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test]
async fn a_client_that_knows_of_no_teams_is_on_the_page_and_nothing_is_on_the_disk() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let directory = Directory::new("page");
    // A config that lies about is somebody else's.
    std::fs::write(directory.0.join("config.yaml"), "no config").expect("a file");
    let trial = Trial::start(&directory, &["--upstream", &format!("{}/v1", sim.url())]);
    for part in ["serves tiny", "base_url", "X-Team-ID", "\"model\": \"tiny\""] {
        assert!(trial.welcome.contains(part), "{part} in {}", trial.welcome);
    }
    assert!(trial.teams().await.is_empty());
    ask(trial.clients, "").await;
    ask(trial.clients, "Authorization: Bearer sk-one\r\n").await;
    ask(trial.clients, "x-api-key: sk-two\r\n").await;
    ask(
        trial.clients,
        "Authorization: Bearer sk-one\r\nX-Team-ID: search\r\n",
    )
    .await;
    let teams = eventually("four teams", async || {
        Some(trial.teams().await).filter(|teams| teams.len() == 4)
    })
    .await;
    let by_key = teams.iter().filter(|team| team.starts_with("key-")).count();
    assert_eq!(by_key, 2, "{teams:?}");
    assert!(
        teams.contains(&"unnamed".to_owned()) && teams.contains(&"search".to_owned()),
        "{teams:?}"
    );
    assert_eq!(directory.entries(), 1, "only what was there before");
    trial.stop();
    assert_eq!(directory.entries(), 1, "and nothing at the end");
}

#[test]
fn what_cannot_be_tried_is_said_with_what_to_do() {
    let directory = Directory::new("refused");
    let nobody = free_address();
    let message = directory.refused(&["--upstream", &format!("http://{nobody}")]);
    for part in [
        &nobody.to_string(),
        "cannot be connected to",
        "Is vLLM running",
        "curl http://",
    ] {
        assert!(message.contains(part), "{part} in {message}");
    }
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = holder.local_addr().expect("an address").to_string();
    let free = free_address().to_string();
    for (arguments, setting) in [
        (["--listen", &taken, "--admin", &free], "--listen"),
        (["--listen", &free, "--admin", &taken], "--admin"),
    ] {
        let message = directory.refused(&[&["--upstream", &sim.url()], &arguments[..]].concat());
        assert!(
            message.contains("is in use by") && message.contains(&format!("set {setting}")),
            "{message}"
        );
    }
    let message = directory.refused(&["--upstream", "https://vllm:8000"]);
    assert!(
        message.contains("TLS to an upstream is not supported"),
        "{message}"
    );
    let message = directory.refused(&["--upstream", &sim.url(), "--listen", &sim.addr.to_string()]);
    assert!(message.contains("leads back to this gateway"), "{message}");
    assert_eq!(directory.entries(), 0);
}
