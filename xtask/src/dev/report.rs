//! What each team got, as the gateway's own `report` command tells it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

/// The report on the last `past`, or why there is none: without ClickHouse rows wait in the spool, and all else works.
///
/// # Errors
/// When the program does not run.
pub fn of_last(past: Duration, mut command: Command) -> Result<String> {
    // A second more than it was, rather than one less.
    command.arg("--since").arg(format!("{}s", past.as_secs() + 1));
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    let said = if output.status.success() {
        &output.stdout
    } else {
        &output.stderr
    };
    Ok(String::from_utf8_lossy(said).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(script: &str) -> String {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "report"]);
        of_last(Duration::from_millis(20_900), command).expect("a shell")
    }

    #[test]
    fn it_covers_all_of_the_time_and_says_why_there_is_none() {
        assert_eq!(told("echo \"$@\"; echo aside >&2"), "--since 21s\n");
        assert_eq!(told("echo half; echo why >&2; exit 69"), "why\n");
    }
}
