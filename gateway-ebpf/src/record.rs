//! Puts a segment into the ring, in as many records as it takes.

use crate::counter::{Direction, Loss};
use crate::headers::{Address, Headers};
use crate::packet::{self, Segment};
use aya_ebpf::{
    EbpfContext,
    bindings::BPF_RB_NO_WAKEUP,
    helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    macros::map,
    maps::RingBuf,
    programs::SkBuffContext,
};
use core::arch::asm;
use gateway_common::record::{FIN, INGRESS, PART_BYTES, PARTS_MAX, RST, Record, SYN, VERSION};

/// The agent gives it the size that is configured.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// The agent looks at the ring by itself, every few milliseconds: to wake it for each record would cost more than everything else
/// here together.
const NO_WAKEUP: u64 = BPF_RB_NO_WAKEUP as u64;

/// A record with room for `N` bytes of payload.
#[repr(C)]
struct Entry<const N: usize> {
    record: Record,
    bytes: [u8; N],
}

/// Records a segment, with up to `limit_bytes` of its payload. With a part that is lost the rest of the segment is lost too: a ring that is full
/// will not have room for it, and for the verifier there is one way through the parts, not three to the power of their number.
#[inline(always)]
pub fn put<const DIRECTION: u8>(ctx: &SkBuffContext, headers: &Headers, segment: &Segment, limit_bytes: u32) {
    let Some(counters) = Direction::here(DIRECTION) else {
        return;
    };
    counters.packet(segment.payload_bytes);
    let parts = Parts::<DIRECTION> {
        ctx,
        headers,
        segment,
        counters,
        time_ns: unsafe { bpf_ktime_get_ns() },
        wanted_bytes: segment.payload_bytes.min(limit_bytes),
    };
    if let Err((loss, offset_bytes)) = parts.put() {
        let left_bytes = parts.wanted_bytes - offset_bytes;
        let records = left_bytes.div_ceil(PART_BYTES).max(1);
        counters.lost(loss, records, segment.payload_bytes - offset_bytes);
    }
}

/// A segment on its way into the ring.
struct Parts<'a, const DIRECTION: u8> {
    ctx: &'a SkBuffContext,
    headers: &'a Headers,
    segment: &'a Segment,
    counters: Direction,
    time_ns: u64,
    /// How much of the payload is to be captured.
    wanted_bytes: u32,
}

/// What one part says that the others do not.
struct Part {
    sequence: u32,
    len_bytes: u32,
    captured_bytes: u32,
    offset_bytes: u32,
    flags: u8,
}

impl<const DIRECTION: u8> Parts<'_, DIRECTION> {
    /// An error comes with the offset of the first part that was lost.
    #[inline(always)]
    fn put(&self) -> Result<(), (Loss, u32)> {
        // A number of its own, and the last part's offset computed anew below: what the verifier learns in the loop then says nothing about the
        // last part, which it goes through once, and not once for each number of parts.
        let parts = opaque(u64::from(self.wanted_bytes.div_ceil(PART_BYTES)));
        if parts > u64::from(PARTS_MAX) {
            return Err((Loss::TooLong, 0));
        }
        // Written out: a verifier that also follows wrong guesses of the processor would follow the one that a loop goes on for ever.
        macro_rules! put_whole_before_last {
            ($($part:literal)*) => {
                const _: () = assert!([$($part),*].len() as u32 == PARTS_MAX - 1);
                'whole: {
                    $(
                        if parts <= $part {
                            break 'whole;
                        }
                        self.put_whole(($part - 1) * PART_BYTES)?;
                    )*
                }
            };
        }
        put_whole_before_last!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32);
        self.put_last()
    }

    /// A part that is captured to its end, and is not the last.
    #[inline(always)]
    fn put_whole(&self, offset_bytes: u32) -> Result<(), (Loss, u32)> {
        let mut part = self.part(offset_bytes);
        part.len_bytes = PART_BYTES;
        part.captured_bytes = PART_BYTES;
        self.submit::<{ PART_BYTES as usize }>(&part)
    }

    /// The last part stands for all that is left, captured or not.
    #[inline(always)]
    fn put_last(&self) -> Result<(), (Loss, u32)> {
        let mut part = self.part(self.wanted_bytes.saturating_sub(1) & !(PART_BYTES - 1));
        part.len_bytes = self.segment.payload_bytes - part.offset_bytes;
        part.captured_bytes = self.wanted_bytes - part.offset_bytes;
        part.flags |= packet::flags(self.headers) & (FIN | RST);
        match part.captured_bytes {
            0 => self.submit_bare(&part),
            1..=128 => self.submit::<128>(&part),
            129..=256 => self.submit::<256>(&part),
            257..=512 => self.submit::<512>(&part),
            513..=1024 => self.submit::<1024>(&part),
            1025..=2048 => self.submit::<2048>(&part),
            2049..=4096 => self.submit::<4096>(&part),
            4097..=8192 => self.submit::<8192>(&part),
            _ => self.submit::<{ PART_BYTES as usize }>(&part),
        }
    }

    /// Where a part is.
    #[inline(always)]
    fn part(&self, offset_bytes: u32) -> Part {
        let is_first = offset_bytes == 0;
        // The SYN takes a sequence number of its own, before the first byte.
        let syn = packet::flags(self.headers) & SYN;
        let skipped = if is_first {
            0
        } else {
            offset_bytes + u32::from(syn)
        };
        Part {
            sequence: u32::from_be(self.headers.tcp[1]).wrapping_add(skipped),
            len_bytes: 0,
            captured_bytes: 0,
            offset_bytes,
            flags: if is_first { syn } else { 0 },
        }
    }

    /// Writes a part's record where it belongs, each field once: put together elsewhere, it would be copied byte by byte.
    #[inline(always)]
    unsafe fn write(&self, part: &Part, place: *mut Record) {
        let headers = self.headers;
        let (source_port, destination_port) = packet::ports(headers);
        let (client, client_port, server, server_port) = if DIRECTION == INGRESS {
            (
                &headers.source,
                source_port,
                &headers.destination,
                destination_port,
            )
        } else {
            (
                &headers.destination,
                destination_port,
                &headers.source,
                source_port,
            )
        };
        // The place is as well aligned as a record, and both addresses stand at multiples of eight in it.
        unsafe {
            (&raw mut (*place).time_ns).write(self.time_ns);
            write_address((&raw mut (*place).client).cast(), client);
            write_address((&raw mut (*place).server).cast(), server);
            (&raw mut (*place).client_port).write(client_port);
            (&raw mut (*place).server_port).write(server_port);
            (&raw mut (*place).sequence).write(part.sequence);
            (&raw mut (*place).len_bytes).write(part.len_bytes);
            (&raw mut (*place).captured_bytes).write(part.captured_bytes);
            (&raw mut (*place).offset_bytes).write(part.offset_bytes);
            (&raw mut (*place).version).write(VERSION);
            (&raw mut (*place).direction).write(DIRECTION);
            (&raw mut (*place).flags).write(part.flags);
            (&raw mut (*place).reserved).write(0);
        }
    }

    #[inline(always)]
    fn submit_bare(&self, part: &Part) -> Result<(), (Loss, u32)> {
        let Some(mut entry) = RECORDS.reserve::<Record>(0) else {
            return Err((Loss::RingFull, part.offset_bytes));
        };
        unsafe { self.write(part, entry.as_mut_ptr()) };
        entry.submit(NO_WAKEUP);
        self.counters.submitted(part.len_bytes);
        Ok(())
    }

    /// One record with payload: `captured_bytes` is 1 to `N`, a power of two.
    #[inline(always)]
    fn submit<const N: usize>(&self, part: &Part) -> Result<(), (Loss, u32)> {
        let Some(mut entry) = RECORDS.reserve::<Entry<N>>(0) else {
            return Err((Loss::RingFull, part.offset_bytes));
        };
        let place = entry.as_mut_ptr();
        let from = self.segment.payload_at + part.offset_bytes;
        // The verifier wants to see that it is neither 0 nor too long, and the compiler knows that and would leave the proof out.
        let len_bytes = (opaque(u64::from(part.captured_bytes) - 1) & (N as u64 - 1)) + 1;
        let failed = unsafe {
            self.write(part, &raw mut (*place).record);
            bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                from,
                (&raw mut (*place).bytes).cast(),
                len_bytes as u32,
            )
        };
        if failed != 0 {
            entry.discard(NO_WAKEUP);
            return Err((Loss::LoadFailed, part.offset_bytes));
        }
        entry.submit(NO_WAKEUP);
        self.counters.submitted(part.len_bytes);
        Ok(())
    }
}

/// Half by half: as one it would go by way of the stack.
#[inline(always)]
unsafe fn write_address(place: *mut Address, address: &Address) {
    let [low, high] = address;
    unsafe {
        place.cast::<u64>().write(*low);
        place.cast::<u64>().add(1).write(*high);
    }
}

/// A number of which the compiler knows nothing any more.
#[inline(always)]
fn opaque(mut number: u64) -> u64 {
    unsafe { asm!("/* {0} */", inout(reg) number, options(pure, nomem, nostack, preserves_flags)) };
    number
}
