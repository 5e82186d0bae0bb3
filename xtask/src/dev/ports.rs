//! Which port is whose, and whether it can be had.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;

use anyhow::{Result, bail};

use crate::net::bind_listener;

/// The first port of the usual ones.
pub const USUAL_BASE: u16 = 8000;

/// The admin port: of all, the farthest from the first.
const ADMIN_OFFSET: u16 = 1464;

/// Bases from which all ports exist and need no privilege.
pub const BASES: RangeInclusive<i64> = 1024..=(u16::MAX - ADMIN_OFFSET) as i64;

/// The ports of one running system: the first, and all others at fixed distances from it.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    base: u16,
}

impl Ports {
    /// Ports from `base`, one of [`BASES`], on.
    pub fn from_base(base: u16) -> Self {
        Self { base }
    }

    /// The first port.
    pub fn base(self) -> u16 {
        self.base
    }

    /// vLLM or its simulator, generating text; 8000 as a rule.
    pub fn llm(self) -> u16 {
        self.base
    }

    /// The one that embeds; 8001.
    pub fn embeddings(self) -> u16 {
        self.base + 1
    }

    /// The gateway's clients; 8080.
    pub fn gateway(self) -> u16 {
        self.base + 80
    }

    /// The embedded ClickHouse; 8123.
    pub fn clickhouse(self) -> u16 {
        self.base + 123
    }

    /// Prometheus; 9090.
    pub fn prometheus(self) -> u16 {
        self.base + 1090
    }

    /// The gateway's admin server; 9464.
    pub fn admin(self) -> u16 {
        self.base + ADMIN_OFFSET
    }

    /// Makes sure that nobody listens on any of them.
    ///
    /// # Errors
    /// Names each port that is taken, and who holds it.
    pub fn ensure_free(self, with_prometheus: bool) -> Result<()> {
        let mut wanted = vec![
            ("chat server", self.llm()),
            ("embeddings server", self.embeddings()),
            ("gateway", self.gateway()),
            ("ClickHouse", self.clickhouse()),
            ("admin", self.admin()),
        ];
        if with_prometheus {
            wanted.push(("Prometheus", self.prometheus()));
        }
        let mut taken = String::new();
        for (what, port) in wanted {
            // Everywhere, although most listen on loopback: whoever listens on either is in the way.
            let addr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            if let Err(error) = bind_listener(addr, what, "--port-base to run beside it, or stop it first") {
                // Writing to a string cannot fail.
                let _ = write!(taken, "\n  {error}");
            }
        }
        if !taken.is_empty() {
            bail!("not all ports are free:{taken}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_usual_ports_are_those_of_the_shipped_configuration() {
        let ports = Ports::from_base(USUAL_BASE);
        let config = include_str!("../../../config.yaml");
        for address in [
            format!("url: http://127.0.0.1:{}\n", ports.llm()),
            format!("url: http://127.0.0.1:{}\n", ports.embeddings()),
            format!("listen: 0.0.0.0:{}\n", ports.gateway()),
            format!("listen: 127.0.0.1:{}\n", ports.admin()),
        ] {
            assert!(config.contains(&address), "no `{address}` in config.yaml");
        }
        assert_eq!((ports.clickhouse(), ports.prometheus()), (8123, 9090));
    }

    #[test]
    fn every_base_that_is_allowed_has_all_its_ports() {
        for base in [*BASES.start(), *BASES.end()] {
            let ports = Ports::from_base(u16::try_from(base).expect("a port"));
            assert_eq!(i64::from(ports.admin()), base + 1464);
        }
    }

    #[test]
    fn a_taken_port_is_named_with_its_owner() {
        // The port that the system gives plays the highest; it lies in the ephemeral range, far above the lowest base.
        let held = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = held.local_addr().expect("an address").port();
        let error = Ports::from_base(port - ADMIN_OFFSET)
            .ensure_free(false)
            .expect_err("it is taken");
        let text = error.to_string();
        assert!(
            text.contains(&format!("admin address 0.0.0.0:{port} is in use by ")),
            "{text}"
        );
        assert!(text.contains("--port-base"), "{text}");
    }
}
