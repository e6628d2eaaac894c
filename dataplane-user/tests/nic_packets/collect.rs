//! Collecting flows from real maps.

use dataplane_common::abi::{FlowKey, flow_role};
use dataplane_model::Protocol;
use dataplane_user::flow::gc::{Collector, Round, Timeouts, now, sweep};

use crate::build::{ACK, FIN, Packet, SYN};
use crate::common::Place;
use crate::scene::{MARK, Scene, V4, V6, answer_to, at, of};

const SECOND: u64 = 1_000_000_000;

fn collector(scene: &Scene) -> Collector {
    Collector::new(scene.plane.kernel.flows().unwrap(), Timeouts::default())
}

fn tcp(port: u16, flags: u8) -> Packet {
    Packet {
        tcp_flags: flags,
        ..of(Protocol::Tcp, &at(V4.client, port), &at(V4.node, 30_001))
    }
}

fn udp(port: u16) -> Packet {
    of(Protocol::Udp, &at(V4.client, port), &at(V4.node, 30_001))
}

fn send(scene: &mut Scene, packet: &Packet, flags: Option<u8>) {
    let out = scene.ingress(&packet.build());
    assert_eq!(out.mark & MARK, 0);
    if let Some(tcp_flags) = flags {
        let answer = Packet {
            tcp_flags,
            ..answer_to(packet, &out.seen())
        };
        let out = scene.egress(&answer.build(), 0);
        assert_eq!(out.counted, [("packet_reverse", 1)]);
    }
}

fn ports(scene: &Scene) -> Vec<u16> {
    let mut ports = Vec::new();
    let table = scene.plane.kernel.flows().unwrap();
    table
        .visit(|key, _| {
            if key.role == flow_role::FORWARD {
                ports.push(key.src_port.to_host());
            }
        })
        .unwrap();
    ports.sort_unstable();
    ports
}

#[test]
fn silent_flows_go_when_their_time_is_up() {
    let mut scene = Scene::new();
    // half open, established, closed by both; without and with an answer
    send(&mut scene, &tcp(1, SYN), None);
    send(&mut scene, &tcp(2, SYN), Some(SYN | ACK));
    send(&mut scene, &tcp(3, SYN), Some(SYN | ACK));
    send(&mut scene, &tcp(3, FIN | ACK), Some(FIN | ACK));
    send(&mut scene, &udp(4), None);
    send(&mut scene, &udp(5), Some(0));
    let collector = collector(&scene);
    let begun = now();
    for (after, left, expired) in [
        (0, &[1, 2, 3, 4, 5][..], 0),
        (29, &[1, 2, 3, 4, 5], 0),
        (31, &[1, 2, 3, 5], 1),
        (61, &[2, 5], 2),
        (121, &[2], 1),
        (6 * 3600 - 1, &[2], 0),
        (6 * 3600 + 1, &[], 1),
    ] {
        let round = collector.round(begun + after * SECOND).unwrap();
        assert_eq!(ports(&scene), left, "after {after} s");
        let expected = Round {
            entries: left.len() * 2,
            capacity: 4096,
            expired,
            ..Round::default()
        };
        assert_eq!(round, expected, "after {after} s");
    }
}

#[test]
fn a_masqueraded_flow_goes_as_well() {
    let mut scene = Scene::new();
    for family in [V4, V6] {
        let packet = of(Protocol::Udp, &at(family.client, 9), &at(family.node, 30_002));
        let out = scene.ingress(&packet.build());
        scene.egress(&out.bytes, out.mark);
    }
    let table = scene.plane.kernel.masqueraded_flows().unwrap();
    let collector = Collector::new(table, Timeouts::default());
    assert_eq!(collector.round(now() + 29 * SECOND).unwrap().entries, 4);
    let round = collector.round(now() + 31 * SECOND).unwrap();
    assert_eq!((round.entries, round.expired), (0, 2));
}

/// What the world begins with a pod is one entry: nothing is missing of it.
#[test]
fn an_entry_without_another_direction_keeps_its_time() {
    let mut scene = Scene::new();
    let pods = "10.244.0.0/16".parse().unwrap();
    let flags = dataplane_common::abi::masquerade::SOURCE;
    let mut table = scene.plane.kernel.masquerade_table().unwrap();
    table.set(&[(pods, flags)].into()).unwrap();
    let packet = of(Protocol::Udp, &at(V4.client, 9), &at(V4.pod, 53));
    let out = scene.ingress(&packet.build());
    assert_eq!(out.bytes, packet.build());
    // what the pod begins has both
    let packet = of(Protocol::Udp, &at(V4.pod, 7), &at(V4.client, 9));
    assert_eq!(
        scene.egress(&packet.build(), 0).counted,
        [("packet_masqueraded", 1)]
    );
    let table = scene.plane.kernel.masqueraded_flows().unwrap();
    let collector = Collector::new(table, Timeouts::default());
    for (after, entries, expired) in [(29, 3, 0), (31, 1, 1), (119, 1, 0), (121, 0, 1)] {
        let round = collector.round(now() + after * SECOND).unwrap();
        assert_eq!(
            (round.entries, round.expired),
            (entries, expired),
            "after {after} s"
        );
    }
}

#[test]
fn what_lost_one_direction_keeps_the_other() {
    let mut scene = Scene::new();
    send(&mut scene, &tcp(1, SYN), Some(SYN | ACK));
    send(&mut scene, &tcp(2, SYN), Some(SYN | ACK));
    let table = scene.plane.kernel.flows().unwrap();
    let mut back: Option<FlowKey> = None;
    table
        .visit(|key, _| {
            if key.role == flow_role::REVERSE && key.dst_port.to_host() == 1 {
                back = Some(*key);
            }
        })
        .unwrap();
    assert!(table.remove(&back.unwrap()).unwrap());
    // what is left knows the backend, and is not hurried
    let round = collector(&scene).round(now() + 31 * SECOND).unwrap();
    assert_eq!((round.expired, ports(&scene)), (0, vec![1, 2]));
    crate::forgotten::fall_silent();
    send(&mut scene, &tcp(1, ACK), Some(ACK));
}

fn crowded() -> Scene {
    let mut place = Place::new();
    place.config.sizes.services = 256;
    place.config.sizes.backends = 256;
    place.config.sizes.slots = 4096;
    place.config.sizes.frontends = 1024;
    place.config.sizes.conntrack = 2000;
    Scene::at(place)
}

#[test]
fn under_pressure_the_least_wanted_go_first() {
    let mut scene = crowded();
    let mut port = 0;
    let mut next = || {
        port += 1;
        port
    };
    let closing: Vec<u16> = (0..100).map(|_| next()).collect();
    let half_open: Vec<u16> = (0..100).map(|_| next()).collect();
    let datagram: Vec<u16> = (0..300).map(|_| next()).collect();
    let live: Vec<u16> = (0..320).map(|_| next()).collect();
    for port in &closing {
        send(&mut scene, &tcp(*port, SYN), Some(SYN | ACK));
        send(&mut scene, &tcp(*port, FIN), Some(FIN));
    }
    half_open
        .iter()
        .for_each(|port| send(&mut scene, &tcp(*port, SYN), None));
    datagram
        .iter()
        .for_each(|port| send(&mut scene, &udp(*port), Some(0)));
    live.iter()
        .for_each(|port| send(&mut scene, &tcp(*port, SYN), Some(SYN | ACK)));
    let round = collector(&scene).round(now() + 2 * SECOND).unwrap();
    // 1640 entries, above 1600, go down to 1400: 120 flows
    assert_eq!(
        (round.closing, round.half_open, round.datagram),
        (100, 20, 0),
        "{round:?}"
    );
    assert_eq!((round.entries, round.full, round.pressure()), (1400, false, true));
    let left = ports(&scene);
    assert_eq!(left.len(), 700);
    assert!(live.iter().all(|port| left.contains(port)));
    assert!(
        half_open.iter().all(|port| left.contains(port) == (*port > 120)),
        "the oldest first"
    );
}

/// More established connections than fit: the kernel forgets the least recently used, and every one of them goes on.
#[test]
fn established_connections_survive_an_overfilled_map() {
    let mut scene = crowded();
    let connections: Vec<u16> = (1..=3000).collect();
    let frontend = at(V4.node, 30_010);
    let packet = |port: u16, flags| Packet {
        tcp_flags: flags,
        ..of(Protocol::Tcp, &at(V4.client, port), &frontend)
    };
    let mut backends = Vec::new();
    for port in &connections {
        let out = scene.ingress(&packet(*port, SYN).build());
        let seen = out.seen();
        let answer = answer_to(&packet(*port, SYN | ACK), &seen);
        assert_eq!(scene.egress(&answer.build(), 0).counted, [("packet_reverse", 1)]);
        backends.push(seen.dst);
    }
    let collector = collector(&scene);
    let round = collector.round(now() + 2 * SECOND).unwrap();
    assert!(round.full && round.pressure(), "{round:?}");
    assert_eq!(
        (round.closing, round.half_open, round.datagram, round.expired),
        (0, 0, 0, 0)
    );
    let mut recovered = 0;
    for (port, backend) in connections.iter().zip(&backends) {
        let out = scene.ingress(&packet(*port, ACK).build());
        let seen = out.seen();
        assert_eq!(
            (seen.src, seen.dst),
            (packet(*port, ACK).src, *backend),
            "{:?}",
            out.counted
        );
        recovered += u32::from(out.counted[0].0 == "flow_recovered");
        // and its answers find the way back
        let answer = answer_to(&packet(*port, ACK), &seen);
        let back = scene.egress(&answer.build(), 0).seen();
        assert_eq!(
            (back.src.to_string(), back.dst),
            (frontend.clone(), packet(*port, ACK).src)
        );
    }
    assert!(recovered > 1500, "{recovered}");
}

/// Datagrams of a client that never falls silent go to another backend when theirs has left; connections do not.
#[test]
fn datagram_flows_leave_a_backend_that_left() {
    let mut scene = Scene::new();
    for family in [V4, V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let id = Scene::service(family, protocol, crate::scene::which::SOURCE);
            let packet = |port: u16| Packet {
                tcp_flags: if port < 50 { SYN } else { ACK },
                ..of(protocol, &at(family.client, port % 50), &at(family.node, 30_010))
            };
            let backend = scene.ingress(&packet(1).build()).seen().dst;
            let other = scene.ingress(&of(protocol, &at(family.local, 1), &at(family.node, 30_001)).build());
            assert_eq!(other.counted[0], ("flow_created", 1), "of another service");
            let left = [(
                id,
                backend.ip().into(),
                dataplane_common::abi::BePort::from_host(backend.port()),
            )];
            let table = scene.plane.kernel.flows().unwrap();
            let before = table.visit(|_, _| {}).unwrap();
            // its set has other backends now, on the same rows
            let rest: Vec<u32> = (3..11)
                .map(|i| id - crate::scene::which::SOURCE + i)
                .filter(|row| {
                    at(family.local, 9000 + u16::try_from(row % 20).unwrap()) != backend.to_string()
                })
                .collect();
            assert_eq!(rest.len(), 7);
            let row = dataplane_common::abi::Service {
                flags: dataplane_common::abi::service_flag::HAS_ENDPOINTS,
                ..Default::default()
            };
            scene.plane.serve(id, &rest, row);
            assert_eq!(
                scene.ingress(&packet(51).build()).seen().dst,
                backend,
                "nobody knows yet"
            );
            let swept = sweep(&table, &left.into()).unwrap();
            let udp = usize::from(protocol == Protocol::Udp);
            assert_eq!(swept, udp);
            assert_eq!(table.visit(|_, _| {}).unwrap(), before - 2 * udp);
            let now = scene.ingress(&packet(51).build()).seen().dst;
            assert_eq!(now != backend, protocol == Protocol::Udp, "{now} {backend}");
        }
    }
}
