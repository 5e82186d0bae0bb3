//! How each type of value is read from text: the same way from the file and from the environment.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::{
    error::suggest,
    tap::CgroupChoice,
    token::{TokenDigest, TokenScope},
    units::{ByteSize, UnitError, parse_duration},
    values::{HeaderName, MASK, Name, Secret, StoreUrl, UpstreamUrl, ValueError},
    words::{
        AtLimit, BudgetPeriod, Capture, Fsync, IdleTo, Inject, LimitMode, LogFormat, LogLevel,
        OnUninspectable, RuntimeKind, Serves, WhenFull,
    },
    yaml::Scalar,
};
use crate::identity::{TeamId, client_team};
use crate::ledger::{Micros, Millionths, NanoUsd};

/// A value that one key of the file or one environment variable holds.
pub(super) trait Setting: Sized {
    /// What a message says was expected.
    fn expected() -> String;

    /// Reads the value from text, whether that came from the file or from the environment; the error says why not.
    fn from_text(text: &str) -> Result<Self, String>;

    /// Reads the value from the file. What YAML took for a number or a truth value is no text.
    fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
        match scalar {
            Scalar::Text(text) => Self::from_text(text),
            _ => Err("if it is meant as text, put it in quotes".to_owned()),
        }
    }

    /// Whether a message may quote the text.
    fn may_be_shown(_text: &str) -> bool {
        true
    }
}

impl<T: Setting> Setting for Option<T> {
    fn expected() -> String {
        T::expected()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        T::from_text(text).map(Some)
    }

    fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
        T::from_scalar(scalar).map(Some)
    }

    fn may_be_shown(text: &str) -> bool {
        T::may_be_shown(text)
    }
}

impl Setting for bool {
    fn expected() -> String {
        "true or false".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "no other word is understood".to_owned())
    }

    fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
        match scalar {
            Scalar::Bool(value) => Ok(*value),
            Scalar::Text(text) if text.parse::<bool>().is_ok() => Err("write it without quotes".to_owned()),
            _ => Err("no other word is understood".to_owned()),
        }
    }
}

impl Setting for u32 {
    fn expected() -> String {
        "a whole number".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        let value = if is_number { text.parse().ok() } else { None };
        value.ok_or_else(|| format!("it must be from 0 to {}", u32::MAX))
    }

    fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
        match scalar {
            Scalar::Integer(value) => Self::from_text(&value.to_string()),
            Scalar::Text(text) if Self::from_text(text).is_ok() => Err("write it without quotes".to_owned()),
            _ => Err(format!("it must be from 0 to {}", u32::MAX)),
        }
    }
}

/// A port, which is the only number of that size that is configured.
impl Setting for u16 {
    fn expected() -> String {
        "a port".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        let port = u32::from_text(text)
            .ok()
            .and_then(|number| u16::try_from(number).ok());
        port.filter(|&port| port != 0)
            .ok_or_else(|| "it must be from 1 to 65535".to_owned())
    }

    fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
        let is_text = matches!(scalar, Scalar::Text(_));
        match Self::from_text(&scalar.to_string()) {
            Ok(_) if is_text => Err("write it without quotes".to_owned()),
            read => read,
        }
    }
}

impl Setting for Duration {
    fn expected() -> String {
        "a duration such as 200ms, 15s, 5m or 1h".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        parse_duration(text).map_err(|error| error.to_string())
    }

    // A bare number gets the message about units.
    fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
        Self::from_text(&scalar.to_string())
    }
}

/// Implements [`Setting`] for decimals that are never held as floats: what YAML took for one is read again from the digits that it stands for.
macro_rules! setting_by_digits {
    ($($type:ty: $expected:literal, $parse:expr);+ $(;)?) => {
        $(impl Setting for $type {
            fn expected() -> String {
                $expected.to_owned()
            }

            fn from_text(text: &str) -> Result<Self, String> {
                $parse(text).map_err(|error| error.to_string())
            }

            fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
                Self::from_text(&scalar.to_string())
            }
        })+
    };
}

setting_by_digits! {
    NanoUsd: "an amount in USD such as 2.50", NanoUsd::from_usd;
    Millionths: "a number such as 0.5", str::parse::<Millionths>;
}

impl Setting for Micros {
    fn expected() -> String {
        "a date".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse::<Micros>().map_err(|error| error.to_string())
    }
}

impl Setting for TeamId {
    fn expected() -> String {
        "the name of a team".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        client_team(text.as_bytes()).map_err(|error| error.to_string())
    }
}

impl Setting for ByteSize {
    fn expected() -> String {
        "a size such as 64KiB, 4MiB or 1GiB".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: UnitError| error.to_string())
    }

    // A bare number gets the message about units.
    fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
        Self::from_text(&scalar.to_string())
    }
}

impl Setting for SocketAddr {
    fn expected() -> String {
        "an IP address and a port such as 0.0.0.0:8080, or :8080 for all addresses".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        let all_addresses = text.strip_prefix(':').map(|port| format!("0.0.0.0:{port}"));
        let address = all_addresses.as_deref().unwrap_or(text);
        address
            .parse()
            .map_err(|_| "a name cannot be listened on, and the port cannot be left out".to_owned())
    }
}

impl Setting for String {
    fn expected() -> String {
        "a text".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        plain_text(text).map(str::to_owned)
    }
}

impl Setting for PathBuf {
    fn expected() -> String {
        "a path".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        plain_text(text).map(PathBuf::from)
    }
}

impl Setting for Secret {
    fn expected() -> String {
        "a secret text".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        if text == MASK {
            return Err("that is the mask which check-config prints, not the secret".to_owned());
        }
        plain_text(text).map(Secret::new)
    }

    fn may_be_shown(_text: &str) -> bool {
        false
    }
}

impl Setting for TokenDigest {
    fn expected() -> String {
        "the SHA-256 of a token, as 64 hexadecimal digits".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, String> {
        if text == MASK {
            return Err("that is the mask which check-config prints, not the digest".to_owned());
        }
        text.parse().map_err(|error: ValueError| error.to_string())
    }

    // What stands here by mistake is most likely the token itself.
    fn may_be_shown(_text: &str) -> bool {
        false
    }
}

/// Implements [`Setting`] by `FromStr`, for values whose error says the reason.
macro_rules! setting_by_from_str {
    ($($type:ty: $expected:literal),+ $(,)?) => {
        $(impl Setting for $type {
            fn expected() -> String {
                $expected.to_owned()
            }

            fn from_text(text: &str) -> Result<Self, String> {
                text.parse().map_err(|error: ValueError| error.to_string())
            }

            // Addresses are where people put credentials.
            fn may_be_shown(text: &str) -> bool {
                !text.contains(['@', '?'])
            }
        })+
    };
}

setting_by_from_str! {
    UpstreamUrl: "an address such as http://127.0.0.1:8000",
    StoreUrl: "embedded, or an address such as http://clickhouse:8123",
    HeaderName: "the name of an HTTP header",
    Name: "a name",
    TokenScope: "admin, or team:NAME",
    CgroupChoice: "auto, a directory, unit:NAME or container:ID",
}

/// Implements [`Setting`] for the enums that are spelled as one of a few words.
macro_rules! setting_by_word {
    ($($type:ty),+ $(,)?) => {
        $(impl Setting for $type {
            fn expected() -> String {
                format!("one of {}", <$type>::WORDS.join(", "))
            }

            fn from_text(text: &str) -> Result<Self, String> {
                <$type>::from_word(text).ok_or_else(|| suggest(text, <$type>::WORDS))
            }

            fn from_scalar(scalar: &Scalar) -> Result<Self, String> {
                Self::from_text(&scalar.to_string())
            }
        })+
    };
}

setting_by_word!(
    Capture,
    RuntimeKind,
    Serves,
    OnUninspectable,
    Inject,
    WhenFull,
    Fsync,
    IdleTo,
    LimitMode,
    BudgetPeriod,
    AtLimit,
    LogLevel,
    LogFormat
);

/// Text that can be a path, a header value or part of a log line.
fn plain_text(text: &str) -> Result<&str, String> {
    if text.is_empty() {
        Err("it is empty: leave the key out instead".to_owned())
    } else if text.contains(char::is_control) {
        Err("it has a line end or another control character in it".to_owned())
    } else {
        Ok(text)
    }
}
