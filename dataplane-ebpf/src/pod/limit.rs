//! Bandwidth.

use core::arch::asm;

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use dataplane_common::abi::Limit;

const SECOND: u64 = 1_000_000_000;

/// Takes a packet's length from the bucket; false if it holds nothing any more.
///
/// Of two CPUs that find the bucket full at the same time one may take its packet for nothing.
#[inline(always)]
pub(super) fn admit(limit: &mut Limit, len: u32) -> bool {
    let limit: *mut Limit = limit;
    // SAFETY: aligned words of an entry from a successful lookup, which other CPUs and user space may change meanwhile.
    unsafe {
        let rate = (&raw const (*limit).rate).read_volatile();
        if rate == 0 {
            return true;
        }
        let burst = (&raw const (*limit).burst).read_volatile();
        let full_at = &raw mut (*limit).full_at;
        let now = bpf_ktime_get_ns();
        let at = full_at.read_volatile();
        if at < now {
            full_at.write_volatile(now);
        } else if at - now > burst {
            return false;
        }
        let time = u64::from(len) * SECOND / rate;
        // core has no atomic add for this target
        asm!(
            "lock *(u64 *)({at} + 0) += {time}",
            at = in(reg) full_at,
            time = in(reg) time,
        );
        true
    }
}
