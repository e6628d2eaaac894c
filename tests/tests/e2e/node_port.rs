//! Node ports: from everywhere, by every address of the node, and by no other.

use std::net::{IpAddr, SocketAddr};

use beeline_tests::client::{Mode, Question};
use beeline_tests::cluster::ECHO_PORT;
use serde_json::json;

use crate::pair::{
    BOTH, NODE_PORT, NODE_PORT_UDP, Pair, REFUSED, SILENT, V4, V6, ask, assert_fails, assert_replies,
    impatient, sources, wait_fails, wait_fails_within, wait_replies,
};

#[test]
fn every_client_reaches_every_pod_through_every_node() {
    let pair = Pair::new();
    for (who, place) in pair.everywhere() {
        for node in [0, 1] {
            for target in pair.node_ports(node, NODE_PORT) {
                let what = format!("{who} to {target}");
                assert_replies(&what, &ask(place, target, Mode::Http, 64), &BOTH);
                let held = ask(place, target, Mode::Hold, 20);
                assert_eq!((held.failed, held.replies.len()), (0, 1), "{what}: {held:?}");
            }
            for target in pair.node_ports(node, NODE_PORT_UDP) {
                let what = format!("{who} to {target}/UDP");
                assert_replies(&what, &ask(place, target, Mode::Udp, 64), &BOTH);
                assert_replies(&what, &ask(place, target, Mode::UdpConnected, 64), &BOTH);
            }
        }
    }
}

#[test]
fn a_backend_of_this_node_sees_the_client_and_one_elsewhere_sees_the_node() {
    let pair = Pair::new();
    let outside = [pair.outside.v4().to_string(), pair.outside.v6().to_string()];
    for node in [0, 1] {
        let targets = pair.node_ports(node, NODE_PORT);
        let own = pair.own_addresses(node);
        for ((target, client), own) in targets.into_iter().zip(&outside).zip(&own) {
            let report = sources(pair.outside.place(), target, Mode::Http, 64);
            assert_eq!(report.failed, 0, "{report:?}");
            let mut wanted = [client.as_str(), own.as_str()];
            wanted.sort_unstable();
            assert_replies(&target.to_string(), &report, &wanted);
        }
    }
}

#[test]
fn datagrams_larger_than_a_packet_are_translated() {
    let pair = Pair::new();
    let question = Question {
        size: 4000,
        ..Mode::Udp.into()
    };
    for (who, place) in pair.everywhere() {
        let mut targets = pair.node_ports(0, NODE_PORT_UDP).to_vec();
        if who != "outside" {
            targets.extend([V4, V6].map(|ip| SocketAddr::new(ip.parse().unwrap(), 53)));
        }
        for target in targets {
            assert_replies(
                &format!("{who} to {target}"),
                &ask(place, target, question, 32),
                &BOTH,
            );
        }
    }
}

#[test]
fn localhost_reaches_node_ports_from_the_node_only() {
    let pair = Pair::new();
    for ip in ["127.0.0.1", "[::1]"] {
        let target: SocketAddr = format!("{ip}:{NODE_PORT}").parse().unwrap();
        assert_replies(ip, &ask(pair.nodes[0].host(), target, Mode::Http, 64), &BOTH);
        // a pod's loopback is its own
        assert_fails(ip, &ask(pair.clients[0].place(), target, Mode::Http, 4), &REFUSED);
    }
}

#[test]
fn a_node_port_follows_its_service() {
    let pair = Pair::new();
    let outside = pair.outside.place();
    let [target, _] = pair.node_ports(0, NODE_PORT);
    assert_replies("before", &ask(outside, target, Mode::Http, 64), &BOTH);
    // another node port
    let other: SocketAddr = SocketAddr::new(target.ip(), 30090);
    let ports = json!([
        {"name": "web", "protocol": "TCP", "port": 80, "nodePort": 30090},
        {"name": "dns", "protocol": "UDP", "port": 53, "nodePort": NODE_PORT_UDP},
    ]);
    pair.put(json!({"spec": {"ports": ports}}), &[true, true]);
    wait_replies(outside, other, Mode::Http, &BOTH);
    wait_fails(outside, target, Mode::Http, &REFUSED);
    // none any more
    let ports = json!([{"name": "web", "protocol": "TCP", "port": 80}]);
    pair.put(
        json!({"spec": {"type": "ClusterIP", "ports": ports}}),
        &[true, true],
    );
    wait_fails(outside, other, Mode::Http, &REFUSED);
    let [_, udp] = pair.node_ports(0, NODE_PORT_UDP);
    wait_fails(outside, udp, Mode::UdpConnected, &REFUSED);
    // and back
    pair.put(json!({}), &[true, true]);
    wait_replies(outside, target, Mode::Http, &BOTH);
}

#[test]
fn one_port_number_serves_two_protocols_apart() {
    let pair = Pair::new();
    let ports = json!([
        {"name": "web", "protocol": "TCP", "port": 80, "nodePort": NODE_PORT},
        {"name": "dns", "protocol": "UDP", "port": 80, "nodePort": NODE_PORT},
    ]);
    pair.put(json!({"spec": {"ports": ports}}), &[true, true]);
    let [target, _] = pair.node_ports(1, NODE_PORT);
    wait_replies(pair.outside.place(), target, Mode::Udp, &BOTH);
    assert_replies("TCP", &ask(pair.outside.place(), target, Mode::Http, 64), &BOTH);
    // dropping one stops only that one
    let ports = json!([{"name": "web", "protocol": "TCP", "port": 80, "nodePort": NODE_PORT}]);
    pair.put(json!({"spec": {"ports": ports}}), &[true, true]);
    wait_fails(pair.outside.place(), target, Mode::UdpConnected, &REFUSED);
    assert_replies("TCP", &ask(pair.outside.place(), target, Mode::Http, 64), &BOTH);
}

#[test]
fn without_endpoints_everyone_is_refused_at_once() {
    let pair = Pair::new();
    pair.put(json!({}), &[false, false]);
    for (_, place) in pair.everywhere() {
        for (port, mode) in [(NODE_PORT, Mode::Http), (NODE_PORT_UDP, Mode::UdpConnected)] {
            for target in pair.node_ports(1, port) {
                // Between namespaces of one machine the answer may come before the system call that asked has let go of
                // its socket. Then Linux drops it, and the second SYN, a second later, gets one that counts.
                wait_fails_within(place, target, mode, &REFUSED, 2500);
            }
        }
    }
    pair.put(json!({}), &[true, false]);
    wait_replies(
        pair.outside.place(),
        pair.node_ports(1, NODE_PORT)[0],
        Mode::Http,
        &["web-1"],
    );
}

#[test]
fn external_policy_local_keeps_the_client_and_stays_on_the_node() {
    let pair = Pair::with(json!({"spec": {"externalTrafficPolicy": "Local"}}), |o| o);
    let outside = pair.outside.place();
    for (node, pod) in [(0, "web-1"), (1, "web-2")] {
        for (target, client) in pair
            .node_ports(node, NODE_PORT)
            .into_iter()
            .zip([pair.outside.v4().to_string(), pair.outside.v6().to_string()])
        {
            assert_replies("local", &ask(outside, target, Mode::Http, 32), &[pod]);
            assert_replies("local", &sources(outside, target, Mode::Http, 8), &[&client]);
        }
        for target in pair.node_ports(node, NODE_PORT_UDP) {
            assert_replies("local", &ask(outside, target, Mode::Udp, 32), &[pod]);
        }
        // what is on the node itself is not outside: it may use every pod
        for place in [pair.clients[node].place(), pair.nodes[node].host()] {
            for target in pair.node_ports(node, NODE_PORT) {
                assert_replies("short circuit", &ask(place, target, Mode::Http, 64), &BOTH);
            }
        }
    }
    // no pod on the second node: silence there, no refusal, because there are endpoints elsewhere
    pair.put(
        json!({"spec": {"externalTrafficPolicy": "Local"}}),
        &[true, false],
    );
    let [target, _] = pair.node_ports(1, NODE_PORT);
    wait_fails(outside, target, Mode::Http, &SILENT);
    let [first, _] = pair.node_ports(0, NODE_PORT);
    assert_replies("the other node", &ask(outside, first, Mode::Http, 8), &["web-1"]);
    // its own clients still get through
    assert_replies(
        "own pod",
        &ask(pair.clients[1].place(), target, Mode::Http, 8),
        &["web-1"],
    );
    // no pod anywhere: refused
    pair.put(
        json!({"spec": {"externalTrafficPolicy": "Local"}}),
        &[false, false],
    );
    wait_fails(outside, target, Mode::Http, &REFUSED);
    // Cluster again
    pair.put(json!({}), &[true, false]);
    wait_replies(outside, target, Mode::Http, &["web-1"]);
}

#[test]
fn terminating_endpoints_serve_while_nothing_else_does() {
    let pair = Pair::new();
    let terminating = json!({"ready": false, "serving": true, "terminating": true});
    let ready = json!({"ready": true, "serving": true, "terminating": false});
    pair.put_with(json!({}), &[(0, terminating.clone()), (1, ready)]);
    let outside = pair.outside.place();
    let [target, _] = pair.node_ports(0, NODE_PORT);
    wait_replies(outside, target, Mode::Http, &["web-2"]);
    pair.put_with(json!({}), &[(0, terminating.clone())]);
    wait_replies(outside, target, Mode::Http, &["web-1"]);
    // local ones, for policy Local
    let local = json!({"spec": {"externalTrafficPolicy": "Local"}});
    pair.put_with(local, &[(0, terminating)]);
    wait_replies(outside, target, Mode::Http, &["web-1"]);
    let [second, _] = pair.node_ports(1, NODE_PORT);
    wait_fails(outside, second, Mode::Http, &SILENT);
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    let pair = Pair::new();
    pair.put(json!({}), &[true, false]);
    let mut tcp = [V4, V6]
        .map(|ip| SocketAddr::new(ip.parse().unwrap(), 80))
        .to_vec();
    let mut udp = [V4, V6]
        .map(|ip| SocketAddr::new(ip.parse().unwrap(), 53))
        .to_vec();
    for node in [0, 1] {
        tcp.extend(pair.node_ports(node, NODE_PORT));
        udp.extend(pair.node_ports(node, NODE_PORT_UDP));
    }
    let pod = pair.servers[0].place();
    for target in tcp {
        assert_replies(&target.to_string(), &ask(pod, target, Mode::Http, 16), &["web-1"]);
    }
    for target in udp {
        for mode in [Mode::Udp, Mode::UdpConnected] {
            assert_replies(
                &format!("{target} {mode:?}"),
                &ask(pod, target, mode, 16),
                &["web-1"],
            );
        }
    }
}

#[test]
fn addresses_that_are_not_selected_are_left_alone() {
    let pair = Pair::with(json!({}), |options| {
        options.flag("--nodeport-addresses", "172.31.0.0/16")
    });
    let outside = pair.outside.place();
    let [v4, v6] = pair.node_ports(0, NODE_PORT);
    assert_replies("selected", &ask(outside, v4, Mode::Http, 64), &BOTH);
    // a family without a range in the list accepts on all its addresses
    assert_replies("other family", &ask(outside, v6, Mode::Http, 64), &BOTH);
    // an address of the node outside the range
    let node = pair.nodes[0].host().netns();
    node.ip_batch(&["addr add 198.51.100.7/32 dev up0".to_owned()])
        .unwrap();
    pair.cluster
        .route_to("198.51.100.7".parse().unwrap(), &pair.nodes[0])
        .unwrap();
    let other: SocketAddr = format!("198.51.100.7:{NODE_PORT}").parse().unwrap();
    assert_fails(
        "not selected",
        &ask(outside, other, impatient(Mode::Http), 3),
        &REFUSED,
    );
}

#[test]
fn a_client_port_may_be_used_again_towards_the_pod_itself() {
    let pair = Pair::new();
    pair.put(json!({}), &[true, false]);
    let client = pair.clients[1].place();
    let node_ports = pair.node_ports(0, NODE_PORT_UDP);
    let pods: [IpAddr; 2] = [pair.servers[0].v4().into(), pair.servers[0].v6().into()];
    for (node_port, pod) in node_ports.into_iter().zip(pods) {
        wait_replies(client, node_port, Mode::Udp, &["web-1"]);
        let question = |mode: Mode| Question {
            source_port: 5000,
            ..impatient(mode)
        };
        // each by the tuple that the other has just used; the client says so if the answer comes from elsewhere
        for target in [node_port, SocketAddr::new(pod, ECHO_PORT), node_port] {
            let report = ask(client, target, question(Mode::Udp), 3);
            assert_replies(&target.to_string(), &report, &["web-1"]);
        }
    }
}
