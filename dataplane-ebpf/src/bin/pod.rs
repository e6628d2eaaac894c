//! Programs at the node's ends of pods' devices.
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

/// See [`nic::from_pod`].
#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    nic::from_pod(ctx.skb.skb)
}

/// See [`nic::to_pod`].
#[classifier]
pub fn pod_egress(ctx: TcContext) -> i32 {
    nic::to_pod(ctx.skb.skb)
}

dataplane_ebpf::end_of_object!();
