//! Ties the probe's programs to a cgroup, by links that nobody pins: they vanish with the last descriptor, that is with the process.
//!
//! aya attaches only programs that it loaded in the same process. The process that attaches again after a container's restart gets
//! the programs' descriptors from another one, so that the system call is made here, for both.

use super::cgroup::Cgroup;
use super::error::TapError;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `enum bpf_cmd` and `enum bpf_attach_type` of the kernel's `uapi/linux/bpf.h`, which never change.
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_CGROUP_INET_INGRESS: u32 = 0;
const BPF_CGROUP_INET_EGRESS: u32 = 1;

/// The loaded programs.
#[derive(Debug)]
pub struct Programs {
    pub(super) ingress: OwnedFd,
    pub(super) egress: OwnedFd,
}

/// The programs on a cgroup. They are off it when this is dropped.
#[derive(Debug)]
pub struct Links {
    _ingress: OwnedFd,
    _egress: OwnedFd,
}

impl Programs {
    /// Attaches both programs to a cgroup, and to all below it.
    ///
    /// # Errors
    /// [`TapError::Attach`].
    pub fn attach(&self, cgroup: &Cgroup) -> Result<Links, TapError> {
        self.attach_to(cgroup.directory.as_fd())
            .map_err(|source| TapError::Attach { source })
    }

    pub(super) fn attach_to(&self, cgroup: BorrowedFd<'_>) -> io::Result<Links> {
        Ok(Links {
            _ingress: create(self.ingress.as_fd(), cgroup, BPF_CGROUP_INET_INGRESS)?,
            _egress: create(self.egress.as_fd(), cgroup, BPF_CGROUP_INET_EGRESS)?,
        })
    }
}

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` reads. Links let other programs be on the same cgroup without asking for it;
/// the flag that asks (`BPF_F_ALLOW_MULTI`) is refused with them, so that there is none.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn create(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    let attributes = LinkCreate {
        program: program.as_raw_fd().cast_unsigned(),
        target: cgroup.as_raw_fd().cast_unsigned(),
        attach_type,
        flags: 0,
    };
    // SAFETY: the attributes are a prefix of `union bpf_attr` of the length given, which lives until the call is over.
    let link = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            &raw const attributes,
            size_of::<LinkCreate>(),
        )
    };
    match i32::try_from(link) {
        // SAFETY: the kernel made this descriptor for us, closed on exec, and nobody else has it.
        Ok(link) if link >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(link) }),
        _ => Err(io::Error::last_os_error()),
    }
}
