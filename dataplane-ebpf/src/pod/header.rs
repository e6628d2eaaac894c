//! The network header of a plain packet.

use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use dataplane_common::abi::{Addr, protocol};

use super::ETHERNET;
use crate::nic::skb::Skb;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// Where the transport header of a plain packet begins.
const L4_V4: u32 = ETHERNET + 20;
const L4_V6: u32 = ETHERNET + 40;

/// What the programs here ask about. IPv4 options make `l4` 0.
pub(super) struct Header {
    pub(super) src: Addr,
    pub(super) dst: Addr,
    pub(super) v6: bool,
    /// Of IPv6 what follows the fixed header.
    pub(super) protocol: u8,
    /// Time to live, hop limit.
    pub(super) lifetime: u8,
    /// Type of service, traffic class.
    pub(super) tos: u8,
    /// False for IPv4 fragments but the first.
    pub(super) first: bool,
    /// Where the transport header is; 0 if there is something in between.
    pub(super) l4: u32,
    /// IPv4: time to live, protocol and checksum as they lie in the packet.
    pub(super) middle: u32,
}

#[inline(always)]
fn words<const N: usize>(skb: Skb) -> Option<[u32; N]> {
    let mut words = [0_u32; N];
    #[expect(clippy::cast_possible_truncation, reason = "40 at most")]
    let len = size_of::<[u32; N]>() as u32;
    // SAFETY: the context is valid, and `words` is as long as said.
    let result = unsafe { bpf_skb_load_bytes(skb.0.cast(), ETHERNET, words.as_mut_ptr().cast(), len) };
    (result == 0).then_some(words)
}

impl Header {
    /// `None` for what is neither IPv4 nor IPv6, or cut short.
    #[inline(always)]
    pub(super) fn read(skb: Skb) -> Option<Self> {
        match skb.ethertype() {
            IPV4 => Self::v4(skb),
            IPV6 => Self::v6(skb),
            _ => None,
        }
    }

    #[inline(always)]
    fn v4(skb: Skb) -> Option<Self> {
        let words: [u32; 5] = words(skb)?;
        let [version, tos, ..] = words[0].to_ne_bytes();
        let [_, _, fragment, offset] = words[1].to_ne_bytes();
        let [lifetime, protocol, ..] = words[2].to_ne_bytes();
        Some(Self {
            src: Addr::from_v4_be(words[3]),
            dst: Addr::from_v4_be(words[4]),
            v6: false,
            protocol,
            lifetime,
            tos,
            first: fragment & 0x1f == 0 && offset == 0,
            l4: if version == 0x45 { L4_V4 } else { 0 },
            middle: words[2],
        })
    }

    #[inline(always)]
    fn v6(skb: Skb) -> Option<Self> {
        let words: [u32; 10] = words(skb)?;
        let [_, _, protocol, lifetime] = words[1].to_ne_bytes();
        let class = u32::from_be(words[0]) >> 20 & 0xff;
        let tos = class as u8;
        Some(Self {
            src: Addr::from_v6_be([words[2], words[3], words[4], words[5]]),
            dst: Addr::from_v6_be([words[6], words[7], words[8], words[9]]),
            v6: true,
            protocol,
            lifetime,
            tos,
            first: true,
            l4: L4_V6,
            middle: 0,
        })
    }

    /// Length of the largest packet that this becomes on the wire, in bytes from the network header on. `None` if that
    /// cannot be told.
    #[inline(always)]
    pub(super) fn length(&self, skb: Skb) -> Option<u32> {
        let segment = skb.gso_size();
        if segment == 0 {
            return Some(skb.len().saturating_sub(ETHERNET));
        }
        let transport = match self.protocol {
            protocol::TCP => {
                let [offset, ..] = skb.half(self.l4 + 12)?.to_ne_bytes();
                u32::from(offset >> 4) * 4
            }
            protocol::UDP => 8,
            _ => return None,
        };
        Some(self.l4 - ETHERNET + transport + segment)
    }
}
