//! A request's body: held until whole, so that it can be routed by its model and edited, or streamed on when it is too large.

use super::Stop;
use super::client::{Gone, Input, Reader};
use super::recording::Recording;
use super::refusal::Refusal;
use crate::clock;
use crate::config::ProxyConfig;
use crate::wire::Piece;
use crate::wire::body::{BodyReader, Step};
use crate::wire::head::Framing;
use std::time::Duration;
use tokio::time::timeout;

/// The body, as far as it was read before the request goes on.
#[derive(Debug)]
pub enum Body {
    /// All of it.
    Whole(Vec<u8>),
    /// The beginning of a large one; the rest is still with the client.
    Begun {
        /// Payload read so far.
        first: Vec<u8>,
        /// Where in the framing the rest goes on.
        rest: BodyReader,
    },
}

/// Reads a body and shows it to the observer.
pub struct Receiver<'a, 'c> {
    /// From the client.
    pub reader: Reader<'c>,
    /// Limits and timeouts.
    pub limits: &'a ProxyConfig,
    /// Where the observer is.
    pub recording: &'a mut Recording,
}

impl Receiver<'_, '_> {
    /// Reads the body if it is no larger than `inspect_max`, else only its beginning. A length that the head names was held against
    /// `max_body` already.
    ///
    /// # Errors
    /// [`Stop::Refused`] for a broken or too large body, or too slow a client, [`Stop::Gone`] when the client left.
    pub async fn receive(&mut self, framing: Framing) -> Result<Body, Stop> {
        let (inspect_max, max_body) = (self.limits.inspect_max.as_len(), self.limits.max_body.as_len());
        let mut rest = BodyReader::new(framing);
        let mut body = Vec::new();
        if rest.is_done()
            && let Some(exchange) = self.recording.exchange()
        {
            exchange.request_end(clock::now());
        }
        if let Framing::Length(bytes) = framing
            && bytes > inspect_max as u64
        {
            return Ok(Body::Begun { first: body, rest });
        }
        while !rest.is_done() {
            if body.len() > inspect_max {
                return Ok(Body::Begun { first: body, rest });
            }
            let input = self.input().await?;
            self.take(&input, &mut rest, |payload| body.extend_from_slice(payload))?;
            if body.len() > max_body {
                return Err(Refusal::BodyTooLarge(max_body as u64).into());
            }
        }
        Ok(Body::Whole(body))
    }

    /// The next bytes from the client, within the time that a slow client is given.
    pub async fn input(&mut self) -> Result<Input, Stop> {
        let limit: Duration = self.limits.client_write_timeout;
        match timeout(limit, self.reader.read()).await {
            Ok(Ok(input)) if !input.is_empty() => Ok(input),
            Ok(Ok(_) | Err(Gone)) => Err(Stop::Gone),
            Err(_) => Err(Refusal::SlowRequest.into()),
        }
    }

    /// Hands the payload in `input` to the observer and to `each`; what belongs to the next request goes back to the client's buffer.
    pub fn take(
        &mut self,
        mut input: &[u8],
        rest: &mut BodyReader,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Refusal> {
        let at = clock::now();
        loop {
            match rest.next(&mut input).map_err(Refusal::Body)? {
                Step::Data(payload) => {
                    if let Some(exchange) = self.recording.exchange() {
                        exchange.request_body(Piece::Bytes(payload));
                    }
                    each(payload);
                }
                Step::More => return Ok(()),
                Step::End => {
                    if let Some(exchange) = self.recording.exchange() {
                        exchange.request_end(at);
                    }
                    self.reader.unread(input);
                    return Ok(());
                }
            }
        }
    }
}
