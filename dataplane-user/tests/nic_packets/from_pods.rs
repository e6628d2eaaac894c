//! What pods send, at the node's end of their devices: the rules for clients of this node (spec kube-proxy 2.1).

use dataplane_common::abi::{config_flag, device_flag, masquerade};
use dataplane_model::Protocol;

use crate::build::Packet;
use crate::flows::{frontends, there_and_back};
use crate::scene::{BACK, DROP, FAMILIES, Family, MARK, PASS, PROTOCOLS, Scene, V4, V6, at, of, which};

const BY_SOURCE: u16 = device_flag::POD | device_flag::BY_SOURCE;

/// What it is, destination; verdict, destinations of which one is that afterwards (none: untouched), mark.
type Row = (&'static str, String, i32, Vec<String>, u32);

fn rows(family: Family) -> Vec<Row> {
    let cluster = |number: u32| at(&format!("{}{number}", family.cluster), 80);
    let external = |number: u32| at(&format!("{}{number}", family.external), 80);
    let node_port = |number: u32| at(family.node, 30_000 + number as u16);
    let (local, remote) = (at(family.local, 8080), at(family.remote, 8080));
    let one = |which: &String| vec![which.clone()];
    vec![
        ("ClusterIP, local", cluster(which::LOCAL), PASS, one(&local), 0),
        ("ClusterIP, remote", cluster(which::REMOTE), PASS, one(&remote), 0),
        (
            "node port, remote",
            node_port(which::REMOTE),
            PASS,
            one(&remote),
            0,
        ),
        ("external, remote", external(which::REMOTE), PASS, one(&remote), 0),
        (
            "node port, policy Local, endpoints elsewhere",
            node_port(which::ELSEWHERE),
            PASS,
            one(&remote),
            0,
        ),
        (
            "external, policy Local: all endpoints",
            external(which::BOTH_LOCAL),
            PASS,
            vec![local.clone(), remote],
            0,
        ),
        (
            "ClusterIP, policy Local",
            cluster(which::BOTH_LOCAL),
            PASS,
            one(&local),
            0,
        ),
        (
            "ClusterIP, policy Local, endpoints elsewhere",
            cluster(which::ELSEWHERE),
            DROP,
            vec![],
            0,
        ),
        ("no endpoints", cluster(which::EMPTY), BACK, vec![], 0),
        (
            "node port without endpoints",
            node_port(which::EMPTY),
            BACK,
            vec![],
            0,
        ),
        (
            "unknown port",
            at(&format!("{}1", family.cluster), 81),
            BACK,
            vec![],
            0,
        ),
        (
            "unknown address",
            at(&format!("{}99", family.cluster), 80),
            DROP,
            vec![],
            0,
        ),
        ("a pod", at(family.remote, 80), PASS, vec![], 0),
        ("the world", at(family.client, 80), PASS, vec![], 0),
    ]
}

fn run(scene: &mut Scene, (what, to, verdict, expected, mark): &Row, protocol: Protocol, from: &str) {
    let packet = of(protocol, from, to);
    let sent = packet.build();
    let out = scene.ingress(&sent);
    let context = format!("{what}, {protocol:?} from {from} to {to}: {:?}", out.counted);
    assert_eq!((out.verdict, out.mark), (*verdict, *mark), "{context}");
    match (&expected[..], *verdict) {
        ([], PASS) => {
            assert_eq!(out.bytes, sent, "{context}");
            assert_eq!(out.counted, [], "{context}");
        }
        ([], _) => {}
        (expected, _) => {
            let to = out.seen().dst.to_string();
            assert!(expected.contains(&to), "{context}: to {to}");
        }
    }
}

#[test]
fn pods_take_the_short_way_and_keep_their_address() {
    let mut scene = Scene::new();
    let mut port = 10_000;
    for flags in [device_flag::POD, BY_SOURCE] {
        scene.serve_as(flags);
        for family in FAMILIES {
            for protocol in PROTOCOLS {
                for row in rows(family) {
                    port += 1;
                    run(&mut scene, &row, protocol, &at(family.pod, port));
                }
            }
        }
    }
}

#[test]
fn others_behind_such_a_device_are_no_pods() {
    let mut scene = Scene::new();
    scene.serve_as(BY_SOURCE);
    for family in FAMILIES {
        let remote = vec![at(family.remote, 8080)];
        let node_port = at(family.node, 30_003);
        let cluster = at(&format!("{}2", family.cluster), 80);
        for row in [
            ("endpoints elsewhere", node_port, DROP, vec![], 0),
            ("ClusterIP, remote", cluster, PASS, remote, MARK),
        ] {
            run(&mut scene, &row, Protocol::Tcp, &at(family.client, 5));
        }
    }
    // where the device says it, the address does not matter
    scene.serve_as(device_flag::POD);
    for family in FAMILIES {
        let node_port = at(family.node, 30_003);
        let row = ("the device", node_port, PASS, vec![at(family.remote, 8080)], 0);
        run(&mut scene, &row, Protocol::Tcp, &at(family.client, 6));
    }
}

#[test]
fn every_kind_of_frontend_answers_pods() {
    let mut scene = Scene::new();
    scene.serve_as(device_flag::POD);
    let mut port = 1000;
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            for (number, backend) in [(which::LOCAL, family.local), (which::REMOTE, family.remote)] {
                for (kind, frontend) in frontends(family, number) {
                    port += 1;
                    let pod = at(family.pod, port);
                    let packet = Packet {
                        payload: vec![7; 1000],
                        ..of(protocol, &pod, &frontend)
                    };
                    let seen = there_and_back(&mut scene, &packet).seen();
                    let context = format!("{protocol:?} {kind}");
                    assert_eq!(seen.dst.to_string(), at(backend, 8080), "{context}");
                    assert_eq!(seen.src.to_string(), pod, "{context}");
                }
            }
        }
    }
}

#[test]
fn a_pod_reaches_itself_and_masquerade_all_holds_for_pods() {
    let mut scene = Scene::new();
    scene.serve_as(device_flag::POD);
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let cluster = at(&format!("{}1", family.cluster), 80);
            let seen = there_and_back(&mut scene, &of(protocol, &at(family.local, 7), &cluster)).seen();
            assert_eq!(seen.src.ip().to_string(), family.node, "{protocol:?}");
            assert_eq!(seen.dst.to_string(), at(family.local, 8080));
        }
    }
    scene
        .plane
        .configure(|config| config.flags = config_flag::MASQUERADE_ALL);
    for family in FAMILIES {
        let cluster = at(&format!("{}1", family.cluster), 80);
        let seen = there_and_back(&mut scene, &of(Protocol::Sctp, &at(family.pod, 8), &cluster)).seen();
        assert_eq!(seen.src.ip().to_string(), family.node);
        let external = at(&format!("{}1", family.external), 80);
        let seen = there_and_back(&mut scene, &of(Protocol::Sctp, &at(family.pod, 9), &external)).seen();
        assert_eq!(seen.src.to_string(), at(family.pod, 9));
    }
}

/// The world is behind uplinks: what pods begin there is masqueraded where it leaves the node, and nothing is noted before.
#[test]
fn nothing_is_masqueraded_at_a_pods_device() {
    let mut scene = Scene::new();
    let nets = [
        ("10.244.0.0/16", masquerade::SOURCE | masquerade::EXEMPT),
        ("fd02::/16", masquerade::SOURCE | masquerade::EXEMPT),
    ];
    let nets = nets.map(|(net, flags)| (net.parse().unwrap(), flags));
    let mut table = scene.plane.kernel.masquerade_table().unwrap();
    table.set(&nets.into()).unwrap();
    for (flags, noted) in [(device_flag::POD, 0), (0, 2)] {
        scene.serve_as(flags);
        let mut changed = 0;
        for family in [V4, V6] {
            let (pod, client) = (at(family.pod, 9), at(family.client, 9));
            let sent = of(Protocol::Udp, &pod, &client).build();
            let out = scene.egress(&sent, 0);
            changed += usize::from(out.bytes != sent);
            let out = scene.ingress(&of(Protocol::Udp, &client, &at(family.pod, 10)).build());
            assert_eq!(out.verdict, PASS);
        }
        assert_eq!(changed, noted, "flags {flags}");
        let mut entries = 0;
        let flows = scene.plane.kernel.masqueraded_flows().unwrap();
        flows.visit(|_, _| entries += 1).unwrap();
        assert_eq!(entries > 0, noted > 0, "flags {flags}");
    }
}
