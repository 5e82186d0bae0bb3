//! The gateway's program: load the configuration, build, run until told to stop, drain.

use anyhow::Context;
use clap::Parser;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};
use tokio::runtime;
use vllm_gateway::bookkeeper::{self, job::Bookkeeper};
use vllm_gateway::cli::{self, Cli, Command};
use vllm_gateway::command::{self, Answer, ConfigSource, Failure, exit};
use vllm_gateway::config::Config;
use vllm_gateway::gateway::{self, Gateway};
use vllm_gateway::limits::account::BudgetKeeper;
use vllm_gateway::store::embedded;
use vllm_gateway::store::service::StoreService;
use vllm_gateway::trial::{self, TryArgs};
use vllm_gateway::{calibrate, descriptors, doctor, log, report, stop, tap};

/// A request takes some dozens of small pieces of memory on either capture path, and musl's own allocator, which static builds would have, makes one
/// thread wait for the other.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of `mimalloc.h`, which the crate has no name for: milliseconds until what was freed goes back to the system.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn main() -> anyhow::Result<ExitCode> {
    // At once: for 10 ms, the default, so much passes that what is kept meanwhile would be half of all memory.
    // SAFETY: any number is an option or ignored, and it may be set at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 0) };
    match Cli::parse().command {
        Command::Run(source) => run(&source),
        Command::Try(arguments) => try_out(&arguments),
        Command::CheckConfig(source) => end(cli::check_config(&source, &environment)),
        Command::Report(arguments) => wait_for(report::run(&arguments, &environment)),
        Command::Calibrate(arguments) => wait_for(calibrate::run(&arguments, &environment)),
        Command::Ledger(arguments) => wait_for(bookkeeper::command::run(&arguments, &environment)),
        Command::Doctor(arguments) => end(doctor::run(&arguments, environment)),
        Command::EmbeddedClickhouse(arguments) => {
            log::start(&Config::default().log);
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
fn wait_for(command: impl Future<Output = Result<Answer, Failure>>) -> anyhow::Result<ExitCode> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    end(runtime.block_on(command))
}

fn end(done: Result<Answer, Failure>) -> anyhow::Result<ExitCode> {
    let code = command::end(done, &mut io::stdout(), &mut io::stderr())?;
    Ok(ExitCode::from(code))
}

fn run(source: &ConfigSource) -> anyhow::Result<ExitCode> {
    match source.load(&environment) {
        Ok(config) => serve(config, |_| {}),
        Err(error) => {
            eprintln!("{error}");
            Ok(ExitCode::from(exit::CONFIG))
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
    log::start(&config.log);
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
            return Ok(ExitCode::from(exit::CONFIG));
        }
    };
    descriptors::raise_for(config.proxy.max_connections);
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
    let budgets = BudgetKeeper::of(gateway.config(), gateway.limiter(), store.as_ref());
    let clients = gateway.client_addr().map(|addr| addr.to_string());
    let admin = gateway.admin_addr();
    gateway.runtime()?.block_on(async {
        let stop = stop::to_drain().context("SIGTERM and SIGINT cannot be caught")?;
        tracing::info!(%capture, clients, %admin, upstreams = upstreams.join(", "), "gateway is up");
        up(&gateway);
        let storing = store.map(|store| store.start(program, environment));
        let bookkeeping = bookkeeper.map(Bookkeeper::start);
        let keeping = budgets.map(BudgetKeeper::start);
        let cut_off = gateway.run(stop).await?;
        if let Some(keeping) = keeping {
            keeping.finish();
        }
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

fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}
