//! `cargo xtask dev --metal`: vLLM itself on the GPU of an Apple Silicon Mac, where `cargo xtask dev` has simulators.
//!
//! vLLM's own wheel for macOS computes on the CPU; the plugin vllm-metal, of vLLM's organisation, has it compute on the GPU, with MLX. No package
//! index has either, so both come from the releases of their projects, as the plugin's own installer takes them, in versions that belong
//! together. They go into an environment of their own in the user's cache, once.
//!
//! What was tried and what not: the tests run all of this with programs that stand in for `uname`, `python3.12`, `curl` and `vllm`. The
//! installation itself was read up in the plugin's documentation and installer, and needs a Mac to be seen. Embeddings on Metal are
//! experimental, says the plugin; `METAL_EMBEDDINGS_MODEL=none` goes without.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cache;
use crate::stage::run;

/// vLLM's wheel that the plugin's release below installs.
const VLLM_WHEEL: &str = "https://github.com/vllm-project/vllm/releases/download/v0.27.1/vllm-0.27.1%2Bcpu-cp312-cp312-macosx_11_0_arm64.whl";

/// The plugin's release, which has no stable numbers yet.
const PLUGIN: &str = "v0.3.0.dev20260822182524";

/// Where the plugin's releases are described.
const PLUGIN_RELEASES: &str = "https://api.github.com/repos/vllm-project/vllm-metal/releases/tags";

/// What the wheels are for.
const PYTHON: &str =
    "import platform, sys; sys.exit(sys.version_info[:2] != (3, 12) or platform.machine() != 'arm64')";

/// Small models that the plugin's table of supported ones names: some hundred megabytes each.
const CHAT_MODEL: &str = "Qwen/Qwen3-0.6B";
const EMBEDDINGS_MODEL: &str = "mlx-community/Qwen3-Embedding-0.6B-8bit";

/// As a model: do without.
const NONE: &str = "none";

/// vLLM as it is to be run.
#[derive(Debug)]
pub struct Metal {
    program: PathBuf,
    chat_model: String,
    embeddings_model: Option<String>,
}

impl Metal {
    /// Installs what is missing, after a look at the machine.
    ///
    /// The environment may name what is to be taken instead: `METAL_VLLM` (a `vllm` that is installed), `METAL_PYTHON`, `METAL_CHAT_MODEL`,
    /// `METAL_EMBEDDINGS_MODEL` (or `none`).
    ///
    /// # Errors
    /// When this is no such machine, there is no Python for it, or a download fails; the message says what to do.
    pub fn set_up() -> Result<Metal> {
        let set = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let program = match set("METAL_VLLM") {
            Some(program) => PathBuf::from(program),
            None => installed(set("METAL_PYTHON").as_deref())?,
        };
        let embeddings_model = set("METAL_EMBEDDINGS_MODEL").unwrap_or_else(|| EMBEDDINGS_MODEL.to_owned());
        Ok(Metal {
            program,
            chat_model: set("METAL_CHAT_MODEL").unwrap_or_else(|| CHAT_MODEL.to_owned()),
            embeddings_model: (embeddings_model != NONE).then_some(embeddings_model),
        })
    }

    /// The model that chats.
    pub fn chat_model(&self) -> &str {
        &self.chat_model
    }

    /// The server that generates text.
    pub fn chat(&self, port: u16) -> Command {
        // Both servers share the machine's memory with everything else. A context of 4096 is enough to try things out.
        self.serve(
            &self.chat_model,
            port,
            &["--max-model-len", "4096", "--gpu-memory-utilization", "0.4"],
        )
    }

    /// The server that embeds, if there is to be one.
    pub fn embeddings(&self, port: u16) -> Option<Command> {
        let model = self.embeddings_model.as_ref()?;
        let options = [
            "--runner",
            "pooling",
            "--max-model-len",
            "512",
            "--gpu-memory-utilization",
            "0.2",
        ];
        let mut command = self.serve(model, port, &options);
        // As the plugin's documentation has it for this runner.
        command
            .env("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            .env("VLLM_METAL_USE_PAGED_ATTENTION", "1");
        Some(command)
    }

    fn serve(&self, model: &str, port: u16, options: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["serve", model, "--host", "127.0.0.1", "--port", &port.to_string()])
            .args(options)
            // The servers' share is what `--gpu-memory-utilization` says.
            .env("VLLM_METAL_MEMORY_FRACTION", "auto");
        command
    }
}

/// Whether this machine can do it.
///
/// # Errors
/// When it cannot; the message says what it is.
pub fn ensure_machine() -> Result<()> {
    let found = output_of(Command::new("uname").arg("-sm"))?;
    ensure!(
        found == "Darwin arm64",
        "vLLM on Metal takes macOS on Apple Silicon: `uname -sm` should say `Darwin arm64`, and says `{found}`{}. `cargo xtask dev` runs \
         everywhere, with simulators",
        if found == "Darwin x86_64" {
            " (on Apple Silicon that is a terminal under Rosetta)"
        } else {
            ""
        }
    );
    Ok(())
}

/// The program `vllm` in an environment of its own.
fn installed(python: Option<&str>) -> Result<PathBuf> {
    let place = cache::directory(&format!("metal/{PLUGIN}"))?;
    let (program, complete) = (place.join("bin/vllm"), place.join("complete"));
    if complete.is_file() && program.is_file() {
        return Ok(program);
    }
    let python = find_python(python)?;
    println!(
        "installing vLLM and vllm-metal {PLUGIN} into {} (some gigabytes, once)",
        place.display()
    );
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    run(Command::new(python).args(["-m", "venv", "--clear"]).arg(&place))?;
    let own = place.join("bin/python");
    pip_install(&own, VLLM_WHEEL)?;
    pip_install(&own, &plugin_wheel()?)?;
    ensure!(
        program.is_file(),
        "pip has ended well, and there is no {}: remove {} and try again",
        program.display(),
        place.display()
    );
    File::create(&complete)?;
    Ok(program)
}

fn find_python(named: Option<&str>) -> Result<&str> {
    let candidates = named.map_or_else(|| vec!["python3.12", "python3"], |named| vec![named]);
    let fits = |python: &&str| {
        let mut command = Command::new(python);
        command
            .args(["-c", PYTHON])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let found = candidates.iter().copied().find(fits);
    found.with_context(|| {
        format!(
            "vLLM's wheel for macOS takes Python 3.12 for arm64, and none of {candidates:?} is that: `brew install python@3.12`, or name one in \
             METAL_PYTHON"
        )
    })
}

fn pip_install(python: &Path, what: &str) -> Result<()> {
    let mut pip = Command::new(python);
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        what,
    ]);
    run(&mut pip)
}

/// Where the plugin's wheel is: its name has more in it than its release.
fn plugin_wheel() -> Result<String> {
    let page = format!("{PLUGIN_RELEASES}/{PLUGIN}");
    let release = output_of(Command::new("curl").args(["-fsSL", &page]))?;
    wheel_in(&release).with_context(|| format!("{page} names no wheel"))
}

fn wheel_in(release: &str) -> Option<String> {
    let release: Value = serde_json::from_str(release).ok()?;
    let mut urls = release["assets"]
        .as_array()?
        .iter()
        .filter_map(|asset| asset["browser_download_url"].as_str());
    urls.find(|url| url.starts_with("https://") && url.ends_with(".whl"))
        .map(str::to_owned)
}

fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wheel_is_found_among_what_a_release_has() {
        let release = |urls: &[&str]| {
            let assets: Vec<_> = urls
                .iter()
                .map(|url| serde_json::json!({"browser_download_url": url}))
                .collect();
            serde_json::json!({ "assets": assets }).to_string()
        };
        let wheel = "https://example.org/vllm_metal-0.3.0-cp312-cp312-macosx_15_0_arm64.whl";
        assert_eq!(
            wheel_in(&release(&["https://example.org/notes.txt", wheel])).as_deref(),
            Some(wheel)
        );
        for without in [&release(&["file:///x.whl"]), &release(&[]), "{}", "not JSON"] {
            assert_eq!(wheel_in(without), None, "{without}");
        }
    }
}
