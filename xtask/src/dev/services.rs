//! What belongs to a running system, in the order in which it is started.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::children::{Ready, Service};
use super::metal::Metal;
use super::ports::Ports;
use super::state::StateDir;
use super::{duration, prometheus};
use crate::http::{sum_of, sum_of_events};

/// How long anything but the gateway may take to end. None has work that must be finished.
const GRACE: Duration = Duration::from_secs(5);

/// How long a program may take to be ready. They take well below a second; a machine that compiles meanwhile takes longer.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// How long vLLM may take: at its first start it downloads the model.
const VLLM_READY_WITHIN: Duration = Duration::from_secs(30 * 60);

/// How long vLLM may take to end: it stops processes of its own.
const VLLM_GRACE: Duration = Duration::from_secs(20);

/// What the gateway may take beyond its own limit on draining: to write down what it knows, on a busy machine.
const GRACE_AFTER_DRAIN: Duration = Duration::from_secs(5);

/// The longest run that `vllm-load` takes, a year, stands for no end.
const LOAD_DURATION: &str = "8760h";

/// What each team may take in a minute, of the requests that all of them send: the busiest sends three tenths.
const SHARE_OF_REQUESTS: f64 = 0.5;

/// Prompt and completion tokens that a request of the load may use. It uses some 150.
const TOKENS_A_REQUEST: f64 = 300.0;

/// What all services need to know.
#[derive(Debug)]
pub struct Plan<'p> {
    /// The repository.
    pub root: &'p Path,
    /// Where the programs were built.
    pub programs: &'p Path,
    /// Where logs and data go.
    pub state: &'p StateDir,
    /// Who listens where.
    pub ports: Ports,
    /// Where requests are to be seen, as `capture` in `config.yaml`; else that is up to the gateway.
    pub capture: Option<&'static str>,
    /// Requests a second of all teams.
    pub rate_per_s: f64,
}

impl Plan<'_> {
    /// The simulator of a server that generates text, with its realistic step costs.
    pub fn sim_llm(&self) -> Service {
        self.sim("sim-llm", self.ports.llm(), &["--model", "sim-llm"])
    }

    /// The simulator of a server that embeds.
    pub fn sim_embed(&self) -> Service {
        let options = ["--model", "sim-embed", "--kind", "embed"];
        self.sim("sim-embed", self.ports.embeddings(), &options)
    }

    fn sim(&self, name: &'static str, port: u16, options: &[&str]) -> Service {
        let mut command = self.program("vllm-sim");
        command
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(options);
        Service {
            name,
            command,
            url: url(port),
            ready: page(port, "/health"),
            stop_signal: Signal::TERM,
            grace: GRACE,
        }
    }

    /// vLLM itself: the server that generates text, and the one that embeds, if there is to be one.
    pub fn vllm(&self, metal: &Metal) -> Vec<Service> {
        let service = |name, port, mut command: Command| {
            command.current_dir(self.root);
            Service {
                name,
                command,
                url: url(port),
                ready: Ready {
                    within: VLLM_READY_WITHIN,
                    ..page(port, "/health")
                },
                stop_signal: Signal::TERM,
                grace: VLLM_GRACE,
            }
        };
        let (chat, embeddings) = (self.ports.llm(), self.ports.embeddings());
        let mut services = vec![service("vllm", chat, metal.chat(chat))];
        services.extend(
            metal
                .embeddings(embeddings)
                .map(|command| service("vllm-embed", embeddings, command)),
        );
        services
    }

    /// The gateway, with the repository's configuration and limits for its teams.
    ///
    /// # Errors
    /// When that configuration cannot be run with.
    pub fn gateway(&self) -> Result<Service> {
        self.write_gateway_config()?;
        let mut command = self.gateway_command("run");
        // Colours have no place in a log file.
        command.env("NO_COLOR", "1");
        Ok(Service {
            name: "gateway",
            command,
            url: url(self.ports.gateway()),
            ready: page(self.ports.admin(), "/ready"),
            stop_signal: Signal::TERM,
            grace: self.drain_timeout()? + GRACE_AFTER_DRAIN,
        })
    }

    fn gateway_config(&self) -> PathBuf {
        self.state.join("gateway.yaml")
    }

    fn write_gateway_config(&self) -> Result<()> {
        let shipped = self.root.join("config.yaml");
        let text =
            fs::read_to_string(&shipped).with_context(|| format!("cannot read {}", shipped.display()))?;
        let to = self.gateway_config();
        fs::write(&to, with_limits(&text, self.rate_per_s)?)
            .with_context(|| format!("cannot write {}", to.display()))
    }

    /// The environment puts it on this system's ports and its spool into the state directory, whatever the file says.
    fn gateway_command(&self, what: &str) -> Command {
        let mut command = self.program("vllm-gateway");
        command
            .arg(what)
            .arg("--config")
            .arg(self.gateway_config())
            .env("GATEWAY_LISTEN_ADDR", format!("0.0.0.0:{}", self.ports.gateway()))
            .env("GATEWAY_ADMIN_ADDR", format!("127.0.0.1:{}", self.ports.admin()))
            .env("VLLM_URL", url(self.ports.llm()))
            .env("VLLM_EMBEDDINGS_URL", url(self.ports.embeddings()))
            .env("SPOOL_DIR", self.state.join("spool"))
            .env(
                "CLICKHOUSE_LISTEN_ADDR",
                format!("127.0.0.1:{}", self.ports.clickhouse()),
            )
            .env("CLICKHOUSE_DATA_DIR", self.state.join("clickhouse"));
        if let Some(capture) = self.capture {
            command.env("GATEWAY_CAPTURE", capture);
        }
        command
    }

    /// What is in force, as the gateway itself says.
    fn drain_timeout(&self) -> Result<Duration> {
        let mut command = self.gateway_command("check-config");
        let output = command
            .output()
            .with_context(|| format!("cannot start {command:?}"))?;
        ensure!(
            output.status.success(),
            "the gateway refuses config.yaml:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        drain_timeout_in(&String::from_utf8_lossy(&output.stdout))
    }

    /// Prometheus, which reads the gateway and both simulators.
    ///
    /// # Errors
    /// When its configuration cannot be written.
    pub fn prometheus(&self) -> Result<Service> {
        let (config, port) = (self.state.join("prometheus"), self.ports.prometheus());
        prometheus::copy_config(&self.root.join("prometheus"), &config, self.ports)?;
        let with_path = |option: &str, path: &Path| format!("--{option}={}", path.display());
        let mut command = Command::new("prometheus");
        command
            .arg(with_path("config.file", &config.join(prometheus::CONFIG_FILE)))
            .arg(with_path(
                "storage.tsdb.path",
                &self.state.join("prometheus-data"),
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        Ok(Service {
            name: "prometheus",
            command,
            url: url(port),
            ready: page(port, "/-/ready"),
            stop_signal: Signal::TERM,
            grace: GRACE,
        })
    }

    /// The gateway's report on this system; when nothing more is said, as a table by team.
    pub fn report(&self) -> Command {
        self.gateway_command("report")
    }

    /// Clients of five teams, with projects and users, who now and then give up. They are there when a request has ended, and, where rows are
    /// stored, its row.
    pub fn load(&self, rate_per_s: f64, stores: bool) -> Service {
        let has_ended: fn(&str) -> bool = |metrics| sum_of("gateway_requests_total", metrics) > 0.0;
        let is_stored: fn(&str) -> bool = |metrics| sum_of_events("gateway_store_rows_total", metrics) > 0.0;
        let says = if stores { is_stored } else { has_ended };
        let endpoints = "chat=6,completions=3,embeddings=1";
        self.clients("load", self.ports.gateway(), endpoints, rate_per_s, says)
    }

    /// The same teams' requests past the gateway, straight to the server that generates text. They are there when one was seen.
    pub fn direct_load(&self, rate_per_s: f64) -> Service {
        let is_seen = |metrics: &str| {
            let lines = metrics.lines().filter(|line| line.contains("whose=\"direct\""));
            sum_of(
                "gateway_tap_exchanges_total",
                &lines.collect::<Vec<_>>().join("\n"),
            ) > 0.0
        };
        self.clients(
            "direct-load",
            self.ports.llm(),
            "chat=6,completions=3",
            rate_per_s,
            is_seen,
        )
    }

    fn clients(
        &self,
        name: &'static str,
        port: u16,
        endpoints: &str,
        rate_per_s: f64,
        says: fn(&str) -> bool,
    ) -> Service {
        let mut command = self.program("vllm-load");
        command
            .args(["--url", &url(port)])
            .args(["--model", "sim-llm", "--embeddings-model", "sim-embed"])
            .args(["--rate", &rate_per_s.to_string(), "--duration", LOAD_DURATION])
            .args(["--teams", "5", "--team-weights", "5,4,3,2,2"])
            .args(["--projects", "3", "--users", "20"])
            .args(["--endpoints", endpoints])
            .args(["--stream-fraction", "0.33", "--abort-fraction", "0.05"]);
        Service {
            name,
            command,
            url: String::new(),
            ready: Ready {
                port: self.ports.admin(),
                path: "/metrics",
                says,
                within: READY_WITHIN,
            },
            // At which it sums up what it saw, in its log.
            stop_signal: Signal::INT,
            grace: GRACE,
        }
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.current_dir(self.root);
        command
    }
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// Ready when the page answers 200, whatever it says.
fn page(port: u16, path: &'static str) -> Ready {
    Ready {
        port,
        path,
        says: |_| true,
        within: READY_WITHIN,
    }
}

/// The shipped configuration, which limits nobody, with limits that show something and that the load keeps to; with a budget that the busiest team spends
/// within some hours and that only observes; and with a team that sends nothing by itself, for trying what being refused is like.
fn with_limits(config: &str, rate_per_s: f64) -> Result<String> {
    let requests = (rate_per_s * 60.0 * SHARE_OF_REQUESTS).ceil();
    let tokens = (requests * TOKENS_A_REQUEST).ceil();
    let each = format!(
        "{{requests_per_minute: {requests}, tokens_per_minute: {tokens}, concurrent_requests: 200, budget: {{usd: 1, period: day, at_limit: observe}}}}"
    );
    let places = [
        ("\n  default:\n", format!("\n  default: {each}\n")),
        (
            "\n  teams: []\n",
            "\n  teams:\n    - {team: tight, requests_per_minute: 3}\n".to_owned(),
        ),
    ];
    let mut config = config.to_owned();
    for (shipped, here) in places {
        ensure!(
            config.matches(shipped).count() == 1,
            "expected `{}` once in config.yaml, in `limits`",
            shipped.trim()
        );
        config = config.replace(shipped, &here);
    }
    Ok(config)
}

fn drain_timeout_in(config: &str) -> Result<Duration> {
    let value = config
        .lines()
        .find_map(|line| line.trim().strip_prefix("drain_timeout: "))
        .context("the gateway's configuration names no drain_timeout")?;
    duration::parse(value).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gateway_s_grace_is_read_from_its_configuration() {
        let config = include_str!("../../../config.yaml");
        assert_eq!(
            drain_timeout_in(config).expect("it is there"),
            Duration::from_secs(30)
        );
        assert!(drain_timeout_in("gateway:\n  workers: 0\n").is_err());
    }

    #[test]
    fn the_shipped_configuration_limits_nobody_and_takes_the_limits_of_this_system() {
        let shipped = include_str!("../../../config.yaml");
        let text = with_limits(shipped, 15.0).expect("it has the places");
        let limits: serde_yaml::Value = serde_yaml::from_str(&text).expect("YAML");
        let limits = &limits["limits"];
        assert_eq!(limits["default"]["requests_per_minute"], 450);
        assert_eq!(limits["default"]["tokens_per_minute"], 135_000);
        assert_eq!(limits["teams"][0]["team"], "tight");
        let refused = with_limits("limits:\n  default:\n", 15.0).expect_err("no teams");
        assert!(refused.to_string().contains("`teams: []`"), "{refused}");
    }

    #[test]
    fn the_load_needs_a_request_that_has_ended_and_its_row_where_rows_are_stored() {
        let state = StateDir::of(Path::new("target"), Ports::from_base(8000));
        let plan = Plan {
            root: Path::new("."),
            programs: Path::new("."),
            state: &state,
            ports: Ports::from_base(8000),
            capture: None,
            rate_per_s: 15.0,
        };
        let ended = "# TYPE gateway_requests_total counter\ngateway_requests_total{team=\"a b\"} 1\ngateway_store_rows_total{table=\"request_events\"} 0\n";
        let stored = ended.replace("\"} 0", "\"} 3");
        let none = ended.replace(" 1", " 0");
        let (says, says_stored) = (
            plan.load(15.0, false).ready.says,
            plan.load(15.0, true).ready.says,
        );
        assert!(!says(&none) && !says("not metrics") && says(ended));
        assert!(!says_stored(ended) && says_stored(&stored));
    }
}
