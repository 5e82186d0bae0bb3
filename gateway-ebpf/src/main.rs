//! The kernel probe. It sees each packet that a watched cgroup's sockets get or send, and puts what belongs to a watched TCP port
//! into a ring, with the kernel's time: packets *to* the port are the request as it arrives, packets *from* the port the response
//! as it leaves. On loopback too, each byte is seen once.
//!
//! It promises that no packet is ever held up or dropped, that no record holds a byte that was not on the wire, and that what could
//! not be recorded is counted. It keeps no state between packets: connections, retransmits and order are the agent's affair.
//!
//! Programs can interrupt one another, even on one CPU: an egress program runs in its task's context, and a softirq brings an ingress
//! packet in the middle of it. So records are written straight into memory that the ring has reserved for them, never into a
//! scratch buffer of the CPU, and counters are added to atomically.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod counter;
mod diagnostic;
mod element;
mod headers;
mod packet;
mod record;
mod setting;

use crate::headers::Headers;
use crate::packet::Packet;
use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use core::mem::MaybeUninit;
use gateway_common::record::{EGRESS, INGRESS};

/// What a cgroup program answers to let a packet pass.
const PASS: i32 = 1;

/// Sees what arrives.
#[cgroup_skb(ingress)]
pub fn ingress(ctx: SkBuffContext) -> i32 {
    arrived::<true>(&ctx)
}

/// Sees what leaves.
#[cgroup_skb(egress)]
pub fn egress(ctx: SkBuffContext) -> i32 {
    left::<true>(&ctx)
}

/// As `ingress`, for who may not load a program that logs.
#[cgroup_skb(ingress)]
pub fn ingress_silent(ctx: SkBuffContext) -> i32 {
    arrived::<false>(&ctx)
}

/// As `egress`, likewise.
#[cgroup_skb(egress)]
pub fn egress_silent(ctx: SkBuffContext) -> i32 {
    left::<false>(&ctx)
}

#[inline(always)]
fn arrived<const LOGS: bool>(ctx: &SkBuffContext) -> i32 {
    if let Some(limit_bytes) = setting::ingress_prefix_bytes() {
        watch::<INGRESS, LOGS>(ctx, limit_bytes);
    }
    PASS
}

#[inline(always)]
fn left<const LOGS: bool>(ctx: &SkBuffContext) -> i32 {
    watch::<EGRESS, LOGS>(ctx, u32::MAX);
    PASS
}

/// Records a packet, if it is one of ours, with up to `limit_bytes` of its payload.
#[inline(always)]
fn watch<const DIRECTION: u8, const LOGS: bool>(ctx: &SkBuffContext, limit_bytes: u32) {
    // The socket knows its port, so that what is none of ours costs a load and a look: also the clients' side of a connection on this machine, whose
    // sockets have ports of their own.
    // A socket that is being torn down may have given its port back, and its reset is still to be seen.
    let port = local_port(ctx);
    if port != 0 && !setting::is_watched(port) {
        return;
    }
    let mut place = MaybeUninit::<Headers>::uninit();
    let (headers, is_loaded) = Headers::load(ctx, &mut place);
    if !is_loaded {
        return;
    }
    match packet::read::<DIRECTION>(ctx, headers) {
        Packet::Segment(segment) => record::put::<DIRECTION>(ctx, headers, &segment, limit_bytes),
        Packet::Other => {
            if let Some((packet_bytes, numbers)) = headers.known_malformed() {
                diagnostic::malformed::<DIRECTION, LOGS>(packet_bytes, &numbers);
            }
        }
    }
}

/// The port of the socket that gets or sends the packet: 16 bits, in a field that has 32.
#[inline(always)]
fn local_port(ctx: &SkBuffContext) -> u16 {
    ctx.skb.local_port() as u16
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that could come here.
    loop {}
}

/// Every helper that is called is open to programs of any licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"MIT\0";
