//! The rows of a batch, as its file has them.

use super::Table;
use super::windows::Contents;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;

/// What tells a stored row from all others of its table. Of a segment that is the whole of its sorting key.
pub fn key_sql(table: Table) -> &'static str {
    match table {
        Table::Events => "event_id",
        Table::Segments => "concat(toString(toUnixTimestamp(window_start)), ' ', upstream, ' ', event_id)",
    }
}

/// The file of a batch, and where its rows end.
pub struct Lines {
    table: Table,
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
    upstream: &'r str,
    #[serde(borrow)]
    started_at: Option<&'r RawValue>,
    #[serde(borrow)]
    window_start: Option<&'r RawValue>,
}

impl Row<'_> {
    /// The time that rows of the table are sorted by, microseconds since 1970; 0 when the row does not say.
    fn at_us(&self, table: Table) -> i64 {
        let number = |raw: Option<&RawValue>| raw.and_then(|raw| raw.get().parse().ok()).unwrap_or(0_i64);
        match table {
            Table::Events => number(self.started_at),
            Table::Segments => number(self.window_start).saturating_mul(1_000_000),
        }
    }
}

impl Lines {
    /// The rows of `table` in `text`, one a line.
    pub fn of(table: Table, text: Bytes) -> Lines {
        let ends = memchr::memchr_iter(b'\n', &text).map(|at| at + 1).collect();
        Lines { table, text, ends }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// What tells a row from all others, as [`key_sql`] has it; that of no stored row when it has none, so that such a row counts as missing.
    pub fn key(&self, at: usize) -> Cow<'_, str> {
        let row = self.row(at);
        match self.table {
            Table::Events => row.event_id.into(),
            Table::Segments => {
                let window = row.window_start.map_or("", RawValue::get);
                format!("{window} {} {}", row.upstream, row.event_id).into()
            }
        }
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
            let at = row.at_us(self.table);
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
        let lines = Lines::of(Table::Events, Bytes::from_static(text.as_bytes()));
        assert_eq!((lines.len(), &*lines.key(0), &*lines.key(1)), (3, "a", ""));
        assert_eq!(&lines.only(&[2])[..], b"{\"event_id\":\"c\"}\n");
        assert_eq!(&lines.only(&[0, 1, 2])[..], text.as_bytes());
    }

    #[test]
    fn contents_are_what_windows_hold_and_when_it_began() {
        let text = "{\"event_id\":\"a\",\"outcome\":\"completed\",\"started_at\":7}\n\
                    {\"event_id\":\"b\",\"outcome\":\"gateway_crash\",\"started_at\":3}\n\
                    {\"event_id\":\"c\",\"outcome\":\"aborted\",\"started_at\":5}\n";
        let lines = Lines::of(Table::Events, Bytes::from_static(text.as_bytes()));
        let contents = lines.contents(0..3);
        assert_eq!((contents.from_us, contents.to_us, contents.rolled_up), (3, 7, 2));
        // A row that does not say when is looked for everywhere.
        let unknown = Lines::of(
            Table::Events,
            Bytes::from_static(b"{\"event_id\":\"a\",\"started_at\":\"x\"}\n"),
        );
        assert_eq!((&*unknown.key(0), unknown.contents(0..1).from_us), ("a", 0));
    }

    #[test]
    fn a_segment_is_known_by_its_window_its_upstream_and_its_event() {
        let text = "{\"batch\":\"b\",\"window_start\":30,\"upstream\":\"chat\",\"event_id\":\"a\"}\n\
                    {\"batch\":\"b\",\"window_start\":15,\"upstream\":\"chat\",\"event_id\":\"a\"}\n";
        let lines = Lines::of(Table::Segments, Bytes::from_static(text.as_bytes()));
        assert_eq!((&*lines.key(0), &*lines.key(1)), ("30 chat a", "15 chat a"));
        let contents = lines.contents(0..2);
        assert_eq!((contents.from_us, contents.to_us), (15_000_000, 30_000_000));
    }
}
