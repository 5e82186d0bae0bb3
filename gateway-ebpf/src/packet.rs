//! Finds a TCP segment in a packet. The packet begins with its IP header: cgroup programs see no link layer.
//!
//! Headers are read as words, which is how they are laid out. From bytes the compiler makes a load, a store to the stack and a load from there for
//! each, which took longer than all that the kernel does for the probe.

use crate::headers::{Address, Headers, Malformed};
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

/// A TCP segment. What else its headers say is read from them.
pub struct Segment {
    /// Where in the packet its payload begins.
    pub payload_at: u32,
    pub payload_bytes: u32,
}

/// Reads a packet that goes in `DIRECTION`; what is wrong with it goes in the place of its headers.
#[inline(always)]
pub fn read<const DIRECTION: u8>(ctx: &SkBuffContext, headers: &mut Headers) -> Packet {
    let header = headers.ip();
    let tcp_at = match header[0] >> 28 {
        4 => ipv4(ctx, header, headers),
        6 => ipv6(ctx, header, headers),
        _ => return Packet::Other,
    };
    match tcp_at {
        Ok(tcp_at) => tcp::<DIRECTION>(ctx, tcp_at, headers),
        Err(packet) => packet,
    }
}

/// Where TCP begins.
#[inline(always)]
fn ipv4(ctx: &SkBuffContext, header: [u32; 5], headers: &mut Headers) -> Result<u32, Packet> {
    if (header[2] >> 16) as u8 != PROTOCOL_TCP {
        return Err(Packet::Other);
    }
    let header_bytes = (header[0] >> 24 & 0xf) * 4;
    // A fragment but the first has no TCP header; on the way in and out they are whole, so that none should come.
    let fragment = header[1] & 0x1fff;
    if header_bytes < 20 || fragment != 0 {
        let malformed = Malformed {
            tcp_at_bytes: header_bytes,
            fragment,
            ..Malformed::default()
        };
        headers.malformed(ctx.len(), malformed);
        return Err(Packet::Other);
    }
    headers.source = mapped(header[3]);
    headers.destination = mapped(header[4]);
    Ok(header_bytes)
}

/// An IPv4 address in IPv6's form (RFC 4291 §2.5.5.2). The target's numbers begin with their low byte.
#[inline(always)]
fn mapped(address: u32) -> Address {
    [
        0,
        u64::from(address.to_be()) << 32 | u64::from(0xffff_u32.to_be()),
    ]
}

/// Where TCP begins.
#[inline(always)]
fn ipv6(ctx: &SkBuffContext, header: [u32; 5], headers: &mut Headers) -> Result<u32, Packet> {
    let tcp_at = skip_extensions(ctx, headers, (header[1] >> 8) as u8)?;
    if ctx.len() < IPV6_HEADER_BYTES {
        let malformed = Malformed {
            tcp_at_bytes: tcp_at,
            ..Malformed::default()
        };
        headers.malformed(ctx.len(), malformed);
        return Err(Packet::Other);
    }
    Ok(tcp_at)
}

/// Where TCP begins, behind the extension headers, of which the first is `next`.
#[inline(always)]
fn skip_extensions(ctx: &SkBuffContext, headers: &mut Headers, next: u8) -> Result<u32, Packet> {
    let mut place = Extension {
        next,
        at: IPV6_HEADER_BYTES,
    };
    // Written out: a verifier that also follows wrong guesses of the processor would follow the one that a loop goes on for ever.
    macro_rules! skip {
        ($($extension:literal)*) => {
            const _: () = assert!([$($extension),*].len() == EXTENSIONS_MAX);
            $(
                // It has no use for the number.
                let _ = $extension;
                if place.next == PROTOCOL_TCP {
                    return Ok(place.at);
                }
                place = place.skip(ctx, headers)?;
            )*
        };
    }
    skip!(1 2 3 4 5 6);
    if place.next == PROTOCOL_TCP {
        return Ok(place.at);
    }
    Err(Packet::Other)
}

/// A place among the extension headers.
struct Extension {
    /// What begins there.
    next: u8,
    at: u32,
}

impl Extension {
    /// The place behind the extension header that begins here; none, if what begins here is no such header.
    #[inline(always)]
    fn skip(self, ctx: &SkBuffContext, headers: &mut Headers) -> Result<Self, Packet> {
        if !matches!(
            self.next,
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
        ) {
            return Err(Packet::Other);
        }
        // Whether TCP would have followed is not known.
        let header = headers.load_extension(ctx, self.at).ok_or(Packet::Other)?;
        let len_bytes = match self.next {
            FRAGMENT if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 => {
                return Err(Packet::Other);
            }
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(header[1]) + 2) * 4,
            _ => (u32::from(header[1]) + 1) * 8,
        };
        Ok(Self {
            next: header[0],
            at: self.at + len_bytes,
        })
    }
}

#[inline(always)]
fn tcp<const DIRECTION: u8>(ctx: &SkBuffContext, tcp_at: u32, headers: &mut Headers) -> Packet {
    if !headers.load_tcp(ctx, tcp_at) {
        let malformed = Malformed {
            tcp_at_bytes: tcp_at,
            ..Malformed::default()
        };
        headers.malformed(ctx.len(), malformed);
        return Packet::Other;
    }
    let header_bytes = (u32::from_be(headers.tcp[3]) >> 28) * 4;
    let payload_at = tcp_at + header_bytes;
    let (source_port, destination_port) = ports(headers);
    // The packet's own length, not what the IP header says, which has no room for that of a BIG TCP packet.
    if header_bytes < TCP_HEADER_BYTES || payload_at > ctx.len() {
        let malformed = Malformed {
            tcp_at_bytes: tcp_at,
            fragment: 0,
            tcp_header_bytes: header_bytes,
            source_port,
            destination_port,
        };
        headers.malformed(ctx.len(), malformed);
        return Packet::Other;
    }
    // No packet is longer than the mask. It lets the verifier forget on which of many ways through the headers it came here: without it,
    // it would go through the rest once for each, which is most of the million steps that it takes at most.
    let payload_bytes = (ctx.len() - payload_at) & PAYLOAD_MASK;
    let server_port = if DIRECTION == INGRESS {
        destination_port
    } else {
        source_port
    };
    // A bare acknowledgement says nothing that the payload's own time does not.
    if !is_watched(server_port) || (payload_bytes == 0 && flags(headers) == 0) {
        return Packet::Other;
    }
    Packet::Segment(Segment {
        payload_at,
        payload_bytes,
    })
}

/// The ports of the sender and of the receiver.
#[inline(always)]
pub fn ports(headers: &Headers) -> (u16, u16) {
    let ports = u32::from_be(headers.tcp[0]);
    ((ports >> 16) as u16, ports as u16)
}

/// TCP's flags (RFC 9293 §3.1) in the record's bits.
#[inline(always)]
pub fn flags(headers: &Headers) -> u8 {
    let byte = (u32::from_be(headers.tcp[3]) >> 16) as u8;
    let bit = |mask: u8, flag: u8| if byte & mask != 0 { flag } else { 0 };
    bit(0x02, SYN) | bit(0x01, FIN) | bit(0x04, RST)
}
