//! One request: from its head to its upstream, and the answer back.

use super::client::Client;
use super::inject::{self, Known, Plan, StreamEditor, Untouched};
use super::receive::{Body, Receiver};
use super::recording::Recording;
use super::refusal::Refusal;
use super::relay::Edit;
use super::respond::{self, Answer};
use super::rewrite::{self, RequestAdditions, Sent};
use super::upstream::{Place, Upstream, UpstreamConnection};
use super::{Stop, Worker};
use crate::clock;
use crate::config::OnUninspectable;
use crate::limits::Now;
use crate::proxy::send::{self, Failed};
use crate::wire::At;
use crate::wire::endpoint::{Endpoint, Purpose};
use crate::wire::exchange::Ending;
use crate::wire::head::{Framing, RequestHead};
use std::sync::Arc;

/// Longest body that is read of a request that a limit refuses: most prompts are shorter, and a connection is not worth more.
const REFUSED_BODY_MAX: u64 = 64 * 1024;

/// What becomes of the client's connection after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another request may follow.
    KeepAlive,
    /// It ends, in such a way that the client still reads all that was sent.
    Close,
    /// It is dead already, or must not end as if all were well.
    Drop,
}

/// Serves one request whose head was read; its first byte came at `at`.
pub async fn serve(worker: &Worker, client: &mut Client, head: RequestHead, at: At) -> Next {
    let shared = &worker.shared;
    let endpoint = Endpoint::classify(head.path());
    let recording = Recording::begin(shared, at, &head);
    let keep_alive = head.keep_alive();
    let body_unread = head.framing() != Framing::None;
    let mut forward = Forward {
        worker,
        client,
        head,
        endpoint,
        recording,
        body_unread,
        edit: Edit::None,
    };
    match forward.run().await {
        Ok(next) => next,
        Err(Stop::Gone) => {
            forward.recording.end(Ending::ClientGone);
            Next::Drop
        }
        Err(Stop::Broken(ending, reason)) => {
            forward.recording.broke(ending, reason);
            Next::Drop
        }
        Err(Stop::Refused(refusal)) => {
            let close = forward.body_unread
                || !keep_alive
                || !refusal.keeps_connection()
                || shared.phase.is_draining();
            let response = refusal.response(
                endpoint,
                forward.recording.request_id(),
                forward.head.method(),
                close,
            );
            forward.recording.refuse(&refusal);
            forward.recording.settled().await;
            match forward.client.send(&response).await {
                Err(_) => Next::Drop,
                Ok(()) if close => Next::Close,
                Ok(()) => Next::KeepAlive,
            }
        }
    }
}

struct Forward<'a> {
    worker: &'a Worker,
    client: &'a mut Client,
    head: RequestHead,
    endpoint: Endpoint,
    recording: Recording,
    /// Whether the client may still be sending this request's body.
    body_unread: bool,
    /// What is done with the response's events, for the upstream that was tried last.
    edit: Edit,
}

impl Forward<'_> {
    async fn run(&mut self) -> Result<Next, Stop> {
        if let Err(refusal) = self.admit() {
            if matches!(refusal, Refusal::Limited(_)) && self.has_small_body() {
                // Whoever is told to come again should find his connection open: what is left unread would end it.
                self.receive().await?;
            }
            return Err(refusal.into());
        }
        let body = self.receive().await?;
        let received = clock::now();
        let model = self
            .recording
            .exchange()
            .and_then(|exchange| exchange.asked().model.clone());
        let candidates = self
            .worker
            .shared
            .upstreams
            .candidates(self.endpoint, model.as_deref())?;
        let mut busy = false;
        for upstream in candidates {
            let Some(place) = upstream.reserve() else {
                busy = true;
                continue;
            };
            self.recording.sent_to(upstream.name());
            if let Some(answer) = self
                .try_upstream(&upstream, &body, model.as_deref(), received)
                .await?
            {
                // Nobody needs the prompt any more, and its answer may take minutes.
                drop(body);
                return self.respond(answer, place, model.as_deref()).await;
            }
        }
        Err(if busy { Refusal::Busy } else { Refusal::Unreachable }.into())
    }

    /// All that can be decided by the head alone.
    fn admit(&mut self) -> Result<(), Refusal> {
        let shared = &self.worker.shared;
        if self.head.method() == "CONNECT" {
            return Err(Refusal::Method);
        }
        let fields = self.head.fields();
        let identity = shared
            .books
            .identity
            .identify(fields.iter().map(|field| (field.name, field.value)))
            .map_err(|error| Refusal::Identity(error.to_string()))?;
        self.recording.identified(&identity);
        // HTTP/1.0 clients get no interim response, and what they expect is to be ignored (RFC 9110, section 10.1.1).
        let expects = self.head.minor_version() == 1 && fields.get("expect").is_some();
        if expects && !self.head.expects_continue() {
            return Err(Refusal::Expectation);
        }
        if self.endpoint.purpose() == Purpose::Administer && !shared.config.proxy.allow_admin_routes {
            return Err(Refusal::AdminRoute);
        }
        // Lists and health cost nothing, and whoever has used up a limit should still see them.
        if !matches!(self.endpoint.purpose(), Purpose::Free | Purpose::Administer) {
            let permit = shared.limiter.admit(identity.team.as_str(), Now::read);
            self.recording.admitted(permit.map_err(Refusal::Limited)?);
        }
        Ok(())
    }

    /// Whether the body is on its way anyway, and cheap to read.
    fn has_small_body(&self) -> bool {
        let is_small = matches!(self.head.framing(), Framing::Length(bytes) if bytes <= REFUSED_BODY_MAX);
        is_small && !self.head.expects_continue()
    }

    async fn receive(&mut self) -> Result<Body, Stop> {
        let limits = &self.worker.shared.config.proxy;
        let framing = self.head.framing();
        if let Framing::Length(bytes) = framing
            && bytes > limits.max_body.as_len() as u64
        {
            return Err(Refusal::BodyTooLarge(limits.max_body.as_len() as u64).into());
        }
        let encoded = self.head.fields().get("content-encoding").is_some();
        let refuse_large = limits.on_uninspectable == OnUninspectable::Reject;
        if refuse_large
            && (encoded || matches!(framing, Framing::Length(n) if n > limits.inspect_max.as_len() as u64))
        {
            return Err(Refusal::Uninspectable(limits.inspect_max.as_len() as u64).into());
        }
        if self.head.expects_continue() && framing != Framing::None {
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        let (reader, _) = self.client.split();
        let mut receiver = Receiver {
            reader,
            limits,
            recording: &mut self.recording,
        };
        let body = receiver.receive(framing).await?;
        match &body {
            Body::Whole(_) => self.body_unread = false,
            Body::Begun { .. } if refuse_large => {
                return Err(Refusal::Uninspectable(limits.inspect_max.as_len() as u64).into());
            }
            Body::Begun { .. } => {}
        }
        Ok(body)
    }

    /// Sends the request to one upstream. `None` when it could not be reached: the next may be tried.
    async fn try_upstream(
        &mut self,
        upstream: &Arc<Upstream>,
        body: &Body,
        model: Option<&str>,
        received: At,
    ) -> Result<Option<Answer>, Stop> {
        let edited = self.plan(upstream, body, model);
        let head = self.upstream_head(body, edited.as_deref());
        // A body that is streamed on cannot be sent twice, so it never goes to a connection that may be dead.
        let pooled = matches!(body, Body::Whole(_))
            .then(|| self.worker.pool.take(upstream))
            .flatten();
        if let Some(connection) = pooled {
            match self
                .attempt(connection, &head, body, edited.as_deref(), received)
                .await
            {
                Err(Failed::Stale) => upstream.metrics().retried("idle_connection_closed"),
                other => return other.map(Some).map_err(Stop::from),
            }
        }
        match self.worker.pool.connect(upstream).await {
            Ok(connection) => {
                let answer = self
                    .attempt(connection, &head, body, edited.as_deref(), received)
                    .await;
                answer.map(Some).map_err(Stop::from)
            }
            Err(error) => {
                upstream.metrics().connect_failed();
                tracing::debug!(upstream = upstream.name(), %error, "connect failed");
                if upstream.set_up(false) {
                    tracing::warn!(upstream = upstream.name(), url = %upstream.config().url, %error, "upstream is down");
                    self.worker.shared.learned.forget(upstream.name());
                }
                Ok(None)
            }
        }
    }

    /// Decides whether usage is asked for on the client's behalf; the edited body, if so.
    fn plan(&mut self, upstream: &Upstream, body: &Body, model: Option<&str>) -> Option<Vec<u8>> {
        self.edit = Edit::None;
        let streams = self
            .recording
            .exchange()
            .is_some_and(|exchange| exchange.asked().stream);
        let Body::Whole(body) = body else { return None };
        // A compressed body is no JSON, and so stays as it is; a field that only claims so changes nothing.
        if !streams || self.head.minor_version() == 0 {
            return None;
        }
        let shared = &self.worker.shared;
        let known = shared.learned.known(upstream.name(), model.unwrap_or(""));
        match inject::plan(body, self.endpoint, shared.config.usage.inject.into(), known) {
            Plan::Edited { body, strip } => {
                shared.metrics.injection("edited");
                self.edit = Edit::Strip(Box::new(StreamEditor::new(strip)));
                Some(body)
            }
            Plan::Untouched(why) => {
                shared.metrics.injection(why.name());
                if why == Untouched::FingerprintUnknown {
                    self.edit = Edit::Learn(Known::default());
                }
                None
            }
        }
    }

    fn upstream_head(&self, body: &Body, edited: Option<&[u8]>) -> Vec<u8> {
        let shared = &self.worker.shared;
        let sent = match (body, self.head.framing(), edited) {
            (_, _, Some(edited)) => Sent::Whole(edited.len()),
            (Body::Whole(body), Framing::Chunked, None) => Sent::Whole(body.len()),
            (Body::Begun { .. }, Framing::Chunked, None) => Sent::Rechunked,
            _ => Sent::AsFramed,
        };
        let add = RequestAdditions {
            gateway_request_id: &shared.books.ids.signed(self.recording.event_id()),
            request_id: self.recording.request_id(),
            traceparent: &self.recording.trace.traceparent,
            identity_encoding: edited.is_some(),
        };
        let forward_identity = shared.config.identity.forward_headers;
        let strip = |name: &str| !forward_identity && shared.books.identity.is_identity_header(name);
        let mut out = Vec::with_capacity(self.head.fields().raw().len() + 256);
        rewrite::request_head(&self.head, sent, &add, strip, &mut out);
        out
    }

    async fn attempt(
        &mut self,
        connection: UpstreamConnection,
        head: &[u8],
        body: &Body,
        edited: Option<&[u8]>,
        received: At,
    ) -> Result<Answer, Failed> {
        self.recording.forwarded(received);
        let request = send::Request {
            head,
            body,
            edited,
            rechunked: self.head.framing() == Framing::Chunked,
            method: self.head.method(),
            interim: self.head.minor_version() == 1,
            upgrade: self.head.wants_upgrade(),
        };
        let answer =
            send::exchange(self.worker, self.client, connection, request, &mut self.recording).await?;
        self.body_unread = !answer.sent_whole;
        Ok(answer)
    }

    async fn respond(&mut self, answer: Answer, place: Place, model: Option<&str>) -> Result<Next, Stop> {
        let editable = answer.head.is_event_stream() && answer.head.status() == 200;
        let planned = std::mem::replace(&mut self.edit, Edit::None);
        let edit = if editable { planned } else { Edit::None };
        let client_keeps = self.head.keep_alive() && answer.sent_whole;
        let request = respond::Request {
            minor_version: self.head.minor_version(),
            keep_alive: client_keeps && !self.worker.shared.phase.is_draining(),
            model,
        };
        respond::deliver(
            self.worker,
            self.client,
            answer,
            place,
            edit,
            request,
            &mut self.recording,
        )
        .await
    }
}
