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
    fn member(&mut self, object: Self::Place, key: &[u8]) -> Option<Self::Place>;

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
                    input = rest;
                    self.structure(*byte, &mut input, reader);
                }
            }
        }
    }

    /// Takes a byte of structure, and with an opening quote the whole string if it is there: most are.
    fn structure<R: Reader<Place = P>>(&mut self, byte: u8, rest: &mut &[u8], reader: &mut R) {
        match (self.state, byte) {
            (State::FirstElement, b']') | (State::FirstKey, b'}') => self.close(byte, reader),
            (State::AfterValue, b']' | b'}') => self.close(byte, reader),
            (State::Value | State::FirstElement, _) => {
                self.enter_value(reader);
                match byte {
                    b'"' => self.begin_string(rest, reader),
                    b'{' => self.open(Container::Object, reader),
                    b'[' => self.open(Container::Array, reader),
                    _ => self.state = State::Broken,
                }
            }
            (State::FirstKey | State::Key, b'"') => self.begin_key(rest, reader),
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

    fn begin_string<R: Reader<Place = P>>(&mut self, rest: &mut &[u8], reader: &mut R) {
        let wants_text = self.place.is_some_and(|place| reader.wants_text(place));
        if let Some(whole) = whole_string(rest) {
            if let Some(place) = self.place {
                let text = if wants_text { as_text(whole) } else { None };
                let empty = whole.is_empty();
                reader.scalar(place, Scalar::String { empty, text });
            }
            self.after_value();
        } else {
            self.keeps_text = wants_text;
            self.state = State::StringText;
        }
    }

    fn begin_key<R: Reader<Place = P>>(&mut self, rest: &mut &[u8], reader: &mut R) {
        let object = self.parent();
        if let Some(key) = whole_string(rest) {
            self.place = object.and_then(|object| reader.member(object, key));
            self.state = State::Colon;
            if let Some(after) = rest.strip_prefix(b":") {
                *rest = after;
                self.state = State::Value;
            }
        } else {
            self.keeps_text = object.is_some();
            self.state = State::KeyText;
        }
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
        self.keep(run);
        self.flush_high_unit();
        let kept = (self.keeps_text && !self.too_long).then_some(&self.kept[..]);
        if self.state == State::KeyText {
            let parent = self.parent();
            self.place = parent
                .zip(kept)
                .and_then(|(object, key)| reader.member(object, key));
            self.state = State::Colon;
        } else {
            if let Some(place) = self.place {
                let (empty, text) = (self.is_empty, kept.and_then(as_text));
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
        match as_text(raw).filter(|_| !self.too_long) {
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

/// The rest of a string up to its closing quote, if that is here and no escape comes first; `input` is moved past the quote.
fn whole_string<'i>(input: &mut &'i [u8]) -> Option<&'i [u8]> {
    let end = string_end(input)?;
    let whole = (input[end] == b'"').then_some(&input[..end])?;
    *input = &input[end + 1..];
    Some(whole)
}

/// The place of the first quote or backslash.
fn string_end(input: &[u8]) -> Option<usize> {
    // Keys and the texts of chunks are shorter than what it takes for the call of a vectorised search to pay.
    const NEAR_WORDS: usize = 2;
    let (words, _) = input.as_chunks::<8>();
    let near = words.len().min(NEAR_WORDS);
    for (word, start) in words[..near].iter().zip((0..).step_by(8)) {
        let word = u64::from_le_bytes(*word);
        let found = lowest_equal(word, b'"') | lowest_equal(word, b'\\');
        if found != 0 {
            return Some(start + found.trailing_zeros() as usize / 8);
        }
    }
    let start = near * 8;
    memchr::memchr2(b'"', b'\\', &input[start..]).map(|at| start + at)
}

/// Marks with its top bit the lowest byte of `word` that equals `byte`; only above that may others be marked that do not. (A byte
/// is zero if subtracting one borrows and its own top bit was not set.)
fn lowest_equal(word: u64, byte: u8) -> u64 {
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    const TOPS: u64 = u64::from_le_bytes([0x80; 8]);
    let differs = word ^ u64::from_le_bytes([byte; 8]);
    differs.wrapping_sub(ONES) & !differs & TOPS
}

fn as_text(raw: &[u8]) -> Option<&str> {
    (raw.len() <= MAX_TEXT_BYTES)
        .then(|| std::str::from_utf8(raw).ok())
        .flatten()
}

/// Whether a byte can stand in a number or a literal.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.')
}

#[cfg(test)]
mod tests;
