//! Who is served: source ranges of load-balancer addresses.

use aya_ebpf::EbpfContext;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::programs::SockAddrContext;
use dataplane_common::abi::{Addr, NetnsAddrs, Service};

use crate::maps::{NETNS_ADDRS, SOURCE_RANGES};

/// A number of the socket's network namespace: of a pod, or of the host.
#[inline(always)]
pub fn netns(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is valid for the helper.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// What the source ranges say of a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// It may enter.
    Open,
    /// It may not.
    Denied,
    /// Nobody has told the address of its network namespace.
    Unknown,
}

/// Whether the service's source ranges let the socket in (spec kube-proxy 2.4). A socket has no source address yet when it
/// connects: the address of its network namespace, of the family that it calls, speaks for it.
#[inline(always)]
pub(crate) fn entry(ctx: &SockAddrContext, row: *const Service, called: &Addr) -> Entry {
    // SAFETY: `row` comes from a successful lookup; an aligned word.
    let ranges = unsafe { (&raw const (*row).source_ranges).read_volatile() };
    if ranges == 0 {
        return Entry::Open;
    }
    let Some(own) = NETNS_ADDRS.get_ptr(netns(ctx)) else {
        return Entry::Unknown;
    };
    let offset = if called.is_v4() {
        core::mem::offset_of!(NetnsAddrs, v4)
    } else {
        core::mem::offset_of!(NetnsAddrs, v6)
    };
    // SAFETY: from a successful lookup; an address is four words.
    let words = unsafe { own.cast::<u8>().add(offset) }.cast::<u32>();
    // SAFETY: as above.
    let word = |i: usize| unsafe { words.add(i).read_volatile() };
    let key = Key::new(32 + 128, [ranges, word(0), word(1), word(2), word(3)]);
    if key.data[1] | key.data[2] | key.data[3] | key.data[4] == 0 {
        return Entry::Unknown;
    }
    if SOURCE_RANGES.get(&key).is_some() {
        Entry::Open
    } else {
        Entry::Denied
    }
}
