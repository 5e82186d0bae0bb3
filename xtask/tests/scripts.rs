//! Shell scripts: all of them are held against ShellCheck, and `scripts/dev.sh` does what it says. What it is to do on a Mac is run with programs
//! that stand in for those of the Mac, and write down how they were called; vLLM's part is played by the simulator.
#![cfg(unix)]

mod system;

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use system::{System, XTASK, pids_in, port_base, target_directory};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask stands in the workspace")
}

fn text_of(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|bytes| String::from_utf8_lossy(bytes))
        .concat()
}

/// Every file of the repository that a shell runs.
fn scripts() -> Vec<PathBuf> {
    let (mut found, mut pending) = (Vec::new(), vec![root().to_owned()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).expect("a readable directory") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if path.is_symlink() || ["target", ".git", "spool", "node_modules"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let bytes = fs::read(&path).expect("a readable file");
            let first =
                String::from_utf8_lossy(bytes.split(|byte| *byte == b'\n').next().unwrap_or_default());
            if name.ends_with(".sh") || (first.starts_with("#!") && first.trim_end().ends_with("sh")) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
#[cfg_attr(
    target_os = "macos",
    ignore = "ShellCheck is installed with the tests' tools on Debian"
)]
fn shellcheck_finds_nothing_in_any_script() {
    let scripts = scripts();
    for known in [".ci/run", "scripts/dev.sh"] {
        assert!(
            scripts.contains(&root().join(known)),
            "{known} is not among {scripts:?}"
        );
    }
    let output = Command::new("shellcheck")
        .arg("--severity=style")
        .args(&scripts)
        .output();
    let output = output.expect("shellcheck, which `cargo xtask test` installs");
    assert!(output.status.success(), "{}", text_of(&output));
}

/// A machine of the test's own: a directory with the only programs that are found, and one for what is installed.
struct Machine {
    place: PathBuf,
}

impl Machine {
    /// One that says of itself `uname`, without any other program.
    fn new(test: &str, uname: &str) -> Machine {
        let place = std::env::temp_dir().join(format!("xtask-scripts-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(place.join("bin")).expect("a directory");
        let machine = Machine { place };
        machine.add("uname", &format!("echo '{uname}'"));
        machine
    }

    /// A Mac on which everything succeeds. Its `vllm` is the simulator, with `before` in front of it.
    fn mac(test: &str, before: &str) -> Machine {
        let machine = Machine::new(test, "Darwin arm64");
        let vllm = machine.place.join("vllm");
        let simulator = target_directory().join("debug/vllm-sim");
        write(
            &vllm,
            &format!(
                "{}{before}\nmodel=$2 kind=generate\nwhile [ $# -gt 0 ]; do\n  case $1 in\n    --port) port=$2 ;;\n    --runner) kind=embed ;;\n  esac\n  shift\ndone\nexec {} --listen 127.0.0.1:$port --model \"$model\" --kind $kind\n",
                machine.noting("vllm"),
                simulator.display()
            ),
        );
        // `-m venv` makes the environment, whose Python is this program again; pip puts `vllm` there.
        machine.add(
            "python3.12",
            &format!(
                "case \"$1 $2\" in\n  '-m venv') /bin/mkdir -p \"$4/bin\" && /bin/ln -sf \"$0\" \"$4/bin/python\" ;;\n  '-m pip') /bin/ln -sf {} \"${{0%/*}}/vllm\" ;;\nesac",
                vllm.display()
            ),
        );
        machine.add(
            "curl",
            "echo '{\"assets\": [{\"browser_download_url\": \"https://example.org/plugin.whl\"}]}'",
        );
        machine
    }

    /// The first lines of a program that writes down its name and arguments, but for code.
    fn noting(&self, name: &str) -> String {
        format!(
            "#!/bin/sh\nnote={name}\nfor word; do\n  case $word in import*) word=CODE ;; esac\n  note=\"$note $word\"\ndone\necho \"$note\" >> {}\n",
            self.place.join("notes").display()
        )
    }

    fn add(&self, name: &str, script: &str) {
        write(
            &self.place.join("bin").join(name),
            &format!("{}{script}\n", self.noting(name)),
        );
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.place.join("bin").join(name)).expect("it was there");
    }

    /// The command on this machine.
    fn on(&self, mut command: Command) -> Command {
        command
            .env("PATH", self.place.join("bin"))
            .env("XDG_CACHE_HOME", self.place.join("cache"));
        for inherited in [
            "METAL_VLLM",
            "METAL_PYTHON",
            "METAL_CHAT_MODEL",
            "METAL_EMBEDDINGS_MODEL",
        ] {
            command.env_remove(inherited);
        }
        // No rows: ClickHouse's engine is not on this machine.
        command.env("CLICKHOUSE_URL", "none");
        command
    }

    fn metal(&self, base: u16) -> Command {
        self.on(system::up(base, &["--metal", "--no-prometheus"]))
    }

    /// How its programs were called since the last question, with the cache's path shortened, and without the probes of ClickHouse's download.
    fn notes(&self) -> Vec<String> {
        let notes = fs::read_to_string(self.place.join("notes")).unwrap_or_default();
        let _ = fs::remove_file(self.place.join("notes"));
        let cache = self.place.join("cache").display().to_string();
        notes.lines().map(|line| line.replace(&cache, "CACHE")).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.place);
    }
}

fn write(path: &Path, script: &str) {
    fs::write(path, script).expect("a writable directory");
    fs::set_permissions(path, Permissions::from_mode(0o755)).expect("our file");
}

/// What fails before anything is up: its text, after a look at the exit code.
fn refused(machine: &Machine, base: u16) -> String {
    let output = machine.metal(base).output().expect("xtask starts");
    let text = text_of(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let _ = fs::remove_dir_all(target_directory().join(format!("dev-{base}")));
    text
}

const PLACE: &str = "CACHE/vllm-gateway/metal/v0.3.0.dev20260822182524";

#[test]
fn on_a_mac_vllm_is_installed_once_and_serves_behind_the_gateway() {
    let machine = Machine::mac("happy", "");
    let base = port_base(4);
    let system = System::start_command(machine.metal(base), "\ngateway ");
    assert_eq!(
        system.pids.keys().collect::<Vec<_>>(),
        ["gateway", "vllm", "vllm-embed"]
    );
    let mut notes = machine.notes();
    let pip = "-m pip install --quiet --disable-pip-version-check";
    let serve = "--host 127.0.0.1 --port";
    let vllm = [
        format!(
            "vllm serve Qwen/Qwen3-0.6B {serve} {base} --max-model-len 4096 --gpu-memory-utilization 0.4"
        ),
        format!(
            "vllm serve mlx-community/Qwen3-Embedding-0.6B-8bit {serve} {} --runner pooling --max-model-len 512 --gpu-memory-utilization 0.2",
            base + 1
        ),
    ];
    let installing = [
        "uname -sm".to_owned(),
        "python3.12 -c CODE".to_owned(),
        format!("python3.12 -m venv --clear {PLACE}"),
        format!("python3.12 {pip} https://github.com/vllm-project/vllm/releases/download/v0.27.1/vllm-0.27.1%2Bcpu-cp312-cp312-macosx_11_0_arm64.whl"),
        "curl -fsSL https://api.github.com/repos/vllm-project/vllm-metal/releases/tags/v0.3.0.dev20260822182524".to_owned(),
        format!("python3.12 {pip} https://example.org/plugin.whl"),
    ];
    assert_eq!(notes, [&installing[..], &vllm].concat());

    // The gateway is in front of them, and takes nothing but requests.
    let models = system::get(base + 80, "/v1/models", "X-Team-ID: me\r\n");
    assert!(models.contains("Qwen/Qwen3-0.6B"), "{models}");
    let metrics = system::get(base + 1464, "/metrics", "");
    assert!(
        metrics.contains("gateway_capture_info{mode=\"proxy\"} 1"),
        "{metrics}"
    );

    let script = |words: &[&str]| {
        let mut command = Command::new(root().join("scripts/dev.sh"));
        command.args(words).args(["--port-base", &base.to_string()]);
        // A `cargo` that knows where the commands are.
        let bin = machine.place.join("cargo-bin");
        fs::create_dir_all(&bin).expect("a directory");
        write(
            &bin.join("cargo"),
            &format!("#!/bin/sh\nshift\nexec {XTASK} \"$@\"\n"),
        );
        command
            .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
            .env("CLICKHOUSE_URL", "none");
        command.output().expect("a shell")
    };
    let status = text_of(&script(&["status"]));
    assert_eq!(pids_in(&status), system.pids, "{status}");
    let logs = text_of(&script(&["logs", "vllm"]));
    assert!(logs.contains("── vllm: "), "{logs}");
    let second = machine.metal(base).output().expect("xtask starts");
    let who = format!("runs already (process {})", system.xtask.id());
    assert!(
        second.status.code() == Some(1) && text_of(&second).contains(&who),
        "{}",
        text_of(&second)
    );
    assert_eq!(machine.notes(), [""; 0], "who runs already looks at nothing");
    let stop = script(&["stop"]);
    assert!(stop.status.success(), "{}", text_of(&stop));
    let (code, text) = system.ended();
    assert_eq!(code, Some(0), "{text}");

    // What is installed is used as it is.
    let again = System::start_command(machine.metal(base), "\ngateway ");
    notes = machine.notes();
    assert_eq!(notes, [&["uname -sm".to_owned()][..], &vllm].concat());
    drop(again);
    let _ = fs::remove_dir_all(target_directory().join(format!("dev-{base}")));
}

#[test]
fn another_machine_is_refused_before_anything_is_done() {
    for (uname, hint) in [
        ("Linux x86_64", "says `Linux x86_64`"),
        ("Darwin x86_64", "Rosetta"),
    ] {
        let machine = Machine::new("other", uname);
        let text = refused(&machine, port_base(5));
        assert!(
            text.contains("takes macOS on Apple Silicon") && text.contains(hint),
            "{text}"
        );
        assert_eq!(machine.notes(), ["uname -sm"]);
    }
}

#[test]
fn without_a_python_that_fits_nothing_is_installed_and_it_says_how_to_get_one() {
    let machine = Machine::mac("python", "");
    machine.remove("python3.12");
    machine.add("python3", "exit 1");
    let text = refused(&machine, port_base(6));
    assert!(
        text.contains("brew install python@3.12") && text.contains("METAL_PYTHON"),
        "{text}"
    );
    assert_eq!(machine.notes(), ["uname -sm", "python3 -c CODE"]);
}

#[test]
fn a_download_that_fails_leaves_nothing_that_is_taken_for_complete() {
    let machine = Machine::mac("download", "");
    machine.add("curl", "echo 'curl: (22) 404' >&2; exit 22");
    let text = refused(&machine, port_base(7));
    assert!(text.contains("curl: (22) 404"), "{text}");
    machine.notes();
    refused(&machine, port_base(7));
    assert!(
        machine
            .notes()
            .contains(&format!("python3.12 -m venv --clear {PLACE}")),
        "it begins anew"
    );
}

#[test]
fn a_port_that_is_taken_is_named_before_anything_is_installed() {
    let machine = Machine::mac("port", "");
    let base = port_base(8);
    let _held = TcpListener::bind(("127.0.0.1", base + 1)).expect("a free port");
    let text = refused(&machine, base);
    assert!(
        text.contains(&format!(
            "embeddings server address 0.0.0.0:{} is in use",
            base + 1
        )),
        "{text}"
    );
    assert_eq!(machine.notes(), ["uname -sm"]);
}

#[test]
fn a_server_that_dies_at_its_start_is_named_with_its_last_words_and_the_others_go_too() {
    let dies = "case \"$*\" in *pooling*) echo 'no such model' >&2; exit 3 ;; esac";
    let machine = Machine::mac("dies", dies);
    let base = port_base(9);
    let text = refused(&machine, base);
    assert!(
        text.contains("vllm-embed (process ") && text.contains("exit status: 3"),
        "{text}"
    );
    assert!(
        text.contains("no such model") && text.contains("stopped vllm "),
        "{text}"
    );
    assert!(system::is_free(base), "the first server is still there");
}

#[test]
fn the_script_passes_everything_on_and_knows_no_other_words() {
    let machine = Machine::new("words", "-");
    machine.add("cargo", "");
    for tool in ["dirname", "cat"] {
        let found = ["/usr/bin", "/bin"].map(|directory| Path::new(directory).join(tool));
        let found = found.iter().find(|path| path.exists()).expect("a usual tool");
        symlink(found, machine.place.join("bin").join(tool)).expect("a directory of ours");
    }
    let script = |words: &[&str]| {
        let mut command = Command::new(root().join("scripts/dev.sh"));
        command.args(words);
        machine.on(command).output().expect("a shell")
    };
    for (words, called) in [
        (&["mock", "--for", "5s"][..], "cargo xtask dev --for 5s"),
        (&["metal", "--release"], "cargo xtask dev --metal --release"),
        (&["stop"], "cargo xtask dev stop"),
        (&["status"], "cargo xtask dev status"),
        (
            &["logs", "vllm", "--lines", "5"],
            "cargo xtask dev logs vllm --lines 5",
        ),
    ] {
        let output = script(words);
        assert!(output.status.success(), "{}", text_of(&output));
        assert_eq!(machine.notes(), [called]);
    }
    for wrong in [&[][..], &["start"], &["--help"]] {
        let output = script(wrong);
        assert_eq!(output.status.code(), Some(2));
        assert!(text_of(&output).contains("usage: scripts/dev.sh"), "{wrong:?}");
        assert_eq!(machine.notes(), [""; 0]);
    }
}
