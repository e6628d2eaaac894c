//! Putting another address and other ports into a packet.

use dataplane_common::abi::{Addr, protocol};
use dataplane_common::packet::checksum::{apply, difference};
use dataplane_common::packet::{Head, Load, crc32c, head_flag};

use super::Target;
use super::skb::Skb;

/// Which end of a packet changes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// The change from one address to another. The family is the packet's.
#[inline(always)]
fn change(old: &Addr, new: &Addr, v6: bool) -> u32 {
    let (old, new) = (old.words_be(), new.words_be());
    let last = difference(0, old[3], new[3]);
    if v6 {
        difference(
            difference(difference(last, old[0], new[0]), old[1], new[1]),
            old[2],
            new[2],
        )
    } else {
        last
    }
}

/// The two ports as one word, with `side`'s port and, if it is not 0, the other end's replaced.
#[inline(always)]
fn ports(old: u32, side: Side, target: &Target) -> u32 {
    // in memory order: source, destination
    let [a, b, c, d] = old.to_ne_bytes();
    let (mut source, mut destination) = ([a, b], [c, d]);
    let port = target.port.to_be().to_ne_bytes();
    let other = target.other.to_be().to_ne_bytes();
    let keep = target.other.to_be() == 0;
    if side == Side::Source {
        source = port;
        if !keep {
            destination = other;
        }
    } else {
        destination = port;
        if !keep {
            source = other;
        }
    }
    u32::from_ne_bytes([source[0], source[1], destination[0], destination[1]])
}

/// Offset of an address in an IP header.
#[inline(always)]
fn address_offset(v6: bool, side: Side) -> u32 {
    match (v6, side) {
        (false, Side::Source) => 12,
        (false, Side::Destination) => 16,
        (true, Side::Source) => 8,
        (true, Side::Destination) => 24,
    }
}

/// The address at `offset` as it is in the packet.
#[inline(always)]
fn read_address(skb: Skb, offset: u32, v6: bool, into: &mut Addr) -> bool {
    if v6 {
        let mut bytes = [0; 16];
        if !skb.load(offset, &mut bytes) {
            return false;
        }
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        *into = Addr::from_v6_be([
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ]);
        return true;
    }
    match skb.word(offset) {
        Some(word) => {
            *into = Addr::from_v4_be(word);
            true
        }
        None => false,
    }
}

/// Writes the address of the outer header and what follows from it there.
#[inline(always)]
fn outer(skb: Skb, head: &Head, side: Side, new: &Addr, change: u32) -> bool {
    let v6 = head.flags & head_flag::V6 != 0;
    let at = head.l3 + address_offset(v6, side);
    if v6 {
        skb.store_summed(at, &new.words_be())
    } else {
        skb.change_header(head.l3 + 10, change) && skb.store(at, &new.v4_be())
    }
}

/// Gives the packet `target` as its source or destination. False if the packet could not be changed, or not wholly: then
/// it must not go on.
#[inline(always)]
pub(super) fn rewrite(skb: Skb, head: &Head, side: Side, target: &Target) -> bool {
    let v6 = head.flags & head_flag::V6 != 0;
    if v6 == target.addr.is_v4() {
        return false;
    }
    if head.flags & head_flag::ICMP_ERROR != 0 {
        return error(skb, head, side, target);
    }
    let old = if side == Side::Source {
        &head.src
    } else {
        &head.dst
    };
    let change = change(old, &target.addr, v6);
    if head.flags & head_flag::LATER_FRAGMENT == 0 && !transport(skb, head, side, target, change) {
        return false;
    }
    outer(skb, head, side, &target.addr, change)
}

/// The ports, and the checksum that covers them and the addresses.
#[inline(always)]
fn transport(skb: Skb, head: &Head, side: Side, target: &Target, change: u32) -> bool {
    let Some(old) = skb.word(head.l4) else {
        return false;
    };
    let new = ports(old, side, target);
    let udp = head.protocol == protocol::UDP;
    if head.flags & head_flag::ECHO != 0 {
        return echo(skb, head, target, change);
    }
    if head.protocol == protocol::SCTP {
        return old == new || sctp(skb, head, old, new);
    }
    let field = head.l4 + if udp { 6 } else { 16 };
    skb.change_pseudo(field, change, udp)
        && (old == new || skb.change_payload(field, difference(0, old, new), udp) && skb.store(head.l4, &new))
}

/// An echo has its identifier where others have ports, and the same in both directions.
#[inline(always)]
fn echo(skb: Skb, head: &Head, target: &Target, change: u32) -> bool {
    let (at, field) = (head.l4 + 4, head.l4 + 2);
    let Some(old) = skb.half(at) else {
        return false;
    };
    let new = target.port.to_be();
    // only ICMPv6 covers the addresses
    if head.flags & head_flag::V6 != 0 && !skb.change_pseudo(field, change, false) {
        return false;
    }
    old == new
        || skb.change_payload(field, difference(0, u32::from(old), u32::from(new)), false)
            && skb.store(at, &new)
}

/// SCTP has a CRC, which covers no addresses.
#[inline(always)]
fn sctp(skb: Skb, head: &Head, old: u32, new: u32) -> bool {
    let Some(field) = skb.word(head.l4 + 8) else {
        return false;
    };
    if field != 0 {
        // How a change spreads depends on what is behind it, which is known for a whole packet only. Packets whose CRC is
        // left to a device have 0 there.
        let behind = (head.l3 + head.len).wrapping_sub(head.l4 + 4);
        if head.flags & head_flag::FIRST_FRAGMENT != 0 || behind > crc32c::MAX_LEN {
            return false;
        }
        let field = crc32c::changed(u32::from_le(field), old, new, behind).to_le();
        if !skb.store_summed(head.l4 + 8, &field) {
            return false;
        }
    }
    skb.store_summed(head.l4, &new)
}

/// An ICMP error: its own address as in any packet of the direction, and the packet inside, which went the other way.
#[inline(always)]
fn error(skb: Skb, head: &Head, side: Side, target: &Target) -> bool {
    let v6 = head.flags & head_flag::V6 != 0;
    let inside = if side == Side::Source {
        Side::Destination
    } else {
        Side::Source
    };
    let mut old_outer = Addr::default();
    if !read_address(skb, head.l3 + address_offset(v6, side), v6, &mut old_outer) {
        return false;
    }
    let outer_change = change(&old_outer, &target.addr, v6);
    // the tuple is the inner one's from its other end, so this is what the packet inside has on its other side
    let old_inner = if side == Side::Source {
        &head.src
    } else {
        &head.dst
    };
    let inner_change = change(old_inner, &target.addr, v6);

    let Some(old) = skb.word(head.inner_l4) else {
        return false;
    };
    let new = ports(old, inside, target);
    let mut covered = difference(0, old, new);
    if !skb.store(head.inner_l4, &new) {
        return false;
    }
    // The checksum inside, where it is quoted: nobody is known to check it, but it should not be made wrong.
    let at = match head.protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => 0,
    };
    if at != 0 && head.inner_l4 + at + 2 <= head.l3 + head.len {
        let Some(field) = skb.half(head.inner_l4 + at) else {
            return false;
        };
        let udp = head.protocol == protocol::UDP;
        if !udp || field != 0 {
            let mut now = apply(apply(field, inner_change), covered);
            if udp && now == 0 {
                now = 0xffff;
            }
            if !skb.store(head.inner_l4 + at, &now) {
                return false;
            }
            covered = difference(covered, u32::from(field), u32::from(now));
        }
    }
    let at = head.inner_l3 + address_offset(v6, inside);
    let field = head.l4 + 2;
    if v6 {
        let words = target.addr.words_be();
        let old = old_inner.words_be();
        let mut i = 0;
        while i < 4 {
            covered = difference(covered, old[i], words[i]);
            i += 1;
        }
        if !(skb.store(at, &words) && skb.change_pseudo(field, outer_change, false)) {
            return false;
        }
    } else {
        // inside, the address and the header's checksum change against each other, and the sum over both stays
        if !(skb.change_header(head.inner_l3 + 10, inner_change) && skb.store(at, &target.addr.v4_be())) {
            return false;
        }
    }
    skb.change_payload(field, covered, false) && outer(skb, head, side, &target.addr, outer_change)
}
