//! Finds a TCP segment in a packet. The packet begins with its IP header: cgroup programs see no link layer.

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

/// A TCP segment.
pub struct Segment {
    pub client: [u8; 16],
    pub server: [u8; 16],
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
    source: [u8; 16],
    destination: [u8; 16],
    tcp_at: u32,
}

/// Reads a packet that goes in `DIRECTION`; what is wrong with it goes to `wrong`.
#[inline(always)]
pub fn read<const DIRECTION: u8>(ctx: &SkBuffContext, wrong: &mut Malformed<DIRECTION>) -> Packet {
    let ip = match ctx.load::<u8>(0).map(|first| first >> 4) {
        Ok(4) => ipv4(ctx, wrong),
        Ok(6) => ipv6(ctx, wrong),
        _ => return Packet::Other,
    };
    match ip {
        Ok(ip) => tcp(ctx, ip, wrong),
        Err(packet) => packet,
    }
}

#[inline(always)]
fn ipv4<const DIRECTION: u8>(ctx: &SkBuffContext, wrong: &mut Malformed<DIRECTION>) -> Result<Ip, Packet> {
    let header: [u8; 20] = ctx.load(0).map_err(|_| Packet::Other)?;
    if header[9] != PROTOCOL_TCP {
        return Err(Packet::Other);
    }
    let header_bytes = u32::from(header[0] & 0xf) * 4;
    // A fragment but the first has no TCP header; on the way in and out they are whole, so that none should come.
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
    if header_bytes < 20 || fragment != 0 {
        wrong.set([ctx.len(), header_bytes, fragment.into(), 0, 0, 0]);
        return Err(Packet::Other);
    }
    Ok(Ip {
        source: mapped([header[12], header[13], header[14], header[15]]),
        destination: mapped([header[16], header[17], header[18], header[19]]),
        tcp_at: header_bytes,
    })
}

/// An IPv4 address in IPv6's form (RFC 4291 §2.5.5.2).
#[inline(always)]
fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

#[inline(always)]
fn ipv6<const DIRECTION: u8>(ctx: &SkBuffContext, wrong: &mut Malformed<DIRECTION>) -> Result<Ip, Packet> {
    let next: u8 = ctx.load(6).map_err(|_| Packet::Other)?;
    let tcp_at = skip_extensions(ctx, next)?;
    let (Ok(source), Ok(destination)) = (ctx.load(8), ctx.load(24)) else {
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
    let Ok(header) = ctx.load::<[u8; TCP_HEADER_BYTES as usize]>(ip.tcp_at as usize) else {
        wrong.set([ctx.len(), ip.tcp_at, 0, 0, 0, 0]);
        return Packet::Other;
    };
    let source_port = u16::from_be_bytes([header[0], header[1]]);
    let destination_port = u16::from_be_bytes([header[2], header[3]]);
    let (client, client_port, server, server_port) = if DIRECTION == INGRESS {
        (ip.source, source_port, ip.destination, destination_port)
    } else {
        (ip.destination, destination_port, ip.source, source_port)
    };
    let header_bytes = u32::from(header[12] >> 4) * 4;
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
    let flags = flags(header[13]);
    // A bare acknowledgement says nothing that the payload's own time does not.
    if !is_watched(server_port) || (payload_bytes == 0 && flags == 0) {
        return Packet::Other;
    }
    Packet::Segment(Segment {
        client,
        server,
        client_port,
        server_port,
        sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
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
