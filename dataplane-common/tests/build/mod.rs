//! Packets for tests: made field by field, and checked by computing every checksum anew. Shared by the tests of the parser
//! and of the programs.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
#![allow(clippy::cast_possible_truncation, reason = "packets are short")]

use std::net::{IpAddr, SocketAddr};

use dataplane_common::packet::checksum::{fold, sum};
use dataplane_common::packet::crc32c::crc32c;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// A packet to be made. What is not asked for is as plain as can be.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) protocol: u8,
    pub(crate) tcp_flags: u8,
    pub(crate) payload: Vec<u8>,
    /// Options of IPv4 (a multiple of four bytes).
    pub(crate) options: Vec<u8>,
    /// Extension headers of IPv6: number and bytes, whose first is replaced by the next header's number.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) vlans: Vec<u16>,
    /// Bytes of Ethernet; devices without a link layer have none.
    pub(crate) ethernet: bool,
    pub(crate) id: u16,
    pub(crate) udp_checksum: bool,
}

pub(crate) fn packet(protocol: u8, src: &str, dst: &str) -> Packet {
    Packet {
        src: src.parse().unwrap(),
        dst: dst.parse().unwrap(),
        protocol,
        tcp_flags: SYN,
        payload: b"beeline".to_vec(),
        options: vec![],
        extensions: vec![],
        vlans: vec![],
        ethernet: true,
        id: 0x1234,
        udp_checksum: true,
    }
}

pub(crate) fn tcp(src: &str, dst: &str, flags: u8) -> Packet {
    Packet {
        tcp_flags: flags,
        ..packet(TCP, src, dst)
    }
}

pub(crate) fn udp(src: &str, dst: &str) -> Packet {
    packet(UDP, src, dst)
}

pub(crate) fn sctp(src: &str, dst: &str) -> Packet {
    packet(SCTP, src, dst)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> u32 {
    let mut bytes = octets(src);
    bytes.extend(octets(dst));
    bytes.extend([0, protocol]);
    bytes.extend((len as u32).to_be_bytes());
    sum(0, &bytes)
}

fn put(bytes: &mut [u8], at: usize, checksum: u16) {
    bytes[at..at + 2].copy_from_slice(&checksum.to_ne_bytes());
}

impl Packet {
    /// The transport header and payload, with its checksum.
    pub(crate) fn transport(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.src.port().to_be_bytes());
        out.extend(self.dst.port().to_be_bytes());
        match self.protocol {
            TCP => {
                out.extend(100_u32.to_be_bytes());
                out.extend(200_u32.to_be_bytes());
                out.extend([5 << 4, self.tcp_flags, 0x20, 0, 0, 0, 0, 0]);
            }
            UDP => {
                out.extend((8 + self.payload.len() as u16).to_be_bytes());
                out.extend([0, 0]);
            }
            SCTP => out.extend([0, 0, 0, 9, 0, 0, 0, 0]),
            _ => {}
        }
        out.extend(&self.payload);
        let pseudo = pseudo(self.src.ip(), self.dst.ip(), self.protocol, out.len());
        match self.protocol {
            TCP => {
                let field = !fold(sum(pseudo, &out));
                put(&mut out, 16, field);
            }
            UDP if self.udp_checksum => {
                let field = !fold(sum(pseudo, &out));
                put(&mut out, 6, if field == 0 { 0xffff } else { field });
            }
            SCTP => {
                let crc = crc32c(&out).to_le_bytes();
                out[8..12].copy_from_slice(&crc);
            }
            // type and code in place of the one port, the checksum in place of the other
            ICMP | ICMPV6 => {
                put(&mut out, 2, 0);
                let pseudo = if self.protocol == ICMP { 0 } else { pseudo };
                let field = !fold(sum(pseudo, &out));
                put(&mut out, 2, field);
            }
            _ => {}
        }
        out
    }

    fn link(&self) -> Vec<u8> {
        if !self.ethernet {
            return vec![];
        }
        let mut out = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        for vlan in &self.vlans {
            out.extend(0x8100_u16.to_be_bytes());
            out.extend(vlan.to_be_bytes());
        }
        out.extend(if self.src.is_ipv4() {
            [0x08, 0]
        } else {
            [0x86, 0xdd]
        });
        out
    }

    /// One packet with this behind its IP header; `fragment` is its offset in bytes and whether more follow.
    fn with(&self, content: &[u8], protocol: u8, fragment: Option<(u16, bool)>) -> Vec<u8> {
        let mut out = self.link();
        let start = out.len();
        if self.src.is_ipv4() {
            let header = 20 + self.options.len();
            out.extend([0x40 | (header / 4) as u8, 0]);
            out.extend(((header + content.len()) as u16).to_be_bytes());
            out.extend(self.id.to_be_bytes());
            let bits = fragment.map_or(0x4000, |(offset, more)| (offset / 8) | (u16::from(more) << 13));
            out.extend(bits.to_be_bytes());
            out.extend([64, protocol, 0, 0]);
            out.extend(octets(self.src.ip()));
            out.extend(octets(self.dst.ip()));
            out.extend(&self.options);
            let field = !fold(sum(0, &out[start..]));
            put(&mut out, start + 10, field);
            out.extend(content);
        } else {
            let mut extensions = self.extensions.clone();
            if let Some((offset, more)) = fragment {
                let mut bytes = vec![0, 0];
                bytes.extend((offset | u16::from(more)).to_be_bytes());
                bytes.extend(u32::from(self.id).to_be_bytes());
                extensions.push((44, bytes));
            }
            let len: usize = extensions.iter().map(|(_, bytes)| bytes.len()).sum();
            out.extend([0x60, 0, 0, 0]);
            out.extend(((len + content.len()) as u16).to_be_bytes());
            out.extend([extensions.first().map_or(protocol, |(number, _)| *number), 64]);
            out.extend(octets(self.src.ip()));
            out.extend(octets(self.dst.ip()));
            for (i, (_, bytes)) in extensions.iter().enumerate() {
                out.push(extensions.get(i + 1).map_or(protocol, |(number, _)| *number));
                out.extend(&bytes[1..]);
            }
            out.extend(content);
        }
        out
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        self.with(&self.transport(), self.protocol, None)
    }

    /// As fragments of at most `size` bytes of content (a multiple of eight).
    pub(crate) fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let content = self.transport();
        let count = content.len().div_ceil(size);
        let part = |(i, chunk): (usize, &[u8])| {
            self.with(chunk, self.protocol, Some(((i * size) as u16, i + 1 < count)))
        };
        content.chunks(size).enumerate().map(part).collect()
    }

    /// An ICMP error about this packet from `from` to the sender, with at most `quote` bytes of it.
    pub(crate) fn error(&self, from: &str, kind: u8, code: u8, quote: usize) -> Vec<u8> {
        let plain = Self {
            ethernet: false,
            ..self.clone()
        };
        let inner = plain.build();
        let outer = Self {
            src: SocketAddr::new(from.parse().unwrap(), 0),
            dst: SocketAddr::new(self.src.ip(), 0),
            options: vec![],
            extensions: vec![],
            ..self.clone()
        };
        let v6 = self.src.is_ipv6();
        let mut icmp = vec![kind, code, 0, 0, 0, 0, 0x05, 0x14];
        icmp.extend(&inner[..inner.len().min(quote)]);
        let protocol = if v6 { ICMPV6 } else { ICMP };
        let start = if v6 {
            pseudo(outer.src.ip(), outer.dst.ip(), protocol, icmp.len())
        } else {
            0
        };
        let field = !fold(sum(start, &icmp));
        put(&mut icmp, 2, field);
        outer.with(&icmp, protocol, None)
    }
}

/// What a packet says, read the simple way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) protocol: u8,
    /// What follows the transport header (ICMP: the packet inside).
    pub(crate) rest: Vec<u8>,
}

impl Seen {
    /// `source > destination`.
    pub(crate) fn tuple(&self) -> String {
        format!("{} > {}", self.src, self.dst)
    }

    /// The packet inside an ICMP error; its checksums are checked as far as it is there.
    pub(crate) fn inside(&self) -> Self {
        read(&self.rest, true)
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Reads an Ethernet packet and checks every checksum that covers all that it should be computed from. Panics, naming what
/// is wrong.
pub(crate) fn check(packet: &[u8]) -> Seen {
    let mut at = 12;
    while be16(packet, at) == 0x8100 || be16(packet, at) == 0x88a8 {
        at += 4;
    }
    read(&packet[at + 2..], false)
}

/// The same without a link layer.
pub(crate) fn check_ip(packet: &[u8]) -> Seen {
    read(packet, false)
}

fn read(ip: &[u8], quoted: bool) -> Seen {
    let (src, dst, protocol, header, total, fragment) = if ip[0] >> 4 == 4 {
        let header = usize::from(ip[0] & 15) * 4;
        assert_eq!(fold(sum(0, &ip[..header])), 0xffff, "checksum of the IPv4 header");
        let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).unwrap());
        let fragment = be16(ip, 6) & 0x3fff;
        (
            address(12),
            address(16),
            ip[9],
            header,
            usize::from(be16(ip, 2)),
            fragment,
        )
    } else {
        let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).unwrap());
        let (mut protocol, mut header, mut fragment) = (ip[6], 40, 0);
        loop {
            let length = match protocol {
                0 | 43 | 60 => (usize::from(ip[header + 1]) + 1) * 8,
                51 => (usize::from(ip[header + 1]) + 2) * 4,
                44 => {
                    fragment = be16(ip, header + 2) & 0xfff9;
                    8
                }
                _ => break,
            };
            protocol = ip[header];
            header += length;
            if fragment & 0xfff8 != 0 {
                break;
            }
        }
        (
            address(8),
            address(24),
            protocol,
            header,
            usize::from(be16(ip, 4)) + 40,
            fragment,
        )
    };
    let whole = fragment == 0 && ip.len() >= total;
    let later = if ip[0] >> 4 == 4 {
        fragment & 0x1fff != 0
    } else {
        fragment & 0xfff8 != 0
    };
    let content = &ip[header..ip.len().min(total)];
    if later {
        return Seen {
            src: SocketAddr::new(src, 0),
            dst: SocketAddr::new(dst, 0),
            protocol,
            rest: content.to_vec(),
        };
    }
    let icmp = protocol == ICMP || protocol == ICMPV6;
    let (sport, dport, start) = match protocol {
        TCP => (
            be16(content, 0),
            be16(content, 2),
            if quoted { content.len().min(20) } else { 20 },
        ),
        UDP => (be16(content, 0), be16(content, 2), 8),
        SCTP => (be16(content, 0), be16(content, 2), content.len().min(12)),
        _ => (0, 0, 8),
    };
    if whole {
        let pseudo = if protocol == ICMP {
            0
        } else {
            pseudo(src, dst, protocol, content.len())
        };
        let right = match protocol {
            TCP | ICMP | ICMPV6 => fold(sum(pseudo, content)) == 0xffff,
            UDP => be16(content, 6) == 0 || fold(sum(pseudo, content)) == 0xffff,
            // nobody changes it inside of an error: the header's eight bytes there need not reach it
            SCTP if quoted => true,
            SCTP => {
                let mut copy = content.to_vec();
                copy[8..12].fill(0);
                crc32c(&copy).to_le_bytes() == content[8..12]
            }
            _ => true,
        };
        assert!(right, "checksum of protocol {protocol} in {ip:02x?}");
        assert!(!icmp || !quoted);
    }
    Seen {
        src: SocketAddr::new(src, sport),
        dst: SocketAddr::new(dst, dport),
        protocol,
        rest: content[start..].to_vec(),
    }
}
