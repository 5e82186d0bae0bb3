//! `cargo xtask build-ebpf`: compiles the kernel probe into `gateway-ebpf/prebuilt/`, where the gateway finds it, so that building and
//! running the gateway takes nothing but stable Rust.
//!
//! The object lies in the repository beside a digest of the sources that it was made of, and a test fails when they part. Two
//! compilers differ in the object that they make, so that the object's own digest only says that it is the one that was built with them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::toolchain::Toolchain;
use crate::tools::{self, Tool};
use crate::{digest, stage};

/// Where the compiled probe lies, and its digests.
const OBJECT: &str = "gateway-ebpf/prebuilt/gateway-ebpf.o";
const DIGESTS: &str = "gateway-ebpf/prebuilt/gateway-ebpf.sha256";

/// What the probe is made of: files, and directories with all that is in them.
const SOURCES: [&str; 4] = [
    "gateway-ebpf/Cargo.toml",
    "gateway-ebpf/Cargo.lock",
    "gateway-ebpf/src",
    "gateway-common/src",
];

const TARGET: &str = "bpfel-unknown-none";

/// The linker turns LLVM's intermediate code into one object. Its LLVM must not be older than the compiler's.
const LINKER_VERSION: &str = "0.13.0";

/// Where Debian keeps the LLVM that its compiler (`rustc-web`) is made with.
const DEBIAN_LLVM: (&str, &str) = ("/usr/lib/llvm-22", "llvm-22");

/// What it takes to build the linker for Debian's toolchain.
const FOR_DEBIANS_LINKER: [Tool; 4] = [
    Tool::of_toolchain(
        "LLVM 22",
        &["test", "-e", "/usr/lib/llvm-22/include/llvm-c/Core.h"],
        "llvm-22-dev",
    ),
    Tool::of_toolchain(
        "Polly of LLVM 22",
        &["test", "-e", "/usr/lib/llvm-22/lib/libPolly.a"],
        "libpolly-22-dev",
    ),
    Tool::of_toolchain(
        "zstd's headers",
        &["test", "-e", "/usr/include/zstd.h"],
        "libzstd-dev",
    ),
    Tool::of_toolchain(
        "zlib's headers",
        &["test", "-e", "/usr/include/zlib.h"],
        "zlib1g-dev",
    ),
];

/// Compiles the probe and puts it where the gateway takes it from.
///
/// # Errors
/// When there is no compiler for it and none can be installed, or when it does not compile.
pub fn run(root: &Path) -> Result<()> {
    let toolchain = Toolchain::find()?;
    ensure_linker(toolchain, root)?;
    let mut build = toolchain.cargo();
    build
        .current_dir(root.join("gateway-ebpf"))
        // The project's own settings are for another target.
        .env("RUSTFLAGS", "-C debuginfo=0")
        .args([
            "build",
            "--release",
            "--locked",
            "-Z",
            "build-std=core",
            "--target",
            TARGET,
        ]);
    stage::run(&mut build)?;
    let built = root
        .join("gateway-ebpf/target")
        .join(TARGET)
        .join("release/gateway-ebpf");
    let object = fs::read(&built).with_context(|| format!("no object at {}", built.display()))?;
    fs::create_dir_all(root.join(OBJECT).parent().context("it is in a directory")?)?;
    fs::write(root.join(OBJECT), &object)?;
    fs::write(root.join(DIGESTS), digests(root)?)?;
    println!("{OBJECT}: {} bytes", object.len());
    Ok(())
}

/// Installs the linker, unless it is there.
fn ensure_linker(toolchain: Toolchain, root: &Path) -> Result<()> {
    let probe = Command::new("bpf-linker").arg("--version").output();
    if probe.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    println!("installing bpf-linker {LINKER_VERSION}");
    // With the compiler that is in use here; the probe's own one does not matter to it.
    let mut install = stage::cargo(root);
    install.args(["install", "bpf-linker", "--locked", "--version", LINKER_VERSION]);
    if toolchain == Toolchain::Debian {
        tools::ensure_installed(&FOR_DEBIANS_LINKER)?;
        let (prefix, feature) = DEBIAN_LLVM;
        install
            .env("LLVM_PREFIX", prefix)
            .args(["--no-default-features", "--features", feature]);
    }
    stage::run(&mut install)
}

/// The text of the file of digests, as it would be written now.
fn digests(root: &Path) -> Result<String> {
    let object = fs::read(root.join(OBJECT)).with_context(|| format!("no object at {OBJECT}"))?;
    Ok(format!(
        "{}  sources\n{}  object\n",
        digest_of_sources(root)?,
        digest::hex(object)
    ))
}

/// A digest of names, lengths and bytes of all sources.
fn digest_of_sources(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut digest = Sha256::new();
    for file in files {
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(root)?.display();
        digest.update(format!("{name} {}\n", bytes.len()));
        digest.update(bytes);
    }
    Ok(digest::text(&digest.finalize()))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    let entries = fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
    for entry in entries {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> &'static Path {
        crate::workspace_root().expect("a workspace")
    }

    #[test]
    fn the_compiled_probe_is_made_of_the_sources_as_they_are() {
        let recorded = fs::read_to_string(root().join(DIGESTS)).expect("digests");
        assert_eq!(
            recorded,
            digests(root()).expect("sources"),
            "the probe's sources or its object changed: `cargo xtask build-ebpf`"
        );
    }

    #[test]
    fn a_digest_tells_files_apart_by_name_place_and_content() {
        let base = std::env::temp_dir().join(format!("xtask-digest-{}", std::process::id()));
        let digest = |name: &str, content: &str| {
            for directory in ["gateway-ebpf/src", "gateway-common/src"] {
                fs::create_dir_all(base.join(directory)).expect("a directory");
            }
            for file in [SOURCES[0], SOURCES[1]] {
                fs::write(base.join(file), "x").expect("a file");
            }
            fs::write(base.join("gateway-ebpf/src").join(name), content).expect("a file");
            let digest = digest_of_sources(&base).expect("sources");
            fs::remove_dir_all(&base).expect("it is ours");
            digest
        };
        let first = digest("main.rs", "a");
        assert_eq!(first, digest("main.rs", "a"));
        assert_ne!(first, digest("main.rs", "b"));
        assert_ne!(first, digest("other.rs", "a"));
    }
}
