//! Whole flows: there and back, through both programs.

use dataplane_common::abi::{FlowKey, device_flag, flow_role};
use dataplane_model::Protocol;

use crate::build::{ACK, FIN, Packet, RST, SYN, TCP};
use crate::scene::{DROP, FAMILIES, Family, MARK, Out, PASS, PROTOCOLS, Scene, V4, answer_to, at, of, which};

/// Where a service is reached: its frontends by kind.
pub(crate) fn frontends(family: Family, number: u32) -> [(&'static str, String); 4] {
    [
        ("ClusterIP", at(&format!("{}{number}", family.cluster), 80)),
        ("NodePort", at(family.node, 30_000 + number as u16)),
        ("externalIP", at(&format!("{}{number}", family.external), 80)),
        ("load balancer", at(&format!("{}{number}", family.external), 443)),
    ]
}

/// Sends the packet to its service and the backend's answer back, and gives what the backend saw. The client must see the
/// address that it called.
pub(crate) fn there_and_back(scene: &mut Scene, packet: &Packet) -> Out {
    let context = format!("{packet:?}");
    let mut out = scene.ingress(&packet.build());
    assert_eq!(out.verdict, PASS, "{context}: {:?}", out.counted);
    let marked = out.mark & MARK != 0;
    if marked {
        out = scene.egress(&out.bytes.clone(), out.mark);
        assert_eq!((out.verdict, out.mark), (PASS, 0), "{context}: {:?}", out.counted);
    }
    let arrived = out.seen();
    let answer = answer_to(packet, &arrived);
    let mut back = answer.build();
    if marked {
        let out = scene.ingress(&back);
        assert_eq!((out.verdict, out.mark), (PASS, 0), "{context}: {:?}", out.counted);
        assert_eq!(out.counted, [("packet_unmasqueraded", 1)]);
        back = out.bytes;
    }
    let back = scene.egress(&back, 0);
    assert_eq!(
        (back.verdict, back.mark),
        (PASS, 0),
        "{context}: {:?}",
        back.counted
    );
    let seen = back.seen();
    assert_eq!((seen.src, seen.dst), (packet.dst, packet.src), "{context}");
    assert_eq!(seen.rest, answer.payload, "{context}");
    out
}

#[test]
fn every_kind_of_frontend_protocol_and_family_there_and_back() {
    let mut scene = Scene::new();
    let mut port = 1000;
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            for (number, backend) in [(which::LOCAL, family.local), (which::REMOTE, family.remote)] {
                for (kind, frontend) in frontends(family, number) {
                    port += 1;
                    let client = at(family.client, port);
                    let packet = of(protocol, &client, &frontend);
                    let out = there_and_back(&mut scene, &packet);
                    let seen = out.seen();
                    assert_eq!(seen.dst.to_string(), at(backend, 8080), "{kind}");
                    assert_eq!(seen.rest, packet.payload, "{kind}");
                    if number == which::LOCAL {
                        assert_eq!(seen.src.to_string(), client, "{kind}");
                        assert_eq!(out.counted, [("flow_created", 1), ("packet_forward", 1)]);
                    } else {
                        assert_eq!(seen.src.ip().to_string(), family.node, "{kind}");
                        assert!(seen.src.port() >= 61_000, "{kind} {}", seen.src);
                        assert_eq!(out.counted, [("packet_masqueraded", 1)]);
                    }
                    // the second packet finds the flow
                    let more = Packet {
                        tcp_flags: ACK,
                        payload: vec![7; 1333],
                        ..packet
                    };
                    let again = scene.ingress(&more.build());
                    assert_eq!(again.counted, [("packet_forward", 1)]);
                    assert_eq!(again.seen().dst, seen.dst);
                }
            }
        }
    }
}

#[test]
fn headers_of_all_kinds_are_translated() {
    let mut scene = Scene::new();
    let mut port = 2000;
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let frontend = at(family.node, 30_002);
            type Change = Box<dyn Fn(&mut Packet)>;
            let mut variants: Vec<Change> = vec![
                Box::new(|packet| packet.vlans = vec![7]),
                Box::new(|packet| packet.vlans = vec![7, 8]),
                Box::new(|packet| packet.payload = vec![]),
                Box::new(|packet| packet.payload = vec![1; 1401]),
            ];
            if family.v6 {
                variants.push(Box::new(|packet| packet.extensions = vec![(0, vec![0; 8])]));
                variants.push(Box::new(|packet| {
                    packet.extensions = vec![(60, vec![0; 8]), (43, vec![0, 0, 4, 0, 0, 0, 0, 0])];
                }));
            } else {
                variants.push(Box::new(|packet| packet.options = vec![1; 4]));
                variants.push(Box::new(|packet| packet.options = vec![1; 40]));
                variants.push(Box::new(|packet| packet.udp_checksum = false));
            }
            for change in variants {
                port += 1;
                let mut packet = of(protocol, &at(family.client, port), &frontend);
                change(&mut packet);
                let out = there_and_back(&mut scene, &packet);
                assert_eq!(out.seen().dst.to_string(), at(family.remote, 8080), "{packet:?}");
            }
        }
    }
}

#[test]
fn a_udp_packet_without_a_checksum_gets_none() {
    let mut scene = Scene::new();
    let mut packet = of(Protocol::Udp, &at(V4.client, 5), &at(V4.node, 30_001));
    packet.udp_checksum = false;
    let out = scene.ingress(&packet.build());
    assert_eq!(out.bytes[14 + 20 + 6..][..2], [0, 0]);
    assert_eq!(out.tuple(), "192.0.2.7:5 > 10.244.0.2:8080");
}

#[test]
fn fragments_follow_the_first_one() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut packet = of(protocol, &at(family.client, 77), &at(family.node, 30_002));
            packet.payload = (0..100).collect();
            let fragments = packet.fragments(48);
            assert!(fragments.len() >= 3);
            let early = scene.ingress(&fragments[1]);
            assert_eq!((early.verdict, &early.bytes), (PASS, &fragments[1]));
            assert_eq!(early.counted, [("fragment_unknown", 1)]);
            let mut content = Vec::new();
            let mut ends = Vec::new();
            for fragment in &fragments {
                let out = scene.ingress(fragment);
                assert_eq!((out.verdict, out.mark), (PASS, MARK), "{:?}", out.counted);
                let out = scene.egress(&out.bytes, out.mark);
                assert_eq!(out.counted, [("packet_masqueraded", 1)]);
                let seen = out.seen();
                ends.push((seen.src.ip().to_string(), seen.dst.ip().to_string()));
                let header = 14 + if family.v6 { 48 } else { 20 };
                content.extend_from_slice(&out.bytes[header..]);
            }
            assert!(
                ends.iter()
                    .all(|(src, dst)| src == family.node && dst == family.remote),
                "{ends:?}"
            );
            // put together they are right: the checksum covers all of them
            let mut whole = packet.clone();
            whole.src = at(family.node, u16::from_be_bytes([content[0], content[1]]))
                .parse()
                .unwrap();
            whole.dst = at(family.remote, 8080).parse().unwrap();
            assert_eq!(content, whole.transport());
        }
    }
}

#[test]
fn connections_end_and_begin_again() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        let (client, frontend) = (at(family.client, 99), at(&format!("{}8", family.cluster), 80));
        let tcp = |flags| Packet {
            tcp_flags: flags,
            ..of(Protocol::Tcp, &client, &frontend)
        };
        let first = scene.ingress(&tcp(SYN).build());
        assert_eq!(first.counted[0], ("flow_created", 1));
        assert_eq!(
            scene.ingress(&tcp(SYN).build()).counted,
            [("packet_forward", 1)],
            "sent again"
        );
        assert_eq!(
            scene.ingress(&tcp(FIN | ACK).build()).counted,
            [("packet_forward", 1)]
        );
        assert_eq!(scene.ingress(&tcp(ACK).build()).counted, [("packet_forward", 1)]);
        let next = scene.ingress(&tcp(SYN).build());
        assert_eq!(next.counted[0], ("flow_created", 1), "the tuple is used again");
        // the other side's end counts as well
        let back = answer_to(&tcp(RST), &next.seen());
        let sent = if next.mark & MARK == 0 {
            back.build()
        } else {
            let out = scene.egress(&next.bytes, next.mark);
            let back = answer_to(&tcp(RST), &out.seen());
            scene.ingress(&back.build()).bytes
        };
        assert_eq!(scene.egress(&sent, 0).counted, [("packet_reverse", 1)]);
        assert_eq!(scene.ingress(&tcp(SYN).build()).counted[0], ("flow_created", 1));
    }
}

#[test]
fn a_lost_flow_finds_its_backend_again() {
    let mut scene = Scene::new();
    let table = scene.plane.kernel.flows().unwrap();
    for family in FAMILIES {
        for port in 0..50 {
            let client = at(family.client, 3000 + port);
            let frontend = at(family.node, 30_010);
            let tcp = |flags| Packet {
                tcp_flags: flags,
                ..of(Protocol::Tcp, &client, &frontend)
            };
            let first = scene.ingress(&tcp(SYN).build()).tuple();
            let key = FlowKey {
                src: tcp(0).src.ip().into(),
                dst: tcp(0).dst.ip().into(),
                src_port: dataplane_common::abi::BePort::from_host(3000 + port),
                dst_port: dataplane_common::abi::BePort::from_host(30_010),
                protocol: TCP,
                role: flow_role::FORWARD,
                pad: 0,
            };
            assert!(table.remove(&key).unwrap());
            let again = scene.ingress(&tcp(ACK).build());
            assert_eq!(again.counted, [("flow_recovered", 1), ("packet_forward", 1)]);
            assert_eq!(again.tuple(), first);
        }
    }
}

#[test]
fn two_frontends_of_one_backend_do_not_mix_up_a_clients_port() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let client = at(family.client, 4444);
            let one = of(protocol, &client, &at(family.node, 30_001));
            let two = of(protocol, &client, &at(family.node, 30_011));
            let first = there_and_back(&mut scene, &one).seen();
            let second = there_and_back(&mut scene, &two).seen();
            assert_eq!(first.dst, second.dst);
            assert_eq!(first.src.to_string(), client);
            assert_eq!(second.src.ip(), first.src.ip());
            assert!(second.src.port() >= 61_000, "{}", second.src);
            // and the first one still works
            assert_eq!(there_and_back(&mut scene, &one).seen(), first);
        }
    }
}

#[test]
fn masquerading_runs_out_of_ports() {
    let mut scene = Scene::new();
    scene
        .plane
        .configure(|config| (config.nat_first, config.nat_last) = (61_000, 61_003));
    let mut ports = std::collections::BTreeSet::new();
    let send = |scene: &mut Scene, port| {
        let packet = of(Protocol::Udp, &at(V4.client, port), &at(V4.node, 30_002));
        let out = scene.ingress(&packet.build());
        scene.egress(&out.bytes, out.mark)
    };
    for port in 1..=4 {
        let out = send(&mut scene, port);
        assert_eq!(out.verdict, PASS, "{:?}", out.counted);
        ports.insert(out.seen().src.port());
    }
    assert_eq!(
        ports.into_iter().collect::<Vec<_>>(),
        [61_000, 61_001, 61_002, 61_003]
    );
    let out = send(&mut scene, 5);
    assert_eq!((out.verdict, out.counted), (DROP, vec![("nat_exhausted", 1)]));
    // towards another backend the same ports are free
    let packet = of(Protocol::Tcp, &at(V4.client, 9), &at(V4.node, 30_002));
    let out = scene.ingress(&packet.build());
    assert_eq!(scene.egress(&out.bytes, out.mark).verdict, PASS);
}

#[test]
fn ports_of_connections_that_have_ended_are_used_again() {
    let mut scene = Scene::new();
    scene
        .plane
        .configure(|config| (config.nat_first, config.nat_last) = (15_000, 15_001));
    let send = |scene: &mut Scene, port, tcp_flags| {
        let packet = Packet {
            tcp_flags,
            ..of(Protocol::Tcp, &at(V4.client, port), &at(V4.node, 30_002))
        };
        let out = scene.ingress(&packet.build());
        let out = scene.egress(&out.bytes, out.mark);
        (out.verdict, out.counted)
    };
    let full = (DROP, vec![("nat_exhausted", 1)]);
    for port in [1, 2] {
        assert_eq!(send(&mut scene, port, SYN).0, PASS);
    }
    assert_eq!(send(&mut scene, 3, SYN), full);
    // an end of one side is none
    assert_eq!(send(&mut scene, 1, FIN | ACK).0, PASS);
    assert_eq!(send(&mut scene, 3, SYN), full);
    assert_eq!(send(&mut scene, 2, RST).0, PASS);
    let begun = std::time::Instant::now();
    // it rests for a second
    while send(&mut scene, 3, SYN) == full {
        assert!(begun.elapsed().as_secs() < 10, "the port is not given out again");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // there was one to be had
    assert_eq!(send(&mut scene, 4, SYN), full);
    // the open one has kept its port, and the new one has got one of its own
    assert_eq!(send(&mut scene, 1, ACK), (PASS, vec![("packet_masqueraded", 1)]));
    assert_eq!(send(&mut scene, 3, ACK), (PASS, vec![("packet_masqueraded", 1)]));
    let mut ports = Vec::new();
    let table = scene.plane.kernel.masqueraded_flows().unwrap();
    table
        .visit(|key, flow| {
            if key.role == flow_role::NAT_REVERSE {
                ports.push((key.dst_port.to_host(), flow.port.to_host()));
            }
        })
        .unwrap();
    ports.sort_unstable();
    assert_eq!(ports.len(), 2, "{ports:?}");
    let mut clients: Vec<u16> = ports.iter().map(|(_, client)| *client).collect();
    clients.sort_unstable();
    assert_eq!(clients, [1, 3]);
}

#[test]
fn a_device_without_an_address_masquerades_nothing() {
    let mut scene = Scene::new();
    let mut table = scene.plane.kernel.device_table().unwrap();
    let device = dataplane_common::abi::Device {
        header: 14,
        ..Default::default()
    };
    table.put(1, &device).unwrap();
    for family in FAMILIES {
        let packet = of(Protocol::Tcp, &at(family.client, 9), &at(family.node, 30_002));
        let out = scene.ingress(&packet.build());
        let out = scene.egress(&out.bytes, out.mark);
        assert_eq!((out.verdict, out.counted), (DROP, vec![("no_nat_address", 1)]));
    }
    table.remove(1).unwrap();
    table.remove(1).unwrap();
    let packet = of(Protocol::Tcp, &at(V4.client, 10), &at(V4.node, 30_002)).build();
    let out = scene.ingress(&packet);
    assert_eq!(
        (out.verdict, out.bytes, out.counted),
        (PASS, packet, vec![]),
        "not served at all"
    );
}

#[test]
fn what_comes_to_the_nodes_tunnel_is_left_to_it() {
    let mut scene = Scene::new();
    let port = 30_000 + which::REMOTE as u16;
    // device, port of the tunnel, what is sent; whether a service gets it
    let rows = [
        (0, 0, Protocol::Udp, true),
        (0, port + 1, Protocol::Udp, true),
        (0, port, Protocol::Udp, false),
        (0, port, Protocol::Tcp, true),
        (device_flag::POD, port, Protocol::Udp, true),
    ];
    for family in FAMILIES {
        for (client, (flags, tunnel, protocol, served)) in rows.into_iter().enumerate() {
            scene.serve_device(flags, tunnel);
            let from = at(family.client, 40_000 + client as u16);
            for to in [
                at(family.node, port),
                at(&format!("{}{}", family.external, which::REMOTE), 80),
            ] {
                let served = served || to != at(family.node, port);
                let packet = of(protocol, &from, &to);
                let bytes = packet.build();
                let out = scene.ingress(&bytes);
                let row = format!("{flags} {tunnel} {protocol:?} {to}");
                assert_eq!(out.verdict, PASS, "{row}");
                assert_eq!(out.bytes != bytes, served, "{row}: {:?}", out.counted);
            }
        }
    }
}

#[test]
fn a_packet_that_passes_two_devices_is_translated_once() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let node_port = at(family.node, 30_000 + which::LOCAL as u16);
            let packet = of(protocol, &at(family.client, 999), &node_port);
            let mut answered = || {
                let below = scene.ingress(&packet.build());
                let above = scene.ingress(&below.bytes);
                assert_eq!((above.verdict, &above.bytes), (PASS, &below.bytes), "{packet:?}");
                let answer = answer_to(&packet, &below.seen());
                scene.egress(&answer.build(), 0).counted == [("packet_reverse", 1)]
            };
            // there may be more time between the two here than there is for a packet on its way
            assert!((0..100).any(|_| answered()), "{packet:?}");
        }
    }
}
