//! The capabilities that the probe takes, and their end. They belong to threads, not to processes: what drops them must run before any
//! other thread does.

use super::error::TapError;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};
use std::io;

/// What loading and attaching take. Loading does not take CAP_PERFMON, without which the verifier also follows what a processor may do by a
/// wrong guess: the probe is written so that it comes to an end with that, and has no address where anything else is written later.
const NEEDED: [(CapabilitySet, &str); 2] = [
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
];

/// What attaching what is loaded takes.
const FOR_ATTACHING: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::NET_ADMIN);

/// Whether this thread may load and attach the probe.
///
/// # Errors
/// [`TapError::Capabilities`] with the names of what is missing.
pub fn check() -> Result<(), TapError> {
    let effective = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    // It stands for each, since all were split off from it.
    if effective.contains(CapabilitySet::SYS_ADMIN) {
        return Ok(());
    }
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(capability, _)| !effective.contains(*capability))
        .map(|&(_, name)| name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(TapError::Capabilities {
        missing: missing.join(" and "),
    })
}

/// Whether this thread may load programs whose ways under a wrong guess the verifier does not follow.
pub(super) fn may_log() -> bool {
    let effective = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    effective.intersects(CapabilitySet::PERFMON | CapabilitySet::SYS_ADMIN)
}

/// What a gateway that runs as root in a container needs to go on as it would without a probe: its directories may be another user's.
const KEPT: CapabilitySet = CapabilitySet::DAC_OVERRIDE;

/// Gives up every capability but CAP_DAC_OVERRIDE, which only root has, for good: also a program that this process starts gets no more. Must be
/// called while the process has a single thread.
///
/// # Errors
/// [`TapError::Threads`] if there are more threads, else [`TapError::Drop`].
pub fn drop() -> Result<(), TapError> {
    check_threads()?;
    let give_up = || keep_only(capabilities(None)?.permitted & KEPT);
    give_up().map_err(|source| TapError::Drop { source })
}

/// Whether this thread is the only one.
///
/// # Errors
/// [`TapError::Threads`].
pub fn check_threads() -> Result<(), TapError> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        return Err(TapError::Threads { threads });
    }
    Ok(())
}

/// Keeps what attaching takes and gives up the rest; for the process that does nothing else.
pub(super) fn keep_for_attaching() -> io::Result<()> {
    let held = capabilities(None)?.permitted;
    keep_only(held & FOR_ATTACHING)
}

fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}
