//! Which process listens on an address, by `/proc`: the kernel's socket tables give an inode, and a process that holds the socket
//! has a descriptor that points to it. Only processes of the same user (or of all, for root) can be seen.

use super::Owner;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

/// `TCP_LISTEN` in the state column of the tables.
const LISTENING: &str = "0A";

/// Who listens on `addr`, or on its port everywhere (either would be in the way).
pub(super) fn find(addr: SocketAddr) -> Owner {
    let sockets: Vec<String> = sockets_on(addr)
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let Some(pid) = holder_of(&sockets) else {
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

/// Whether anyone does, seen or not.
pub(super) fn is_listened_on(addr: SocketAddr) -> bool {
    sockets_on(addr).next().is_some()
}

/// The inodes of the sockets that listen there.
fn sockets_on(addr: SocketAddr) -> impl Iterator<Item = String> {
    ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(move |table| listening_on(&table, addr))
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

fn holder_of(sockets: &[String]) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
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
    fn addresses_are_written_as_the_kernel_writes_them() {
        assert_eq!(in_table("127.0.0.1:1".parse().unwrap()), "0100007F");
        assert_eq!(
            in_table("[::1]:1".parse().unwrap()),
            "00000000000000000000000001000000"
        );
    }
}
