//! A compiler for targets whose standard library is not installed: one that may build that library itself, from its sources.
//!
//! The project's own compiler is stable, and stays out of this: building `core` or `std` is unstable.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::tools::{self, Tool};

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// rustup's nightly, with the component `rust-src`.
    Nightly,
    /// Debian's own, which brings its sources, and may do unstable things when it is asked to.
    Debian,
}

/// What Debian's toolchain takes.
const FOR_DEBIAN: [Tool; 4] = [
    Tool::of_toolchain("Debian's rustc", &["/usr/bin/rustc", "--version"], "rustc-web"),
    Tool::of_toolchain("Debian's cargo", &["/usr/bin/cargo", "--version"], "cargo-web"),
    Tool::of_toolchain(
        "the sources of Rust's library",
        &["test", "-d", "/usr/lib/rustlib/src/rust/library/core"],
        "rust-web-src",
    ),
    Tool::of_toolchain("a C compiler", &["cc", "--version"], "gcc"),
];

impl Toolchain {
    /// The nightly if it can do it, else Debian's, which is installed where that is possible.
    ///
    /// # Errors
    /// When there is none; the message says how to get one.
    pub fn find() -> Result<Toolchain> {
        if has_nightly_sources() {
            return Ok(Toolchain::Nightly);
        }
        Toolchain::debian()
    }

    /// Debian's, which is installed where that is possible.
    ///
    /// # Errors
    /// As those of [`Toolchain::find`].
    pub fn debian() -> Result<Toolchain> {
        tools::ensure_installed(&FOR_DEBIAN)?;
        ensure!(
            FOR_DEBIAN.iter().all(Tool::works),
            "this takes a compiler that can build Rust's own library: `rustup toolchain install nightly --component rust-src`, or what is \
             listed above"
        );
        Ok(Toolchain::Debian)
    }

    /// Its cargo, free of what the running one passes on.
    pub fn cargo(self) -> Command {
        let mut command = match self {
            Toolchain::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            Toolchain::Debian => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        for inherited in [
            "CARGO",
            "RUSTUP_TOOLCHAIN",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET_DIR",
        ] {
            command.env_remove(inherited);
        }
        command
    }
}

fn has_nightly_sources() -> bool {
    let output = Command::new("rustup")
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
        .output();
    output.is_ok_and(|output| {
        let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        output.status.success() && sysroot.join("lib/rustlib/src/rust/library/core").is_dir()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_running_cargo_reaches_another_one() {
        for toolchain in [Toolchain::Nightly, Toolchain::Debian] {
            let cargo = toolchain.cargo();
            let removed = cargo.get_envs().filter(|(_, value)| value.is_none());
            let removed: Vec<_> = removed.filter_map(|(name, _)| name.to_str()).collect();
            assert!(
                removed.contains(&"RUSTUP_TOOLCHAIN") && removed.contains(&"CARGO_TARGET_DIR"),
                "{removed:?}"
            );
        }
    }
}
