//! The programs for a target, by whichever toolchain of this machine can make them.

use std::env::{self, consts};
use std::fmt;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::PROGRAMS;
use crate::dev;
use crate::stage::{self, run};
use crate::toolchain::Toolchain;
use crate::tools::{self, Tool};

/// What is built for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    triple: String,
}

/// Where Rust's own musl is not to be had, the static build takes Debian's.
const MUSL: [Tool; 1] = [Tool::for_tests(
    "musl-gcc",
    &["musl-gcc", "--version"],
    "musl-tools",
    "the static build",
)];

impl Target {
    /// That of a name: `musl` and `gnu` are of this machine's processor.
    ///
    /// # Errors
    /// When it is not for Linux.
    pub fn named(name: &str) -> Result<Target> {
        let triple = match name {
            "musl" | "gnu" => format!("{}-unknown-linux-{name}", consts::ARCH),
            triple => triple.to_owned(),
        };
        ensure!(
            triple.contains("-linux-"),
            "expected musl, gnu, or a target of Linux such as aarch64-unknown-linux-musl, found {name}"
        );
        Ok(Target { triple })
    }

    /// Whether the programs have no loader, and so no embedded ClickHouse.
    pub fn is_static(&self) -> bool {
        self.triple.ends_with("-musl")
    }

    /// Whether its programs run here.
    pub fn runs_here(&self) -> bool {
        self.triple.starts_with(consts::ARCH)
    }

    /// What an archive is called after, as in `x86_64-linux-musl`.
    pub fn short(&self) -> String {
        self.triple.replace("-unknown", "")
    }

    /// The part of variables' names.
    fn variable(&self, prefix: &str, suffix: &str) -> String {
        let name = self.triple.replace('-', "_");
        format!("{prefix}{}{suffix}", name.to_ascii_uppercase())
    }
}

impl fmt::Display for Target {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.triple)
    }
}

/// Builds the programs for release. Returns the directory that they are in.
///
/// # Errors
/// When no toolchain can, or one fails.
pub fn programs(root: &Path, target: &Target) -> Result<PathBuf> {
    // Of its own: other flags than those of the usual builds would make those compile everything again.
    let directory = dev::target_directory()?.join("dist-build");
    let mut command = if has_target(target) {
        with_rustup(root, target)
    } else {
        with_debian(root, target, &directory)?
    };
    command
        .args(["--release", "--locked", "--package", "gateway-user", "--bins"])
        .args(["--target", &target.triple, "--target-dir"])
        .arg(&directory);
    run(&mut command)?;
    let programs = directory.join(&target.triple).join("release");
    for program in PROGRAMS {
        ensure!(
            programs.join(program).exists(),
            "no {program} in {}",
            programs.display()
        );
    }
    Ok(programs)
}

/// Whether the compiler in use brings the target's library, after asking rustup for it.
fn has_target(target: &Target) -> bool {
    let is_there = || {
        let output = Command::new("rustc")
            .args(["--print", "target-libdir", "--target", &target.triple])
            .output();
        output.is_ok_and(|output| {
            let directory = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            entries
                .filter(|entry| entry.file_name().to_string_lossy().starts_with("libstd-"))
                .count()
                > 0
        })
    };
    if !is_there() {
        // Whether it went well shows below; without a way to its server it does not.
        let _ = Command::new("rustup")
            .args(["target", "add", &target.triple])
            .output();
    }
    is_there()
}

fn with_rustup(root: &Path, target: &Target) -> Command {
    let mut command = stage::cargo(root);
    command.arg("build");
    if target.is_static() && MUSL[0].works() {
        // For the little C that there is. Rust's own parts are linked by its own linker.
        command.env(format!("CC_{}", target.triple.replace('-', "_")), "musl-gcc");
    }
    command
}

/// Debian's compiler can do what is unstable, and builds Rust's library itself.
fn with_debian(root: &Path, target: &Target, directory: &Path) -> Result<Command> {
    ensure!(
        target.is_static() && target.runs_here(),
        "this machine's Rust has no library for {target}: rustup target add {target}"
    );
    tools::ensure_installed(&MUSL)?;
    ensure!(MUSL[0].works(), "{target} takes a C compiler for musl");
    let toolchain = Toolchain::debian()?;
    let mut command = toolchain.cargo();
    let linker = target.variable("CARGO_TARGET_", "_LINKER");
    // Whoever names one knows better.
    if env::var_os(&linker).is_none() {
        command.env(linker, debian_linker(directory)?);
    }
    command
        .current_dir(root)
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C link-self-contained=no",
        )
        .env(format!("CC_{}", target.triple.replace('-', "_")), "musl-gcc")
        .args(["build", "-Z", "build-std=std,panic_abort"]);
    Ok(command)
}

/// What gcc's unwinder asks of glibc, made of what musl has.
const FIND_OBJECT: &str = include_str!("find_object.c");

/// What stands between rustc and Debian's musl-gcc, which links a static program that can lie anywhere in memory against the loader, and has no
/// libunwind: gcc's own unwinder does the same under another name.
fn debian_linker(directory: &Path) -> Result<PathBuf> {
    let place = directory.join("linker");
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let found = Command::new("cc")
        .arg("-print-file-name=libgcc_eh.a")
        .output()
        .context("a C compiler is needed: Debian: apt-get install gcc")?;
    let unwinder = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
    ensure!(unwinder.is_absolute(), "gcc has no libgcc_eh.a");
    let (source, object) = (place.join("find_object.c"), place.join("find_object.o"));
    fs::write(&source, FIND_OBJECT).with_context(|| format!("cannot write {}", source.display()))?;
    run(Command::new("musl-gcc")
        .args(["-O2", "-fPIC", "-c", "-o"])
        .args([&object, &source]))?;
    // A library by name, a list of files to the linker.
    let library = format!("GROUP({} {})\n", unwinder.display(), object.display());
    fs::write(place.join("libunwind.a"), library).context("cannot write libunwind.a")?;
    let script = place.join("cc");
    let text = format!(
        "#!/bin/sh\nfor word; do\n    [ \"$word\" = -static-pie ] && word=-static\n    set -- \"$@\" \"$word\"\n    shift\ndone\n\
         exec musl-gcc -L'{}' \"$@\"\n",
        place.display()
    );
    fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
    fs::set_permissions(&script, Permissions::from_mode(0o755))?;
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_this_machine_s_or_named_in_full() {
        let musl = Target::named("musl").expect("a target");
        assert!(musl.is_static() && musl.runs_here());
        assert_eq!(musl.short(), format!("{}-linux-musl", consts::ARCH));
        let other = Target::named("riscv64gc-unknown-linux-gnu").expect("a target");
        assert!(!other.is_static() && !other.runs_here());
        assert_eq!(
            other.variable("CARGO_TARGET_", "_LINKER"),
            "CARGO_TARGET_RISCV64GC_UNKNOWN_LINUX_GNU_LINKER"
        );
        let refused = Target::named("aarch64-apple-darwin")
            .expect_err("not Linux")
            .to_string();
        assert!(refused.contains("musl"), "{refused}");
    }

    /// Where it is needed: Rust's own library for musl brings a linker's parts of its own.
    #[test]
    fn debian_s_compiler_for_musl_links_what_rust_asks_it_to() {
        if !MUSL[0].works() {
            return;
        }
        let directory = env::temp_dir().join(format!("xtask-linker-{}", std::process::id()));
        let linker = debian_linker(&directory).expect("a linker");
        let (source, program) = (directory.join("main.c"), directory.join("main"));
        // It counts its own frames, as a panic does.
        let text = "#include <unwind.h>\n\
            static _Unwind_Reason_Code count(struct _Unwind_Context *frame, void *n) { ++*(int *)n; return _URC_NO_REASON; }\n\
            __attribute__((noinline)) static int deep(int n) { int frames = 0; if (n) return deep(n - 1) + (n > 99); \
            _Unwind_Backtrace(count, &frames); return frames; }\n\
            int main(int n, char **words) { return deep(n + 2) > 3 ? 0 : 1; }\n";
        fs::write(&source, text).expect("a writable directory");
        let includes = Command::new("cc")
            .arg("-print-file-name=include")
            .output()
            .expect("a C compiler");
        let includes = String::from_utf8(includes.stdout).expect("text");
        let mut link = Command::new(linker);
        link.args([
            "-static-pie",
            "-fPIE",
            "-fexceptions",
            "-I",
            includes.trim(),
            "-o",
        ])
        .args([&program, &source])
        .args(["-Wl,--eh-frame-hdr", "-nodefaultlibs", "-lunwind", "-lc"]);
        run(&mut link).expect("it links");
        run(&mut Command::new(&program)).expect("it runs");
        let bytes = fs::read(&program).expect("a program");
        let asks_for_a_loader = bytes.windows(8).any(|window| window == b"ld-musl-");
        assert!(!asks_for_a_loader, "it is not static");
        fs::remove_dir_all(&directory).expect("ours");
    }
}
