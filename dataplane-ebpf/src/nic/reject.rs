//! Answering that nobody is there, as a host without a listener would: ICMP port unreachable (spec kube-proxy 2.2).
//!
//! The packet itself becomes the answer: cut off behind its transport header, with new headers before it, sent back by the
//! device that it came in by.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail};
use aya_ebpf::macros::btf_map;
use dataplane_common::abi::{Addr, Counter, Device, protocol};
use dataplane_common::packet::checksum::{add, fold, settled, word};
use dataplane_common::packet::{Head, Load, head_flag};

use super::DROP;
use super::skb::Skb;
use crate::maps::count;

/// Answers per second and CPU; as many at once. A flood is not answered with another.
const RATE: u64 = 1000;
const SECOND: u64 = 1_000_000_000;

/// What may still be answered.
#[repr(C)]
struct Bucket {
    /// When it was filled up last, nanoseconds since boot.
    filled: u64,
    tokens: u64,
}

#[btf_map]
static REJECTS: PerCpuArray<Bucket, 1> = PerCpuArray::new();

/// True if one more answer may be sent.
#[inline(always)]
fn allowed(now: u64) -> bool {
    let Some(bucket) = REJECTS.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: from a successful lookup; only this CPU writes it.
    let bucket = unsafe { &mut *bucket };
    let passed = now.saturating_sub(bucket.filled).min(SECOND);
    let more = passed * RATE / SECOND;
    if more > 0 {
        bucket.tokens = (bucket.tokens + more).min(RATE);
        bucket.filled = now;
    }
    if bucket.tokens == 0 {
        return false;
    }
    bucket.tokens -= 1;
    true
}

const ICMP_V4: u32 = 20 + 8;
const ICMP_V6: u32 = 40 + 8;
const TTL: u8 = 64;
/// Verdict: send the packet by the device that was asked for.
const REDIRECT: i32 = 7;

/// Turns the packet, which must be a whole one or a first fragment, into the answer and sends it back. Gives the verdict.
#[inline(always)]
pub(super) fn answer(skb: Skb, device: &Device, head: &Head, now: u64) -> i32 {
    // A tag in the packet, which room cannot be made behind; extension headers, which services have no use for; a sender
    // whom nobody can answer.
    let extended = head.flags & head_flag::V6 != 0 && head.l4 != head.l3 + 40;
    if head.l3 != device.header || extended || !unicast(&head.src) || !allowed(now) {
        return DROP;
    }
    match turn(skb, device, head) {
        Some(verdict) => {
            count(Counter::Rejected);
            verdict
        }
        None => {
            count(Counter::StoreFailed);
            DROP
        }
    }
}

/// An address that can be answered.
#[inline(always)]
fn unicast(addr: &Addr) -> bool {
    let words = addr.words_be();
    if addr.is_v4() {
        let [first, ..] = words[3].to_ne_bytes();
        first != 0 && first != 127 && first < 224
    } else {
        let [first, ..] = words[0].to_ne_bytes();
        first != 0xff && (words[0] | words[1] | words[2] != 0)
    }
}

#[inline(always)]
fn turn(skb: Skb, device: &Device, head: &Head) -> Option<i32> {
    let v6 = head.flags & head_flag::V6 != 0;
    // Up to the checksum at least: the kernel refuses to cut off what a device is still going to compute.
    let (quoted, field) = match head.protocol {
        protocol::TCP => (20, 16),
        protocol::UDP => (8, 6),
        _ => (12, 8_u32),
    };
    let end = head.l4 + quoted;
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_tail(skb.0, end, 0) } != 0 {
        return None;
    }
    let quote = add(header_sum(skb, head)?, transport_sum(skb, head, field)?);

    let room = if v6 { ICMP_V6 } else { ICMP_V4 };
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_adjust_room(skb.0, room.cast_signed(), BPF_ADJ_ROOM_MAC, 0) } != 0 {
        return None;
    }
    let length = ((end - head.l3 + if v6 { 8 } else { room }) & 0xffff) as u16;
    let stored = if v6 {
        skb.store_summed(head.l3, &header_v6(head, length, quote))
    } else {
        skb.store_summed(head.l3, &header_v4(head, length, quote))
    };
    if !stored || (device.header != 0 && !swap_ethernet(skb)) {
        return None;
    }
    // SAFETY: the helper has no preconditions.
    let verdict = unsafe { bpf_redirect(skb.ifindex(), 0) };
    if verdict == REDIRECT.into() {
        Some(REDIRECT)
    } else {
        None
    }
}

/// The sum of the IP header. In IPv4 its checksum makes that zero, with all its options.
#[inline(always)]
fn header_sum(skb: Skb, head: &Head) -> Option<u32> {
    let mut sum = 0;
    if head.flags & head_flag::V6 != 0 {
        let mut i = 0;
        while i < 10 {
            sum = add(sum, skb.word(head.l3 + i * 4)?);
            i += 1;
        }
    }
    Some(sum)
}

/// The sum of the transport header, whose checksum at `field` becomes one that stays as it is.
#[inline(always)]
fn transport_sum(skb: Skb, head: &Head, field: u32) -> Option<u32> {
    let l4 = head.l4;
    let mut sum = add(skb.word(l4)?, skb.word(l4 + 4)?);
    if head.protocol == protocol::SCTP {
        let crc = skb.word(l4 + 8)?;
        if crc == 0 {
            // A device is going to compute it, over what is quoted. It would cost too much to know it before that.
            return None;
        }
        return Some(add(sum, crc));
    }
    if head.protocol == protocol::TCP {
        sum = add(
            add(sum, skb.word(l4 + 8)?),
            add(skb.word(l4 + 12)?, skb.word(l4 + 16)?),
        );
    }
    let old = skb.half(l4 + field)?;
    sum = add(sum, u32::from(!old));
    let new = settled(sum);
    if !skb.store_summed(l4 + field, &new) {
        return None;
    }
    Some(add(sum, u32::from(new)))
}

#[inline(always)]
fn bytes_of(sum: u32) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// IPv4 and ICMP: type 3 code 3 (RFC 792), with the precedence that Linux gives errors.
#[inline(always)]
fn header_v4(head: &Head, length: u16, quote: u32) -> [u8; ICMP_V4 as usize] {
    let [h, l] = length.to_be_bytes();
    let (from, to) = (head.dst.words_be()[3], head.src.words_be()[3]);
    let mut sum = add(from, to);
    sum = add(sum, word([0x45, 0xc0]));
    sum = add(sum, word([h, l]));
    sum = add(sum, word([0x40, 0]));
    sum = add(sum, word([TTL, 1]));
    let [c, d] = bytes_of(sum);
    let [e, f] = bytes_of(add(quote, word([3, 3])));
    let [s0, s1, s2, s3] = from.to_ne_bytes();
    let [d0, d1, d2, d3] = to.to_ne_bytes();
    [
        0x45, 0xc0, h, l, 0, 0, 0x40, 0, TTL, 1, c, d, s0, s1, s2, s3, d0, d1, d2, d3, 3, 3, e, f, 0, 0, 0, 0,
    ]
}

const ICMPV6: u8 = 58;

/// IPv6 and ICMPv6: type 1 code 4 (RFC 4443 3.1).
#[inline(always)]
fn header_v6(head: &Head, length: u16, quote: u32) -> [u32; ICMP_V6 as usize / 4] {
    let [h, l] = length.to_be_bytes();
    let (from, to) = (head.dst.words_be(), head.src.words_be());
    // the pseudo header (RFC 8200 8.1)
    let mut sum = add(quote, word([1, 4]));
    sum = add(sum, word([h, l]));
    sum = add(sum, word([0, ICMPV6]));
    let mut i = 0;
    while i < 4 {
        sum = add(add(sum, from[i]), to[i]);
        i += 1;
    }
    let [e, f] = bytes_of(sum);
    [
        u32::from_ne_bytes([0x60, 0, 0, 0]),
        u32::from_ne_bytes([h, l, ICMPV6, TTL]),
        from[0],
        from[1],
        from[2],
        from[3],
        to[0],
        to[1],
        to[2],
        to[3],
        u32::from_ne_bytes([1, 4, e, f]),
        0,
    ]
}

#[inline(always)]
fn swap_ethernet(skb: Skb) -> bool {
    let mut old = [0; 12];
    if !skb.load(0, &mut old) {
        return false;
    }
    let [a, b, c, d, e, f, g, h, i, j, k, l] = old;
    skb.store_summed(0, &[g, h, i, j, k, l, a, b, c, d, e, f])
}
