//! The gateway's side: starts the process, passes its messages on, restarts it when it dies, ends it with the gateway.

use super::library::{LibraryError, find_library};
use super::official;
use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// The first wait before a restart; each further one is twice as long.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);

/// The longest. The spool holds what is not stored meanwhile.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Who has run so long starts anew with the first wait.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// For the process to end by itself, which takes it up to ten seconds of its own.
const END_LIMIT: Duration = Duration::from_secs(12);

/// A longer line of the process's messages is cut there: a query can be in it.
const LINE_MAX_BYTES: usize = 2000;

/// How to run the process.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// The program; `std::env::current_exe()` in the gateway.
    pub program: PathBuf,
    /// Where it is to listen. With port 0, the port of the first start is kept.
    pub listen: SocketAddr,
    /// Its data.
    pub data_dir: PathBuf,
    /// The engine's library, when it is not to be looked for.
    pub libchdb: Option<PathBuf>,
    /// The user that it lets in; `None`: `default`.
    pub user: Option<String>,
    /// That user's password; `None`: none.
    pub password: Option<crate::config::Secret>,
}

/// Why there is no embedded ClickHouse.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Nothing to run.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// It was stopped.
    #[error("the embedded ClickHouse has been stopped")]
    Stopped,
    /// It did not come up in time.
    #[error("the embedded ClickHouse is not up after {0:?}; its messages are in the log")]
    Late(Duration),
}

/// What is known of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EmbeddedState {
    /// Where it listens, while it runs.
    pub address: Option<SocketAddr>,
    /// Its process id, while it runs.
    pub process: Option<u32>,
    /// How often it was started again.
    pub restarts: u64,
}

/// The process, kept alive until this is stopped or dropped.
#[derive(Debug)]
pub struct EmbeddedServer {
    state: watch::Receiver<EmbeddedState>,
    stop: watch::Sender<bool>,
    keeper: JoinHandle<()>,
}

impl EmbeddedServer {
    /// Starts the process, and a task that keeps it alive. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When there is no engine to run, which no restart would change.
    pub fn spawn(
        options: EmbeddedOptions,
        variable: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<EmbeddedServer, EmbeddedError> {
        if official::find_program(variable("PATH")).is_none() {
            find_library(options.libchdb.as_deref(), variable)?;
        }
        let (sender, state) = watch::channel(EmbeddedState::default());
        let (stop, stopped) = watch::channel(false);
        let keeper = tokio::spawn(keep_alive(options, sender, stopped));
        Ok(EmbeddedServer { state, stop, keeper })
    }

    /// Its state, to watch.
    pub fn state(&self) -> watch::Receiver<EmbeddedState> {
        self.state.clone()
    }

    /// Waits until it listens.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub async fn ready(&self, limit: Duration) -> Result<SocketAddr, EmbeddedError> {
        let mut state = self.state();
        let up = async {
            let state = state
                .wait_for(|state| state.address.is_some())
                .await
                .map_err(|_| EmbeddedError::Stopped)?;
            state.address.ok_or(EmbeddedError::Stopped)
        };
        timeout(limit, up).await.map_err(|_| EmbeddedError::Late(limit))?
    }

    /// Ends the process: queries in progress come to their end, then it goes.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.keeper.await;
    }
}

/// Starts the process again and again.
async fn keep_alive(
    mut options: EmbeddedOptions,
    state: watch::Sender<EmbeddedState>,
    mut stop: watch::Receiver<bool>,
) {
    let mut backoff = BACKOFF_FIRST;
    loop {
        let started = Instant::now();
        match start(&options) {
            Ok(child) => {
                let ended = attend(child, &mut options, &state, &mut stop).await;
                state.send_modify(|state| (state.address, state.process) = (None, None));
                let Some(ended) = ended else { return };
                let status = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
                tracing::error!(status, "the embedded ClickHouse has ended; it is started again");
            }
            Err(error) => {
                tracing::error!(%error, program = %options.program.display(), "the embedded ClickHouse cannot be started")
            }
        }
        if started.elapsed() > HEALTHY_AFTER {
            backoff = BACKOFF_FIRST;
        }
        tokio::select! {
            () = sleep(backoff) => {}
            // Whoever dropped the server's handle wants no process either.
            _ = stop.wait_for(|stop| *stop) => return,
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
        state.send_modify(|state| state.restarts += 1);
    }
}

fn start(options: &EmbeddedOptions) -> io::Result<Child> {
    let mut command = Command::new(&options.program);
    command.arg("embedded-clickhouse").arg("--exit-with-stdin");
    command.arg("--listen").arg(options.listen.to_string());
    command.arg("--data-dir").arg(&options.data_dir);
    if let Some(library) = &options.libchdb {
        command.arg("--library").arg(library);
    }
    let password = options.password.as_ref().map_or("", |password| password.expose());
    command
        .env("CLICKHOUSE_USERNAME", options.user.as_deref().unwrap_or_default())
        .env("CLICKHOUSE_PASSWORD", password);
    // Our end of its standard input closes with this process, however that ends; a signal at the parent's death would
    // come at the death of the thread that started it, which in a runtime is no sign of anything.
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // A group of its own: Ctrl-C in a terminal is for the gateway, which ends it after the last insert.
    command.process_group(0).kill_on_drop(true).spawn()
}

/// Stays with the process until it ends by itself, or is told to stop (`None`).
async fn attend(
    mut child: Child,
    options: &mut EmbeddedOptions,
    state: &watch::Sender<EmbeddedState>,
    stop: &mut watch::Receiver<bool>,
) -> Option<io::Result<ExitStatus>> {
    state.send_modify(|state| state.process = child.id());
    let stdin = child.stdin.take();
    let messages = child.stderr.take().map(|stderr| tokio::spawn(pass_on(stderr)));
    let mut said = child.stdout.take().map(|stdout| BufReader::new(stdout).lines());
    let ended = loop {
        let line = async {
            match &mut said {
                Some(lines) => lines.next_line().await.ok().flatten(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = child.wait() => break Some(ended),
            _ = stop.wait_for(|stop| *stop) => break None,
            line = line => match line {
                Some(line) => announced(&line, options, state),
                None => said = None,
            },
        }
    };
    drop(stdin);
    if ended.is_none() && timeout(END_LIMIT, child.wait()).await.is_err() {
        tracing::warn!(
            "the embedded ClickHouse does not end, and is killed; nothing that it acknowledged is lost"
        );
        let _ = child.kill().await;
    }
    if let Some(messages) = messages {
        // Its last words. A grandchild could hold the pipe open.
        let _ = timeout(Duration::from_secs(1), messages).await;
    }
    ended
}

fn announced(line: &str, options: &mut EmbeddedOptions, state: &watch::Sender<EmbeddedState>) {
    let address = line
        .strip_prefix("listening on http://")
        .and_then(|address| address.parse().ok());
    match address {
        Some(address) => {
            // Clients know this one: a restart comes back to it.
            options.listen = address;
            state.send_modify(|state| state.address = Some(address));
            tracing::info!(%address, data_dir = %options.data_dir.display(), "the embedded ClickHouse is up");
        }
        None => tracing::info!(target: "embedded_clickhouse", "{line}"),
    }
}

/// Writes the process's messages to our log.
async fn pass_on(stderr: impl AsyncRead + Unpin) {
    let mut lines = BufReader::new(stderr).split(b'\n');
    while let Ok(Some(mut line)) = lines.next_segment().await {
        line.truncate(LINE_MAX_BYTES);
        let text = String::from_utf8_lossy(&line);
        tracing::warn!(target: "embedded_clickhouse", "{}", text.trim_end());
    }
}
