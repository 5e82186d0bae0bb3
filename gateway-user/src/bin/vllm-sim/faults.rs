//! What goes wrong on purpose: by chance (options) or on demand (a request header).

use std::sync::atomic::{AtomicU64, Ordering};

use hyper::HeaderMap;

use crate::options::{Options, error_status};
use crate::tokens::mix;

/// The header that asks for a fault: `status=503`, `stall`, `close`, `close-after=N`, `malformed`, `error-event`.
pub const FAULT_HEADER: &str = "x-sim-fault";

/// Events that leave before an accidental `close`: the role, and some text.
const CLOSE_AFTER_DEFAULT: u32 = 3;

/// One thing that goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An error status; the engine sees nothing of the request.
    Status(u16),
    /// A stream's head and nothing more; a whole answer never comes. The engine sees nothing of it.
    Stall,
    /// The connection closes after so many events, or half way through a whole answer.
    CloseAfter(u32),
    /// One event is cut in half (the stream goes on), or a whole answer is.
    Malformed,
    /// A stream ends in an error event after some text; a whole answer is an internal error.
    ErrorEvent,
}

/// Decides who fails.
#[derive(Debug)]
pub struct Faults {
    seed: u64,
    /// Upper ends of each fault's share of 0–1, cumulative.
    shares: Vec<(f64, Fault)>,
    drawn: AtomicU64,
}

impl Faults {
    /// The faults that the options ask for.
    pub fn new(options: &Options) -> Self {
        let statuses = options
            .fail_status
            .iter()
            .map(|entry| (entry.rate, Fault::Status(entry.status)));
        let others = [
            (options.fail_stall, Fault::Stall),
            (options.fail_close, Fault::CloseAfter(CLOSE_AFTER_DEFAULT)),
            (options.fail_malformed, Fault::Malformed),
            (options.fail_error_event, Fault::ErrorEvent),
        ];
        let mut end = 0.0;
        let shares = statuses
            .chain(others)
            .filter(|(rate, _)| *rate > 0.0)
            .map(|(rate, fault)| {
                end += rate;
                (end, fault)
            })
            .collect();
        Faults {
            seed: options.seed,
            shares,
            drawn: AtomicU64::new(0),
        }
    }

    /// The fault of the next request.
    ///
    /// # Errors
    /// When the header asks for something unknown.
    pub fn draw(&self, headers: &HeaderMap) -> Result<Option<Fault>, String> {
        if let Some(wanted) = headers.get(FAULT_HEADER) {
            return parse(wanted.to_str().unwrap_or("")).map(Some);
        }
        if self.shares.is_empty() {
            return Ok(None);
        }
        let turn = self.drawn.fetch_add(1, Ordering::Relaxed);
        // 53 bits are what a double holds.
        let at = (mix(mix(self.seed, 5), turn) >> 11) as f64 / (1u64 << 53) as f64;
        Ok(self
            .shares
            .iter()
            .find(|(end, _)| at < *end)
            .map(|(_, fault)| *fault))
    }
}

fn parse(text: &str) -> Result<Fault, String> {
    match text.split_once('=') {
        Some(("status", status)) => error_status(status).map(Fault::Status),
        Some(("close-after", events)) => match events.parse() {
            Ok(events) => Ok(Fault::CloseAfter(events)),
            Err(_) => Err(format!(
                "expected a number of events after close-after=, found `{events}`"
            )),
        },
        None if text == "stall" => Ok(Fault::Stall),
        None if text == "close" => Ok(Fault::CloseAfter(CLOSE_AFTER_DEFAULT)),
        None if text == "malformed" => Ok(Fault::Malformed),
        None if text == "error-event" => Ok(Fault::ErrorEvent),
        _ => Err(format!(
            "expected {FAULT_HEADER} to be status=NNN, stall, close, close-after=N, malformed or error-event, found \
             `{text}`"
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn chance_follows_the_shares_and_repeats() {
        let options =
            Options::try_parse_from(["vllm-sim", "--fail-status", "500:0.25", "--fail-close", "0.25"])
                .unwrap();
        let draw = || {
            let faults = Faults::new(&options);
            (0..2000)
                .map(|_| faults.draw(&HeaderMap::new()).unwrap())
                .collect::<Vec<_>>()
        };
        let drawn = draw();
        assert_eq!(drawn, draw());
        let count = |wanted| drawn.iter().filter(|fault| **fault == wanted).count();
        for wanted in [Some(Fault::Status(500)), Some(Fault::CloseAfter(3))] {
            assert!(
                (400..600).contains(&count(wanted)),
                "{wanted:?}: {}",
                count(wanted)
            );
        }
        assert!((900..1100).contains(&count(None)), "{}", count(None));
    }

    #[test]
    fn the_header_is_understood_or_refused() {
        assert_eq!(parse("status=503"), Ok(Fault::Status(503)));
        assert_eq!(parse("close-after=7"), Ok(Fault::CloseAfter(7)));
        assert!(parse("status=200").is_err());
        assert!(parse("explode").unwrap_err().contains("error-event"));
    }
}
