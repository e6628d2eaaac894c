//! Giving packets a source of this node, kept in `NAT`.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use dataplane_common::abi::{
    BePort, Counter, Device, Flow, FlowKey, NodeConfig, flow_flag, flow_role, protocol,
};
use dataplane_common::maglev::entry;
use dataplane_common::packet::{Head, head_flag};

use super::flow::{SILENCE, opens, set_answer_key, set_entry, set_key, touch, tuple_hash};
use super::{Scratch, trace};
use crate::maps::NAT;

/// How many ports are tried for a new flow.
const TRIES: u32 = 32;
const SECOND: u64 = 1_000_000_000;
/// The port of a connection that both ends have closed is taken again after this much silence, if no other is free. The
/// backend's kernel takes a SYN on a tuple in TIME_WAIT (RFC 6191).
const TCP_REST: u64 = SECOND;
/// The same for what has no end that could be seen: as long as netfilter keeps a UDP flow that is not a stream.
const UDP_REST: u64 = 30 * SECOND;

/// True if a flow is over, from its two entries; a missing one says nothing.
#[inline(always)]
fn over(number: u8, back: &Flow, forward: Option<*const Flow>, now: u64) -> bool {
    let (mut flags, mut seen) = (flow_flag::FIN, 0);
    if let Some(forward) = forward {
        // SAFETY: from a successful lookup; aligned words.
        unsafe {
            flags = (&raw const (*forward).flags).read_volatile();
            seen = (&raw const (*forward).seen).read_volatile();
        }
    }
    let silent = now.saturating_sub(if seen > back.seen { seen } else { back.seen });
    match number {
        protocol::TCP => {
            let ended =
                (flags | back.flags) & flow_flag::RST != 0 || flags & back.flags & flow_flag::FIN != 0;
            ended && silent > TCP_REST
        }
        protocol::SCTP => false,
        _ => silent > UDP_REST,
    }
}

/// The key of the forward entry that belongs to the reverse entry `back` under `other`.
#[inline(always)]
fn set_forward_key(key: &mut FlowKey, other: &FlowKey, back: &Flow) {
    key.src = back.addr;
    key.src_port = back.port;
    key.dst = other.src;
    key.dst_port = other.src_port;
    key.protocol = other.protocol;
    key.role = flow_role::NAT_FORWARD;
    key.pad = 0;
}

/// Finds or makes the address and port that the packet leaves with, in `scratch.target`.
///
/// # Errors
///
/// Why the packet has to be dropped.
#[inline(always)]
pub(super) fn source(
    scratch: &mut Scratch,
    config: *const NodeConfig,
    device: &Device,
    now: u64,
) -> Result<(), Counter> {
    set_key(&mut scratch.key, &scratch.head, flow_role::NAT_FORWARD);
    if let Some(known) = NAT.get_ptr_mut(&scratch.key) {
        // SAFETY: from a successful lookup.
        let known = unsafe { &mut *known };
        if keep_answers(scratch, known, now) {
            touch(known, &scratch.head, now);
            scratch.target.addr = known.addr;
            scratch.target.port = known.port;
            scratch.target.other = BePort::from_be(0);
            return Ok(());
        }
    }
    if scratch.head.flags & (head_flag::LATER_FRAGMENT | head_flag::ICMP_ERROR) != 0 {
        return Err(Counter::FlowLost);
    }
    make(scratch, config, device, now)
}

/// Makes the entry of the answers again if the kernel has forgotten it. False if the port is another flow's by now.
#[inline(always)]
fn keep_answers(scratch: &mut Scratch, flow: &Flow, now: u64) -> bool {
    let head = &scratch.head;
    // what keeps its own source has no such entry
    if now.saturating_sub(flow.seen) < SILENCE || flow.addr.same(&head.src) {
        return true;
    }
    set_answer_key(&mut scratch.other, head, flow_role::NAT_REVERSE);
    scratch.other.dst = flow.addr;
    scratch.other.dst_port = flow.port;
    set_entry(&mut scratch.back, head.src, head.src_port, now);
    trace::leave(&scratch.other, &scratch.back, now);
    trace::leave(&scratch.key, flow, now);
    if let Some(known) = NAT.get_ptr(&scratch.other) {
        // SAFETY: from a successful lookup.
        return leads_to(unsafe { &*known }, head);
    }
    // if somebody else is faster, the next packet sees it
    let _ = NAT.insert(&scratch.other, &scratch.back, u64::from(BPF_NOEXIST));
    true
}

/// True if the reverse entry is that of the packet's flow.
#[inline(always)]
fn leads_to(back: &Flow, head: &Head) -> bool {
    back.addr.same(&head.src) && back.port == head.src_port
}

#[inline(always)]
fn make(scratch: &mut Scratch, config: *const NodeConfig, device: &Device, now: u64) -> Result<(), Counter> {
    let v6 = scratch.head.flags & head_flag::V6 != 0;
    scratch.target.addr = if v6 { device.v6 } else { device.v4 };
    let words = scratch.target.addr.words_be();
    // all zero, or the unspecified IPv4 address
    if words[3] == 0 && (words[0] | words[1] == 0) {
        return Err(Counter::NoNatAddress);
    }
    // SAFETY: from a successful lookup.
    let (first, last) = unsafe {
        (
            u32::from((&raw const (*config).nat_first).read_volatile()),
            u32::from((&raw const (*config).nat_last).read_volatile()),
        )
    };
    if first == 0 || last < first {
        return Err(Counter::NatExhausted);
    }
    let size = last - first + 1;
    let head = &scratch.head;
    // the same flow gets the same port again if its entry is lost
    let hash = tuple_hash(&head.src, head.src_port, &head.dst, head.dst_port, head.protocol);
    let mut offset = entry((hash >> 32) as u32, size);
    // What is under way may have a port, behind one that has become free since.
    let begins = opens(head);

    let back = &mut scratch.back;
    set_entry(back, head.src, head.src_port, now);
    let other = &mut scratch.other;
    other.src = head.dst;
    other.dst = scratch.target.addr;
    other.src_port = head.dst_port;
    other.protocol = head.protocol;
    other.role = flow_role::NAT_REVERSE;
    other.pad = 0;
    let mut tries = 0;
    let mut made = false;
    let none = BePort::from_be(0);
    let spare = &mut scratch.spare;
    (spare.free, spare.used) = (none, none);
    while tries < TRIES {
        other.dst_port = BePort::from_host(((first + offset) & 0xffff) as u16);
        if begins && NAT.insert(&*other, &*back, u64::from(BPF_NOEXIST)).is_ok() {
            made = true;
            break;
        }
        if let Some(known) = NAT.get_ptr(&*other) {
            // SAFETY: from a successful lookup.
            let known = unsafe { &*known };
            if leads_to(known, head) {
                // this flow's own, from before
                made = true;
                break;
            }
            if spare.used.to_be() == 0 {
                let third = &mut scratch.third;
                set_forward_key(third, other, known);
                let forward = NAT.get_ptr(&*third);
                if over(other.protocol, known, forward, now) {
                    spare.used = other.dst_port;
                }
            }
        } else if spare.free.to_be() == 0 {
            spare.free = other.dst_port;
        }
        offset += 1;
        if offset >= size {
            offset = 0;
        }
        tries += 1;
    }
    if !made && spare.free.to_be() != 0 {
        other.dst_port = spare.free;
        made = NAT.insert(&*other, &*back, u64::from(BPF_NOEXIST)).is_ok();
    }
    if !made && spare.used.to_be() != 0 {
        // Of all that want the port, one gets it: the one that removes it.
        other.dst_port = spare.used;
        if let Some(known) = NAT.get_ptr(&*other) {
            let third = &mut scratch.third;
            // SAFETY: from a successful lookup; what it says of a recycled entry is another flow's key, which is then lost
            // and made anew with the same port.
            set_forward_key(third, other, unsafe { &*known });
            if NAT.remove(&*other).is_ok() {
                let _ = NAT.remove(&*third);
                made = NAT.insert(&*other, &*back, u64::from(BPF_NOEXIST)).is_ok();
            }
        }
    }
    if !made {
        return Err(Counter::NatExhausted);
    }
    scratch.target.port = other.dst_port;
    scratch.target.other = BePort::from_be(0);
    let flow = &mut scratch.flow;
    set_entry(flow, scratch.target.addr, scratch.target.port, now);
    touch(flow, &scratch.head, now);
    if NAT.insert(&scratch.key, &*flow, u64::from(BPF_ANY)).is_err() {
        return Err(Counter::FlowLost);
    }
    trace::leave(&scratch.key, &scratch.flow, now);
    trace::leave(&scratch.other, &scratch.back, now);
    // as for flows of services: used, and there after the second one
    if NAT.get_ptr(&scratch.other).is_none() {
        let _ = NAT.insert(&scratch.other, &scratch.back, u64::from(BPF_NOEXIST));
    }
    Ok(())
}
