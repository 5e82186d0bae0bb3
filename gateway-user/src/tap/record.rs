//! Reads the probe's records. They come from the kernel, and are still not trusted: an object of another version, or a fault in it, must
//! show as a count and not as wrong facts.

use super::segment::Segment;
use crate::wire::At;
use crate::wire::connection::Direction;
use gateway_common::record::{EGRESS, FIN, HEADER_BYTES, INGRESS, PART_BYTES, RST, Record, SYN, VERSION};
use std::mem::offset_of;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The segment that an entry of the ring holds; `None` for one that does not keep to the layout.
pub(super) fn parse(entry: &[u8]) -> Option<Segment<'_>> {
    let (header, payload) = entry.split_first_chunk::<HEADER_BYTES>()?;
    let len_bytes = u32::from_ne_bytes(field(header, offset_of!(Record, len_bytes)));
    let captured_bytes = u32::from_ne_bytes(field(header, offset_of!(Record, captured_bytes)));
    let flags = header[offset_of!(Record, flags)];
    let direction = match header[offset_of!(Record, direction)] {
        INGRESS => Direction::ToServer,
        EGRESS => Direction::ToClient,
        _ => return None,
    };
    let sound = header[offset_of!(Record, version)] == VERSION
        && header[offset_of!(Record, reserved)] == 0
        && flags & !(SYN | FIN | RST) == 0
        && captured_bytes <= len_bytes.min(PART_BYTES);
    if !sound {
        return None;
    }
    let address = |at, port| {
        let ip = Ipv6Addr::from(field::<16>(header, at)).to_canonical();
        let port = u16::from_ne_bytes(field(header, port));
        address(ip, port)
    };
    Some(Segment {
        at: At(u64::from_ne_bytes(field(header, offset_of!(Record, time_ns)))),
        client: address(offset_of!(Record, client), offset_of!(Record, client_port)),
        server: address(offset_of!(Record, server), offset_of!(Record, server_port)),
        direction,
        syn: flags & SYN != 0,
        fin: flags & FIN != 0,
        rst: flags & RST != 0,
        sequence: u32::from_ne_bytes(field(header, offset_of!(Record, sequence))),
        len_bytes,
        captured: payload.get(..captured_bytes as usize)?,
    })
}

fn address(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// The bytes of the field at `at`.
fn field<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}
