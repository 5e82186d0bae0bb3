//! Where the upstreams' sockets are: only those of this machine can be watched, and whoever listens may be only a forwarder.

use super::Check;
use crate::config::{Config, UpstreamConfig};
use crate::net::{Owner, owner_in_containers, owner_of};
use std::fs;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::Path;

/// Programs that listen in place of a server in a container, by the kernel's names for them (15 characters).
const FORWARDERS: [&str; 6] = [
    "docker-proxy",
    "rootlessport",
    "rootlesskit",
    "slirp4netns",
    "pasta",
    "gvproxy",
];

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// It listens on an address of this machine.
    Here(Owner),
    /// It listens on an address of a container of this machine.
    Container(Owner),
    /// On another machine, as far as can be seen from here.
    Elsewhere,
    /// Nobody knows the name.
    Nowhere,
}

/// A line for each upstream, and whether any can be watched. Where the probe was attached, `watched` are the cgroups that it was attached
/// to, and `mount` is the root of all.
pub(super) fn checks(config: &Config, mount: Option<&Path>, watched: &[&Path]) -> (Vec<Check>, bool) {
    let is_watched = |pid: u32| {
        let inside = |path: &str| path.trim_start_matches('/').to_owned();
        let place = mount
            .zip(cgroup_of(pid))
            .map(|(mount, path)| mount.join(inside(&path)));
        place.is_none_or(|place| watched.iter().any(|outer| place.starts_with(outer)))
    };
    let places: Vec<Place> = config.upstreams.iter().map(place).collect();
    let checks = config.upstreams.iter().zip(&places);
    let can_any = places
        .iter()
        .any(|place| matches!(place, Place::Here(_) | Place::Container(_)));
    let checks = checks.map(|(upstream, place)| {
        let port = upstream.url.port();
        if config.tap_ports().contains(&port) {
            check(upstream.name.as_str(), place, is_watched)
        } else {
            line(
                Check::warning,
                upstream.name.as_str(),
                format!("tap.ports leaves out its port, {port}"),
            )
            .advise("leave tap.ports empty for the ports of all upstreams, or add it")
        }
    });
    (checks.collect(), can_any)
}

fn place(upstream: &UpstreamConfig) -> Place {
    let Ok(addresses) = (upstream.url.host(), upstream.url.port()).to_socket_addrs() else {
        return Place::Nowhere;
    };
    let addresses: Vec<SocketAddr> = addresses.collect();
    let here = addresses.iter().filter(|address| is_here(address.ip()));
    // A name can have an address that nobody listens on, as localhost mostly has.
    let mut here: Vec<Owner> = here.map(|address| owner_of(*address)).collect();
    here.sort_by_key(|owner| *owner == Owner::Unknown);
    if let Some(owner) = here.into_iter().next() {
        return Place::Here(owner);
    }
    let mut containers = addresses.iter().map(|address| owner_in_containers(*address));
    match containers.find(|owner| *owner != Owner::Unknown) {
        Some(owner) => Place::Container(owner),
        None => Place::Elsewhere,
    }
}

/// Whether an address belongs to this machine: only then can a socket be bound to it.
fn is_here(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

fn line(make: fn(&str, &'static str, String) -> Check, upstream: &str, found: String) -> Check {
    make("tap", "socket", format!("{upstream}: {found}"))
}

fn check(upstream: &str, place: &Place, is_watched: impl Fn(u32) -> bool) -> Check {
    match place {
        Place::Here(Owner::Process { name, .. }) if FORWARDERS.contains(&name.as_str()) => {
            line(Check::warning, upstream, format!("{name} listens, in place of a server in a container")).advise(
                "what reaches the container past it would not be seen: set tap.cgroup to container:ID (docker ps tells it), and tap.ports to \
                 the port within the container",
            )
        }
        // The tap goes by the socket here, which may be in another cgroup than its process.
        Place::Here(owner @ Owner::Process { pid, .. }) => line(
            Check::ok,
            upstream,
            format!("{owner} listens, in cgroup {}", shown_cgroup(*pid)),
        ),
        Place::Container(owner @ Owner::Process { pid, .. }) if is_watched(*pid) => line(
            Check::ok,
            upstream,
            format!("{owner} listens in a container, in cgroup {}", shown_cgroup(*pid)),
        ),
        Place::Container(owner @ Owner::Process { pid, .. }) => line(
            Check::warning,
            upstream,
            format!("{owner} listens in a container, in cgroup {}, which is not watched", shown_cgroup(*pid)),
        )
        .advise("set tap.cgroup to / (all cgroups), or to one that all upstreams are in"),
        Place::Here(_) | Place::Container(_) => {
            line(Check::unknown, upstream, "nobody that can be seen listens on its address".to_owned()).advise(
                "start it: a tap that runs looks again every second (tap.reattach); processes of other users are seen by root alone",
            )
        }
        Place::Elsewhere => {
            line(Check::warning, upstream, "it is on another machine, and cannot be tapped from here".to_owned())
                .advise("run a gateway with capture: tap on that machine too; the proxy here works all the same")
        }
        Place::Nowhere => line(Check::unknown, upstream, "its name is not known".to_owned()),
    }
}

/// The cgroup of a process in the unified hierarchy, as /proc tells it.
fn cgroup_of(pid: u32) -> Option<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    unified(&table).map(str::to_owned)
}

fn shown_cgroup(pid: u32) -> String {
    let path = cgroup_of(pid);
    let path = path.as_deref().unwrap_or("that /proc does not tell");
    path.escape_debug().to_string()
}

/// The path in a table of cgroup(7): the unified hierarchy has number 0 and no controllers.
fn unified(table: &str) -> Option<&str> {
    table.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use std::net::TcpListener;

    fn config(url: &str, more: &str) -> Config {
        let yaml = format!("upstreams:\n  - {{name: chat, url: \"{url}\", serves: generate}}\n{more}");
        Config::parse("c", &yaml, &|_| None).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn a_server_of_this_machine_can_be_watched_and_another_not() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", server.local_addr().unwrap());
        assert_eq!(
            place(&config(&url, "").upstreams[0]),
            Place::Here(Owner::Ourselves)
        );
        // TEST-NET-1, which no machine has.
        let (lines, can_any) = checks(&config("http://192.0.2.1:8000", ""), None, &[]);
        assert_eq!((lines[0].state, can_any), (State::Warning, false));
        assert!(lines[0].found.contains("another machine"), "{lines:?}");
    }

    #[test]
    fn a_port_that_is_not_watched_is_named() {
        let (lines, _) = checks(
            &config("http://127.0.0.1:8000", "tap: {ports: [9000]}\n"),
            None,
            &[],
        );
        assert!(
            lines[0].state == State::Warning && lines[0].found.contains("8000"),
            "{lines:?}"
        );
    }

    #[test]
    fn a_forwarder_is_not_taken_for_the_server() {
        let owner = |name: &str| Owner::Process {
            pid: std::process::id(),
            name: name.to_owned(),
        };
        let forwarded = check("chat", &Place::Here(owner("docker-proxy")), |_| true);
        assert!(
            forwarded.state == State::Warning && forwarded.advice.contains("container:ID"),
            "{forwarded:?}"
        );
        let direct = check("chat", &Place::Here(owner("python3")), |_| false);
        assert!(
            direct.state == State::Ok && direct.found.contains("in cgroup /"),
            "{direct:?}"
        );
    }

    #[test]
    fn a_server_in_a_container_must_be_in_a_cgroup_that_is_watched() {
        let place = Place::Container(Owner::Process {
            pid: std::process::id(),
            name: "python3".to_owned(),
        });
        assert_eq!(check("chat", &place, |_| true).state, State::Ok);
        let unseen = check("chat", &place, |_| false);
        assert!(
            unseen.state == State::Warning && unseen.found.contains("not watched"),
            "{unseen:?}"
        );
    }

    #[test]
    fn the_unified_hierarchy_is_found_among_the_old_ones() {
        assert_eq!(
            unified("9:name=systemd:/\n4:memory:/x\n0::/system.slice/a b.service\n"),
            Some("/system.slice/a b.service")
        );
        assert_eq!(unified("1:cpu:/\n"), None);
    }
}
