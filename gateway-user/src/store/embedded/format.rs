//! Which results may go out in pieces.
//!
//! The engine writes each piece of a stream as a document of its own: a `JSON` result of four blocks would be four objects. So only
//! formats that are rows and nothing else are streamed, and the binary ones with a head, which is taken off all pieces but the first:
//! they are what the Rust client reads with. All others are written whole, by the engine, in its memory.

use super::engine::EngineError;
use bytes::{Buf, Bytes};

/// Formats that are their rows (or, `Native`, their blocks), one after another.
const ROWS: [&str; 14] = [
    "TabSeparated",
    "TSV",
    "TabSeparatedRaw",
    "TSVRaw",
    "CSV",
    "JSONEachRow",
    "JSONLines",
    "NDJSON",
    "JSONCompactEachRow",
    "JSONStringsEachRow",
    "RowBinary",
    "Native",
    "LineAsString",
    "Null",
];

/// Rows behind a head of names and types.
const HEADED: [(&str, usize); 2] = [("RowBinaryWithNames", 1), ("RowBinaryWithNamesAndTypes", 2)];

/// Makes one result of the pieces of a stream.
pub struct Joiner {
    /// Strings for each column in the head; none: there is no head.
    strings: usize,
    head: Option<Bytes>,
}

impl Joiner {
    /// For a result in `format`; `None` when it cannot be joined. ClickHouse takes the names in any case.
    pub fn new(format: &str) -> Option<Joiner> {
        let is = |name: &str| name.eq_ignore_ascii_case(format);
        let headed = HEADED
            .iter()
            .find(|(name, _)| is(name))
            .map(|(_, strings)| *strings);
        let strings = headed.or_else(|| ROWS.iter().any(|name| is(name)).then_some(0))?;
        Some(Joiner { strings, head: None })
    }

    /// What the next piece adds to the result.
    ///
    /// # Errors
    /// When the piece has not the shape that its format has.
    pub fn add(&mut self, mut piece: Bytes) -> Result<Bytes, EngineError> {
        if self.strings == 0 {
            return Ok(piece);
        }
        match &self.head {
            None => {
                let length = head_length(&piece, self.strings).ok_or_else(bad_shape)?;
                self.head = Some(piece.slice(..length));
                Ok(piece)
            }
            Some(head) if piece.starts_with(head) => {
                piece.advance(head.len());
                Ok(piece)
            }
            Some(_) => Err(bad_shape()),
        }
    }
}

fn bad_shape() -> EngineError {
    EngineError::new(
        49,
        "LOGICAL_ERROR",
        "the engine streamed a piece without the head of its format: this version of libchdb is not supported",
    )
}

/// The length of a head: the number of columns, then `strings` strings for each, all lengths as LEB128.
fn head_length(bytes: &[u8], strings: usize) -> Option<usize> {
    let mut at = 0;
    let columns = varint(bytes, &mut at)?;
    for _ in 0..columns.checked_mul(strings)? {
        let length = varint(bytes, &mut at)?;
        at = at.checked_add(length).filter(|end| *end <= bytes.len())?;
    }
    Some(at)
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<usize> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return usize::try_from(value).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_formats_that_can_be_joined_are_streamed() {
        for format in [
            "TabSeparated",
            "jsoneachrow",
            "RowBinaryWithNamesAndTypes",
            "Native",
        ] {
            assert!(Joiner::new(format).is_some(), "{format}");
        }
        for format in ["JSON", "CSVWithNames", "Parquet", "Pretty", "Values", ""] {
            assert!(Joiner::new(format).is_none(), "{format}");
        }
    }

    #[test]
    fn the_head_stays_on_the_first_piece_alone() {
        let long = "x".repeat(200);
        let head = [&b"\x01\xc8\x01"[..], long.as_bytes(), b"\x05UInt8"].concat();
        let piece = |rows: &[u8]| Bytes::from([&head, rows].concat());
        let mut joiner = Joiner::new("RowBinaryWithNamesAndTypes").unwrap();
        assert_eq!(joiner.add(piece(b"\x01\x02")).unwrap(), piece(b"\x01\x02"));
        assert_eq!(joiner.add(piece(b"\x03")).unwrap(), &b"\x03"[..]);
        assert_eq!(joiner.add(Bytes::from_static(b"\x04")).unwrap_err().code, 49);
        let mut joiner = Joiner::new("RowBinaryWithNames").unwrap();
        for bad in [
            &b""[..],
            b"\x01",
            b"\x01\x05ab",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        ] {
            assert!(joiner.add(Bytes::copy_from_slice(bad)).is_err(), "{bad:?}");
        }
    }
}
