//! The kernel probe, in the kernel that runs this. It needs root, a mount of cgroup2 and a loopback interface that is up, and nothing of the
//! project's tree: where it cannot load the probe it fails, it never skips.
//!
//! Tests run one after another, in the process's only thread, since capabilities belong to threads.

#[cfg(target_os = "linux")]
mod tap_support;

#[cfg(target_os = "linux")]
mod kernel {
    use super::tap_support::*;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::time::Duration;
    use vllm_gateway::tap::attacher;
    use vllm_gateway::tap::cgroup::{Hierarchy, How};
    use vllm_gateway::tap::probe::Watch;
    use vllm_gateway::wire::connection::Direction::{ToClient, ToServer};

    const PART_BYTES: usize = gateway_common::record::PART_BYTES as usize;

    /// A watch that captures everything and loses nothing.
    fn everything() -> Watch {
        Watch {
            ports: Vec::new(),
            ring_bytes: 8 << 20,
            ingress_prefix_bytes: 512 << 10,
        }
    }

    /// Sends 100 kB there and 300 kB back, and checks that they were seen so.
    fn check_exchange(mut stage: Stage, mut client: TcpStream) {
        let request = pattern(100_000);
        client.write_all(&request).expect("a server that reads");
        stage.server.ask("read 100000");
        stage.server.ask("write 300000 7777");
        let mut response = vec![0; 300_000];
        client.read_exact(&mut response).expect("a response");
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
            assert_eq!(holes, 0, "{direction:?}");
            assert!(
                bytes.into_iter().flatten().eq(sent),
                "{direction:?}: other bytes than were sent"
            );
        }
        assert!(
            stage
                .seen
                .iter()
                .all(|seen| (seen.client, seen.server) == (local, stage.addr))
        );
        assert_eq!(stage.probe.ring.unreadable(), 0);
        check_nothing_lost(&mut stage);
    }

    fn check_nothing_lost(stage: &mut Stage) {
        assert_eq!(stage.lines(), [""; 0], "normal traffic is nothing to talk of");
        for (direction, totals) in [
            (ToServer, stage.probe.counters.ingress()),
            (ToClient, stage.probe.counters.egress()),
        ] {
            let seen = stage.of(direction);
            assert_eq!(totals.submitted, seen.len() as u64, "{direction:?}: {totals:?}");
            assert_eq!((totals.lost(), totals.lost_bytes, totals.malformed), (0, 0, 0));
            let payload: u64 = seen.iter().map(|seen| u64::from(seen.len_bytes)).sum();
            assert_eq!((totals.submitted_bytes, totals.payload_bytes), (payload, payload));
        }
    }

    fn bytes_captured_are_those_sent_over_ipv4() {
        let mut stage = Stage::set("127.0.0.1", everything());
        let client = stage.connect();
        check_exchange(stage, client);
    }

    fn bytes_captured_are_those_sent_over_ipv6() {
        let mut stage = Stage::set("::1", everything());
        let client = stage.connect();
        check_exchange(stage, client);
    }

    fn ipv6_extension_headers_are_skipped() {
        let mut stage = Stage::set("::1", everything());
        let client = connect_with_options(stage.addr);
        stage.server.ask("accept");
        check_exchange(stage, client);
    }

    fn an_ipv4_client_of_an_ipv6_socket_is_seen_as_what_it_is() {
        let mut stage = Stage::set("::", everything());
        stage.addr = SocketAddr::from(([127, 0, 0, 1], stage.addr.port()));
        let client = stage.connect();
        check_exchange(stage, client);
    }

    fn requests_are_cut_and_their_length_is_still_true() {
        const PREFIX: usize = 4096;
        let mut stage = Stage::set(
            "127.0.0.1",
            Watch {
                ingress_prefix_bytes: PREFIX as u32,
                ..everything()
            },
        );
        let mut client = stage.connect();
        let request = pattern(1_000_000);
        client.write_all(&request[..3000]).expect("a server that reads");
        stage.server.ask("read 3000");
        client.write_all(&request[3000..]).expect("a server that reads");
        stage.server.ask("read 997000");
        stage.drain();
        let (bytes, holes) = stage.stream(ToServer);
        assert_eq!(bytes.len(), request.len(), "every byte has its place");
        assert!(
            holes > 0 && bytes[..3000].iter().all(Option::is_some),
            "small requests are whole"
        );
        assert!(
            bytes
                .iter()
                .zip(&request)
                .all(|(seen, sent)| seen.is_none_or(|seen| seen == *sent))
        );
        for seen in stage.of(ToServer) {
            assert_eq!(seen.captured.len(), PREFIX.min(seen.len_bytes as usize));
        }
        check_nothing_lost(&mut stage);
    }

    fn long_packets_come_in_parts_and_end_once() {
        let mut stage = Stage::set("127.0.0.1", everything());
        let mut client = stage.connect();
        let mut response = vec![0; 2_000_000];
        // More than the sockets hold, so that the writer waits, and what it wrote meanwhile leaves in the longest packets there are.
        let reader = std::thread::spawn(move || {
            client.read_exact(&mut response).expect("a response");
            (client, response)
        });
        stage.server.ask("write 2000000 2000000");
        stage.server.ask("close");
        let (_client, response) = reader.join().expect("a reader");
        stage.until("the end", |seen| {
            seen.iter().any(|seen| seen.fin && seen.direction == ToClient)
        });
        let (bytes, holes) = stage.stream(ToClient);
        assert!(holes == 0 && bytes.into_iter().flatten().eq(response));
        let segments = stage.of(ToClient);
        assert!(segments.iter().all(|seen| seen.captured.len() <= PART_BYTES));
        let follows = |pair: &[&Seen]| {
            pair[0].at_ns == pair[1].at_ns
                && pair[0].sequence.wrapping_add(pair[0].len_bytes) == pair[1].sequence
        };
        assert!(
            segments.windows(4).any(|four| four.windows(2).all(follows)),
            "no packet had 64 kB"
        );
        // A slow machine sends the end again, and it is the same end.
        let mut ends: Vec<u32> = segments
            .iter()
            .filter(|seen| seen.fin)
            .map(|seen| seen.sequence.wrapping_add(seen.len_bytes))
            .collect();
        ends.dedup();
        assert_eq!(ends.len(), 1);
    }

    fn beginnings_ends_and_resets_are_seen() {
        let mut stage = Stage::set("127.0.0.1", everything());
        let client = stage.connect();
        drop(client);
        stage.server.ask("close");
        let flag = |direction, flag: fn(&Seen) -> bool| {
            move |seen: &[Seen]| seen.iter().any(|seen| seen.direction == direction && flag(seen))
        };
        for direction in [ToServer, ToClient] {
            stage.until("a beginning", flag(direction, |seen| seen.syn));
            stage.until("an end", flag(direction, |seen| seen.fin));
        }
        assert!(
            stage.seen.iter().all(|seen| seen.len_bytes == 0),
            "acknowledgements alone are left out"
        );
        assert!(stage.seen.iter().all(|seen| seen.syn || seen.fin));
        let client = stage.connect();
        stage.server.ask("reset");
        stage.until("the server's reset", flag(ToClient, |seen| seen.rst));
        drop(client);
        let client = socket2::Socket::from(stage.connect());
        client.set_linger(Some(Duration::ZERO)).expect("an option");
        drop(client);
        stage.until("the client's reset", flag(ToServer, |seen| seen.rst));
        check_nothing_lost(&mut stage);
    }

    fn a_packet_s_time_lies_between_its_writing_and_its_reading() {
        let mut stage = Stage::set("127.0.0.1", everything());
        let mut client = stage.connect();
        for _ in 0..50 {
            stage.drain();
            stage.seen.clear();
            let written = monotonic_ns();
            client.write_all(b"a request").expect("a server that reads");
            let [read] = stage.server.numbers("read 9");
            let [answered] = stage.server.numbers("write 10 10");
            client.read_exact(&mut [0; 10]).expect("a response");
            let taken = monotonic_ns();
            stage.drain();
            for (direction, from, to) in [(ToServer, written, read), (ToClient, answered, taken)] {
                let seen = stage.of(direction);
                assert_eq!(seen.len(), 1);
                assert!(
                    (from..=to).contains(&seen[0].at_ns),
                    "{from} {} {to}",
                    seen[0].at_ns
                );
            }
        }
    }

    fn what_a_full_ring_loses_is_counted_to_the_byte() {
        const SENT: usize = 3_000_000;
        let mut stage = Stage::set(
            "127.0.0.1",
            Watch {
                ring_bytes: 64 << 10,
                ..everything()
            },
        );
        let mut client = stage.connect();
        let before = retransmitted();
        // Nobody reads the ring meanwhile.
        client
            .write_all(&pattern(SENT)[..50_000])
            .expect("a server that reads");
        stage.server.ask("read 50000");
        let reader = std::thread::spawn(move || {
            client.read_exact(&mut vec![0; SENT]).expect("a response");
            client
        });
        stage.server.ask(&format!("write {SENT} 1000"));
        let client = reader.join().expect("a reader");
        let repeated = retransmitted() - before;
        stage.drain();
        for (direction, sent, totals) in [
            (ToServer, 50_000, stage.probe.counters.ingress()),
            (ToClient, SENT as u64, stage.probe.counters.egress()),
        ] {
            let seen = stage.of(direction);
            let received: u64 = seen.iter().map(|seen| u64::from(seen.len_bytes)).sum();
            assert_eq!(totals.submitted, seen.len() as u64);
            assert_eq!(totals.submitted_bytes, received);
            assert_eq!(totals.payload_bytes, received + totals.lost_bytes, "{totals:?}");
            assert!(totals.payload_bytes >= sent);
            // What was sent twice went past twice.
            assert!(totals.payload_bytes == sent || repeated > 0, "{totals:?}");
            assert_eq!(totals.lost(), totals.lost_ring_full, "there is no other cause");
        }
        let egress = stage.probe.counters.egress();
        assert!(egress.lost_ring_full > 0 && egress.submitted > 0);
        // A ring that was emptied takes records again.
        stage.seen.clear();
        drop(client);
        stage.until("the end", |seen| {
            seen.iter().any(|seen| seen.fin && seen.direction == ToServer)
        });
    }

    fn malformed_packets_are_counted_and_the_first_are_logged() {
        const SENT: u64 = 1000;
        // A raw socket can send such packets. Its own port is its protocol's number, and only the packets of watched sockets are looked at.
        let watch = Watch {
            ports: vec![6],
            ..everything()
        };
        let mut stage = Stage::set("127.0.0.1", watch);
        let port = stage.addr.port();
        // Five is the least that a header has, and then it is whole.
        stage.server.ask(&format!("misstate {port} 5 1"));
        assert_eq!(stage.probe.counters.egress().malformed, 0);
        assert_eq!(stage.lines(), [""; 0]);
        stage.server.ask(&format!("misstate {port} 4 1"));
        assert_eq!(stage.probe.counters.egress().malformed, 1);
        // A raw socket is given what it sends over loopback, where nobody else would take such a packet.
        within_deadline("it arrives", || stage.probe.counters.ingress().malformed == 1);
        let lines = stage.lines();
        assert_eq!(lines.len(), 2, "{lines:?}");
        for (line, way) in lines.iter().zip(["out", "in"]) {
            let said = format!(
                "WARN gateway_ebpf: a malformed packet of 40 bytes on its way {way}: TCP at byte 20, fragment 0, TCP header of 16 bytes, port {port} to {port}"
            );
            assert!(line.contains(&said), "{line}");
        }
        stage.server.ask(&format!("misstate {port} 4 {}", SENT - 1));
        assert_eq!(stage.probe.counters.egress().malformed, SENT);
        // Ten powers of two are not greater than that, and each processor counts for itself, one direction as the other.
        let lines = stage.lines().len();
        let lines_max = 2 * 10 * aya::util::nr_cpus().expect("a number");
        assert!((1..lines_max).contains(&lines), "{lines}");
        stage.drain();
        assert_eq!(stage.seen.len(), 0, "what is malformed is not recorded");
    }

    fn the_verifier_is_far_from_giving_up() {
        let _stage = Stage::set("127.0.0.1", everything());
        let programs = aya::programs::loaded_programs().filter_map(Result::ok);
        let steps: Vec<u32> = programs
            .filter(|program| matches!(program.name_as_str(), Some("ingress" | "egress")))
            .filter_map(|program| program.verified_instruction_count())
            .collect();
        println!("the verifier took {steps:?} steps");
        // It gives up after a million, and each kernel counts otherwise.
        assert!(
            steps.len() >= 2 && steps.iter().all(|&steps| steps < 500_000),
            "{steps:?}"
        );
    }

    fn another_port_is_not_seen() {
        let mut stage = Stage::set("127.0.0.1", everything());
        let mut other = Actor::start("server", Some(&stage.cgroup));
        let port: u16 = other.ask("listen 127.0.0.1").parse().expect("a port");
        let mut client = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        other.ask("accept");
        client.write_all(b"a request").expect("a server that reads");
        other.ask("read 9");
        other.ask("write 100 10");
        client.read_exact(&mut [0; 100]).expect("a response");
        stage.drain();
        assert!(stage.seen.is_empty(), "{:?}", stage.seen);
        let (ingress, egress) = (stage.probe.counters.ingress(), stage.probe.counters.egress());
        assert_eq!((ingress.packets, egress.packets), (0, 0));
    }

    fn another_cgroup_is_not_seen() {
        let mut stage = Stage::set("127.0.0.1", everything());
        let elsewhere = TestCgroup::make();
        let mut other = Actor::start("server", Some(&elsewhere));
        // The same port at another address.
        other.ask(&format!("listen 127.0.0.2 {}", stage.addr.port()));
        let mut client = TcpStream::connect(("127.0.0.2", stage.addr.port())).expect("a connection");
        other.ask("accept");
        client.write_all(b"a request").expect("a server that reads");
        other.ask("read 9");
        stage.drain();
        assert!(stage.seen.is_empty(), "{:?}", stage.seen);
    }

    fn cgroups_are_found_by_path_unit_and_container() {
        let hierarchy = Hierarchy::find().expect("cgroup2 is mounted");
        let outer = TestCgroup::make();
        let unit = format!("tap-probe-{}.service", std::process::id());
        let id = format!("{:064x}", std::process::id() + 1_000_000);
        let inner = TestCgroup::inside(&outer, &unit);
        let container = TestCgroup::inside(&outer, &format!("docker-{id}.scope"));
        let relative = outer
            .path()
            .strip_prefix(hierarchy.mount())
            .expect("it is below the mount");
        for (choice, found) in [
            (outer.path().display().to_string(), &outer),
            (format!("/{}", relative.display()), &outer),
            (format!("unit:{unit}"), &inner),
            (format!("container:{id}"), &container),
        ] {
            let located = hierarchy.locate(&choice.parse().expect("a choice"), &[]);
            let located = located.unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(located.how, How::Configured);
            let paths: Vec<_> = located.cgroups.iter().map(|cgroup| cgroup.path()).collect();
            assert_eq!(paths, [found.path()], "{choice}");
        }
        let missing = "container:0123456789abffff".parse().expect("a choice");
        let error = hierarchy
            .locate(&missing, &[])
            .expect_err("there is none")
            .to_string();
        assert!(error.contains(&id), "what there is instead: {error}");
    }

    /// A server in a cgroup of its own, and a tap of another process on it. The cgroup comes first, to be dropped last.
    fn tapped(reattach: bool) -> (TestCgroup, Actor, Actor, SocketAddr) {
        let cgroup = TestCgroup::make();
        let mut server = Actor::start("server", Some(&cgroup));
        let port: u16 = server.ask("listen 127.0.0.1").parse().expect("a port");
        let mut tap = Actor::start("tap", None);
        let located = tap.ask(&format!("open {port} {reattach}"));
        check_located(&located, &cgroup);
        (cgroup, server, tap, SocketAddr::from(([127, 0, 0, 1], port)))
    }

    /// A kernel that can be asked tells the socket's cgroup; one without that module leaves the process's, which is the same here.
    fn check_located(located: &str, cgroup: &TestCgroup) {
        let (path, how) = located.split_once(' ').expect("a path and a reason");
        assert_eq!(path, cgroup.path().display().to_string());
        assert!(matches!(how, "Listener" | "Process"), "{how}");
    }

    fn check_seen(server: &mut Actor, tap: &mut Actor, addr: SocketAddr) {
        let [before, _] = tap.numbers("counts");
        tap.ask("drain");
        let mut client = TcpStream::connect(addr).expect("a connection");
        server.ask("accept");
        client.write_all(b"a request").expect("a server that reads");
        server.ask("read 9");
        let [after, lost] = tap.numbers("counts");
        assert!(
            after >= before + 3 && lost == 0,
            "two SYNs and a request: {before} {after} {lost}"
        );
        let [records] = tap.numbers("drain");
        assert_eq!(records, after - before);
    }

    fn check_kill(reattach: bool) {
        let (cgroup, mut server, mut tap, addr) = tapped(reattach);
        check_seen(&mut server, &mut tap, addr);
        assert_eq!(cgroup.attached(), [1, 1]);
        tap.kill();
        within_deadline("nothing is attached any more", || cgroup.attached() == [0, 0]);
    }

    fn a_killed_process_leaves_nothing_attached() {
        check_kill(false);
    }

    fn a_killed_process_leaves_nothing_attached_by_its_helper() {
        check_kill(true);
    }

    fn capabilities_are_gone_and_all_goes_on() {
        for reattach in [false, true] {
            let (_cgroup, mut server, mut tap, addr) = tapped(reattach);
            // All but CAP_DAC_OVERRIDE, by which root reaches its own directories whoever owns them.
            assert_eq!(tap.ask("capabilities"), "2 2 0 0");
            let refused = tap.ask("open 1 false");
            assert!(refused.contains("needs CAP_BPF and CAP_NET_ADMIN"), "{refused}");
            check_seen(&mut server, &mut tap, addr);
            assert_eq!(tap.ask("run"), "2 2", "a program that is started has no more");
            let helper_holds = if reattach { "8000001000" } else { "none" };
            assert_eq!(tap.ask("helper"), helper_holds);
        }
    }

    fn two_capabilities_are_enough() {
        let mut server = Actor::start("server", None);
        let port: u16 = server.ask("listen 127.0.0.1").parse().expect("a port");
        let mut tap = Actor::start("tap", None);
        assert_eq!(tap.ask("restrict"), "8000001000", "CAP_BPF and CAP_NET_ADMIN");
        let opened = tap.ask(&format!("open {port} false"));
        assert!(opened.starts_with('/'), "{opened}");
        assert_eq!(tap.ask("capabilities"), "0 0 0 0");
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        check_seen(&mut server, &mut tap, addr);
    }

    fn a_server_that_comes_back_in_another_cgroup_is_followed() {
        let (cgroup, server, mut tap, addr) = tapped(true);
        assert_eq!(tap.ask("check"), "None");
        let by_socket = tap.ask("located").ends_with(" Listener");
        drop(server);
        drop(cgroup);
        assert_eq!(tap.ask("check"), "Moved");
        assert!(tap.ask("located").ends_with(" NoListener"));
        let cgroup = TestCgroup::make();
        let mut server = Actor::start("server", Some(&cgroup));
        server.ask(&format!("listen 127.0.0.1 {}", addr.port()));
        check_seen(&mut server, &mut tap, addr);
        if by_socket {
            assert_eq!(tap.ask("check"), "Moved");
            check_located(&tap.ask("located"), &cgroup);
            assert_eq!(cgroup.attached(), [1, 1]);
        } else {
            // Without its capabilities the process cannot look for another one's cgroup, and stays with all of them.
            assert_eq!(tap.ask("check"), "None");
        }
        check_seen(&mut server, &mut tap, addr);
    }

    fn without_a_helper_a_server_that_moved_is_noticed() {
        let (cgroup, server, mut tap, addr) = tapped(false);
        assert_eq!(tap.ask("check"), "None");
        drop(server);
        drop(cgroup);
        let cgroup = TestCgroup::make();
        let mut server = Actor::start("server", Some(&cgroup));
        server.ask(&format!("listen 127.0.0.1 {}", addr.port()));
        assert_eq!(tap.ask("check"), "Stuck");
    }

    fn a_socket_stays_in_the_cgroup_in_which_it_was_made() {
        let elsewhere = TestCgroup::make();
        let (_cgroup, mut server, mut tap, addr) = tapped(true);
        std::fs::write(elsewhere.path().join("cgroup.procs"), server.pid().to_string()).expect("it moves");
        assert_eq!(tap.ask("check"), "None");
        check_seen(&mut server, &mut tap, addr);
    }

    const TESTS: &[(&str, fn())] = &[
        (
            "bytes_captured_are_those_sent_over_ipv4",
            bytes_captured_are_those_sent_over_ipv4,
        ),
        (
            "bytes_captured_are_those_sent_over_ipv6",
            bytes_captured_are_those_sent_over_ipv6,
        ),
        (
            "ipv6_extension_headers_are_skipped",
            ipv6_extension_headers_are_skipped,
        ),
        (
            "an_ipv4_client_of_an_ipv6_socket_is_seen_as_what_it_is",
            an_ipv4_client_of_an_ipv6_socket_is_seen_as_what_it_is,
        ),
        (
            "requests_are_cut_and_their_length_is_still_true",
            requests_are_cut_and_their_length_is_still_true,
        ),
        (
            "long_packets_come_in_parts_and_end_once",
            long_packets_come_in_parts_and_end_once,
        ),
        (
            "beginnings_ends_and_resets_are_seen",
            beginnings_ends_and_resets_are_seen,
        ),
        (
            "a_packet_s_time_lies_between_its_writing_and_its_reading",
            a_packet_s_time_lies_between_its_writing_and_its_reading,
        ),
        (
            "what_a_full_ring_loses_is_counted_to_the_byte",
            what_a_full_ring_loses_is_counted_to_the_byte,
        ),
        (
            "malformed_packets_are_counted_and_the_first_are_logged",
            malformed_packets_are_counted_and_the_first_are_logged,
        ),
        (
            "the_verifier_is_far_from_giving_up",
            the_verifier_is_far_from_giving_up,
        ),
        ("another_port_is_not_seen", another_port_is_not_seen),
        ("another_cgroup_is_not_seen", another_cgroup_is_not_seen),
        (
            "cgroups_are_found_by_path_unit_and_container",
            cgroups_are_found_by_path_unit_and_container,
        ),
        (
            "a_killed_process_leaves_nothing_attached",
            a_killed_process_leaves_nothing_attached,
        ),
        (
            "a_killed_process_leaves_nothing_attached_by_its_helper",
            a_killed_process_leaves_nothing_attached_by_its_helper,
        ),
        (
            "capabilities_are_gone_and_all_goes_on",
            capabilities_are_gone_and_all_goes_on,
        ),
        ("two_capabilities_are_enough", two_capabilities_are_enough),
        (
            "a_server_that_comes_back_in_another_cgroup_is_followed",
            a_server_that_comes_back_in_another_cgroup_is_followed,
        ),
        (
            "without_a_helper_a_server_that_moved_is_noticed",
            without_a_helper_a_server_that_moved_is_noticed,
        ),
        (
            "a_socket_stays_in_the_cgroup_in_which_it_was_made",
            a_socket_stays_in_the_cgroup_in_which_it_was_made,
        ),
    ];

    pub fn main() {
        play_attacher(attacher::serve);
        play(&[
            ("server", || Box::<Server>::default()),
            ("tap", || Box::<TapProcess>::default()),
        ]);
        keep_log();
        run(TESTS);
    }
}

#[cfg(target_os = "linux")]
fn main() {
    kernel::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {}
