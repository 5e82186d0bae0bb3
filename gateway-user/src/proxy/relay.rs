//! A response's body on its way from the upstream to the client.
//!
//! Where nothing has to change, the bytes go on as they came, chunk sizes and all. Where usage was asked for on the client's behalf, the
//! events are edited, and each chunk of the upstream becomes one chunk of the edited payload.

use super::inject::{Known, Stopped, StreamEditor};
use super::rewrite::Delivered;
use crate::wire::At;
use crate::wire::Piece;
use crate::wire::body::{BodyError, BodyReader, Step};
use crate::wire::exchange::Exchange;
use crate::wire::head::Framing;
use std::io::Write;

/// Capacity that is kept between chunks: a chunk with one token is 220 to 400 bytes.
const KEPT_BYTES: usize = 1024;

/// A chunk of the upstream that is larger than this goes on in several: its size must not decide how much memory a stream takes.
const BUILT_BYTES_MAX: usize = 64 * 1024;

/// What is done with the events of a response.
pub enum Edit {
    /// Nothing.
    None,
    /// They pass untouched, but are looked at for what the next request's edit needs to know.
    Learn(Known),
    /// What was asked for on the client's behalf is taken out.
    Strip(Box<StreamEditor>),
}

/// Follows one response body.
pub struct Relay {
    reader: BodyReader,
    delivered: Delivered,
    /// Whether chunks must be built, rather than passed on.
    chunked: bool,
    edit: Edit,
    /// Payload of the chunk that is being built.
    building: Vec<u8>,
}

/// How far the body has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How much of the input belonged to this body.
    pub consumed: usize,
    /// Whether the body is over.
    pub done: bool,
}

impl Relay {
    /// A relay for a body framed like `framing`, delivered like `delivered`.
    pub fn new(framing: Framing, delivered: Delivered, edit: Edit) -> Relay {
        let chunked = match delivered {
            Delivered::AsFramed => framing == Framing::Chunked,
            Delivered::Chunked => true,
            Delivered::UntilClose => false,
        };
        Relay {
            reader: BodyReader::new(framing),
            delivered,
            chunked,
            edit,
            building: Vec::new(),
        }
    }

    /// Whether what [`Relay::feed`] consumed is to be sent as it is. Otherwise it has put into `out` what is to be sent.
    pub fn is_verbatim(&self) -> bool {
        !matches!(self.edit, Edit::Strip(_)) && self.delivered == Delivered::AsFramed
    }

    /// Shows `input` to the observer and, unless it goes on verbatim, appends what the client gets to `out`.
    ///
    /// # Errors
    /// When the upstream's framing is broken: nothing after that can be understood.
    pub fn feed(
        &mut self,
        input: &[u8],
        at: At,
        observer: Option<&mut Exchange>,
        out: &mut Vec<u8>,
    ) -> Result<Progress, BodyError> {
        let mut rest = input;
        let done = self.steps(&mut rest, at, observer, out)?;
        if done {
            self.end(out);
        } else if !self.reader.is_inside_chunk() || self.building.len() >= BUILT_BYTES_MAX {
            self.flush(out);
        }
        Ok(Progress {
            consumed: input.len() - rest.len(),
            done,
        })
    }

    fn steps(
        &mut self,
        rest: &mut &[u8],
        at: At,
        mut observer: Option<&mut Exchange>,
        out: &mut Vec<u8>,
    ) -> Result<bool, BodyError> {
        let verbatim = self.is_verbatim();
        loop {
            match self.reader.next(rest)? {
                Step::Data(payload) => {
                    if let Some(exchange) = observer.as_deref_mut() {
                        exchange.response_body(at, Piece::Bytes(payload));
                    }
                    if let Edit::Learn(known) = &mut self.edit
                        && let Some(lesson) = Known::of_unedited(payload)
                    {
                        *known = lesson;
                    }
                    if !verbatim {
                        self.build(payload, out);
                    }
                }
                Step::More => return Ok(false),
                Step::End => return Ok(true),
            }
        }
    }

    fn build(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        match &mut self.edit {
            Edit::Strip(editor) => editor.push(payload, &mut self.building),
            _ => self.building.extend_from_slice(payload),
        }
        if !self.reader.is_inside_chunk() && !self.reader.ends_at_close() {
            self.flush(out);
        }
    }

    /// Writes the chunk that was built, if anything is in it.
    fn flush(&mut self, out: &mut Vec<u8>) {
        if self.building.is_empty() {
            return;
        }
        if self.chunked {
            // Writing to a vector cannot fail.
            let _ = write!(out, "{:x}\r\n", self.building.len());
        }
        out.append(&mut self.building);
        if self.chunked {
            out.extend_from_slice(b"\r\n");
        }
        // After a burst: an idle stream holds no more than a chunk's worth.
        self.building.shrink_to(KEPT_BYTES);
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.is_verbatim() {
            return;
        }
        self.release(out);
        if self.chunked {
            out.extend_from_slice(b"0\r\n\r\n");
        }
    }

    /// Appends what the editor still holds: the body broke off, or is over.
    pub fn release(&mut self, out: &mut Vec<u8>) {
        if let Edit::Strip(editor) = &mut self.edit {
            editor.finish(&mut self.building);
        }
        self.flush(out);
    }

    /// Takes note that the upstream closed the connection. True when that is how this body ends; `out` gets what remains.
    pub fn closed(&mut self, out: &mut Vec<u8>) -> bool {
        let whole = self.reader.ends_at_close();
        if whole {
            self.end(out);
        } else if !self.is_verbatim() {
            self.release(out);
        }
        whole
    }

    /// What the stream has told that the next request's edit needs to know.
    pub fn lesson(&self) -> Option<&Known> {
        match &self.edit {
            Edit::None => None,
            Edit::Learn(known) => Some(known),
            Edit::Strip(editor) => editor.lesson(),
        }
    }

    /// Whether editing was given up, and why.
    pub fn stopped(&self) -> Option<Stopped> {
        match &self.edit {
            Edit::Strip(editor) => editor.stopped(),
            _ => None,
        }
    }
}
