//! The Helm chart, rendered with each set of values below `ci/` of the chart, as Helm's own tools for charts look for them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::checkers::Checkers;
use crate::stage::run;

const CHART: &str = "packaging/helm/vllm-gateway";

/// Releases of Kubernetes between which the manifests must be right: the oldest that the chart says it is for, and the newest that there are schemas of.
const KUBERNETES: [&str; 2] = ["1.27.0", "1.37.0"];

/// Renders the chart with each set of values into `output`, and checks what comes out. Returns how many there are.
///
/// # Errors
/// When Helm refuses the chart or the values, or a manifest is not what Kubernetes or the Prometheus operator take.
pub fn check(root: &Path, checkers: &Checkers, output: &Path) -> Result<usize> {
    let chart = root.join(CHART);
    let modules = output.join("node_modules");
    let _ = fs::remove_file(&modules);
    symlink(checkers.modules(), &modules).context("cannot link the packages")?;
    let sets = sets_of_values(&chart.join("ci"))?;
    for values in &sets {
        let name = values.file_stem().context("a file has a name")?.to_string_lossy();
        one(root, checkers, &chart, values, &output.join(name.as_ref()))
            .with_context(|| format!("the chart with {}", values.display()))?;
    }
    Ok(sets.len())
}

fn sets_of_values(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        found.push(entry?.path());
    }
    ensure!(!found.is_empty(), "{} holds no values", directory.display());
    found.sort();
    Ok(found)
}

/// Renders into `<stem>.yaml`, which is what a test reads, and into what the checkers read, beside it.
fn one(root: &Path, checkers: &Checkers, chart: &Path, values: &Path, stem: &Path) -> Result<()> {
    quiet(
        checkers
            .helm()
            .arg("lint")
            .arg("--strict")
            .arg("--quiet")
            .arg(chart)
            .arg("--values")
            .arg(values),
    )?;
    let rendered = quiet(
        checkers
            .helm()
            .args(["template", "billing"])
            .arg(chart)
            .args([
                "--namespace",
                "inference",
                "--kube-version",
                KUBERNETES[0],
                "--values",
            ])
            .arg(values),
    )?;
    let file = |ending: &str| stem.with_extension(ending);
    fs::write(file("yaml"), rendered).with_context(|| format!("cannot write {}", stem.display()))?;
    // In the directory of the packages, since that is where their names are looked for.
    let script = stem.with_file_name("manifests.mjs");
    fs::copy(root.join("packaging/checks/manifests.mjs"), &script).context("cannot copy the script")?;
    run(Command::new("node")
        .arg(&script)
        .args([file("yaml"), file("core.yaml"), file("mts")]))
    .context("a manifest of the operator has a value that it does not take")?;
    for version in KUBERNETES {
        quiet(
            checkers
                .kubernetes_validate()
                .args(["--strict", "--no-warn", "--kubernetes-version", version])
                .arg(file("core.yaml")),
        )?;
    }
    run(checkers
        .tsc()
        .args(["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022"])
        .args(["--module", "nodenext", "--moduleResolution", "nodenext"])
        .arg(file("mts")))
    .context("a manifest of the operator has a field that it does not know")
}

/// Runs a command that says something only when there is something wrong. Returns its output.
fn quiet(command: &mut Command) -> Result<Vec<u8>> {
    let done = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !done.status.success() {
        bail!(
            "{command:?} ended with {}:\n{}{}",
            done.status,
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
    }
    Ok(done.stdout)
}
