//! Pods of this node and the world: what a pod begins leaves with the node's address; what the world begins keeps its own.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::btf_maps::lpm_trie::Key;
use dataplane_common::abi::{Addr, Device, flow_role, masquerade, protocol};
use dataplane_common::packet::head_flag;

use super::flow::{opens, set_answer_key, set_entry, set_key};
use super::{Scratch, known};
use crate::maps::{MASQUERADE, NAT};

/// What is known of an address: flags of [`masquerade`]; 0 is the world.
#[inline(always)]
pub(crate) fn class(addr: &Addr) -> u32 {
    let key = Key::new(128, addr.words_be());
    match MASQUERADE.get(&key) {
        Some(class) => *class,
        None => 0,
    }
}

/// True if a packet's source is [`super::masquerade::source`]'s to choose, which may leave it as it is.
#[inline(always)]
pub(super) fn leave(scratch: &mut Scratch, device: &Device, now: u64) -> bool {
    let head = &scratch.head;
    // most of what leaves is the node's own, or goes to another pod
    if head.src.same(&device.v4)
        || head.src.same(&device.v6)
        || class(&head.dst) != 0
        || class(&head.src) & masquerade::SOURCE == 0
    {
        return false;
    }
    if head.flags & head_flag::ECHO != 0 && head.src_port.to_be() == 0 {
        // an answer
        return false;
    }
    set_key(&mut scratch.key, &scratch.head, flow_role::NAT_FORWARD);
    if NAT.get_ptr(&scratch.key).is_some() {
        return true;
    }
    let head = &scratch.head;
    if head.flags & (head_flag::LATER_FRAGMENT | head_flag::ICMP_ERROR) != 0 {
        return false;
    }
    // What is under way and not known was forgotten, or was begun by the other end, or before this program came: then both
    // know the pod.
    opens(head) || known(&NAT, scratch, now).is_some()
}

/// A packet comes from the world to a pod: if it is a datagram, its answers keep the pod's address. The answers of a TCP
/// connection are known by their flags.
#[inline(always)]
pub(super) fn arrive(scratch: &mut Scratch, now: u64) {
    let head = &scratch.head;
    let not_first = head_flag::ICMP_ERROR | head_flag::LATER_FRAGMENT | head_flag::ECHO;
    if head.protocol == protocol::TCP || head.flags & not_first != 0 {
        return;
    }
    if class(&head.dst) & masquerade::SOURCE == 0 || class(&head.src) != 0 {
        return;
    }
    let key = &mut scratch.other;
    set_answer_key(key, head, flow_role::NAT_FORWARD);
    if let Some(known) = NAT.get_ptr_mut(&*key) {
        // SAFETY: from a successful lookup.
        unsafe { (*known).seen = now };
        return;
    }
    let flow = &mut scratch.flow;
    set_entry(flow, head.dst, head.dst_port, now);
    // if it cannot be noted, the answer gets the node's address: the client will not know it, and ask again
    let _ = NAT.insert(&*key, &*flow, u64::from(BPF_NOEXIST));
}
