//! A packet in the kernel.
//!
//! Bytes are copied in and out by helpers, never reached through pointers: they work on packets whose bytes are in several
//! pieces or shared with another copy.
#![expect(
    clippy::cast_possible_truncation,
    reason = "lengths here are those of small types"
)]

use core::ffi::c_long;

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{
    bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use dataplane_common::packet::Load;

/// A packet, from its link-layer header on.
#[derive(Clone, Copy)]
pub(crate) struct Skb(pub(crate) *mut __sk_buff);

impl Load for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32, into: &mut [u8; N]) -> bool {
        // SAFETY: the context is valid, and `into` has room for N bytes.
        unsafe { bpf_skb_load_bytes(self.0.cast(), offset, into.as_mut_ptr().cast(), N as u32) == 0 }
    }
}

/// A field of the context, with the access that the verifier asks for.
macro_rules! field {
    ($name:ident) => {
        #[doc = concat!("`__sk_buff.", stringify!($name), "`.")]
        #[inline(always)]
        pub(crate) fn $name(&self) -> u32 {
            // SAFETY: the kernel hands in a valid context.
            unsafe { (&raw const (*self.0).$name).read_volatile() }
        }
    };
}

impl Skb {
    field!(len);
    field!(mark);
    field!(ifindex);
    field!(protocol);
    field!(gso_size);
    field!(tc_index);

    /// Sets the packet's mark.
    #[inline(always)]
    pub(crate) fn set_mark(&self, mark: u32) {
        // SAFETY: the field may be written.
        unsafe { (&raw mut (*self.0).mark).write_volatile(mark) };
    }

    /// Sets what the kernel keeps with a packet for nobody but such programs.
    #[inline(always)]
    pub(crate) fn set_tc_index(&self, index: u32) {
        // SAFETY: the field may be written.
        unsafe { (&raw mut (*self.0).tc_index).write_volatile(index) };
    }

    /// The Ethernet type as a number.
    #[inline(always)]
    pub(crate) fn ethertype(&self) -> u16 {
        u16::from_be((self.protocol() & 0xffff) as u16)
    }

    /// Four bytes as they lie in the packet, 0 if they are not there.
    #[inline(always)]
    pub(crate) fn word(&self, offset: u32) -> Option<u32> {
        let mut bytes = [0; 4];
        if self.load(offset, &mut bytes) {
            Some(u32::from_ne_bytes(bytes))
        } else {
            None
        }
    }

    /// Two bytes as they lie in the packet.
    #[inline(always)]
    pub(crate) fn half(&self, offset: u32) -> Option<u16> {
        let mut bytes = [0; 2];
        if self.load(offset, &mut bytes) {
            Some(u16::from_ne_bytes(bytes))
        } else {
            None
        }
    }

    #[inline(always)]
    fn put<T>(&self, offset: u32, value: &T, flags: u64) -> bool {
        let from: *const T = value;
        // SAFETY: the context is valid, and `value` is as long as said.
        let result: c_long =
            unsafe { bpf_skb_store_bytes(self.0, offset, from.cast(), size_of::<T>() as u32, flags) };
        result == 0
    }

    /// Replaces bytes whose change the checksum that covers them follows, so that the sum of the whole packet (what a
    /// device that checks it has left in it) stays the same.
    #[inline(always)]
    pub(crate) fn store<T>(&self, offset: u32, value: &T) -> bool {
        self.put(offset, value, 0)
    }

    /// Replaces bytes, and the sum of the whole packet with them.
    ///
    /// For addresses of IPv6 this is right together with [`Self::change_pseudo`]: that takes the change of the transport
    /// checksum for a change of the sum, because in IPv4 the header's own checksum makes up for the address (kernel
    /// commit ead7f9b8de65 tells of it).
    #[inline(always)]
    pub(crate) fn store_summed<T>(&self, offset: u32, value: &T) -> bool {
        self.put(offset, value, u64::from(BPF_F_RECOMPUTE_CSUM))
    }

    /// Follows a change in the header of IPv4 whose checksum is at `offset`.
    #[inline(always)]
    pub(crate) fn change_header(&self, offset: u32, change: u32) -> bool {
        // SAFETY: the context is valid.
        unsafe { bpf_l3_csum_replace(self.0, offset, 0, u64::from(change), 0) == 0 }
    }

    /// Follows a change of the pseudo header in the transport checksum at `offset`. A checksum of UDP that is 0 is none
    /// and stays so.
    #[inline(always)]
    pub(crate) fn change_pseudo(&self, offset: u32, change: u32, udp: bool) -> bool {
        let mangled = if udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        // SAFETY: the context is valid.
        unsafe {
            bpf_l4_csum_replace(
                self.0,
                offset,
                0,
                u64::from(change),
                u64::from(BPF_F_PSEUDO_HDR | mangled),
            ) == 0
        }
    }

    /// Follows a change of what the transport checksum at `offset` covers. Where a device is still going to compute that
    /// checksum, nothing changes.
    #[inline(always)]
    pub(crate) fn change_payload(&self, offset: u32, change: u32, udp: bool) -> bool {
        let mangled = if udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        // SAFETY: the context is valid.
        unsafe { bpf_l4_csum_replace(self.0, offset, 0, u64::from(change), u64::from(mangled)) == 0 }
    }
}
