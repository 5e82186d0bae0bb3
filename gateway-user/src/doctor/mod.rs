//! `vllm-gateway doctor`: what this host can do, before anything depends on it.
//!
//! It looks at what the gateway would use (kernel, upstreams, store, ports), by trying it where that leaves nothing behind, and says of
//! each what was found and what to do about it. Every check is a value ([`Check`]); what they mean together is computed from them.
//!
//! | file | what it looks at |
//! |---|---|
//! | `host` | clock, open files, identity |
//! | `kernel` | what the kernel probe needs of it (Linux) |
//! | `probe` | whether the probe can run |
//! | `cgroup` | where the upstreams' sockets are (Linux) |
//! | `ports` | the gateway's addresses, and who holds them |
//! | `upstream` | whether each answers, as what, and for how long it keeps a connection |
//! | `exposition` | its `/metrics`, and whether one server stands behind it |
//! | `flags` | the options that it was started with, as far as they show in answers |
//! | `tls` | what a server speaks that speaks no HTTP |
//! | `spool` | the directory where rows wait |
//! | `store` | ClickHouse |
//!
//! Promises: it ends within [`LIMIT`], whatever hangs; no secret shows; it changes nothing that lasts (a file that it makes to try a
//! directory is removed); it uses an upstream's engine only when it was asked to.
//!
//! Left out: how fast anything is, and whether it still holds in an hour.

#[cfg(target_os = "linux")]
mod cgroup;
mod check;
mod exposition;
mod flags;
mod host;
#[cfg(target_os = "linux")]
mod kernel;
mod ports;
mod probe;
mod render;
mod spool;
mod store;
mod tls;
mod upstream;

pub use check::{Check, Part, State, Verdict};

use crate::command::{Answer, ConfigSource, Failure, exit};
use crate::config::{Capture, Config};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::ffi::OsString;
use std::io;
use std::pin::Pin;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::time::{Instant, timeout_at};

/// By then the table is there. Most of it takes milliseconds, and seeing that a server does not drop an idle connection takes the four
/// seconds of `proxy.upstream_idle`; this is more than an upstream takes that answers each question at the last moment.
pub const LIMIT: Duration = Duration::from_secs(30);

/// How a table ends a script: both parts can run.
pub const EXIT_BOTH: u8 = 0;
/// The proxy can run, the kernel probe cannot.
pub const EXIT_PROXY_ONLY: u8 = 10;
/// The kernel probe can run, the proxy cannot.
pub const EXIT_TAP_ONLY: u8 = 11;
/// Neither can run.
pub const EXIT_NEITHER: u8 = 12;

/// What follows the options in `--help`.
const AFTER_HELP: &str = "\
Exit codes:
  0   the proxy and the tap (the kernel probe) can run
  10  the proxy can run, the tap cannot
  11  the tap can run, the proxy cannot
  12  neither can run
  78  the config cannot be used
A part counts as one that cannot run when it would not start, or would see nothing. Other problems stand in the table.

If an upstream asks for an API key (vllm serve --api-key), set VLLM_API_KEY: it is sent to the upstreams and shown nowhere.";

/// Options of `vllm-gateway doctor`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct DoctorArgs {
    /// Where the config comes from.
    #[command(flatten)]
    pub source: ConfigSource,
    /// How the result is written.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Send each upstream two requests of one token, to find the options that show only in answers (forced usage, details of prompt
    /// tokens, metrics of each request). Without this, no upstream's engine is used.
    #[arg(long)]
    pub probe_requests: bool,
}

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// One JSON object.
    Json,
}

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// One line each.
    pub checks: Vec<Check>,
    /// Whether the proxy can run.
    pub proxy: Verdict,
    /// Whether the kernel probe can run.
    pub tap: Verdict,
    /// The mode that the config asks for.
    pub capture: Capture,
    /// The mode that `capture: auto` would get here; `None` when nothing can run.
    pub auto_gets: Option<Capture>,
    /// See the constants.
    pub exit_code: u8,
}

impl Report {
    fn new(checks: Vec<Check>, capture: Capture) -> Report {
        let (proxy, tap) = (Verdict::of(Part::Proxy, &checks), Verdict::of(Part::Tap, &checks));
        // `auto` never does without the proxy: where that cannot run, a gateway with `auto` does not start.
        let (exit_code, auto_gets) = match (proxy.can_run, tap.can_run) {
            (true, true) => (EXIT_BOTH, Some(Capture::ProxyAndTap)),
            (true, false) => (EXIT_PROXY_ONLY, Some(Capture::Proxy)),
            (false, true) => (EXIT_TAP_ONLY, None),
            (false, false) => (EXIT_NEITHER, None),
        };
        Report {
            checks,
            proxy,
            tap,
            capture,
            auto_gets,
            exit_code,
        }
    }
}

/// What was found, as it is printed.
///
/// # Errors
/// A config that cannot be used, or a system that gives no threads.
pub fn run(arguments: &DoctorArgs, variable: fn(&str) -> Option<OsString>) -> Result<Answer, Failure> {
    let config = arguments.source.load(&variable)?;
    let report = examine(config, arguments.probe_requests, variable).map_err(|error| {
        let why = format!("expected threads to look with, found that the system gives none: {error}");
        Failure::new(why, exit::OS)
    })?;
    let text = match arguments.format {
        Format::Table => render::table(&report),
        Format::Json => render::json(&report),
    };
    Ok(Answer {
        code: report.exit_code,
        ..Answer::of(text)
    })
}

/// Looks at everything.
///
/// # Errors
/// When the system gives no threads.
pub fn examine(
    config: Config,
    probe_requests: bool,
    variable: fn(&str) -> Option<OsString>,
) -> io::Result<Report> {
    // First, since servers and files that are held open by the checks need it.
    let mut checks = host::checks(&config);
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    checks.extend(runtime.block_on(gather(groups(&config, probe_requests, variable))));
    // A check that hangs in the kernel, on a dead network file system say, must not hold the table.
    runtime.shutdown_background();
    Ok(Report::new(checks, config.capture))
}

/// Checks that belong together, on their way.
struct Group {
    name: String,
    checks: Pin<Box<dyn Future<Output = Vec<Check>> + Send>>,
}

impl Group {
    fn new(name: impl Into<String>, checks: impl Future<Output = Vec<Check>> + Send + 'static) -> Group {
        Group {
            name: name.into(),
            checks: Box::pin(checks),
        }
    }

    /// Checks that wait in the kernel.
    fn blocking(name: &'static str, checks: impl FnOnce() -> Vec<Check> + Send + 'static) -> Group {
        Group::new(name, async move {
            let looked = tokio::task::spawn_blocking(checks).await;
            looked.unwrap_or_else(|_| vec![broken(name)])
        })
    }
}

/// Everything that can wait, in the order of the table.
fn groups(config: &Config, probe_requests: bool, variable: fn(&str) -> Option<OsString>) -> Vec<Group> {
    let mut groups = Vec::new();
    #[cfg(target_os = "linux")]
    groups.push(Group::blocking("kernel", kernel::checks));
    let whole = config.clone();
    groups.push(Group::blocking("tap", move || probe::checks(&whole)));
    let (clients, admin) = (config.gateway.listen, config.admin.listen);
    groups.push(Group::blocking("ports", move || ports::checks(clients, admin)));
    for upstream in &config.upstreams {
        let asking = upstream::Asking {
            upstream: upstream.clone(),
            upstream_idle: config.proxy.upstream_idle,
            connect_limit: config.proxy.connect_timeout.min(upstream::CONNECT_LIMIT),
            probe_requests,
            api_key: upstream::api_key(variable),
        };
        groups.push(Group::new(asking.group(), upstream::checks(asking)));
    }
    let gateway = config.gateway.id_or_host_name();
    let (spool, nothing_kept) = (
        config.spool.clone(),
        config.store.url == crate::config::StoreUrl::None,
    );
    if !nothing_kept {
        groups.push(Group::blocking("spool", move || {
            spool::checks(&spool, gateway.as_str())
        }));
    }
    groups.push(Group::new("store", store::checks(config.store.clone(), variable)));
    groups
}

/// Runs all groups at once, and puts their checks in order.
async fn gather(groups: Vec<Group>) -> Vec<Check> {
    let deadline = Instant::now() + LIMIT;
    let running: Vec<_> = groups
        .into_iter()
        .map(|group| (group.name, tokio::spawn(group.checks)))
        .collect();
    let mut checks = Vec::new();
    for (name, group) in running {
        match timeout_at(deadline, group).await {
            Ok(Ok(found)) => checks.extend(found),
            Ok(Err(_)) => checks.push(broken(&name)),
            Err(_) => checks.push(
                Check::unknown(&name, "time", format!("no result within {} s", LIMIT.as_secs()))
                    .advise("something that was asked hangs: a network file system, a name server, or a server behind it"),
            ),
        }
    }
    checks
}

fn broken(group: &str) -> Check {
    Check::unknown(
        group,
        "check",
        "the check itself failed; what it printed stands above",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(stopped: &[Part]) -> Report {
        let checks = stopped
            .iter()
            .map(|part| Check::problem("g", "n", "f").stops(*part));
        Report::new(checks.collect(), Capture::Auto)
    }

    #[test]
    fn the_exit_code_says_which_parts_can_run() {
        for (stopped, code, auto_gets) in [
            (&[][..], 0, Some(Capture::ProxyAndTap)),
            (&[Part::Tap], 10, Some(Capture::Proxy)),
            (&[Part::Proxy], 11, None),
            (&[Part::Proxy, Part::Tap], 12, None),
        ] {
            let report = report(stopped);
            assert_eq!(
                (report.exit_code, report.auto_gets),
                (code, auto_gets),
                "{stopped:?}"
            );
        }
        for code in [
            EXIT_BOTH,
            EXIT_PROXY_ONLY,
            EXIT_TAP_ONLY,
            EXIT_NEITHER,
            exit::CONFIG,
        ] {
            assert!(
                AFTER_HELP.contains(&format!("\n  {code} ")),
                "{code} is not in --help"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_or_breaks_is_one_unknown_line_and_the_rest_is_there() {
        let checks = gather(vec![
            Group::new("slow", std::future::pending()),
            Group::new("broken", async { panic!("on purpose") }),
            Group::new("fine", async { vec![Check::ok("fine", "n", "f")] }),
        ])
        .await;
        let states: Vec<_> = checks
            .iter()
            .map(|check| (check.group.as_str(), check.state))
            .collect();
        assert_eq!(
            states,
            [
                ("slow", State::Unknown),
                ("broken", State::Unknown),
                ("fine", State::Ok)
            ]
        );
    }
}
