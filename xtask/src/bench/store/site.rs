//! What runs while something is measured: the engine, a simulated server, a gateway that stores, clients.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bench::load::{Load, Programs};
use crate::bench::process::{Server, free_addr};
use crate::http;

/// Where programs come from and files go to.
pub struct Site<'s> {
    programs: &'s Programs,
    release: PathBuf,
    scratch: &'s Path,
}

/// A gateway before a simulated server that answers at once.
pub struct Served {
    /// The gateway.
    pub gateway: Server,
    admin: SocketAddr,
    _sim: Server,
}

/// What vllm-load saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Requests that ended.
    pub requests: u64,
    /// In a second.
    pub rate_per_s: f64,
    /// From when a request was due until it had ended.
    pub e2e_p50_us: f64,
    /// Likewise.
    pub e2e_p99_us: f64,
}

impl<'s> Site<'s> {
    /// With programs in `release`.
    pub fn new(programs: &'s Programs, release: &Path, scratch: &'s Path) -> Site<'s> {
        let release = release.to_owned();
        Site {
            programs,
            release,
            scratch,
        }
    }

    /// ClickHouse's engine on `addr`; what it stores outlives it, under `name`.
    pub fn engine(&self, name: &str, addr: SocketAddr) -> Result<Server> {
        let mut command = Command::new(self.programs.gateway());
        command
            .args(["embedded-clickhouse", "--listen", &addr.to_string(), "--data-dir"])
            .arg(self.scratch.join(name));
        for variable in ["CLICKHOUSE_USERNAME", "CLICKHOUSE_PASSWORD"] {
            command.env_remove(variable);
        }
        command.env("RUST_LOG", "warn").stdout(Stdio::null());
        Server::start("the engine", command, addr)
    }

    /// What feeds a store by itself.
    pub fn feeder(&self, name: &str, clickhouse: SocketAddr, events: u64) -> Result<Command> {
        let config = self.write_config(name, clickhouse, "")?;
        let mut command = Command::new(self.release.join("examples/store_feed"));
        command.arg("--config").arg(config);
        command
            .args(["--events", &events.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Ok(command)
    }

    /// A gateway that stores at `clickhouse`, whether or not anybody is there.
    pub fn serve(&self, name: &str, clickhouse: SocketAddr) -> Result<Served> {
        let (listen, admin, upstream) = (free_addr()?, free_addr()?, free_addr()?);
        let sim = self.programs.sim(Load::Requests { seconds: 0 }, upstream);
        let sim = Server::start("vllm-sim", sim, upstream)?;
        let more = format!(
            "gateway: {{listen: \"{listen}\"}}\nadmin: {{listen: \"{admin}\"}}\n\
             upstreams:\n  - {{name: sim, url: \"http://{upstream}\", serves: generate}}\n"
        );
        let config = self.write_config(name, clickhouse, &more)?;
        let mut command = Command::new(self.programs.gateway());
        command.env_clear().args(["run", "--config"]).arg(config);
        // Without the kernel probe, which is no part of storing.
        command.env("GATEWAY_CAPTURE", "proxy");
        command.stdout(Stdio::null());
        let gateway = Server::start("vllm-gateway", command, listen)?;
        Ok(Served {
            gateway,
            admin,
            _sim: sim,
        })
    }

    fn write_config(&self, name: &str, clickhouse: SocketAddr, more: &str) -> Result<PathBuf> {
        let dir = self.scratch.join(format!("{name}-gateway"));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let (config, spool) = (dir.join("config.yaml"), dir.join("spool"));
        let text = format!(
            "store: {{url: \"http://{clickhouse}\"}}\nspool: {{dir: \"{}\"}}\nlog: {{level: error}}\n{more}",
            spool.display()
        );
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        Ok(config)
    }

    /// Clients that ask for so many chats a second, a third of them streamed.
    pub fn clients(&self, addr: SocketAddr, rate_per_s: u32, seconds: u32) -> Command {
        let mut command = Command::new(self.release.join("vllm-load"));
        command.arg("--url").arg(format!("http://{addr}"));
        command.args([
            "--model",
            "sim",
            "--endpoints",
            "chat=1",
            "--output-tokens",
            "8..16",
        ]);
        command.args(["--rate", &rate_per_s.to_string()]);
        command.args([
            "--duration",
            &format!("{seconds}s"),
            "--no-progress",
            "--json",
            "-",
        ]);
        command
    }
}

impl Served {
    /// A counter of the gateway's own.
    ///
    /// # Errors
    /// When its metrics cannot be read.
    pub fn counted(&self, family: &str) -> Result<f64> {
        Ok(http::sum_of(family, &http::get(self.admin.port(), "/metrics")?))
    }

    /// The same of the rows of requests, one each.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn counted_events(&self, family: &str) -> Result<f64> {
        Ok(http::sum_of_events(
            family,
            &http::get(self.admin.port(), "/metrics")?,
        ))
    }
}

impl Seen {
    /// Reads the summary of vllm-load.
    ///
    /// # Errors
    /// When a request did not end well: then nothing was measured.
    pub fn of(summary: &str) -> Result<Seen> {
        let summary: Value =
            serde_json::from_str(summary).context("expected a summary of vllm-load as JSON")?;
        let (requests, ok) = (summary["requests"].as_u64(), summary["ok"].as_u64());
        ensure!(
            ok > Some(0) && ok == requests,
            "expected every request to end well, found {ok:?} of {requests:?}: {}",
            summary["by_error"]
        );
        let number = |pointer: &str| {
            let value = summary.pointer(pointer).and_then(Value::as_f64);
            value.with_context(|| format!("expected a number at {pointer} of the summary, found none"))
        };
        Ok(Seen {
            requests: requests.unwrap_or_default(),
            rate_per_s: number("/rate_per_s")?,
            e2e_p50_us: number("/latency/e2e/p50_us")?,
            e2e_p99_us: number("/latency/e2e/p99_us")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_with_a_failed_request_is_no_measurement() {
        let good = r#"{"requests":2,"ok":2,"rate_per_s":1.5,"by_error":{},"latency":{"e2e":{"p50_us":7,"p99_us":9}}}"#;
        let seen = Seen::of(good).expect("a summary");
        assert_eq!(
            (seen.requests, seen.rate_per_s, seen.e2e_p50_us, seen.e2e_p99_us),
            (2, 1.5, 7.0, 9.0)
        );
        let error = Seen::of(&good.replace(r#""ok":2"#, r#""ok":1"#)).expect_err("one failed");
        assert!(error.to_string().contains("Some(1) of Some(2)"), "{error}");
        assert!(Seen::of(&good.replace("p99", "p98")).is_err());
    }
}
