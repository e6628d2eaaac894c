//! External and load-balancer addresses, source ranges, unknown ports and addresses.

use std::net::{IpAddr, SocketAddr};

use beeline_tests::client::Mode;
use serde_json::json;

use crate::pair::{
    BOTH, Pair, REFUSED, UNREACHABLE, V4, ask, assert_replies, sources, wait_fails, wait_replies,
};

const EXTERNAL: [&str; 2] = ["203.0.113.250", "2001:db8:cb00::71fa"];
const BALANCER: [&str; 2] = ["203.0.113.10", "2001:db8:cb00::10"];

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

fn route(pair: &Pair, addresses: &[&str], node: usize) {
    for address in addresses {
        let address: IpAddr = address.parse().unwrap();
        pair.cluster.route_to(address, &pair.nodes[node]).unwrap();
    }
}

fn balancer() -> serde_json::Value {
    let ingress: Vec<_> = BALANCER
        .iter()
        .map(|ip| json!({"ip": ip, "ipMode": "VIP"}))
        .collect();
    json!({"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": ingress}}})
}

#[test]
fn an_external_address_that_no_node_has_is_served_everywhere() {
    let pair = Pair::with(json!({"spec": {"externalIPs": EXTERNAL}}), |o| o);
    route(&pair, &EXTERNAL, 1);
    for (who, place) in pair.everywhere() {
        for ip in EXTERNAL {
            assert_replies(who, &ask(place, at(ip, 80), Mode::Http, 64), &BOTH);
            assert_replies(who, &ask(place, at(ip, 53), Mode::Udp, 64), &BOTH);
        }
    }
    pair.put(json!({}), &[true, true]);
    wait_fails(
        pair.outside.place(),
        at(EXTERNAL[0], 80),
        Mode::Http,
        &UNREACHABLE,
    );
}

#[test]
fn a_load_balancer_address_is_served_and_pods_keep_their_source() {
    let pair = Pair::with(balancer(), |o| o);
    route(&pair, &BALANCER, 0);
    for (who, place) in pair.everywhere() {
        for ip in BALANCER {
            assert_replies(who, &ask(place, at(ip, 80), Mode::Http, 64), &BOTH);
        }
    }
    let client = &pair.clients[0];
    let own = [client.v4().to_string(), client.v6().to_string()];
    for (ip, own) in BALANCER.into_iter().zip(own) {
        assert_replies(
            "pod's source",
            &sources(client.place(), at(ip, 80), Mode::Http, 32),
            &[&own],
        );
    }
    // behind a proxy of its own the address is not ours
    let ingress: Vec<_> = BALANCER
        .iter()
        .map(|ip| json!({"ip": ip, "ipMode": "Proxy"}))
        .collect();
    pair.put(
        json!({"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": ingress}}}),
        &[true, true],
    );
    wait_fails(client.place(), at(BALANCER[0], 80), Mode::Http, &UNREACHABLE);
}

#[test]
fn source_ranges_decide_who_enters_by_a_load_balancer_address() {
    let pair = Pair::with(balancer(), |o| o);
    route(&pair, &BALANCER, 0);
    let outside = pair.outside.place();
    let target = at(BALANCER[0], 80);
    let with_ranges = |ranges: &[&str]| {
        let mut patch = balancer();
        patch["spec"]["loadBalancerSourceRanges"] = json!(ranges);
        pair.put(patch, &[true, true]);
    };
    assert_replies("open", &ask(outside, target, Mode::Http, 64), &BOTH);
    with_ranges(&["198.51.100.0/24"]);
    wait_fails(outside, target, Mode::Http, &["connect: TimedOut"]);
    // other ways in are not concerned
    assert_replies(
        "node port",
        &ask(
            outside,
            pair.node_ports(0, crate::pair::NODE_PORT)[0],
            Mode::Http,
            64,
        ),
        &BOTH,
    );
    // a family without ranges is open
    assert_replies("IPv6", &ask(outside, at(BALANCER[1], 80), Mode::Http, 64), &BOTH);
    with_ranges(&["198.51.100.0/24", "192.0.2.0/24"]);
    wait_replies(outside, target, Mode::Http, &BOTH);
    // two halves are everything
    with_ranges(&["0.0.0.0/1", "128.0.0.0/1"]);
    wait_replies(outside, target, Mode::Http, &BOTH);
    with_ranges(&["255.255.255.255/32"]);
    wait_fails(outside, target, Mode::Http, &["connect: TimedOut"]);
    with_ranges(&[]);
    wait_replies(outside, target, Mode::Http, &BOTH);
}

#[test]
fn a_port_that_the_service_does_not_have_is_refused() {
    let pair = Pair::new();
    let range = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16"]},
    });
    pair.objects.put("ranges", &[range]).unwrap();
    route(&pair, &[V4], 0);
    for (_, place) in pair.everywhere() {
        for (target, mode) in [(at(V4, 81), Mode::Http), (at(V4, 80), Mode::UdpConnected)] {
            wait_fails(place, target, mode, &REFUSED);
        }
    }
}

#[test]
fn the_world_reaches_a_cluster_address_that_is_routed_to_a_node() {
    let pair = Pair::new();
    route(&pair, &[V4], 0);
    assert_replies(
        "ClusterIP",
        &ask(pair.outside.place(), at(V4, 80), Mode::Http, 64),
        &BOTH,
    );
    // but internal policy Local holds for it, too
    pair.put(json!({"spec": {"internalTrafficPolicy": "Local"}}), &[true, true]);
    wait_replies(pair.outside.place(), at(V4, 80), Mode::Http, &["web-1"]);
}

#[test]
fn internal_policy_local_uses_the_nodes_own_pods() {
    let pair = Pair::with(json!({"spec": {"internalTrafficPolicy": "Local"}}), |o| o);
    for (node, pod) in [(0, "web-1"), (1, "web-2")] {
        for place in [pair.clients[node].place(), pair.nodes[node].host()] {
            assert_replies(pod, &ask(place, at(V4, 80), Mode::Http, 32), &[pod]);
        }
    }
    pair.put(
        json!({"spec": {"internalTrafficPolicy": "Local"}}),
        &[true, false],
    );
    wait_fails(
        pair.clients[1].place(),
        at(V4, 80),
        Mode::Http,
        &["connect: ECONNREFUSED"],
    );
    assert_replies(
        "the other node",
        &ask(pair.clients[0].place(), at(V4, 80), Mode::Http, 8),
        &["web-1"],
    );
}
