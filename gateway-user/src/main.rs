//! The gateway's program: load the configuration, build, run until told to stop, drain.

use anyhow::Context;
use clap::Parser;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use vllm_gateway::bookkeeper::{self, job::Bookkeeper};
use vllm_gateway::cli::{self, Cli, Command, ConfigSource};
use vllm_gateway::config::{Config, EXIT_CONFIG, LogConfig, LogFormat};
use vllm_gateway::gateway::{self, Gateway};
use vllm_gateway::store::embedded;
use vllm_gateway::store::service::StoreService;
use vllm_gateway::trial::{self, TryArgs};
use vllm_gateway::{calibrate, descriptors, doctor, report, tap};

fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse().command {
        Command::Run(source) => run(&source),
        Command::Try(arguments) => try_out(&arguments),
        Command::CheckConfig(source) => {
            let code = cli::check_config(&source, &environment, &mut io::stdout(), &mut io::stderr())?;
            Ok(ExitCode::from(code))
        }
        Command::Report(arguments) => {
            let (mut out, mut err) = (io::stdout(), io::stderr());
            wait_for(report::run(&arguments, &environment, &mut out, &mut err))
        }
        Command::Calibrate(arguments) => {
            let (mut out, mut err) = (io::stdout(), io::stderr());
            wait_for(calibrate::run(&arguments, &environment, &mut out, &mut err))
        }
        Command::Ledger(arguments) => {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let (mut out, mut err) = (io::stdout(), io::stderr());
            let done = bookkeeper::command::run(&arguments, &environment, &mut out, &mut err);
            Ok(ExitCode::from(runtime.block_on(done)?))
        }
        Command::Doctor(arguments) => {
            let code = doctor::run(&arguments, environment, &mut io::stdout(), &mut io::stderr())?;
            Ok(ExitCode::from(code))
        }
        Command::EmbeddedClickhouse(arguments) => {
            start_log(&Config::default().log);
            embedded::run(&arguments, &environment)
        }
        #[cfg(target_os = "linux")]
        Command::TapAttacher => {
            vllm_gateway::tap::attacher::serve().context("the kernel probe cannot be attached for anyone")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Waits for a command that asks ClickHouse.
fn wait_for(command: impl Future<Output = io::Result<u8>>) -> anyhow::Result<ExitCode> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(ExitCode::from(runtime.block_on(command)?))
}

fn run(source: &ConfigSource) -> anyhow::Result<ExitCode> {
    match source.load(&environment) {
        Ok(config) => serve(config, |_| {}),
        Err(error) => {
            eprintln!("{error}");
            Ok(ExitCode::from(EXIT_CONFIG))
        }
    }
}

fn try_out(arguments: &TryArgs) -> anyhow::Result<ExitCode> {
    let config = arguments.config()?;
    arguments.check_addresses()?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let found = runtime.block_on(arguments.look(environment))?;
    drop(runtime);
    serve(config, |gateway| {
        let admin = gateway.admin_addr();
        if let Some(clients) = gateway.client_addr() {
            // Whoever has stopped reading has read enough; the gateway goes on.
            let _ = writeln!(io::stdout(), "{}", trial::welcome(&found, clients, admin));
        }
        tracing::info!(
            "requests without a team are taken for one named after their API key; nothing is stored"
        );
    })
}

/// Runs a gateway with this configuration; `up` is told once it takes connections.
fn serve(mut config: Config, up: impl FnOnce(&Gateway)) -> anyhow::Result<ExitCode> {
    start_log(&config.log);
    let listeners = gateway::bind_for_clients(&config)?;
    let program = std::env::current_exe().context("the program's own file is not known")?;
    let mut helper = process::Command::new(&program);
    // Ctrl-C is meant for the gateway, which still needs the probe while it drains.
    helper.arg("tap-attacher").process_group(0);
    // After that, since binding may take a privilege too, and before any thread is started: what is given up then, all threads must have.
    let source = match tap::open(&mut config, helper) {
        Ok(source) => source,
        Err(error) => {
            eprintln!("capture: {}: {error}", config.capture);
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
    };
    raise_descriptor_limit(config.proxy.max_connections);
    let upstreams: Vec<String> = config
        .upstreams
        .iter()
        .map(|upstream| format!("{} at {}", upstream.name, upstream.url))
        .collect();
    let store = StoreService::open(&config)?;
    let outlets = store.as_ref().map(StoreService::outlets).unwrap_or_default();
    let bookkeeper = Bookkeeper::of(&config);
    let capture = config.capture;
    let gateway = Gateway::build(config, listeners, outlets, source)?;
    if let Some(store) = &store {
        gateway.show_store(store.counts())?;
    }
    if let Some(bookkeeper) = &bookkeeper {
        gateway.show_ledger(bookkeeper.stats())?;
    }
    let clients = gateway.client_addr().map(|addr| addr.to_string());
    let admin = gateway.admin_addr();
    gateway.runtime()?.block_on(async {
        let stop = stop_signal()?;
        tracing::info!(%capture, clients, %admin, upstreams = upstreams.join(", "), "gateway is up");
        up(&gateway);
        let storing = store.map(|store| store.start(program, environment));
        let bookkeeping = bookkeeper.map(Bookkeeper::start);
        let cut_off = gateway.run(stop).await?;
        if let Some(bookkeeping) = bookkeeping {
            bookkeeping.finish().await;
        }
        if let Some(storing) = storing {
            storing.finish().await;
        }
        tracing::info!(cut_off, "gateway has drained");
        Ok(ExitCode::SUCCESS)
    })
}

/// Says what the system allows: with too few descriptors, clients would wait where `max_connections` says they need not.
fn raise_descriptor_limit(max_connections: u32) {
    let Some(available) = descriptors::raise_limit() else {
        return;
    };
    let clients = descriptors::clients_within(available);
    if clients < u64::from(max_connections) {
        tracing::warn!(
            descriptors = available,
            clients,
            max_connections,
            "the limit on open files serves fewer clients than proxy.max_connections; raise it (ulimit -Hn, LimitNOFILE) or lower that"
        );
    } else {
        tracing::info!(descriptors = available, "open files and sockets are limited");
    }
}

fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// Logs go to standard error; `RUST_LOG` overrides the configured level.
fn start_log(config: &LogConfig) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(config.level.as_str()));
    let colours = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(colours);
    match config.format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Done at the first SIGTERM or SIGINT. A second one ends the process at once, for a user who will not wait.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("draining: requests in flight may end, new connections are refused");
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            process::exit(130);
        });
    })
}
