//! The load, and the server at its end.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Connections that ask for small answers: enough that the proxy never waits for them, and few enough to be one wave.
const CONNECTIONS: &str = "32";

/// Streams at a time, and chunks in each: five seconds at a chunk every 20 ms.
const STREAMS: &str = "200";
const CHUNKS_PER_STREAM: &str = "250";

/// Posts a small chat request for ever.
const WRK_POSTS: &str = r#"wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["X-Team-ID"] = "team-1"
wrk.body = '{"model":"sim","messages":[{"role":"user","content":"Say hello."}],"max_tokens":8}'
"#;

/// Ends with one line for us. wrk counts an answer of 4xx or 5xx as an error of status.
const WRK_COUNTS: &str = r#"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("counted %d %d %d\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"#;

/// What is asked of a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Small unstreamed requests, as fast as they go.
    Requests {
        /// For how long.
        seconds: u32,
    },
    /// Streams at the pace of a busy engine.
    Streams {
        /// How many.
        requests: u32,
    },
}

/// What went through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// Requests or chunks.
    pub units: u64,
    /// How long it took.
    pub seconds: f64,
}

/// The programs that take part.
#[derive(Debug)]
pub struct Programs {
    release: PathBuf,
    scratch: PathBuf,
    posting: PathBuf,
    getting: PathBuf,
}

impl Load {
    /// What is counted.
    pub fn unit(self) -> &'static str {
        match self {
            Load::Requests { .. } => "request",
            Load::Streams { .. } => "chunk",
        }
    }
}

impl Programs {
    /// The programs built into `release`; what they need to be told is written to `scratch`.
    ///
    /// # Errors
    /// When nothing can be written there.
    pub fn new(release: &Path, scratch: &Path) -> Result<Programs> {
        let script = |name: &str, text: String| -> Result<PathBuf> {
            let script = scratch.join(name);
            fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
            Ok(script)
        };
        Ok(Programs {
            release: release.to_owned(),
            scratch: scratch.to_owned(),
            posting: script("posts.lua", format!("{WRK_POSTS}{WRK_COUNTS}"))?,
            getting: script("gets.lua", WRK_COUNTS.to_owned())?,
        })
    }

    /// Where configurations go.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// The gateway's program.
    pub fn gateway(&self) -> PathBuf {
        self.release.join("vllm-gateway")
    }

    /// The server that this load is meant for.
    pub fn sim(&self, load: Load, addr: SocketAddr) -> Command {
        let mut command = Command::new(self.release.join("vllm-sim"));
        command
            .arg("--listen")
            .arg(addr.to_string())
            .stdout(Stdio::null());
        match load {
            Load::Requests { .. } => command.arg("--instant"),
            // A step every 20 ms, whatever is in it; each gives every stream a chunk, as a real engine's does.
            Load::Streams { .. } => command.args([
                "--step-base-us",
                "20000",
                "--decode-us-per-seq",
                "0",
                "--prefill-us-per-token",
                "0",
            ]),
        };
        command
    }

    /// Fills pools and caches, and shows early that everything works.
    ///
    /// # Errors
    /// As [`Programs::run`].
    pub fn warm_up(&self, load: Load, addr: SocketAddr) -> Result<()> {
        match load {
            Load::Requests { .. } => self.requests(1, addr),
            Load::Streams { .. } => self.streams(200, "25", addr),
        }
        .map(drop)
    }

    /// Puts the load on the proxy at `addr`.
    ///
    /// # Errors
    /// When the load's program fails, or not every request went well.
    pub fn run(&self, load: Load, addr: SocketAddr) -> Result<Done> {
        match load {
            Load::Requests { seconds } => self.requests(seconds, addr),
            Load::Streams { requests } => self.streams(requests, CHUNKS_PER_STREAM, addr),
        }
    }

    fn requests(&self, seconds: u32, addr: SocketAddr) -> Result<Done> {
        wrk(
            &self.posting,
            seconds,
            &format!("http://{addr}/v1/chat/completions"),
        )
    }

    /// Gets the same page from `addr` as fast as it goes.
    ///
    /// # Errors
    /// As [`Programs::run`].
    pub fn pages(&self, seconds: u32, addr: SocketAddr) -> Result<Done> {
        wrk(&self.getting, seconds, &format!("http://{addr}/"))
    }

    fn streams(&self, requests: u32, chunks: &str, addr: SocketAddr) -> Result<Done> {
        let mut command = Command::new(self.release.join("vllm-load"));
        command
            .arg("--url")
            .arg(format!("http://{addr}"))
            .args(["--model", "sim", "--endpoints", "chat=1"]);
        command.args([
            "--concurrency",
            STREAMS,
            "--stream-fraction",
            "1",
            "--max-tokens",
            chunks,
        ]);
        command.arg("--requests").arg(requests.to_string());
        counted_by_load(&output_of(command.args(["--no-progress", "--json", "-"]))?)
    }
}

fn wrk(script: &Path, seconds: u32, url: &str) -> Result<Done> {
    let mut command = Command::new("wrk");
    command.args(["--threads", "1", "--connections", CONNECTIONS, "--timeout", "10s"]);
    command
        .arg("--duration")
        .arg(format!("{seconds}s"))
        .arg("--script")
        .arg(script);
    counted_by_wrk(&output_of(command.arg(url))?)
}

/// What a program prints that must succeed.
pub fn output_of(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {shown}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{shown} ended with {}:\n{text}",
        output.status
    );
    Ok(text)
}

/// Reads the script's last line: requests, microseconds, errors.
fn counted_by_wrk(output: &str) -> Result<Done> {
    let line = output.lines().find_map(|line| line.strip_prefix("counted "));
    let numbers: Option<Vec<u64>> =
        line.and_then(|line| line.split(' ').map(|number| number.parse().ok()).collect());
    let Some([requests, micros, errors]) = numbers.as_deref() else {
        anyhow::bail!("expected a line `counted REQUESTS MICROSECONDS ERRORS` from wrk, found:\n{output}");
    };
    ensure!(
        *requests > 0 && *errors == 0,
        "expected answers without errors, found:\n{output}"
    );
    Ok(Done {
        units: *requests,
        seconds: *micros as f64 / 1e6,
    })
}

/// Reads the summary of vllm-load.
fn counted_by_load(output: &str) -> Result<Done> {
    let summary: Value = serde_json::from_str(output).context("expected a summary of vllm-load as JSON")?;
    let count = |name: &str| summary[name].as_u64().unwrap_or_default();
    ensure!(
        count("ok") > 0 && count("ok") == count("requests"),
        "expected every stream to end well, found {} of {}: {}",
        count("ok"),
        count("requests"),
        summary["by_error"]
    );
    let seconds = summary["duration_s"].as_f64().unwrap_or_default();
    ensure!(
        count("chunks") > 0 && seconds > 0.0,
        "expected chunks and a duration, found:\n{output}"
    );
    Ok(Done {
        units: count("chunks"),
        seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_believed_only_without_errors() {
        let output = "Running 1s test\n  2 requests in 1.00s\ncounted 12345 1000000 0\n";
        assert_eq!(
            counted_by_wrk(output).expect("a count"),
            Done {
                units: 12_345,
                seconds: 1.0
            }
        );
        for bad in [
            "",
            "counted 5 1000000 1\n",
            "counted 0 1000000 0\n",
            "counted 5 x 0\n",
            "counted 5 1\n",
        ] {
            assert!(counted_by_wrk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_run_with_a_failed_stream_is_no_measurement() {
        let good = r#"{"requests":2,"ok":2,"chunks":500,"duration_s":5.0,"by_error":{}}"#;
        assert_eq!(
            counted_by_load(good).expect("a count"),
            Done {
                units: 500,
                seconds: 5.0
            }
        );
        let bad = good.replace(r#""ok":2"#, r#""ok":1"#);
        assert!(
            counted_by_load(&bad)
                .expect_err("one failed")
                .to_string()
                .contains("1 of 2")
        );
        assert!(counted_by_load(&good.replace("500", "0")).is_err());
    }
}
