//! What TCP connections through services tell of their backends: connects without an answer, and time-outs later on.
//!
//! The program runs at a few moments of each TCP connection of the cgroup. For those to a service it asks the kernel to be
//! called as well when something goes wrong, and at the end of the handshake; nothing is called per packet.

use core::arch::asm;
use core::ptr;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_SYN_SENT,
};
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_ns};
use aya_ebpf::programs::SockOpsContext;
use dataplane_common::abi::{BackendHealth, Counter, Event, SockState, event_kind, service_flag};

use crate::maps::{BACKEND_HEALTH, BACKENDS, EVENTS, SERVICES, SOCK_CONN, count};

/// Of one backend, no two events come closer than this, in nanoseconds: a dead one that many connections run into must not
/// fill the ring buffer.
const EVENT_PAUSE: u64 = 50_000_000;

/// The result that lets other programs of the cgroup decide what the kernel asks for.
const DONE: u32 = 1;

/// `sock_ops`.
#[inline(always)]
pub fn observe(ctx: &SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => watch(ctx),
        BPF_SOCK_OPS_RTO_CB => {
            // SAFETY: a 4-byte field of the context.
            let state = unsafe { (&raw const (*ctx.ops).state).read_volatile() };
            if state == BPF_TCP_SYN_SENT {
                failed(cookie(ctx), event_kind::CONNECT_TIMEOUT);
            } else {
                failed(cookie(ctx), event_kind::RETRANSMIT);
            }
        }
        BPF_SOCK_OPS_STATE_CB => changed(ctx),
        _ => {}
    }
    DONE
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the context is valid for the helper.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// A connect begins: those to a service are watched.
#[inline(always)]
fn watch(ctx: &SockOpsContext) {
    let Some(state) = SOCK_CONN.get_ptr(cookie(ctx)) else {
        return;
    };
    // SAFETY: from a successful lookup; an aligned word.
    let service = unsafe { (&raw const (*state).service).read_volatile() };
    if is_watched(service) {
        call_me(ctx, BPF_SOCK_OPS_RTO_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG);
    }
}

/// True if the backends of the service are watched for failures.
#[inline(always)]
fn is_watched(service: u32) -> bool {
    let Some(row) = SERVICES.get_ptr(service) else {
        return false;
    };
    // SAFETY: from a successful lookup; an aligned word.
    let flags = unsafe { (&raw const (*row).flags).read_volatile() };
    flags & service_flag::NO_FAILURE_DETECTION == 0
}

#[inline(always)]
fn call_me(ctx: &SockOpsContext, flags: u32) {
    // Another program's wishes stay.
    let both = ctx.cb_flags() & !(BPF_SOCK_OPS_RTO_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG) | flags;
    let _ = ctx.set_cb_flags(both as i32);
}

/// The connection has left the state that it was in.
#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    if ctx.arg(0) != BPF_TCP_SYN_SENT {
        return;
    }
    match ctx.arg(1) {
        BPF_TCP_ESTABLISHED => {
            call_me(ctx, BPF_SOCK_OPS_RTO_CB_FLAG);
            // SAFETY: a 4-byte field of the context.
            if unsafe { (&raw const (*ctx.ops).total_retrans).read_volatile() } != 0 {
                alive(cookie(ctx));
            }
        }
        // A close by the application has taken the socket's state away before, and has been told of by `sock_release`.
        BPF_TCP_CLOSE => failed(cookie(ctx), event_kind::CONNECT_FAILED),
        _ => {}
    }
}

/// The health of a connection's backend, if it is watched and the row is still the same backend's.
#[inline(always)]
fn health(state: *const SockState) -> Option<*const BackendHealth> {
    // SAFETY: from a successful lookup; aligned words.
    let (service, backend, generation) = unsafe {
        (
            (&raw const (*state).service).read_volatile(),
            (&raw const (*state).backend).read_volatile(),
            (&raw const (*state).generation).read_volatile(),
        )
    };
    if !is_watched(service) {
        return None;
    }
    let row = BACKENDS.get_ptr(backend)?;
    // SAFETY: as above.
    if unsafe { (&raw const (*row).generation).read_volatile() } != generation {
        return None;
    }
    BACKEND_HEALTH.get_ptr(backend)
}

#[inline(always)]
fn failed(cookie: u64, kind: u32) {
    if let Some(state) = SOCK_CONN.get_ptr(cookie) {
        report_failure(state, cookie, kind);
    }
}

/// A connection was not answered: counted, and told if that has not just been done.
#[inline(always)]
pub fn report_failure(state: *const SockState, cookie: u64, kind: u32) {
    let Some(health) = health(state) else {
        return;
    };
    // SAFETY: field address within the entry.
    let counter = unsafe {
        if kind == event_kind::RETRANSMIT {
            &raw const (*health).timeouts
        } else {
            &raw const (*health).connect_failures
        }
    };
    // SAFETY: an aligned u64 in an entry from a successful lookup; see `sock::add`.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) 1_u64) };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: an aligned word in an entry from a successful lookup.
    let last = unsafe { (&raw const (*health).failed).read_volatile() };
    if now.wrapping_sub(last) < EVENT_PAUSE {
        return;
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*health.cast_mut()).failed).write_volatile(now) };
    tell(state, cookie, kind, now);
}

/// A handshake that had to be tried again has been answered.
#[inline(always)]
fn alive(cookie: u64) {
    let Some(state) = SOCK_CONN.get_ptr(cookie) else {
        return;
    };
    let Some(health) = health(state) else {
        return;
    };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: an aligned word in an entry from a successful lookup.
    unsafe { (&raw mut (*health.cast_mut()).alive).write_volatile(now) };
    tell(state, cookie, event_kind::ALIVE, now);
}

#[inline(always)]
fn tell(state: *const SockState, cookie: u64, kind: u32, time: u64) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        count(Counter::EventLost);
        return;
    };
    let event: *mut Event = entry.as_mut_ptr();
    // SAFETY: the record is ours until it is submitted, and every field is written; the state comes from a lookup.
    unsafe {
        ptr::write(&raw mut (*event).time, time);
        ptr::write(&raw mut (*event).kind, kind);
        ptr::write(
            &raw mut (*event).service,
            (&raw const (*state).service).read_volatile(),
        );
        ptr::write(
            &raw mut (*event).backend,
            (&raw const (*state).backend).read_volatile(),
        );
        ptr::write(
            &raw mut (*event).generation,
            (&raw const (*state).generation).read_volatile(),
        );
        ptr::write(&raw mut (*event).cookie, cookie);
    }
    entry.submit(0);
}
