//! Elements of array maps.

use aya_ebpf::{helpers::bpf_map_lookup_elem, maps::Array};
use core::mem::MaybeUninit;

/// Where an element is; `None` if the array is not as long.
///
/// The index takes the eight bytes of a whole place on the stack: without CAP_PERFMON older verifiers let a place that holds a number they know
/// something of be written over only as a whole.
#[inline(always)]
pub fn find<T>(array: &'static Array<T>, index: u32) -> Option<*mut T> {
    let mut key = MaybeUninit::<u64>::uninit();
    let element = unsafe {
        // A number's low bytes come first in memory, and the kernel reads four.
        key.as_mut_ptr().write_volatile(u64::from(index));
        bpf_map_lookup_elem((&raw const *array).cast_mut().cast(), key.as_ptr().cast())
    };
    (!element.is_null()).then(|| element.cast())
}
