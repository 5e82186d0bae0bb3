//! The kernel probe, in the kernel that runs this. It needs root and a mount of cgroup2, and nothing of the project's tree: where it
//! cannot load the probe it fails, it never skips.
//!
//! Tests run one after another, in the process's only thread, since capabilities belong to threads.

#[cfg(target_os = "linux")]
mod tap_support;

#[cfg(target_os = "linux")]
mod kernel {
    use super::tap_support::*;
    use std::io::{Read, Write};
    use vllm_gateway::tap::probe::Watch;
    use vllm_gateway::wire::connection::Direction::{ToClient, ToServer};

    /// A watch that captures everything and loses nothing.
    fn everything() -> Watch {
        Watch {
            ports: Vec::new(),
            ring_bytes: 8 << 20,
            ingress_prefix_bytes: 512 << 10,
        }
    }

    fn check_exchange(ip: &str) {
        let mut stage = Stage::set(ip, everything());
        let mut client = stage.connect();
        let request = pattern(100_000);
        client.write_all(&request).expect("a server that reads");
        stage.server.ask("read 100000");
        stage.server.ask("write 300000 7777");
        let mut response = vec![0; 300_000];
        client.read_exact(&mut response).expect("a response");
        assert_eq!(response, pattern(300_000));
        let local = client.local_addr().expect("an address");
        drop(client);
        stage.server.ask("close");
        stage.until("both ends are closed", |seen| {
            [ToServer, ToClient]
                .iter()
                .all(|way| seen.iter().any(|seen| seen.fin && seen.direction == *way))
        });
        for (direction, sent) in [(ToServer, request), (ToClient, response)] {
            let (bytes, holes) = stage.stream(direction);
            assert_eq!(holes, 0);
            assert!(
                bytes.into_iter().flatten().eq(sent),
                "{ip} {direction:?}: other bytes than were sent"
            );
        }
        assert!(
            stage
                .seen
                .iter()
                .all(|seen| (seen.client, seen.server) == (local, stage.addr))
        );
        assert_eq!(stage.probe.ring.unreadable(), 0);
    }

    fn bytes_captured_are_those_sent() {
        check_exchange("127.0.0.1");
        check_exchange("::1");
    }

    const TESTS: &[(&str, fn())] = &[("bytes_captured_are_those_sent", bytes_captured_are_those_sent)];

    pub fn main() {
        play(&[("server", || Box::<Server>::default())]);
        run(TESTS);
    }
}

#[cfg(target_os = "linux")]
fn main() {
    kernel::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {}
