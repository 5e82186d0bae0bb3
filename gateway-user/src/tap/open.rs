//! The probe from the kernel to the gateway: loaded, attached, and read.

use super::agent::Source;
use super::attachment::{Attachment, Change};
use super::counters::Counters;
use super::diagnostics::Diagnostics;
use super::error::TapError;
use super::privileges;
use super::probe::{Probe, Watch};
use super::ring::Ring;
use super::segment::Segment;
use super::stats::ProbeTotals;
use crate::config::{Capture, Config};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A probe that is loaded and attached. Nothing of it is left in the kernel once this is dropped, or the process ends.
#[derive(Debug)]
pub struct Tap {
    /// What the probe saw; to be drained every `tap.poll_interval`.
    pub ring: Ring,
    /// What it counted.
    pub counters: Counters,
    /// What it says of itself; to be flushed every second or so.
    pub diagnostics: Diagnostics,
    /// Where it is; to be checked every second or so.
    pub attachment: Attachment,
}

/// Opens the tap if `config.capture` asks for one. `auto` is replaced by what came of it: a system that has no place for a tap is
/// one to run the proxy on, and the log says why.
///
/// Gives up the capabilities that this took; a helper keeps two if `tap.reattach` is on. It is started by `helper`, which must come to
/// [`serve`](super::attacher::serve). To be called while the process has a single thread, and after whatever else takes privileges, such as
/// binding a port below 1024.
///
/// # Errors
/// [`TapError`], which says what is missing, where the tap is not a matter of choice.
pub fn open(config: &mut Config, helper: Command) -> Result<Option<Box<dyn Source>>, TapError> {
    let wanted = match config.capture {
        Capture::Proxy => return Ok(None),
        Capture::Auto => Capture::ProxyAndTap,
        capture => capture,
    };
    match Tap::open(config, helper) {
        Ok(tap) => {
            config.capture = wanted;
            say_where(&tap.attachment, "the kernel probe is attached");
            Ok(Some(tap.into_source(config)))
        }
        Err(error) if config.capture == Capture::Auto => {
            tracing::warn!("capture: auto is `proxy` here, without the kernel's times: {error}");
            config.capture = Capture::Proxy;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Tap {
    /// Loads the probe, attaches it, and gives up the capabilities that this took.
    ///
    /// # Errors
    /// As [`Tap::attach`]. The capabilities are still there then.
    pub fn open(config: &Config, helper: Command) -> Result<Tap, TapError> {
        privileges::check_threads()?;
        let tap = Tap::attach(config, helper)?;
        privileges::drop()?;
        Ok(tap)
    }

    /// Loads the probe and attaches it. With a helper, and if `tap.reattach` is on, it can be moved when a server comes back in another cgroup.
    ///
    /// # Errors
    /// [`TapError`], which says what is missing. Whatever was loaded is gone again then.
    pub fn attach(config: &Config, helper: Command) -> Result<Tap, TapError> {
        let watch = Watch::of(config);
        let probe = Probe::load(&watch)?;
        let helper = config.tap.reattach.then_some(helper);
        let attachment = Attachment::make(probe.programs, &config.tap.cgroup, &watch.ports, helper)?;
        Ok(Tap {
            ring: probe.ring,
            counters: probe.counters,
            diagnostics: probe.diagnostics,
            attachment,
        })
    }

    /// As an agent takes it.
    pub fn into_source(self, config: &Config) -> Box<dyn Source> {
        Box::new(TapSource {
            ring: self.ring,
            counters: self.counters,
            keeping: Some((self.attachment, self.diagnostics)),
            in_place: Arc::new(AtomicBool::new(true)),
            ports: config.tap_ports(),
            poll_interval: config.tap.poll_interval,
        })
    }
}

struct TapSource {
    ring: Ring,
    counters: Counters,
    /// `None` once somebody looks after them.
    keeping: Option<(Attachment, Diagnostics)>,
    in_place: Arc<AtomicBool>,
    ports: Vec<u16>,
    poll_interval: Duration,
}

impl Source for TapSource {
    fn drain(&mut self, records_max: usize, mut each: &mut dyn FnMut(Segment<'_>)) -> usize {
        self.ring.drain(records_max, &mut each)
    }

    fn totals(&self) -> ProbeTotals {
        ProbeTotals {
            ingress: self.counters.ingress(),
            egress: self.counters.egress(),
            unreadable: self.ring.unreadable(),
            is_in_place: self.in_place.load(Ordering::Relaxed),
        }
    }

    fn ports(&self) -> &[u16] {
        &self.ports
    }

    fn poll_interval(&self) -> Duration {
        self.poll_interval
    }

    fn take_keeper(&mut self) -> Option<Box<dyn FnMut() + Send>> {
        let (mut attachment, mut diagnostics) = self.keeping.take()?;
        let in_place = Arc::clone(&self.in_place);
        Some(Box::new(move || {
            diagnostics.flush();
            let found = attachment.check();
            let is_right = matches!(found, Ok(Change::None | Change::Moved));
            let was_right = in_place.swap(is_right, Ordering::Relaxed);
            match found {
                Ok(Change::None) => {}
                Ok(Change::Moved) => say_where(&attachment, "the kernel probe was moved"),
                // Said once, and again when it has been right in between.
                _ if !was_right => {}
                Ok(Change::Stuck) => tracing::error!(
                    "the servers have moved to cgroups that the kernel probe is not attached to, and nothing is left that may move it: \
                     restart the gateway, and set tap.reattach"
                ),
                Err(error) => tracing::error!(%error, "the kernel probe is not where it should be"),
            }
        }))
    }
}

fn say_where(attachment: &Attachment, what: &'static str) {
    let cgroups: Vec<_> = attachment
        .paths()
        .map(|path| path.display().to_string())
        .collect();
    tracing::info!(cgroups = cgroups.join(", "), "{what}");
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
        is_send::<Diagnostics>();
    }
}
