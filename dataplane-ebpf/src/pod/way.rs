//! The short way to a pod.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Fib, bpf_redir_neigh as NextHop,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_redirect_neigh, bpf_redirect_peer};
use dataplane_common::abi::{BePort, FlowKey, Pod, device_flag, flow_role, pod_flag, protocol};

use super::ETHERNET;
use super::header::Header;
use crate::maps::{CONNTRACK, DEVICES};
use crate::nic::SETTLED;
use crate::nic::skb::Skb;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Of the IPv4 header: the word with the time to live; of that of IPv6: the hop limit.
const MIDDLE_V4: u32 = ETHERNET + 8;
const LIFETIME_V6: u32 = ETHERNET + 7;

/// Straight into a pod of this node; `None` if that is the kernel's to do.
#[inline(always)]
pub(super) fn to_pod(skb: Skb, header: &Header, pod: &Pod) -> Option<i32> {
    // SAFETY: an aligned word, which the programs change.
    let flags = unsafe { (&raw const pod.flags).read_volatile() };
    if flags & pod_flag::SHORT == 0
        || pod.ifindex == skb.ifindex()
        || header.l4 == 0
        || header.length(skb)? > pod.mtu
        || flags & pod_flag::TRANSLATED != 0 && may_be_answer(skb, header)
        || !age(skb, header)
    {
        return None;
    }
    if !super::into_pod(pod.ifindex, skb.len()) {
        return Some(super::DROP);
    }
    let head: [[u8; 6]; 2] = [pod.mac, pod.host_mac];
    if !skb.store(0, &head) {
        return None;
    }
    // SAFETY: the helper has no preconditions.
    #[expect(clippy::cast_possible_truncation, reason = "a verdict")]
    Some(unsafe { bpf_redirect_peer(pod.ifindex, 0) } as i32)
}

/// To the device and the next hop of the kernel's own route to the pod's node; `None` if that is the kernel's to do.
#[inline(always)]
pub(super) fn to_node(skb: Skb, header: &Header) -> Option<i32> {
    let length = header.length(skb)?;
    if header.l4 == 0 || length > u32::from(u16::MAX) {
        return None;
    }
    // SAFETY: integers, for which all zero is a value.
    let mut fib: Fib = unsafe { core::mem::zeroed() };
    fib.l4_protocol = header.protocol;
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    {
        fib.__bindgen_anon_1.tot_len = length as u16;
    }
    fib.ifindex = skb.ifindex();
    if header.v6 {
        fib.family = AF_INET6;
        fib.__bindgen_anon_2.flowinfo = (u32::from(header.tos) << 20).to_be();
        fib.__bindgen_anon_3.ipv6_src = header.src.words_be();
        fib.__bindgen_anon_4.ipv6_dst = header.dst.words_be();
    } else {
        fib.family = AF_INET;
        fib.__bindgen_anon_2.tos = header.tos;
        fib.__bindgen_anon_3.ipv4_src = header.src.v4_be();
        fib.__bindgen_anon_4.ipv4_dst = header.dst.v4_be();
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "64 bytes"
    )]
    let size = size_of::<Fib>() as i32;
    // SAFETY: the context is valid, and `fib` as long as said.
    let found = unsafe { bpf_fib_lookup(skb.0.cast(), &raw mut fib, size, 0) };
    // an entry that is not there yet, or not any more, is made by the neighbour layer
    if found != i64::from(BPF_FIB_LKUP_RET_SUCCESS) && found != i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        return None;
    }
    // what leaves by a device that is served is looked at there if it has to be
    let out = DEVICES.get_ptr(fib.ifindex)?;
    // SAFETY: from a successful lookup.
    if unsafe { (*out).flags } & device_flag::POD != 0 || !age(skb, header) {
        return None;
    }
    if !may_be_answer(skb, header) {
        skb.set_tc_index(SETTLED);
    }
    // SAFETY: as above; what the kernel left in `fib` is the next hop.
    let mut hop: NextHop = unsafe { core::mem::zeroed() };
    hop.nh_family = u32::from(fib.family);
    // SAFETY: both unions are integers of these sizes.
    unsafe {
        hop.__bindgen_anon_1.ipv6_nh = fib.__bindgen_anon_4.ipv6_dst;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "20 bytes"
    )]
    let size = size_of::<NextHop>() as i32;
    #[expect(clippy::cast_possible_truncation, reason = "a verdict")]
    // SAFETY: `hop` is as long as said.
    Some(unsafe { bpf_redirect_neigh(fib.ifindex, &raw mut hop, size, 0) } as i32)
}

/// True if the packet may be an answer of a flow that the packet programs have translated, and has to be translated back
/// where it leaves the node.
#[inline(always)]
fn may_be_answer(skb: Skb, header: &Header) -> bool {
    if !header.first || !matches!(header.protocol, protocol::TCP | protocol::UDP | protocol::SCTP) {
        return true;
    }
    let (Some(src_port), Some(dst_port)) = (skb.half(header.l4), skb.half(header.l4 + 2)) else {
        return true;
    };
    let key = FlowKey {
        src: header.src,
        dst: header.dst,
        src_port: BePort::from_be(src_port),
        dst_port: BePort::from_be(dst_port),
        protocol: header.protocol,
        role: flow_role::REVERSE,
        pad: 0,
    };
    CONNTRACK.get_ptr(key).is_some()
}

/// Takes one from the packet's lifetime, as forwarding does. False, and nothing changed, if it ends here.
#[inline(always)]
fn age(skb: Skb, header: &Header) -> bool {
    if header.lifetime <= 1 {
        return false;
    }
    let lifetime = header.lifetime - 1;
    if header.v6 {
        return skb.store_summed(LIFETIME_V6, &lifetime);
    }
    let [_, protocol, high, low] = header.middle.to_ne_bytes();
    // RFC 1624: one less in the high byte of a word is one more in that of the checksum, with the carry at the low end
    let sum = u32::from(u16::from_be_bytes([high, low])) + 0x100;
    let [high, low] = ((sum & 0xffff) as u16 + (sum >> 16) as u16).to_be_bytes();
    skb.store(MIDDLE_V4, &[lifetime, protocol, high, low])
}
