//! In place of the probe, on a system that has none.

use super::agent::Source;
use crate::config::{Capture, Config};
use std::process::Command;

/// There is no tap.
#[derive(Debug, thiserror::Error)]
#[error("the kernel probe is for Linux; set `capture: proxy`, or `auto`, which comes to the same here")]
pub struct TapError;

/// Without a tap `auto` is `proxy`, and the log says why.
///
/// # Errors
/// [`TapError`] where the tap is not a matter of choice.
pub fn open(config: &mut Config, _helper: Command) -> Result<Option<Box<dyn Source>>, TapError> {
    match config.capture {
        Capture::Proxy => Ok(None),
        Capture::Auto => {
            tracing::info!("capture: auto is `proxy` here: the kernel probe is for Linux");
            config.capture = Capture::Proxy;
            Ok(None)
        }
        Capture::Tap | Capture::ProxyAndTap => Err(TapError),
    }
}
