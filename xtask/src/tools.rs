//! Programs that tests and benches call and Cargo does not bring: found, installed on Debian as root, or said to be missing.
//!
//! Nothing that this installs is left running: a test machine should not find a new daemon because it ran tests.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::stage::run;

/// A program that some tests or benches need.
#[derive(Debug)]
pub struct Tool {
    name: &'static str,
    /// A command that succeeds when the tool is there and works.
    probe: &'static [&'static str],
    debian_package: &'static str,
    brew_formula: &'static str,
    /// What cannot be done without it.
    needed_by: &'static str,
}

/// What the tests call.
pub const FOR_TESTS: [Tool; 7] = [
    Tool {
        name: "promtool",
        probe: &["promtool", "--version"],
        debian_package: "prometheus",
        brew_formula: "prometheus",
        needed_by: "the tests of the metrics page and of the alert rules",
    },
    Tool {
        name: "ip",
        probe: &["ip", "-Version"],
        debian_package: "iproute2",
        brew_formula: "iproute2mac",
        needed_by: "the test of the kernel probe in a network namespace",
    },
    Tool {
        name: "python3 with venv",
        // Debian's python3 has `venv` but no `ensurepip`, without which no environment gets a pip.
        probe: &["python3", "-c", "import venv, ensurepip"],
        debian_package: "python3-venv",
        brew_formula: "python3",
        needed_by: "the tests with the real OpenAI client, and those of the console",
    },
    Tool {
        name: "chromium",
        probe: &["chromium", "--version"],
        debian_package: "chromium",
        brew_formula: "chromium",
        needed_by: "the test of the console in a browser",
    },
    Tool {
        name: "busybox",
        probe: &["busybox", "true"],
        debian_package: "busybox",
        brew_formula: "nothing, it is for Linux",
        needed_by: "the test of what the images run",
    },
    Tool {
        name: "strace",
        probe: &["strace", "--version"],
        debian_package: "strace",
        brew_formula: "nothing, it is for Linux",
        needed_by: "the test of the systemd unit's limits",
    },
    Tool {
        name: "shellcheck",
        probe: &["shellcheck", "--version"],
        debian_package: "shellcheck",
        brew_formula: "shellcheck",
        needed_by: "the check of the shell scripts",
    },
];

/// What the benches call.
pub const FOR_BENCHES: [Tool; 2] = [
    Tool {
        name: "nginx",
        probe: &["nginx", "-v"],
        debian_package: "nginx-light",
        brew_formula: "nginx",
        needed_by: "the comparison with nginx",
    },
    Tool {
        name: "wrk",
        // It ends with an error whatever it is asked for but a load, its own version included.
        probe: &["sh", "-c", "command -v wrk"],
        debian_package: "wrk",
        brew_formula: "wrk",
        needed_by: "the load of small requests",
    },
];

/// What guests under emulation need, and their disks.
pub const FOR_GUESTS: [Tool; 2] = [
    Tool {
        name: "qemu",
        probe: &["qemu-system-x86_64", "--version"],
        debian_package: "qemu-system-x86",
        brew_formula: "qemu",
        needed_by: "whatever runs on another kernel or cuts the power",
    },
    Tool {
        name: "mke2fs",
        probe: &["mke2fs", "-V"],
        debian_package: "e2fsprogs",
        brew_formula: "e2fsprogs",
        needed_by: "the test of a power cut",
    },
];

/// Not needed by a test, hence not one of those.
const PROMETHEUS: Tool = Tool {
    name: "prometheus",
    probe: &["prometheus", "--version"],
    debian_package: "prometheus",
    brew_formula: "prometheus",
    needed_by: "the graphs of `cargo xtask dev`",
};

/// Whether there is a Prometheus server, after trying to install one; without it, says how to get it.
pub fn has_prometheus() -> bool {
    if let Err(error) = ensure_installed(&[PROMETHEUS]) {
        println!("Prometheus could not be installed: {error:#}");
    }
    PROMETHEUS.works()
}

/// Makes sure that every one of `tools` is there, or says what goes without.
///
/// # Errors
/// When an installation was tried and failed.
pub fn ensure_installed(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| !tool.works()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !(succeeds(&["apt-get", "--version"]) && is_root()) {
        missing.iter().for_each(|tool| println!("{}", tool.advice()));
        return Ok(());
    }
    install(&missing)?;
    for tool in missing {
        ensure!(
            tool.works(),
            "{} was installed, but `{}` still fails",
            tool.debian_package,
            tool.probe.join(" ")
        );
    }
    Ok(())
}

impl Tool {
    /// A part of a compiler for targets whose standard library is not installed, or of the linker of the kernel probe.
    pub const fn of_toolchain(
        name: &'static str,
        probe: &'static [&'static str],
        debian_package: &'static str,
    ) -> Tool {
        Tool {
            name,
            probe,
            debian_package,
            brew_formula: "rustup",
            needed_by: "building the kernel probe, and checking the code for other systems,",
        }
    }

    /// A tool that one check alone takes, which is only made on Linux.
    pub const fn for_tests(
        name: &'static str,
        probe: &'static [&'static str],
        debian_package: &'static str,
        needed_by: &'static str,
    ) -> Tool {
        Tool {
            name,
            probe,
            debian_package,
            brew_formula: "nothing, it is for Linux",
            needed_by,
        }
    }

    /// Whether it is there.
    pub fn works(&self) -> bool {
        succeeds(self.probe)
    }

    fn advice(&self) -> String {
        let Self {
            name,
            debian_package,
            brew_formula,
            needed_by,
            ..
        } = self;
        format!(
            "{name} is missing, and without it {needed_by} must be left out.\n  \
             Debian: apt-get install --no-install-recommends {debian_package}   macOS: brew install {brew_formula}"
        )
    }
}

fn install(missing: &[&Tool]) -> Result<()> {
    let packages: Vec<_> = missing.iter().map(|tool| tool.debian_package).collect();
    println!("installing {}", packages.join(", "));
    let policy = NoDaemons::begin(Path::new(POLICY_PATH))?;
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            // Another installation may be under way, as after the start of a machine.
            .args(["-qq", "-o", "DPkg::Lock::Timeout=300"]);
        command
    };
    run(apt_get().arg("update"))?;
    run(apt_get()
        .args(["install", "--yes", "--no-install-recommends"])
        .args(&packages))?;
    drop(policy);
    // Such a package enables its server for the next boot.
    for (package, service) in [("prometheus", "prometheus"), ("nginx-light", "nginx")] {
        if packages.contains(&package) && Path::new("/run/systemd/system").is_dir() {
            run(Command::new("systemctl").args(["disable", "--now", service]))?;
        }
    }
    Ok(())
}

/// While this lives, no package that is installed may start its daemon. Debian's way to say so is a program at a
/// fixed path that ends with 101 ("action forbidden by policy").
#[derive(Debug)]
struct NoDaemons<'a> {
    /// The file to remove at the end. Container images bring one of their own, which says the same and stays.
    ours: Option<&'a Path>,
}

const POLICY_PATH: &str = "/usr/sbin/policy-rc.d";

impl<'a> NoDaemons<'a> {
    fn begin(path: &'a Path) -> Result<Self> {
        if path.exists() {
            return Ok(Self { ours: None });
        }
        let policy = Self { ours: Some(path) };
        fs::write(path, "#!/bin/sh\nexit 101\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(path, Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {} executable", path.display()))?;
        Ok(policy)
    }
}

impl Drop for NoDaemons<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.ours
            && let Err(error) = fs::remove_file(path)
        {
            let path = path.display();
            eprintln!("{path} could not be removed ({error}): until it is, no package starts its daemon");
        }
    }
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output();
    output.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// Whether a command is there and ends well; it shows nothing.
fn succeeds(words: &[&str]) -> bool {
    let Some((program, arguments)) = words.split_first() else {
        return false;
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Installs what the lock file in `directory` names, without running anything of it.
///
/// # Errors
/// When npm is not there, or one of the packages is not what the lock file says.
pub fn npm_ci(directory: &Path) -> Result<()> {
    let mut npm = Command::new("npm");
    npm.args([
        "ci",
        "--loglevel=error",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
    ]);
    run(npm.current_dir(directory)).context(
        "npm fetches the packages and checks them: install it (Debian: apt-get install npm, macOS: brew install node)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_tells_presence_from_absence() {
        assert!(succeeds(&["true"]));
        assert!(!succeeds(&["false"]) && !succeeds(&["no-such-command-anywhere"]) && !succeeds(&[]));
    }

    #[test]
    fn the_policy_forbids_daemons_while_it_lives_and_spares_another_s() {
        let path = std::env::temp_dir().join(format!("xtask-policy-{}", std::process::id()));
        let policy = NoDaemons::begin(&path).expect("a writable directory");
        drop(NoDaemons::begin(&path).expect("one that is there is left alone"));
        let status = Command::new("sh").arg(&path).status().expect("a shell");
        assert_eq!(status.code(), Some(101));
        assert_eq!(
            fs::metadata(&path).expect("the file").permissions().mode() & 0o777,
            0o755
        );
        drop(policy);
        assert!(!path.exists());
    }

    #[test]
    fn advice_names_the_tool_its_packages_and_what_is_skipped() {
        for tool in FOR_TESTS.iter().chain(&FOR_BENCHES).chain(&FOR_GUESTS) {
            let advice = tool.advice();
            for part in [tool.name, tool.debian_package, tool.brew_formula, tool.needed_by] {
                assert!(advice.contains(part), "no `{part}` in: {advice}");
            }
        }
    }
}
