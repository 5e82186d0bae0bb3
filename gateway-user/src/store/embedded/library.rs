//! Where the engine's library is looked for.

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The version that this program was tested with; `cargo xtask get-clickhouse` fetches it, from the same file.
pub const CHDB_VERSION: &str = include_str!("libchdb.version").trim_ascii();

/// Names the library when no option does.
const VARIABLE: &str = "CHDB_LIBRARY";

/// A program that is linked statically, as the one for musl is, has no loader for libraries; and libchdb is made for glibc.
const LOADS_LIBRARIES: bool = !cfg!(target_feature = "crt-static");

/// No library.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// The one that was named is not there. Another is not taken in its place.
    #[error("{named_by} names {}, which is not a file", path.display())]
    Named {
        /// The option or variable.
        named_by: &'static str,
        /// What it says.
        path: PathBuf,
    },
    /// This program cannot load any.
    #[error(
        "this build is linked statically and cannot load ClickHouse's engine (libchdb), which `store.url: embedded` runs on: set store.url \
         (CLICKHOUSE_URL) to a ClickHouse server or to none, put a `clickhouse` program on the PATH, or take the build for glibc"
    )]
    Static,
    /// None was named, and none is where it would be.
    #[error(
        "ClickHouse's engine (libchdb {CHDB_VERSION}) is not on this machine; looked for {}. `cargo xtask get-clickhouse` fetches it \
         (166 MB), or name one with --library or {VARIABLE}, or set store.url to a ClickHouse server",
        tried.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ")
    )]
    Missing {
        /// The places.
        tried: Vec<PathBuf>,
    },
}

/// Finds the library: the one that is `named`, else the variable `CHDB_LIBRARY`, else the cache of `cargo xtask get-clickhouse`, else
/// beside the program.
///
/// # Errors
/// When there is none; the message says how to get it.
pub fn find_library(
    named: Option<&Path>,
    variable: &dyn Fn(&str) -> Option<OsString>,
) -> Result<PathBuf, LibraryError> {
    if !LOADS_LIBRARIES {
        return Err(LibraryError::Static);
    }
    let set = |name| variable(name).filter(|value| !value.is_empty());
    let from_variable = set(VARIABLE).map(PathBuf::from);
    let choices = [
        ("--library", named.map(Path::to_owned)),
        (VARIABLE, from_variable),
    ];
    if let Some((named_by, path)) = choices.into_iter().find_map(|(by, path)| Some((by, path?))) {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(LibraryError::Named { named_by, path })
        };
    }
    let file = format!(
        "{DLL_PREFIX}chdb{}",
        if cfg!(target_os = "macos") {
            ".so"
        } else {
            DLL_SUFFIX
        }
    );
    let home_cache = || set("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = set("XDG_CACHE_HOME").map(PathBuf::from).or_else(home_cache);
    let cached = cache.map(|cache| cache.join("vllm-gateway/libchdb").join(CHDB_VERSION).join(&file));
    let beside = std::env::current_exe()
        .ok()
        .map(|program| program.with_file_name(&file));
    let tried: Vec<PathBuf> = cached.into_iter().chain(beside).collect();
    tried
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .ok_or(LibraryError::Missing { tried })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_one_is_taken_or_refused_and_nothing_else() {
        let none = |_: &str| None;
        let here = Path::new(file!()).file_name().unwrap();
        let here = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src/store/embedded")
            .join(here);
        assert_eq!(find_library(Some(&here), &none).unwrap(), here);
        let error = find_library(Some(Path::new("/no/such/file")), &none)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "--library names /no/such/file, which is not a file");
        let variable = |name: &str| (name == VARIABLE).then(|| here.clone().into_os_string());
        assert_eq!(find_library(None, &variable).unwrap(), here);
    }

    #[test]
    fn a_missing_one_says_where_it_was_looked_for_and_how_to_get_it() {
        let error = find_library(None, &|name| {
            (name == "XDG_CACHE_HOME").then(|| "/no/cache".into())
        })
        .unwrap_err()
        .to_string();
        let place = format!("/no/cache/vllm-gateway/libchdb/{CHDB_VERSION}/libchdb.so");
        assert!(
            error.contains(&place) && error.contains("cargo xtask get-clickhouse"),
            "{error}"
        );
        let error = find_library(None, &|name| (name == "HOME").then(|| "/no/home".into()))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/home/.cache/vllm-gateway/libchdb/"), "{error}");
    }
}
