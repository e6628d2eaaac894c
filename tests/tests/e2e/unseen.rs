//! Clients whose sockets the socket layer does not see, as those of sandboxed runtimes: what they send is translated at
//! their pod's device.

use std::net::SocketAddr;

use beeline_tests::Place;
use beeline_tests::agent::Agent;
use beeline_tests::client::{Mode, Question};
use serde_json::json;

use crate::pair::{
    BOTH, NODE_PORT, NODE_PORT_UDP, Pair, REFUSED, V4, V6, ask, assert_replies, sources, wait_fails_within,
    wait_replies,
};

/// The clients' pods, in a cgroup that no agent serves.
fn unseen(pair: &Pair) -> Vec<Place> {
    let elsewhere = pair.outside.place();
    let clients = pair.clients.iter();
    clients
        .map(|client| client.place().in_cgroup_of(elsewhere))
        .collect()
}

fn frontends(pair: &Pair, node: usize) -> Vec<(SocketAddr, Mode)> {
    let cluster = |port| [V4, V6].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
    let mut all = Vec::new();
    for (targets, mode) in [
        (cluster(80), Mode::Http),
        (cluster(53), Mode::Udp),
        (pair.node_ports(node, NODE_PORT), Mode::Http),
        (pair.node_ports(node, NODE_PORT_UDP), Mode::Udp),
    ] {
        all.extend(targets.map(|target| (target, mode)));
    }
    all
}

#[test]
fn a_pod_whose_sockets_are_not_seen_reaches_services() {
    let mut pair = Pair::new();
    let clients = unseen(&pair);
    for (node, client) in clients.iter().enumerate() {
        for (target, mode) in frontends(&pair, node) {
            wait_replies(client, target, mode, &BOTH);
            assert_replies(&format!("{target}"), &ask(client, target, mode, 64), &BOTH);
        }
        // both backends see the pod's own address, whatever the policy
        for (family, own) in pair.clients[node].addresses().into_iter().enumerate() {
            let target = pair.node_ports(node, NODE_PORT)[family];
            let report = sources(client, target, Mode::Http, 64);
            assert_replies(&format!("{target}"), &report, &[&own.to_string()]);
        }
        let long = Question {
            size: 4000,
            ..Mode::Udp.into()
        };
        let target = SocketAddr::new(V4.parse().unwrap(), 53);
        assert_replies("larger than a packet", &ask(client, target, long, 32), &BOTH);
    }
    // a policy for other hosts is none for pods
    pair.put(
        json!({"spec": {"externalTrafficPolicy": "Local"}}),
        &[false, true],
    );
    wait_replies(
        &clients[0],
        pair.node_ports(0, NODE_PORT)[0],
        Mode::Http,
        &BOTH[1..],
    );
    // the next agent serves the same devices
    pair.agents[0].process.kill().unwrap();
    assert_replies(
        "without an agent",
        &ask(&clients[0], pair.node_ports(0, NODE_PORT)[1], Mode::Http, 16),
        &BOTH[1..],
    );
    pair.agents[0] = Agent::start_synced(&pair.nodes[0], &pair.options).unwrap();
    pair.put(json!({}), &[false, false]);
    for (node, client) in clients.iter().enumerate() {
        for (target, mode) in frontends(&pair, node) {
            let mode = if mode == Mode::Udp {
                Mode::UdpConnected
            } else {
                mode
            };
            wait_fails_within(client, target, mode, &REFUSED, 3500);
        }
    }
}
