//! The guest's root: an archive that the kernel unpacks into memory at boot.
//!
//! Format: `newc`, as the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst` has it. It is not compressed: it only
//! passes from one process's memory to another's.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const DIRECTORY_MODE: u32 = 0o040_755;
const PROGRAM_MODE: u32 = 0o100_755;

/// An archive that is being written.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    paths: BTreeSet<String>,
}

impl Initramfs {
    /// Adds an empty directory, and those above it. `path` has no slash at either end.
    pub fn directory(&mut self, path: &str) {
        if !path.is_empty() && !self.paths.contains(path) {
            self.parent(path);
            self.entry(path, DIRECTORY_MODE, &[]);
        }
    }

    /// Adds a file that can be read and run. Of two files of one path, the first stays.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        if !self.paths.contains(path) {
            self.parent(path);
            self.entry(path, PROGRAM_MODE, content);
        }
    }

    /// Adds a program at `bin/NAME`, and the libraries that it needs, where it looks for them.
    ///
    /// # Errors
    /// When it is not there, or a library is missing.
    pub fn program(&mut self, program: &Path) -> Result<()> {
        let name = program.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{} is no program", program.display()))?;
        self.file(&format!("bin/{name}"), &read(program)?);
        for library in libraries(program)? {
            let path = library.to_string_lossy().into_owned();
            self.file(path.trim_start_matches('/'), &read(&library)?);
        }
        Ok(())
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parent(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.paths.insert(path.to_owned());
        // Inode, mode, owner, group, links, time, size, four device numbers, length of the name with its zero, checksum (unused).
        let (inode, links) = (self.paths.len(), 1);
        let mut header = "070701".to_owned();
        for field in [
            inode,
            mode as usize,
            0,
            0,
            links,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            path.len() + 1,
            0,
        ] {
            // Writing to a string cannot fail.
            let _ = write!(header, "{field:08x}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What the loader would load; nothing for a program that is linked statically.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = Command::new("ldd");
    let output = ldd
        .arg(program)
        .env("LC_ALL", "C")
        .output()
        .context("cannot start ldd")?;
    let (list, complaint) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    if (list + &complaint).contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    ensure!(
        output.status.success(),
        "{ldd:?} ended with {}: {complaint}",
        output.status
    );
    libraries_in(&String::from_utf8_lossy(&output.stdout))
        .with_context(|| format!("the libraries of {}", program.display()))
}

/// `libc.so.6 => /lib/… (0x…)`, `/lib64/ld-… (0x…)`; the kernel's own vdso has no path.
fn libraries_in(list: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in list.lines() {
        ensure!(!line.contains("not found"), "one is missing: {}", line.trim());
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        found.extend(path.map(PathBuf::from));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_is_padded_and_stands_behind_its_directories() {
        let mut archive = Initramfs::default();
        archive.file("a/b/c", b"12345");
        archive.file("a/d", b"");
        archive.file("a/d", b"another");
        let bytes = archive.finish();
        let at = |text: &str| position_of(&bytes, text.as_bytes()).unwrap_or_else(|| panic!("no `{text}`"));
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0") && at("a/d\0") < at("TRAILER!!!\0"));
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(at("12345") % 4, 0);
        assert!(position_of(&bytes, b"another").is_none());
        let header = &bytes[at("a/b/c\0") - 110..at("a/b/c\0")];
        assert!(header.starts_with(b"070701"), "{header:?}");
        assert_eq!(&header[54..62], b"00000005", "the size");
        assert_eq!(&header[94..102], b"00000006", "the name's length");
    }

    fn position_of(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
        bytes.windows(wanted.len()).position(|window| window == wanted)
    }

    #[test]
    fn libraries_are_found_by_path_and_a_missing_one_is_an_error() {
        let list = "\tlinux-vdso.so.1 (0x00007ff)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x1)\n\t/lib64/ld-linux-x86-64.so.2 (0x2)\n";
        assert_eq!(
            libraries_in(list).expect("all are there"),
            [
                Path::new("/lib/x86_64-linux-gnu/libc.so.6"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        let error = libraries_in("\tlibelf.so.1 => not found\n").expect_err("one is not there");
        assert!(error.to_string().contains("libelf.so.1"), "{error}");
    }
}
