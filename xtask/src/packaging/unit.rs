//! The systemd unit, as systemd's own tools see it. They need no system that was booted with it.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::stage::run;
use crate::tools::{self, Tool};

/// The unit, and the program that it starts.
const UNIT: &str = "packaging/systemd/vllm-gateway.service";
const PROGRAM: &str = "/usr/local/bin/vllm-gateway";

/// How much may be left open, of 100 (`systemd-analyze security`): what the unit has is 20. What is left is what it is for: network, netlink, two
/// capabilities, and the engine's compiler.
const EXPOSURE_MAX: &str = "20";

const SYSTEMD: Tool = Tool::for_tests(
    "systemd-analyze",
    &["systemd-analyze", "--version"],
    "systemd",
    "the check of the systemd unit",
);

/// Checks that systemd takes the unit, and how much it leaves open.
///
/// # Errors
/// When it does not, or too much.
pub fn check(root: &Path) -> Result<()> {
    tools::ensure_installed(&[SYSTEMD])?;
    if !SYSTEMD.works() {
        return Ok(());
    }
    let unit = fs::read_to_string(root.join(UNIT)).with_context(|| format!("cannot read {UNIT}"))?;
    ensure!(unit.contains(PROGRAM), "{UNIT} does not start {PROGRAM}");
    // systemd looks whether the program is there, which is not installed here: any other one stands in for it.
    let here = env::current_exe().context("the program's own file is not known")?;
    let here = here.to_str().context("it has a name that is text")?;
    let directory = env::temp_dir().join(format!("vllm-gateway-unit-{}", std::process::id()));
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let copy = directory.join("vllm-gateway.service");
    let checked = fs::write(&copy, unit.replace(PROGRAM, here))
        .with_context(|| format!("cannot write {}", copy.display()))
        .and_then(|()| analyze(&copy));
    let _ = fs::remove_dir_all(&directory);
    checked
}

fn analyze(unit: &Path) -> Result<()> {
    let verify = Command::new("systemd-analyze")
        .arg("verify")
        .arg(unit)
        .output()
        .context("cannot start systemd-analyze")?;
    // A setting that it does not know is but a warning to it.
    let said = String::from_utf8_lossy(&verify.stderr);
    ensure!(
        verify.status.success() && said.is_empty(),
        "systemd finds fault with {UNIT}:\n{said}"
    );
    run(Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager", "--threshold", EXPOSURE_MAX])
        .arg(unit)
        .stdout(std::process::Stdio::null()))
    .with_context(|| format!("{UNIT} leaves more open than {EXPOSURE_MAX} of 100: see `systemd-analyze security --offline=true {UNIT}`"))
}
