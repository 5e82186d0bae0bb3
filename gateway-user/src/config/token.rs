//! Tokens of the admin port: known by their digest alone, so that the config holds nothing that opens anything.

use std::{fmt, str::FromStr};

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::values::{MASK, ValueError};
use crate::identity::{TeamId, client_team};

/// The SHA-256 of a token. `Debug` and `Serialize` show [`MASK`]: whoever reads a log could try weak tokens against it.
#[derive(Clone, Copy)]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    /// That of a token.
    pub fn of(token: &[u8]) -> TokenDigest {
        TokenDigest(Sha256::digest(token).into())
    }
}

/// Takes the same time whatever the two are.
impl PartialEq for TokenDigest {
    fn eq(&self, other: &TokenDigest) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for TokenDigest {}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for TokenDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

impl FromStr for TokenDigest {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<TokenDigest, ValueError> {
        let is_hex = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let byte = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok();
        let mut digest = [0; 32];
        for (at, place) in digest.iter_mut().enumerate().filter(|_| is_hex) {
            *place = byte(at).unwrap_or_default();
        }
        if is_hex {
            Ok(TokenDigest(digest))
        } else {
            Err(ValueError(
                "make it of the token, without a line end: printf %s \"$TOKEN\" | sha256sum".into(),
            ))
        }
    }
}

/// What the holder of a token may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenScope {
    /// Everything.
    Admin,
    /// What one team has done.
    Team(TeamId),
}

impl fmt::Display for TokenScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenScope::Admin => f.write_str("admin"),
            TokenScope::Team(team) => write!(f, "team:{team}"),
        }
    }
}

impl Serialize for TokenScope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for TokenScope {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<TokenScope, ValueError> {
        match text.strip_prefix("team:") {
            Some(team) => client_team(team.as_bytes())
                .map(TokenScope::Team)
                .map_err(|error| ValueError(format!("the team's name: {error}"))),
            None if text == "admin" => Ok(TokenScope::Admin),
            None => Err(ValueError("no other scope is understood".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_digest_is_read_in_either_case_and_shown_in_none() {
        let digest: TokenDigest = ABC.parse().unwrap();
        assert_eq!(digest, TokenDigest::of(b"abc"), "FIPS 180-2, appendix B.1");
        assert_eq!(ABC.to_uppercase().parse(), Ok(digest));
        assert_ne!(digest, TokenDigest::of(b"abd"));
        assert_eq!(format!("{digest:?}"), MASK);
        assert_eq!(serde_json::to_string(&digest).unwrap(), "\"***\"");
        for text in ["", "abc", &ABC[1..], &ABC.replace('b', "ü"), &format!("{ABC}0")] {
            let message = text.parse::<TokenDigest>().unwrap_err().to_string();
            assert!(message.contains("sha256sum"), "{message}");
        }
    }

    #[test]
    fn a_scope_is_everything_or_one_team() {
        for text in ["admin", "team:search", "team:team:x"] {
            assert_eq!(text.parse::<TokenScope>().unwrap().to_string(), text);
        }
        for text in ["", "Admin", "team:", "team:a b", "team:__other__", "search"] {
            assert!(text.parse::<TokenScope>().is_err(), "{text}");
        }
    }
}
