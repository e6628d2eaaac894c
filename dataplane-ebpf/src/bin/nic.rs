//! Programs at the devices through which clients and remote backends are reached.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    clippy::needless_pass_by_value,
    unreachable_pub,
    reason = "what the attribute macros ask for and write"
)]

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use dataplane_ebpf::nic;

/// See [`nic::ingress`].
#[classifier]
pub fn nic_ingress(ctx: TcContext) -> i32 {
    nic::ingress(ctx.skb.skb)
}

/// See [`nic::egress`].
#[classifier]
pub fn nic_egress(ctx: TcContext) -> i32 {
    nic::egress(ctx.skb.skb)
}

dataplane_ebpf::end_of_object!();
