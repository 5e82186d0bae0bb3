//! What a document of a response says: a whole body, or the data of one event of a stream.
//!
//! The shapes of all routes are read at once, told apart by their members alone, since `/invocations` may answer in any of them and
//! they do not contradict each other. [`Findings`] takes what the scanner reports; what belongs to one document stands in a
//! [`Draft`] until the document is whole.

use super::json::{Container, Reader, Scalar};
use super::usage::{Member, Usage};

/// Longest error type that is kept, in bytes: it becomes a metric label.
const MAX_ERROR_TYPE_BYTES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Root,
    Model,
    Kind,
    Object,
    /// Why generation ended, wherever a shape says so.
    FinishReason,
    /// How a Responses object stands.
    Status,
    IncompleteDetails,
    Choices,
    Choice,
    ChoiceIndex,
    /// A choice's `delta` or its `message`.
    ChoiceDelta,
    /// Generated text of a choice.
    ChoiceText,
    ToolCalls,
    ToolCall,
    FunctionCall,
    TokenIds,
    TokenId,
    /// `delta` at the top: a string in Responses, an object in Messages.
    EventDelta,
    BlockText,
    /// `message` at the top (Messages).
    Message,
    /// `response` at the top (Responses).
    Response,
    Usage(UsageAt),
    Count(Member),
    Metrics,
    QueueTime,
    Error,
    ErrorType,
    ErrorCode,
    /// `meta` of Cohere's routes.
    Meta,
}

/// Where a `usage` stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum UsageAt {
    /// At the top.
    #[default]
    Top,
    /// In `message` (Messages), before anything is generated.
    Message,
    /// In `response` (Responses).
    Response,
}

/// What `type` at the top makes of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    #[default]
    Plain,
    /// Responses and transcriptions: `delta` is generated text.
    TextDelta,
    /// Messages: `delta` is part of a content block.
    BlockDelta,
    /// Messages: how it ended, and usage.
    MessageDelta,
    /// Messages: the end.
    MessageStop,
    /// Responses: the end, with usage.
    ResponseEnd,
    /// Responses: the end, for the worse.
    ResponseFailed,
    /// An error.
    Error,
}

impl Kind {
    fn of(name: &str) -> Kind {
        match name {
            "content_block_delta" => Kind::BlockDelta,
            "message_delta" => Kind::MessageDelta,
            "message_stop" => Kind::MessageStop,
            "response.completed" | "response.incomplete" => Kind::ResponseEnd,
            "response.failed" => Kind::ResponseFailed,
            "error" => Kind::Error,
            _ if name.ends_with(".delta") => Kind::TextDelta,
            _ => Kind::Plain,
        }
    }
}

/// What one document has said so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Draft {
    pub(super) kind: Kind,
    usage: Usage,
    usage_at: UsageAt,
    has_usage: bool,
    /// How many choices it holds.
    pub(super) choices: u32,
    /// The index of the last of them.
    pub(super) index: u64,
    has_choice_text: bool,
    has_event_text: bool,
    has_block_text: bool,
    has_token_ids: bool,
    /// A choice said something by `delta`, `message` or `text`, be it empty: then token ids are not what carries the content.
    has_speech: bool,
    has_error: bool,
}

impl Draft {
    /// Whether it carries generated content: text, reasoning, or a tool call.
    pub(super) fn has_content(&self) -> bool {
        self.has_choice_text
            || (self.has_token_ids && !self.has_speech)
            || (self.has_event_text && self.kind == Kind::TextDelta)
            || (self.has_block_text && self.kind == Kind::BlockDelta)
    }

    pub(super) fn has_error(&self) -> bool {
        self.has_error || matches!(self.kind, Kind::Error | Kind::ResponseFailed)
    }

    /// Whether it is the last event of its stream.
    pub(super) fn is_last(&self) -> bool {
        matches!(
            self.kind,
            Kind::MessageStop | Kind::ResponseEnd | Kind::ResponseFailed
        )
    }

    /// The usage, where it stands and whether it was whole.
    pub(super) fn usage(&self) -> Option<(UsageAt, Usage)> {
        (self.has_usage && !self.usage.is_empty()).then_some((self.usage_at, self.usage))
    }

    /// Whether a usage at the top speaks for the whole stream: a chunk of no choice, or Anthropic's last word.
    pub(super) fn is_summary(&self) -> bool {
        self.choices == 0 || self.kind == Kind::MessageDelta
    }
}

/// What a response has said so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    pub(super) draft: Draft,
    pub(super) model: Option<Box<str>>,
    pub(super) finish_reason: Option<Box<str>>,
    pub(super) error_type: Option<Box<str>>,
    pub(super) queue_us: Option<u64>,
    /// The highest index of a choice, or the count of unstreamed choices less one.
    pub(super) last_choice: u64,
    /// Whether the status code says error, so that the document is one.
    pub(super) is_error_body: bool,
}

impl Findings {
    fn error_type(&mut self, name: &str) {
        let name = bounded_name(name);
        if !name.is_empty() {
            self.error_type = Some(name);
        }
    }

    fn root_member(key: &[u8]) -> Option<Place> {
        Some(match key {
            b"choices" => Place::Choices,
            b"model" => Place::Model,
            b"usage" => Place::Usage(UsageAt::Top),
            b"type" => Place::Kind,
            b"object" => Place::Object,
            b"delta" => Place::EventDelta,
            b"message" => Place::Message,
            b"response" => Place::Response,
            b"metrics" => Place::Metrics,
            b"error" => Place::Error,
            b"code" => Place::ErrorCode,
            b"stop_reason" => Place::FinishReason,
            b"status" => Place::Status,
            b"incomplete_details" => Place::IncompleteDetails,
            b"meta" => Place::Meta,
            _ => return None,
        })
    }

    fn kind(&mut self, name: &str) {
        self.draft.kind = Kind::of(name);
        let tells_error = self.is_error_body || self.draft.has_error;
        // Servers before 0.10 wrote the error's members at the top.
        if tells_error && self.draft.kind != Kind::Error && self.error_type.is_none() {
            self.error_type(name);
        }
    }
}

impl Reader for Findings {
    type Place = Place;

    const ROOT: Place = Place::Root;

    fn member(&mut self, object: Place, key: &[u8]) -> Option<Place> {
        Some(match (object, key) {
            (Place::Root, _) => return Findings::root_member(key),
            (Place::Choice, b"index") => Place::ChoiceIndex,
            (Place::Choice, b"delta" | b"message") => Place::ChoiceDelta,
            (Place::Choice, b"text") => Place::ChoiceText,
            (Place::Choice, b"finish_reason") => Place::FinishReason,
            (Place::Choice, b"token_ids") => Place::TokenIds,
            (Place::ChoiceDelta, b"content" | b"reasoning" | b"reasoning_content" | b"refusal") => {
                Place::ChoiceText
            }
            (Place::ChoiceDelta, b"tool_calls") => Place::ToolCalls,
            (Place::ChoiceDelta, b"function_call") => Place::FunctionCall,
            (Place::Usage(_), _) => Place::Count(Member::of_usage(key)?),
            (Place::Count(details), _) => Place::Count(details.of_details(key)?),
            (Place::EventDelta, b"text" | b"thinking" | b"partial_json") => Place::BlockText,
            (Place::EventDelta, b"stop_reason") => Place::FinishReason,
            (Place::Message | Place::Response, b"model") => Place::Model,
            (Place::Message, b"usage") => Place::Usage(UsageAt::Message),
            (Place::Response, b"usage") => Place::Usage(UsageAt::Response),
            (Place::Response, b"status") => Place::Status,
            (Place::Response, b"incomplete_details") => Place::IncompleteDetails,
            (Place::Response, b"error") => Place::Error,
            (Place::IncompleteDetails, b"reason") => Place::FinishReason,
            (Place::Metrics, b"queue_time_ms") => Place::QueueTime,
            (Place::Error, b"type") => Place::ErrorType,
            (Place::Error, b"code") => Place::ErrorCode,
            (Place::Meta, b"billed_units") => Place::Usage(UsageAt::Top),
            _ => return None,
        })
    }

    fn element(&mut self, array: Place) -> Option<Place> {
        match array {
            Place::Choices => Some(Place::Choice),
            Place::ToolCalls => Some(Place::ToolCall),
            // One element is enough to know that there are some.
            Place::TokenIds if !self.draft.has_token_ids => Some(Place::TokenId),
            _ => None,
        }
    }

    fn wants_text(&self, place: Place) -> bool {
        matches!(
            place,
            Place::Model
                | Place::Kind
                | Place::Object
                | Place::FinishReason
                | Place::Status
                | Place::ErrorType
                | Place::ErrorCode
        )
    }

    fn scalar(&mut self, place: Place, scalar: Scalar<'_>) {
        let has_text = scalar.is_some_text();
        match (place, scalar) {
            (Place::Model, scalar) => learn(&mut self.model, scalar.text()),
            (Place::Kind, scalar) => {
                if let Some(name) = scalar.text() {
                    self.kind(name);
                }
            }
            (Place::Object, scalar) => self.draft.has_error |= scalar.text() == Some("error"),
            (Place::FinishReason, scalar) => learn(&mut self.finish_reason, scalar.text()),
            // The reason why a response is incomplete says more, and comes before its status.
            (Place::Status, scalar) if self.finish_reason.is_none() => {
                let ended = |status: &&str| !matches!(*status, "in_progress" | "queued");
                learn(&mut self.finish_reason, scalar.text().filter(ended));
            }
            (Place::ChoiceIndex, scalar) => {
                self.draft.index = scalar.count().unwrap_or(self.draft.index);
                self.last_choice = self.last_choice.max(self.draft.index);
            }
            (Place::ChoiceText, _) => {
                self.draft.has_choice_text |= has_text;
                self.draft.has_speech = true;
            }
            (Place::EventDelta, _) => self.draft.has_event_text |= has_text,
            (Place::BlockText, _) => self.draft.has_block_text |= has_text,
            (Place::TokenId, Scalar::Number(_)) => self.draft.has_token_ids = true,
            (Place::Count(member), scalar) => self.draft.usage.set(member, scalar.count()),
            (Place::QueueTime, Scalar::Number(ms)) => self.queue_us = micros_of_millis(ms),
            (Place::Error, Scalar::String { .. }) => self.draft.has_error = true,
            (Place::ErrorType, scalar) => {
                if let Some(name) = scalar.text() {
                    self.error_type(name);
                }
            }
            (Place::ErrorCode, Scalar::Number(code)) if self.error_type.is_none() => self.error_type(code),
            (Place::ErrorCode, scalar) if self.error_type.is_none() => {
                if let Some(code) = scalar.text() {
                    self.error_type(code);
                }
            }
            _ => {}
        }
    }

    fn begin(&mut self, place: Place, container: Container) {
        let draft = &mut self.draft;
        match (place, container) {
            (Place::Choice, Container::Object) => draft.choices = draft.choices.saturating_add(1),
            (Place::ChoiceDelta, Container::Object) => draft.has_speech = true,
            (Place::ToolCall | Place::FunctionCall, Container::Object) => draft.has_choice_text = true,
            (Place::Usage(at), Container::Object) => {
                draft.usage = Usage::default();
                draft.usage_at = at;
                draft.has_usage = false;
            }
            (Place::Error, Container::Object) => draft.has_error = true,
            _ => {}
        }
    }

    fn end(&mut self, place: Place) {
        if let Place::Usage(_) = place {
            self.draft.has_usage = true;
        }
    }
}

/// Stores a text that is not there yet; a stream repeats the same one thousands of times.
fn learn(slot: &mut Option<Box<str>>, text: Option<&str>) {
    if let Some(text) = text
        && slot.as_deref() != Some(text)
    {
        *slot = Some(text.into());
    }
}

/// An error type fit for a label: bounded, and nothing but `[A-Za-z0-9_.-]`; other characters become `_`.
fn bounded_name(name: &str) -> Box<str> {
    let kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let name = name.chars().take(MAX_ERROR_TYPE_BYTES);
    name.map(|c| if kept(c) { c } else { '_' })
        .collect::<String>()
        .into()
}

fn micros_of_millis(ms: &str) -> Option<u64> {
    let micros = ms.parse::<f64>().ok()? * 1_000.0;
    // A float that large would not be a time any more; the cast saturates and is exact below 2^53.
    (micros.is_finite() && micros >= 0.0).then(|| micros.round() as u64)
}
