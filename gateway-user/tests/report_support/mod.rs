//! What tests of `vllm-gateway report` share: the real program, an engine with the gateway's schema, and a config that names it.
#![allow(dead_code, reason = "each test program uses its own part")]

use crate::support;
use clickhouse::Client;
use serde_json::Value;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use vllm_gateway::config::Secret;
use vllm_gateway::store::embedded::{EmbeddedOptions, EmbeddedServer};
use vllm_gateway::store::migrate::{self, Layout};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vllm-gateway");

fn variable(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name)
}

fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a port")
}

/// An engine with the gateway's schema, a spool, and a config that names both.
pub struct Installed {
    pub dir: PathBuf,
    pub addr: SocketAddr,
    engine: Option<EmbeddedServer>,
}

impl Installed {
    /// Without an engine yet.
    pub fn bare(name: &str) -> Installed {
        let dir = std::env::temp_dir().join(format!("vllm-gateway-report-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let installed = Installed {
            dir,
            addr: free_addr(),
            engine: None,
        };
        installed.configure("");
        installed
    }

    /// With an engine and the schema.
    pub async fn new(name: &str) -> Installed {
        let mut installed = Installed::bare(name);
        installed.start_engine(None).await;
        migrate::migrate(&installed.client(), &layout())
            .await
            .expect("a schema");
        installed
    }

    /// Starts the engine, with a user `reader` where there is a password.
    pub async fn start_engine(&mut self, password: Option<&str>) {
        let options = EmbeddedOptions {
            program: PROGRAM.into(),
            listen: self.addr,
            data_dir: self.dir.join("clickhouse"),
            libchdb: None,
            user: password.map(|_| "reader".to_owned()),
            password: password.map(Secret::new),
        };
        let engine = EmbeddedServer::spawn(options, &variable).expect("the engine starts");
        engine.ready(support::DEADLINE).await.expect("the engine answers");
        self.engine = Some(engine);
    }

    /// Writes the config, with more settings of the store.
    pub fn configure(&self, store: &str) {
        let config = format!(
            "spool: {{dir: spool}}\nstore: {{url: embedded, embedded_listen: \"{}\"{store}}}\n",
            self.addr
        );
        std::fs::write(self.dir.join("config.yaml"), config).expect("a file");
    }

    /// A client that names no database.
    pub fn client(&self) -> Client {
        Client::default().with_url(format!("http://{}", self.addr))
    }

    /// Runs a statement in the gateway's database.
    pub async fn run(&self, sql: &str) {
        let client = self.client().with_database("vllm_attribution");
        client
            .query_raw(sql)
            .execute()
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// Stores rows as the gateway does, each as a part of its own, so that nothing but FINAL can join doubled ones.
    pub async fn store(&self, rows: &[Value]) {
        self.run("SYSTEM STOP MERGES request_events").await;
        for row in rows {
            self.run(&format!("INSERT INTO request_events FORMAT JSONEachRow {row}"))
                .await;
        }
    }

    /// What `vllm-gateway report` does with these arguments.
    pub fn report(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        command
            .args(["report", "--config", "config.yaml"])
            .args(arguments);
        command
            .current_dir(&self.dir)
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .expect("the program starts")
    }

    /// The report as JSON, which must come without complaint.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.report(&[arguments, &["--format", "json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// What a report says that cannot be made, and how it exits.
    pub fn refused(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.report(arguments);
        assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
        (output.status.code(), text(&output.stderr))
    }

    /// Stops the engine.
    pub async fn finish(mut self) {
        if let Some(engine) = self.engine.take() {
            engine.stop().await;
        }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// How the schema is laid out.
pub fn layout() -> Layout {
    Layout {
        database: "vllm_attribution".to_owned(),
        cluster: None,
        // The rows of these tests are of a day that will be long ago; what expires behind 2106, ClickHouse takes to have expired.
        raw_ttl_days: 20_000,
        ledger_ttl_days: 20_000,
    }
}

/// What a program said.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
