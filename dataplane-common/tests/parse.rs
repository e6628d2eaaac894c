//! The parser, a row for each of its branches, and with bytes of noise.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
#![allow(clippy::cast_possible_truncation, reason = "packets are short")]

mod build;

use build::{ACK, ICMP, ICMPV6, Packet, SYN, TCP, UDP, check, packet, sctp, tcp, udp};
use dataplane_common::packet::{Head, Outcome, head_flag, parse};
use proptest::prelude::*;

fn ethertype(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[12], bytes[13]])
}

fn read(bytes: &[u8]) -> (Outcome, Head) {
    let mut head = Head::default();
    let outcome = parse(bytes, 14, ethertype(bytes), bytes.len() as u32, &mut head);
    (outcome, head)
}

fn tuple(head: &Head) -> String {
    let end = |addr: dataplane_common::abi::Addr, port: dataplane_common::abi::BePort| {
        std::net::SocketAddr::new(addr.to_ip(), port.to_host())
    };
    format!(
        "{} > {}",
        end(head.src, head.src_port),
        end(head.dst, head.dst_port)
    )
}

const V4: (&str, &str) = ("192.0.2.1:40000", "10.96.0.1:80");
const V6: (&str, &str) = ("[2001:db8::1]:40000", "[fd00::1]:80");

/// A header of options of this many bytes (a multiple of eight).
fn options(number: u8, len: usize) -> (u8, Vec<u8>) {
    let mut bytes = vec![0; len];
    bytes[1] = (len / 8 - 1) as u8;
    (number, bytes)
}

#[test]
fn tuples_are_found() {
    let long = [0x01; 40];
    let mut ah = vec![0; 24];
    ah[1] = 4;
    let rows: Vec<(&str, Packet)> = vec![
        ("tcp", tcp(V4.0, V4.1, SYN)),
        ("udp", udp(V4.0, V4.1)),
        ("sctp", sctp(V4.0, V4.1)),
        (
            "options",
            Packet {
                options: vec![1, 1, 1, 0],
                ..tcp(V4.0, V4.1, SYN)
            },
        ),
        (
            "most options",
            Packet {
                options: long.to_vec(),
                ..udp(V4.0, V4.1)
            },
        ),
        (
            "a tag",
            Packet {
                vlans: vec![7],
                ..tcp(V4.0, V4.1, SYN)
            },
        ),
        (
            "two tags",
            Packet {
                vlans: vec![7, 8],
                ..udp(V4.0, V4.1)
            },
        ),
        ("v6 tcp", tcp(V6.0, V6.1, SYN)),
        ("v6 udp", udp(V6.0, V6.1)),
        ("v6 sctp", sctp(V6.0, V6.1)),
        (
            "v6 tag",
            Packet {
                vlans: vec![7],
                ..tcp(V6.0, V6.1, SYN)
            },
        ),
        (
            "hop by hop, destination options",
            Packet {
                extensions: vec![options(0, 8), options(60, 24)],
                ..tcp(V6.0, V6.1, SYN)
            },
        ),
        (
            "routing at its end",
            Packet {
                extensions: vec![options(43, 24)],
                ..udp(V6.0, V6.1)
            },
        ),
        (
            "authentication",
            Packet {
                extensions: vec![(51, ah)],
                ..udp(V6.0, V6.1)
            },
        ),
        (
            "atomic fragment",
            Packet {
                extensions: vec![(44, vec![0; 8])],
                ..udp(V6.0, V6.1)
            },
        ),
        (
            "five extensions",
            Packet {
                extensions: vec![options(60, 8); 5],
                ..udp(V6.0, V6.1)
            },
        ),
    ];
    for (name, made) in rows {
        let bytes = made.build();
        let (outcome, head) = read(&bytes);
        assert_eq!(outcome, Outcome::Flow, "{name}");
        assert_eq!(tuple(&head), format!("{} > {}", made.src, made.dst), "{name}");
        assert_eq!(check(&bytes).tuple(), tuple(&head), "{name}");
        assert_eq!(head.protocol, made.protocol, "{name}");
        assert_eq!(
            head.flags,
            if made.src.is_ipv6() { head_flag::V6 } else { 0 },
            "{name}"
        );
        let tags = made.vlans.len() as u32 * 4;
        assert_eq!(head.l3, 14 + tags, "{name}");
        assert_eq!(head.len, bytes.len() as u32 - 14 - tags, "{name}");
        assert_eq!(head.l4 as usize, bytes.len() - made.transport().len(), "{name}");
        assert_eq!(
            head.tcp_flags,
            if made.protocol == TCP { SYN } else { 0 },
            "{name}"
        );

        // padding behind the packet is no part of it
        let mut padded = bytes.clone();
        padded.extend([0xee; 30]);
        assert_eq!(read(&padded), (outcome, head), "{name}");

        // every shorter one is not read beyond its end, and never taken for whole
        for len in 14..bytes.len() {
            let (outcome, _) = read(&bytes[..len]);
            assert_eq!(outcome, Outcome::Truncated, "{name} of {len} bytes");
        }
    }
}

#[test]
fn what_is_no_tuple_is_told_apart() {
    let base = tcp(V4.0, V4.1, SYN).build();
    let with = |at: usize, bytes: &[u8]| {
        let mut out = base.clone();
        out[at..at + bytes.len()].copy_from_slice(bytes);
        out
    };
    let six = udp(V6.0, V6.1).build();
    let with6 = |at: usize, bytes: &[u8]| {
        let mut out = six.clone();
        out[at..at + bytes.len()].copy_from_slice(bytes);
        out
    };
    let extended = |extensions: Vec<(u8, Vec<u8>)>| {
        Packet {
            extensions,
            ..udp(V6.0, V6.1)
        }
        .build()
    };
    let three_tags = Packet {
        vlans: vec![1, 2, 3],
        ..tcp(V4.0, V4.1, SYN)
    }
    .build();
    let mut to_go = options(43, 24);
    to_go.1[3] = 1;
    let mut too_long = options(60, 8);
    too_long.1[1] = 9;
    let empty = |protocol, len: usize| {
        let mut made = packet(protocol, V4.0, V4.1);
        made.payload.clear();
        let mut bytes = made.build();
        let total = (20 + len) as u16;
        bytes.truncate(34 + len);
        bytes[16..18].copy_from_slice(&total.to_be_bytes());
        bytes
    };
    let rows: Vec<(&str, Vec<u8>, Outcome)> = vec![
        ("arp", with(12, &[8, 6]), Outcome::Other),
        ("three tags", three_tags, Outcome::Other),
        ("gre", with(23, &[47]), Outcome::Other),
        ("version 5", with(14, &[0x55]), Outcome::Other),
        ("header of 16 bytes", with(14, &[0x44]), Outcome::Truncated),
        ("header beyond the end", with(14, &[0x4f]), Outcome::Truncated),
        (
            "total less than the header",
            with(16, &[0, 19]),
            Outcome::Truncated,
        ),
        ("total 0", with(16, &[0, 0]), Outcome::Truncated),
        (
            "total beyond the end",
            with(16, &[0xff, 0xff]),
            Outcome::Truncated,
        ),
        ("tcp header of 16 bytes", with(46, &[4 << 4]), Outcome::Truncated),
        (
            "tcp header beyond the end",
            with(46, &[15 << 4]),
            Outcome::Truncated,
        ),
        ("tcp of 19 bytes", empty(TCP, 19), Outcome::Truncated),
        ("udp of 7 bytes", empty(UDP, 7), Outcome::Truncated),
        ("sctp of 11 bytes", empty(build::SCTP, 11), Outcome::Truncated),
        ("icmp of 7 bytes", empty(ICMP, 7), Outcome::Truncated),
        ("v6: version 4", with6(14, &[0x45]), Outcome::Other),
        (
            "v6: length beyond the end",
            with6(18, &[0, 200]),
            Outcome::Truncated,
        ),
        ("v6: length 0", with6(18, &[0, 0]), Outcome::Truncated),
        ("v6: no next header", with6(20, &[59]), Outcome::Other),
        ("v6: icmp of the other family", with6(20, &[ICMP]), Outcome::Other),
        ("v6: routing on the way", extended(vec![to_go]), Outcome::Other),
        (
            "v6: extension beyond the end",
            extended(vec![too_long]),
            Outcome::Truncated,
        ),
        (
            "v6: seven extensions",
            extended(vec![options(60, 8); 7]),
            Outcome::Other,
        ),
    ];
    for (name, bytes, expected) in rows {
        assert_eq!(read(&bytes).0, expected, "{name}");
    }
}

#[test]
fn fragments_are_told_apart() {
    for (src, dst) in [V4, V6] {
        let made = Packet {
            payload: vec![7; 300],
            ..udp(src, dst)
        };
        let parts = made.fragments(104);
        assert_eq!(parts.len(), 3);
        for (i, part) in parts.iter().enumerate() {
            let (outcome, head) = read(part);
            assert_eq!(head.id.to_ne_bytes().iter().filter(|b| **b != 0).count(), 2);
            assert_eq!(
                (head.src.to_ip(), head.dst.to_ip()),
                (made.src.ip(), made.dst.ip())
            );
            assert_eq!(head.protocol, UDP);
            if i == 0 {
                assert_eq!(outcome, Outcome::Flow);
                assert_ne!(head.flags & head_flag::FIRST_FRAGMENT, 0);
                assert_eq!(tuple(&head), format!("{src} > {dst}"));
            } else {
                assert_eq!(outcome, Outcome::LaterFragment);
                assert_ne!(head.flags & head_flag::LATER_FRAGMENT, 0);
            }
        }
        // a first fragment without the whole transport header (RFC 1858)
        let tiny = tcp(src, dst, SYN).fragments(8);
        assert_eq!(read(&tiny[0]).0, Outcome::Truncated);
    }
    // of ICMP only echoes have something like ports
    for (protocol, (src, dst), asks, fails) in [(ICMP, V4, 8, 3), (ICMPV6, V6, 128, 1)] {
        let of_kind = |kind: u16| {
            let mut packet = packet(protocol, src, dst);
            // type and code are where others have a port; behind the checksum is the identifier
            packet.src.set_port(kind << 8);
            packet.payload = vec![0x12, 0x34, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
            packet
        };
        let echo = of_kind(asks).fragments(8);
        let (outcome, head) = read(&echo[0]);
        let flags = head_flag::ECHO | head_flag::FIRST_FRAGMENT;
        assert_eq!((outcome, head.flags & flags), (Outcome::Echo, flags));
        assert_eq!((head.src_port.to_host(), head.dst_port.to_host()), (0x1234, 0));
        let (outcome, head) = read(&echo[1]);
        let flags = head_flag::ECHO | head_flag::LATER_FRAGMENT;
        assert_eq!((outcome, head.flags & flags), (Outcome::LaterFragment, flags));
        assert_eq!(read(&of_kind(fails).fragments(8)[0]).0, Outcome::Other);
    }
}

#[test]
fn errors_show_the_tuple_from_its_other_end() {
    for (src, dst, router, kinds) in [
        (V4.0, V4.1, "198.51.100.9", &[3_u8, 11, 12][..]),
        (V6.0, V6.1, "2001:db8:9::9", &[1, 2, 3, 4]),
    ] {
        for made in [tcp(src, dst, ACK), udp(src, dst), sctp(src, dst)] {
            for kind in kinds {
                let bytes = made.error(router, *kind, 1, 1280);
                let (outcome, head) = read(&bytes);
                assert_eq!(outcome, Outcome::IcmpError);
                assert_eq!(tuple(&head), format!("{dst} > {src}"));
                assert_eq!(head.protocol, made.protocol);
                assert_ne!(head.flags & head_flag::ICMP_ERROR, 0);
                assert_eq!(head.inner_l3, head.l4 + 8);
            }
            // eight bytes of transport header are enough, less is not
            let header = if made.src.is_ipv4() { 20 } else { 40 };
            assert_eq!(
                read(&made.error(router, kinds[0], 1, header + 8)).0,
                Outcome::IcmpError
            );
            for quote in 0..header + 8 {
                assert_eq!(
                    read(&made.error(router, kinds[0], 1, quote)).0,
                    Outcome::Truncated,
                    "{quote}"
                );
            }
            // no errors: echo, its answer, and others
            let [asks, answers, other] = if made.src.is_ipv4() {
                [8, 0, 13]
            } else {
                [128, 129, 135]
            };
            for (kind, expected) in [(asks, true), (answers, false)] {
                let mut echo = made.error(router, kind, 0, 64);
                let id = 14 + if made.src.is_ipv4() { 20 } else { 40 } + 4;
                echo[id..id + 2].copy_from_slice(&[0x12, 0x34]);
                let (outcome, head) = read(&echo);
                assert_eq!(outcome, Outcome::Echo);
                assert_eq!(
                    head.flags & (head_flag::ECHO | head_flag::ICMP_ERROR),
                    head_flag::ECHO
                );
                let ports = (head.src_port.to_host(), head.dst_port.to_host());
                assert_eq!(ports, if expected { (0x1234, 0) } else { (0, 0x1234) });
            }
            assert_eq!(read(&made.error(router, other, 0, 64)).0, Outcome::Other);
        }
        // about a packet of another sender than the error goes to
        let mut bytes = udp(src, dst).error(router, kinds[0], 1, 100);
        let last = 14 + if router.contains('.') { 19 } else { 39 };
        bytes[last] ^= 1;
        assert_eq!(read(&bytes).0, Outcome::Other);
    }
    // an error about a first fragment, and about a later one
    let at = 14 + 20 + 8 + 6;
    let mut bytes = udp(V4.0, V4.1).error("198.51.100.9", 3, 4, 100);
    bytes[at] = 0x20;
    assert_eq!(read(&bytes).0, Outcome::IcmpError);
    bytes[at + 1] = 1;
    assert_eq!(read(&bytes).0, Outcome::Other);
    let about = |fragment: Vec<u8>| {
        let made = Packet {
            extensions: vec![(44, fragment)],
            ..udp(V6.0, V6.1)
        };
        read(&made.error("2001:db8:9::9", 2, 0, 200)).0
    };
    assert_eq!(about(vec![0, 0, 0, 1, 0, 0, 0, 9]), Outcome::IcmpError);
    assert_eq!(about(vec![0, 0, 0, 8, 0, 0, 0, 9]), Outcome::Other);
    // about ICMP, which has no ports
    let echo = packet(ICMP, V4.0, V4.1);
    assert_eq!(read(&echo.error("198.51.100.9", 3, 1, 100)).0, Outcome::Other);
}

/// What must hold whatever the bytes are: nothing panics, and no offset is beyond the packet.
fn survives(bytes: &[u8], link: u32, ethertype: u16) {
    let mut head = Head::default();
    let len = bytes.len() as u32;
    let outcome = parse(bytes, link, ethertype, len, &mut head);
    match outcome {
        Outcome::Flow => assert!(head.l4 + 8 <= head.l3 + head.len, "{head:?}"),
        Outcome::IcmpError => {
            assert!(head.inner_l4 + 8 <= head.l3 + head.len, "{head:?}");
            assert!(head.inner_l3 >= head.l4 + 8 && head.inner_l4 >= head.inner_l3 + 20);
        }
        Outcome::LaterFragment => assert!(head.l4 <= head.l3 + head.len, "{head:?}"),
        Outcome::Other | Outcome::Echo | Outcome::Truncated => return,
    }
    assert!(head.l3 >= link && head.l3 + head.len <= len, "{head:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn noise_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), link in 0_u32..40, kind: u16) {
        for kind in [kind, 0x0800, 0x86dd, 0x8100] {
            survives(&bytes, link, kind);
        }
    }

    #[test]
    fn damaged_packets_are_survived(
        which in 0_usize..8,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut: prop::sample::Index,
    ) {
        let made = [
            tcp(V4.0, V4.1, SYN).build(),
            tcp(V6.0, V6.1, SYN).build(),
            udp(V4.0, V4.1).error("198.51.100.9", 3, 4, 100),
            udp(V6.0, V6.1).error("2001:db8:9::9", 2, 0, 100),
            Packet { extensions: vec![options(0, 8), options(60, 24)], ..tcp(V6.0, V6.1, SYN) }.build(),
            Packet { options: vec![1; 12], vlans: vec![1, 2], ..udp(V4.0, V4.1) }.build(),
            udp(V4.0, V4.1).fragments(8)[1].clone(),
            udp(V6.0, V6.1).fragments(8)[0].clone(),
        ];
        let mut bytes = made[which].clone();
        for (at, value) in damage {
            let at = at.index(bytes.len() - 14) + 14;
            bytes[at] = value;
        }
        let kind = ethertype(&bytes);
        survives(&bytes, 14, kind);
        bytes.truncate(14 + cut.index(bytes.len() - 13));
        survives(&bytes, 14, kind);
    }
}

/// IPv6 packets with IPv4-mapped addresses must not pass for packets of IPv4.
#[test]
fn mapped_addresses_are_nobodys() {
    let ip = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
    for at in [8, 24] {
        for packet in [tcp(V6.0, V6.1, SYN), udp(V6.0, V6.1), sctp(V6.0, V6.1)] {
            let mut bytes = packet.build();
            assert_eq!(read(&bytes).0, Outcome::Flow);
            bytes[14 + at..][..16].copy_from_slice(&ip("::ffff:10.96.0.1"));
            assert_eq!(read(&bytes).0, Outcome::Other);
            let mut error = packet.error("2001:db8::99", 1, 4, 1000);
            assert_eq!(read(&error).0, Outcome::IcmpError);
            error[14 + 48 + at..][..16].copy_from_slice(&ip("::ffff:10.96.0.1"));
            assert_eq!(read(&error).0, Outcome::Other);
        }
    }
}

/// What the fuzzer starts from, and what it found.
#[test]
fn the_corpus_is_survived() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for kind in [0x0800, 0x86dd, 0x8100] {
            survives(&bytes, 14, kind);
            survives(&bytes, 0, kind);
        }
        count += 1;
    }
    assert!(count >= 20, "{count}");
}
