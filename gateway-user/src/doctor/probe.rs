//! Whether the kernel probe can run here, found by loading it.

use super::{Check, Part};
use crate::config::UpstreamConfig;

/// What this build can do. One without the probe says so.
pub(super) fn checks(_: &[UpstreamConfig]) -> Vec<Check> {
    vec![
        Check::problem("tap", "probe", "this build has no kernel probe")
            .advise("capture: proxy and auto work without it")
            .stops(Part::Tap),
    ]
}
