//! Services for sockets: the destination is rewritten once per connection (or datagram); nothing is done per packet.
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value they would be copied on the 512-byte stack"
)]

pub mod access;
pub mod frontend;

use core::arch::asm;
use core::ptr;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_ANY, BPF_TCP_SYN_SENT};
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_set_retval, bpf_sk_storage_get};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use aya_log_ebpf::debug;
use dataplane_common::abi::{
    BackendStats, Counter, FrontendKey, NO_ID, Service, SockOrigin, SockOriginKey, SockState, event_kind,
    frontend_class, protocol,
};

use crate::choose::{Caller, Choice, again, for_connection, service_row};
use crate::context::{self, Family, address, port, rewrite};
use crate::frontend::Frontend;
use crate::maps::{
    BACKEND_STATS, BACKENDS, HAVE_SET_RETVAL, SOCK_CONN, SOCK_FLOW, SOCK_ORIGIN, SOCK_STATE, count,
};
use crate::ops::report_failure;

/// Verdict of a cgroup hook: go on.
pub const ALLOW: i32 = 1;
/// Verdict of a cgroup hook: fail the system call.
pub const REFUSE: i32 = 0;

const ECONNREFUSED: i32 = 111;

#[inline(always)]
fn key(ctx: &SockAddrContext, family: Family) -> FrontendKey {
    FrontendKey {
        addr: address(ctx, family),
        port: port(ctx),
        protocol: context::protocol(ctx),
        class: frontend_class::ADDRESS,
    }
}

/// The system call fails, with "connection refused" where the kernel lets us say so.
#[inline(always)]
fn refuse(ctx: &SockAddrContext, reason: Counter) -> i32 {
    count(reason);
    debug!(ctx, "refused, counter {}", reason as u32);
    if HAVE_SET_RETVAL.load() != 0 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}

/// Adds one to a counter that other CPUs and user space use too.
#[inline(always)]
fn add(counter: impl Fn(*const BackendStats) -> *const u64, backend: u32) {
    if let Some(stats) = BACKEND_STATS.get_ptr(backend) {
        // SAFETY: an aligned u64 in an entry from a successful lookup. Written as the instruction itself because core
        // has no atomic add for this target; without a result it is XADD, which every kernel has.
        unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter(stats), in(reg) 1u64) };
    }
}

/// The connection that a socket's state describes has ended.
#[inline(always)]
fn closed(state: &mut SockState) {
    let backend = state.backend;
    if backend == NO_ID {
        return;
    }
    state.backend = NO_ID;
    // A row that has been given to another backend since does not count it.
    if let Some(row) = BACKENDS.get_ptr(backend)
        // SAFETY: from a successful lookup.
        && unsafe { (&raw const (*row).generation).read_volatile() } == state.generation
    {
        // SAFETY: field address within the entry.
        add(|stats| unsafe { &raw const (*stats).closed }, backend);
    }
}

/// How the socket is translated, null if it is not. `udp` is known where the verifier looks: only one way is left of each
/// program that is for one protocol.
#[inline(always)]
fn state(ctx: &SockAddrContext, udp: bool) -> *mut SockState {
    if udp {
        // SAFETY: without a value the call only looks the storage up.
        unsafe { SOCK_STATE.get_ptr_mut(ctx) }
    } else {
        SOCK_CONN.get_ptr_mut(&cookie(ctx)).unwrap_or_default()
    }
}

impl Caller for SockAddrContext {
    #[inline(always)]
    fn flow(&self) -> u64 {
        cookie(self)
    }

    #[inline(always)]
    fn client(&self) -> u64 {
        access::netns(self)
    }
}

/// What becomes of a call to a frontend.
enum Admitted {
    /// It goes to a backend of the service.
    Service(*const Service),
    /// It is left alone.
    Untouched,
    /// It fails.
    Refused(Counter),
}

#[inline(always)]
fn admit(ctx: &SockAddrContext, front: Frontend, key: &FrontendKey) -> Admitted {
    if front.is_unknown_port() {
        return Admitted::Refused(Counter::UnknownPort);
    }
    let Some(row) = service_row(front.service()) else {
        return Admitted::Refused(Counter::BadService);
    };
    if front.has_source_ranges() {
        match access::entry(ctx, row, &key.addr) {
            access::Entry::Open => {}
            access::Entry::Denied => return Admitted::Refused(Counter::Denied),
            // The packet shows its source, and the ranges are checked there.
            access::Entry::Unknown => {
                count(Counter::LeftToPackets);
                return Admitted::Untouched;
            }
        }
    }
    Admitted::Service(row)
}

/// `connect4`, `connect6`: TCP, and UDP that wants a fixed peer.
#[inline(always)]
pub fn connect(ctx: &SockAddrContext, family: Family) -> i32 {
    let key = key(ctx, family);
    let front = frontend::find(ctx, &key);
    if front.is_none() {
        // A UDP socket may have been connected to a frontend before. So may a TCP socket, by a connect that failed; but
        // looking for that would cost every direct connection more than it is worth: it counts as open until its end.
        if key.protocol == protocol::UDP {
            let state = state(ctx, true);
            if !state.is_null() {
                // SAFETY: not null, so it is this socket's state, and the socket is locked.
                closed(unsafe { &mut *state });
                let _ = SOCK_CONN.remove(&cookie(ctx));
            }
        }
        return ALLOW;
    }
    let row = match admit(ctx, front, &key) {
        Admitted::Service(row) => row,
        Admitted::Untouched => return ALLOW,
        Admitted::Refused(reason) => return refuse(ctx, reason),
    };
    let choice = match for_connection(row, front.service(), front.is_internal(), ctx) {
        Ok(choice) => choice,
        Err(reason) => return refuse(ctx, reason),
    };
    if !rewrite(ctx, family, choice.addr(), choice.port()) {
        return refuse(ctx, Counter::BadBackend);
    }
    // SAFETY: field address within the entry.
    add(|stats| unsafe { &raw const (*stats).connections }, choice.backend);
    if !remember_connection(ctx, &key, &choice) {
        count(Counter::StateLost);
        // its end will not be seen
        // SAFETY: as above.
        add(|stats| unsafe { &raw const (*stats).closed }, choice.backend);
    }
    count(Counter::Connected);
    debug!(ctx, "service {} to backend {}", choice.service, choice.backend);
    ALLOW
}

/// False if the connection cannot be remembered.
#[inline(always)]
fn remember_connection(ctx: &SockAddrContext, key: &FrontendKey, choice: &Choice) -> bool {
    if key.protocol == protocol::UDP {
        // SAFETY: creates this socket's storage, zeroed, or finds it.
        let state = unsafe { SOCK_STATE.get_or_insert_ptr_mut(ctx, None) };
        if state.is_null() {
            return false;
        }
        // SAFETY: not null, so it is this socket's storage, and the socket is locked.
        let state = unsafe { &mut *state };
        closed(state);
        fill(state, key, choice);
        // for user space, which cannot read the storage of others' sockets
        if SOCK_CONN
            .insert(&cookie(ctx), &*state, u64::from(BPF_ANY))
            .is_err()
        {
            count(Counter::StateLost);
        }
        return true;
    }
    let cookie = cookie(ctx);
    if let Some(state) = SOCK_CONN.get_ptr_mut(&cookie) {
        // SAFETY: this socket's state, and the socket is locked.
        let state = unsafe { &mut *state };
        closed(state);
        fill(state, key, choice);
        return true;
    }
    let mut state = SockState::default();
    fill(&mut state, key, choice);
    SOCK_CONN.insert(&cookie, &state, u64::from(BPF_ANY)).is_ok()
}

#[inline(always)]
fn fill(state: &mut SockState, key: &FrontendKey, choice: &Choice) {
    state.addr = key.addr;
    state.port = key.port;
    state.service = choice.service;
    state.backend = choice.backend;
    state.generation = choice.generation();
    state.backend_addr = choice.addr();
    state.backend_port = choice.port();
}

/// `sendmsg4`, `sendmsg6`: a datagram of an unconnected UDP socket. A socket keeps its backend for a frontend as long as
/// that is in the set.
#[inline(always)]
pub fn sendmsg(ctx: &SockAddrContext, family: Family) -> i32 {
    let key = key(ctx, family);
    let front = frontend::find(ctx, &key);
    if front.is_none() {
        return ALLOW;
    }
    let row = match admit(ctx, front, &key) {
        Admitted::Service(row) => row,
        Admitted::Untouched => return ALLOW,
        Admitted::Refused(reason) => return refuse(ctx, reason),
    };
    let (service, internal) = (front.service(), front.is_internal());
    // SAFETY: creates this socket's storage, zeroed, or finds it.
    let flow = unsafe { SOCK_FLOW.get_or_insert_ptr_mut(ctx, None) };
    let mut kept = None;
    if !flow.is_null() {
        // SAFETY: not null, so it is this socket's storage.
        let before = unsafe { &*flow };
        if before.backend != NO_ID
            && before.service == service
            && before.addr.same(&key.addr)
            && before.port == key.port
        {
            kept = again(service, internal, before.backend, before.place);
        }
    }
    let choice = match kept {
        Some(choice) => choice,
        None => match for_connection(row, service, internal, ctx) {
            Ok(choice) => choice,
            Err(reason) => return refuse(ctx, reason),
        },
    };
    if !rewrite(ctx, family, choice.addr(), choice.port()) {
        return refuse(ctx, Counter::BadBackend);
    }
    if !flow.is_null() {
        // SAFETY: not null, so it is this socket's storage. Another thread that sends on the same socket may mix two
        // records; `again` checks every part of what it finds.
        let flow = unsafe { &mut *flow };
        flow.addr = key.addr;
        flow.port = key.port;
        flow.service = service;
        flow.backend = choice.backend;
        flow.place = choice.place;
    }
    remember_origin(ctx, &key, &choice);
    count(Counter::DatagramTranslated);
    // SAFETY: field address within the entry.
    add(|stats| unsafe { &raw const (*stats).datagrams }, choice.backend);
    ALLOW
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is valid for the helper.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn remember_origin(ctx: &SockAddrContext, key: &FrontendKey, choice: &Choice) {
    let origin_key = SockOriginKey {
        cookie: cookie(ctx),
        addr: choice.addr(),
        port: choice.port(),
        pad: [0; 3],
    };
    let origin = SockOrigin {
        addr: key.addr,
        port: key.port,
        pad: 0,
        service: choice.service,
    };
    // A look-up keeps the entry young and is cheaper than writing it again.
    // SAFETY: an entry may be recycled while it is read; then the comparison fails and it is written.
    if let Some(known) = unsafe { SOCK_ORIGIN.get(&origin_key) }
        && known.addr.same(&origin.addr)
        && known.port == origin.port
    {
        return;
    }
    if SOCK_ORIGIN
        .insert(&origin_key, &origin, u64::from(BPF_ANY))
        .is_err()
    {
        count(Counter::OriginLost);
    }
}

/// `recvmsg4`, `recvmsg6`: the source of a received datagram becomes the frontend that the application knows.
#[inline(always)]
pub fn recvmsg(ctx: &SockAddrContext, family: Family) -> i32 {
    if peer(ctx, family, true) {
        count(Counter::ReplyTranslated);
        return ALLOW;
    }
    // SAFETY: without a value the call only looks the storage up.
    if unsafe { SOCK_FLOW.get_ptr_mut(ctx) }.is_null() {
        // This socket never sent to a frontend.
        return ALLOW;
    }
    let origin_key = SockOriginKey {
        cookie: cookie(ctx),
        addr: address(ctx, family),
        port: port(ctx),
        pad: [0; 3],
    };
    // SAFETY: the value is copied at once; the key holds the socket's cookie, so no other socket's entry is meant.
    if let Some(origin) = unsafe { SOCK_ORIGIN.get(&origin_key) }.copied()
        && rewrite(ctx, family, origin.addr, origin.port)
    {
        count(Counter::ReplyTranslated);
    }
    ALLOW
}

/// `getpeername4`, `getpeername6`: the peer of a connected socket is the frontend that the application connected to.
#[inline(always)]
pub fn getpeername(ctx: &SockAddrContext, family: Family) -> i32 {
    peer(ctx, family, context::protocol(ctx) == protocol::UDP);
    ALLOW
}

/// If the address in the context is the backend that this socket was connected to, shows the frontend instead.
#[inline(always)]
fn peer(ctx: &SockAddrContext, family: Family, udp: bool) -> bool {
    let state = state(ctx, udp);
    if state.is_null() {
        return false;
    }
    // SAFETY: not null, so it is this socket's state.
    let state = unsafe { &*state };
    state.backend != NO_ID
        && state.backend_addr.same(&address(ctx, family))
        && state.backend_port == port(ctx)
        && rewrite(ctx, family, state.addr, state.port)
}

/// `sock_release`: the last descriptor of a socket is closed, also by the end of its process.
#[inline(always)]
pub fn release(ctx: &SockContext) -> i32 {
    // SAFETY: the context is the socket; a 4-byte field of it.
    let number = unsafe { (&raw const (*ctx.sock).protocol).read_volatile() };
    if number == u32::from(protocol::UDP) {
        let map = (&raw const SOCK_STATE).cast_mut().cast();
        // SAFETY: for this hook the kernel takes the context itself as the socket; a null value only looks up.
        let state = unsafe { bpf_sk_storage_get(map, ctx.sock.cast(), ptr::null_mut(), 0) };
        if !state.is_null() {
            // SAFETY: not null, so it is this socket's storage, a `SockState`.
            closed(unsafe { &mut *state.cast::<SockState>() });
            // SAFETY: the context is valid for the helper.
            let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
            let _ = SOCK_CONN.remove(&cookie);
        }
        return ALLOW;
    }
    // SAFETY: the context is valid for the helper.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
    if let Some(state) = SOCK_CONN.get_ptr_mut(&cookie) {
        // SAFETY: the context is the socket; a 4-byte field of it.
        if unsafe { (&raw const (*ctx.sock).state).read_volatile() } == BPF_TCP_SYN_SENT {
            // The application has not waited for an answer any longer.
            report_failure(state, cookie, event_kind::CONNECT_FAILED);
        }
        // SAFETY: this socket's state, which nobody else uses any more.
        closed(unsafe { &mut *state });
        let _ = SOCK_CONN.remove(&cookie);
    }
    ALLOW
}
