//! Debian's kernels for machines in a cloud: fetched and unpacked, never installed.
//!
//! They stay in the user's cache, one directory a package. To get a newer kernel of a series, remove the one that is there.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::cache;
use crate::stage::run;

/// The series that the probe must run on, as far as this Debian offers them: bookworm's own, and trixie's.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];

/// The kernel's `ARCH` in package names; emulation of another processor would not run the programs that are built here.
const FLAVOUR: &str = "cloud-amd64";

/// A kernel with its modules, ready to be booted.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// What QEMU loads.
    pub image: PathBuf,
    modules: PathBuf,
}

/// The newest kernel of each series that is in the cache or that this Debian offers; none on another system.
///
/// # Errors
/// When one cannot be fetched.
pub fn all() -> Result<Vec<Kernel>> {
    let mut kernels = Vec::new();
    for series in SERIES {
        match of_series(series)? {
            Some(kernel) => kernels.push(kernel),
            None => println!(
                "no package linux-image-{series}.*-{FLAVOUR} is offered here: that kernel is left out"
            ),
        }
    }
    Ok(kernels)
}

/// The newest kernel of a series; `None` when this Debian has none.
///
/// # Errors
/// When it cannot be fetched.
fn of_series(series: &str) -> Result<Option<Kernel>> {
    let names = directory_names(&packages_directory()?);
    let package = match newest(&names, series) {
        Some(cached) => cached.to_owned(),
        None => match offered(series)? {
            Some(package) => package,
            None => return Ok(None),
        },
    };
    Kernel::unpacked(&fetch(&package, index_modules)?).map(Some)
}

/// Debian's busybox, which needs no libraries.
///
/// # Errors
/// When it cannot be fetched.
pub fn busybox() -> Result<PathBuf> {
    let package = fetch("busybox-static", |_| Ok(()))?;
    let program = ["bin/busybox", "usr/bin/busybox"].map(|path| package.join(path));
    let found = program.into_iter().find(|path| path.is_file());
    found.with_context(|| format!("{} holds no busybox", package.display()))
}

impl Kernel {
    fn unpacked(package: &Path) -> Result<Kernel> {
        let all_modules = package.join("lib/modules");
        let releases = directory_names(&all_modules);
        let [release] = releases.as_slice() else {
            bail!(
                "expected the modules of one kernel in {}, found {releases:?}",
                all_modules.display()
            );
        };
        let image = package.join("boot").join(format!("vmlinuz-{release}"));
        ensure!(image.is_file(), "there is no {}", image.display());
        Ok(Kernel {
            release: release.clone(),
            image,
            modules: all_modules.join(release),
        })
    }

    /// The modules of these names and all that they need, each behind what it needs, as (name, content). What is built into the kernel
    /// is left out.
    ///
    /// # Errors
    /// When the kernel knows no module of such a name.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let read = |name: &str| {
            let path = self.modules.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let (dependencies, builtin) = (read("modules.dep")?, read("modules.builtin")?);
        let order = in_order(wanted, &dependencies, &builtin)
            .with_context(|| format!("the kernel {}", self.release))?;
        let load = |path: &str| Ok((module_name(path), self.read_module(path)?));
        order.into_iter().map(load).collect()
    }

    fn read_module(&self, path: &str) -> Result<Vec<u8>> {
        let file = self.modules.join(path);
        let unpack = match file.extension().and_then(|end| end.to_str()) {
            Some("xz") => "xzcat",
            Some("gz") => "zcat",
            _ => return fs::read(&file).with_context(|| format!("cannot read {}", file.display())),
        };
        let mut command = Command::new(busybox()?);
        command.arg(unpack).arg(&file);
        let output = command
            .output()
            .with_context(|| format!("cannot start {command:?}"))?;
        ensure!(
            output.status.success() && !output.stdout.is_empty(),
            "{command:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(output.stdout)
    }
}

/// The paths of the wanted modules and of what they need, from `modules.dep`: `PATH: NEEDED NEEDED`, the first to be loaded last.
fn in_order<'d>(wanted: &[&str], dependencies: &'d str, builtin: &str) -> Result<Vec<&'d str>> {
    let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
    let known: HashMap<String, (&str, &str)> = lines
        .map(|(path, needs)| (module_name(path), (path, needs)))
        .collect();
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let Some((path, needs)) = known.get(*name) else {
            let is_builtin = builtin.lines().any(|path| module_name(path) == *name);
            ensure!(is_builtin, "has no module `{name}`");
            continue;
        };
        for path in needs.split_whitespace().rev().chain([*path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

/// `kernel/drivers/net/virtio_net.ko.xz` is `virtio_net`; the kernel takes dashes for underscores.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The newest of the packages that are kernels of a series.
fn newest<'n>(names: &'n [String], series: &str) -> Option<&'n str> {
    let prefix = format!("linux-image-{series}.");
    let of_series = names
        .iter()
        .map(String::as_str)
        .filter(|name| name.starts_with(&prefix) && name.ends_with(&format!("-{FLAVOUR}")));
    of_series.max_by_key(|name| numbers(name))
}

/// The numbers of a version, in order: what is newer has the higher ones.
fn numbers(version: &str) -> Vec<u64> {
    let digits = version.split(|character: char| !character.is_ascii_digit());
    digits.filter_map(|number| number.parse().ok()).collect()
}

/// The newest package of a series that this Debian offers.
fn offered(series: &str) -> Result<Option<String>> {
    let search = || -> Result<Option<String>> {
        let mut command = Command::new("apt-cache");
        command.args(["search", "--names-only", "^linux-image-.*-cloud-amd64$"]);
        // Without the program there is no Debian, and no package.
        let Ok(output) = command.output() else {
            return Ok(None);
        };
        let list = String::from_utf8_lossy(&output.stdout).into_owned();
        let first_words = list.lines().filter_map(|line| line.split_whitespace().next());
        let names: Vec<String> = first_words.map(str::to_owned).collect();
        Ok(newest(&names, series).map(str::to_owned))
    };
    if let Some(package) = search()? {
        return Ok(Some(package));
    }
    // A machine on which nothing was installed yet has no lists to search.
    run(Command::new("apt-get")
        .args(["-qq", "update"])
        .stdin(Stdio::null()))?;
    search()
}

/// The directory of a package in the cache, after fetching it if need be and then letting `finish` add to it.
fn fetch(package: &str, finish: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let packages = packages_directory()?;
    let target = packages.join(package);
    if target.is_dir() {
        return Ok(target);
    }
    println!("fetching {package}");
    // Beside the target, so that the last step is a rename: another run sees the whole package or none.
    let download = packages.join(format!("download-{}-{package}", std::process::id()));
    let unpacked = download.join("unpacked");
    fs::create_dir_all(&unpacked).with_context(|| format!("cannot make {}", unpacked.display()))?;
    let fetched = download_and_unpack(package, &download, &unpacked)
        .and_then(|()| finish(&unpacked))
        .and_then(|()| {
            fs::rename(&unpacked, &target).with_context(|| format!("cannot make {}", target.display()))
        });
    let _ = fs::remove_dir_all(&download);
    // Another run may have been faster.
    if fetched.is_err() && target.is_dir() {
        return Ok(target);
    }
    fetched.map(|()| target)
}

fn download_and_unpack(package: &str, download: &Path, unpacked: &Path) -> Result<()> {
    let mut apt_get = Command::new("apt-get");
    // As whoever runs this: apt's own user may not write to a cache below somebody's home.
    apt_get
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(download)
        .stdin(Stdio::null());
    run(&mut apt_get)
        .context("apt-get fetches Debian's packages; its lists may be old (`apt-get update`)")?;
    let archives = directory_names(download);
    let archive = archives.iter().find(|name| name.ends_with(".deb"));
    let archive = archive.with_context(|| format!("apt-get download left no package {package}"))?;
    run(Command::new("dpkg")
        .arg("-x")
        .arg(download.join(archive))
        .arg(unpacked))
}

/// Which module needs which is worked out when a kernel is installed, which this one is not.
fn index_modules(unpacked: &Path) -> Result<()> {
    let kernel = Kernel::unpacked(unpacked)?;
    let mut depmod = Command::new(busybox()?);
    depmod.args(["depmod", "-b"]).arg(unpacked).arg(&kernel.release);
    run(&mut depmod)
}

fn packages_directory() -> Result<PathBuf> {
    cache::directory("guest")
}

/// The names in a directory; none when it is not there.
fn directory_names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_a_series_is_by_number_and_of_that_series() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64-unsigned",
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-cloud-amd64-dbg",
            "linux-image-6.12-cloud-amd64",
            "linux-image-cloud-amd64",
            "download-7-linux-image-6.1.0-99-cloud-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(newest(&names, "6.1"), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(
            newest(&names, "6.12"),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(newest(&names, "6.18"), None);
    }

    #[test]
    fn modules_are_loaded_behind_what_they_need_and_once() {
        let dependencies = "kernel/virtio.ko: kernel/virtio_ring.ko\nkernel/virtio_ring.ko:\n\
                            kernel/virtio-blk.ko.xz: kernel/virtio.ko kernel/virtio_ring.ko\n\
                            kernel/virtio_net.ko: kernel/failover.ko kernel/virtio.ko kernel/virtio_ring.ko\nkernel/failover.ko:\n";
        let builtin = "kernel/fs/ext4/ext4.ko\n";
        let order = in_order(&["virtio_blk", "ext4", "virtio_net"], dependencies, builtin);
        assert_eq!(
            order.expect("all are known"),
            [
                "kernel/virtio_ring.ko",
                "kernel/virtio.ko",
                "kernel/virtio-blk.ko.xz",
                "kernel/failover.ko",
                "kernel/virtio_net.ko"
            ]
        );
        let error = in_order(&["btrfs"], dependencies, builtin).expect_err("nobody has it");
        assert!(error.to_string().contains("`btrfs`"), "{error}");
    }
}
