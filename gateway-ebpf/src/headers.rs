//! A packet's headers, where the kernel puts them. They stay there until they are written into a record.
//!
//! Whoever loads the probe without CAP_PERFMON has the processor wait after each store to the stack that is the first to its place, since it may
//! guess wrongly what was there before. What the kernel itself put there is no such store. So what the headers say is left where it lies and read
//! again when it is needed, and what is written for only some packets goes where the headers of all have been.

use aya_ebpf::{EbpfContext, helpers::bpf_skb_load_bytes, programs::SkBuffContext};
use core::mem::MaybeUninit;

/// An address in IPv6's form, as it lies in memory.
pub type Address = [u64; 2];

/// IPv6's header, or IPv4's and what follows it.
const IP_BYTES: usize = 40;
/// IPv4's, without options.
const IPV4_BYTES: usize = 20;

/// The headers of a packet.
#[repr(C, align(8))]
pub struct Headers {
    /// The IP header, as it came.
    first: u64,
    /// The addresses, which stand here in IPv6's header; IPv4's are put here in IPv6's form.
    pub source: Address,
    pub destination: Address,
    /// TCP's, as it came.
    pub tcp: [u32; 5],
    /// An extension header's first bytes.
    extension: u32,
    /// Length of a packet that says it is TCP and is not; 0 while none was seen.
    malformed_bytes: u64,
}

/// What is known of a malformed packet. What of it was not read is 0.
#[derive(Default)]
pub struct Malformed {
    /// Where in the packet TCP should begin.
    pub tcp_at_bytes: u32,
    /// What IPv4 says of a fragment's place, in units of eight bytes.
    pub fragment: u32,
    pub tcp_header_bytes: u32,
    pub source_port: u16,
    pub destination_port: u16,
}

impl Headers {
    /// Those of a packet, as far as IPv4's header goes, and IPv6's if it is as long; none, if it is shorter than IPv4's.
    #[inline(always)]
    pub fn load<'a>(ctx: &SkBuffContext, place: &'a mut MaybeUninit<Self>) -> (&'a mut Self, bool) {
        let headers = place.as_mut_ptr();
        unsafe {
            (&raw mut (*headers).malformed_bytes).write_volatile(0);
            // Where the packet is too short the kernel writes zeros.
            let is_loaded =
                load(ctx, 0, headers.cast(), IP_BYTES) || load(ctx, 0, headers.cast(), IPV4_BYTES);
            (&mut *headers, is_loaded)
        }
    }

    /// The first words of the IP header.
    #[inline(always)]
    pub fn ip(&self) -> [u32; 5] {
        let words: [u32; 5] = unsafe { (&raw const *self).cast::<[u32; 5]>().read() };
        words.map(u32::from_be)
    }

    /// Loads TCP's header, if it is there.
    #[inline(always)]
    pub fn load_tcp(&mut self, ctx: &SkBuffContext, at_bytes: u32) -> bool {
        unsafe { load(ctx, at_bytes, (&raw mut self.tcp).cast(), size_of_val(&self.tcp)) }
    }

    /// The first bytes of an extension header, if they are there.
    #[inline(always)]
    pub fn load_extension(&mut self, ctx: &SkBuffContext, at_bytes: u32) -> Option<[u8; 4]> {
        let place = &raw mut self.extension;
        let is_loaded = unsafe { load(ctx, at_bytes, place.cast(), size_of::<u32>()) };
        is_loaded.then(|| self.extension.to_ne_bytes())
    }

    /// Puts down what is known of a packet in place of its headers, which have no meaning then.
    #[inline(always)]
    pub fn malformed(&mut self, packet_bytes: u32, malformed: Malformed) {
        let numbers: [u64; 5] = [
            malformed.tcp_at_bytes.into(),
            malformed.fragment.into(),
            malformed.tcp_header_bytes.into(),
            malformed.source_port.into(),
            malformed.destination_port.into(),
        ];
        let place = (&raw mut *self).cast::<u64>();
        // One by one, so that none is left to a function that the compiler would call; and as wide as the stack's places, which older verifiers
        // let be written over only as a whole.
        unsafe {
            (&raw mut self.malformed_bytes).write_volatile(packet_bytes.into());
            for (at, number) in numbers.into_iter().enumerate() {
                place.add(at).write_volatile(number);
            }
        }
    }

    /// What was put down, and the packet's length; none, if nothing was.
    #[inline(always)]
    pub fn known_malformed(&self) -> Option<(u32, [u32; 5])> {
        let packet_bytes = unsafe { (&raw const self.malformed_bytes).read_volatile() };
        let numbers = (&raw const *self).cast::<[u64; 5]>();
        (packet_bytes != 0).then(|| {
            let numbers = unsafe { numbers.read() };
            (packet_bytes as u32, numbers.map(|number| number as u32))
        })
    }
}

/// Copies a piece of the packet, if it is there.
#[inline(always)]
unsafe fn load(ctx: &SkBuffContext, at_bytes: u32, place: *mut core::ffi::c_void, len_bytes: usize) -> bool {
    unsafe { bpf_skb_load_bytes(ctx.as_ptr(), at_bytes, place, len_bytes as u32) == 0 }
}
