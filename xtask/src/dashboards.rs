//! `cargo xtask check-dashboards`: the dashboards against Grafana's own types of them.
//!
//! Grafana publishes these types as an npm package, made of the schema that the program itself is built from. A dashboard's JSON is an expression of
//! TypeScript as it stands, so that each file becomes a module that claims to be one, and the compiler says where it is not, by the line of the file.
//! What the claim is stands in `grafana/schema/check.ts`. The packages are those of `grafana/schema/package-lock.json`, digests included; they are
//! fetched once.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::stage::run;
use crate::{cache, dev, digest, tools};

/// What npm makes, and the compiler looks for.
const MODULES: &str = "node_modules";

/// Files that say what to fetch.
const MANIFESTS: [&str; 2] = ["package.json", "package-lock.json"];

/// Files that say what to check.
const CLAIMS: [&str; 2] = ["check.ts", "tsconfig.json"];

/// Checks all dashboards of the repository at `root`.
///
/// # Errors
/// When one of them is not what Grafana takes; the compiler says where. When npm is missing or fails.
pub fn check(root: &Path) -> Result<()> {
    let schema = root.join("grafana/schema");
    let modules = fetched(&schema)?;
    let work = dev::target_directory()?.join("check-dashboards");
    let files = dashboards(root)?;
    write_modules(&work, &schema, &modules, &files)?;
    run(Command::new(modules.join(".bin/tsc"))
        .arg("--project")
        .arg(&work)
        .current_dir(root))
    .context(
        "a dashboard is not what Grafana takes: the lines above are those of grafana/dashboards/*.json",
    )?;
    println!("Grafana takes {} dashboards", files.len());
    Ok(())
}

fn dashboards(root: &Path) -> Result<Vec<PathBuf>> {
    let directory = root.join("grafana/dashboards");
    let mut found = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("json")) {
            found.push(path);
        }
    }
    ensure!(!found.is_empty(), "{} holds no dashboard", directory.display());
    found.sort();
    Ok(found)
}

/// The directory of the packages, after fetching them unless they are there.
fn fetched(schema: &Path) -> Result<PathBuf> {
    let lock = read(&schema.join("package-lock.json"))?;
    let target = cache::directory(&format!("grafana-schema/{}", digest::short(&lock)))?;
    let modules = target.join(MODULES);
    if modules.join(".bin/tsc").exists() {
        return Ok(modules);
    }
    println!("fetching Grafana's types and a compiler for them (31 MB unpacked)");
    // Beside the target, so that the last step is a rename: another run sees all packages or none.
    let parent = target.parent().context("the cache has a parent")?;
    let download = parent.join(format!("download-{}", std::process::id()));
    fs::create_dir_all(&download).with_context(|| format!("cannot make {}", download.display()))?;
    let done = install(schema, &download).and_then(|()| {
        fs::rename(&download, &target).or_else(|error| {
            if modules.exists() {
                Ok(())
            } else {
                Err(error.into())
            }
        })
    });
    let _ = fs::remove_dir_all(&download);
    done?;
    Ok(modules)
}

fn install(schema: &Path, download: &Path) -> Result<()> {
    for name in MANIFESTS {
        fs::copy(schema.join(name), download.join(name)).with_context(|| format!("cannot copy {name}"))?;
    }
    tools::npm_ci(download)
}

/// Lays out what the compiler reads.
fn write_modules(work: &Path, schema: &Path, modules: &Path, dashboards: &[PathBuf]) -> Result<()> {
    // Anew: a dashboard that has gone must not be checked any more.
    if work.exists() {
        fs::remove_dir_all(work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    fs::create_dir_all(work).with_context(|| format!("cannot make {}", work.display()))?;
    for name in CLAIMS {
        fs::copy(schema.join(name), work.join(name)).with_context(|| format!("cannot copy {name}"))?;
    }
    symlink(modules, work.join(MODULES)).context("cannot link the packages")?;
    for dashboard in dashboards {
        let name = dashboard.file_stem().context("a dashboard has a name")?;
        let path = work.join(name).with_extension("ts");
        fs::write(&path, module_of(&read(dashboard)?))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The import stands behind, so that the lines of the module are those of the file.
fn module_of(dashboard: &str) -> String {
    format!(
        "export const dashboard: AnyDashboard = {dashboard};\nimport type {{ AnyDashboard }} from './check';\n"
    )
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_a_module_are_those_of_its_dashboard() {
        let module = module_of("{\n  \"title\": \"a\"\n}");
        assert_eq!(module.lines().nth(1), Some("  \"title\": \"a\""));
        assert!(
            module.starts_with("export const dashboard: AnyDashboard = {\n"),
            "{module}"
        );
    }
}
