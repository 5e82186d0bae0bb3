//! What the kernel probe needs of a Linux kernel and of this process: version, lockdown, capabilities.
//!
//! Whether it loads is found by loading it (`probe`); this says why it would not, and what to do about that.

use super::{Check, Part};
use std::fs;

/// Ring buffers came with 5.8, the youngest of what the probe is made of (links to cgroups came with 5.7).
const KERNEL_MIN: (u32, u32) = (5, 8);

/// The oldest that the probe was tried on.
const KERNEL_TRIED: (u32, u32) = (6, 1);

/// Bits of `CapEff`, from `linux/capability.h`.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

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
        capabilities(
            read("/proc/thread-self/status").as_deref(),
            read("/proc/self/uid_map").as_deref(),
        ),
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
            .advise("the tap needs Linux 5.8 or newer, for its ring buffer; use capture: proxy")
            .stops(Part::Tap);
    }
    if this < KERNEL_TRIED {
        return Check::warning("kernel", "version", found)
            .advise("the tap should work from 5.8 on, and was tried on 6.1, 6.12 and 6.18 only");
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
fn capabilities(status: Option<&str>, uid_map: Option<&str>) -> Check {
    let line = status.and_then(|text| text.lines().find_map(|line| line.strip_prefix("CapEff:")));
    let Some(effective) = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()) else {
        return Check::unknown("kernel", "capabilities", "/proc says nothing of them");
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    let missing: Vec<&str> = [
        ("CAP_BPF", has(CAP_BPF) || has(CAP_SYS_ADMIN)),
        ("CAP_NET_ADMIN", has(CAP_NET_ADMIN)),
    ]
    .into_iter()
    .filter_map(|(name, has)| (!has).then_some(name))
    .collect();
    if !missing.is_empty() {
        return Check::problem("kernel", "capabilities", format!("no {}", missing.join(", no ")))
            .advise(CAPABILITIES)
            .stops(Part::Tap);
    }
    if uid_map.is_some_and(|map| !is_first_namespace(map)) {
        return Check::problem("kernel", "capabilities", "those of a user namespace, which do not reach the kernel's BPF")
            .advise("a rootless container cannot load the tap: run it as a service of the host, or in a container with --userns=host")
            .stops(Part::Tap);
    }
    Check::ok("kernel", "capabilities", "CAP_BPF and CAP_NET_ADMIN")
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
    fn a_kernel_without_ring_buffers_stops_the_tap() {
        for (release, state, stops) in [
            ("5.4.0-150-generic", State::Problem, Some(Part::Tap)),
            ("4.18.0-553.el8.x86_64", State::Problem, Some(Part::Tap)),
            ("5.15.167.4-microsoft-standard-WSL2", State::Warning, None),
            ("6.1.0-28-cloud-amd64", State::Ok, None),
            ("6.18.44-fc", State::Ok, None),
            ("7.0", State::Ok, None),
            ("unknown", State::Unknown, None),
        ] {
            let check = version(release);
            assert_eq!((check.state, check.stops), (state, stops), "{release}");
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
    fn a_missing_capability_is_named_and_stops_the_tap() {
        let all = "CapEff:\t000001ffffffffff\n";
        let host = Some("         0          0 4294967295\n");
        let with = |bits: &[u32]| {
            let set: u64 = bits.iter().map(|bit| 1 << bit).sum();
            capabilities(Some(&format!("Name:\tx\nCapEff:\t{set:016x}\n")), host)
        };
        assert_eq!(capabilities(Some(all), host).state, State::Ok);
        assert_eq!(with(&[CAP_BPF, CAP_NET_ADMIN]).state, State::Ok);
        assert_eq!(
            with(&[CAP_SYS_ADMIN, CAP_NET_ADMIN]).state,
            State::Ok,
            "as before 5.8"
        );
        assert_eq!(with(&[]).found, "no CAP_BPF, no CAP_NET_ADMIN");
        let without = with(&[CAP_BPF]);
        assert_eq!(
            (&*without.found, without.stops),
            ("no CAP_NET_ADMIN", Some(Part::Tap))
        );
        let rootless = capabilities(Some(all), Some("0 1000 1\n1 100000 65536\n"));
        assert_eq!(
            (rootless.state, rootless.stops),
            (State::Problem, Some(Part::Tap))
        );
        assert_eq!(capabilities(None, None).state, State::Unknown);
    }
}
