//! The rows of a batch, as its file has them.

use super::windows::Contents;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

/// The file of a batch, and where its rows end.
pub struct Lines {
    text: Bytes,
    ends: Vec<usize>,
}

/// What is read of a row; what it does not say, or not as the gateway writes it, is empty.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Row<'r> {
    #[serde(borrow)]
    event_id: &'r str,
    #[serde(borrow)]
    outcome: &'r str,
    #[serde(borrow)]
    started_at: Option<&'r RawValue>,
}

impl Row<'_> {
    /// Microseconds since 1970; 0 when the row does not say.
    fn started_at_us(&self) -> i64 {
        self.started_at
            .and_then(|number| number.get().parse().ok())
            .unwrap_or(0)
    }
}

impl Lines {
    /// The rows in `text`, one a line.
    pub fn of(text: Bytes) -> Lines {
        let ends = memchr::memchr_iter(b'\n', &text).map(|at| at + 1).collect();
        Lines { text, ends }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The event of a row; empty when it has none, so that such a row counts as missing.
    pub fn event_id(&self, at: usize) -> &str {
        self.row(at).event_id
    }

    /// The text of some rows.
    pub fn only(&self, rows: &[usize]) -> Bytes {
        if rows.len() == self.len() {
            return self.text.clone();
        }
        let lines = rows.iter().flat_map(|at| self.line(*at));
        lines.copied().collect::<Vec<u8>>().into()
    }

    /// What `rows` hold that others must know who look for them.
    pub fn contents(&self, rows: impl Iterator<Item = usize>) -> Contents {
        let mut contents = Contents::default();
        let mut span: Option<(i64, i64)> = None;
        for row in rows.map(|at| self.row(at)) {
            let at = row.started_at_us();
            let (from, to) = span.unwrap_or((at, at));
            span = Some((from.min(at), to.max(at)));
            contents.rolled_up += u64::from(!row.event_id.is_empty() && row.outcome != "gateway_crash");
        }
        (contents.from_us, contents.to_us) = span.unwrap_or_default();
        contents
    }

    fn row(&self, at: usize) -> Row<'_> {
        serde_json::from_slice(self.line(at)).unwrap_or_default()
    }

    fn line(&self, at: usize) -> &[u8] {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.text[start..self.ends[at]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_known_by_their_event() {
        let text = "{\"batch\":\"b\",\"event_id\":\"a\"}\n{\"batch\":\"b\"}\n{\"event_id\":\"c\"}\n";
        let lines = Lines::of(Bytes::from_static(text.as_bytes()));
        assert_eq!((lines.len(), lines.event_id(0), lines.event_id(1)), (3, "a", ""));
        assert_eq!(&lines.only(&[2])[..], b"{\"event_id\":\"c\"}\n");
        assert_eq!(&lines.only(&[0, 1, 2])[..], text.as_bytes());
    }

    #[test]
    fn contents_are_what_windows_hold_and_when_it_began() {
        let text = "{\"event_id\":\"a\",\"outcome\":\"completed\",\"started_at\":7}\n\
                    {\"event_id\":\"b\",\"outcome\":\"gateway_crash\",\"started_at\":3}\n\
                    {\"event_id\":\"c\",\"outcome\":\"aborted\",\"started_at\":5}\n";
        let lines = Lines::of(Bytes::from_static(text.as_bytes()));
        let contents = lines.contents(0..3);
        assert_eq!((contents.from_us, contents.to_us, contents.rolled_up), (3, 7, 2));
        // A row that does not say when is looked for everywhere.
        let unknown = Lines::of(Bytes::from_static(b"{\"event_id\":\"a\",\"started_at\":\"x\"}\n"));
        assert_eq!((unknown.event_id(0), unknown.contents(0..1).from_us), ("a", 0));
    }
}
