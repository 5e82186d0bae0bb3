//! `cargo xtask check-targets`: whether the code compiles, without warnings, for the systems that it is for and this machine is not.
//!
//! It is a check of types, as `cargo check` makes it: no C compiler, no linker and no SDK of those systems is needed, and nothing of it can
//! run. What only they can show (does it link, does it work) is left out.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::dev;
use crate::stage;
use crate::toolchain::Toolchain;

/// Users run the gateway, and `cargo xtask dev`, on these.
const TARGETS: [&str; 5] = [
    "aarch64-apple-darwin",
    "x86_64-apple-darwin",
    "aarch64-unknown-linux-gnu",
    "aarch64-unknown-linux-musl",
    "x86_64-unknown-linux-musl",
];

/// Below Cargo's target directory. A place of its own: other compilers would throw away what the usual one has built, and while this holds
/// the lock on it, nobody else waits.
const TARGET_DIRECTORY: &str = "check-targets";

/// Settings that only cost time where nothing is run but macros and build scripts.
const PROFILE: [&str; 3] = [
    "profile.dev.opt-level=0",
    "profile.dev.debug=false",
    "profile.dev.package.\"*\".opt-level=0",
];

/// The compiler that does it.
#[derive(Clone, Copy, Debug)]
pub enum Compiler {
    /// The one that is in use, which has the libraries of all targets (`rustup target add`).
    Usual,
    /// One that builds them.
    WithSources(Toolchain),
}

impl Compiler {
    /// Finds it, and installs what is missing where that is possible.
    ///
    /// # Errors
    /// When there is none, and none can be installed.
    pub fn find() -> Result<Compiler> {
        if has_all(&installed_targets()) {
            return Ok(Compiler::Usual);
        }
        let toolchain = Toolchain::find()
            .with_context(|| format!("`rustup target add {}` would do as well", TARGETS.join(" ")))?;
        Ok(Compiler::WithSources(toolchain))
    }

    fn cargo(self, root: &Path) -> Command {
        match self {
            Compiler::Usual => stage::cargo(root),
            Compiler::WithSources(toolchain) => {
                let mut command = toolchain.cargo();
                command.current_dir(root);
                command
            }
        }
    }
}

/// Checks all targets.
///
/// # Errors
/// When there is no compiler for it, or the code has an error or a warning on one of them.
pub fn run(root: &Path) -> Result<()> {
    stage::run(&mut command(Compiler::find()?, root)?)
}

/// The command that checks all targets.
///
/// # Errors
/// When it is not known where Cargo builds.
pub fn command(compiler: Compiler, root: &Path) -> Result<Command> {
    let mut command = compiler.cargo(root);
    command
        .args([
            "check",
            "--workspace",
            "--locked",
            "--lib",
            "--bins",
            "--target-dir",
        ])
        .arg(dev::target_directory()?.join(TARGET_DIRECTORY))
        .env("RUSTFLAGS", "-Dwarnings")
        // Nobody builds on this; what changes is compiled again as a whole.
        .env("CARGO_INCREMENTAL", "0");
    if matches!(compiler, Compiler::WithSources(_)) {
        command.args(["-Z", "build-std=std,panic_abort"]);
    }
    for setting in PROFILE {
        command.args(["--config", setting]);
    }
    for target in TARGETS {
        command.args(["--target", target]);
        // The C and assembly in `ring` is not ours to check, and there is no compiler for it: one that does nothing will do, since nothing
        // is linked.
        for (tool, nothing) in [("CC", "true"), ("AR", "true")] {
            command.env(format!("{tool}_{}", target.replace('-', "_")), nothing);
        }
    }
    if !cfg!(target_os = "macos") {
        // Nobody has Apple's SDK here; unless it is said where it is, `ring`'s build script asks a program of Apple's.
        command.env("SDKROOT", "/");
    }
    Ok(command)
}

fn installed_targets() -> String {
    let output = Command::new("rustup")
        .args(["target", "list", "--installed"])
        .output();
    output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

fn has_all(installed: &str) -> bool {
    TARGETS
        .iter()
        .all(|target| installed.lines().any(|line| line.trim() == *target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_checked_and_warnings_are_errors() {
        let command = command(Compiler::WithSources(Toolchain::Debian), Path::new("/")).expect("a command");
        let words: Vec<_> = command.get_args().filter_map(|word| word.to_str()).collect();
        for target in TARGETS {
            assert!(
                words.windows(2).any(|pair| pair == ["--target", target]),
                "{words:?}"
            );
        }
        assert!(
            words.contains(&"--workspace") && words.contains(&"-Z"),
            "{words:?}"
        );
        let flags = command.get_envs().find(|(name, _)| *name == "RUSTFLAGS");
        assert_eq!(flags.and_then(|(_, value)| value), Some("-Dwarnings".as_ref()));
    }

    #[test]
    fn the_usual_compiler_is_taken_only_with_all_of_them() {
        let all = TARGETS.join("\n");
        assert!(has_all(&format!("x86_64-unknown-linux-gnu\n{all}\n")));
        assert!(!has_all(&all.replace("x86_64-apple-darwin", "")) && !has_all(""));
    }
}
