//! What a response body says: which events carry generated content, usage, and the stream's end.
//!
//! It knows the shapes of the five endpoints (`mix::Endpoint`) and keeps no text: an event is looked at and let go.

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A line of a stream, or an unstreamed body, beyond this size is not looked into, so that no server can fill the
/// memory. An unstreamed answer with logprobs has 100 kB.
const KEPT_MAX_BYTES: usize = 1024 * 1024;

/// Token counts as the server reported them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// All tokens of the prompt, cached ones included.
    pub prompt: Option<u64>,
    /// Generated tokens.
    pub completion: Option<u64>,
}

/// What a body said so far.
#[derive(Debug, Default)]
pub struct Content {
    /// Events with generated text, reasoning or tool calls.
    pub chunks: u64,
    /// All data events except `[DONE]`.
    pub events: u64,
    /// The latest usage.
    pub tokens: Tokens,
    /// The stream's terminal event came.
    pub terminal: bool,
    /// The stream carried an error.
    pub error: bool,
    kept: Vec<u8>,
    too_long: bool,
}

impl Content {
    /// Takes the next bytes of an event stream; returns how many chunks with content they completed.
    pub fn push_stream(&mut self, mut data: &[u8]) -> u64 {
        let before = self.chunks;
        while let Some(end) = memchr::memchr(b'\n', data) {
            if self.kept.is_empty() && !self.too_long {
                self.line(&data[..end]);
            } else {
                self.keep(&data[..end]);
                let line = std::mem::take(&mut self.kept);
                if !std::mem::take(&mut self.too_long) {
                    self.line(&line);
                }
                // The allocation is kept for the next line that is split.
                self.kept = line;
                self.kept.clear();
            }
            data = &data[end + 1..];
        }
        self.keep(data);
        self.chunks - before
    }

    /// Takes the next bytes of a body that is one JSON document.
    pub fn push_document(&mut self, data: &[u8]) {
        self.keep(data);
    }

    /// The document is whole: reads its usage.
    pub fn finish_document(&mut self) {
        if self.too_long {
            return;
        }
        if let Ok(document) = serde_json::from_slice::<Event>(&self.kept) {
            self.tokens.update(&document);
        }
    }

    fn keep(&mut self, data: &[u8]) {
        if self.kept.len() + data.len() > KEPT_MAX_BYTES {
            self.too_long = true;
            self.kept.clear();
        }
        if !self.too_long {
            self.kept.extend_from_slice(data);
        }
    }

    /// One line of the stream. These servers put each event's data on one line, so events need not be assembled.
    fn line(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data:") else {
            return;
        };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.terminal = true;
            return;
        }
        self.events += 1;
        if let Ok(event) = serde_json::from_slice::<Event>(data) {
            self.tokens.update(&event);
            self.chunks += u64::from(event.has_content());
            let kind = event.kind.as_deref().unwrap_or_default();
            self.error |= event.error.is_some() || matches!(kind, "error" | "response.failed");
            self.terminal |= matches!(
                kind,
                "message_stop" | "response.completed" | "response.incomplete"
            );
        }
    }
}

impl Tokens {
    /// Later usage replaces earlier, number by number: Messages reports the prompt first.
    fn update(&mut self, event: &Event) {
        let nested = event.response.as_ref().or(event.message.as_ref());
        let Some(usage) = event
            .usage
            .as_ref()
            .or_else(|| nested.and_then(|nested| nested.usage.as_ref()))
        else {
            return;
        };
        self.prompt = usage.prompt().or(self.prompt);
        self.completion = usage
            .completion_tokens
            .or(usage.output_tokens)
            .or(self.completion);
    }
}

/// The parts that matter of an event, or of an unstreamed answer, of any of the endpoints.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Option<std::borrow::Cow<'a, str>>,
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    /// A string in Responses, an object in Messages.
    #[serde(default)]
    delta: Filled,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<IgnoredAny>,
    #[serde(default)]
    response: Option<Nested>,
    #[serde(default)]
    message: Option<Nested>,
}

impl Event<'_> {
    fn has_content(&self) -> bool {
        match self.kind.as_deref() {
            Some(kind) => self.delta.0 && (kind == "content_block_delta" || kind.starts_with("response.")),
            None => self.choices.iter().flatten().any(Choice::has_content),
        }
    }
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: Filled,
    #[serde(default)]
    delta: Option<Delta>,
}

impl Choice {
    fn has_content(&self) -> bool {
        self.text.0 || self.delta.as_ref().is_some_and(Delta::has_content)
    }
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default)]
    content: Filled,
    #[serde(default)]
    reasoning: Filled,
    #[serde(default)]
    reasoning_content: Filled,
    #[serde(default)]
    tool_calls: Filled,
}

impl Delta {
    fn has_content(&self) -> bool {
        self.content.0 || self.reasoning.0 || self.reasoning_content.0 || self.tool_calls.0
    }
}

/// What stands around usage in Responses (`response`) and at the start of Messages (`message`).
#[derive(Deserialize)]
struct Nested {
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
}

impl Usage {
    fn prompt(&self) -> Option<u64> {
        // The input tokens of Messages leave out what came from the prefix cache or went into it.
        let input = self.input_tokens.map(|input| {
            let cached = [self.cache_creation_input_tokens, self.cache_read_input_tokens];
            cached.into_iter().flatten().fold(input, u64::saturating_add)
        });
        self.prompt_tokens.or(input)
    }
}

/// Whether a value is there and not empty; of an object, whether anything but its `type` is.
#[derive(Default)]
struct Filled(bool);

impl<'de> Deserialize<'de> for Filled {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FilledVisitor)
    }
}

struct FilledVisitor;

impl<'de> Visitor<'de> for FilledVisitor {
    type Value = Filled;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E>(self, value: &str) -> Result<Filled, E> {
        Ok(Filled(!value.is_empty()))
    }

    fn visit_unit<E>(self) -> Result<Filled, E> {
        Ok(Filled(false))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Filled, E> {
        Ok(Filled(true))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Filled, E> {
        Ok(Filled(true))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Filled, E> {
        Ok(Filled(true))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Filled, E> {
        Ok(Filled(true))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Filled, A::Error> {
        let mut filled = false;
        while seq.next_element::<IgnoredAny>()?.is_some() {
            filled = true;
        }
        Ok(Filled(filled))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Filled, A::Error> {
        let mut filled = false;
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let value: Filled = map.next_value()?;
            filled |= value.0 && key != "type";
        }
        Ok(Filled(filled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{BodyDecoder, Framing, parse_head};
    use proptest::prelude::*;

    /// The body of a captured response of a real vLLM, its chunks undone.
    fn captured(name: &str) -> (bool, Vec<u8>) {
        let path = format!(
            "{}/tests/fixtures/vllm-0.32.0/{name}.response",
            env!("CARGO_MANIFEST_DIR")
        );
        let wire = std::fs::read(&path).expect(&path);
        let (head, length) = parse_head(&wire).expect("a head").expect("a whole head");
        let (mut rest, mut body) = (&wire[length..], Vec::new());
        let mut decoder = BodyDecoder::new(head.framing);
        while let Some(step) = decoder.step(rest).expect("sound framing") {
            body.extend_from_slice(&rest[step.data]);
            rest = &rest[step.consumed..];
        }
        assert!(
            decoder.is_done() || head.framing == Framing::UntilClose || name.starts_with("abort"),
            "{name}"
        );
        (head.event_stream, body)
    }

    fn content_of(name: &str) -> Content {
        let (event_stream, body) = captured(name);
        let mut content = Content::default();
        if event_stream {
            content.push_stream(&body);
        } else {
            content.push_document(&body);
            content.finish_document();
        }
        content
    }

    #[track_caller]
    fn check(name: &str, prompt: impl Into<Option<u64>>, completion: impl Into<Option<u64>>) -> Content {
        let content = content_of(name);
        assert_eq!(
            content.tokens,
            Tokens {
                prompt: prompt.into(),
                completion: completion.into()
            },
            "{name}"
        );
        assert!(!content.error, "{name}");
        content
    }

    #[test]
    fn real_answers_give_their_usage() {
        check("chat_prefix_cached", 663, 3);
        check("completion_stream_usage", 8, 9);
        check("chat_stream_no_usage", None, None);
        check("embeddings", 6, 0);
        check("responses_stream", 7, 9);
        check("messages_stream", 19, 9);
        check("error_bad_json", None, None);
    }

    #[test]
    fn real_streams_give_their_chunks_and_their_end() {
        // A role-only chunk, a finish chunk's empty text and a usage chunk are events, but not content.
        let chat = check("chat_stream_usage", 19, 12);
        assert!(
            chat.terminal && chat.chunks <= 12 && chat.events > chat.chunks,
            "{chat:?}"
        );
        let completion = check("completion_stream_usage", 8, 9);
        assert_eq!(
            (completion.chunks, completion.events, completion.terminal),
            (9, 10, true)
        );
        assert_eq!(check("messages_stream", 19, 9).chunks, 7);
        assert!(check("responses_stream", 7, 9).terminal);
        let aborted = content_of("abort_stream");
        assert!(!aborted.terminal && aborted.chunks > 0, "{aborted:?}");
        assert!(content_of("triple_tool_final").chunks > 0);
    }

    #[test]
    fn an_error_in_mid_stream_is_seen() {
        let mut content = Content::default();
        content.push_stream(b"data: {\"error\":{\"message\":\"x\",\"code\":500}}\n\ndata: [DONE]\n\n");
        assert!(content.error && content.terminal);
        let mut content = Content::default();
        content.push_stream(b"event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n");
        assert!(content.error);
    }

    #[test]
    fn a_line_beyond_the_limit_is_skipped_and_the_next_is_read() {
        let mut content = Content::default();
        content.push_stream(b"data: {\"choices\":[{\"text\":\"");
        for _ in 0..40 {
            content.push_stream(&vec![b'x'; 64 * 1024]);
            assert!(content.kept.len() <= KEPT_MAX_BYTES);
        }
        content.push_stream(b"\"}]}\n\ndata: {\"choices\":[{\"text\":\"y\"}]}\n\n");
        assert_eq!((content.chunks, content.events), (1, 1));
    }

    proptest! {
        #[test]
        fn a_stream_says_the_same_wherever_it_is_split(sizes in prop::collection::vec(1usize..400, 1..60)) {
            let (_, body) = captured("triple_chat_continuous");
            let mut whole = Content::default();
            whole.push_stream(&body);
            let (mut split, mut rest) = (Content::default(), &body[..]);
            for size in sizes.iter().cycle() {
                let (piece, after) = rest.split_at((*size).min(rest.len()));
                split.push_stream(piece);
                rest = after;
                if rest.is_empty() { break }
            }
            prop_assert_eq!((split.chunks, split.events, split.tokens, split.terminal), (whole.chunks, whole.events, whole.tokens, whole.terminal));
            prop_assert!(whole.chunks > 0);
        }
    }
}
