//! The kernel probe beside a server as containers have it: in a network namespace of its own, at the end of a pair of virtual interfaces. There
//! are real packets there, no longer than the interface takes, where loopback has segments of 64 kB. It needs root and iproute2.

#[cfg(target_os = "linux")]
mod tap_support;

#[cfg(target_os = "linux")]
mod kernel {
    use super::tap_support::*;
    use std::io::{Read, Write};
    use std::net::{IpAddr, SocketAddr, TcpStream};
    use std::process::Command;
    use vllm_gateway::tap::probe::{Probe, Watch};
    use vllm_gateway::wire::connection::Direction::{self, ToClient, ToServer};

    /// What fits into an Ethernet packet behind the headers of IPv4 and TCP, with a timestamp.
    const PAYLOAD_MAX: u32 = 1500 - 20 - 32;

    /// A namespace, and two interfaces of which one is in it. No other network of this machine should have these addresses, which
    /// are set aside for documents (RFC 5737).
    struct Namespace {
        name: String,
        outside: String,
    }

    const OUTSIDE: &str = "198.51.100.1";
    const INSIDE: &str = "198.51.100.2";

    impl Namespace {
        fn make() -> Namespace {
            let pid = std::process::id();
            let namespace = Namespace {
                name: format!("tap-{pid}"),
                outside: format!("tapo{pid}"),
            };
            let (name, outside, inside) = (&namespace.name, &namespace.outside, format!("tapi{pid}"));
            ip(&format!("netns add {name}"));
            ip(&format!(
                "link add {outside} type veth peer name {inside} netns {name}"
            ));
            // One packet at a time: else the stack would hand over 64 kB as one here too.
            ip(&format!("link set {outside} gso_max_segs 1 up"));
            ip(&format!("-n {name} link set {inside} gso_max_segs 1 up"));
            ip(&format!("address add {OUTSIDE}/30 dev {outside}"));
            ip(&format!("-n {name} address add {INSIDE}/30 dev {inside}"));
            namespace
        }
    }

    impl Drop for Namespace {
        fn drop(&mut self) {
            // The other interface goes with it.
            for words in [
                format!("link delete {}", self.outside),
                format!("netns delete {}", self.name),
            ] {
                let _ = Command::new("ip").args(words.split(' ')).status();
            }
        }
    }

    fn ip(words: &str) {
        let status = Command::new("ip")
            .args(words.split(' '))
            .status()
            .expect("iproute2 is installed");
        assert!(status.success(), "ip {words}");
    }

    fn each_packet_of_a_network_is_seen() {
        let namespace = Namespace::make();
        let cgroup = TestCgroup::make();
        let mut inside = Command::new("ip");
        inside
            .args(["netns", "exec", &namespace.name])
            .arg(std::env::current_exe().expect("a program"));
        let mut server = Actor::start_by(inside, "server");
        // By itself it could not: to `ip netns exec` belongs another /sys.
        std::fs::write(cgroup.path().join("cgroup.procs"), server.pid().to_string()).expect("it moves");
        let port: u16 = server.ask(&format!("listen {INSIDE}")).parse().expect("a port");
        let watch = Watch {
            ports: vec![port],
            ring_bytes: 8 << 20,
            ingress_prefix_bytes: 16 << 10,
        };
        let mut probe = Probe::load(&watch).unwrap_or_else(|error| panic!("{error}"));
        let links = probe
            .programs
            .attach(&cgroup.open())
            .unwrap_or_else(|error| panic!("{error}"));
        let mut client = TcpStream::connect((INSIDE, port)).expect("a connection");
        server.ask("accept");
        client.write_all(&pattern(100_000)).expect("a server that reads");
        server.ask("read 100000");
        server.ask("write 300000 7777");
        client.read_exact(&mut vec![0; 300_000]).expect("a response");
        let local = client.local_addr().expect("an address");
        let addr = SocketAddr::new(INSIDE.parse::<IpAddr>().expect("an address"), port);
        let mut seen = Vec::new();
        while probe.ring.drain(256, &mut |segment| seen.push(Seen::of(segment))) == 256 {}
        drop(links);
        assert!(
            seen.iter()
                .all(|seen| (seen.client, seen.server) == (local, addr))
        );
        let longest = |direction| of(&seen, direction).map(|seen| seen.len_bytes).max();
        assert_eq!(longest(ToClient), Some(PAYLOAD_MAX), "not one packet at a time");
        for (direction, sent) in [(ToServer, 100_000), (ToClient, 300_000)] {
            let segments: Vec<&Seen> = of(&seen, direction).collect();
            let (bytes, holes) = place(&segments, addr);
            assert_eq!(holes, 0, "{direction:?}");
            assert!(
                bytes.into_iter().flatten().eq(pattern(sent)),
                "{direction:?}: other bytes than were sent"
            );
        }
        drop(client);
        drop(server);
    }

    fn of(seen: &[Seen], direction: Direction) -> impl Iterator<Item = &Seen> {
        seen.iter().filter(move |seen| seen.direction == direction)
    }

    pub fn main() {
        play(&[("server", || Box::<Server>::default())]);
        run(&[(
            "each_packet_of_a_network_is_seen",
            each_packet_of_a_network_is_seen,
        )]);
    }
}

#[cfg(target_os = "linux")]
fn main() {
    kernel::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {}
