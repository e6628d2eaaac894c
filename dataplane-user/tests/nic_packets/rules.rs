//! Which service and backend a first packet gets, or what becomes of it without one: a row per rule.

use std::collections::BTreeSet;

use dataplane_model::Protocol;

use crate::build::{ACK, Packet, Seen};
use crate::scene::{BACK, DROP, FAMILIES, Family, MARK, PASS, PROTOCOLS, Scene, at, of, which};

/// Source, destination; verdict, destination afterwards, mark, counters. `""` as the destination: untouched.
type Row<'a> = (
    &'a str,
    String,
    String,
    i32,
    String,
    u32,
    &'a [(&'static str, u64)],
);

const NEW: &[(&str, u64)] = &[("flow_created", 1), ("packet_forward", 1)];

fn rows(family: Family) -> Vec<Row<'static>> {
    let client = at(family.client, 0);
    let pod = at(family.pod, 0);
    let cluster = |number: u32| at(&format!("{}{number}", family.cluster), 80);
    let external = |number: u32| at(&format!("{}{number}", family.external), 80);
    let balancer = |number: u32| at(&format!("{}{number}", family.external), 443);
    let node_port = |number: u32| at(family.node, 30_000 + number as u16);
    let (local, remote) = (at(family.local, 8080), at(family.remote, 8080));
    let none = String::new;
    let stranger = if family.v6 {
        at("2001:db9::1", 0)
    } else {
        at("198.51.100.1", 0)
    };
    vec![
        (
            "outside to ClusterIP, remote",
            client.clone(),
            cluster(which::REMOTE),
            PASS,
            remote.clone(),
            MARK,
            NEW,
        ),
        (
            "pod to ClusterIP, remote",
            pod.clone(),
            cluster(which::REMOTE),
            PASS,
            remote.clone(),
            0,
            NEW,
        ),
        (
            "pod to node port, remote",
            pod.clone(),
            node_port(which::REMOTE),
            PASS,
            remote.clone(),
            MARK,
            NEW,
        ),
        (
            "outside to external, remote",
            client.clone(),
            external(which::REMOTE),
            PASS,
            remote,
            MARK,
            NEW,
        ),
        (
            "external policy Local",
            client.clone(),
            external(which::BOTH_LOCAL),
            PASS,
            local.clone(),
            0,
            NEW,
        ),
        (
            "balancer, policy Local",
            client.clone(),
            balancer(which::BOTH_LOCAL),
            PASS,
            local.clone(),
            0,
            NEW,
        ),
        (
            "internal policy Local",
            client.clone(),
            cluster(which::BOTH_LOCAL),
            PASS,
            local.clone(),
            0,
            NEW,
        ),
        (
            "node port, endpoints elsewhere",
            client.clone(),
            node_port(which::ELSEWHERE),
            DROP,
            none(),
            0,
            &[("no_local_backend", 1)],
        ),
        (
            "ClusterIP, endpoints elsewhere",
            client.clone(),
            cluster(which::ELSEWHERE),
            DROP,
            none(),
            0,
            &[("no_local_backend", 1)],
        ),
        (
            "policy Local, no endpoints at all",
            client.clone(),
            node_port(which::EMPTY_LOCAL),
            BACK,
            none(),
            0,
            &[("no_backend", 1), ("rejected", 1)],
        ),
        (
            "no endpoints, ClusterIP",
            client.clone(),
            cluster(which::EMPTY),
            BACK,
            none(),
            0,
            &[("no_backend", 1), ("rejected", 1)],
        ),
        (
            "no endpoints, node port",
            client.clone(),
            node_port(which::EMPTY),
            BACK,
            none(),
            0,
            &[("no_backend", 1), ("rejected", 1)],
        ),
        (
            "inside of the source ranges",
            client.clone(),
            balancer(which::RANGES),
            PASS,
            local.clone(),
            0,
            NEW,
        ),
        (
            "outside of the source ranges",
            stranger.clone(),
            balancer(which::RANGES),
            DROP,
            none(),
            0,
            &[("denied", 1)],
        ),
        (
            "ranges are for balancers",
            stranger,
            external(which::RANGES),
            PASS,
            local,
            0,
            NEW,
        ),
        (
            "unknown node port",
            client.clone(),
            at(family.node, 31_000),
            PASS,
            none(),
            0,
            &[],
        ),
        (
            "address without node ports",
            client.clone(),
            at(family.other, 30_001),
            PASS,
            none(),
            0,
            &[],
        ),
        (
            "unknown port of a ClusterIP",
            client.clone(),
            at(&format!("{}1", family.cluster), 81),
            BACK,
            none(),
            0,
            &[("unknown_port", 1), ("rejected", 1)],
        ),
        (
            "ClusterIP of nobody",
            client.clone(),
            at(&format!("{}99", family.cluster), 80),
            DROP,
            none(),
            0,
            &[("unknown_address", 1)],
        ),
        (
            "unknown port of a balancer",
            client.clone(),
            at(&format!("{}1", family.external), 81),
            PASS,
            none(),
            0,
            &[],
        ),
        ("none of ours", client.clone(), pod, PASS, none(), 0, &[]),
        (
            "slots of another service",
            client.clone(),
            cluster(which::FOREIGN),
            DROP,
            none(),
            0,
            &[("foreign_slot", 1)],
        ),
        (
            "a backend that is free",
            client,
            cluster(which::FREED),
            DROP,
            none(),
            0,
            &[("bad_backend", 1)],
        ),
    ]
}

fn run(scene: &mut Scene, row: &Row<'_>, protocol: Protocol, port: u16) {
    let (name, src, dst, verdict, after, mark, counted) = row;
    let mut packet = of(protocol, src, dst);
    packet.src.set_port(port);
    let bytes = packet.build();
    let out = scene.ingress(&bytes);
    let context = format!("{name}, {protocol:?}, {src} > {dst}");
    let mut expected = counted.to_vec();
    let mut found = out.counted.clone();
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!((out.verdict, &found), (*verdict, &expected), "{context}");
    assert_eq!(out.mark, *mark, "{context}");
    match *verdict {
        PASS if after.is_empty() => assert_eq!(out.bytes, bytes, "{context}"),
        PASS => {
            let seen = out.seen();
            assert_eq!(
                (seen.src, seen.dst.to_string()),
                (packet.src, after.clone()),
                "{context}"
            );
            assert_eq!(seen.rest, packet.payload, "{context}");
        }
        BACK => rejected(&packet, &out.seen(), &out.bytes, &context),
        _ => {}
    }
}

/// The answer goes to the sender, from whom it called, and quotes the packet.
fn rejected(packet: &Packet, seen: &Seen, bytes: &[u8], context: &str) {
    let v6 = packet.src.is_ipv6();
    assert_eq!(
        (seen.src.ip(), seen.dst.ip()),
        (packet.dst.ip(), packet.src.ip()),
        "{context}"
    );
    assert_eq!(seen.protocol, if v6 { 58 } else { 1 }, "{context}");
    let icmp = if v6 { [1, 4] } else { [3, 3] };
    let at = 14
        + if v6 {
            40
        } else {
            20 + usize::from(bytes[14] & 15) * 4 - 20
        };
    assert_eq!(bytes[at..at + 2], icmp, "{context}");
    let inside = seen.inside();
    assert_eq!((inside.src, inside.dst), (packet.src, packet.dst), "{context}");
    let sent = packet.build();
    assert_eq!(
        (&bytes[..6], &bytes[6..12]),
        (&sent[6..12], &sent[..6]),
        "{context}: Ethernet addresses"
    );
}

#[test]
fn every_rule() {
    let mut scene = Scene::new();
    let mut port = 10_000;
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            for row in rows(family) {
                port += 1;
                run(&mut scene, &row, protocol, port);
            }
        }
    }
}

#[test]
fn rejects_quote_packets_with_options() {
    let mut scene = Scene::new();
    let mut packet = of(Protocol::Tcp, &at("192.0.2.7", 1), &at("10.96.0.5", 80));
    packet.options = vec![1; 8];
    packet.payload = vec![3; 700];
    let out = scene.ingress(&packet.build());
    assert_eq!(out.verdict, BACK);
    let seen = out.seen();
    assert_eq!(seen.rest.len(), 28 + 20);
    assert_eq!(out.bytes.len(), 14 + 28 + 28 + 20);
    // a tag in the packet: no answer
    packet.vlans = vec![5];
    let out = scene.ingress(&packet.build());
    assert_eq!((out.verdict, out.counted), (DROP, vec![("no_backend", 1)]));
}

#[test]
fn rejects_are_limited() {
    let scene = Scene::new();
    let packet = of(Protocol::Udp, &at("192.0.2.7", 1), &at("10.96.0.5", 80)).build();
    let mut answered = 0;
    let begun = std::time::Instant::now();
    for _ in 0..4000 {
        answered += u32::from(
            scene
                .plane
                .kernel
                .run_packet(dataplane_user::kernel::Direction::Ingress, &packet, 0, 1)
                .unwrap()
                .verdict
                == BACK,
        );
    }
    // each CPU has its own bucket, and this thread may have moved; a slow machine refills them meanwhile
    let cpus = std::thread::available_parallelism().unwrap().get() as u32;
    let refilled = begun.elapsed().as_millis() as u32 + 1;
    assert!(
        (1000..=1000 * cpus + refilled).contains(&answered),
        "{answered} of 4000"
    );
}

#[test]
fn masquerade_all_and_hairpins() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        let cluster = at(&format!("{}1", family.cluster), 80);
        // the backend calls itself
        let out = scene.ingress(&of(Protocol::Tcp, &at(family.local, 7), &cluster).build());
        assert_eq!((out.verdict, out.mark), (PASS, MARK));
        let out = scene.egress(&out.bytes, out.mark);
        assert_eq!(out.seen().src.ip().to_string(), family.node);
        for (on, mark) in [(true, MARK), (false, 0)] {
            scene.masquerade_all(on);
            let port = 20 + u16::from(on);
            let out = scene.ingress(&of(Protocol::Tcp, &at(family.pod, port), &cluster).build());
            assert_eq!((out.verdict, out.mark), (PASS, mark));
            // external traffic is not concerned
            let external = at(&format!("{}1", family.external), 80);
            let out = scene.ingress(&of(Protocol::Tcp, &at(family.pod, port), &external).build());
            assert_eq!((out.verdict, out.mark), (PASS, 0));
        }
    }
}

fn backends(scene: &mut Scene, family: Family, number: u32, clients: &[&str]) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for (i, client) in clients.iter().enumerate() {
        for port in 0..40 {
            let client = at(client, 7000 + i as u16 * 100 + port);
            let frontend = at(family.node, 30_000 + number as u16);
            let out = scene.ingress(&of(Protocol::Tcp, &client, &frontend).build());
            assert_eq!(out.verdict, PASS);
            seen.insert(out.seen().dst.to_string());
        }
    }
    seen
}

#[test]
fn backends_are_chosen_as_the_service_says() {
    let mut scene = Scene::new();
    for family in FAMILIES {
        let one = &[family.client][..];
        assert_eq!(
            backends(&mut scene, family, which::AFFINE, one).len(),
            1,
            "affinity"
        );
        assert_eq!(
            backends(&mut scene, family, which::SOURCE, one).len(),
            1,
            "source hash"
        );
        let table = backends(&mut scene, family, which::TABLE, one);
        assert_eq!(
            table.into_iter().collect::<Vec<_>>(),
            [at(family.local, 9010)],
            "the Maglev table"
        );
        let many: Vec<String> = (20..60)
            .map(|i| {
                if family.v6 {
                    format!("2001:db8::{i}")
                } else {
                    format!("192.0.2.{i}")
                }
            })
            .collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(
            backends(&mut scene, family, which::AFFINE, &many).len(),
            2,
            "affinity of many"
        );
        assert_eq!(
            backends(&mut scene, family, which::SOURCE, &many).len(),
            8,
            "source hash of many"
        );
    }
}

#[test]
fn affinity_ends_with_its_backend_and_its_time() {
    let mut scene = Scene::new();
    let family = FAMILIES[0];
    let first = backends(&mut scene, family, which::AFFINE, &[family.client]);
    let id = Scene::service(family, Protocol::Tcp, which::AFFINE);
    // only the other backend is left
    let base = id - which::AFFINE;
    let left = if first.contains(&at(family.local, 8080)) {
        base + 2
    } else {
        base + 1
    };
    let row = dataplane_common::abi::Service {
        affinity_seconds: 100,
        flags: dataplane_common::abi::service_flag::HAS_ENDPOINTS,
        ..Default::default()
    };
    scene.plane.serve(id, &[left], row);
    let packet = |port| of(Protocol::Tcp, &at(family.client, port), &at(family.node, 30_008)).build();
    let out = scene.ingress(&packet(9000));
    assert!(!first.contains(&out.seen().dst.to_string()), "{first:?}");
    // an established connection of the first backend goes on
    let packet = Packet {
        tcp_flags: ACK,
        ..of(Protocol::Tcp, &at(family.client, 7000), &at(family.node, 30_008))
    };
    assert!(first.contains(&scene.ingress(&packet.build()).seen().dst.to_string()));
}
