//! Whether the kernel probe can run here, found by loading it and tying it to a cgroup for an instant.

use super::{Check, Part};
use crate::config::Config;
#[cfg(target_os = "linux")]
use crate::tap::{
    cgroup::{Cgroup, mount_point},
    error::TapError,
    probe::{Probe, Watch},
};

/// What the probe needs, itself, and what it would see.
#[cfg(target_os = "linux")]
pub(super) fn checks(config: &Config) -> Vec<Check> {
    let mut checks = vec![match mount_point() {
        Ok(mount) => Check::ok("tap", "cgroup2", format!("mounted at {}", mount.display())),
        Err(error) => refused("cgroup2", &error),
    }];
    checks.push(match load(config) {
        Ok(()) => Check::ok("tap", "probe", "it loads, and can be attached"),
        Err(error) => refused("probe", &error),
    });
    let (sockets, can_any) = super::cgroup::checks(config);
    checks.extend(sockets);
    if !can_any {
        checks.push(
            Check::problem(
                "tap",
                "upstreams",
                "none of them is on this machine, so that there is nothing to see",
            )
            .advise("run the tap where vLLM runs")
            .stops(Part::Tap),
        );
    }
    checks
}

/// Loads the probe as the gateway would, and watches the root of all cgroups until this returns; nobody reads what it sees.
#[cfg(target_os = "linux")]
fn load(config: &Config) -> Result<(), TapError> {
    let probe = Probe::load(&Watch::of(config))?;
    let root = Cgroup::open(&mount_point()?)?;
    drop(probe.programs.attach(&root)?);
    Ok(())
}

/// The error says what to do, behind its reason.
#[cfg(target_os = "linux")]
fn refused(name: &'static str, error: &TapError) -> Check {
    let text = error.to_string();
    // A verifier's log has hundreds of lines, of which the table needs none.
    let text = text.lines().next().unwrap_or_default();
    let (found, advice) = text.split_once("; ").unwrap_or((text, ""));
    Check::problem("tap", name, found).advise(advice).stops(Part::Tap)
}

/// There is no such kernel elsewhere.
#[cfg(not(target_os = "linux"))]
pub(super) fn checks(_: &Config) -> Vec<Check> {
    vec![
        Check::problem("tap", "probe", "the kernel probe needs Linux")
            .advise("capture: proxy and auto work without it")
            .stops(Part::Tap),
    ]
}
