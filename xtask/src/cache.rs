//! What is fetched once and used by many runs, outside of the workspace.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The directory for `what`: `$XDG_CACHE_HOME/vllm-gateway/<what>`, or below `$HOME/.cache`. It may not exist yet.
///
/// # Errors
/// When neither variable is set.
pub fn directory(what: &str) -> Result<PathBuf> {
    directory_by(what, |name| env::var_os(name).map(PathBuf::from))
}

fn directory_by(what: &str, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    let set = |name| variable(name).filter(|value| !value.as_os_str().is_empty());
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    let cache = cache.with_context(|| {
        format!("neither XDG_CACHE_HOME nor HOME is set: there is no place to keep {what} in")
    })?;
    Ok(cache.join("vllm-gateway").join(what))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_cache_is_the_user_s() {
        let only =
            |wanted: &'static str| move |name: &str| (name == wanted).then(|| PathBuf::from("/somewhere"));
        assert_eq!(
            directory_by("a/1", only("XDG_CACHE_HOME")).unwrap(),
            Path::new("/somewhere/vllm-gateway/a/1")
        );
        assert_eq!(
            directory_by("a/1", only("HOME")).unwrap(),
            Path::new("/somewhere/.cache/vllm-gateway/a/1")
        );
        let error = directory_by("a/1", |_| None).unwrap_err().to_string();
        assert!(error.contains("a/1"), "{error}");
    }
}
