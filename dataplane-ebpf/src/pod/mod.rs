//! Pods of this node whose devices are ours: whose addresses they may use, how much they may send and get, and the short
//! way between pods, past the node's routing and netfilter.
//!
//! Whatever is not plain (options, a lifetime that ends here, a packet that does not fit, a route that is not there) is left
//! to the node's own forwarding, which also makes the ICMP errors.

mod header;
mod limit;
mod source;
mod way;

use dataplane_common::abi::{Addr, Counter, Device, NodeConfig, config_flag, masquerade, pod_flag, protocol};

use self::header::Header;
use crate::maps::{POD_DEVICES, PODS, count};
use crate::nic::skb::Skb;
use crate::nic::{DROP, PASS, masquerade_class};

/// The only link-layer header that is known here.
const ETHERNET: u32 = 14;

/// Configuration in which somebody else translates flows, whose packets the node's netfilter has to see.
const FOREIGN: u32 = config_flag::FOREIGN_FLOWS | config_flag::NO_NEW_FLOWS;

/// A packet comes in by the device. Gives the verdict, if that ends its way here.
#[inline(always)]
pub(crate) fn ingress<const POD: bool>(skb: Skb, device: &Device, config: *const NodeConfig) -> Option<i32> {
    if device.header != ETHERNET {
        return None;
    }
    let own = if POD {
        // a device of somebody else's if it is not there
        Some(POD_DEVICES.get_ptr_mut(skb.ifindex())?)
    } else {
        None
    };
    let header = Header::read(skb)?;
    let mut short = true;
    if let Some(row) = own {
        // SAFETY: from a successful lookup; user space changes a row as a whole.
        let row = unsafe { &mut *row };
        if !source::belongs(skb, &header, row) {
            count(Counter::SourceForeign);
            return Some(DROP);
        }
        if !limit::admit(&mut row.out, skb.len()) {
            count(Counter::OverLimit);
            return Some(DROP);
        }
        short = row.flags & pod_flag::SHORT != 0;
    }
    if own.is_none() && into_tunnel(skb, &header, device) {
        return Some(PASS);
    }
    // SAFETY: from a successful lookup; an aligned word.
    let flags = unsafe { (&raw const (*config).flags).read_volatile() };
    if !short || flags & FOREIGN != 0 {
        return None;
    }
    let verdict = if let Some(pod) = PODS.get_ptr_mut(header.dst) {
        // SAFETY: from a successful lookup.
        let pod = unsafe { &*pod };
        if own.is_none() && masquerade_class(&header.src) & masquerade::REMOTE_PODS == 0 {
            // from the world, or from who only says to be a pod of this node
            return None;
        }
        way::to_pod(skb, &header, pod)
    } else if own.is_some() && masquerade_class(&header.dst) & masquerade::REMOTE_PODS != 0 {
        way::to_node(skb, &header)
    } else {
        return None;
    };
    if verdict != Some(DROP) {
        count(if verdict.is_none() {
            Counter::LongWay
        } else {
            Counter::ShortWay
        });
    }
    verdict
}

/// The packet is for the node's own tunnel: what it carries comes in again by the tunnel's device, and is looked at there.
#[inline(always)]
fn into_tunnel(skb: Skb, header: &Header, device: &Device) -> bool {
    let own = if header.v6 { &device.v6 } else { &device.v4 };
    header.protocol == protocol::UDP
        && device.tunnel.to_be() != 0
        && header.l4 != 0
        && header.first
        && header.dst.same(own)
        && skb.half(header.l4 + 2) == Some(device.tunnel.to_be())
}

/// A packet is for the pod of this device. True unless that gets more than it may.
#[inline(always)]
pub(crate) fn egress(skb: Skb) -> bool {
    into_pod(skb.ifindex(), skb.len())
}

/// True unless a pod gets more than it may.
#[inline(always)]
fn into_pod(ifindex: u32, len: u32) -> bool {
    let Some(row) = POD_DEVICES.get_ptr_mut(ifindex) else {
        return true;
    };
    // SAFETY: from a successful lookup.
    let admitted = limit::admit(unsafe { &mut (*row).into }, len);
    if !admitted {
        count(Counter::OverLimit);
    }
    admitted
}

/// The packet programs have made a flow that this pod began.
#[inline(always)]
pub(crate) fn translated(addr: &Addr) {
    if let Some(pod) = PODS.get_ptr_mut(addr) {
        // SAFETY: from a successful lookup; an aligned word in which the programs set only this bit.
        unsafe {
            let flags = &raw mut (*pod).flags;
            flags.write_volatile(flags.read_volatile() | pod_flag::TRANSLATED);
        }
    }
}
