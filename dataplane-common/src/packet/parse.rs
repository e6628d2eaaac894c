//! Finding the tuple of a packet.
//!
//! Every length and offset that a packet claims is checked against what is there before it is used; what does not fit is
//! [`Outcome::Truncated`] and goes on untouched, so that a packet that this parser reads in another way than the kernel
//! cannot be made by lying about lengths.

use crate::abi::{Addr, BePort, protocol};

/// Something that bytes can be copied from: a packet from its link-layer header on.
pub trait Load {
    /// Copies the `N` bytes at `offset`. False, with `into` in any state, if they are not all there.
    fn load<const N: usize>(&self, offset: u32, into: &mut [u8; N]) -> bool;
}

impl Load for [u8] {
    fn load<const N: usize>(&self, offset: u32, into: &mut [u8; N]) -> bool {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..));
        let Some(bytes) = rest.and_then(|rest| rest.first_chunk()) else {
            return false;
        };
        *into = *bytes;
        true
    }
}

/// What [`parse`] made of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A packet with ports: the head is filled in.
    Flow,
    /// A later fragment: the head is filled in but for the ports (an echo's identifier), which only the first fragment has.
    LaterFragment,
    /// An ICMP error about a packet with ports: the head's tuple is that packet's, seen from its other end.
    IcmpError,
    /// An echo: the identifier is the port of the end that asks, the other one is 0.
    Echo,
    /// Nothing that services are concerned with.
    Other,
    /// Shorter than its headers say.
    Truncated,
}

/// Flags of a [`Head`].
pub mod head_flag {
    /// IPv6.
    pub const V6: u8 = 1 << 0;
    /// The first of several fragments.
    pub const FIRST_FRAGMENT: u8 = 1 << 1;
    /// A fragment without ports.
    pub const LATER_FRAGMENT: u8 = 1 << 2;
    /// The tuple is that of the packet inside an ICMP error.
    pub const ICMP_ERROR: u8 = 1 << 3;
    /// An ICMP echo, or its answer.
    pub const ECHO: u8 = 1 << 4;
}

/// Flags of TCP (RFC 9293 3.1) as they are in the header.
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1 << 0;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 1 << 1;
    /// Reset the connection.
    pub const RST: u8 = 1 << 2;
    /// The acknowledgment number means something.
    pub const ACK: u8 = 1 << 4;
}

/// Where everything is in a packet. Offsets count from the link-layer header.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Head {
    /// Source of the tuple.
    pub src: Addr,
    /// Destination of the tuple.
    pub dst: Addr,
    /// Source port of the tuple.
    pub src_port: BePort,
    /// Destination port of the tuple.
    pub dst_port: BePort,
    /// Protocol of the tuple, see [`protocol`].
    pub protocol: u8,
    /// See [`head_flag`].
    pub flags: u8,
    /// See [`tcp_flag`]; 0 for what is not TCP.
    pub tcp_flags: u8,
    /// Always 0.
    pub pad: u8,
    /// Identification of the datagram, if it is a fragment; as it lies in the packet.
    pub id: u32,
    /// Offset of the IP header.
    pub l3: u32,
    /// Offset of the transport header (of the ICMP header for an error).
    pub l4: u32,
    /// Length of the packet from the IP header on.
    pub len: u32,
    /// Offset of the IP header inside an ICMP error.
    pub inner_l3: u32,
    /// Offset of the transport header inside an ICMP error; at least eight bytes of it are there.
    pub inner_l4: u32,
}

const _: () = assert!(size_of::<Head>() == 64 && align_of::<Head>() == 4);

/// Ethernet types, as numbers.
const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86dd;
const ETH_VLAN: u16 = 0x8100;
const ETH_QINQ: u16 = 0x88a8;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Extension headers of IPv6 that are skipped (RFC 8200 4.1); more than these many make the packet [`Outcome::Other`].
const EXTENSIONS: usize = 6;

/// Finds the tuple of a packet of `len` bytes whose IP header, or first VLAN tag, is at `link`. `ethertype` is its Ethernet
/// type (the outermost that is still in the packet), as a number.
#[inline(always)]
pub fn parse<L: Load + ?Sized>(data: &L, link: u32, ethertype: u16, len: u32, head: &mut Head) -> Outcome {
    head.flags = 0;
    head.tcp_flags = 0;
    head.pad = 0;
    head.id = 0;
    head.inner_l3 = 0;
    head.inner_l4 = 0;
    let (mut offset, mut kind) = (link, ethertype);
    // at most two tags: IEEE 802.1ad
    let mut tags = 0;
    while tags < 2 && (kind == ETH_VLAN || kind == ETH_QINQ) {
        let mut tag = [0; 4];
        if !data.load(offset, &mut tag) {
            return Outcome::Truncated;
        }
        kind = u16::from_be_bytes([tag[2], tag[3]]);
        offset += 4;
        tags += 1;
    }
    head.l3 = offset;
    if offset > len {
        return Outcome::Truncated;
    }
    let there = len - offset;
    let ip = match kind {
        ETH_IPV4 => ipv4(data, offset, there, head),
        ETH_IPV6 => {
            head.flags = head_flag::V6;
            ipv6(data, offset, there, head)
        }
        _ => return Outcome::Other,
    };
    let Ok(ip) = ip else {
        return ip.err().unwrap_or(Outcome::Other);
    };
    head.l4 = ip.l4;
    head.len = ip.end - offset;
    head.protocol = ip.protocol;
    let v6 = head.flags & head_flag::V6 != 0;
    if ip.later {
        head.flags |= head_flag::LATER_FRAGMENT;
        return match ip.protocol {
            protocol::TCP | protocol::UDP | protocol::SCTP => Outcome::LaterFragment,
            ICMP | ICMPV6 if (ip.protocol == ICMPV6) == v6 => {
                // of ICMP only an echo is known by its first fragment
                head.flags |= head_flag::ECHO;
                Outcome::LaterFragment
            }
            _ => Outcome::Other,
        };
    }
    if ip.fragment {
        head.flags |= head_flag::FIRST_FRAGMENT;
    }
    let payload = ip.end - ip.l4;
    match ip.protocol {
        protocol::TCP => {
            let mut tcp = [0; 14];
            if payload < 20 || !data.load(ip.l4, &mut tcp) {
                return Outcome::Truncated;
            }
            head.src_port = BePort::from_be(u16::from_ne_bytes([tcp[0], tcp[1]]));
            head.dst_port = BePort::from_be(u16::from_ne_bytes([tcp[2], tcp[3]]));
            head.tcp_flags = tcp[13];
            // a header shorter than the shortest, or longer than the packet
            let header = u32::from(tcp[12] >> 4) * 4;
            if header < 20 || (header > payload && !ip.fragment) {
                return Outcome::Truncated;
            }
            Outcome::Flow
        }
        protocol::UDP if payload >= 8 => ports(data, ip.l4, head),
        protocol::SCTP if payload >= 12 => ports(data, ip.l4, head),
        protocol::UDP | protocol::SCTP => Outcome::Truncated,
        ICMP | ICMPV6 if (ip.protocol == ICMPV6) == v6 => icmp(data, &ip, payload, head),
        _ => Outcome::Other,
    }
}

#[inline(always)]
fn ports<L: Load + ?Sized>(data: &L, l4: u32, head: &mut Head) -> Outcome {
    let mut ports = [0; 4];
    if !data.load(l4, &mut ports) {
        return Outcome::Truncated;
    }
    head.src_port = BePort::from_be(u16::from_ne_bytes([ports[0], ports[1]]));
    head.dst_port = BePort::from_be(u16::from_ne_bytes([ports[2], ports[3]]));
    Outcome::Flow
}

/// What an IP header says.
struct Ip {
    protocol: u8,
    /// Offset of what follows the headers.
    l4: u32,
    /// Offset of the end of the packet.
    end: u32,
    /// One of several.
    fragment: bool,
    /// Not the first.
    later: bool,
}

#[inline(always)]
fn be16(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

#[inline(always)]
fn ne32(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        Some(chunk) => u32::from_ne_bytes(*chunk),
        None => 0,
    }
}

/// `there` bytes are there from `offset` on. Fills in the addresses and the identification.
#[inline(always)]
fn ipv4<L: Load + ?Sized>(data: &L, offset: u32, there: u32, head: &mut Head) -> Result<Ip, Outcome> {
    let mut ip = [0; 20];
    if there < 20 || !data.load(offset, &mut ip) {
        return Err(Outcome::Truncated);
    }
    if ip[0] >> 4 != 4 {
        return Err(Outcome::Other);
    }
    let header = u32::from(ip[0] & 15) * 4;
    let mut total = u32::from(be16(ip[2], ip[3]));
    if total == 0 && there > 0xffff {
        // big TCP: the kernel's own packets of more than 64 KiB, which a device is going to cut
        total = there;
    }
    if header < 20 || total < header || total > there {
        return Err(Outcome::Truncated);
    }
    head.src = Addr::from_v4_be(ne32(&ip, 12));
    head.dst = Addr::from_v4_be(ne32(&ip, 16));
    let fragment = be16(ip[6], ip[7]) & 0x3fff;
    head.id = u32::from(u16::from_ne_bytes([ip[4], ip[5]]));
    Ok(Ip {
        protocol: ip[9],
        l4: offset + header,
        end: offset + total,
        fragment: fragment != 0,
        later: fragment & 0x1fff != 0,
    })
}

/// As [`ipv4`].
#[inline(always)]
fn ipv6<L: Load + ?Sized>(data: &L, offset: u32, there: u32, head: &mut Head) -> Result<Ip, Outcome> {
    let mut ip = [0; 40];
    if there < 40 || !data.load(offset, &mut ip) {
        return Err(Outcome::Truncated);
    }
    if ip[0] >> 4 != 6 {
        return Err(Outcome::Other);
    }
    let mut payload = u32::from(be16(ip[4], ip[5]));
    if payload == 0 && there > 0xffff {
        // big TCP, see `ipv4`; without it a jumbogram (RFC 2675), which is as good
        payload = there - 40;
    }
    if payload > there - 40 {
        return Err(Outcome::Truncated);
    }
    head.src = Addr::from_v6_be([ne32(&ip, 8), ne32(&ip, 12), ne32(&ip, 16), ne32(&ip, 20)]);
    head.dst = Addr::from_v6_be([ne32(&ip, 24), ne32(&ip, 28), ne32(&ip, 32), ne32(&ip, 36)]);
    if head.src.is_v4() || head.dst.is_v4() {
        // on the wire nobody may have these (RFC 4942 2.2), and here they would be taken for addresses of IPv4
        return Err(Outcome::Other);
    }
    let mut out = Ip {
        protocol: ip[6],
        l4: offset + 40,
        end: offset + 40 + payload,
        fragment: false,
        later: false,
    };
    let mut n = 0;
    while n < EXTENSIONS {
        n += 1;
        let mut extension = [0; 8];
        match out.protocol {
            // hop-by-hop options, routing, fragment, authentication, destination options
            0 | 43 | 44 | 51 | 60 => {}
            _ => return Ok(out),
        }
        if out.end - out.l4 < 8 || !data.load(out.l4, &mut extension) {
            return Err(Outcome::Truncated);
        }
        let length = match out.protocol {
            44 => {
                let fragment = be16(extension[2], extension[3]);
                // an atomic fragment (RFC 6946) is a whole packet
                out.fragment = fragment & 0xfff9 != 0;
                out.later = fragment & 0xfff8 != 0;
                head.id = ne32(&extension, 4);
                8
            }
            51 => (u32::from(extension[1]) + 2) * 4,
            // to the last of several destinations only: on the way the address is not the final one
            43 if extension[3] != 0 => return Err(Outcome::Other),
            _ => (u32::from(extension[1]) + 1) * 8,
        };
        if length > out.end - out.l4 {
            return Err(Outcome::Truncated);
        }
        out.protocol = extension[0];
        out.l4 += length;
        if out.later {
            // what follows is data, whatever the first fragment's headers are
            return Ok(out);
        }
    }
    match out.protocol {
        0 | 43 | 44 | 51 | 60 => Err(Outcome::Other),
        _ => Ok(out),
    }
}

/// An ICMP message that is no error (RFC 792, RFC 4443 4): if it is an echo, its identifier.
#[inline(always)]
fn echo<L: Load + ?Sized>(data: &L, l4: u32, kind: u8, v6: bool, head: &mut Head) -> Outcome {
    let (asks, answers) = if v6 { (128, 129) } else { (8, 0) };
    if kind != asks && kind != answers {
        return Outcome::Other;
    }
    let mut id = [0; 2];
    if !data.load(l4 + 4, &mut id) {
        return Outcome::Truncated;
    }
    let id = BePort::from_be(u16::from_ne_bytes(id));
    let none = BePort::from_be(0);
    (head.src_port, head.dst_port) = if kind == asks { (id, none) } else { (none, id) };
    head.flags |= head_flag::ECHO;
    Outcome::Echo
}

/// An ICMP message of `payload` bytes: if it is an error, the packet inside.
#[inline(always)]
fn icmp<L: Load + ?Sized>(data: &L, ip: &Ip, payload: u32, head: &mut Head) -> Outcome {
    let v6 = ip.protocol == ICMPV6;
    let mut kind = [0; 1];
    if payload < 8 || !data.load(ip.l4, &mut kind) {
        return Outcome::Truncated;
    }
    // unreachable, time exceeded, parameter problem; for IPv6 also too big (RFC 792, RFC 4443)
    let error = if v6 {
        (1..=4).contains(&kind[0])
    } else {
        matches!(kind[0], 3 | 11 | 12)
    };
    if !error {
        return echo(data, ip.l4, kind[0], v6, head);
    }
    // an error quotes little enough to need no fragments (RFC 1812 4.3.2.3, RFC 4443 2.4)
    if ip.fragment {
        return Outcome::Other;
    }
    let outer_dst = head.dst;
    let (inner, there) = (ip.l4 + 8, payload - 8);
    head.flags |= head_flag::ICMP_ERROR;
    head.inner_l3 = inner;
    let found = if v6 {
        quoted_ipv6(data, inner, there, head)
    } else {
        quoted_ipv4(data, inner, there, head)
    };
    let Ok((protocol, l4)) = found else {
        return found.err().unwrap_or(Outcome::Other);
    };
    // an error goes to the sender of the packet that it is about
    if !head.src.same(&outer_dst) {
        return Outcome::Other;
    }
    head.protocol = protocol;
    head.inner_l4 = l4;
    match protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {}
        _ => return Outcome::Other,
    }
    // the ports and at least four bytes more, or the error is no use to anybody (RFC 792)
    if ip.end.saturating_sub(l4) < 8 {
        return Outcome::Truncated;
    }
    if ports(data, l4, head) != Outcome::Flow {
        return Outcome::Truncated;
    }
    // seen from the other end: as an answer to the packet would be
    let (src, src_port) = (head.src, head.src_port);
    head.src = head.dst;
    head.src_port = head.dst_port;
    head.dst = src;
    head.dst_port = src_port;
    Outcome::IcmpError
}

/// The header of a packet that was cut off somewhere: its own length says nothing about what is there.
#[inline(always)]
fn quoted_ipv4<L: Load + ?Sized>(
    data: &L,
    offset: u32,
    there: u32,
    head: &mut Head,
) -> Result<(u8, u32), Outcome> {
    let mut ip = [0; 20];
    if there < 20 || !data.load(offset, &mut ip) {
        return Err(Outcome::Truncated);
    }
    let header = u32::from(ip[0] & 15) * 4;
    // only the first fragment has ports
    if ip[0] >> 4 != 4 || be16(ip[6], ip[7]) & 0x1fff != 0 {
        return Err(Outcome::Other);
    }
    if header < 20 || header > there {
        return Err(Outcome::Truncated);
    }
    head.src = Addr::from_v4_be(ne32(&ip, 12));
    head.dst = Addr::from_v4_be(ne32(&ip, 16));
    Ok((ip[9], offset + header))
}

/// As [`quoted_ipv4`]; a packet with extension headers other than one for a first fragment is not looked into.
#[inline(always)]
fn quoted_ipv6<L: Load + ?Sized>(
    data: &L,
    offset: u32,
    there: u32,
    head: &mut Head,
) -> Result<(u8, u32), Outcome> {
    let mut ip = [0; 40];
    if there < 40 || !data.load(offset, &mut ip) {
        return Err(Outcome::Truncated);
    }
    if ip[0] >> 4 != 6 {
        return Err(Outcome::Other);
    }
    head.src = Addr::from_v6_be([ne32(&ip, 8), ne32(&ip, 12), ne32(&ip, 16), ne32(&ip, 20)]);
    head.dst = Addr::from_v6_be([ne32(&ip, 24), ne32(&ip, 28), ne32(&ip, 32), ne32(&ip, 36)]);
    if head.src.is_v4() || head.dst.is_v4() {
        // on the wire nobody may have these (RFC 4942 2.2), and here they would be taken for addresses of IPv4
        return Err(Outcome::Other);
    }
    if ip[6] != 44 {
        return Ok((ip[6], offset + 40));
    }
    let mut fragment = [0; 8];
    if there < 48 || !data.load(offset + 40, &mut fragment) {
        return Err(Outcome::Truncated);
    }
    if be16(fragment[2], fragment[3]) & 0xfff8 != 0 {
        return Err(Outcome::Other);
    }
    Ok((fragment[0], offset + 48))
}
