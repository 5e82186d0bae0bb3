//! Puts a segment into the ring, in as many records as it takes.

use crate::counter::{Direction, Loss};
use crate::packet::Segment;
use aya_ebpf::{
    EbpfContext,
    bindings::BPF_RB_NO_WAKEUP,
    helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    macros::map,
    maps::RingBuf,
    programs::SkBuffContext,
};
use core::arch::asm;
use gateway_common::record::{FIN, PART_BYTES, PARTS_MAX, RST, Record, SYN, VERSION};

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
pub fn put(ctx: &SkBuffContext, segment: &Segment, direction: u8, limit_bytes: u32) {
    let Some(counters) = Direction::here(direction) else {
        return;
    };
    counters.packet(segment.payload_bytes);
    let wanted_bytes = segment.payload_bytes.min(limit_bytes);
    let mut record = Record {
        time_ns: unsafe { bpf_ktime_get_ns() },
        client: segment.client,
        server: segment.server,
        client_port: segment.client_port,
        server_port: segment.server_port,
        sequence: segment.sequence,
        len_bytes: PART_BYTES,
        captured_bytes: PART_BYTES,
        offset_bytes: 0,
        version: VERSION,
        direction,
        flags: segment.flags & SYN,
        reserved: 0,
    };
    if let Err(loss) = put_parts(ctx, segment, &mut record, wanted_bytes, counters) {
        let left_bytes = wanted_bytes - record.offset_bytes;
        let records = left_bytes.div_ceil(PART_BYTES).max(1);
        counters.lost(loss, records, segment.payload_bytes - record.offset_bytes);
    }
}

/// On an error `record` is the one that was lost.
#[inline(always)]
fn put_parts(
    ctx: &SkBuffContext,
    segment: &Segment,
    record: &mut Record,
    wanted_bytes: u32,
    counters: Direction,
) -> Result<(), Loss> {
    for _ in 1..PARTS_MAX {
        if wanted_bytes - record.offset_bytes <= PART_BYTES {
            break;
        }
        submit::<{ PART_BYTES as usize }>(ctx, segment, record, counters)?;
        // The SYN takes a sequence number of its own, before the first byte.
        let syn = u32::from(record.flags & SYN);
        record.sequence = record.sequence.wrapping_add(PART_BYTES + syn);
        record.offset_bytes += PART_BYTES;
        record.flags = 0;
    }
    // The last part stands for all that is left, captured or not.
    record.len_bytes = segment.payload_bytes - record.offset_bytes;
    record.captured_bytes = wanted_bytes - record.offset_bytes;
    record.flags |= segment.flags & (FIN | RST);
    match record.captured_bytes {
        0 => submit_bare(record, counters),
        1..=128 => submit::<128>(ctx, segment, record, counters),
        129..=256 => submit::<256>(ctx, segment, record, counters),
        257..=512 => submit::<512>(ctx, segment, record, counters),
        513..=1024 => submit::<1024>(ctx, segment, record, counters),
        1025..=2048 => submit::<2048>(ctx, segment, record, counters),
        2049..=4096 => submit::<4096>(ctx, segment, record, counters),
        4097..=8192 => submit::<8192>(ctx, segment, record, counters),
        8193..=PART_BYTES => submit::<{ PART_BYTES as usize }>(ctx, segment, record, counters),
        _ => Err(Loss::TooLong),
    }
}

#[inline(always)]
fn submit_bare(record: &Record, counters: Direction) -> Result<(), Loss> {
    let mut entry = RECORDS.reserve::<Record>(0).ok_or(Loss::RingFull)?;
    entry.write(*record);
    entry.submit(NO_WAKEUP);
    counters.submitted(record.len_bytes);
    Ok(())
}

/// One record with payload: `captured_bytes` is 1 to `N`, a power of two.
#[inline(always)]
fn submit<const N: usize>(
    ctx: &SkBuffContext,
    segment: &Segment,
    record: &Record,
    counters: Direction,
) -> Result<(), Loss> {
    let mut entry = RECORDS.reserve::<Entry<N>>(0).ok_or(Loss::RingFull)?;
    let place = entry.as_mut_ptr();
    let from = segment.payload_at + record.offset_bytes;
    // The verifier wants to see that it is neither 0 nor too long, and the compiler knows that and would leave the proof out.
    let len_bytes = (opaque(u64::from(record.captured_bytes) - 1) & (N as u64 - 1)) + 1;
    let failed = unsafe {
        (&raw mut (*place).record).write(*record);
        bpf_skb_load_bytes(
            ctx.as_ptr(),
            from,
            (&raw mut (*place).bytes).cast(),
            len_bytes as u32,
        )
    };
    if failed != 0 {
        entry.discard(NO_WAKEUP);
        return Err(Loss::LoadFailed);
    }
    entry.submit(NO_WAKEUP);
    counters.submitted(record.len_bytes);
    Ok(())
}

/// A number of which the compiler knows nothing any more.
#[inline(always)]
fn opaque(mut number: u64) -> u64 {
    unsafe { asm!("/* {0} */", inout(reg) number, options(pure, nomem, nostack, preserves_flags)) };
    number
}
