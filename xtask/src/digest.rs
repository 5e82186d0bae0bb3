//! Digests as text.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

/// The SHA-256 of some bytes, in hexadecimal digits.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    text(&Sha256::digest(bytes))
}

/// Enough of it to tell two lists of packages apart.
pub fn short(list: &str) -> String {
    text(&Sha256::digest(list)[..8])
}

/// Bytes in hexadecimal digits.
pub fn text(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_the_known_one_and_its_beginning() {
        let whole = hex("a");
        assert_eq!(
            whole, "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
            "FIPS 180-2"
        );
        assert_eq!(short("a"), whole[..16]);
        assert_ne!(short("a"), short("b"));
    }
}
