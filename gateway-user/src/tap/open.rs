//! The tap as a whole.

use super::attachment::Attachment;
use super::counters::Counters;
use super::error::TapError;
use super::privileges;
use super::probe::{Probe, Watch};
use super::ring::Ring;
use crate::config::Config;
use std::process::Command;

/// A probe that is loaded and attached. Nothing of it is left in the kernel once this is dropped, or the process ends.
#[derive(Debug)]
pub struct Tap {
    /// What the probe saw; to be drained every `tap.poll_interval`.
    pub ring: Ring,
    /// What it counted.
    pub counters: Counters,
    /// Where it is; to be checked every second or so.
    pub attachment: Attachment,
}

impl Tap {
    /// Loads the probe, attaches it, and gives up all capabilities for good, of which a helper (started by `helper`, which must come
    /// to [`serve`](super::attacher::serve)) keeps two if `tap.reattach` is on. To be called while the process has a single thread and after
    /// whatever else takes privileges, such as binding a port below 1024.
    ///
    /// # Errors
    /// [`TapError`], which says what is missing. Whatever was loaded is gone again, and the capabilities are still there.
    pub fn open(config: &Config, helper: Command) -> Result<Tap, TapError> {
        privileges::check_threads()?;
        let watch = Watch::of(config);
        let probe = Probe::load(&watch)?;
        let helper = config.tap.reattach.then_some(helper);
        let attachment = Attachment::make(probe.programs, &config.tap.cgroup, &watch.ports, helper)?;
        privileges::drop_all()?;
        Ok(Tap {
            ring: probe.ring,
            counters: probe.counters,
            attachment,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_parts_can_go_to_threads_of_their_own() {
        fn is_send<T: Send>() {}
        is_send::<Ring>();
        is_send::<Counters>();
        is_send::<Attachment>();
    }
}
