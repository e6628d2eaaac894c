//! Packets of the probe.

use std::net::{IpAddr, SocketAddr};

use beeline_cni::mac::Mac;

const PROTOCOL_UDP: u8 = 17;
/// (IPv4, IPv6)
const PROTOCOL_ICMP: (u8, u8) = (1, 58);
const ECHO_REQUEST: (u8, u8) = (8, 128);
const ECHO_REPLY: (u8, u8) = (0, 129);
/// Of an ICMP echo message.
const ICMP_HEADER: usize = 8;
const UDP_HEADER: usize = 8;

/// Length of the IP header that the kernel, or [`frame`], puts before.
fn ip_header(ip: IpAddr) -> usize {
    if ip.is_ipv4() { 20 } else { 40 }
}

fn pick(ip: IpAddr, both: (u8, u8)) -> u8 {
    if ip.is_ipv4() { both.0 } else { both.1 }
}

/// The ones' complement sum of big-endian words (RFC 1071); parts but the last have even lengths.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum: u64 = 0;
    for part in parts {
        for word in part.chunks(2) {
            let low = word.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([word[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap_or(0)).to_be_bytes()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Source, destination, protocol and length, as checksums of transport protocols have them.
fn pseudo_header(source: IpAddr, target: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = octets(source);
    bytes.extend(octets(target));
    bytes.extend([0, protocol]);
    bytes.extend(u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    bytes
}

/// An ICMP echo request whose IP packet has `size` bytes (at least an empty one). The checksum of IPv6 is in it as well,
/// for frames; of a raw socket the kernel computes it again.
pub(super) fn echo(source: IpAddr, target: IpAddr, (id, sequence): (u16, u16), size: u32) -> Vec<u8> {
    let length = usize::try_from(size)
        .unwrap_or(0)
        .saturating_sub(ip_header(target));
    let mut message = vec![0; length.max(ICMP_HEADER)];
    message[0] = pick(target, ECHO_REQUEST);
    message[4..6].copy_from_slice(&id.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum = match target {
        IpAddr::V4(_) => checksum(&[&message]),
        IpAddr::V6(_) => {
            let pseudo = pseudo_header(source, target, PROTOCOL_ICMP.1, message.len());
            checksum(&[&pseudo, &message])
        }
    };
    message[2..4].copy_from_slice(&sum);
    message
}

/// The sequence number of an answer to our echo request, from what a raw socket of the family gives.
pub(super) fn reply(v4: bool, packet: &[u8], id: u16) -> Option<u16> {
    // IPv4 packets come with their header
    let skip = if v4 {
        usize::from(packet.first()? & 0x0f) * 4
    } else {
        0
    };
    let message = packet.get(skip..skip + ICMP_HEADER)?;
    let kind = if v4 { ECHO_REPLY.0 } else { ECHO_REPLY.1 };
    let ours = message[0] == kind && message[4..6] == id.to_be_bytes();
    ours.then(|| u16::from_be_bytes([message[6], message[7]]))
}

/// A UDP datagram whose checksum is complete.
pub(super) fn datagram(source: SocketAddr, target: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = UDP_HEADER + payload.len();
    let mut message = Vec::with_capacity(length);
    message.extend(source.port().to_be_bytes());
    message.extend(target.port().to_be_bytes());
    message.extend(u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    message.extend([0, 0]);
    message.extend(payload);
    let pseudo = pseudo_header(source.ip(), target.ip(), PROTOCOL_UDP, length);
    let sum = match checksum(&[&pseudo, &message]) {
        // 0 says that there is none
        [0, 0] => [0xff, 0xff],
        sum => sum,
    };
    message[6..8].copy_from_slice(&sum);
    message
}

/// A VXLAN packet (RFC 7348) with an ICMP message to everybody's Ethernet address: a device takes it whatever its own is.
pub(super) fn frame(vni: u32, own: Mac, source: IpAddr, target: IpAddr, icmp: &[u8]) -> Vec<u8> {
    const I_FLAG: u8 = 0x08;
    const TTL: u8 = 64;
    let mut packet = vec![I_FLAG, 0, 0, 0];
    packet.extend((vni << 8).to_be_bytes());
    packet.extend([0xff; 6]);
    packet.extend(own.0);
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    let protocol = pick(target, PROTOCOL_ICMP);
    if target.is_ipv4() {
        packet.extend(0x0800_u16.to_be_bytes());
        let mut header = vec![0x45, 0];
        header.extend(length(ip_header(target) + icmp.len()));
        header.extend([0, 0, 0, 0, TTL, protocol, 0, 0]);
        header.extend(octets(source));
        header.extend(octets(target));
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum);
        packet.extend(header);
    } else {
        packet.extend(0x86dd_u16.to_be_bytes());
        packet.extend([0x60, 0, 0, 0]);
        packet.extend(length(icmp.len()));
        packet.extend([protocol, TTL]);
        packet.extend(octets(source));
        packet.extend(octets(target));
    }
    packet.extend(icmp);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_echo_has_the_size_and_a_checksum_that_adds_up() {
        let message = echo(ip("10.0.0.0"), ip("10.0.1.0"), (7, 9), 1450);
        assert_eq!(message.len(), 1430);
        assert_eq!(checksum(&[&message]), [0, 0]);
        let (source, target) = (ip("fd00::"), ip("fd01::"));
        let message = echo(source, target, (7, 9), 0);
        assert_eq!(message.len(), 8);
        let pseudo = pseudo_header(source, target, 58, 8);
        assert_eq!(checksum(&[&pseudo, &message]), [0, 0]);
    }

    #[test]
    fn only_answers_to_our_own_requests_are_taken() {
        let mut packet = vec![0x46; 24];
        packet.extend(echo(ip("10.0.0.0"), ip("10.0.1.0"), (7, 9), 0));
        assert_eq!(reply(true, &packet, 7), None, "a request");
        packet[24] = 0;
        assert_eq!(reply(true, &packet, 7), Some(9));
        assert_eq!(reply(true, &packet, 8), None);
        for end in 0..packet.len() {
            assert_eq!(reply(true, &packet[..end], 7), None, "cut off after {end}");
        }
    }

    #[test]
    fn a_datagram_and_a_frame_are_what_the_kernel_makes() {
        let message = datagram(
            "10.0.0.0:1".parse().unwrap(),
            "10.0.1.0:2".parse().unwrap(),
            b"odd",
        );
        let pseudo = pseudo_header(ip("10.0.0.0"), ip("10.0.1.0"), 17, message.len());
        assert_eq!(checksum(&[&pseudo, &message]), [0, 0]);
        let frame = frame(1, Mac([2; 6]), ip("10.0.0.0"), ip("10.0.1.0"), &[8; 10]);
        assert_eq!(frame[..8], [8, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(
            frame[8..22],
            [255, 255, 255, 255, 255, 255, 2, 2, 2, 2, 2, 2, 8, 0]
        );
        assert_eq!(checksum(&[&frame[22..42]]), [0, 0]);
        assert_eq!(frame[24..26], 30_u16.to_be_bytes());
        assert_eq!(frame.len(), 52);
    }
}
