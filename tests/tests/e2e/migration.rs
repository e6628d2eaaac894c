//! Nodes go over from flannel to Beeline in place, one by one, and one goes back: no connection is lost on the way, and a
//! node that stays with flannel always reaches and is reached.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use beeline_tests::client::Mode;
use beeline_tests::cluster::{ECHO_PORT, Node};
use beeline_tests::process;
use beeline_tests::{Cluster, ControlPlane, Load, Place, agent, wait_for};

use crate::flannel::{BridgePod, Flannel};
use crate::pod_network::{CniPod, NET_CONF, ipam, node_object, options, start_agent};

/// Requests per second of each client.
const RATE: u32 = 50;

/// Everybody asks everybody, on connections that stay open and on new ones.
struct Traffic(Vec<(String, Load)>);

impl Traffic {
    fn start(pods: &[BridgePod], nodes: &[&Node], world: SocketAddr) -> Self {
        let mut clients = Vec::new();
        let mut ask = |name: String, place: &Place, ip: IpAddr, mode| {
            let target = SocketAddr::new(ip, ECHO_PORT);
            let load = Load::start(place, target, mode, RATE, 1);
            clients.push((name.clone(), load.context(name).unwrap()));
        };
        for (i, from) in pods.iter().enumerate() {
            for (j, to) in pods.iter().enumerate().filter(|(j, _)| *j != i) {
                let name = |what: &str| format!("pod {i} to pod {j}, {what}");
                ask(name("connection"), &from.place, to.v4.into(), Mode::Hold);
                ask(name("IPv6 connection"), &from.place, to.v6.into(), Mode::Hold);
                ask(name("new connections"), &from.place, to.v4.into(), Mode::Http);
                ask(name("IPv6 datagrams"), &from.place, to.v6.into(), Mode::Udp);
            }
            // to the next node's pod: by flannel.1's address
            let node = nodes[i % nodes.len()];
            let to = &pods[(i + 1) % pods.len()];
            ask(format!("node to pod, {i}"), node.host(), to.v4.into(), Mode::Hold);
            ask(
                format!("pod {i} to the world"),
                &from.place,
                world.ip(),
                Mode::Hold,
            );
        }
        Self(clients)
    }

    fn stop(self) {
        let mut lost = Vec::new();
        for (name, load) in self.0 {
            let report = load.stop().unwrap();
            assert!(report.ok > 0, "{name}: {report:?}");
            // nobody sends a datagram again: one may be lost when a node changes
            let datagrams = name.ends_with("datagrams");
            if report.failed > u64::from(datagrams) {
                lost.push(format!("{name}: {report:?}"));
            }
        }
        assert!(lost.is_empty(), "{}", lost.join("\n"));
    }
}

/// Both ways, both families.
fn reach_each_other(new: &CniPod<'_>, old: &BridgePod, what: &str) {
    wait_for(
        &format!("{what}: the new pod and the old one"),
        Duration::from_secs(5),
        || {
            let out = |ip: String| new.get(&format!("http://{ip}:{ECHO_PORT}/")).is_some();
            let back = |ip: &str| {
                let target: SocketAddr = format!("{ip}:{ECHO_PORT}").parse().unwrap();
                Load::ask(&old.place, target, Mode::Http, 1).is_ok_and(|report| report.failed == 0)
            };
            let all = [
                out(old.v4.to_string()),
                out(format!("[{}]", old.v6)),
                back(&new.v4),
                back(&format!("[{}]", new.v6)),
            ];
            if all != [true; 4] {
                eprintln!("{what}: {all:?}");
            }
            Ok((all == [true; 4]).then_some(()))
        },
    )
    .unwrap();
}

/// What makes a peer of the node, as `ip` and `bridge` show it, without the order and what ages.
fn overlay_of(node: &Node) -> Vec<String> {
    let mut all = Vec::new();
    for (program, words) in [
        ("ip", "-4 route show dev flannel.1"),
        ("ip", "-6 route show dev flannel-v6.1 proto boot"),
        ("ip", "neighbour show nud permanent dev flannel.1"),
        ("ip", "neighbour show nud permanent dev flannel-v6.1"),
        ("bridge", "fdb show dev flannel.1"),
        ("bridge", "fdb show dev flannel-v6.1"),
        ("ip", "-4 -br address show dev cni0"),
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        let text = node.host().output(program, &words).unwrap();
        let mut lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
        lines.sort();
        all.extend(lines);
    }
    all
}

fn clean_up(node: &Node) {
    let path = |name: &str| node.state().join(name).display().to_string();
    let mut command = agent::beeline(node, &["cleanup"]).unwrap();
    command.arg("--bpffs-root").arg(node.bpffs());
    command.args([
        "--cni-state-dir",
        &path("cni"),
        "--host-local-dir",
        &path("host-local"),
    ]);
    process::output(command).unwrap();
}

#[test]
fn nodes_change_from_flannel_and_back_without_losing_a_connection() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let nodes = [
        cluster.add_node().unwrap(),
        cluster.add_node().unwrap(),
        cluster.add_node().unwrap(),
    ];
    let mut flannels = Vec::new();
    for (node, index) in nodes.iter().zip(1..) {
        plane.register_node(node).unwrap();
        flannels.push(Flannel::new(&plane, node, index));
    }
    for flannel in &flannels {
        flannel.peers(&flannels);
    }
    let outside = cluster.add_outside_host().unwrap();
    let log = cluster.state().join("world.log");
    let _server = process::echo(outside.place(), "world", ECHO_PORT, &log).unwrap();
    // two on the first node: they see each other by the bridge
    let pods = [
        flannels[0].pod("old-1"),
        flannels[1].pod("old-2"),
        flannels[2].pod("old-3"),
        flannels[0].pod("old-4"),
    ];
    let before: Vec<_> = nodes.iter().map(overlay_of).collect();
    let annotations = |node: &Node| node_object(&plane, node)["metadata"]["annotations"].clone();
    let announced = annotations(&nodes[0]);
    let places: Vec<&Node> = nodes.iter().collect();
    let world = SocketAddr::new(outside.v4().into(), ECHO_PORT);
    let traffic = Traffic::start(&pods, &places, world);

    let mut agents = Vec::new();
    let mut new: Vec<CniPod<'_>> = Vec::new();
    for (i, node) in nodes.iter().take(2).enumerate() {
        agents.push(start_agent(&plane, node, &options(&plane, node, NET_CONF)));
        let mut pod = CniPod::new(node, &format!("new-{}", i + 1));
        pod.echo();
        assert!(
            !flannels[i].host_local().join(&pod.v4).exists(),
            "{} is an old pod's",
            pod.v4
        );
        for (j, old) in pods.iter().enumerate() {
            reach_each_other(&pod, old, &format!("node {}, pod {}", i + 1, j + 1));
        }
        for other in &new {
            assert!(pod.pings(&other.v4) && other.pings(&pod.v6));
        }
        new.push(pod);
        // what old pods have is known, and nobody had to learn anything new of this node
        let list = ipam(node).to_string();
        assert!(list.contains(&pods[i].v4.to_string()), "{list}");
        assert_eq!(overlay_of(node), before[i]);
    }
    assert_eq!(annotations(&nodes[0]), announced);
    assert_eq!(overlay_of(&nodes[2]), before[2]);

    // The first node goes back: the agent goes with all that flannel does not know, flannel starts again.
    agents.remove(0).process.terminate().unwrap();
    clean_up(&nodes[0]);
    flannels[0].peers(&flannels);
    let back = flannels[0].pod("old-5");
    assert_ne!(back.v4.to_string(), new[0].v4, "its address is a new pod's");
    for pod in &new {
        for old in [&back, &pods[0], &pods[1], &pods[2]] {
            reach_each_other(pod, old, "after the way back");
        }
    }
    assert_eq!(overlay_of(&nodes[0]), before[0]);
    let routes = nodes[0].host().output("ip", &["route"]).unwrap();
    assert!(!routes.contains("unreachable"), "{routes}");
    traffic.stop();
}
