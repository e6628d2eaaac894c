//! What is left of a flow when the kernel has forgotten its entries.
//!
//! `CONNTRACK` and `NAT` forget what was not used for longest when they are full. The next packet of the client makes the
//! entries again, but an answer that is under way meanwhile is not recognized: it reaches the client (or the node) from a
//! peer that it does not know, who resets a connection that is none of its own. So each flow leaves a trace of its tuple,
//! which costs 4 bytes, and what would end a connection by such a mistake is dropped: TCP sends the answer again.

use dataplane_common::abi::{FlowKey, flow_role, protocol};
use dataplane_common::packet::{Head, head_flag, tcp_flag};

use super::flow::{set_answer_key, set_key, tuple_hash};
use crate::maps::{TRACE_BITS, TRACES};

/// Where the trace of a tuple is, and what it is: never 0.
#[inline(always)]
fn place(key: &FlowKey) -> (Option<*mut u32>, u32) {
    let hash = tuple_hash(&key.dst, key.dst_port, &key.src, key.src_port, key.protocol);
    let index = (hash >> (64 - TRACE_BITS)) as u32;
    (TRACES.get_ptr_mut(index), (hash << TRACE_BITS >> 32) as u32 | 1)
}

/// Notes that the tuple belongs to a flow.
#[inline(always)]
pub(super) fn leave(key: &FlowKey) {
    if let (Some(at), mark) = place(key) {
        // SAFETY: an aligned word from a successful lookup. Whoever writes last is remembered.
        unsafe {
            if at.read_volatile() != mark {
                at.write_volatile(mark);
            }
        }
    }
}

/// True if the tuple belonged to a flow, unless that was so long ago that others have left their traces.
#[inline(always)]
pub(super) fn is_there(key: &FlowKey) -> bool {
    match place(key) {
        // SAFETY: as in `leave`.
        (Some(at), mark) => unsafe { at.read_volatile() == mark },
        _ => false,
    }
}

/// The tuple is another flow's from now on.
#[inline(always)]
pub(super) fn wipe(key: &FlowKey) {
    if let (Some(at), mark) = place(key) {
        // SAFETY: as in `leave`.
        unsafe {
            if at.read_volatile() == mark {
                at.write_volatile(0);
            }
        }
    }
}

#[inline(always)]
fn is_tcp(head: &Head) -> bool {
    let apart = head_flag::ICMP_ERROR | head_flag::LATER_FRAGMENT;
    head.protocol == protocol::TCP && head.flags & apart == 0
}

/// True for the reset with which a client refuses an answer that reached it untranslated. Such a reset acknowledges nothing
/// (RFC 9293 3.10.7.1), unlike that of a program that gives a connection up.
#[inline(always)]
pub(super) fn is_refusal(head: &Head, key: &mut FlowKey) -> bool {
    if !is_tcp(head) || head.tcp_flags & (tcp_flag::RST | tcp_flag::ACK) != tcp_flag::RST {
        return false;
    }
    set_answer_key(key, head, flow_role::REVERSE);
    is_there(key)
}

/// True for an answer to a masqueraded flow that the node would refuse, because it has no such connection itself.
#[inline(always)]
pub(super) fn is_answer(head: &Head, key: &mut FlowKey) -> bool {
    if !is_tcp(head) {
        return false;
    }
    set_key(key, head, flow_role::NAT_REVERSE);
    if head.tcp_flags & tcp_flag::SYN != 0 {
        // a connection begins, which may be the node's: then the tuple is not the flow's any more
        wipe(key);
        return false;
    }
    is_there(key)
}
