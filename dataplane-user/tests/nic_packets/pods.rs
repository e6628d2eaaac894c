//! What pods' own devices let in: addresses, bandwidth, and the short way between pods.

use std::net::SocketAddr;

use dataplane_common::abi::{
    Addr, Device, Limit, Pod, PodDevice, config_flag, device_flag, masquerade, pod_flag,
};
use dataplane_model::Protocol;
use dataplane_user::kernel::{NodeTables, PodTable};

use crate::build::{ICMP, ICMPV6, Packet, packet, udp};
use crate::scene::{BACK, DROP, FAMILIES, PASS, Scene, V4, V6, at, ip, of, which};

/// The device of the programs' test runs is the pod's.
const OWN: u32 = 1;
const OTHER: u32 = 77;
const OTHER_V4: &str = "10.244.9.10";
const OTHER_V6: &str = "fd02::9:10";

struct Pods {
    scene: Scene,
    table: PodTable,
}

fn pod(ifindex: u32, last: u8, flags: u32) -> Pod {
    Pod {
        ifindex,
        flags,
        mtu: 1500,
        mac: [2, 0, 0, 0, 1, last],
        host_mac: [2, 0, 0, 0, 2, last],
    }
}

fn device(v4: &str, v6: &str) -> PodDevice {
    PodDevice {
        v4: ip(v4).into(),
        v6: ip(v6).into(),
        flags: pod_flag::SHORT,
        ..PodDevice::default()
    }
}

impl Pods {
    /// A pod with the addresses `pod` of the families behind the device, and another of this node.
    fn new() -> Self {
        let scene = Scene::new();
        let kernel = &scene.plane.kernel;
        let mut pods = Self {
            table: kernel.pod_table().unwrap(),
            scene,
        };
        pods.serve(device_flag::POD);
        pods.put(&device(V4.pod, V6.pod));
        pods.table
            .put(&pod(OTHER, 2, pod_flag::SHORT), &device(OTHER_V4, OTHER_V6))
            .unwrap();
        let nets = [
            ("10.244.0.0/16", masquerade::EXEMPT | masquerade::REMOTE_PODS),
            ("10.244.9.0/24", masquerade::EXEMPT | masquerade::SOURCE),
            ("fd02::/16", masquerade::EXEMPT | masquerade::REMOTE_PODS),
            ("fd02::9:0/112", masquerade::EXEMPT | masquerade::SOURCE),
        ];
        let nets = nets.map(|(net, flags)| (net.parse().unwrap(), flags));
        let mut table = pods.scene.plane.kernel.masquerade_table().unwrap();
        table.set(&nets.into()).unwrap();
        pods
    }

    fn serve(&mut self, flags: u16) {
        let row = Device {
            v4: ip(V4.node).into(),
            v6: ip(V6.node).into(),
            flags,
            header: 14,
            ..Device::default()
        };
        let mut devices = self.scene.plane.kernel.device_table().unwrap();
        devices.put(OWN, &row).unwrap();
    }

    fn put(&mut self, row: &PodDevice) {
        self.table.put(&pod(OWN, 1, pod_flag::SHORT), row).unwrap();
    }

    fn node(&self) -> &NodeTables {
        &self.scene.plane.node
    }

    /// What becomes of a packet that the pod sends: the verdict and what was counted.
    fn send(&mut self, packet: &Packet) -> (i32, Vec<&'static str>) {
        let out = self.scene.ingress(&packet.build());
        (
            out.verdict,
            out.counted.into_iter().map(|(name, _)| name).collect(),
        )
    }
}

fn icmp6(kind: u8, src: &str, dst: &str, target: &str) -> Packet {
    let mut payload = vec![0, 0, 0, 0];
    let target: std::net::Ipv6Addr = target.parse().unwrap();
    payload.extend(target.octets());
    let mut packet = packet(ICMPV6, &at(src, 0), &at(dst, 0));
    packet.src.set_port(u16::from(kind) << 8);
    packet.payload = payload;
    packet
}

#[test]
fn a_pod_sends_with_its_own_address_only() {
    let mut pods = Pods::new();
    let world = [
        (V4.client, V4.pod, "10.244.9.200"),
        (V6.client, V6.pod, "fd02::9:200"),
    ];
    for (client, own, spoofed) in world {
        for protocol in [Protocol::Udp, Protocol::Tcp, Protocol::Sctp] {
            let to = at(client, 53);
            let sent = pods.send(&of(protocol, &at(own, 1), &to));
            assert_eq!(sent.0, PASS, "{own}: {sent:?}");
            for other in [spoofed, client] {
                let sent = pods.send(&of(protocol, &at(other, 1), &to));
                assert_eq!(sent, (DROP, vec!["source_foreign"]), "{other}");
            }
        }
    }
    // the addresses of the other family are not there
    pods.put(&PodDevice {
        v6: Addr::default(),
        ..device(V4.pod, V6.pod)
    });
    let to = at(V6.client, 53);
    assert_eq!(pods.send(&udp(&at(V6.pod, 1), &to)).0, DROP);
    assert_eq!(pods.send(&udp("[::]:1", &to)).0, DROP);
}

#[test]
fn neighbour_discovery_works_and_says_nothing_of_others() {
    const LINK: &str = "fe80::7";
    let mut pods = Pods::new();
    let all = "ff02::1";
    for (kind, src, dst, target, verdict) in [
        // duplicate address detection, and what finds the gateway
        (135, "::", "ff02::1:ff00:7", LINK, PASS),
        (135, V6.pod, "ff02::1:ff00:1", "fe80::1", PASS),
        (135, LINK, "fe80::1", "fe80::1", PASS),
        (133, LINK, "ff02::2", "::", PASS),
        (143, "::", "ff02::16", "::", PASS),
        (136, LINK, all, LINK, PASS),
        (136, V6.pod, "fe80::1", V6.pod, PASS),
        (136, V6.pod, "fe80::1", OTHER_V6, DROP),
        (136, LINK, all, V6.node, DROP),
        (134, LINK, all, "::", DROP),
        (137, LINK, V6.pod, V6.client, DROP),
        // link-local and no address are for the link
        (128, LINK, V6.client, "::", DROP),
        (128, "::", V6.client, "::", DROP),
        (135, "fd02::9:200", "ff02::1:ff00:1", "fe80::1", DROP),
    ] {
        let sent = pods.send(&icmp6(kind, src, dst, target));
        assert_eq!(sent.0, verdict, "type {kind} from {src} to {dst} about {target}");
        assert_eq!(sent.1.contains(&"source_foreign"), verdict == DROP);
    }
}

#[test]
fn devices_of_others_are_not_judged() {
    let mut pods = Pods::new();
    pods.table
        .remove(&[ip(V4.pod).into(), ip(V6.pod).into()])
        .unwrap();
    assert_eq!(pods.send(&udp("10.244.9.200:1", &at(V4.client, 53))).0, PASS);
    assert!(pods.table.devices().unwrap().contains_key(&OTHER));
    pods.table.retain(&[OWN].into()).unwrap();
    assert!(pods.table.devices().unwrap().is_empty() && pods.table.pods().unwrap().is_empty());
}

#[test]
fn bandwidth_is_a_bucket() {
    let mut pods = Pods::new();
    let sent = udp(&at(V4.pod, 1), &at(V4.client, 53));
    let length = sent.build().len() as u64;
    // so slow that nothing flows in during the test: room for three packets, and one that overdraws it
    let limit = |packets: u64, full_at| Limit {
        rate: 1,
        burst: packets * length * 1_000_000_000,
        full_at,
    };
    pods.put(&PodDevice {
        out: limit(3, 0),
        ..device(V4.pod, V6.pod)
    });
    for _ in 0..4 {
        assert_eq!(pods.send(&sent).0, PASS);
    }
    assert_eq!(pods.send(&sent), (DROP, vec!["over_limit"]));
    // what a new agent writes takes nothing back
    pods.put(&PodDevice {
        out: limit(3, 0),
        ..device(V4.pod, V6.pod)
    });
    assert_eq!(pods.send(&sent).0, DROP);
    // time fills it: as if it had been full long ago
    pods.table.remove(&[ip(V4.pod).into()]).unwrap();
    pods.put(&PodDevice {
        out: limit(3, 1),
        ..device(V4.pod, V6.pod)
    });
    assert_eq!(pods.send(&sent).0, PASS);

    // the other way, out of the node into the pod
    let got = udp(&at(V4.client, 53), &at(V4.pod, 1)).build();
    assert_eq!(pods.scene.egress(&got, 0).verdict, PASS);
    pods.put(&PodDevice {
        into: limit(1, 0),
        ..device(V4.pod, V6.pod)
    });
    let verdicts: Vec<i32> = (0..3).map(|_| pods.scene.egress(&got, 0).verdict).collect();
    assert_eq!(verdicts, [PASS, PASS, DROP]);
    // and by the short way from the other pod, whose device this is now
    pods.table
        .remove(&[ip(V4.pod).into(), ip(OTHER_V4).into()])
        .unwrap();
    pods.put(&device(V4.pod, V6.pod));
    let other = PodDevice {
        into: limit(1, 0),
        ..device(OTHER_V4, OTHER_V6)
    };
    pods.table.put(&pod(OTHER, 2, pod_flag::SHORT), &other).unwrap();
    let near = udp(&at(V4.pod, 1), &at(OTHER_V4, 2));
    let verdicts: Vec<i32> = (0..3).map(|_| pods.send(&near).0).collect();
    assert_eq!(verdicts, [BACK, BACK, DROP]);
}

#[test]
fn pods_of_a_node_are_next_to_each_other() {
    let mut pods = Pods::new();
    for (own, other) in [(V4.pod, OTHER_V4), (V6.pod, OTHER_V6)] {
        for protocol in [Protocol::Udp, Protocol::Tcp, Protocol::Sctp] {
            let sent = of(protocol, &at(own, 1), &at(other, 2)).build();
            let out = pods.scene.ingress(&sent);
            assert_eq!(
                (out.verdict, out.counted.as_slice()),
                (BACK, &[("short_way", 1)][..])
            );
            // into the pod as if the node had forwarded it: link-layer addresses and lifetime, with right checksums
            assert_eq!(out.bytes[..12], [2, 0, 0, 0, 1, 2, 2, 0, 0, 0, 2, 2]);
            out.seen();
            let mut wanted = sent.clone();
            wanted[..12].copy_from_slice(&out.bytes[..12]);
            if own.contains('.') {
                wanted[14 + 8] -= 1;
                wanted[14 + 10..14 + 12].copy_from_slice(&out.bytes[14 + 10..14 + 12]);
            } else {
                wanted[14 + 7] -= 1;
            }
            assert_eq!(out.bytes, wanted);
        }
    }
}

#[test]
fn what_is_not_plain_takes_the_long_way() {
    let mut pods = Pods::new();
    let near = udp(&at(V4.pod, 1), &at(OTHER_V4, 2));
    let near6 = udp(&at(V6.pod, 1), &at(OTHER_V6, 2));
    let long = (PASS, vec!["long_way"]);
    // the end of its life, whose ICMP error the node makes
    for (packet, lifetime) in [(&near, 14 + 8), (&near6, 14 + 7)] {
        let mut bytes = packet.build();
        bytes[lifetime] = 1;
        let out = pods.scene.ingress(&bytes);
        assert_eq!((out.verdict, out.counted[0]), (PASS, ("long_way", 1)));
        assert_eq!(out.bytes, bytes, "it is left as it is");
    }
    let options = Packet {
        options: vec![1, 1, 1, 0],
        ..near.clone()
    };
    assert_eq!(pods.send(&options), long);
    let large = Packet {
        payload: vec![0; 1600],
        ..near.clone()
    };
    assert_eq!(pods.send(&large), long);
    let itself = udp(&at(V4.pod, 1), &at(V4.pod, 2));
    assert_eq!(pods.send(&itself), long);
    // another node's pod without a route to it
    let far = udp(&at(V4.pod, 1), "10.244.200.2:2");
    assert_eq!(pods.send(&far), long);
    // the world is no pod
    assert_eq!(pods.send(&udp(&at(V4.pod, 1), &at(V4.client, 2))).1, [""; 0]);
    // somebody else translates, so that netfilter has to see it
    let node = pods.node();
    node.set_foreign_flows(true);
    assert_eq!(pods.send(&near).0, PASS);
    pods.node().set_foreign_flows(false);
    assert_eq!(pods.send(&near).0, BACK);
    // the operator's wish
    pods.table
        .put(&pod(OTHER, 2, 0), &device(OTHER_V4, OTHER_V6))
        .unwrap();
    assert_eq!(pods.send(&near), long);
    assert_eq!(config_flag::FOREIGN_FLOWS & pods.node().config().flags, 0);
}

#[test]
fn pods_of_other_nodes_come_straight_in_and_the_world_does_not() {
    let mut pods = Pods::new();
    pods.table.remove(&[ip(V4.pod).into()]).unwrap();
    pods.serve(0);
    for (src, verdict) in [
        ("10.244.5.5", BACK),
        (V4.client, PASS),
        // who says to be a pod of this node is judged by the node
        ("10.244.9.200", PASS),
    ] {
        assert_eq!(pods.send(&udp(&at(src, 1), &at(OTHER_V4, 2))).0, verdict, "{src}");
    }
    let mut echo = packet(ICMP, &at("10.244.5.5", 8 << 8), &at(OTHER_V4, 0));
    echo.payload = vec![0, 1, 0, 1];
    assert_eq!(pods.send(&echo).0, BACK);
}

/// A pod whose sockets are not seen: its connections to services are translated at its device, and so are the answers.
#[test]
fn answers_that_have_to_be_translated_back_take_the_long_way() {
    for family in FAMILIES {
        let mut pods = Pods::new();
        let own = family.pod;
        let service = at(&format!("{}{}", family.cluster, which::LOCAL), 80);
        let request = of(Protocol::Tcp, &at(own, 4000), &service);
        let out = pods.scene.ingress(&request.build());
        assert_eq!(out.verdict, PASS);
        let backend = out.seen().dst;
        assert_eq!(backend, SocketAddr::new(ip(family.local), 8080));
        assert_ne!(
            pods.table.pods().unwrap()[&ip(own).into()].flags & pod_flag::TRANSLATED,
            0
        );
        // the device is the backend's now, a pod of this node, and the client's is another
        let client = pod(OTHER, 1, pod_flag::SHORT | pod_flag::TRANSLATED);
        pods.table.retain(&[].into()).unwrap();
        pods.table.put(&client, &device(V4.pod, V6.pod)).unwrap();
        pods.put(&device(V4.local, V6.local));
        let answer = of(Protocol::Tcp, &at(family.local, 8080), &at(own, 4000));
        assert_eq!(pods.send(&answer), (PASS, vec!["long_way"]), "{}", answer.src);
        // another connection of the same pods
        let direct = of(Protocol::Tcp, &at(family.local, 8080), &at(own, 4001));
        assert_eq!(pods.send(&direct).0, BACK);
    }
}
