//! Response bodies: whole ones, event streams, and broken ones.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::engine::Ticket;
use crate::faults::Fault;
use crate::shapes::error::ApiError;
use crate::shapes::{DONE, Events};

/// The event that a malformed stream cuts: the first with text, where a stream has a role chunk before.
const MALFORMED_EVENT: u32 = 1;
/// Events before an error event.
const ERROR_EVENT_AFTER: u32 = 3;

/// Any response body.
pub enum SimBody {
    /// All at once.
    Whole(Option<Bytes>),
    /// So many bytes of a longer body, and then the connection closes.
    CutOff(Option<Bytes>, u64),
    /// Server-sent events.
    Stream(Box<EventStream>),
}

impl SimBody {
    /// A body that closes the connection half way.
    pub fn cut_off(whole: &Bytes) -> Self {
        SimBody::CutOff(Some(whole.slice(..whole.len() / 2)), whole.len() as u64)
    }
}

/// An answer that leaves event by event.
///
/// Between two events it says once that nothing is ready: that makes hyper write out what it has, so each event is
/// a write and a chunk of its own, as with uvicorn, and the head leaves before the first of them.
pub struct EventStream {
    ticket: Option<Ticket>,
    events: Box<dyn Events>,
    queue: VecDeque<Bytes>,
    written: u32,
    flush: bool,
    ended: bool,
    fault: Option<Fault>,
}

impl EventStream {
    /// The events of a request; without a ticket it never has any.
    pub fn new(ticket: Option<Ticket>, mut events: Box<dyn Events>, fault: Option<Fault>) -> Self {
        let mut queue = VecDeque::new();
        if ticket.is_some() {
            events.opening(&mut queue);
        }
        EventStream {
            ticket,
            events,
            queue,
            written: 0,
            flush: true,
            ended: false,
            fault,
        }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if self.flush {
            self.flush = false;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match self.fault {
            Some(Fault::CloseAfter(events)) if self.written >= events => {
                return Poll::Ready(Some(Err(io::Error::other("closed on purpose"))));
            }
            Some(Fault::ErrorEvent) if self.written == ERROR_EVENT_AFTER => self.fail(),
            _ => {}
        }
        while self.queue.is_empty() {
            if self.ended {
                return Poll::Ready(None);
            }
            let Some(ticket) = &mut self.ticket else {
                return Poll::Pending;
            };
            match std::task::ready!(ticket.poll_take(cx)) {
                Some(delta) => self.events.delta(delta, &mut self.queue),
                None => {
                    self.events.closing(ticket.summary(), &mut self.queue);
                    self.ended = true;
                }
            }
        }
        Poll::Ready(self.queue.pop_front().map(|event| Ok(self.write(event))))
    }

    fn write(&mut self, event: Bytes) -> Bytes {
        self.written += 1;
        self.flush = true;
        if self.fault == Some(Fault::Malformed) && self.written == MALFORMED_EVENT + 1 {
            let mut cut = event[..event.len() / 2].to_vec();
            cut.extend_from_slice(b"\n\n");
            return Bytes::from(cut);
        }
        event
    }

    /// Breaks off: the request leaves the engine and an error takes the place of all further events.
    fn fail(&mut self) {
        self.ticket = None;
        self.ended = true;
        self.fault = None;
        self.queue.clear();
        let error = ApiError::status(500).openai_body();
        self.queue.push_back(Bytes::from(format!("data: {error}\n\n")));
        self.queue.push_back(DONE);
    }
}

impl Body for SimBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            SimBody::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            SimBody::CutOff(bytes, _) => match bytes.take() {
                Some(bytes) if !bytes.is_empty() => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                // What was written must leave before the error ends the connection.
                Some(_) => Poll::Ready(Some(Err(io::Error::other("closed on purpose")))),
                None => {
                    *bytes = Some(Bytes::new());
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
            },
            SimBody::Stream(stream) => stream.poll_event(cx).map_ok(Frame::data),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, SimBody::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            SimBody::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            SimBody::CutOff(_, announced) => SizeHint::with_exact(*announced),
            SimBody::Stream(_) => SizeHint::default(),
        }
    }
}
