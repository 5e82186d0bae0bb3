//! What the kernel probe needs of a Linux kernel and of this process: version, lockdown, capabilities.
//!
//! Whether it loads is found by loading it (`probe`), which is what decides; this tells the reasons there may be.

use super::Check;
use crate::tap::{error::TapError, privileges};
use std::fs;

/// As the probe has it: ring buffers came with 5.8, and memory that needs no limit on locked memory with 5.11.
const KERNEL_MIN: (u32, u32) = (5, 11);

/// The oldest that the probe was tried on.
const KERNEL_TRIED: (u32, u32) = (6, 1);

/// How to get what the probe needs.
const CAPABILITIES: &str = "run as root, or give the capabilities alone: AmbientCapabilities=CAP_BPF CAP_NET_ADMIN (systemd), \
                            --cap-add BPF --cap-add NET_ADMIN (docker), securityContext.capabilities.add (Kubernetes), or \
                            setcap cap_bpf,cap_net_admin+ep on the program";

pub(super) fn checks() -> Vec<Check> {
    let read = |path| fs::read_to_string(path).ok();
    let uname = rustix::system::uname();
    vec![
        version(&uname.release().to_string_lossy()),
        lockdown(read("/sys/kernel/security/lockdown").as_deref()),
        capabilities(privileges::check(), read("/proc/self/uid_map").as_deref()),
        unprivileged(read("/proc/sys/kernel/unprivileged_bpf_disabled").as_deref()),
    ]
}

fn version(release: &str) -> Check {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse().ok());
    let (Some(major), Some(minor)) = (next(), next()) else {
        return Check::unknown(
            "kernel",
            "version",
            format!("no number in {}", release.escape_debug()),
        );
    };
    let this: (u32, u32) = (major, minor);
    let found = release.escape_debug().to_string();
    if this < KERNEL_MIN {
        return Check::problem("kernel", "version", found)
            .advise("the tap needs Linux 5.11 or newer, for its ring buffer; use capture: proxy");
    }
    if this < KERNEL_TRIED {
        return Check::warning("kernel", "version", found)
            .advise("the tap should work from 5.11 on, and was tried on 6.1, 6.12 and 6.18 only");
    }
    Check::ok("kernel", "version", found)
}

/// The file names all modes, with the one in force in brackets.
fn lockdown(file: Option<&str>) -> Check {
    let mode = file.and_then(|text| text.split_once('[')?.1.split_once(']'));
    match mode.map(|(mode, _)| mode) {
        None => Check::ok("kernel", "lockdown", "none that the kernel tells of"),
        Some("none") => Check::ok("kernel", "lockdown", "none"),
        Some("integrity") => Check::ok("kernel", "lockdown", "integrity, under which the tap works"),
        Some(mode) => Check::unknown("kernel", "lockdown", mode.escape_debug().to_string()).advise(
            "the tap reads packets, not kernel memory, which is what this forbids; it was not tried under it",
        ),
    }
}

/// Capabilities count only in the first user namespace; within a rootless container root has them in name.
fn capabilities(held: Result<(), TapError>, uid_map: Option<&str>) -> Check {
    match held {
        Err(TapError::Capabilities { missing }) => {
            Check::problem("kernel", "capabilities", format!("missing: {missing}")).advise(CAPABILITIES)
        }
        Err(error) => Check::unknown("kernel", "capabilities", error.to_string()),
        Ok(()) if uid_map.is_some_and(|map| !is_first_namespace(map)) => {
            let found = "those of a user namespace, which do not reach the kernel's BPF";
            Check::problem("kernel", "capabilities", found).advise(
                "a rootless container cannot load the tap: run it as a service of the host, or in a container with --userns=host",
            )
        }
        Ok(()) => Check::ok("kernel", "capabilities", "CAP_BPF and CAP_NET_ADMIN"),
    }
}

/// The first namespace maps all ids to themselves.
fn is_first_namespace(uid_map: &str) -> bool {
    let numbers: Vec<&str> = uid_map.split_ascii_whitespace().collect();
    numbers == ["0", "0", "4294967295"]
}

fn unprivileged(file: Option<&str>) -> Check {
    let found = match file.map(str::trim) {
        Some("0") => "unprivileged_bpf_disabled is 0: BPF is open to everyone, which the tap does not need",
        Some("1") => "unprivileged_bpf_disabled is 1: BPF needs CAP_BPF, until the next boot",
        Some("2") => "unprivileged_bpf_disabled is 2: BPF needs CAP_BPF",
        _ => {
            return Check::unknown(
                "kernel",
                "bpf",
                "/proc/sys/kernel/unprivileged_bpf_disabled cannot be read: a kernel without BPF, or a sandbox",
            );
        }
    };
    Check::ok("kernel", "bpf", found)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_kernel_without_what_the_probe_needs_is_a_problem() {
        for (release, state) in [
            ("5.4.0-150-generic", State::Problem),
            ("4.18.0-553.el8.x86_64", State::Problem),
            ("5.15.167.4-microsoft-standard-WSL2", State::Warning),
            ("6.1.0-28-cloud-amd64", State::Ok),
            ("6.18.44-fc", State::Ok),
            ("7.0", State::Ok),
            ("unknown", State::Unknown),
        ] {
            assert_eq!(version(release).state, state, "{release}");
        }
    }

    #[test]
    fn lockdown_is_the_mode_in_brackets() {
        for (file, state) in [
            (None, State::Ok),
            (Some("[none] integrity confidentiality\n"), State::Ok),
            (Some("none [integrity] confidentiality\n"), State::Ok),
            (Some("none integrity [confidentiality]\n"), State::Unknown),
        ] {
            assert_eq!(lockdown(file).state, state, "{file:?}");
        }
    }

    #[test]
    fn capabilities_count_only_outside_of_user_namespaces() {
        let host = Some("         0          0 4294967295\n");
        assert_eq!(capabilities(Ok(()), host).state, State::Ok);
        assert_eq!(capabilities(Ok(()), None).state, State::Ok);
        let rootless = capabilities(Ok(()), Some("0 1000 1\n1 100000 65536\n"));
        assert!(
            rootless.state == State::Problem && rootless.found.contains("user namespace"),
            "{rootless:?}"
        );
        let missing = "CAP_BPF and CAP_NET_ADMIN".to_owned();
        let without = capabilities(Err(TapError::Capabilities { missing }), host);
        assert!(
            without.state == State::Problem && without.advice.contains("setcap"),
            "{without:?}"
        );
    }
}
