//! Server-sent events, as the HTML standard parses them (section 9.2.6), in any cut.
//!
//! [`EventReader`] walks over the bytes of a stream and hands out runs of `data`, without copying, then the end of each event. Lines
//! end in LF, CRLF or CR. Comments and fields other than `data` are passed over: vLLM repeats the event's name within its data.

/// What comes next in a stream of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'b> {
    /// A run of an event's data. Lines of one event are joined by `\n`, as the standard says.
    Data(&'b [u8]),
    /// A blank line ended an event that had data.
    Event {
        /// Whether the data was `[DONE]`, by which OpenAI's streams end.
        is_done_marker: bool,
    },
    /// All input is consumed.
    More,
}

const DATA_FIELD: &[u8] = b"data";
const DONE_MARKER: &[u8] = b"[DONE]";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// So many bytes of the line agree with `data`.
    Name(u8),
    /// After `data:`, where one space does not count.
    Space,
    Data,
    /// A comment or another field.
    Other,
}

/// Finds the data of events.
#[derive(Clone, Debug)]
pub struct EventReader {
    line: Line,
    after_cr: bool,
    has_data: bool,
    /// How many bytes of the data agree with the done marker; `None` once one does not.
    marker_bytes: Option<u8>,
    /// Bytes of this event were lost: it is passed over.
    is_damaged: bool,
}

impl EventReader {
    /// A reader at the start of a stream.
    pub fn new() -> EventReader {
        EventReader {
            line: Line::Name(0),
            after_cr: false,
            has_data: false,
            marker_bytes: Some(0),
            is_damaged: false,
        }
    }

    /// The next step in `input`, which is moved past what was read.
    pub fn next<'b>(&mut self, input: &mut &'b [u8]) -> Step<'b> {
        while let Some((byte, rest)) = input.split_first() {
            if std::mem::take(&mut self.after_cr) && *byte == b'\n' {
                *input = rest;
                continue;
            }
            let step = match self.line {
                Line::Data => self.data(input),
                Line::Other => {
                    *input = &input[line_len(input)..];
                    self.end_line(input)
                }
                Line::Space => {
                    if *byte == b' ' {
                        *input = rest;
                    }
                    self.line = Line::Data;
                    self.begin_data()
                }
                Line::Name(matched) => self.name(matched, *byte, input),
            };
            if let Some(step) = step {
                return step;
            }
        }
        Step::More
    }

    /// Takes note that bytes are missing: the event at hand is passed over, up to the next blank line.
    pub fn skip_damaged(&mut self) {
        self.is_damaged = true;
        self.line = Line::Other;
    }

    /// Whether an event has begun that no blank line has ended yet, so that its data may or may not be whole.
    pub fn has_unfinished_event(&self) -> bool {
        self.has_data && !self.is_damaged
    }

    fn name<'b>(&mut self, matched: u8, byte: u8, input: &mut &'b [u8]) -> Option<Step<'b>> {
        let at = usize::from(matched);
        match byte {
            b'\n' | b'\r' => {
                // A line `data` without a colon is a data field too, an empty one.
                let is_blank = at == 0;
                let is_data = at == DATA_FIELD.len();
                let step = if is_data { self.begin_data() } else { None };
                if step.is_some() {
                    self.line = Line::Data;
                    return step;
                }
                self.end_of(input);
                return if is_blank { self.end_event() } else { None };
            }
            b':' if at == DATA_FIELD.len() => self.line = Line::Space,
            _ if DATA_FIELD.get(at) == Some(&byte) => self.line = Line::Name(matched + 1),
            _ => self.line = Line::Other,
        }
        *input = &input[1..];
        None
    }

    fn begin_data<'b>(&mut self) -> Option<Step<'b>> {
        let is_further_line = std::mem::replace(&mut self.has_data, true);
        (is_further_line && !self.is_damaged).then(|| {
            self.marker_bytes = None;
            Step::Data(b"\n")
        })
    }

    fn data<'b>(&mut self, input: &mut &'b [u8]) -> Option<Step<'b>> {
        let (run, rest) = input.split_at(line_len(input));
        *input = rest;
        if run.is_empty() {
            return self.end_line(input);
        }
        self.match_marker(run);
        (!self.is_damaged).then_some(Step::Data(run))
    }

    fn match_marker(&mut self, run: &[u8]) {
        self.marker_bytes = self.marker_bytes.and_then(|matched| {
            let expected = &DONE_MARKER[usize::from(matched)..];
            expected.starts_with(run).then(|| matched + run.len() as u8)
        });
    }

    /// Ends a line that was not blank, if its end has come.
    fn end_line<'b>(&mut self, input: &mut &[u8]) -> Option<Step<'b>> {
        if !input.is_empty() {
            self.end_of(input);
        }
        None
    }

    /// Consumes the first byte of a line's end.
    fn end_of(&mut self, input: &mut &[u8]) {
        self.after_cr = input[0] == b'\r';
        self.line = Line::Name(0);
        *input = &input[1..];
    }

    fn end_event<'b>(&mut self) -> Option<Step<'b>> {
        let is_damaged = std::mem::take(&mut self.is_damaged);
        let has_data = std::mem::take(&mut self.has_data);
        let marker_bytes = self.marker_bytes.replace(0);
        let is_done_marker = marker_bytes.map(usize::from) == Some(DONE_MARKER.len());
        (has_data && !is_damaged).then_some(Step::Event { is_done_marker })
    }
}

impl Default for EventReader {
    fn default() -> EventReader {
        EventReader::new()
    }
}

fn line_len(input: &[u8]) -> usize {
    memchr::memchr2(b'\n', b'\r', input).unwrap_or(input.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(pieces: &[&[u8]]) -> (Vec<(String, bool)>, EventReader) {
        let (mut reader, mut events, mut data) = (EventReader::new(), Vec::new(), Vec::new());
        for piece in pieces {
            let mut input = *piece;
            loop {
                match reader.next(&mut input) {
                    Step::Data(run) => data.extend_from_slice(run),
                    Step::Event { is_done_marker } => {
                        let text = String::from_utf8_lossy(&std::mem::take(&mut data)).into_owned();
                        events.push((text, is_done_marker));
                    }
                    Step::More => break,
                }
            }
        }
        (events, reader)
    }

    fn data(text: &str) -> Vec<String> {
        read(&[text.as_bytes()])
            .0
            .into_iter()
            .map(|(data, _)| data)
            .collect()
    }

    /// What the standard's own steps give, on a whole buffer.
    fn by_the_standard(text: &str) -> Vec<String> {
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let (mut events, mut data) = (Vec::new(), Vec::new());
        for line in text
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
        {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            if line.is_empty() {
                if !data.is_empty() {
                    events.push(std::mem::take(&mut data).join("\n"));
                }
            } else if name == "data" {
                data.push(value.strip_prefix(' ').unwrap_or(value));
            }
        }
        events
    }

    #[test]
    fn lines_end_in_any_of_three_ways() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["event: x", "data: a", "data:b", "", ": note", "data", "id: 7", ""].join(end) + end;
            assert_eq!(data(&text), ["a\nb", ""], "{end:?}");
        }
    }

    #[test]
    fn names_must_fit_and_one_space_goes() {
        assert_eq!(data("dat: a\ndatax: b\nDATA: c\n data: d\n\n"), [""; 0]);
        assert_eq!(data("data:  a\n\n"), [" a"]);
        assert_eq!(data(":data: a\n\n\n\n"), [""; 0]);
    }

    #[test]
    fn the_end_marker_is_recognised_only_alone() {
        let marked = |text: &str| read(&[text.as_bytes()]).0.iter().any(|(_, is_done)| *is_done);
        assert!(marked("data: [DONE]\n\n"));
        assert!(marked("data:[DONE]\r\n\r\n"));
        assert!(!marked("data: [DONE] \n\n"));
        assert!(!marked("data: [DON\n\n"));
        assert!(!marked("data: [DONE]\ndata: x\n\n"));
        assert!(!marked("data: x\ndata: [DONE]\n\n"));
        assert!(
            marked("data: x\n\ndata: [DONE]\n\n"),
            "each event is looked at anew"
        );
    }

    #[test]
    fn what_no_blank_line_ends_is_no_event_yet() {
        let (events, reader) = read(&[b"data: a\n"]);
        assert!(events.is_empty() && reader.has_unfinished_event());
        assert!(!read(&[b"data: a\n\n: note\n"]).1.has_unfinished_event());
    }

    #[test]
    fn a_damaged_event_is_passed_over() {
        let mut reader = EventReader::new();
        let mut input = &b"data: a"[..];
        while reader.next(&mut input) != Step::More {}
        reader.skip_damaged();
        assert!(!reader.has_unfinished_event());
        let mut input = &b"z\ndata: b\n\ndata: c\n\n"[..];
        assert_eq!(reader.next(&mut input), Step::Data(b"c"));
        assert_eq!(
            reader.next(&mut input),
            Step::Event {
                is_done_marker: false
            }
        );
    }

    proptest! {
        #[test]
        fn any_cut_gives_what_the_standard_gives(
            text in "(data|event|:|d| |\r|\n|\r\n|\n\n|: |data: |[a-z\\[\\]]{1,9}){0,40}",
            cuts in prop::collection::vec(1usize..6, 0..100),
        ) {
            let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let events: Vec<String> = read(&pieces).0.into_iter().map(|(data, _)| data).collect();
            prop_assert_eq!(events, by_the_standard(&text));
        }

        #[test]
        fn no_input_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            read(&[&bytes]);
        }
    }
}
