//! Whose address a pod sends with: its own, and with IPv6 link-local ones for what stays on the link.
//!
//! For IPv4 the node's `rp_filter` says the same; the short way does not pass it.

use dataplane_common::abi::{Addr, PodDevice};

use super::ETHERNET;
use super::header::Header;
use crate::nic::skb::Skb;

const ICMPV6: u8 = 58;
/// Types of ICMPv6 (RFC 4861 4) that only routers send.
const ROUTER_ADVERTISEMENT: u8 = 134;
const REDIRECT: u8 = 137;
/// Says that an address is at the sender: the target is behind the first eight bytes (RFC 4861 4.4).
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// True if the packet may come from this pod.
#[inline(always)]
pub(super) fn belongs(skb: Skb, header: &Header, row: &PodDevice) -> bool {
    if !header.v6 {
        return header.src.same(&row.v4);
    }
    if header.protocol == ICMPV6 && !neighbour(skb, row) {
        return false;
    }
    if header.src.words_be() == [0; 4] {
        // duplicate address detection and the reports of its group come before there is an address
        return link_multicast(&header.dst);
    }
    header.src.same(&row.v6)
        || link_local(&header.src) && (link_local(&header.dst) || link_multicast(&header.dst))
}

/// False for what says of other addresses, or of routes, something that is not the pod's to say.
#[inline(always)]
fn neighbour(skb: Skb, row: &PodDevice) -> bool {
    let l4 = ETHERNET + 40;
    let Some(first) = skb.half(l4) else {
        return true;
    };
    let [kind, _] = first.to_ne_bytes();
    match kind {
        ROUTER_ADVERTISEMENT | REDIRECT => false,
        NEIGHBOUR_ADVERTISEMENT => {
            let Some(target) = address(skb, l4 + 8) else {
                return false;
            };
            target.same(&row.v6) || link_local(&target)
        }
        _ => true,
    }
}

#[inline(always)]
fn address(skb: Skb, offset: u32) -> Option<Addr> {
    Some(Addr::from_v6_be([
        skb.word(offset)?,
        skb.word(offset + 4)?,
        skb.word(offset + 8)?,
        skb.word(offset + 12)?,
    ]))
}

/// fe80::/10.
#[inline(always)]
fn link_local(addr: &Addr) -> bool {
    let [first, second, ..] = addr.words_be()[0].to_ne_bytes();
    first == 0xfe && second & 0xc0 == 0x80
}

/// ff02::/16, and with other flags.
#[inline(always)]
fn link_multicast(addr: &Addr) -> bool {
    let [first, second, ..] = addr.words_be()[0].to_ne_bytes();
    first == 0xff && second & 0x0f == 2
}
