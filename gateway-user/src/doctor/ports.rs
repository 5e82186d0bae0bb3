//! Whether the gateway's own addresses are free, and who holds those that are not.

use super::{Check, Part};
use crate::net::{BindError, Owner, bind_listener};
use std::net::SocketAddr;

/// The kernel's name for a running gateway.
pub(super) const PROGRAM: &str = "vllm-gateway";

pub(super) fn checks(clients: SocketAddr, admin: SocketAddr) -> Vec<Check> {
    vec![
        address("clients", clients, "gateway.listen or GATEWAY_LISTEN_ADDR"),
        address("admin", admin, "admin.listen or GATEWAY_ADMIN_ADDR"),
    ]
}

/// Listens for an instant, as the gateway would.
fn address(name: &'static str, addr: SocketAddr, setting: &'static str) -> Check {
    match bind_listener(addr, name, setting) {
        Ok(listener) => {
            drop(listener);
            Check::ok("ports", name, format!("{addr} is free"))
        }
        // The usual reason to ask a doctor is that the gateway is running.
        Err(BindError::InUse {
            owner: Owner::Process { pid, name: holder },
            ..
        }) if holder == PROGRAM => Check::warning(
            "ports",
            name,
            format!("{addr} is held by a gateway that runs, process {pid}"),
        )
        .advise(format!(
            "nothing to do, unless this config is for a second gateway: then set {setting}"
        )),
        Err(BindError::InUse { owner, .. }) => {
            Check::problem("ports", name, format!("{addr} is in use by {owner}"))
                .advise(format!("end that process, or set {setting}"))
                .stops(Part::Proxy)
        }
        Err(BindError::NotLocal { .. }) => {
            Check::problem("ports", name, format!("{addr} is not an address of this machine"))
                .advise(format!("set {setting} to one that is, or to 0.0.0.0"))
                .stops(Part::Proxy)
        }
        Err(BindError::Forbidden { .. }) => Check::problem(
            "ports",
            name,
            format!("{addr} may not be listened on by this user"),
        )
        .advise(format!(
            "a port below 1024 takes CAP_NET_BIND_SERVICE; or set {setting} to a higher one"
        ))
        .stops(Part::Proxy),
        Err(BindError::Other { source, .. }) => {
            Check::problem("ports", name, format!("{addr} cannot be listened on: {source}"))
                .advise(format!("set {setting}"))
                .stops(Part::Proxy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_address_is_free_or_its_holder_is_named() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = held.local_addr().unwrap();
        let taken = address("clients", addr, "gateway.listen");
        assert_eq!((taken.state, taken.stops), (State::Problem, Some(Part::Proxy)));
        assert!(
            taken.found.contains(&addr.to_string()) && taken.advice.contains("gateway.listen"),
            "{taken:?}"
        );
        let free = address("clients", "127.0.0.1:0".parse().unwrap(), "gateway.listen");
        assert_eq!(free.state, State::Ok);
    }

    #[test]
    fn an_address_of_another_machine_stops_the_proxy() {
        // TEST-NET-1, which no machine has.
        let check = address("clients", "192.0.2.1:8080".parse().unwrap(), "gateway.listen");
        assert_eq!(
            (check.state, check.stops),
            (State::Problem, Some(Part::Proxy)),
            "{check:?}"
        );
    }
}
