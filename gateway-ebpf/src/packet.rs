//! Finds a TCP segment in a packet. The packet begins with its IP header: cgroup programs see no link layer.
//!
//! Headers are read as words, which is how they are laid out. From bytes the compiler makes a load, a store to the stack and a load from there for
//! each, which took longer than all that the kernel does for the probe.

use crate::diagnostic::Malformed;
use crate::setting::is_watched;
use aya_ebpf::programs::SkBuffContext;
use gateway_common::record::{FIN, INGRESS, RST, SYN};

const PROTOCOL_TCP: u8 = 6;
const IPV6_HEADER_BYTES: u32 = 40;
const TCP_HEADER_BYTES: u32 = 20;

/// Twice the length of the longest packet that Linux makes, less one.
const PAYLOAD_MASK: u32 = (1 << 20) - 1;

/// IPv6 extension headers (RFC 8200 §4, RFC 4302).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Most of them before TCP: each but Destination Options may come once, that one twice.
const EXTENSIONS_MAX: usize = 6;

/// What a packet is.
pub enum Packet {
    /// A segment of a watched port that says something.
    Segment(Segment),
    /// None of our business; or it says it is TCP, and its headers make no sense, which is told apart.
    Other,
}

/// An address in IPv6's form, as it lies in memory.
pub type Address = [u32; 4];

/// A TCP segment.
pub struct Segment {
    pub client: Address,
    pub server: Address,
    pub client_port: u16,
    pub server_port: u16,
    pub sequence: u32,
    pub flags: u8,
    /// Where in the packet its payload begins.
    pub payload_at: u32,
    pub payload_bytes: u32,
}

/// What the IP header says.
struct Ip {
    source: Address,
    destination: Address,
    tcp_at: u32,
}

/// Reads a packet that goes in `DIRECTION`; what is wrong with it goes to `wrong`.
#[inline(always)]
pub fn read<const DIRECTION: u8>(ctx: &SkBuffContext, wrong: &mut Malformed<DIRECTION>) -> Packet {
    // As long as IPv4's, and half of IPv6's.
    let Ok(header) = ctx.load::<[u32; 5]>(0) else {
        return Packet::Other;
    };
    let header = header.map(u32::from_be);
    let ip = match header[0] >> 28 {
        4 => ipv4(ctx, header, wrong),
        6 => ipv6(ctx, header, wrong),
        _ => return Packet::Other,
    };
    match ip {
        Ok(ip) => tcp(ctx, ip, wrong),
        Err(packet) => packet,
    }
}

#[inline(always)]
fn ipv4<const DIRECTION: u8>(
    ctx: &SkBuffContext,
    header: [u32; 5],
    wrong: &mut Malformed<DIRECTION>,
) -> Result<Ip, Packet> {
    if (header[2] >> 16) as u8 != PROTOCOL_TCP {
        return Err(Packet::Other);
    }
    let header_bytes = (header[0] >> 24 & 0xf) * 4;
    // A fragment but the first has no TCP header; on the way in and out they are whole, so that none should come.
    let fragment = header[1] & 0x1fff;
    if header_bytes < 20 || fragment != 0 {
        wrong.set([ctx.len(), header_bytes, fragment, 0, 0, 0]);
        return Err(Packet::Other);
    }
    Ok(Ip {
        source: mapped(header[3]),
        destination: mapped(header[4]),
        tcp_at: header_bytes,
    })
}

/// An IPv4 address in IPv6's form (RFC 4291 §2.5.5.2).
#[inline(always)]
fn mapped(address: u32) -> Address {
    [0, 0, 0xffff_u32.to_be(), address.to_be()]
}

#[inline(always)]
fn ipv6<const DIRECTION: u8>(
    ctx: &SkBuffContext,
    header: [u32; 5],
    wrong: &mut Malformed<DIRECTION>,
) -> Result<Ip, Packet> {
    let tcp_at = skip_extensions(ctx, (header[1] >> 8) as u8)?;
    let Ok([source, destination]) = ctx.load::<[Address; 2]>(8) else {
        wrong.set([ctx.len(), tcp_at, 0, 0, 0, 0]);
        return Err(Packet::Other);
    };
    Ok(Ip {
        source,
        destination,
        tcp_at,
    })
}

/// Where TCP begins, behind the extension headers, of which the first is `next`.
#[inline(always)]
fn skip_extensions(ctx: &SkBuffContext, mut next: u8) -> Result<u32, Packet> {
    let mut at = IPV6_HEADER_BYTES;
    for _ in 0..=EXTENSIONS_MAX {
        if next == PROTOCOL_TCP {
            return Ok(at);
        }
        if !matches!(
            next,
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
        ) {
            return Err(Packet::Other);
        }
        // Whether TCP would have followed is not known.
        let header: [u8; 4] = ctx.load(at as usize).map_err(|_| Packet::Other)?;
        at += match next {
            FRAGMENT if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 => {
                return Err(Packet::Other);
            }
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(header[1]) + 2) * 4,
            _ => (u32::from(header[1]) + 1) * 8,
        };
        next = header[0];
    }
    Err(Packet::Other)
}

#[inline(always)]
fn tcp<const DIRECTION: u8>(ctx: &SkBuffContext, ip: Ip, wrong: &mut Malformed<DIRECTION>) -> Packet {
    let Ok(header) = ctx.load::<[u32; TCP_HEADER_BYTES as usize / 4]>(ip.tcp_at as usize) else {
        wrong.set([ctx.len(), ip.tcp_at, 0, 0, 0, 0]);
        return Packet::Other;
    };
    let header = header.map(u32::from_be);
    let (source_port, destination_port) = ((header[0] >> 16) as u16, header[0] as u16);
    let (client, client_port, server, server_port) = if DIRECTION == INGRESS {
        (ip.source, source_port, ip.destination, destination_port)
    } else {
        (ip.destination, destination_port, ip.source, source_port)
    };
    let header_bytes = (header[3] >> 28) * 4;
    let payload_at = ip.tcp_at + header_bytes;
    // The packet's own length, not what the IP header says, which has no room for that of a BIG TCP packet.
    if header_bytes < TCP_HEADER_BYTES || payload_at > ctx.len() {
        wrong.set([
            ctx.len(),
            ip.tcp_at,
            0,
            header_bytes,
            source_port.into(),
            destination_port.into(),
        ]);
        return Packet::Other;
    }
    // No packet is longer than the mask. It lets the verifier forget on which of many ways through the headers it came here: without it,
    // it would go through the rest once for each, which is most of the million steps that it takes at most.
    let payload_bytes = (ctx.len() - payload_at) & PAYLOAD_MASK;
    let flags = flags((header[3] >> 16) as u8);
    // A bare acknowledgement says nothing that the payload's own time does not.
    if !is_watched(server_port) || (payload_bytes == 0 && flags == 0) {
        return Packet::Other;
    }
    Packet::Segment(Segment {
        client,
        server,
        client_port,
        server_port,
        sequence: header[1],
        flags,
        payload_at,
        payload_bytes,
    })
}

/// TCP's flags (RFC 9293 §3.1) in the record's bits.
#[inline(always)]
fn flags(byte: u8) -> u8 {
    let bit = |mask: u8, flag: u8| if byte & mask != 0 { flag } else { 0 };
    bit(0x02, SYN) | bit(0x01, FIN) | bit(0x04, RST)
}
