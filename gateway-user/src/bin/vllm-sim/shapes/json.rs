//! JSON text in Rust's format strings.

use std::fmt::{self, Display, Formatter};

/// A string as a JSON string, quotes included. Only what JSON demands is escaped, as vLLM's encoder does.
pub struct Js<'a>(pub &'a str);

impl Display for Js<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        let mut plain_from = 0;
        for (at, byte) in self.0.bytes().enumerate() {
            if byte >= 0x20 && byte != b'"' && byte != b'\\' {
                continue;
            }
            f.write_str(&self.0[plain_from..at])?;
            plain_from = at + 1;
            match byte {
                b'"' => f.write_str("\\\"")?,
                b'\\' => f.write_str("\\\\")?,
                b'\n' => f.write_str("\\n")?,
                b'\r' => f.write_str("\\r")?,
                b'\t' => f.write_str("\\t")?,
                0x08 => f.write_str("\\b")?,
                0x0c => f.write_str("\\f")?,
                control => write!(f, "\\u{control:04x}")?,
            }
        }
        f.write_str(&self.0[plain_from..])?;
        f.write_str("\"")
    }
}

/// A value, or `null`.
pub struct OrNull<T>(pub Option<T>);

impl<T: Display> Display for OrNull<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("null"),
        }
    }
}

/// Items in brackets.
pub struct List<I>(pub I);

impl<I: Clone + IntoIterator<Item: Display>> Display for List<I> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (index, item) in self.0.clone().into_iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            item.fmt(f)?;
        }
        f.write_str("]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_string_survives_a_round_trip() {
        let all: String = (0u8..128).map(char::from).chain("é漢🙂".chars()).collect();
        let back: String = serde_json::from_str(&Js(&all).to_string()).unwrap();
        assert_eq!(back, all);
    }

    #[test]
    fn lists_and_nulls() {
        assert_eq!(List([1, 2]).to_string(), "[1,2]");
        assert_eq!(List([0u8; 0]).to_string(), "[]");
        assert_eq!(OrNull(Some(Js("a"))).to_string(), "\"a\"");
        assert_eq!(OrNull::<u8>(None).to_string(), "null");
    }
}
