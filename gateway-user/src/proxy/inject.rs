//! Asks vLLM for usage on a client's behalf, and takes back out of the client's stream what the client did not ask for.
//!
//! A stream tells its tokens only when it was asked to (`stream_options`), and most clients do not ask. So the proxy
//! [plans](plan) an edit of the request's body, and a [`StreamEditor`] undoes what that edit changes in the response. What asking
//! changes was read off captures of one request sent three ways (`tests/fixtures`, `triple_*`):
//!
//! 1. with `continuous_usage_stats`, a member `usage` on every event;
//! 2. one more event at the end, with `choices: []` and the final `usage`;
//! 3. `system_fingerprint` stands on that last event, no longer on the events with a `finish_reason`.
//!
//! In short: `plan(body, endpoint, mode, learned.known(upstream, model))`; for an edited request whose response is an unencoded event
//! stream, a [`StreamEditor`] over its payload; at its end, and also when it broke off, [`StreamEditor::finish`], and
//! [`StreamEditor::lesson`] into [`Learned::note`].
//!
//! # Promises
//! * The client gets, byte for byte, the payload that it would have got without the proxy; ids and times aside, which differ from
//!   request to request anyway. Whatever is not understood passes untouched.
//! * No event waits for another, except the one event named below, which is held until its successor.
//! * An idle stream costs a few hundred bytes here, whatever its length. No event is parsed that shows no sign of an edit.
//!
//! # The fingerprint
//! It is known only from the last event, and has to go back into an earlier one.
//! * One choice: the event with the `finish_reason` is held until the next event comes. vLLM writes the final usage in the same step,
//!   so that costs no time, and it is exact even if the server came back with another fingerprint a moment ago.
//! * Several choices: the first to finish cannot wait for the last. Such a request is edited only when the fingerprint of this
//!   upstream and model is already [`Learned`].
//!
//! # Leaves out
//! * A server started with `--enable-force-include-usage` sends usage unasked. A client cannot be given back what the proxy cannot
//!   tell from its own doing, so such a server wants [`InjectMode::Off`], and loses nothing by it.
//! * Accounting: it reads the unedited stream and does not depend on anything in here.

mod chunk;
mod learned;
mod object;
mod request;
mod stream;

#[cfg(test)]
mod tests;

pub use learned::{Fingerprint, Known, Learned};
pub use request::{InjectMode, Plan, Untouched, plan};
pub use stream::{Stopped, StreamEditor, Strip};
