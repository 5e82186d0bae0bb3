//! When a program is told to stop.

use std::{io, process};

use tokio::signal::unix::{SignalKind, signal};

/// How a shell sees a program that Ctrl-C has ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Done at the next SIGTERM or SIGINT. From the call on, neither ends the process by itself.
///
/// # Errors
/// When the system lets no signals be caught.
///
/// # Panics
/// Outside a runtime.
pub fn signalled() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Done at the first signal, for a program that drains then. A second one ends it at once, for a user who will not wait.
///
/// # Errors
/// As those of [`signalled`].
pub fn to_drain() -> io::Result<impl Future<Output = ()>> {
    let first = signalled()?;
    Ok(async move {
        first.await;
        tracing::info!("draining: requests in flight may end, new connections are refused");
        match signalled() {
            Ok(second) => {
                tokio::spawn(async move {
                    second.await;
                    process::exit(EXIT_INTERRUPTED);
                });
            }
            Err(error) => tracing::warn!(%error, "a second signal will not end the program at once"),
        }
    })
}
