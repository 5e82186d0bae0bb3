//! The process: locks the data directory, chooses the engine, listens, and ends with its parent.

use super::engine::{Engine, StartError};
use super::execute::{Executor, INSERTS_MAX, READS_MAX};
use super::library::{LibraryError, find_library};
use super::lock::{DirectoryLock, LockError};
use super::official;
use super::server::{Credentials, HttpFace};
use crate::stop;
use anyhow::Context;
use clap::Args;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Threads that move bytes between sockets, files and queries. Queries have threads of their own.
const WORKERS: usize = 2;

/// For threads of queries that have no reader any more.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);

/// Options of `vllm-gateway embedded-clickhouse`.
#[derive(Debug, Args)]
pub struct EmbeddedArgs {
    /// Where ClickHouse's HTTP interface listens; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8123")]
    pub listen: SocketAddr,
    /// Where the tables are kept. One process at a time has it.
    #[arg(long, value_name = "DIRECTORY")]
    pub data_dir: PathBuf,
    /// The engine's library. Default: $CHDB_LIBRARY, the cache of `cargo xtask get-clickhouse`, or beside the program.
    #[arg(long = "library", value_name = "FILE")]
    pub libchdb: Option<PathBuf>,
    /// End when standard input does: how a child learns that its parent has died, however it died.
    #[arg(long)]
    pub exit_with_stdin: bool,
}

/// The process cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No library.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// No data directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// No engine.
    #[error(transparent)]
    Engine(#[from] StartError),
    /// A name that the engine would take for a pattern.
    #[error(
        "the data directory {0} has one of *?{{}} in its name, which ClickHouse takes for a pattern: choose another"
    )]
    Pattern(PathBuf),
}

/// Runs the process until SIGTERM, SIGINT or, if asked, the end of standard input. The first line on standard output says where it
/// listens. User and password come from the variables `CLICKHOUSE_USERNAME` and `CLICKHOUSE_PASSWORD`, so that no list of processes shows them.
///
/// # Errors
/// When it cannot start.
pub fn run(
    arguments: &EmbeddedArgs,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> anyhow::Result<ExitCode> {
    let text = |name| {
        variable(name)
            .and_then(|value| value.into_string().ok())
            .filter(|value| !value.is_empty())
    };
    let credentials = Credentials {
        user: text("CLICKHOUSE_USERNAME").unwrap_or_else(|| "default".into()),
        password: text("CLICKHOUSE_PASSWORD").unwrap_or_default(),
    };
    let data_dir = std::path::absolute(&arguments.data_dir)?;
    if data_dir.to_string_lossy().contains(['*', '?', '{', '}']) {
        return Err(CommandError::Pattern(data_dir).into());
    }
    let lock = DirectoryLock::take(&data_dir).map_err(CommandError::Lock)?;
    let engine_dir = data_dir.join("chdb");
    // A directory that one engine has begun stays with it: else installing a program would make a year of bills vanish.
    let official = if engine_dir.exists() {
        None
    } else {
        official::find_program(variable("PATH"))
    };
    let listener = TcpListener::bind(arguments.listen)
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(READS_MAX + INSERTS_MAX + WORKERS * 2)
        .enable_all()
        .build()?;
    let stop = stop_signal(&runtime, arguments.exit_with_stdin)?;
    match official {
        Some(program) => {
            // The server binds the port itself.
            drop(listener);
            run_official(
                &runtime,
                &program,
                &data_dir.join("server"),
                address,
                &credentials,
                stop,
            )?;
        }
        None => {
            let library =
                find_library(arguments.libchdb.as_deref(), variable).map_err(CommandError::Library)?;
            run_chdb(&runtime, &library, &data_dir, listener, credentials, stop)?;
        }
    }
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    drop(lock);
    Ok(ExitCode::SUCCESS)
}

fn run_chdb(
    runtime: &Runtime,
    library: &Path,
    data_dir: &Path,
    listener: TcpListener,
    credentials: Credentials,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let engine = Engine::open(library, &data_dir.join("chdb")).map_err(CommandError::Engine)?;
    let executor = Executor::new(engine, &data_dir.join("uploads"))?;
    let face = HttpFace::new(executor, credentials);
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        announce(address)?;
        face.serve(listener, stop).await;
        Ok(())
    })
}

/// Tells the parent where to connect.
fn announce(address: SocketAddr) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "listening on http://{address}")?;
    out.flush()
}

/// Runs `clickhouse server` until `stop`, then ends it.
fn run_official(
    runtime: &Runtime,
    program: &Path,
    directory: &Path,
    address: SocketAddr,
    credentials: &Credentials,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut command = official::server_command(program, directory, address, credentials)?;
    command.kill_on_drop(true).stdin(std::process::Stdio::null());
    tracing::info!(program = %program.display(), "ClickHouse is installed: its server is used");
    runtime.block_on(async move {
        let mut server = command
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let ready = tokio::select! {
            ended = server.wait() => anyhow::bail!("clickhouse server ended at its start: {}", ended?),
            ready = answers(address) => ready,
            _ = stop.wait_for(|stop| *stop) => false,
        };
        if ready {
            announce(address)?;
        }
        tokio::select! {
            ended = server.wait() => anyhow::bail!("clickhouse server ended: {}", ended?),
            _ = stop.wait_for(|stop| *stop) => {}
        }
        // What it has acknowledged is in the page cache; a kill loses none of it.
        server.kill().await.context("clickhouse server cannot be ended")
    })
}

/// Waits until someone accepts connections.
async fn answers(address: SocketAddr) -> bool {
    /// Often enough not to be felt beside a start of seconds.
    const PERIOD: Duration = Duration::from_millis(50);
    while tokio::net::TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(PERIOD).await;
    }
    true
}

/// Becomes true at a signal or, if asked, at the end of standard input.
fn stop_signal(runtime: &Runtime, with_stdin: bool) -> io::Result<watch::Receiver<bool>> {
    let (end, ended) = watch::channel(false);
    let from_stdin = end.clone();
    if with_stdin {
        // A thread of its own: a read from a terminal or pipe blocks, and must not hold up the runtime's end.
        std::thread::Builder::new().name("parent".into()).spawn(move || {
            let _ = io::stdin().lock().read_to_end(&mut Vec::new());
            let _ = from_stdin.send(true);
        })?;
    }
    let _entered = runtime.enter();
    let signalled = stop::signalled()?;
    runtime.spawn(async move {
        signalled.await;
        let _ = end.send(true);
    });
    Ok(ended)
}
