//! In which cgroup the sockets are that listen on a port. The kernel is asked itself (sock_diag(7)), which takes no privilege and tells the
//! cgroup that counts: the one in which the socket was made, which it keeps when its process moves on.

use rustix::net::netlink::SOCK_DIAG;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::io;

/// A listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listener {
    pub(super) port: u16,
    /// Number of its cgroup, which is the inode of the cgroup's directory.
    pub(super) cgroup: u64,
}

/// `linux/netlink.h`, `linux/sock_diag.h` and `linux/inet_diag.h`.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const INET_DIAG_CGROUP_ID: u16 = 21;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// The state `TCP_LISTEN` as a bit of a set.
const LISTENING: u32 = 1 << 10;

const MESSAGE_HEADER_BYTES: usize = 16;
/// `inet_diag_req_v2`, of which all but the first eight bytes stay zero: any address.
const REQUEST_BYTES: usize = 56;
/// `inet_diag_msg`, after which attributes come; its port stands behind four bytes.
const ANSWER_BYTES: usize = 72;

/// All listening TCP sockets of this network namespace whose cgroup the kernel tells (5.9 and later do).
pub(super) fn find() -> io::Result<Vec<Listener>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        ask(family, &mut found)?;
    }
    Ok(found)
}

fn ask(family: u8, found: &mut Vec<Listener>) -> io::Result<()> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(SOCK_DIAG),
    )?;
    send(&socket, &request(family), SendFlags::empty())?;
    // The kernel makes its answers no longer than 32 KiB.
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let (len, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        if read(&buffer[..len.min(buffer.len())], found)? {
            return Ok(());
        }
    }
}

fn request(family: u8) -> [u8; MESSAGE_HEADER_BYTES + REQUEST_BYTES] {
    let mut bytes = [0; MESSAGE_HEADER_BYTES + REQUEST_BYTES];
    let len = (MESSAGE_HEADER_BYTES + REQUEST_BYTES) as u32;
    bytes[0..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    bytes[16] = family;
    bytes[17] = IPPROTO_TCP;
    bytes[20..24].copy_from_slice(&LISTENING.to_ne_bytes());
    bytes
}

/// Reads some messages, and tells whether they were the last.
fn read(mut bytes: &[u8], found: &mut Vec<Listener>) -> io::Result<bool> {
    while let Some(header) = bytes.first_chunk::<MESSAGE_HEADER_BYTES>() {
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let message = bytes
            .get(MESSAGE_HEADER_BYTES..len)
            .ok_or(io::ErrorKind::InvalidData)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = message.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(io::Error::from_raw_os_error(code.saturating_neg()));
            }
            SOCK_DIAG_BY_FAMILY => found.extend(listener(message)),
            _ => {}
        }
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
    }
    Ok(false)
}

/// Messages and attributes begin at multiples of four.
fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

fn listener(message: &[u8]) -> Option<Listener> {
    let port = u16::from_be_bytes([*message.get(4)?, *message.get(5)?]);
    let mut attributes = message.get(ANSWER_BYTES..)?;
    loop {
        let header = attributes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = attributes.get(4..len)?;
        if u16::from_ne_bytes([header[2], header[3]]) == INET_DIAG_CGROUP_ID {
            let cgroup = u64::from_ne_bytes(*value.first_chunk()?);
            return Some(Listener { port, cgroup });
        }
        attributes = attributes.get(aligned(len)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;

    #[test]
    fn a_socket_that_listens_is_found_with_its_cgroup() {
        for ip in ["127.0.0.1", "::1"] {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            let ours = || {
                find()
                    .unwrap()
                    .into_iter()
                    .filter(move |found| found.port == port)
            };
            assert_eq!(ours().count(), 1);
            assert!(ours().all(|found| found.cgroup != 0));
            drop(listener);
            assert_eq!(ours().count(), 0);
        }
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let len = (MESSAGE_HEADER_BYTES + body.len()) as u32;
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn an_error_of_the_kernel_is_an_error() {
        let bytes = message(NLMSG_ERROR, &(-2_i32).to_ne_bytes());
        let error = read(&bytes, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn attributes_are_skipped_until_the_cgroup_comes() {
        let mut body = vec![0; ANSWER_BYTES];
        body[4..6].copy_from_slice(&8000_u16.to_be_bytes());
        for (kind, value) in [(8, &[1][..]), (INET_DIAG_CGROUP_ID, &77_u64.to_ne_bytes()[..])] {
            body.extend((4 + value.len() as u16).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(value);
            body.resize(aligned(body.len()), 0);
        }
        let expected = Listener {
            port: 8000,
            cgroup: 77,
        };
        let mut found = Vec::new();
        let bytes = [message(SOCK_DIAG_BY_FAMILY, &body), message(NLMSG_DONE, &[0; 4])].concat();
        assert!(read(&bytes, &mut found).unwrap());
        assert_eq!(found, [expected]);
    }

    proptest! {
        #[test]
        fn no_bytes_are_read_past_their_end(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300), kind in prop::sample::select(vec![2_u16, 3, 20]), len in 0_u32..300,
        ) {
            if bytes.len() >= MESSAGE_HEADER_BYTES {
                bytes[0..4].copy_from_slice(&len.to_ne_bytes());
                bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            }
            let _ = read(&bytes, &mut Vec::new());
        }
    }
}
