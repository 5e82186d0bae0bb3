//! Which process listens on an address, by `/proc`: the kernel's socket tables give an inode, and a process that holds the socket
//! has a descriptor that points to it. Only processes of the same user (or of all, for root) can be seen.
//!
//! Each network namespace, and so each container with a network of its own, has its own tables.

use super::Owner;
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// `TCP_LISTEN` in the state column of the tables.
const LISTENING: &str = "0A";

/// Who listens on `addr`, or on its port everywhere (either would be in the way).
pub(super) fn find(addr: SocketAddr) -> Owner {
    owner(holder_of(&sockets("self", addr)))
}

/// Who listens on `addr` in another network namespace of this machine, one that has this address.
pub(super) fn find_in_containers(addr: SocketAddr) -> Owner {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let mut seen: BTreeSet<_> = namespace("self").into_iter().collect();
    let holder = processes().find_map(|pid| {
        let process = pid.to_string();
        let is_new = seen.insert(namespace(&process)?);
        let is_its = is_new && has_address(&process, addr.ip());
        is_its.then(|| holder_of(&sockets(&process, addr)))?
    });
    owner(holder)
}

fn owner(holder: Option<u32>) -> Owner {
    let Some(pid) = holder else {
        return Owner::Unknown;
    };
    if pid == std::process::id() {
        return Owner::Ourselves;
    }
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Owner::Process {
        pid,
        name: name.trim_end().to_owned(),
    }
}

/// Whether anyone does in this network namespace, seen or not.
pub(super) fn is_listened_on(addr: SocketAddr) -> bool {
    !sockets("self", addr).is_empty()
}

/// The listening sockets in the way of `addr`, in the network of a process, as its descriptors name them.
fn sockets(process: &str, addr: SocketAddr) -> Vec<String> {
    ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/{process}/net/{table}")).ok())
        .flat_map(|table| listening_on(&table, addr))
        .map(|inode| format!("socket:[{inode}]"))
        .collect()
}

/// Whether an address is one of the network of a process.
fn has_address(process: &str, ip: IpAddr) -> bool {
    let read = |table| fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap_or_default();
    match ip {
        IpAddr::V4(_) => is_local_in(&read("fib_trie"), ip),
        IpAddr::V6(ip) => {
            let digits: String = ip.octets().iter().map(|octet| format!("{octet:02x}")).collect();
            read("if_inet6").lines().any(|line| line.starts_with(&digits))
        }
    }
}

/// The table of routes is a tree; what an address is, stands on the line below it.
fn is_local_in(fib_trie: &str, ip: IpAddr) -> bool {
    let leaf = format!("|-- {ip}");
    let lines = fib_trie.lines().zip(fib_trie.lines().skip(1));
    lines
        .filter(|(address, _)| address.trim_start() == leaf)
        .any(|(_, what)| what.trim() == "/32 host LOCAL")
}

/// The inodes of listening sockets in the way of `addr`. Columns: slot, local address, remote address, state, two of queues and
/// timers, retransmits, user, timeout, inode.
fn listening_on(table: &str, addr: SocketAddr) -> Vec<String> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| in_the_way(line, addr))
        .map(str::to_owned)
        .collect()
}

fn in_the_way(line: &str, addr: SocketAddr) -> Option<&str> {
    let columns: Vec<&str> = line.split_ascii_whitespace().collect();
    let (address, port) = columns.get(1)?.split_once(':')?;
    let same_port = u16::from_str_radix(port, 16).ok()? == addr.port();
    let everywhere = address.bytes().all(|digit| digit == b'0');
    let clashes = everywhere || addr.ip().is_unspecified() || address == in_table(addr);
    let inode = columns.get(9).copied()?;
    (same_port && clashes && *columns.get(3)? == LISTENING).then_some(inode)
}

/// The address in the tables' notation: 32-bit words in the machine's own byte order, in hexadecimal.
fn in_table(addr: SocketAddr) -> String {
    let octets = match addr {
        SocketAddr::V4(addr) => addr.ip().octets().to_vec(),
        SocketAddr::V6(addr) => addr.ip().octets().to_vec(),
    };
    let words = octets
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    words.map(|word| format!("{word:08X}")).collect()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
}

fn holder_of(sockets: &[String]) -> Option<u32> {
    // Without a socket there is nothing to look for, and looking takes a while where many processes run.
    let mut pids = processes().take_while(|_| !sockets.is_empty());
    pids.find(|pid| holds(Path::new(&format!("/proc/{pid}/fd")), sockets).unwrap_or(false))
}

fn holds(descriptors: &Path, sockets: &[String]) -> Option<bool> {
    let mut descriptors = fs::read_dir(descriptors).ok()?.flatten();
    Some(descriptors.any(|descriptor| {
        let target = fs::read_link(descriptor.path()).unwrap_or_default();
        sockets.iter().any(|socket| Path::new(socket) == target)
    }))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:24F8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 501 1 0 100 0 0 10 0
   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 502 1 0 100 0 0 10 0
   2: 0100007F:24F8 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 503 1 0 100 0 0 10 0
   3: 0200007F:24F8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 504 1 0 100 0 0 10 0
   4: short";

    #[test]
    fn only_listeners_in_the_way_count() {
        let inodes = |addr: &str| listening_on(TABLE, addr.parse().unwrap());
        assert_eq!(
            inodes("127.0.0.1:9464"),
            ["501"],
            "neither a connection nor another address"
        );
        assert_eq!(
            inodes("10.1.2.3:8080"),
            ["502"],
            "who listens everywhere listens there too"
        );
        assert_eq!(
            inodes("0.0.0.0:9464"),
            ["501", "504"],
            "everywhere clashes with each"
        );
        assert!(inodes("127.0.0.1:9465").is_empty());
    }

    #[test]
    fn an_address_is_local_only_where_its_own_line_says_so() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 172.17.0.0\n        /16 link UNICAST\n     |-- 172.17.0.2\n        /32 host LOCAL\n\
                    |-- 172.17.255.255\n        /32 link BROADCAST\n";
        let is_local = |ip: &str| is_local_in(trie, ip.parse().unwrap());
        assert!(is_local("172.17.0.2"));
        assert!(!is_local("172.17.0.0") && !is_local("172.17.255.255") && !is_local("172.17.0.20"));
    }

    #[test]
    fn addresses_are_written_as_the_kernel_writes_them() {
        assert_eq!(in_table("127.0.0.1:1".parse().unwrap()), "0100007F");
        assert_eq!(
            in_table("[::1]:1".parse().unwrap()),
            "00000000000000000000000001000000"
        );
    }
}
