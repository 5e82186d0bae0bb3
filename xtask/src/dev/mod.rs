//! `cargo xtask dev`: the whole system on one machine, with simulators in place of GPUs, or with vLLM on a Mac's own ([`metal`]).
//!
//! Builds the programs, starts them in order, each when the one before is ready, shows what each team got, and takes everything
//! down again at Ctrl-C, after `--for`, or when a process dies. What stays is a directory in Cargo's target directory: `dev`, or
//! `dev-<port base>`, with a log for each process, the spool, Prometheus's data, and the configuration: the repository's, with a budget and limits for each
//! team that its traffic keeps to, and a team `tight` that is refused after three requests a minute.

pub mod children;
mod duration;
mod metal;
mod ports;
mod prometheus;
mod report;
mod services;
mod state;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use rustix::process::{Pid, Signal, kill_process};

use self::children::{Children, Interrupt, Service, Waited};
use self::metal::Metal;
use self::ports::{BASES, Ports, USUAL_BASE};
use self::services::Plan;
use self::state::{Claim, Entry, StateDir};
use crate::{clickhouse, http, stage, tools};

/// When the first report comes: the percentiles of three hundred requests mean something.
const FIRST_REPORT_AFTER: Duration = Duration::from_secs(20);

/// How often one comes then; it should not scroll everything else away.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// How long `stop` waits: the gateway's grace as shipped, 30 s, that of all others, and something for a busy machine.
const STOP_WITHIN: Duration = Duration::from_secs(90);

/// How often `stop` looks.
const STOP_TICK: Duration = Duration::from_millis(100);

/// The share of the requests that go past the gateway with `--tap`.
const DIRECT_SHARE: f64 = 0.25;

/// What to run, and how.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    action: Option<Action>,
    /// Build and run the optimised programs.
    #[arg(long)]
    release: bool,
    /// Run so long, such as 30s or 5m, then stop [default: until Ctrl-C].
    #[arg(long = "for", value_name = "TIME", value_parser = duration::parse)]
    run_for: Option<Duration>,
    /// Requests a second.
    #[arg(long, value_name = "R", default_value_t = 15.0, value_parser = parse_rate)]
    rate: f64,
    /// Have the gateway watch from the kernel too (as root), and send a quarter of the requests past it, straight to the simulator.
    #[arg(long)]
    tap: bool,
    /// On a Mac with Apple Silicon: run vLLM on its GPU in place of the simulators (installed once, some gigabytes), and no load.
    #[arg(long, conflicts_with_all = ["tap", "rate"])]
    metal: bool,
    /// Run without Prometheus.
    #[arg(long)]
    no_prometheus: bool,
    /// Run the programs as they were built before.
    #[arg(long)]
    no_build: bool,
    #[command(flatten)]
    place: Place,
}

/// Which system is meant, if there are several.
#[derive(Clone, Copy, Debug, Args)]
struct Place {
    /// The first port; all others keep their distance from it: with 9000 the gateway is at 9080.
    #[arg(long, value_name = "PORT", default_value_t = USUAL_BASE, value_parser = clap::value_parser!(u16).range(BASES))]
    port_base: u16,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Stop what runs in another terminal or in the background.
    Stop(Place),
    /// Say what runs where; exit code 1 if nothing does.
    Status(Place),
    /// Show the end of the logs, of what runs or ran last.
    Logs {
        /// Only this one's, such as `gateway`.
        name: Option<String>,
        /// How many lines of each.
        #[arg(long, default_value_t = 20)]
        lines: usize,
        #[command(flatten)]
        place: Place,
    },
}

/// Does what the options say.
///
/// # Errors
/// Among others when a process dies.
pub fn run(root: &Path, options: &Options) -> Result<()> {
    let target = target_directory()?;
    let state = |place: &Place| StateDir::of(&target, Ports::from_base(place.port_base));
    match &options.action {
        None => up(root, options, &target, &state(&options.place)),
        Some(Action::Stop(place)) => stop(&state(place)),
        Some(Action::Status(place)) => status(&state(place)),
        Some(Action::Logs { name, lines, place }) => logs(&state(place), name.as_deref(), *lines),
    }
}

/// Where Cargo builds: this program stands in a directory of it that is named after the profile.
pub fn target_directory() -> Result<PathBuf> {
    let xtask = env::current_exe().context("cannot tell where this program stands")?;
    let target = xtask.parent().and_then(Path::parent);
    target
        .map(Path::to_owned)
        .with_context(|| format!("{} stands in no target directory", xtask.display()))
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text
        .parse()
        .ok()
        .filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| format!("expected requests a second, above 0, found `{text}`"))
}

fn up(root: &Path, options: &Options, target: &Path, state: &StateDir) -> Result<()> {
    let claim = state.claim()?;
    if options.metal {
        metal::ensure_machine()?;
    }
    let ports = Ports::from_base(options.place.port_base);
    let with_prometheus = !options.no_prometheus && tools::has_prometheus();
    ports.ensure_free(with_prometheus)?;
    let metal = options.metal.then(Metal::set_up).transpose()?;
    let programs = target.join(if options.release { "release" } else { "debug" });
    if !options.no_build {
        build(root, options.release)?;
    }
    let engine = clickhouse::get();
    if let Err(error) = &engine {
        println!("ClickHouse's engine could not be fetched, so rows will wait in the spool: {error:#}");
    }
    let plan = Plan {
        root,
        programs: &programs,
        state,
        ports,
        capture: match &metal {
            // There is no other on macOS.
            Some(_) => Some("proxy"),
            None => options.tap.then_some("proxy+tap"),
        },
        rate_per_s: options.rate,
    };
    let interrupt = Interrupt::catch()?;
    let mut children = Children::new(state.clone(), interrupt);
    let mut services = match &metal {
        Some(metal) => plan.vllm(metal),
        None => vec![plan.sim_llm(), plan.sim_embed()],
    };
    services.push(plan.gateway()?);
    if with_prometheus {
        services.push(plan.prometheus()?);
    }
    // Whoever names a ClickHouse of their own may have it anywhere, up or not.
    let stores = engine.is_ok() && env::var_os("CLICKHOUSE_URL").is_none();
    if let Some(metal) = &metal {
        println!(
            "waiting for vLLM, which downloads its models first; `scripts/dev.sh logs` elsewhere shows what it does"
        );
        println!("{}", an_example(ports.gateway(), metal.chat_model()));
    } else if options.tap {
        services.push(plan.load(options.rate * (1.0 - DIRECT_SHARE), stores));
        services.push(plan.direct_load(options.rate * DIRECT_SHARE));
    } else {
        services.push(plan.load(options.rate, stores));
    }
    let ended = attend(&mut children, services, &claim, &plan, options.run_for);
    println!();
    // First of all they must be gone; but why they had to go matters more than how.
    let stopped = children.stop();
    ended.and(stopped)
}

/// A first request, where nobody else sends any.
fn an_example(port: u16, model: &str) -> String {
    let body = serde_json::json!({"model": model, "messages": [{"role": "user", "content": "Hello"}]});
    format!(
        "then:    curl http://127.0.0.1:{port}/v1/chat/completions -H 'X-Team-ID: me' -H 'Content-Type: application/json' -d '{body}'"
    )
}

fn build(root: &Path, release: bool) -> Result<()> {
    let mut command = stage::cargo(root);
    command.args(["build", "--locked", "--package", "gateway-user", "--bins"]);
    if release {
        command.arg("--release");
    }
    // Signals are not caught yet: `stop` ends this process at once, and Cargo should not go on for nobody.
    children::die_with_parent(&mut command);
    let started = Instant::now();
    stage::run(&mut command)?;
    println!("built in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Starts everything and stays until it is to end.
fn attend(
    children: &mut Children,
    services: Vec<Service>,
    claim: &Claim,
    plan: &Plan<'_>,
    run_for: Option<Duration>,
) -> Result<()> {
    let started = Instant::now();
    for service in services {
        children.start(service)?;
        claim.write(&children.entries())?;
        if children.wait_until_ready()? == Waited::Interrupted {
            return Ok(());
        }
    }
    let up = Instant::now();
    println!("everything is up after {:.1} s\n", (up - started).as_secs_f64());
    show(&children.entries(), claim.state(), plan.ports);
    println!("{}", capture_line(&http::get(plan.ports.admin(), "/metrics")?));
    let end = run_for.map(|run_for| up + run_for);
    let mut next = up + FIRST_REPORT_AFTER;
    loop {
        let until = end.map_or(next, |end| end.min(next));
        if children.wait_until(Some(until))? == Waited::Interrupted {
            return Ok(());
        }
        let report = report::of_last(started.elapsed(), plan.report())?;
        println!("\nafter {:.0} s:\n{report}", up.elapsed().as_secs_f64());
        if end.is_some_and(|end| until >= end) {
            return Ok(());
        }
        next += REPORT_EVERY;
    }
}

/// What the gateway says of where it sees requests.
fn capture_line(metrics: &str) -> String {
    let mode = metrics.lines().find_map(|line| {
        line.strip_prefix("gateway_capture_info{mode=\"")?
            .split('"')
            .next()
    });
    match mode {
        Some("proxy") => {
            "capture: proxy (no kernel probe here: the first lines of the gateway's log say why)".to_owned()
        }
        Some(mode) => format!("capture: {mode}"),
        None => "capture: unknown".to_owned(),
    }
}

fn show(entries: &[Entry], state: &StateDir, ports: Ports) {
    print!("{}", table(entries, state));
    let admin = format!("http://127.0.0.1:{}", ports.admin());
    println!(
        "\nrows:    curl 'http://127.0.0.1:{}/?query=SELECT+*+FROM+vllm_attribution.request_events+LIMIT+3+FORMAT+Vertical'",
        ports.clickhouse()
    );
    println!("console: {admin}/");
    println!("metrics: {admin}/metrics   Ctrl-C, or `cargo xtask dev stop` elsewhere, ends all of it");
}

fn table(entries: &[Entry], state: &StateDir) -> String {
    let mut text = format!("{:<12}{:<26}{:>9}  {}\n", "name", "URL", "pid", "log");
    for Entry { name, pid, url } in entries {
        let url = if url.is_empty() { "-" } else { url };
        let log = state.log_of(name);
        text += &format!("{name:<12}{url:<26}{pid:>9}  {}\n", log.display());
    }
    text
}

fn stop(state: &StateDir) -> Result<()> {
    let Some(entries) = state.running()? else {
        println!("nothing runs");
        return Ok(());
    };
    let pid = state::supervisor(&entries)
        .and_then(Pid::from_raw)
        .context("the file of process ids names no supervisor: end it by hand")?;
    kill_process(pid, Signal::TERM).with_context(|| format!("cannot stop process {pid:?}"))?;
    let deadline = Instant::now() + STOP_WITHIN;
    while state.running()?.is_some() {
        ensure!(
            Instant::now() < deadline,
            "process {pid:?} has not ended within {} s",
            STOP_WITHIN.as_secs()
        );
        thread::sleep(STOP_TICK);
    }
    println!("stopped");
    Ok(())
}

fn status(state: &StateDir) -> Result<()> {
    let Some(entries) = state.running()? else {
        bail!("nothing runs: `cargo xtask dev` starts it");
    };
    print!("{}", table(&entries[1..], state));
    Ok(())
}

fn logs(state: &StateDir, name: Option<&str>, lines: usize) -> Result<()> {
    let mut found = state.logs()?;
    found.retain(|(log, _)| name.is_none_or(|name| log == name));
    ensure!(
        !found.is_empty(),
        "there is no such log; `cargo xtask dev` writes them"
    );
    for (name, path) in found {
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&bytes);
        println!("── {name}: {}\n{}", path.display(), children::tail(&text, lines));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(words: &[&str]) -> Result<Options, clap::Error> {
        let line = Line::try_parse_from([&["dev"], words].concat())?;
        Ok(line.options)
    }

    #[test]
    fn the_command_line_is_understood() {
        let options = parse(&["--for", "30s", "--rate", "2.5", "--port-base", "20000"]).expect("options");
        assert_eq!(
            (options.run_for, options.rate),
            (Some(Duration::from_secs(30)), 2.5)
        );
        assert!(options.action.is_none() && options.place.port_base == 20_000);
        let options = parse(&["stop", "--port-base", "9000"]).expect("options");
        assert!(matches!(
            options.action,
            Some(Action::Stop(Place { port_base: 9000 }))
        ));
        for wrong in [
            &["--rate", "0"][..],
            &["--for", "30"],
            &["--port-base", "80"],
            &["--port-base", "65000"],
            &["--rate", "2", "stop"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_mode_is_what_the_gateway_says() {
        let metrics = "# HELP gateway_capture_info x\ngateway_capture_info{mode=\"proxy+tap\"} 1\n";
        assert_eq!(capture_line(metrics), "capture: proxy+tap");
        assert!(capture_line("gateway_capture_info{mode=\"proxy\"} 1\n").contains("log"));
        assert_eq!(capture_line(""), "capture: unknown");
    }

    #[test]
    fn the_table_names_what_runs_where() {
        let state = StateDir::of(Path::new("t"), Ports::from_base(8000));
        let load = Entry {
            name: "load".to_owned(),
            pid: 12,
            url: String::new(),
        };
        let text = table(&[load], &state);
        let row: Vec<_> = text.lines().nth(1).expect("a row").split_whitespace().collect();
        assert_eq!(row, ["load", "-", "12", "t/dev/load.log"]);
    }
}
