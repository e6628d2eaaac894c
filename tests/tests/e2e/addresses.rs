//! External and load-balancer addresses, source ranges, unknown ports and addresses.

use std::net::{IpAddr, SocketAddr};

use beeline_tests::client::Mode;
use serde_json::json;

use crate::pair::{
    BOTH, Pair, REFUSED, UNREACHABLE, V4, ask, assert_fails, assert_replies, impatient, node_object, sources,
    wait_fails, wait_replies,
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
fn source_ranges_hold_for_pods_and_nodes_too() {
    let pair = Pair::with(balancer(), |o| o);
    let mut patch = balancer();
    let near = &pair.clients[0];
    // one pod and its node
    let ranges: Vec<String> = near
        .addresses()
        .into_iter()
        .chain([IpAddr::from(pair.nodes[0].v4()), pair.nodes[0].v6().into()])
        .map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
        .collect();
    patch["spec"]["loadBalancerSourceRanges"] = json!(ranges);
    pair.put(patch.clone(), &[true, true]);
    let denied = [&REFUSED[..], &UNREACHABLE[..]].concat();
    for ip in BALANCER {
        for place in [near.place(), pair.nodes[0].host()] {
            wait_replies(place, at(ip, 80), Mode::Http, &BOTH);
        }
        for place in [pair.clients[1].place(), pair.nodes[1].host()] {
            wait_fails(place, at(ip, 80), Mode::Http, &denied);
            // other ways in are not concerned
            assert_replies("ClusterIP", &ask(place, at(V4, 80), Mode::Http, 48), &BOTH);
        }
    }
    // a node that has the address itself
    let node = pair.nodes[0].host();
    for (ip, length) in BALANCER.into_iter().zip([32, 128]) {
        node.netns()
            .ip_batch(&[format!("addr add {ip}/{length} dev lo")])
            .unwrap();
        wait_replies(node, at(ip, 80), Mode::Http, &BOTH);
    }
    patch["spec"]["loadBalancerSourceRanges"] = json!(["198.51.100.0/24", "2001:db8:ffff::/48"]);
    pair.put(patch, &[true, true]);
    for ip in BALANCER {
        for (who, place) in pair.everywhere() {
            if who == "outside" {
                continue;
            }
            wait_fails(place, at(ip, 80), Mode::Http, &denied);
        }
    }
}

#[test]
fn external_and_load_balancer_addresses_change_while_the_agent_runs() {
    let pair = Pair::new();
    let places = [pair.outside.place(), pair.clients[1].place()];
    let (first, second) = (
        ["203.0.113.1", "2001:db8:cb00::1"],
        ["203.0.113.2", "2001:db8:cb00::2"],
    );
    route(&pair, &first, 0);
    route(&pair, &second, 0);
    let external = |ips: [&str; 2]| json!({"spec": {"externalIPs": ips}});
    let balancer = |ips: [&str; 2]| {
        let ingress = ips.map(|ip| json!({"ip": ip}));
        json!({"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": ingress}}})
    };
    for (patch, served, gone) in [
        (external(first), Some(first), second),
        (external(second), Some(second), first),
        (balancer(first), Some(first), second),
        (balancer(second), Some(second), first),
        (json!({}), None, second),
    ] {
        pair.put(patch, &[true, true]);
        for place in places {
            for ip in served.into_iter().flatten() {
                assert_replies(ip, &ask(place, at(ip, 80), Mode::Http, 48), &BOTH);
            }
            for ip in gone {
                wait_fails(place, at(ip, 80), Mode::Http, &UNREACHABLE);
            }
        }
    }
}

#[test]
fn node_ports_follow_the_addresses_of_the_node_while_the_agent_runs() {
    let pair = Pair::with(json!({}), |options| {
        options.flag(
            "--nodeport-addresses",
            "172.31.0.0/16,198.51.100.0/24,fd00:172:31::/48,2001:db8:ff::/64",
        )
    });
    let node = pair.nodes[0].host();
    let outside = pair.outside.place();
    let new = [("198.51.100.7", 32), ("2001:db8:ff::7", 128)];
    route(&pair, &new.map(|(ip, _)| ip), 0);
    for _ in 0..2 {
        for (ip, length) in new {
            let target = at(ip, crate::pair::NODE_PORT);
            wait_fails(
                outside,
                target,
                Mode::Http,
                &[&REFUSED[..], &UNREACHABLE[..]].concat(),
            );
            node.netns()
                .ip_batch(&[format!("addr add {ip}/{length} dev up0")])
                .unwrap();
            wait_replies(outside, target, Mode::Http, &BOTH);
            wait_replies(node, target, Mode::Http, &BOTH);
            node.netns()
                .ip_batch(&[format!("addr del {ip}/{length} dev up0")])
                .unwrap();
            wait_fails(node, target, Mode::Http, &UNREACHABLE);
        }
    }
}

#[test]
fn node_ports_follow_what_the_node_object_says() {
    let pair = Pair::new();
    let outside = pair.outside.place();
    let [old, _] = pair.node_ports(0, crate::pair::NODE_PORT);
    let new = at("198.51.100.7", crate::pair::NODE_PORT);
    route(&pair, &["198.51.100.7"], 0);
    pair.nodes[0]
        .host()
        .netns()
        .ip_batch(&["addr add 198.51.100.7/32 dev up0".to_owned()])
        .unwrap();
    assert_replies("before", &ask(outside, old, Mode::Http, 48), &BOTH);
    assert_fails(
        "not the node's",
        &ask(outside, new, impatient(Mode::Http), 2),
        &REFUSED,
    );
    let objects: Vec<_> = pair
        .nodes
        .iter()
        .map(|node| {
            let mut object = node_object(node);
            if node.name() == pair.nodes[0].name() {
                object["status"]["addresses"][0]["address"] = "198.51.100.7".into();
            }
            object
        })
        .collect();
    pair.put_objects("nodes", &objects);
    wait_replies(outside, new, Mode::Http, &BOTH);
    wait_fails(outside, old, Mode::Http, &REFUSED);
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
