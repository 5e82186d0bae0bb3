//! Small machines under emulation: another kernel, or a disk whose power can be cut.
//!
//! A guest is one of Debian's kernels in QEMU with busybox, some programs of ours and their libraries, all in memory. Its script runs as
//! root; what it prints is the console, and its exit code is the guest's. Emulation needs no rights and no KVM. On x86-64 Linux only,
//! since the programs are those that were built here.
//!
//! ```text
//! for kernel in guest::kernels()? {
//!     let outcome = run_in_guest(&kernel, &[program], "program --check", Duration::from_secs(60))?;
//! }
//! ```

mod initramfs;
mod kernel;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use self::initramfs::Initramfs;
pub use self::kernel::Kernel;
use crate::tools;
use crate::watched::{Watched, last_words};

/// What the disk and the network of every guest need.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_net", "ext4"];

/// What the guest's root holds before anything is put there.
const DIRECTORIES: [&str; 6] = ["dev", "proc", "sys", "tmp", "bin", "data"];

/// What stands before the exit code on the console, and on no line that a kernel or a program writes by itself.
const EXIT_MARK: &str = "@@guest-exit ";

/// The guest's own address in QEMU's user network.
const GUEST_ADDRESS: &str = "10.0.2.15";

/// The kernels that guests can boot here, after installing what is needed for it. Says on standard output why there are none.
///
/// # Errors
/// When something was to be installed or fetched and could not be.
pub fn kernels() -> Result<Vec<Kernel>> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        println!("guests run on x86-64 Linux only, since they run the programs that were built here");
        return Ok(Vec::new());
    }
    tools::ensure_installed(&tools::FOR_GUESTS)?;
    if tools::FOR_GUESTS.iter().all(|tool| tool.works()) {
        kernel::all()
    } else {
        Ok(Vec::new())
    }
}

/// Boots `kernel`, runs `script` with `programs` on its path, and waits for its end.
///
/// # Errors
/// When the guest cannot be made or started, is not through within `limit`, or ends without an exit code. That the script failed is no
/// error here: it is in the outcome.
pub fn run_in_guest(kernel: &Kernel, programs: &[PathBuf], script: &str, limit: Duration) -> Result<Outcome> {
    let guest = Guest {
        kernel,
        programs,
        files: &[],
        script,
        disk: None,
        forward: None,
    };
    let scratch = Scratch::new("guest")?;
    Outcome::of(guest.boot(scratch.path(), limit)?)
}

/// How a guest ended by itself.
#[derive(Debug)]
pub struct Outcome {
    /// What its script ended with.
    pub exit_code: i32,
    /// All that it said.
    pub console: String,
    /// From the start of QEMU to its end.
    pub took: Duration,
}

impl Outcome {
    /// Waits for the end of a guest.
    ///
    /// # Errors
    /// When it does not end within its time, or without an exit code, as after a panic. The end of its console is in the message.
    pub fn of(guest: Watched) -> Result<Outcome> {
        let ended = guest.finish()?;
        let exit_code = exit_code_in(&ended.said).with_context(|| {
            format!(
                "the guest ended without an exit code (QEMU: {}); {}",
                ended.status,
                last_words(&ended.said)
            )
        })?;
        Ok(Outcome {
            exit_code,
            console: ended.said,
            took: ended.took,
        })
    }
}

fn exit_code_in(console: &str) -> Option<i32> {
    let line = console
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix(EXIT_MARK))?;
    line.trim().parse().ok()
}

/// A machine to be.
#[derive(Debug)]
pub struct Guest<'g> {
    /// What it boots.
    pub kernel: &'g Kernel,
    /// Programs of ours, in `/bin`.
    pub programs: &'g [PathBuf],
    /// Further files, as (path without the first slash, content).
    pub files: &'g [(&'g str, &'g str)],
    /// What it does; it ends with this.
    pub script: &'g str,
    /// Its disk, `/dev/vda`, if it has one.
    pub disk: Option<&'g LoggedDisk>,
    /// Connections to the first, on this machine, arrive at this port of the guest.
    pub forward: Option<(SocketAddr, u16)>,
}

/// A disk that keeps account of what was written to it, and in which order.
///
/// Each write goes to `image` as QEMU would do anyway, and to `log` in the format of the kernel's dm-log-writes, with the flushes in
/// between. What the guest may rely on after a power cut can be told from the log alone.
#[derive(Debug)]
pub struct LoggedDisk {
    /// A raw image.
    pub image: PathBuf,
    /// A new file.
    pub log: PathBuf,
}

impl Guest<'_> {
    /// Starts it. Its files are put in `scratch`, which must stay until it has ended.
    ///
    /// # Errors
    /// When a program or a module is missing, or QEMU cannot be started.
    pub fn boot(&self, scratch: &Path, limit: Duration) -> Result<Watched> {
        let initramfs = scratch.join("initramfs");
        fs::write(&initramfs, self.initramfs()?)
            .with_context(|| format!("cannot write {}", initramfs.display()))?;
        Watched::start("guest", self.qemu(&initramfs)?, limit)
    }

    fn initramfs(&self) -> Result<Vec<u8>> {
        let mut archive = Initramfs::default();
        DIRECTORIES.iter().for_each(|path| archive.directory(path));
        archive.program(&kernel::busybox()?)?;
        for program in self.programs {
            archive.program(program)?;
        }
        let mut load = String::new();
        for (name, module) in self.kernel.modules(&MODULES)? {
            let path = format!("modules/{name}.ko");
            archive.file(&path, &module);
            load += &format!("insmod /{path}\n");
        }
        archive.file("init", init(&load).as_bytes());
        archive.file("script", self.script.as_bytes());
        for (path, content) in self.files {
            archive.file(path, content.as_bytes());
        }
        Ok(archive.finish())
    }

    fn qemu(&self, initramfs: &Path) -> Result<Command> {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg", "-cpu", "max", "-m", "1G"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-monitor", "none", "-serial", "stdio"])
            // A panic ends the guest: the kernel reboots at once, and QEMU does not.
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(initramfs);
        if let Some(disk) = self.disk {
            command.arg("-blockdev").arg(disk.block_device()?);
            // With a write cache, so that the guest sends its flushes: without one, each write would count as durable.
            command.args(["-device", "virtio-blk-pci,drive=disk,write-cache=on"]);
        }
        // `restrict`: the guest reaches nobody; it is only reached.
        let mut network = "user,id=net,restrict=on".to_owned();
        if let Some((here, port)) = self.forward {
            network += &format!(",hostfwd=tcp:{here}-{GUEST_ADDRESS}:{port}");
        }
        command
            .args(["-netdev", &network])
            .args(["-device", "virtio-net-pci,netdev=net,romfile="]);
        Ok(command)
    }
}

impl LoggedDisk {
    fn block_device(&self) -> Result<String> {
        let path = |path: &Path| {
            let text = path.to_string_lossy().into_owned();
            // A comma would end the value, and QEMU's way to write one is worth no code here.
            ensure!(!text.contains(','), "a disk's path may hold no comma: {text}");
            Ok(text)
        };
        Ok(format!(
            "driver=blklogwrites,node-name=disk,file.driver=file,file.filename={},log.driver=file,log.filename={}",
            path(&self.image)?,
            path(&self.log)?
        ))
    }
}

/// The guest's first process: mounts, modules, network, the script, the end.
fn init(load_modules: &str) -> String {
    format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin HOME=/tmp\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t devtmpfs dev /dev\n\
         {load_modules}\
         ip link set lo up\n\
         ip address add {GUEST_ADDRESS}/24 dev eth0\n\
         ip link set eth0 up\n\
         sh /script\n\
         echo \"{EXIT_MARK}$?\"\n\
         poweroff -f\n"
    )
}

/// A directory for one run, gone when this is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one for `what`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(what: &str) -> Result<Scratch> {
        let path = std::env::temp_dir().join(format!("vllm-gateway-{what}-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Scratch(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn ended(script: &str) -> Result<Outcome> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Outcome::of(Watched::start("guest", command, Duration::from_secs(60))?)
    }

    #[test]
    fn a_guest_s_exit_code_is_what_its_script_ended_with() {
        let outcome = ended("echo up; echo '@@guest-exit 3'; echo '[ 2.1] reboot: Power down'");
        let outcome = outcome.expect("it says how it ended");
        assert_eq!(outcome.exit_code, 3);
        assert!(outcome.console.starts_with("up\n"), "{}", outcome.console);
    }

    #[test]
    fn a_guest_that_panics_has_no_exit_code_and_its_last_words_are_shown() {
        let error = ended("echo Kernel panic; exit 1").expect_err("it does not say how it ended");
        let text = error.to_string();
        assert!(
            text.contains("without an exit code") && text.contains("  Kernel panic\n"),
            "{text}"
        );
    }
}
