//! Flows: which way a tuple goes, kept in `CONNTRACK`.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use dataplane_common::abi::{
    Addr, BePort, Counter, Flow, FlowKey, NodeConfig, backend_state, flow_flag, flow_role, protocol,
};
use dataplane_common::maglev::{entry, flow_hash, mix};
use dataplane_common::packet::{Head, head_flag, tcp_flag};

use super::{Scratch, trace};
use crate::maps::{BACKENDS, CONNTRACK, count};

const SECOND: u64 = 1_000_000_000;
/// A SYN on a tuple that has been silent this long opens a new connection.
const HALF_OPEN: u64 = 60 * SECOND;
/// What is not TCP starts afresh after this much silence, whether the entry is still there or not.
const UDP_IDLE: u64 = 120 * SECOND;
/// As [`UDP_IDLE`], for SCTP, which keeps its associations alive by itself.
const SCTP_IDLE: u64 = 300 * SECOND;
/// A flow that has been silent this long (nanoseconds) may have lost the entry of its answers: a full map forgets what was
/// not used for longest.
pub(super) const SILENCE: u64 = 1_000_000;
/// How many other client ports are tried if a backend knows the client's own by another frontend.
const PORT_TRIES: u32 = 8;

/// Now, in nanoseconds since boot.
#[inline(always)]
pub(super) fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// The packet's tuple as a key.
#[inline(always)]
pub(super) fn set_key(key: &mut FlowKey, head: &Head, role: u8) {
    key.src = head.src;
    key.dst = head.dst;
    key.src_port = head.src_port;
    key.dst_port = head.dst_port;
    key.protocol = head.protocol;
    key.role = role;
    key.pad = 0;
}

/// The tuple of what answers the packet as a key.
#[inline(always)]
pub(super) fn set_answer_key(key: &mut FlowKey, head: &Head, role: u8) {
    key.src = head.dst;
    key.dst = head.src;
    key.src_port = head.dst_port;
    key.dst_port = head.src_port;
    key.protocol = head.protocol;
    key.role = role;
    key.pad = 0;
}

/// A hash of both ends of a flow.
#[inline(always)]
pub(super) fn tuple_hash(src: &Addr, src_port: BePort, dst: &Addr, dst_port: BePort, protocol: u8) -> u64 {
    let hash = flow_hash(src, src_port, dst_port, protocol);
    mix(u64::from(hash) ^ u64::from(dst.words_be()[3]) << 32)
}

/// Makes an entry that no packet has used yet and that belongs to no service.
#[inline(always)]
pub(super) fn set_entry(flow: &mut Flow, addr: Addr, port: BePort, now: u64) {
    flow.seen = now;
    flow.addr = addr;
    flow.port = port;
    flow.client_port = BePort::from_be(0);
    flow.flags = 0;
    flow.service = 0;
    flow.backend = 0;
    flow.packets = 0;
    flow.bytes = 0;
}

/// Notes a packet of the flow. Errors about a flow are no sign of life.
#[inline(always)]
pub(super) fn touch(flow: &mut Flow, head: &Head, now: u64) {
    if head.flags & head_flag::ICMP_ERROR != 0 {
        return;
    }
    flow.seen = now;
    flow.packets = flow.packets.wrapping_add(1);
    flow.bytes = flow.bytes.wrapping_add(u64::from(head.len));
    let flags = flow.flags | state(head);
    if flags != flow.flags {
        flow.flags = flags;
    }
}

/// What the packet says of the connection's state.
#[inline(always)]
pub(super) fn state(head: &Head) -> u32 {
    let tcp = head.tcp_flags;
    let mut flags = 0;
    if tcp & tcp_flag::SYN != 0 {
        flags |= flow_flag::SYN;
    }
    if tcp & tcp_flag::FIN != 0 {
        flags |= flow_flag::FIN;
    }
    if tcp & tcp_flag::RST != 0 {
        flags |= flow_flag::RST;
    }
    flags
}

/// True for the first packet of a connection.
#[inline(always)]
pub(super) fn opens(head: &Head) -> bool {
    head.protocol != protocol::TCP || head.tcp_flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN
}

/// The key of the answers: from the flow's backend to the client.
#[inline(always)]
pub(super) fn set_reverse_key(key: &mut FlowKey, head: &Head, flow: &Flow) {
    key.src = flow.addr;
    key.dst = head.src;
    key.src_port = flow.port;
    key.dst_port = if flow.client_port.to_be() == 0 {
        head.src_port
    } else {
        flow.client_port
    };
    key.protocol = head.protocol;
    key.role = flow_role::REVERSE;
    key.pad = 0;
}

/// A packet that goes to somebody without a service may begin a flow on the very tuple that an earlier one was translated
/// to, if its client uses the port again: the answers are the new flow's from now on, and must not be translated. `key` of
/// `scratch` is the packet's forward key. A datagram that follows another one of the flow at once is that one: it
/// came in by a device that is a part of this one, as of a VLAN or a bond, and was translated there.
#[inline(always)]
pub(super) fn give_way(scratch: &mut Scratch, now: u64) {
    if !opens(&scratch.head) {
        return;
    }
    set_answer_key(&mut scratch.other, &scratch.head, flow_role::REVERSE);
    let Some(known) = CONNTRACK.get_ptr(&scratch.other) else {
        trace::wipe(&scratch.other);
        return;
    };
    // SAFETY: from a successful lookup.
    let known = unsafe { &*known };
    let tcp = scratch.head.protocol == protocol::TCP;
    let ended = known.flags & (flow_flag::FIN | flow_flag::RST) != 0;
    if tcp && !ended && now.saturating_sub(known.seen) < HALF_OPEN {
        // the backend knows the tuple as that connection's, too
        return;
    }
    let forward = &mut scratch.key;
    forward.dst = known.addr;
    forward.dst_port = known.port;
    if known.client_port.to_be() != 0 {
        forward.src_port = known.client_port;
    }
    if !tcp && just_used(&scratch.key, now) {
        return;
    }
    let _ = CONNTRACK.remove(&scratch.key);
    let _ = CONNTRACK.remove(&scratch.other);
    trace::wipe(&scratch.other);
}

/// True if the flow with this key got a packet less than [`SILENCE`] ago.
#[inline(always)]
fn just_used(key: &FlowKey, now: u64) -> bool {
    let Some(flow) = CONNTRACK.get_ptr(key) else {
        return false;
    };
    // SAFETY: from a successful lookup.
    now.saturating_sub(unsafe { (*flow).seen }) < SILENCE
}

/// True if the packet goes the way that the entry says; false if it needs a new backend.
#[inline(always)]
pub(super) fn usable(flow: &Flow, head: &Head, other: &mut FlowKey, now: u64) -> bool {
    if head.flags & head_flag::ICMP_ERROR != 0 || !opens(head) {
        return true;
    }
    let silent = now.saturating_sub(flow.seen);
    match head.protocol {
        protocol::TCP => {
            let ended = flow_flag::FIN | flow_flag::RST;
            if flow.flags & ended != 0 || silent > HALF_OPEN {
                return false;
            }
            set_reverse_key(other, head, flow);
            if let Some(back) = CONNTRACK.get_ptr(&*other) {
                // SAFETY: from a successful lookup; an aligned word.
                let flags = unsafe { (&raw const (*back).flags).read_volatile() };
                if flags & ended != 0 {
                    return false;
                }
            }
        }
        protocol::UDP if silent > UDP_IDLE => return false,
        protocol::SCTP if silent > SCTP_IDLE => return false,
        _ => {}
    }
    // the backend must still be the one that was chosen: nobody would answer, or somebody else
    let Some(row) = BACKENDS.get_ptr(flow.backend) else {
        return false;
    };
    // SAFETY: from a successful lookup.
    let row = unsafe { &*row };
    row.state != backend_state::FREE && row.addr.same(&flow.addr) && row.port == flow.port
}

/// The entry of the answers to a flow: they are to show the frontend.
#[inline(always)]
fn set_back(back: &mut Flow, head: &Head, flow: &Flow, now: u64) {
    set_entry(back, head.dst, head.dst_port, now);
    back.flags = flow.flags & (flow_flag::MASQUERADE | flow_flag::RECOVERED);
    back.service = flow.service;
    back.backend = flow.backend;
    if flow.client_port.to_be() != 0 {
        back.client_port = head.src_port;
    }
}

/// Makes the entry of the answers again if the kernel has forgotten it. The flow's own entry says which backend it is, so
/// this is right also when the service has others by now.
#[inline(always)]
pub(super) fn keep_answers(scratch: &mut Scratch, flow: &Flow, now: u64) {
    let head = &scratch.head;
    let apart = head_flag::ICMP_ERROR | head_flag::LATER_FRAGMENT;
    if head.flags & apart != 0 || now.saturating_sub(flow.seen) < SILENCE {
        return;
    }
    set_reverse_key(&mut scratch.other, head, flow);
    set_back(&mut scratch.back, head, flow, now);
    trace::leave(&scratch.other, &scratch.back, now);
    if CONNTRACK.get_ptr(&scratch.other).is_some() {
        return;
    }
    if CONNTRACK
        .insert(&scratch.other, &scratch.back, u64::from(BPF_NOEXIST))
        .is_ok()
    {
        count(Counter::FlowRecovered);
    }
}

/// Makes the entries of a new flow from the one in `scratch.flow`, whose way is decided, and from `scratch.key`, its
/// forward key. On return `scratch.flow` is the forward entry. False if there is no room for it.
#[inline(always)]
pub(super) fn create(scratch: &mut Scratch, config: &NodeConfig, now: u64) -> bool {
    let opening = opens(&scratch.head);
    scratch.flow.seen = now;
    scratch.flow.client_port = BePort::from_be(0);
    if !opening {
        scratch.flow.flags |= flow_flag::RECOVERED;
    }
    let head = &scratch.head;
    let flow = &scratch.flow;
    let back = &mut scratch.back;
    set_back(back, head, flow, now);
    set_reverse_key(&mut scratch.other, head, flow);
    let size = u32::from(config.nat_last).wrapping_sub(u32::from(config.nat_first)) + 1;
    let hash = flow_hash(&head.src, head.src_port, head.dst_port, head.protocol);
    let mut made = false;
    let mut tries = 0;
    while tries <= PORT_TRIES {
        if tries > 0 {
            // Another frontend leads this client's port to the same backend: the backend must see another port.
            let port = u32::from(config.nat_first) + (entry(hash, size) + tries - 1) % size.max(1);
            scratch.other.dst_port = BePort::from_host((port & 0xffff) as u16);
            back.client_port = head.src_port;
        }
        if CONNTRACK
            .insert(&scratch.other, &*back, u64::from(BPF_NOEXIST))
            .is_ok()
        {
            made = true;
            break;
        }
        if let Some(known) = CONNTRACK.get_ptr_mut(&scratch.other) {
            // SAFETY: from a successful lookup.
            let known = unsafe { &mut *known };
            if known.addr.same(&back.addr) && known.port == back.port && known.client_port == back.client_port
            {
                // This flow's own, from before. A new entry in its place would cost another flow its own in a full map.
                *known = *back;
                made = true;
                break;
            }
        }
        if size == 0 || size > 0xffff {
            break;
        }
        tries += 1;
    }
    if !made {
        return false;
    }
    if tries > 0 {
        scratch.flow.client_port = scratch.other.dst_port;
    }
    scratch.flow.packets = 0;
    scratch.flow.bytes = 0;
    touch(&mut scratch.flow, &scratch.head, now);
    if CONNTRACK
        .insert(&scratch.key, &scratch.flow, u64::from(BPF_ANY))
        .is_err()
    {
        return false;
    }
    trace::leave(&scratch.other, &scratch.back, now);
    // In a full map the second entry may have cost the first one its place. That it is looked up here also saves it from
    // being the next to go: it has not been used yet.
    if CONNTRACK.get_ptr(&scratch.other).is_none() {
        let _ = CONNTRACK.insert(&scratch.other, &scratch.back, u64::from(BPF_NOEXIST));
    }
    count(if opening {
        Counter::FlowCreated
    } else {
        Counter::FlowRecovered
    });
    true
}
