//! ICMP errors about translated packets, and packets that are not what they say.

use dataplane_model::Protocol;

use crate::build::{Packet, packet};
use crate::scene::{FAMILIES, MARK, PASS, PROTOCOLS, Scene, answer_to, at, of};

/// Too big; unreachable host.
fn kinds(v6: bool) -> [(u8, u8); 2] {
    if v6 { [(2, 0), (1, 3)] } else { [(3, 4), (3, 1)] }
}

#[test]
fn errors_about_what_backends_get_reach_the_client() {
    let mut scene = Scene::new();
    let mut port = 100;
    for family in FAMILIES {
        let router = if family.v6 { "fd02:ffff::1" } else { "10.244.255.1" };
        for protocol in PROTOCOLS {
            for number in [1, 2] {
                for quote in [if family.v6 { 48 } else { 28 }, 1000] {
                    for (kind, code) in kinds(family.v6) {
                        port += 1;
                        let sent = of(
                            protocol,
                            &at(family.client, port),
                            &at(family.node, 30_000 + number),
                        );
                        let mut out = scene.ingress(&sent.build());
                        let marked = out.mark & MARK != 0;
                        if marked {
                            out = scene.egress(&out.bytes, out.mark);
                        }
                        let arrived = out.seen();
                        let translated = Packet {
                            src: arrived.src,
                            dst: arrived.dst,
                            ..sent.clone()
                        };
                        let mut error = translated.error(router, kind, code, quote);
                        let context = format!("{protocol:?} {number} {kind}/{code} {quote}");
                        if marked {
                            let out = scene.ingress(&error);
                            assert_eq!(
                                (out.verdict, out.counted),
                                (PASS, vec![("icmp_translated", 1)]),
                                "{context}"
                            );
                            error = out.bytes;
                        }
                        let out = scene.egress(&error, 0);
                        assert_eq!(
                            (out.verdict, &out.counted),
                            (PASS, &vec![("icmp_translated", 1)]),
                            "{context}"
                        );
                        let seen = out.seen();
                        assert_eq!(seen.dst.ip(), sent.src.ip(), "{context}");
                        let inside = seen.inside();
                        assert_eq!((inside.src, inside.dst), (sent.src, sent.dst), "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn errors_about_answers_reach_the_backend() {
    let mut scene = Scene::new();
    let mut port = 500;
    for family in FAMILIES {
        let router = if family.v6 { "2001:db8:77::1" } else { "198.18.0.1" };
        for protocol in PROTOCOLS {
            for number in [1, 2] {
                for (kind, code) in kinds(family.v6) {
                    port += 1;
                    let sent = of(
                        protocol,
                        &at(family.client, port),
                        &at(family.node, 30_000 + number),
                    );
                    let mut out = scene.ingress(&sent.build());
                    let marked = out.mark & MARK != 0;
                    if marked {
                        out = scene.egress(&out.bytes, out.mark);
                    }
                    let arrived = out.seen();
                    // the answer as the client's side sees it
                    let answer = answer_to(&sent, &sent_as_seen(&sent));
                    let out = scene.ingress(&answer.error(router, kind, code, 1000));
                    let context = format!("{protocol:?} {number} {kind}/{code}");
                    assert_eq!(
                        (out.verdict, &out.counted),
                        (PASS, &vec![("icmp_translated", 1)]),
                        "{context}"
                    );
                    let mut bytes = out.bytes;
                    if marked {
                        assert_eq!(out.mark, MARK, "{context}");
                        let out = scene.egress(&bytes, out.mark);
                        assert_eq!(
                            (out.verdict, &out.counted),
                            (PASS, &vec![("icmp_translated", 1)]),
                            "{context}"
                        );
                        bytes = out.bytes;
                    }
                    let seen = crate::build::check(&bytes);
                    assert_eq!(seen.dst.ip(), arrived.dst.ip(), "{context}");
                    let inside = seen.inside();
                    assert_eq!((inside.src, inside.dst), (arrived.dst, arrived.src), "{context}");
                }
            }
        }
    }
}

fn sent_as_seen(packet: &Packet) -> crate::build::Seen {
    crate::build::check(&packet.build())
}

#[test]
fn errors_about_packets_of_others_pass() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        for (kind, code) in kinds(family.v6) {
            let other = of(Protocol::Tcp, &at(family.node, 61_234), &at(family.remote, 8080));
            let error = other.error(family.client, kind, code, 100);
            for out in [scene.ingress(&error), scene.egress(&error, 0)] {
                assert_eq!((out.verdict, &out.bytes, out.counted), (PASS, &error, vec![]));
            }
        }
    }
}

/// Ping and other protocols.
#[test]
fn what_services_do_not_know_passes() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        for protocol in [1, 58, 2, 47, 50, 89] {
            let mut other = packet(
                protocol,
                &at(family.client, 0),
                &at(&format!("{}1", family.cluster), 0),
            );
            other.payload = vec![8, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4];
            let bytes = other.build();
            for out in [scene.ingress(&bytes), scene.egress(&bytes, 0)] {
                assert_eq!(
                    (out.verdict, &out.bytes, out.counted),
                    (PASS, &bytes, vec![]),
                    "{protocol}"
                );
            }
        }
    }
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6]);
    arp.extend([0; 28]);
    let out = scene.ingress(&arp);
    assert_eq!((out.verdict, &out.bytes, out.counted), (PASS, &arp, vec![]));
}

#[test]
fn packets_that_lie_about_their_length_pass_untouched() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let good = of(protocol, &at(family.client, 7), &at(family.node, 30_001)).build();
            let l4 = 14 + if family.v6 { 40 } else { 20 };
            let mut cases: Vec<(&str, Vec<u8>)> = vec![
                ("cut in the ports", good[..l4 + 3].to_vec()),
                ("cut behind the ports", good[..l4 + 6].to_vec()),
            ];
            let with = |at: usize, byte: u8| {
                let mut bytes = good.clone();
                bytes[at] = byte;
                bytes
            };
            if family.v6 {
                cases.push(("longer than it is", with(18, 200)));
                cases.push(("shorter than its transport header", with(19, 3)));
            } else {
                cases.push(("longer than it is", with(16, 200)));
                cases.push(("shorter than its header", with(17, 19)));
                cases.push(("header shorter than any", with(14, 0x44)));
                cases.push(("header longer than the packet", {
                    let mut bytes = with(14, 0x4f);
                    bytes[17] = 50;
                    bytes
                }));
            }
            if protocol == Protocol::Tcp {
                cases.push(("TCP header shorter than any", with(l4 + 12, 0x40)));
                cases.push(("TCP header longer than the packet", with(l4 + 12, 0xf0)));
            }
            for (name, bytes) in cases {
                for out in [scene.ingress(&bytes), scene.egress(&bytes, 0)] {
                    assert_eq!((out.verdict, &out.bytes), (PASS, &bytes), "{name}, {protocol:?}");
                    assert_eq!(out.counted, [("truncated", 1)], "{name}, {protocol:?}");
                }
            }
            let version = with(14, if family.v6 { 0x50 } else { 0x55 });
            let out = scene.ingress(&version);
            assert_eq!((out.verdict, &out.bytes, out.counted), (PASS, &version, vec![]));
        }
    }
}
