//! Programs at the socket hooks of a cgroup.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    clippy::needless_pass_by_value,
    unreachable_pub,
    reason = "what the attribute macros ask for and write"
)]

use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, sock_ops};
use aya_ebpf::programs::{SockAddrContext, SockContext, SockOpsContext};
use dataplane_ebpf::context::Family;
use dataplane_ebpf::{ops, sock};

/// See [`sock::connect`].
#[cgroup_sock_addr(connect4)]
pub fn sock_connect4(ctx: SockAddrContext) -> i32 {
    sock::connect(&ctx, Family::V4)
}

/// See [`sock::connect`].
#[cgroup_sock_addr(connect6)]
pub fn sock_connect6(ctx: SockAddrContext) -> i32 {
    sock::connect(&ctx, Family::V6)
}

/// See [`sock::sendmsg`].
#[cgroup_sock_addr(sendmsg4)]
pub fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    sock::sendmsg(&ctx, Family::V4)
}

/// See [`sock::sendmsg`].
#[cgroup_sock_addr(sendmsg6)]
pub fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    sock::sendmsg(&ctx, Family::V6)
}

/// See [`sock::recvmsg`].
#[cgroup_sock_addr(recvmsg4)]
pub fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    sock::recvmsg(&ctx, Family::V4)
}

/// See [`sock::recvmsg`].
#[cgroup_sock_addr(recvmsg6)]
pub fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    sock::recvmsg(&ctx, Family::V6)
}

/// See [`sock::getpeername`].
#[cgroup_sock_addr(getpeername4)]
pub fn sock_getpeername4(ctx: SockAddrContext) -> i32 {
    sock::getpeername(&ctx, Family::V4)
}

/// See [`sock::getpeername`].
#[cgroup_sock_addr(getpeername6)]
pub fn sock_getpeername6(ctx: SockAddrContext) -> i32 {
    sock::getpeername(&ctx, Family::V6)
}

/// See [`sock::release`].
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    sock::release(&ctx)
}

/// See [`ops::observe`].
#[sock_ops]
pub fn sock_ops(ctx: SockOpsContext) -> u32 {
    ops::observe(&ctx)
}

dataplane_ebpf::end_of_object!();
