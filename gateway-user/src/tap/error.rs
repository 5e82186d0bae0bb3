//! Why the kernel could not be asked, and what to do about it.

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use std::io;
use std::path::PathBuf;

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel is too old.
    #[error("the kernel probe needs Linux {needed} or later, and this is {found}; set `capture: proxy`")]
    OldKernel {
        /// The oldest that will do.
        needed: &'static str,
        /// What the system says it is.
        found: String,
    },
    /// Capabilities are missing.
    #[error(
        "the kernel probe needs {missing}, which this process does not have; run it as root, give the program the capabilities \
         (setcap cap_bpf,cap_net_admin+ep) or the container (--cap-add BPF --cap-add NET_ADMIN), or set `capture: proxy`"
    )]
    Capabilities {
        /// Their names.
        missing: String,
    },
    /// The system forbids BPF although the capabilities are there.
    #[error(
        "the kernel refuses BPF ({call}: {source}) although CAP_BPF and CAP_NET_ADMIN are there; a seccomp filter (such as a container \
         runtime's default one), a security module or the kernel's lockdown forbids it: allow the system call `bpf`, or set `capture: proxy`"
    )]
    Forbidden {
        /// What was asked for.
        call: String,
        /// What the system said.
        source: io::Error,
    },
    /// The ring could not be made.
    #[error(
        "a ring of {bytes} bytes could not be made ({source}); set tap.ring_bytes to a smaller power of two"
    )]
    RingSize {
        /// Its size.
        bytes: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The verifier refuses the probe.
    #[error(
        "the kernel's verifier refuses the probe's {program} program ({source}); please report this, with the kernel's version. Its log:\n{log}"
    )]
    Refused {
        /// Which of the programs.
        program: &'static str,
        /// What the system said.
        source: io::Error,
        /// Why.
        log: String,
    },
    /// Something else with the probe that was built in.
    #[error("the kernel probe could not be loaded ({source}); `cargo xtask build-ebpf` makes it anew")]
    Load {
        /// What went wrong.
        source: Box<EbpfError>,
    },
    /// A program other than expected.
    #[error(
        "the kernel probe's {program} program could not be loaded ({source}); `cargo xtask build-ebpf` makes it anew"
    )]
    Program {
        /// Which of the programs.
        program: &'static str,
        /// What went wrong.
        source: Box<ProgramError>,
    },
    /// A map could not be used.
    #[error("the kernel probe's map {map} could not be used ({source})")]
    Map {
        /// Its name.
        map: &'static str,
        /// What went wrong.
        source: Box<MapError>,
    },
    /// The lines that the probe writes could not be had.
    #[error("the kernel probe's own lines cannot be read ({source}); `cargo xtask build-ebpf` makes it anew")]
    Diagnostics {
        /// What went wrong.
        source: Box<aya_log::Error>,
    },
    /// The probe that was built in lacks a part.
    #[error("the kernel probe has no {part}; `cargo xtask build-ebpf` makes it anew")]
    Missing {
        /// What it lacks.
        part: &'static str,
    },
    /// A map's memory could not be shared.
    #[error("the memory of the kernel probe's map {map} could not be mapped ({source})")]
    Memory {
        /// Its name.
        map: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// There is no cgroup2 hierarchy.
    #[error(
        "no cgroup2 file system is mounted here (see /proc/self/mountinfo): `mount -t cgroup2 none /sys/fs/cgroup/unified`, or set `capture: proxy`"
    )]
    NoCgroup2,
    /// The configured cgroup does not exist.
    #[error("tap.cgroup: {asked} was not found below {mount}; set it to auto, or to one of: {hint}")]
    NoSuchCgroup {
        /// What was asked for.
        asked: String,
        /// Where it was looked for.
        mount: PathBuf,
        /// What is there.
        hint: String,
    },
    /// A cgroup could not be opened or listed.
    #[error("the cgroup {path} cannot be opened ({source})")]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The programs could not be attached.
    #[error(
        "the kernel probe could not be attached to a cgroup ({source}); it needs CAP_NET_ADMIN, or the cgroup has gone"
    )]
    Attach {
        /// What the system said.
        source: io::Error,
    },
    /// The helper process did not start or did not answer.
    #[error(
        "the process that attaches the kernel probe failed ({source}); set tap.reattach to false to do without it"
    )]
    Attacher {
        /// What went wrong.
        source: io::Error,
    },
    /// Capabilities could not be dropped.
    #[error("the capabilities could not be dropped ({source})")]
    Drop {
        /// What the system said.
        source: io::Error,
    },
    /// Capabilities belong to threads, and there are some already.
    #[error(
        "capabilities cannot be dropped by a process that has {threads} threads, since the others would keep theirs"
    )]
    Threads {
        /// How many.
        threads: usize,
    },
}

impl TapError {
    pub(super) fn map(map: &'static str, source: MapError) -> TapError {
        TapError::Map {
            map,
            source: Box::new(source),
        }
    }
}
