//! A push scanner for JSON: bytes go in as they come, values at the places that matter come out.
//!
//! It builds no tree and copies nothing but the rare token that is cut or escaped. A [`Reader`] names the places: it is asked once
//! for each member and element whether it wants it, and what it does not want is passed over at the speed of a search for quotes.
//! One mechanism reads a request, a megabyte of embeddings and a chunk of two hundred bytes alike.
//!
//! The scanner follows the grammar of RFC 8259 for structure (brackets, commas, colons, strings) and stops for good at the first
//! breach ([`Scanner::is_broken`]). It is deliberately lenient inside tokens that nobody reads: any run of letters, digits, `+`,
//! `-` and `.` passes as a scalar (Python writes `NaN`), and control characters may stand in strings. Keys that come twice are
//! reported twice: the later one wins, as in Python.

/// Deepest nesting. Python's own reader gives up within an order of magnitude; nothing that matters lies deeper than 5.
pub const MAX_DEPTH: u8 = 128;

/// Longest text, key or number that is handed out, in bytes. Model names and the like are far shorter; a longer text is
/// reported as a string without text.
pub const MAX_TEXT_BYTES: usize = 256;

/// Levels whose places are remembered; below them nothing is wanted by any reader.
const PLACED_DEPTH: usize = 8;

/// What can hold other values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// `{…}`
    Object,
    /// `[…]`
    Array,
}

/// A value that holds no others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar<'v> {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number as it is written.
    Number(&'v str),
    /// A string.
    String {
        /// Whether it is `""`.
        empty: bool,
        /// Its text without escapes, when the reader wants it ([`Reader::wants_text`]), it fits [`MAX_TEXT_BYTES`] and is UTF-8.
        text: Option<&'v str>,
    },
}

impl Scalar<'_> {
    /// The text of a string.
    pub fn text(&self) -> Option<&str> {
        match self {
            Scalar::String { text, .. } => *text,
            _ => None,
        }
    }

    /// Whether this is a string that is not `""`.
    pub fn is_some_text(&self) -> bool {
        matches!(self, Scalar::String { empty: false, .. })
    }

    /// The number as a count: a plain decimal integer.
    pub fn count(&self) -> Option<u64> {
        match self {
            Scalar::Number(digits) => digits.parse().ok(),
            _ => None,
        }
    }
}

/// Says which places of a document matter, and takes what is found there.
pub trait Reader {
    /// A place in the document.
    type Place: Copy;

    /// The place of the whole document.
    const ROOT: Self::Place;

    /// The place of an object's member, or `None` if it does not matter.
    fn member(&mut self, object: Self::Place, key: &str) -> Option<Self::Place>;

    /// The place of an array's element, or `None` if it does not matter.
    fn element(&mut self, array: Self::Place) -> Option<Self::Place>;

    /// Whether the text of a string at this place is wanted, or only whether it is empty.
    fn wants_text(&self, place: Self::Place) -> bool;

    /// A scalar stands at this place.
    fn scalar(&mut self, place: Self::Place, scalar: Scalar<'_>);

    /// An object or an array begins at this place.
    fn begin(&mut self, place: Self::Place, container: Container);

    /// The object or array at this place has ended.
    fn end(&mut self, place: Self::Place);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Value,
    FirstElement,
    FirstKey,
    Key,
    Colon,
    AfterValue,
    KeyText,
    StringText,
    Word,
    Done,
    Broken,
}

/// Where a string stands within an escape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    Backslash,
    Unicode { digits: u8, unit: u16 },
}

/// Scans one document; [`Scanner::reset`] makes it ready for the next.
#[derive(Clone, Debug)]
pub struct Scanner<P> {
    state: State,
    depth: u8,
    /// One bit for each level, the innermost in the lowest place: 1 for an object.
    objects: u128,
    places: [Option<P>; PLACED_DEPTH],
    /// The place of the value that is being read or comes next.
    place: Option<P>,
    escape: Escape,
    /// First half of a surrogate pair whose second half is awaited; 0 when there is none.
    high_unit: u16,
    keeps_text: bool,
    is_empty: bool,
    too_long: bool,
    /// Whether `kept` holds the token so far; otherwise the token lies whole in the input.
    is_cut: bool,
    kept: Vec<u8>,
}

impl<P: Copy> Scanner<P> {
    /// A scanner before the first byte.
    pub fn new() -> Scanner<P> {
        Scanner {
            state: State::Value,
            depth: 0,
            objects: 0,
            places: [None; PLACED_DEPTH],
            place: None,
            escape: Escape::None,
            high_unit: 0,
            keeps_text: false,
            is_empty: true,
            too_long: false,
            is_cut: false,
            kept: Vec::new(),
        }
    }

    /// Makes ready for another document.
    pub fn reset(&mut self) {
        self.state = State::Value;
        self.depth = 0;
        self.clear_token();
    }

    /// Whether the document has ended as it should.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether the scanner has stopped at something that is not JSON.
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Stops for good, since bytes are missing.
    pub fn stop(&mut self) {
        self.state = State::Broken;
    }

    /// Reads on.
    pub fn push<R: Reader<Place = P>>(&mut self, mut input: &[u8], reader: &mut R) {
        while let Some((byte, rest)) = input.split_first() {
            match self.state {
                State::StringText | State::KeyText => self.string(&mut input, reader),
                State::Word => self.word(&mut input, reader),
                State::Broken => return,
                _ if matches!(byte, b' ' | b'\n' | b'\r' | b'\t') => input = rest,
                State::Value | State::FirstElement if is_word(*byte) => {
                    self.enter_value(reader);
                    self.state = State::Word;
                }
                _ => {
                    self.structure(*byte, reader);
                    input = rest;
                }
            }
        }
    }

    fn structure<R: Reader<Place = P>>(&mut self, byte: u8, reader: &mut R) {
        match (self.state, byte) {
            (State::FirstElement, b']') | (State::FirstKey, b'}') => self.close(byte, reader),
            (State::AfterValue, b']' | b'}') => self.close(byte, reader),
            (State::Value | State::FirstElement, _) => {
                self.enter_value(reader);
                match byte {
                    b'"' => self.begin_string(reader),
                    b'{' => self.open(Container::Object, reader),
                    b'[' => self.open(Container::Array, reader),
                    _ => self.state = State::Broken,
                }
            }
            (State::FirstKey | State::Key, b'"') => {
                self.keeps_text = self.parent().is_some();
                self.state = State::KeyText;
            }
            (State::Colon, b':') => self.state = State::Value,
            (State::AfterValue, b',') if self.objects & 1 == 1 => self.state = State::Key,
            (State::AfterValue, b',') => {
                self.place = self.parent().and_then(|array| reader.element(array));
                self.state = State::Value;
            }
            _ => self.state = State::Broken,
        }
    }

    /// Settles the place of a value whose comma or key did not do so already: the root, or the first element of an array.
    fn enter_value<R: Reader<Place = P>>(&mut self, reader: &mut R) {
        if self.depth == 0 {
            self.place = Some(R::ROOT);
        } else if self.state == State::FirstElement {
            self.place = self.parent().and_then(|array| reader.element(array));
        }
    }

    fn parent(&self) -> Option<P> {
        let level = usize::from(self.depth).checked_sub(1)?;
        self.places.get(level).copied().flatten()
    }

    fn open<R: Reader<Place = P>>(&mut self, container: Container, reader: &mut R) {
        if self.depth == MAX_DEPTH {
            self.state = State::Broken;
            return;
        }
        if let Some(slot) = self.places.get_mut(usize::from(self.depth)) {
            *slot = self.place;
            if let Some(place) = self.place {
                reader.begin(place, container);
            }
        }
        let is_object = container == Container::Object;
        self.depth += 1;
        self.objects = self.objects << 1 | u128::from(is_object);
        self.state = if is_object {
            State::FirstKey
        } else {
            State::FirstElement
        };
    }

    fn close<R: Reader<Place = P>>(&mut self, byte: u8, reader: &mut R) {
        if (byte == b'}') != (self.objects & 1 == 1) {
            self.state = State::Broken;
            return;
        }
        if let Some(place) = self.parent() {
            reader.end(place);
        }
        self.depth -= 1;
        self.objects >>= 1;
        self.after_value();
    }

    fn after_value(&mut self) {
        self.state = if self.depth == 0 {
            State::Done
        } else {
            State::AfterValue
        };
    }

    fn begin_string<R: Reader<Place = P>>(&mut self, reader: &R) {
        self.keeps_text = self.place.is_some_and(|place| reader.wants_text(place));
        self.state = State::StringText;
    }

    /// Reads within a string, up to its end if that is there.
    fn string<R: Reader<Place = P>>(&mut self, input: &mut &[u8], reader: &mut R) {
        if self.escape != Escape::None {
            self.escaped(input);
            return;
        }
        let end = memchr::memchr2(b'"', b'\\', input);
        let run = &input[..end.unwrap_or(input.len())];
        self.is_empty &= run.is_empty();
        let Some(end) = end else {
            self.keep(run);
            *input = &[];
            return;
        };
        let is_escape = input[end] == b'\\';
        *input = &input[end + 1..];
        if is_escape {
            self.keep(run);
            self.is_empty = false;
            self.escape = Escape::Backslash;
        } else {
            self.end_string(run, reader);
        }
    }

    fn end_string<R: Reader<Place = P>>(&mut self, run: &[u8], reader: &mut R) {
        if self.is_cut {
            self.keep(run);
            self.flush_high_unit();
        }
        let raw = if self.is_cut { &self.kept[..] } else { run };
        let fits = self.keeps_text && !self.too_long && raw.len() <= MAX_TEXT_BYTES;
        let text = fits.then(|| std::str::from_utf8(raw).ok()).flatten();
        if self.state == State::KeyText {
            let parent = self.parent();
            self.place = parent
                .zip(text)
                .and_then(|(object, key)| reader.member(object, key));
            self.state = State::Colon;
        } else {
            if let Some(place) = self.place {
                let empty = self.is_empty;
                reader.scalar(place, Scalar::String { empty, text });
            }
            self.after_value();
        }
        self.clear_token();
    }

    /// Takes the bytes of an escape, one at a time: they are rare where text is kept.
    fn escaped(&mut self, input: &mut &[u8]) {
        let Some((byte, rest)) = input.split_first() else {
            return;
        };
        *input = rest;
        self.escape = match (self.escape, byte) {
            (Escape::Unicode { digits, unit }, _) => {
                let Some(digit) = (*byte as char).to_digit(16) else {
                    self.state = State::Broken;
                    return;
                };
                let unit = unit << 4 | digit as u16;
                if digits == 3 {
                    self.keep_unit(unit);
                    Escape::None
                } else {
                    let digits = digits + 1;
                    Escape::Unicode { digits, unit }
                }
            }
            (_, b'u') => Escape::Unicode { digits: 0, unit: 0 },
            (_, byte) => {
                let plain = match byte {
                    b'"' | b'\\' | b'/' => *byte,
                    b'b' => 8,
                    b'f' => 12,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    _ => {
                        self.state = State::Broken;
                        return;
                    }
                };
                self.keep(&[plain]);
                Escape::None
            }
        };
    }

    /// Keeps a UTF-16 unit of a `\u` escape. Half a pair becomes the replacement character, since no `str` can hold it.
    fn keep_unit(&mut self, unit: u16) {
        let is_low = matches!(unit, 0xDC00..=0xDFFF);
        if self.high_unit == 0 || !is_low {
            self.flush_high_unit();
        }
        if matches!(unit, 0xD800..=0xDBFF) {
            self.high_unit = unit;
            return;
        }
        let code = match std::mem::take(&mut self.high_unit) {
            0 => u32::from(unit),
            high => 0x10000 + (u32::from(high - 0xD800) << 10) + u32::from(unit - 0xDC00),
        };
        let decoded = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
        self.append(decoded.encode_utf8(&mut [0; 4]).as_bytes());
    }

    fn flush_high_unit(&mut self) {
        if std::mem::take(&mut self.high_unit) != 0 {
            let lone = char::REPLACEMENT_CHARACTER;
            self.append(lone.encode_utf8(&mut [0; 4]).as_bytes());
        }
    }

    fn keep(&mut self, run: &[u8]) {
        self.is_cut = true;
        if !run.is_empty() {
            self.flush_high_unit();
            self.append(run);
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        if !self.keeps_text || self.too_long {
            return;
        }
        if self.kept.len() + bytes.len() > MAX_TEXT_BYTES {
            self.too_long = true;
        } else {
            self.kept.extend_from_slice(bytes);
        }
    }

    fn clear_token(&mut self) {
        self.escape = Escape::None;
        self.high_unit = 0;
        self.keeps_text = false;
        self.is_empty = true;
        self.too_long = false;
        self.is_cut = false;
        self.kept.clear();
    }

    /// Reads within a number or a literal. Only the byte after it tells its end.
    fn word<R: Reader<Place = P>>(&mut self, input: &mut &[u8], reader: &mut R) {
        let len = input
            .iter()
            .position(|byte| !is_word(*byte))
            .unwrap_or(input.len());
        let (run, rest) = input.split_at(len);
        *input = rest;
        let Some(place) = self.place else {
            if !rest.is_empty() {
                self.after_value();
            }
            return;
        };
        self.keeps_text = true;
        if rest.is_empty() || self.is_cut {
            self.keep(run);
        }
        if rest.is_empty() {
            return;
        }
        let raw = if self.is_cut { &self.kept[..] } else { run };
        let fits = !self.too_long && raw.len() <= MAX_TEXT_BYTES;
        match fits.then(|| std::str::from_utf8(raw).ok()).flatten() {
            Some("null") => reader.scalar(place, Scalar::Null),
            Some("true") => reader.scalar(place, Scalar::Bool(true)),
            Some("false") => reader.scalar(place, Scalar::Bool(false)),
            Some(number) if number.as_bytes()[0] == b'-' || number.as_bytes()[0].is_ascii_digit() => {
                reader.scalar(place, Scalar::Number(number));
            }
            _ => {}
        }
        self.clear_token();
        self.after_value();
    }
}

impl<P: Copy> Default for Scanner<P> {
    fn default() -> Scanner<P> {
        Scanner::new()
    }
}

/// Whether a byte can stand in a number or a literal.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    /// Wants everything to a depth of a few levels, and writes down what it is told.
    #[derive(Default)]
    struct Everything(Vec<String>);

    impl Reader for Everything {
        type Place = u8;

        const ROOT: u8 = 0;

        fn member(&mut self, object: u8, key: &str) -> Option<u8> {
            self.0.push(format!("{object} {key:?}"));
            (object < 5).then_some(object + 1)
        }

        fn element(&mut self, array: u8) -> Option<u8> {
            self.0.push(format!("{array} element"));
            (array < 5).then_some(array + 1)
        }

        fn wants_text(&self, _place: u8) -> bool {
            true
        }

        fn scalar(&mut self, place: u8, scalar: Scalar<'_>) {
            let number = |text: &str| {
                serde_json::from_str::<Value>(text)
                    .map_or_else(|_| text.to_owned(), |number| number.to_string())
            };
            self.0.push(match scalar {
                Scalar::Null => format!("{place} null"),
                Scalar::Bool(yes) => format!("{place} {yes}"),
                Scalar::Number(text) => format!("{place} {}", number(text)),
                Scalar::String { empty, text } => format!("{place} {text:?} {empty}"),
            });
        }

        fn begin(&mut self, place: u8, container: Container) {
            self.0.push(format!("{place} begin {container:?}"));
        }

        fn end(&mut self, place: u8) {
            self.0.push(format!("{place} end"));
        }
    }

    /// What a walk over the tree would tell.
    fn walk(place: u8, value: &Value, told: &mut Everything) {
        match value {
            Value::Object(members) => {
                told.begin(place, Container::Object);
                for (key, value) in members {
                    if let Some(below) = told.member(place, key) {
                        walk(below, value, told);
                    }
                }
                told.end(place);
            }
            Value::Array(elements) => {
                told.begin(place, Container::Array);
                for value in elements {
                    if let Some(below) = told.element(place) {
                        walk(below, value, told);
                    }
                }
                told.end(place);
            }
            Value::String(text) => {
                let (empty, text) = (
                    text.is_empty(),
                    (text.len() <= MAX_TEXT_BYTES).then_some(&text[..]),
                );
                told.scalar(place, Scalar::String { empty, text });
            }
            Value::Number(number) => told.scalar(place, Scalar::Number(&number.to_string())),
            Value::Bool(yes) => told.scalar(place, Scalar::Bool(*yes)),
            Value::Null => told.scalar(place, Scalar::Null),
        }
    }

    fn scan(pieces: &[&[u8]]) -> (Scanner<u8>, Vec<String>) {
        let (mut scanner, mut told) = (Scanner::new(), Everything::default());
        for piece in pieces {
            scanner.push(piece, &mut told);
        }
        (scanner, told.0)
    }

    /// A document with values of every kind, nested a few levels.
    fn documents() -> impl Strategy<Value = Value> {
        let text = prop_oneof![
            any::<String>(),
            "[a-z]{200,300}",
            Just("\"\\/\u{8}\u{0}😀".to_owned())
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        let tree = leaf.prop_recursive(7, 60, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        });
        prop::collection::vec(tree, 0..4).prop_map(Value::from)
    }

    /// Writes everything that is not ASCII as `\u` escapes, as Python's `json.dumps` does.
    fn escaped(text: &str) -> String {
        let mut units = [0; 2];
        let escape = |c: char| match c {
            ' '..='~' => c.to_string(),
            c => c
                .encode_utf16(&mut units)
                .iter()
                .map(|unit| format!("\\u{unit:04x}"))
                .collect(),
        };
        text.chars().map(escape).collect()
    }

    #[test]
    fn broken_documents_stop_the_scanner() {
        for text in [
            "{]",
            "[}",
            "{\"a\" 1}",
            "{\"a\":}",
            "{,}",
            "[1 2]",
            "[1,,2]",
            "{1:2}",
            "{} {}",
            "{}x",
            "[\"\\x\"]",
            "[\"\\u12g4\"]",
            "}",
            ":",
            ",",
            "{\"a\":1,}",
        ] {
            assert!(scan(&[text.as_bytes()]).0.is_broken(), "{text}");
        }
        for text in ["", "{", "[1", "[\"a", "{\"a\":"] {
            let (scanner, _) = scan(&[text.as_bytes()]);
            assert!(!scanner.is_broken() && !scanner.is_done(), "{text}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| scan(&[&vec![b'['; depth]]).0.is_broken();
        assert!(!nested(usize::from(MAX_DEPTH)));
        assert!(nested(usize::from(MAX_DEPTH) + 1));
    }

    #[test]
    fn half_a_surrogate_pair_becomes_a_replacement() {
        let text = |json: &str| scan(&[json.as_bytes()]).1[2].clone();
        assert_eq!(text(r#"["\ud83d\ude00"]"#), "1 Some(\"😀\") false");
        assert_eq!(text(r#"["\ud83dx"]"#), "1 Some(\"\u{fffd}x\") false");
        assert_eq!(text(r#"["\ud83d\ud83d\ude00"]"#), "1 Some(\"\u{fffd}😀\") false");
        assert_eq!(text(r#"["\ude00\ud83d"]"#), "1 Some(\"\u{fffd}\u{fffd}\") false");
        assert_eq!(text(r#"["\ud83d\n"]"#), "1 Some(\"\u{fffd}\\n\") false");
        assert_eq!(text(r#"["\u0000"]"#), "1 Some(\"\\0\") false");
    }

    #[test]
    fn a_long_text_is_a_string_without_text() {
        let json = format!("[\"{}\"]", "a".repeat(MAX_TEXT_BYTES + 1));
        assert_eq!(scan(&[json.as_bytes()]).1[2], "1 None false");
        assert_eq!(
            scan(&[&json.as_bytes()[..9], &json.as_bytes()[9..]]).1[2],
            "1 None false"
        );
    }

    proptest! {
        #[test]
        fn it_finds_what_a_tree_holds(document in documents(), cuts in prop::collection::vec(1usize..20, 0..60)) {
            let plain = document.to_string();
            let mut expected = Everything::default();
            walk(0, &document, &mut expected);
            for text in [escaped(&plain), plain, serde_json::to_string_pretty(&document).unwrap()] {
                let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
                for cut in &cuts {
                    let (piece, after) = rest.split_at((*cut).min(rest.len()));
                    pieces.push(piece);
                    rest = after;
                }
                pieces.push(rest);
                let (scanner, told) = scan(&pieces);
                prop_assert!(scanner.is_done());
                prop_assert_eq!(&told, &expected.0);
            }
        }

        #[test]
        fn no_input_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            scan(&[&bytes]);
        }

        #[test]
        fn nothing_that_looks_like_json_makes_it_panic(text in "[\\[\\]{}:,\"\\\\u0-9a-f \\-]{0,80}") {
            let (scanner, _) = scan(&[text.as_bytes()]);
            if serde_json::from_str::<Value>(&text).is_ok_and(|value| value.is_array() || value.is_object()) {
                prop_assert!(scanner.is_done());
            }
        }
    }
}
