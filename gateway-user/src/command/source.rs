//! Where the config comes from.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::config::{Config, ConfigError, Env};

/// The file that is read when none is named and it exists.
pub const CONFIG_FILE: &str = "config.yaml";

/// Where the config comes from.
#[derive(Debug, Args)]
pub struct ConfigSource {
    /// The config file. Default: ./config.yaml if there is one, else built-in defaults.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigSource {
    /// Reads the config, and the environment over it.
    ///
    /// # Errors
    /// When it cannot be run with. A file that was named must exist.
    pub fn load(&self, env: Env<'_>) -> Result<Config, ConfigError> {
        Config::load(self.path(Path::new("")).as_deref(), env)
    }

    /// The file to read, if any; `directory` is where the default one is looked for, empty for the current one.
    fn path(&self, directory: &Path) -> Option<PathBuf> {
        let default = directory.join(CONFIG_FILE);
        // A default file that exists but cannot be read must fail, not be passed over: hence no test for readability.
        self.config
            .clone()
            .or_else(|| default.symlink_metadata().is_ok().then_some(default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_file_is_read_only_where_it_exists() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let unnamed = ConfigSource { config: None };
        assert_eq!(unnamed.path(root), Some(root.join(CONFIG_FILE)));
        assert_eq!(unnamed.path(&root.join("gateway-user")), None);
        let named = ConfigSource {
            config: Some("other.yaml".into()),
        };
        assert_eq!(named.path(root), Some("other.yaml".into()));
    }
}
