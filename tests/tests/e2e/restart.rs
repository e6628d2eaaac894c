//! The agent ends, in whatever way, and the dataplane does not.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use beeline_tests::client::Mode;
use beeline_tests::{Agent, Load, Place, agent, process};

use crate::pair::{self, NODE_PORT, NODE_PORT_UDP, Pair};
use crate::scene::{Scene, V4, V6, address, assert_spread};

const BOTH: [&str; 2] = ["web-1", "web-2"];

#[test]
fn sigkill_and_restart_under_load_fails_no_request() {
    let mut scene = Scene::new();
    let target = address(&format!("{V4}:80"));
    let start = |mode, rate| Load::start(scene.client.place(), target, mode, rate, 8).unwrap();
    let new_connections = start(Mode::Http, 500);
    let held_connections = start(Mode::Hold, 100);
    let datagrams = Load::start(
        scene.client.place(),
        address(&format!("[{V6}]:53")),
        Mode::Udp,
        100,
        4,
    )
    .unwrap();
    let programs = programs_in(scene.node.cgroup());
    assert!(
        !programs.is_empty(),
        "no program is attached to the node's cgroup"
    );
    let mut seen = programs;
    for round in 0..50 {
        scene.agent.process.kill().unwrap();
        scene.agent = Agent::start_synced(&scene.node, &scene.options).unwrap();
        let now = programs_in(scene.node.cgroup());
        assert_eq!(
            now.len(),
            seen.len(),
            "round {round}: the number of attached programs changed"
        );
        assert!(
            now.is_disjoint(&seen),
            "round {round}: programs of the last agent are still attached"
        );
        seen = now;
    }
    for (what, load) in [
        ("new", new_connections),
        ("held", held_connections),
        ("datagrams", datagrams),
    ] {
        let report = load.stop().unwrap();
        assert_eq!(report.failed, 0, "{what}: {report:?}");
        assert!(report.ok > 300, "{what}: {report:?}");
    }
}

/// Clients of every kind, of the node and outside.
fn clients(pair: &Pair) -> Vec<(&'static str, Load)> {
    let outside = pair.outside.place();
    let [tcp, _] = pair.node_ports(0, NODE_PORT);
    let [_, udp] = pair.node_ports(0, NODE_PORT_UDP);
    let pod = pair.clients[0].place();
    let cluster = |port: u16| address(&format!("{}:{port}", pair::V4));
    let start = |what, place: &Place, target, mode, rate, clients| {
        (what, Load::start(place, target, mode, rate, clients).unwrap())
    };
    vec![
        start("new by node port", outside, tcp, Mode::Http, 1000, 8),
        start("new by cluster address", pod, cluster(80), Mode::Http, 1000, 8),
        start("held by node port", outside, tcp, Mode::Hold, 400, 100),
        start("held by cluster address", pod, cluster(80), Mode::Hold, 400, 100),
        start("datagrams by node port", outside, udp, Mode::UdpHold, 200, 25),
        start(
            "datagrams by cluster address",
            pod,
            cluster(53),
            Mode::UdpHold,
            200,
            25,
        ),
    ]
}

/// `misnamed` connections may have the name of the pod instead of the service's.
fn assert_none_failed(clients: Vec<(&str, Load)>, least: u64, misnamed: u64) {
    for (what, load) in clients {
        let report = load.stop().unwrap();
        let named = report
            .errors
            .iter()
            .filter(|(error, _)| error.starts_with("getpeername says"));
        let named: u64 = named.map(|(_, count)| count).sum();
        assert!(named <= misnamed, "{what}: {report:?}");
        assert_eq!(report.failed, named, "{what}: {report:?}");
        assert!(report.ok > least, "{what}: {report:?}");
    }
}

#[test]
fn nobody_outside_notices_fifty_restarts() {
    let mut pair = Pair::new();
    let clients = clients(&pair);
    for _ in 0..50 {
        pair.agents[0].process.kill().unwrap();
        pair.agents[0] = Agent::start_synced(&pair.nodes[0], &pair.options).unwrap();
    }
    assert_none_failed(clients, 1000, 0);
}

#[test]
fn maps_of_another_size_lose_no_connection() {
    let mut pair = Pair::new();
    let clients = clients(&pair);
    let maps = [
        "services",
        "backends",
        "slots",
        "frontends",
        "sock-origins",
        "conntrack",
        "nat",
        "sock-connections",
    ];
    for round in 1..=4_u32 {
        // larger, and smaller again
        let size = round + if round % 2 == 1 { 9000 } else { 5000 };
        let options = maps.iter().fold(pair.options.clone(), |options, map| {
            options.flag(&format!("--max-{map}"), size)
        });
        pair.agents[0].process.kill().unwrap();
        pair.agents[0] = Agent::start_synced(&pair.nodes[0], &options).unwrap();
        let status = agent::beeline_json(&pair.nodes[0], &["status"]).unwrap();
        let shown = status["maps"].as_array().unwrap().iter();
        let changed = shown.filter(|map| map["max"] == size);
        assert!(changed.count() >= 4, "{}", status["maps"]);
    }
    // the program that connects a socket may be the old one, and the one that names its peer the new one
    assert_none_failed(clients, 100, 8);
}

#[test]
fn what_changed_while_the_agent_was_dead_is_made_up_for() {
    let mut scene = Scene::new();
    scene.agent.process.kill().unwrap();
    scene
        .objects
        .put_service("web", &[V4, V6], &[&scene.servers[1]])
        .unwrap();
    scene
        .objects
        .put_service("late", &["10.96.0.20"], &[&scene.servers[0]])
        .unwrap();
    // Nobody is there to see it: the old set is in force.
    assert_spread(&scene.ask(&format!("{V4}:80"), Mode::Http, 64), &BOTH);
    scene.agent = Agent::start_synced(&scene.node, &scene.options).unwrap();
    assert_spread(&scene.ask(&format!("{V4}:80"), Mode::Http, 64), &["web-2"]);
    assert_spread(&scene.ask("10.96.0.20:80", Mode::Http, 8), &["web-1"]);
    // And a service that goes while nobody looks is gone afterwards.
    scene.agent.process.kill().unwrap();
    scene.objects.remove("late").unwrap();
    scene.agent = Agent::start_synced(&scene.node, &scene.options).unwrap();
    assert_eq!(scene.ask("10.96.0.20:80", Mode::Http, 1).ok, 0);
}

#[test]
fn sigterm_leaves_the_dataplane_working() {
    let mut scene = Scene::new();
    let status = scene.agent.process.terminate().unwrap();
    assert!(status.success(), "{status}: {}", scene.agent.process.log_end());
    for ip in [V4.to_owned(), format!("[{V6}]")] {
        assert_spread(&scene.ask(&format!("{ip}:80"), Mode::Http, 64), &BOTH);
        assert_spread(&scene.ask(&format!("{ip}:53"), Mode::Udp, 64), &BOTH);
    }
    scene.agent = Agent::start_synced(&scene.node, &scene.options).unwrap();
    scene.put_service("web", &[V4, V6], &[&scene.servers[0]]);
    assert_spread(&scene.ask(&format!("{V4}:80"), Mode::Http, 16), &["web-1"]);
}

/// Ids of the programs attached to a cgroup, as another tool sees them.
pub(crate) fn programs_in(cgroup: &Path) -> BTreeSet<u64> {
    let mut command = Command::new("bpftool");
    command.args(["-j", "cgroup", "show"]).arg(cgroup);
    let text = process::output(command).unwrap();
    if text.trim().is_empty() {
        return BTreeSet::new();
    }
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    list.as_array()
        .unwrap()
        .iter()
        .map(|program| program["id"].as_u64().unwrap())
        .collect()
}
