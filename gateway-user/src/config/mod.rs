//! Configuration: one YAML file and the environment become one typed, validated [`Config`].
//!
//! What it promises: a config that is returned can be run with; a config that cannot is refused before anything is
//! started, with all problems in one message, each with the line or variable that said it, what was expected and what was
//! found. (Whether settings fit each other is looked at once each of them is understood.) A key that is not known is refused rather than ignored, since a timeout that was misspelled is a timeout
//! that is not there. Secrets show in no message and in no output.
//!
//! Order: built-in defaults, then the file, then the environment ([`env::VARIABLES`]). A key without a value, a section
//! without keys and an empty file leave the defaults.
//!
//! What it leaves out: nothing is reloaded while the gateway runs, and no name is resolved or port tried here.

pub mod env;
pub mod error;
mod limits;
mod read;
mod schema;
mod setting;
mod tap;
mod token;
pub mod units;
mod validate;
mod values;
mod words;
mod yaml;

use std::path::Path;

pub use env::Env;
pub(crate) use error::quote;
pub use error::{ConfigError, Place, Problem};
pub use limits::{BudgetConfig, LimitsConfig, TeamEntry, TeamLimits};
pub use schema::{
    AdminConfig, AdminToken, Config, GatewayConfig, IdentityConfig, LedgerConfig, LogConfig, MetricsConfig,
    ProxyConfig, ReconciliationConfig, SpoolConfig, StoreConfig, UpstreamConfig, UsageConfig, VllmConfig,
};
pub use tap::{CgroupChoice, TapConfig};
pub use token::{TokenDigest, TokenScope};
pub use units::ByteSize;
pub use values::{HeaderName, MASK, Name, Secret, StoreUrl, UpstreamUrl, ValueError};
pub use words::{
    AtLimit, BudgetPeriod, Capture, Fsync, IdleTo, Inject, LimitMode, LogFormat, LogLevel, OnUninspectable,
    RuntimeKind, Serves, WhenFull,
};

use read::Findings;
use yaml::Document;

impl Config {
    /// Reads the file, if there is one, and puts the environment over it.
    ///
    /// # Errors
    /// When the file cannot be read, is no YAML, or says something that cannot be run with.
    pub fn load(path: Option<&Path>, env: Env<'_>) -> Result<Self, ConfigError> {
        let Some(path) = path else {
            return Self::parse("the config", "", env);
        };
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&path.display().to_string(), &text, env)
    }

    /// Reads a file's text and puts the environment over it. `file` is the name that messages give the text.
    ///
    /// # Errors
    /// As [`Config::load`], reading apart.
    pub fn parse(file: &str, text: &str, env: Env<'_>) -> Result<Self, ConfigError> {
        let document = Document::parse(file, text)?;
        let mut findings = Findings::new(&document);
        let mut config = Self::default();
        read::read_file(&mut findings, &mut config);
        env::apply(env, &mut findings, &mut config);
        // A value that was not understood stands at its default, and what does not fit that would mislead.
        if findings.problems.is_empty() {
            validate::validate(&config, &mut findings);
        }
        let mut problems = findings.problems;
        problems.sort_by(|left, right| left.place.cmp(&right.place));
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid(problems))
        }
    }

    /// The config if it can be run with, for one that no file has said.
    ///
    /// # Errors
    /// When settings do not fit each other.
    pub fn checked(self) -> Result<Self, ConfigError> {
        let document = Document::parse("the config", "")?;
        let mut findings = Findings::new(&document);
        validate::validate(&self, &mut findings);
        if findings.problems.is_empty() {
            Ok(self)
        } else {
            Err(ConfigError::Invalid(findings.problems))
        }
    }
}

/// The whole config as YAML that [`Config::parse`] reads back, with [`MASK`] for each secret. A mask is refused when it is
/// read back: taken for the secret, it would be one that everybody knows.
pub fn effective_yaml(config: &Config) -> String {
    // A struct of texts, numbers and lists with plain keys: there is nothing in it that YAML cannot say.
    serde_yaml::to_string(config).unwrap_or_else(|error| format!("# cannot be printed: {error}\n"))
}

fn host_name() -> Name {
    let node = rustix::system::uname();
    Name::from_lossy(&node.nodename().to_string_lossy()).unwrap_or_else(|| Name::from_static("gateway"))
}

#[cfg(test)]
mod tests;
