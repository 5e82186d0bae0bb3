//! What the probe says of itself: lines about packets and records that should not be, which it writes into a ring of their own. They
//! go into the gateway's log, as warnings of the target `gateway_ebpf`.
//!
//! They take memory that is shared, and no system call: no privilege is needed to read them. Where nobody does, the ring fills, and the probe
//! leaves out what comes then; its counts are not affected.

use super::error::TapError;
use aya::Ebpf;
use aya_log::EbpfLogger;
use log::Log;

/// The reader's end.
pub struct Diagnostics {
    lines: EbpfLogger<&'static dyn Log>,
}

impl Diagnostics {
    /// Takes the lines' ring out of the probe, after its programs are loaded. Lines go to the logger that is installed now.
    pub(super) fn open(object: &mut Ebpf) -> Result<Diagnostics, TapError> {
        let lines = EbpfLogger::init(object).map_err(|source| TapError::Diagnostics {
            source: Box::new(source),
        })?;
        Ok(Diagnostics { lines })
    }

    /// Writes what has come since the last time into the log.
    pub fn flush(&mut self) {
        self.lines.flush();
    }
}

impl std::fmt::Debug for Diagnostics {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Diagnostics").finish_non_exhaustive()
    }
}
