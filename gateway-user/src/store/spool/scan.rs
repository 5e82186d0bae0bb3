//! Reads what a dead process or a power cut has left of a segment.

use serde::de::IgnoredAny;
use std::ops::Range;

/// The lines of a segment: those that can be sent, and what is left of others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Rows, each with its line end.
    pub rows: Vec<Range<usize>>,
    /// Pieces that are no rows.
    pub torn: Vec<Range<usize>>,
}

impl Scan {
    /// Reads `bytes`, whose rows begin with `prefix`.
    ///
    /// A process that dies leaves at most one torn piece, at the end. A power cut can leave zeros in place of any page, so that reading
    /// goes on behind what it cannot understand.
    pub fn of(bytes: &[u8], prefix: &[u8]) -> Scan {
        let mut scan = Scan::default();
        let mut at = 0;
        while let Some(skipped) = bytes[at..].iter().position(|byte| *byte != 0) {
            let start = at + skipped;
            let end = memchr::memchr(b'\n', &bytes[start..]).map_or(bytes.len(), |length| start + length + 1);
            let line = &bytes[start..end];
            if is_row(line, prefix) {
                scan.rows.push(start..end);
            } else {
                let kept = line
                    .iter()
                    .rposition(|byte| *byte != 0)
                    .map_or(0, |last| last + 1);
                scan.torn.push(start..start + kept);
            }
            at = end;
        }
        scan
    }

    /// How long the file is when it holds its rows and nothing else before them or between; `None` if it has to be rewritten.
    pub fn whole_until(&self) -> Option<usize> {
        let mut end = 0;
        for row in &self.rows {
            if row.start != end {
                return None;
            }
            end = row.end;
        }
        Some(end)
    }
}

fn is_row(line: &[u8], prefix: &[u8]) -> bool {
    line.starts_with(prefix) && line.ends_with(b"\n") && serde_json::from_slice::<IgnoredAny>(line).is_ok()
}

/// Whether a sealed file is what was sealed, as far as that shows without parsing: pages that a power cut took are zeros, and zeros
/// are in no JSON text; a file that was cut has no line end. Tells the number of rows.
pub fn intact_rows(bytes: &[u8], prefix: &[u8]) -> Option<u64> {
    let whole = bytes.starts_with(prefix) && bytes.ends_with(b"\n") && memchr::memchr(0, bytes).is_none();
    whole.then(|| memchr::memchr_iter(b'\n', bytes).count() as u64)
}

/// The values of `"event_id"` in a file of rows.
pub fn event_ids(bytes: &[u8]) -> impl Iterator<Item = &str> {
    // The gateway itself writes the rows: without spaces, and the id is plain ASCII. No other field can hold these bytes, since a
    // quote inside of a text is escaped.
    const KEY: &[u8] = b"\"event_id\":\"";
    memchr::memmem::find_iter(bytes, KEY).filter_map(|at| {
        let value = &bytes[at + KEY.len()..];
        let end = memchr::memchr(b'"', value)?;
        std::str::from_utf8(&value[..end]).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &[u8] = b"{\"batch\":\"g\",";

    fn check(bytes: &[u8], rows: &[&[u8]], torn: &[&[u8]], whole_until: Option<usize>) {
        let scan = Scan::of(bytes, PREFIX);
        let cut = |ranges: &[Range<usize>]| {
            ranges
                .iter()
                .map(|range| bytes[range.clone()].to_vec())
                .collect::<Vec<_>>()
        };
        assert_eq!(cut(&scan.rows), rows);
        assert_eq!(cut(&scan.torn), torn);
        assert_eq!(scan.whole_until(), whole_until);
    }

    const A: &[u8] = b"{\"batch\":\"g\",\"a\":1}\n";
    const B: &[u8] = b"{\"batch\":\"g\",\"b\":2}\n";

    #[test]
    fn an_unused_tail_is_no_loss() {
        check(&[A, B, &[0; 100]].concat(), &[A, B], &[], Some(A.len() + B.len()));
        check(&[0; 100], &[], &[], Some(0));
        check(b"", &[], &[], Some(0));
    }

    #[test]
    fn a_row_whose_first_byte_is_missing_was_never_there() {
        let uncommitted = [b"\0", &B[1..], &[0; 9]].concat();
        check(&[A, &uncommitted].concat(), &[A], &[&B[1..]], Some(A.len()));
        let half = [b"\0", &B[1..9], &[0; 9]].concat();
        check(&[A, &half].concat(), &[A], &[&B[1..9]], Some(A.len()));
    }

    #[test]
    fn a_lost_page_takes_only_its_own_rows() {
        check(&[A, &[0; 64], B].concat(), &[A, B], &[], None);
        let head = [&A[..7], &[0; 30], B].concat();
        // The line that lost its end runs into the next one, which cannot be told from it any more.
        check(&head, &[], &[&head], Some(0));
        let tail = [&[0; 12], &A[12..], B].concat();
        check(&tail, &[B], &[&A[12..]], None);
    }

    #[test]
    fn a_line_of_another_batch_is_no_row() {
        let other = b"{\"batch\":\"h\",\"a\":1}\n";
        check(other, &[], &[other], Some(0));
        let not_json = b"{\"batch\":\"g\",\"a\":}\n";
        check(not_json, &[], &[not_json], Some(0));
    }

    #[test]
    fn a_sealed_file_shows_its_wounds_without_being_parsed() {
        assert_eq!(intact_rows(&[A, B].concat(), PREFIX), Some(2));
        assert_eq!(intact_rows(&A[..A.len() - 1], PREFIX), None);
        assert_eq!(intact_rows(&[A, &[0; 8], B].concat(), PREFIX), None);
        assert_eq!(intact_rows(&[&[0; 8], B].concat(), PREFIX), None);
        assert_eq!(intact_rows(b"", PREFIX), None);
    }

    #[test]
    fn ids_are_found_where_they_stand_and_not_in_texts() {
        let rows = br#"{"batch":"g","event_id":"gw-1-a","team_id":"\"event_id\":\"x\""}"#;
        assert_eq!(event_ids(rows).collect::<Vec<_>>(), ["gw-1-a"]);
    }
}
