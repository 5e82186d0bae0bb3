//! `/api/live`: an event a second, until either side ends it.

use super::answer::{Answer, error, with_body};
use crate::live::{Show, View};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::body::{Body, Frame};
use hyper::header::{HeaderValue, RETRY_AFTER};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Streams at a time. Each keeps one of the server's 64 connections, which scrapers and probes need too.
const STREAMS_MAX: usize = 32;

/// Time between two events.
const EVERY: Duration = Duration::from_secs(1);

/// A stream is ended after this, before its connection is, so that the page comes again and one that has vanished gives its place back.
const AGE_MAX: Duration = Duration::from_secs(240);

/// What streams share.
pub(super) struct Streams {
    places: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

impl Streams {
    /// Streams that end when `stop` says so.
    pub(super) fn until(stop: watch::Receiver<bool>) -> Streams {
        Streams {
            places: Arc::new(Semaphore::new(STREAMS_MAX)),
            stop,
        }
    }

    /// A new stream of what `show` may see.
    pub(super) fn open(&self, view: &Arc<View>, show: Show) -> Answer {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            let message =
                "too many consoles are open at a time; close one, or ask /api/teams every few seconds";
            let mut answer = error(StatusCode::SERVICE_UNAVAILABLE, "too_many_streams", message);
            answer
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from_static("5"));
            return answer;
        };
        // One event may wait for a slow reader; the next is made when that one has gone.
        let (events, body) = mpsc::channel(1);
        tokio::spawn(send(Arc::clone(view), show, events, self.stop.clone(), place));
        with_body(StatusCode::OK, "text/event-stream", Events(body).boxed_unsync())
    }
}

/// Ends when the reader has gone, which is noticed at the next event.
async fn send(
    view: Arc<View>,
    show: Show,
    events: mpsc::Sender<Bytes>,
    mut stop: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = Instant::now() + AGE_MAX;
    let mut last = 0;
    while Instant::now() < end {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = events.closed() => return,
            _ = ticks.tick() => {}
        }
        let (of, who) = (Arc::clone(&view), show.clone());
        // With a thousand teams this takes milliseconds: not for a thread that carries requests.
        let made = tokio::task::spawn_blocking(move || event(&of, &who, last)).await;
        let Ok(Some((event, newest))) = made else { return };
        last = newest;
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            sent = events.send(event) => if sent.is_err() { return },
        }
    }
}

/// One event, and the number of the newest request in it.
fn event(view: &View, show: &Show, after: u64) -> Option<(Bytes, u64)> {
    let snapshot = view.snapshot(show, after);
    let newest = snapshot.requests.first().map_or(after, |row| row.sequence);
    let mut text = b"event: snapshot\ndata: ".to_vec();
    serde_json::to_writer(&mut text, &snapshot).ok()?;
    text.extend(b"\n\n");
    Some((text.into(), newest))
}

/// Events as a body.
struct Events(mpsc::Receiver<Bytes>);

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0
            .poll_recv(context)
            .map(|event| Some(Ok(Frame::data(event?))))
    }
}
