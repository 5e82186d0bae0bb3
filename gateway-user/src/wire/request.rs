//! What a request's body asks for, read while it passes.

use super::Piece;
use super::facts::Asked;
use super::json::{Container, Reader, Scalar, Scanner};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Root,
    Model,
    Stream,
    Choices,
    Priority,
    Prompt,
    PromptItem,
}

/// Reads a request's body.
#[derive(Clone, Debug)]
pub(super) struct RequestReader {
    scanner: Scanner<Place>,
    found: Found,
}

#[derive(Clone, Debug)]
struct Found {
    asked: Asked,
    has_choices: bool,
    has_prompts: bool,
}

impl RequestReader {
    pub(super) fn new() -> RequestReader {
        let asked = Asked {
            n: 1,
            prompts: 1,
            ..Asked::default()
        };
        RequestReader {
            scanner: Scanner::new(),
            found: Found {
                asked,
                has_choices: false,
                has_prompts: false,
            },
        }
    }

    pub(super) fn push(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::Bytes(bytes) => self.scanner.push(bytes, &mut self.found),
            // What comes before a hole stands; what comes after it cannot be placed.
            Piece::Hole(_) => self.scanner.stop(),
        }
    }

    pub(super) fn asked(&self) -> &Asked {
        &self.found.asked
    }

    /// Leaves nothing behind.
    pub(super) fn take_asked(&mut self) -> Asked {
        std::mem::take(&mut self.found.asked)
    }

    /// Whether `n` is known: it was seen, or the whole body was and it is not there.
    pub(super) fn knows_choices(&self) -> bool {
        self.found.has_choices || self.scanner.is_done()
    }

    /// Whether the number of prompts is known: all of `prompt` was seen, or the whole body was and it is not there.
    pub(super) fn knows_prompts(&self) -> bool {
        self.found.has_prompts || self.scanner.is_done()
    }
}

/// A whole number, also where it is written as `2.0` or `"2"`: vLLM's validation takes those too.
fn whole<T: std::str::FromStr>(scalar: &Scalar<'_>) -> Option<T> {
    let written = match scalar {
        Scalar::Number(written) => written,
        other => other.text()?,
    };
    written.strip_suffix(".0").unwrap_or(written).parse().ok()
}

impl Reader for Found {
    type Place = Place;

    const ROOT: Place = Place::Root;

    fn member(&mut self, object: Place, key: &[u8]) -> Option<Place> {
        let place = match key {
            b"model" => Place::Model,
            b"stream" => Place::Stream,
            b"n" => Place::Choices,
            b"priority" => Place::Priority,
            b"prompt" => Place::Prompt,
            _ => return None,
        };
        (object == Place::Root).then_some(place)
    }

    fn element(&mut self, array: Place) -> Option<Place> {
        (array == Place::Prompt).then_some(Place::PromptItem)
    }

    fn wants_text(&self, place: Place) -> bool {
        matches!(
            place,
            Place::Model | Place::Stream | Place::Choices | Place::Priority
        )
    }

    fn scalar(&mut self, place: Place, scalar: Scalar<'_>) {
        let asked = &mut self.asked;
        match place {
            Place::Model => asked.model = scalar.text().map(Box::from),
            Place::Stream => asked.stream = scalar == Scalar::Bool(true),
            Place::Priority => asked.priority = whole(&scalar),
            Place::Choices => {
                asked.n = whole(&scalar).unwrap_or(1).max(1);
                self.has_choices = true;
            }
            Place::Prompt => {
                asked.prompts = 1;
                self.has_prompts = true;
            }
            // A list of numbers is one prompt in tokens; a list of strings is as many prompts.
            Place::PromptItem if matches!(scalar, Scalar::Number(_)) => asked.prompts = 1,
            Place::PromptItem => asked.prompts = asked.prompts.saturating_add(1),
            Place::Root => {}
        }
    }

    fn begin(&mut self, place: Place, container: Container) {
        match (place, container) {
            (Place::Prompt, Container::Array) => {
                self.asked.prompts = 0;
                self.has_prompts = false;
            }
            (Place::PromptItem, _) => self.asked.prompts = self.asked.prompts.saturating_add(1),
            _ => {}
        }
    }

    fn end(&mut self, place: Place) {
        if place == Place::Prompt {
            self.asked.prompts = self.asked.prompts.max(1);
            self.has_prompts = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> RequestReader {
        let mut reader = RequestReader::new();
        for byte in body.as_bytes() {
            reader.push(Piece::Bytes(std::slice::from_ref(byte)));
        }
        reader
    }

    #[test]
    fn the_members_that_matter_are_found_wherever_they_stand() {
        let body = r#"{"messages":[{"content":"\"model\":\"no\"","n":9}],"priority":-3,"n":2,"stream":true,
            "model":"caf\u00e9 \ud83d\ude00"}"#;
        let reader = read(body);
        let expected = Asked {
            model: Some("café 😀".into()),
            stream: true,
            n: 2,
            prompts: 1,
            priority: Some(-3),
        };
        assert_eq!(reader.asked(), &expected);
        assert!(reader.knows_choices());
    }

    #[test]
    fn prompts_are_counted_in_all_their_spellings() {
        let prompts = |prompt: &str| read(&format!(r#"{{"prompt":{prompt}}}"#)).asked().prompts;
        assert_eq!(prompts(r#""one""#), 1);
        assert_eq!(prompts(r#"["one"]"#), 1);
        assert_eq!(prompts(r#"["one","two"]"#), 2);
        assert_eq!(prompts("[1,2,3]"), 1);
        assert_eq!(prompts("[[1,2,3],[4]]"), 2);
        assert_eq!(prompts("[]"), 1);
    }

    #[test]
    fn the_later_of_two_members_wins_as_in_python() {
        assert_eq!(read(r#"{"n":2,"n":3,"stream":true,"stream":false}"#).asked().n, 3);
        assert_eq!(read(r#"{"n":"4"}"#).asked().n, 4);
        assert_eq!(read(r#"{"n":4.0}"#).asked().n, 4);
        assert_eq!(read(r#"{"n":null}"#).asked().n, 1);
        assert_eq!(read(r#"{"n":0}"#).asked().n, 1);
    }

    #[test]
    fn after_a_hole_nothing_is_guessed() {
        let mut reader = RequestReader::new();
        reader.push(Piece::Bytes(br#"{"model":"m","messages":["#));
        reader.push(Piece::Hole(5));
        reader.push(Piece::Bytes(br#""],"n":7}"#));
        assert_eq!(reader.asked().model.as_deref(), Some("m"));
        assert_eq!(reader.asked().n, 1);
        assert!(!reader.knows_choices());
    }
}
