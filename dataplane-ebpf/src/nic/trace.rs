//! What is left of a flow when the kernel has forgotten its entries.
//!
//! `CONNTRACK` and `NAT` forget what was not used for longest when they are full. The client's next packet makes the entries
//! again; but an answer may come before it, and nothing in an answer says whom the client has called. Not recognized, it
//! would reach the client (or, of a masqueraded flow, the node) from a peer that it does not know, and be refused with a
//! reset that ends the connection. So each flow leaves a copy of the entry of its answers, where only many other flows
//! take it away.

use core::ptr::{copy_nonoverlapping, read_volatile, write_volatile};

use dataplane_common::abi::{Counter, Flow, FlowKey, Trace, flow_role, protocol};
use dataplane_common::packet::{head_flag, tcp_flag};

use super::Scratch;
use super::flow::{set_entry, tuple_hash};
use crate::maps::{TRACE_BITS, TRACES, count};

/// A tuple may be at so many places, one behind the other.
const PLACES: u32 = 1 << 2;

/// The first of a tuple's places.
#[inline(always)]
fn first(key: &FlowKey) -> u32 {
    let hash = tuple_hash(&key.dst, key.dst_port, &key.src, key.src_port, key.protocol);
    (hash >> (64 - TRACE_BITS)) as u32 & !(PLACES - 1)
}

/// Where the tuple is.
#[inline(always)]
fn find(key: &FlowKey) -> Option<*mut Trace> {
    let first = first(key);
    let mut i = 0;
    while i < PLACES {
        let at = TRACES.get_ptr_mut(first + i)?;
        if is_of(at, key) {
            return Some(at);
        }
        i += 1;
    }
    None
}

/// Where a tuple may go that is nowhere yet: a place that is free, or another's.
#[inline(always)]
fn take(key: &FlowKey, now: u64) -> Option<*mut Trace> {
    let first = first(key);
    let mut i = 0;
    while i < PLACES {
        let at = TRACES.get_ptr_mut(first + i)?;
        // SAFETY: from a successful lookup.
        if unsafe { read_volatile(&raw const (*at).key.role) } == 0 {
            return Some(at);
        }
        i += 1;
    }
    // as good as any: two bits of the microsecond
    TRACES.get_ptr_mut(first + (now << 52 >> 62) as u32)
}

#[inline(always)]
fn is_of(at: *const Trace, key: &FlowKey) -> bool {
    // SAFETY: the callers have `at` from a successful lookup. What another CPU writes meanwhile has no role.
    let held = unsafe { &(*at).key };
    // SAFETY: as above; read each time.
    let role = unsafe { read_volatile(&raw const (*at).key.role) };
    role == key.role
        && held.src_port == key.src_port
        && held.dst_port == key.dst_port
        && held.protocol == key.protocol
        && held.src.same(&key.src)
        && held.dst.same(&key.dst)
}

/// Keeps a copy of an entry.
#[inline(always)]
pub(super) fn leave(key: &FlowKey, flow: &Flow, now: u64) {
    let at = match find(key) {
        // SAFETY: the place is from a successful lookup.
        Some(at) if unsafe { (*at).addr.same(&flow.addr) && (*at).port == flow.port } => return,
        Some(at) => at,
        None => match take(key, now) {
            Some(at) => at,
            None => return,
        },
    };
    // SAFETY: the place is from a successful lookup.
    unsafe {
        // whoever reads between does not find it
        write_volatile(&raw mut (*at).key.role, 0);
        (*at).addr = flow.addr;
        (*at).port = flow.port;
        (*at).client_port = flow.client_port;
        let (from, to): (*const u8, *mut u8) = ((&raw const *key).cast(), (&raw mut (*at).key).cast());
        copy_nonoverlapping(from, to, core::mem::offset_of!(FlowKey, role));
        write_volatile(&raw mut (*at).key.role, key.role);
    }
}

/// The tuple is someone else's from now on.
#[inline(always)]
pub(super) fn wipe(key: &FlowKey) {
    if let Some(at) = find(key) {
        // SAFETY: the place is from a successful lookup.
        unsafe { write_volatile(&raw mut (*at).key.role, 0) };
    }
}

/// Fills `scratch.flow` with what is left of the entry of `scratch.key`, the tuple of the packet. False if there is nothing,
/// or if the packet may begin a connection. Only TCP has what could be ended by a mistake.
#[inline(always)]
pub(super) fn recall(scratch: &mut Scratch, now: u64) -> bool {
    let (key, head) = (&scratch.key, &scratch.head);
    let apart = head_flag::ICMP_ERROR | head_flag::LATER_FRAGMENT;
    if head.protocol != protocol::TCP || head.flags & apart != 0 {
        return false;
    }
    let Some(at) = find(key) else {
        return false;
    };
    let answers_syn = key.role == flow_role::REVERSE && head.tcp_flags & tcp_flag::ACK != 0;
    if head.tcp_flags & tcp_flag::SYN != 0 && !answers_syn {
        // A connection begins, which may have nothing to do with that flow. One that a client begins past the service has
        // wiped this when its SYN came; of a masqueraded flow's port nobody can tell what the node sent from it.
        // SAFETY: the place is from a successful lookup.
        unsafe { write_volatile(&raw mut (*at).key.role, 0) };
        return false;
    }
    // SAFETY: the place is from a successful lookup.
    let (addr, port, client_port) = unsafe { ((*at).addr, (*at).port, (*at).client_port) };
    if !is_of(at, key) {
        return false;
    }
    set_entry(&mut scratch.flow, addr, port, now);
    scratch.flow.client_port = client_port;
    count(Counter::FlowRecovered);
    true
}
