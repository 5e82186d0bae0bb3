//! The Prometheus server's configuration, on the ports of this system.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::ports::{Ports, USUAL_BASE};

/// The file that says what is scraped, in the repository's directory of the same name.
pub const CONFIG_FILE: &str = "prometheus.yml";

/// Copies what is in `from` into `to`, with the targets moved to `ports`. All of it, since rules are named relative to the configuration.
///
/// # Errors
/// When a file cannot be copied, or the configuration does not scrape what runs.
pub fn copy_config(from: &Path, to: &Path, ports: Ports) -> Result<()> {
    copy_all(from, to)?;
    let config = to.join(CONFIG_FILE);
    let text = fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let text = on_ports(&text, ports).with_context(|| format!("{CONFIG_FILE} in {}", from.display()))?;
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_all(&path, &copy)?;
        } else {
            fs::copy(&path, &copy).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

fn on_ports(config: &str, ports: Ports) -> Result<String> {
    let usual = Ports::from_base(USUAL_BASE);
    let moved = [
        (usual.admin(), ports.admin()),
        (usual.llm(), ports.llm()),
        (usual.embeddings(), ports.embeddings()),
    ];
    // In one pass, so that a target that has been moved is not taken for one that has not.
    let mut lines = Vec::new();
    for line in config.lines() {
        let mut line = line.to_owned();
        for (from, to) in moved {
            let target = format!("127.0.0.1:{from}");
            if line.contains(&target) {
                line = line.replace(&target, &format!("127.0.0.1:{to}"));
                break;
            }
        }
        lines.push(line);
    }
    for (from, _) in moved {
        ensure!(
            config.contains(&format!("- 127.0.0.1:{from}\n")),
            "expected the target `- 127.0.0.1:{from}` on a line of its own, found none"
        );
    }
    Ok(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../../prometheus/prometheus.yml");

    #[test]
    fn the_shipped_configuration_scrapes_what_runs() {
        let usual = on_ports(SHIPPED, Ports::from_base(USUAL_BASE)).expect("all targets");
        assert_eq!(usual, SHIPPED);
        // A base whose admin port is the usual port of another target.
        let moved = on_ports(SHIPPED, Ports::from_base(8000 - 1464)).expect("all targets");
        let targets: Vec<_> = moved
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- 127.0.0.1:"))
            .collect();
        assert_eq!(targets, ["8000", "6536", "6537"]);
    }

    #[test]
    fn a_missing_target_is_an_error() {
        let error =
            on_ports("targets:\n  - 127.0.0.1:9464\n", Ports::from_base(9000)).expect_err("two are missing");
        assert!(error.to_string().contains("127.0.0.1:8000"), "{error}");
    }

    #[test]
    fn all_files_are_copied() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../prometheus");
        let to = std::env::temp_dir().join(format!("xtask-prometheus-{}", std::process::id()));
        copy_config(&root, &to, Ports::from_base(20_000)).expect("a copy");
        let config = fs::read_to_string(to.join(CONFIG_FILE)).expect("the configuration");
        assert!(
            config.contains("127.0.0.1:21464") && !config.contains(":9464"),
            "{config}"
        );
        let rules = |of: &Path| fs::read_to_string(of.join("rules/alerts.yml")).expect("the alerts");
        assert_eq!(rules(&to), rules(&root));
        let count = |path: &Path| fs::read_dir(path).expect("a directory").count();
        assert_eq!(count(&to), count(&root));
        fs::remove_dir_all(to).expect("ours");
    }
}
