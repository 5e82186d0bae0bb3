//! What the commands that ask and answer have in common: where the config comes from, which period they are about, and how they end.
//!
//! A command is a function from its arguments and the environment to an [`Answer`] or a [`Failure`]; only [`end`] writes. What each of them does
//! stands with its own matter (`report/`, `calibrate/`, `bookkeeper/command.rs`, `doctor/`); the command line as a whole is [`cli`](crate::cli).

mod answer;
pub mod exit;
pub mod period;
mod source;
pub mod time;

pub use answer::{Answer, Failure, end};
pub use source::{CONFIG_FILE, ConfigSource};
