//! The command line: what can be asked of the program, and the one command that needs nothing running.

use clap::{Parser, Subcommand};

use crate::bookkeeper::command::LedgerArgs;
use crate::calibrate::CalibrateArgs;
use crate::command::{Answer, ConfigSource, Failure};
use crate::config::{Env, effective_yaml};
use crate::doctor::DoctorArgs;
use crate::report::ReportArgs;
use crate::store::embedded::EmbeddedArgs;
use crate::trial::TryArgs;

/// Per-team latency and cost of every LLM request on a shared vLLM cluster.
#[derive(Debug, Parser)]
#[command(name = "vllm-gateway", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve requests until SIGTERM or SIGINT, then let those that run come to their end.
    Run(ConfigSource),
    /// Serve requests before a vLLM that runs already, and show them live: nothing to configure, nothing kept.
    Try(TryArgs),
    /// Say what is wrong with the config (exit code 78), or print what is in force, secrets masked.
    CheckConfig(ConfigSource),
    /// Print what each team used and how it was served, from the rows in ClickHouse.
    Report(ReportArgs),
    /// Compute the bill of a period anew by the rules of this config, or close a month.
    Ledger(LedgerArgs),
    /// Fit the ledger's weights to what the engines did, from the rows in ClickHouse.
    Calibrate(CalibrateArgs),
    /// Say what this host can do, and what to do about the rest: kernel, upstreams, store, ports. The exit code says what can run.
    Doctor(DoctorArgs),
    /// Run ClickHouse's engine behind its HTTP interface, as the gateway does for `store.url: embedded`.
    EmbeddedClickhouse(EmbeddedArgs),
    /// Attach the kernel probe for the gateway that started this, on standard input; of no use by hand.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    TapAttacher,
}

/// The config in force, secrets masked.
///
/// # Errors
/// What is wrong with it.
pub fn check_config(source: &ConfigSource, env: Env<'_>) -> Result<Answer, Failure> {
    Ok(Answer::of(effective_yaml(&source.load(env)?)))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::command;

    const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config.yaml");

    fn check(file: &str, variables: &[(&str, &str)]) -> (u8, String, String) {
        let env = |name: &str| {
            variables
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| value.into())
        };
        let source = ConfigSource {
            config: Some(file.into()),
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = command::end(check_config(&source, &env), &mut out, &mut err).unwrap();
        (
            code,
            String::from_utf8(out).unwrap(),
            String::from_utf8(err).unwrap(),
        )
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["vllm-gateway", "run", "--config", "a.yaml"]).unwrap();
        assert!(matches!(cli.command, Command::Run(source) if source.config == Some("a.yaml".into())));
        let cli = Cli::try_parse_from(["vllm-gateway", "check-config"]).unwrap();
        assert!(matches!(cli.command, Command::CheckConfig(source) if source.config.is_none()));
        assert!(Cli::try_parse_from(["vllm-gateway"]).is_err());
    }

    #[test]
    fn a_good_config_is_printed_with_the_environment_and_without_secrets() {
        let (code, out, err) = check(
            SHIPPED,
            &[("CLICKHOUSE_PASSWORD", "hunter2"), ("GATEWAY_WORKERS", "3")],
        );
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(
            out.contains("workers: 3\n") && out.contains("password: '***'\n"),
            "{out}"
        );
        assert!(!out.contains("hunter2"), "{out}");
    }

    #[test]
    fn a_bad_config_exits_with_ex_config() {
        let (code, out, err) = check(SHIPPED, &[("GATEWAY_WORKERS", "many")]);
        assert_eq!((code, out.as_str()), (78, ""));
        assert!(err.starts_with("environment variable GATEWAY_WORKERS: "), "{err}");
        let (code, _, err) = check("no/such/file.yaml", &[]);
        assert_eq!(code, 78);
        assert!(err.contains("no/such/file.yaml"), "{err}");
    }
}
