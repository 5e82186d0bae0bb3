//! Who may see what.
//!
//! With tokens (`admin.tokens`) every figure takes one, wherever the server listens. Without, figures are for whoever is on this machine: on
//! another address they are refused, and on loopback a request must also have been meant for loopback, since a page on the Web can make a
//! browser send one under a name of its own choice that it has resolve to 127.0.0.1 (DNS rebinding).
//!
//! `/metrics` takes a token where there are any, and is open where there are none: what scrapes it today must go on to.

use crate::config::{AdminConfig, AdminToken, TokenDigest, TokenScope};
use crate::identity::TeamId;
use crate::live::Show;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HOST};
use std::net::{IpAddr, SocketAddr};

/// The rules of one server.
pub(super) struct Access {
    tokens: Vec<AdminToken>,
    is_loopback: bool,
}

/// Why somebody gets to see nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// There is no token in the request.
    NoToken,
    /// It is none of those that are configured.
    WrongToken,
    /// It is that of a team, and this is about all of them.
    NotForTeams(TeamId),
    /// There are no tokens, and the address can be reached from elsewhere.
    Exposed,
    /// The request was meant for another host.
    OtherHost,
}

impl Access {
    /// Those that the config states, for a server that listens on `addr`.
    pub(super) fn new(config: &AdminConfig, addr: SocketAddr) -> Access {
        Access {
            tokens: config.tokens.clone(),
            is_loopback: is_loopback(addr.ip()),
        }
    }

    /// Whether figures can be had at all.
    pub(super) fn is_closed(&self) -> bool {
        self.tokens.is_empty() && !self.is_loopback
    }

    /// What a request for figures may be shown.
    pub(super) fn to_figures(&self, headers: &HeaderMap) -> Result<Show, Denied> {
        if !self.tokens.is_empty() {
            return self.holder(headers);
        }
        self.page(headers)?;
        Ok(Show::All)
    }

    /// The same for what is about all teams.
    pub(super) fn to_all(&self, headers: &HeaderMap) -> Result<(), Denied> {
        match self.to_figures(headers)? {
            Show::All => Ok(()),
            Show::Team(team) => Err(Denied::NotForTeams(team)),
        }
    }

    /// Whether `/metrics` may be read.
    pub(super) fn to_metrics(&self, headers: &HeaderMap) -> Result<(), Denied> {
        if self.tokens.is_empty() {
            return Ok(());
        }
        self.to_all(headers)
    }

    /// Whether the console may be opened. It holds no figures, and asks for a token by itself.
    pub(super) fn page(&self, headers: &HeaderMap) -> Result<(), Denied> {
        if !self.tokens.is_empty() {
            return Ok(());
        }
        if !self.is_loopback {
            return Err(Denied::Exposed);
        }
        if is_for_loopback(headers) {
            Ok(())
        } else {
            Err(Denied::OtherHost)
        }
    }

    fn holder(&self, headers: &HeaderMap) -> Result<Show, Denied> {
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (given.next(), given.next()) else {
            return Err(Denied::NoToken);
        };
        let (scheme, token) = value
            .as_bytes()
            .split_at_checked(b"Bearer ".len())
            .ok_or(Denied::NoToken)?;
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return Err(Denied::NoToken);
        }
        let digest = TokenDigest::of(token);
        // All are looked at, each in the same time: how long it takes tells nothing of where, or whether, one fits.
        let mut found = None;
        for known in &self.tokens {
            if known.sha256 == digest {
                found = Some(&known.scope);
            }
        }
        match found {
            Some(TokenScope::Admin) => Ok(Show::All),
            Some(TokenScope::Team(team)) => Ok(Show::Team(team.clone())),
            None => Err(Denied::WrongToken),
        }
    }
}

/// Whether an address cannot be reached from another machine.
fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
    }
}

/// Whether the one `Host` of a request is a name or an address of loopback, with whatever port: a tunnel has another one than the server.
fn is_for_loopback(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let Ok(host) = host.to_str() else { return false };
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, after)) => (name, after.strip_prefix(':').unwrap_or(after)),
            None => return false,
        },
        None => host.split_once(':').unwrap_or((host, "")),
    };
    let is_name = name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(is_loopback);
    is_name && port.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    fn access(addr: &str, tokens: &[(&str, &str)]) -> Access {
        let tokens = tokens.iter().map(|(token, scope)| AdminToken {
            name: token.parse().unwrap(),
            sha256: TokenDigest::of(token.as_bytes()),
            scope: scope.parse().unwrap(),
        });
        let config = AdminConfig {
            tokens: tokens.collect(),
            ..AdminConfig::default()
        };
        Access::new(&config, addr.parse().unwrap())
    }

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let fields = fields
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap()));
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            let name: hyper::header::HeaderName = name;
            map.append(name, value);
        }
        map
    }

    #[test]
    fn on_loopback_a_request_must_be_meant_for_loopback() {
        let access = access("127.0.0.1:9464", &[]);
        for host in [
            "localhost",
            "LOCALHOST:9464",
            "127.0.0.1:9464",
            "127.8.9.1",
            "[::1]:1",
            "[::1]",
            "[::ffff:127.0.0.1]:9",
        ] {
            assert_eq!(
                access.to_figures(&headers(&[("host", host)])),
                Ok(Show::All),
                "{host}"
            );
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:9464",
            "10.0.0.1",
            "",
            "[::2]",
            "[::1",
            "[::1]x",
            "localhost:x",
            "localhost:1:2",
            "0.0.0.0",
        ] {
            assert_eq!(
                access.to_figures(&headers(&[("host", host)])),
                Err(Denied::OtherHost),
                "{host}"
            );
        }
        assert_eq!(access.page(&headers(&[])), Err(Denied::OtherHost));
        let twice = headers(&[("host", "localhost"), ("host", "evil.example")]);
        assert_eq!(access.page(&twice), Err(Denied::OtherHost));
        assert_eq!(access.to_metrics(&headers(&[("host", "prometheus")])), Ok(()));
    }

    #[test]
    fn on_another_address_figures_take_a_token() {
        let open = access("0.0.0.0:9464", &[]);
        assert!(open.is_closed());
        let local = headers(&[("host", "localhost")]);
        assert_eq!(open.to_figures(&local), Err(Denied::Exposed));
        assert_eq!(open.page(&local), Err(Denied::Exposed));
        assert_eq!(open.to_metrics(&local), Ok(()), "as ever");
        assert!(!access("[::]:9464", &[("t", "admin")]).is_closed());
    }

    #[test]
    fn a_token_opens_what_its_scope_says_and_no_other_does() {
        for addr in ["127.0.0.1:9464", "10.0.0.1:9464"] {
            let access = access(addr, &[("ops-token", "admin"), ("red-token", "team:red")]);
            let with = |value: &str| headers(&[("authorization", value), ("host", "any.example")]);
            let red = Show::Team(TeamId::parse(b"red").unwrap());
            assert_eq!(access.to_figures(&with("Bearer ops-token")), Ok(Show::All));
            assert_eq!(access.to_figures(&with("bearer red-token")), Ok(red));
            assert_eq!(access.to_metrics(&with("Bearer ops-token")), Ok(()));
            let not_for_teams = Denied::NotForTeams(TeamId::parse(b"red").unwrap());
            assert_eq!(
                access.to_all(&with("Bearer red-token")),
                Err(not_for_teams.clone())
            );
            assert_eq!(access.to_metrics(&with("Bearer red-token")), Err(not_for_teams));
            for wrong in [
                "Bearer ops-toke",
                "Bearer ops-token ",
                "Bearer ",
                "Bearer red-tokenx",
            ] {
                assert_eq!(
                    access.to_figures(&with(wrong)),
                    Err(Denied::WrongToken),
                    "{wrong}"
                );
            }
            for none in ["", "Bearer", "Basic b3BzLXRva2Vu", "ops-token"] {
                assert_eq!(access.to_figures(&with(none)), Err(Denied::NoToken), "{none}");
            }
            assert_eq!(
                access.to_metrics(&headers(&[("host", "localhost")])),
                Err(Denied::NoToken)
            );
            let twice = headers(&[
                ("authorization", "Bearer ops-token"),
                ("authorization", "Bearer x"),
            ]);
            assert_eq!(
                access.to_figures(&twice),
                Err(Denied::NoToken),
                "one of two is no proof"
            );
            assert_eq!(
                access.page(&headers(&[])),
                Ok(()),
                "the page itself holds nothing"
            );
        }
    }
}
