//! Who a request is for: team, project and user, from the headers that the config names.
//!
//! What it promises: an [`Identity`] holds well-formed values only, and no request that leaves doubt about its team gets
//! one. A header that stands twice is such a doubt, even with the same value, since two readers of the same bytes (this
//! gateway, and a proxy in front of it that added its own) could then charge two teams. Nothing is trimmed, folded or
//! guessed: `search` and `Search` are two teams.
//!
//! What it leaves out: whether the client tells the truth. Headers are believed or, with `trust_headers: false`, not
//! looked at; keys and tokens have no part in it yet.

use std::hash::{BuildHasher, RandomState};
use std::{fmt, sync::Arc};

use crate::config::{HeaderName, IdentityConfig};

/// Longest value, in bytes: enough for any name or UUID, and a bound on what a client can make a label of.
pub const VALUE_BYTES_MAX: usize = 128;

/// What the names of the gateway's own lines begin with: `__other__`, `__idle__`, `__direct__`. A client that could take such a name
/// would hide its requests, and their cost, among them.
const RESERVED_PREFIX: &str = "__";

/// Longest quotation of a client's value in an error; it goes into response bodies and logs.
const QUOTE_CHARS_MAX: usize = 64;

/// Declares a kind of identity value. All obey the same rules; being types, they cannot be mistaken for each other.
macro_rules! identity_values {
    ($($(#[$meta:meta])* $name:ident),+ $(,)?) => {
        $(
            $(#[$meta])*
            #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
            pub struct $name(Arc<str>);

            impl $name {
                /// Parses a header's value: 1 to [`VALUE_BYTES_MAX`] visible ASCII characters (0x21 to 0x7e).
                ///
                /// # Errors
                /// Names the rule that the value breaks.
                pub fn parse(value: &[u8]) -> Result<Self, ValueError> {
                    parse_value(value).map(|text| Self(text.into()))
                }

                /// The value as text.
                pub fn as_str(&self) -> &str {
                    &self.0
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(&self.0)
                }
            }

            impl fmt::Debug for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    self.0.fmt(f)
                }
            }
        )+
    };
}

identity_values! {
    /// The team that a request is charged to.
    TeamId,
    /// A project within a team.
    Project,
    /// A user within a team.
    UserId,
}

/// Who one request is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Who pays.
    pub team: TeamId,
    /// What for, if the client said so.
    pub project: Option<Project>,
    /// On whose behalf, if the client said so.
    pub user: Option<UserId>,
}

/// What becomes of a request that names no team.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WithoutTeam {
    /// It is refused: a bill needs somebody to send it to.
    #[default]
    Refuse,
    /// It is taken for a team that is named after its API key, for a first look at traffic whose clients know of no teams.
    NameByKey,
}

/// The team of a request without a key.
pub const UNNAMED: &str = "unnamed";

/// Headers that carry an API key, and what stands before it.
const KEY_HEADERS: [(&str, &str); 2] = [("authorization", "Bearer "), ("x-api-key", "")];

/// What vLLM's documentation tells clients to send that must send something. It tells nobody from anybody.
const NO_KEY: &str = "EMPTY";

/// The rules by which requests are identified. Built once from the config, then shared.
#[derive(Clone, Debug)]
pub struct IdentityRules {
    team: HeaderName,
    project: HeaderName,
    user: HeaderName,
    trust_headers: bool,
    without_team: WithoutTeam,
    /// Its seed is this process's own, so that the name of a key tells nothing about the key.
    names: RandomState,
}

impl IdentityRules {
    /// The rules that the config states.
    pub fn new(config: &IdentityConfig) -> Self {
        Self {
            team: config.team_header.clone(),
            project: config.project_header.clone(),
            user: config.user_header.clone(),
            trust_headers: config.trust_headers,
            without_team: config.without_team,
            names: RandomState::new(),
        }
    }

    /// Says who a request is for, from all of its headers. Names are compared without regard to case; values must come
    /// without the optional whitespace around them. An optional header with an empty value counts as absent.
    ///
    /// # Errors
    /// When the team is missing, or any of the three headers is malformed or stands more than once.
    pub fn identify<'h>(
        &self,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<Identity, IdentityError> {
        let configured = [&self.team, &self.project, &self.user];
        let mut values: [Option<&[u8]>; 3] = [None; 3];
        let mut key = None;
        let believed = headers.into_iter().filter(|_| self.trust_headers);
        for (name, value) in believed {
            if self.without_team == WithoutTeam::NameByKey {
                key = key.or_else(|| key_in(name, value));
            }
            let Some(which) = configured.iter().position(|header| is_named(header, name)) else {
                continue;
            };
            if values[which].replace(value).is_some() {
                return Err(IdentityError::Repeated {
                    header: configured[which].clone(),
                });
            }
        }
        let [team, project, user] = values;
        let team = match (team, self.without_team) {
            (Some(team), _) => named(&self.team, client_team(team))?,
            (None, WithoutTeam::NameByKey) => self.team_of_key(key),
            (None, WithoutTeam::Refuse) => {
                return Err(IdentityError::MissingTeam {
                    header: self.team.clone(),
                });
            }
        };
        Ok(Identity {
            team,
            project: optional(project)
                .map(|value| named(&self.project, Project::parse(value)))
                .transpose()?,
            user: optional(user)
                .map(|value| named(&self.user, UserId::parse(value)))
                .transpose()?,
        })
    }

    fn team_of_key(&self, key: Option<&[u8]>) -> TeamId {
        match key {
            // Six digits tell some thousand keys apart.
            Some(key) => TeamId(format!("key-{:06x}", self.names.hash_one(key) & 0xff_ffff).into()),
            None => TeamId(UNNAMED.into()),
        }
    }

    /// Whether a header is one of the three, for taking them out before the upstream sees the request. That holds for
    /// headers that are not believed too.
    pub fn is_identity_header(&self, name: &str) -> bool {
        [&self.team, &self.project, &self.user]
            .into_iter()
            .any(|header| is_named(header, name))
    }
}

/// Why a request has no identity. Each is the client's to correct, and names the header as it was configured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Nobody to charge.
    #[error("header {header} is missing: it must name the team that this request is for")]
    MissingTeam {
        /// The team's header.
        header: HeaderName,
    },
    /// One of the headers stands more than once, whether or not with the same value.
    #[error("header {header} stands more than once: send it once")]
    Repeated {
        /// The header.
        header: HeaderName,
    },
    /// One of the headers breaks a rule.
    #[error("header {header}: {source}")]
    Malformed {
        /// The header.
        header: HeaderName,
        /// The rule.
        source: ValueError,
    },
}

impl IdentityError {
    /// The header to correct, as it was configured.
    pub fn header(&self) -> &HeaderName {
        match self {
            Self::MissingTeam { header } | Self::Repeated { header } | Self::Malformed { header, .. } => {
                header
            }
        }
    }
}

/// The rule that a value breaks. What it quotes of the value is escaped and short, since it goes back to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// No characters at all.
    #[error("expected 1 to {VALUE_BYTES_MAX} visible ASCII characters, found none")]
    Empty,
    /// More than [`VALUE_BYTES_MAX`] bytes.
    #[error("expected 1 to {VALUE_BYTES_MAX} visible ASCII characters, found {length_bytes}")]
    TooLong {
        /// How many bytes there are.
        length_bytes: usize,
    },
    /// A space, a control character, or a byte beyond ASCII.
    #[error(
        "expected visible ASCII characters only, found byte 0x{byte:02x} at position {position} of \"{quoted}\""
    )]
    Invisible {
        /// The first byte that is not allowed.
        byte: u8,
        /// Where it stands, counted from 1.
        position: usize,
        /// The value, escaped and cut.
        quoted: String,
    },
    /// A team whose name only the gateway itself may use.
    #[error(
        "names that begin with {RESERVED_PREFIX} are reserved for the gateway's own lines, found \"{quoted}\""
    )]
    Reserved {
        /// The value, cut.
        quoted: String,
    },
}

/// The API key, if that is what the header carries.
fn key_in<'h>(name: &str, value: &'h [u8]) -> Option<&'h [u8]> {
    let (_, scheme) = KEY_HEADERS
        .iter()
        .find(|(header, _)| header.eq_ignore_ascii_case(name))?;
    let (before, key) = value.split_at_checked(scheme.len())?;
    let is_key = before.eq_ignore_ascii_case(scheme.as_bytes()) && !key.is_empty();
    (is_key && key != NO_KEY.as_bytes()).then_some(key)
}

/// A team as a client, or the config, may name it.
pub(crate) fn client_team(value: &[u8]) -> Result<TeamId, ValueError> {
    let team = TeamId::parse(value)?;
    if team.as_str().starts_with(RESERVED_PREFIX) {
        return Err(ValueError::Reserved { quoted: quote(value) });
    }
    Ok(team)
}

fn parse_value(value: &[u8]) -> Result<&str, ValueError> {
    if value.is_empty() {
        return Err(ValueError::Empty);
    }
    if value.len() > VALUE_BYTES_MAX {
        return Err(ValueError::TooLong {
            length_bytes: value.len(),
        });
    }
    match std::str::from_utf8(value) {
        Ok(text) if text.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(text),
        _ => {
            // There is such a byte, since visible ASCII is UTF-8.
            let index = value
                .iter()
                .position(|byte| !byte.is_ascii_graphic())
                .unwrap_or_default();
            Err(ValueError::Invisible {
                byte: value[index],
                position: index + 1,
                quoted: quote(value),
            })
        }
    }
}

fn quote(value: &[u8]) -> String {
    value
        .escape_ascii()
        .take(QUOTE_CHARS_MAX)
        .map(char::from)
        .collect()
}

fn is_named(header: &HeaderName, name: &str) -> bool {
    header.as_str().eq_ignore_ascii_case(name)
}

fn optional(value: Option<&[u8]>) -> Option<&[u8]> {
    value.filter(|value| !value.is_empty())
}

fn named<T>(header: &HeaderName, parsed: Result<T, ValueError>) -> Result<T, IdentityError> {
    parsed.map_err(|source| IdentityError::Malformed {
        header: header.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules() -> IdentityRules {
        IdentityRules::new(&IdentityConfig::default())
    }

    fn identify(headers: &[(&str, &str)]) -> Result<Identity, IdentityError> {
        rules().identify(headers.iter().map(|(name, value)| (*name, value.as_bytes())))
    }

    #[track_caller]
    fn check_refused(headers: &[(&str, &str)], message: &str) {
        assert_eq!(identify(headers).unwrap_err().to_string(), message);
    }

    #[test]
    fn names_are_found_in_any_case_among_other_headers() {
        let identity = identify(&[
            ("host", "x"),
            ("x-team-id", "search"),
            ("X-PROJECT", "rank"),
            ("X-User-ID", "a@b.c"),
        ])
        .unwrap();
        assert_eq!(identity.team.as_str(), "search");
        assert_eq!(identity.project.as_ref().map(Project::as_str), Some("rank"));
        assert_eq!(identity.user.as_ref().map(UserId::as_str), Some("a@b.c"));
    }

    #[test]
    fn project_and_user_are_optional_and_empty_is_absent() {
        let team_only = identify(&[("X-Team-ID", "search")]).unwrap();
        assert_eq!((&team_only.project, &team_only.user), (&None, &None));
        assert_eq!(
            identify(&[("X-Project", ""), ("X-Team-ID", "search"), ("X-User-ID", "")]),
            Ok(team_only)
        );
    }

    #[test]
    fn a_request_without_a_team_is_refused_by_the_configured_name() {
        check_refused(
            &[],
            "header X-Team-ID is missing: it must name the team that this request is for",
        );
        let config = IdentityConfig {
            team_header: "X-Cost-Centre".parse().unwrap(),
            ..IdentityConfig::default()
        };
        let error = IdentityRules::new(&config)
            .identify([("X-Team-ID", &b"search"[..])])
            .unwrap_err();
        assert_eq!(error.header().as_str(), "X-Cost-Centre");
        check_refused(
            &[("X-Team-ID", "")],
            "header X-Team-ID: expected 1 to 128 visible ASCII characters, found none",
        );
    }

    #[test]
    fn a_header_that_stands_twice_is_refused_whatever_it_says() {
        for second in ["search", "ads", ""] {
            check_refused(
                &[("X-Team-ID", "search"), ("x-team-id", second)],
                "header X-Team-ID stands more than once: send it once",
            );
        }
        check_refused(
            &[("X-Team-ID", "search"), ("X-Project", ""), ("X-Project", "")],
            "header X-Project stands more than once: send it once",
        );
    }

    #[test]
    fn a_malformed_value_is_refused_even_where_it_is_optional() {
        check_refused(
            &[("X-Team-ID", "search"), ("X-User-ID", "a b")],
            "header X-User-ID: expected visible ASCII characters only, found byte 0x20 at position 2 of \"a b\"",
        );
        check_refused(
            &[("X-Team-ID", &"x".repeat(129))],
            "header X-Team-ID: expected 1 to 128 visible ASCII characters, found 129",
        );
        assert!(identify(&[("X-Team-ID", &"x".repeat(128))]).is_ok());
    }

    #[test]
    fn the_gateways_own_lines_cannot_be_charged_by_a_client() {
        for team in ["__other__", "__idle__", "__direct__", "__"] {
            check_refused(
                &[("X-Team-ID", team)],
                &format!(
                    "header X-Team-ID: names that begin with __ are reserved for the gateway's own lines, found \"{team}\""
                ),
            );
        }
        let identity = identify(&[("X-Team-ID", "_search__"), ("X-Project", "__other__")]).unwrap();
        assert_eq!(identity.team.as_str(), "_search__", "one underscore is nobody's");
    }

    #[test]
    fn a_quoted_value_cannot_forge_lines_or_flood() {
        let mut value = vec![b'\n'];
        value.extend([0xff; 100]);
        let ValueError::Invisible {
            byte,
            position,
            quoted,
        } = TeamId::parse(&value).unwrap_err()
        else {
            panic!("another rule was found broken");
        };
        assert_eq!((byte, position, quoted.len()), (b'\n', 1, QUOTE_CHARS_MAX));
        assert!(quoted.starts_with("\\n\\xff\\xff"), "{quoted}");
    }

    #[test]
    fn headers_that_are_not_trusted_are_not_believed_but_still_taken_out() {
        let rules = IdentityRules::new(&IdentityConfig {
            trust_headers: false,
            ..IdentityConfig::default()
        });
        let error = rules.identify([("X-Team-ID", &b"search"[..])]).unwrap_err();
        assert!(matches!(error, IdentityError::MissingTeam { .. }), "{error}");
        assert!(rules.is_identity_header("x-team-id"));
    }

    #[test]
    fn a_first_look_names_requests_by_their_key_and_believes_a_team() {
        let rules = IdentityRules::new(&IdentityConfig {
            without_team: WithoutTeam::NameByKey,
            ..IdentityConfig::default()
        });
        let team = |headers: &[(&str, &str)]| {
            let headers = headers.iter().map(|(name, value)| (*name, value.as_bytes()));
            rules.identify(headers).unwrap().team.to_string()
        };
        assert_eq!(team(&[]), "unnamed");
        assert_eq!(team(&[("Authorization", "Bearer EMPTY")]), "unnamed");
        assert_eq!(team(&[("Authorization", "Basic abc")]), "unnamed");
        let named = team(&[("Authorization", "Bearer sk-secret")]);
        assert!(named.starts_with("key-") && named.len() == 10, "{named}");
        assert_eq!(
            team(&[("x-api-key", "sk-secret")]),
            named,
            "one key, whatever the client library"
        );
        assert_ne!(team(&[("authorization", "bearer sk-other")]), named);
        assert_eq!(
            team(&[("Authorization", "Bearer sk-secret"), ("X-Team-ID", "search")]),
            "search"
        );
        let others = IdentityRules::new(&IdentityConfig {
            without_team: WithoutTeam::NameByKey,
            ..IdentityConfig::default()
        });
        let again = others.identify([("x-api-key", &b"sk-secret"[..])]).unwrap();
        assert_ne!(again.team.as_str(), named, "the next process has other names");
    }

    #[test]
    fn only_the_three_headers_are_taken_out() {
        for (name, expected) in [
            ("X-TEAM-ID", true),
            ("x-project", true),
            ("X-User-Id", true),
            ("X-Team", false),
            ("", false),
        ] {
            assert_eq!(rules().is_identity_header(name), expected, "{name}");
        }
    }

    proptest! {
        #[test]
        fn visible_ascii_of_a_fair_length_is_kept_as_it_is(value in "[!-~]{1,128}") {
            prop_assert_eq!(TeamId::parse(value.as_bytes()).map(|team| team.to_string()), Ok(value));
        }

        #[test]
        fn exactly_the_stated_values_are_accepted(value in prop::collection::vec(any::<u8>(), 0..200)) {
            let is_good = (1..=128).contains(&value.len()) && value.iter().all(|byte| (0x21..=0x7e).contains(byte));
            prop_assert_eq!(UserId::parse(&value).is_ok(), is_good);
        }

        #[test]
        fn an_error_is_short_and_printable(value in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Err(error) = Project::parse(&value) {
                let message = error.to_string();
                prop_assert!(message.len() <= 160, "{}", message);
                prop_assert!(message.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()), "{}", message);
            }
        }
    }
}
