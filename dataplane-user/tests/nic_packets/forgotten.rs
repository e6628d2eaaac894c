//! Flows of which the kernel has forgotten entries, as it does in a full map: nothing ends a connection for that.

use std::thread::sleep;
use std::time::Duration;

use dataplane_common::abi::{Flow, FlowKey, flow_role, masquerade};
use dataplane_model::Protocol;
use dataplane_user::kernel::FlowTable;

use crate::build::{ACK, Packet, SYN};
use crate::flows::there_and_back;
use crate::scene::{DROP, FAMILIES, Family, MARK, PASS, PROTOCOLS, Scene, answer_to, at, ip, of, which};

/// Flows that were used this recently are not looked after: no full map forgets them.
pub(crate) fn fall_silent() {
    sleep(Duration::from_millis(2));
}

/// Forgets the entries that are wanted, and gives them.
fn forget(table: &FlowTable, wanted: impl Fn(&FlowKey, &Flow) -> bool) -> Vec<(FlowKey, Flow)> {
    let mut found = Vec::new();
    table
        .visit(|key, flow| {
            if wanted(key, flow) {
                found.push((*key, *flow));
            }
        })
        .unwrap();
    for (key, _) in &found {
        assert!(table.remove(key).unwrap());
    }
    found
}

fn tcp(src: &str, dst: &str, tcp_flags: u8) -> Packet {
    Packet {
        tcp_flags,
        ..of(Protocol::Tcp, src, dst)
    }
}

#[test]
fn answers_find_the_client_again_with_its_next_packet() {
    let mut scene = Scene::new();
    let table = scene.plane.kernel.flows().unwrap();
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let client = at(family.client, 4444);
            // both lead to one backend, so the second has another client port there
            let one = of(protocol, &client, &at(family.node, 30_001));
            let two = of(protocol, &client, &at(family.node, 30_011));
            let arrived = [&one, &two].map(|packet| there_and_back(&mut scene, packet).tuple());
            assert_eq!(forget(&table, |key, _| key.role == flow_role::REVERSE).len(), 2);
            fall_silent();
            for (packet, arrived) in [&one, &two].into_iter().zip(&arrived) {
                let packet = Packet {
                    tcp_flags: ACK,
                    ..packet.clone()
                };
                let out = scene.ingress(&packet.build());
                assert_eq!(out.counted, [("flow_recovered", 1), ("packet_forward", 1)]);
                assert_eq!(out.tuple(), *arrived);
                there_and_back(&mut scene, &packet);
            }
            forget(&table, |_, _| true);
        }
    }
}

/// The entry that is left knows the backend, whatever the service has now.
#[test]
fn answers_come_from_a_backend_that_has_left_its_service() {
    let mut scene = Scene::new();
    let table = scene.plane.kernel.flows().unwrap();
    for family in FAMILIES {
        let begin = tcp(&at(family.client, 5), &at(family.node, 30_010), SYN);
        let backend = there_and_back(&mut scene, &begin).seen().dst;
        let id = Scene::service(family, Protocol::Tcp, which::SOURCE);
        let remote = id - which::SOURCE + 2;
        scene
            .plane
            .serve(id, &[remote], dataplane_common::abi::Service::default());
        forget(&table, |key, _| key.role == flow_role::REVERSE);
        fall_silent();
        let more = Packet {
            tcp_flags: ACK,
            ..begin
        };
        assert_eq!(there_and_back(&mut scene, &more).seen().dst, backend);
    }
}

/// A server that takes its time answers when its flow has been forgotten, and the client, who has sent all that it wanted, says
/// nothing. Nor does it when the server speaks first.
#[test]
fn answers_find_the_client_again_by_themselves() {
    let mut scene = Scene::new();
    let table = scene.plane.kernel.flows().unwrap();
    for family in FAMILIES {
        let client = at(family.client, 7777);
        let frontends = [30_001, 30_011].map(|port| at(family.node, port));
        // the second has another client port at the backend
        let seen = frontends
            .clone()
            .map(|frontend| there_and_back(&mut scene, &tcp(&client, &frontend, SYN)).seen());
        assert_eq!(forget(&table, |_, _| true).len(), 4);
        for (frontend, seen) in frontends.iter().zip(&seen) {
            let packet = tcp(&client, frontend, ACK);
            let answer = answer_to(&packet, seen);
            let out = scene.egress(&answer.build(), 0);
            assert_eq!(out.tuple(), format!("{frontend} > {client}"));
            assert_eq!(out.counted, [("flow_recovered", 1), ("packet_reverse", 1)]);
            assert_eq!(scene.egress(&answer.build(), 0).counted, [("packet_reverse", 1)]);
            assert_eq!(there_and_back(&mut scene, &packet).seen(), *seen);
        }
        forget(&table, |_, _| true);
        // also the first answer, to what has just begun
        let packet = tcp(&client, &frontends[0], SYN);
        let begun = scene.ingress(&packet.build()).seen();
        forget(&table, |_, _| true);
        let mut answer = answer_to(&packet, &begun);
        answer.tcp_flags = SYN | ACK;
        let out = scene.egress(&answer.build(), 0);
        assert_eq!(out.tuple(), format!("{} > {client}", frontends[0]));
        forget(&table, |_, _| true);

        // the client uses its port again, without the service
        let backend = seen[0].dst.to_string();
        assert_eq!(scene.ingress(&tcp(&client, &backend, SYN).build()).verdict, PASS);
        let answer = tcp(&backend, &client, ACK).build();
        let out = scene.egress(&answer, 0);
        assert_eq!((out.verdict, out.counted, out.bytes), (PASS, vec![], answer));
    }
}

/// Sends a packet to a remote backend, and gives what it looks like there.
fn masqueraded(scene: &mut Scene, packet: &Packet) -> String {
    let out = scene.ingress(&packet.build());
    assert_eq!(out.mark & MARK, MARK, "{:?}", out.counted);
    let out = scene.egress(&out.bytes, out.mark);
    let tuple = out.tuple();
    assert_eq!(
        (out.verdict, out.counted),
        (PASS, vec![("packet_masqueraded", 1)])
    );
    tuple
}

fn remote(family: Family, port: u16, flags: u8) -> Packet {
    tcp(&at(family.client, port), &at(family.node, 30_002), flags)
}

#[test]
fn answers_to_masqueraded_connections_are_not_taken_for_the_nodes() {
    let mut scene = Scene::new();
    let table = scene.plane.kernel.masqueraded_flows().unwrap();
    for family in FAMILIES {
        let sent = masqueraded(&mut scene, &remote(family, 9, SYN));
        let (node, backend) = sent.split_once(" > ").unwrap();
        assert_eq!(forget(&table, |_, _| true).len(), 2);
        // the node knows no such connection, and would refuse it
        let answer = tcp(backend, node, ACK).build();
        let out = scene.ingress(&answer);
        assert_eq!(out.tuple(), format!("{backend} > {}", at(family.client, 9)));
        assert_eq!(out.counted, [("flow_recovered", 1), ("packet_unmasqueraded", 1)]);
        assert_eq!(masqueraded(&mut scene, &remote(family, 9, ACK)), sent);
        forget(&table, |key, _| key.role == flow_role::NAT_REVERSE);
        fall_silent();
        assert_eq!(masqueraded(&mut scene, &remote(family, 9, ACK)), sent);
        assert_eq!(scene.ingress(&answer).counted, [("packet_unmasqueraded", 1)]);

        // what is the node's own comes through: from others, and from that backend to a port that has become the node's
        forget(&table, |_, _| true);
        let other = tcp(&at(family.remote, 8081), node, ACK).build();
        assert_eq!(scene.ingress(&other).bytes, other);
        assert_eq!(
            scene.ingress(&tcp(backend, node, SYN | ACK).build()).verdict,
            PASS
        );
        let out = scene.ingress(&answer);
        assert_eq!((out.verdict, out.bytes), (PASS, answer));
    }
}

#[test]
fn a_masqueraded_connection_keeps_its_port() {
    let mut scene = Scene::new();
    scene
        .plane
        .configure(|config| (config.nat_first, config.nat_last) = (15_000, 15_003));
    let table = scene.plane.kernel.masqueraded_flows().unwrap();
    for family in FAMILIES {
        // all ports are in use, so that not everybody has the one that suits it best
        let sent = [1, 2, 3, 4].map(|port| masqueraded(&mut scene, &remote(family, port, SYN)));
        for gone in 1..=4_u16 {
            let forward = |key: &FlowKey, _: &Flow| key.role == flow_role::NAT_FORWARD;
            assert_eq!(forget(&table, forward).len(), 4);
            let back = |key: &FlowKey, flow: &Flow| {
                key.role == flow_role::NAT_REVERSE && flow.port.to_host() == gone
            };
            assert_eq!(forget(&table, back).len(), 1);
            // the others first: one port is free
            for port in (gone..gone + 4).map(|port| port % 4 + 1) {
                let tuple = masqueraded(&mut scene, &remote(family, port, ACK));
                assert_eq!(tuple, sent[usize::from(port) - 1], "{gone} was forgotten");
            }
        }
        // A port that is someone else's by now is not used by two.
        forget(&table, |key, flow| {
            key.role == flow_role::NAT_REVERSE && flow.port.to_host() == 1
                || key.role == flow_role::NAT_FORWARD && key.src_port.to_host() == 2
                || key.role == flow_role::NAT_REVERSE && flow.port.to_host() == 2
        });
        let taken = [5, 6].map(|port| masqueraded(&mut scene, &remote(family, port, SYN)));
        assert!(taken.contains(&sent[0]), "{taken:?} {sent:?}");
        fall_silent();
        let out = scene.ingress(&remote(family, 1, ACK).build());
        let out = scene.egress(&out.bytes, out.mark);
        assert_eq!((out.verdict, out.counted), (DROP, vec![("nat_exhausted", 1)]));
        forget(&table, |_, _| true);
    }
}

#[test]
fn what_a_pod_has_begun_goes_on_with_the_nodes_address() {
    let mut scene = Scene::new();
    let pods = ["10.244.0.0/16", "fd02::/16"].map(|net| (net.parse().unwrap(), masquerade::SOURCE));
    let mut nets = scene.plane.kernel.masquerade_table().unwrap();
    nets.set(&pods.into()).unwrap();
    let table = scene.plane.kernel.masqueraded_flows().unwrap();
    for family in FAMILIES {
        let (pod, world) = (at(family.pod, 40_000), at(family.client, 443));
        let out = scene.egress(&tcp(&pod, &world, SYN).build(), 0);
        assert_eq!(out.counted, [("packet_masqueraded", 1)]);
        assert_eq!(forget(&table, |_, _| true).len(), 2);
        let more = scene.egress(&tcp(&pod, &world, ACK).build(), 0);
        assert_eq!(more.tuple(), out.tuple());
        assert_eq!(more.seen().src.ip(), ip(family.node));
        let back = answer_to(&tcp(&pod, &world, ACK), &more.seen());
        assert_eq!(scene.ingress(&back.build()).tuple(), format!("{world} > {pod}"));
        // what the world has begun keeps its address
        let other = tcp(&at(family.pod, 80), &world, ACK).build();
        assert_eq!(scene.egress(&other, 0).bytes, other);
        forget(&table, |_, _| true);
    }
}
