//! Whether the kernel probe can run here, found by loading it and tying it to a cgroup for an instant.

use super::{Check, Part};
use crate::config::Config;
#[cfg(target_os = "linux")]
use crate::tap::{
    attachment::Attachment,
    cgroup::Hierarchy,
    error::TapError,
    probe::{Probe, Watch},
};

/// What the probe needs, itself, and what it would see.
#[cfg(target_os = "linux")]
pub(super) fn checks(config: &Config) -> Vec<Check> {
    let hierarchy = Hierarchy::find();
    let mut checks = vec![match &hierarchy {
        Ok(found) => Check::ok(
            "tap",
            "cgroup2",
            format!("mounted at {}", found.mount().display()),
        ),
        Err(error) => refused("cgroup2", error),
    }];
    let attached = attach(config);
    checks.push(match &attached {
        Ok(place) => Check::ok(
            "tap",
            "probe",
            format!("it loads, and can be attached to {}", described(place)),
        ),
        Err(error) => refused("probe", error),
    });
    let watched: Vec<_> = attached.iter().flat_map(Attachment::paths).collect();
    let mount = hierarchy.as_ref().map(Hierarchy::mount).ok();
    let (sockets, can_any) = super::cgroup::checks(config, mount.filter(|_| !watched.is_empty()), &watched);
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

/// Loads the probe and attaches it as the gateway would, but without a helper. Nobody reads what it sees, and it is gone with what
/// this returns.
#[cfg(target_os = "linux")]
fn attach(config: &Config) -> Result<Attachment, TapError> {
    let watch = Watch::of(config);
    let probe = Probe::load(&watch)?;
    Attachment::make(probe.programs, &config.tap.cgroup, &watch.ports, None)
}

#[cfg(target_os = "linux")]
fn described(place: &Attachment) -> String {
    let paths: Vec<String> = place.paths().map(|path| path.display().to_string()).collect();
    format!("{} ({})", paths.join(" and "), place.located().how)
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
