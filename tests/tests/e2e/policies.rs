//! Who may use which backends, and whose address these see: the packet-flow tables of kube-proxy's own tests.

use std::net::{IpAddr, SocketAddr};

use beeline_tests::client::Mode;
use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::objects::{endpoint, slice_of};
use beeline_tests::{Place, process};
use serde_json::{Value, json};

use crate::pair::{
    BOTH, NODE_PORT, NODE_PORT_UDP, Pair, REFUSED, SILENT, V4, V6, ask, assert_replies, merge, sources,
    wait_fails, wait_fails_within,
};

const EXTERNAL: [&str; 2] = ["203.0.113.250", "2001:db8:cb00::71fa"];
const BALANCER: [&str; 2] = ["203.0.113.10", "2001:db8:cb00::10"];

/// A Service that can be called in every way.
fn every_way(policies: &Value) -> Value {
    let ingress = BALANCER.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
    let mut patch = json!({
        "spec": {"type": "LoadBalancer", "externalIPs": EXTERNAL},
        "status": {"loadBalancer": {"ingress": ingress}},
    });
    merge(&mut patch, json!({"spec": policies}));
    patch
}

/// The ways to call it at the first node, by family: internal ones first.
fn ways(pair: &Pair, family: usize) -> [(&'static str, SocketAddr); 4] {
    let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 80);
    [
        ("ClusterIP", at([V4, V6][family])),
        ("external address", at(EXTERNAL[family])),
        ("load balancer", at(BALANCER[family])),
        ("node port", pair.node_ports(0, NODE_PORT)[family]),
    ]
}

/// What comes from outside goes to the first node.
fn route(pair: &Pair) {
    for ip in [V4, V6].into_iter().chain(EXTERNAL).chain(BALANCER) {
        let ip: IpAddr = ip.parse().unwrap();
        pair.cluster.route_to(ip, &pair.nodes[0]).unwrap();
    }
}

/// Sorted, each once.
fn set(names: &[&str]) -> Vec<String> {
    let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[track_caller]
fn check(what: &str, place: &Place, target: SocketAddr, pods: &[&str], addresses: &[&str]) {
    assert_replies(what, &ask(place, target, Mode::Http, 48), pods);
    let addresses = set(addresses);
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    assert_replies(what, &sources(place, target, Mode::Http, 48), &addresses);
}

/// One policy with all kinds of frontends and clients.
fn policies(pair: &Pair, policies: &Value, internal_local: bool, external_local: bool) {
    pair.put(every_way(policies), &[true, true]);
    for family in [0, 1] {
        let client = [pair.outside.v4().to_string(), pair.outside.v6().to_string()][family].clone();
        let node = pair.own_addresses(0)[family].clone();
        let pod = pair.clients[0].addresses()[family].to_string();
        for (way, target) in ways(pair, family) {
            let what = |who: &str| format!("{who} to {way} {target} with {policies}");
            let local = match way {
                "ClusterIP" => internal_local,
                _ => external_local,
            };
            let pods = if local { &BOTH[..1] } else { &BOTH[..] };
            // a backend of this node answers this way anyhow, one elsewhere would not
            let seen = if local {
                vec![client.as_str()]
            } else {
                vec![client.as_str(), node.as_str()]
            };
            check(&what("outside"), pair.outside.place(), target, pods, &seen);
            // from the node and its pods the external policy does not count, and the client keeps its address
            let pods = if way == "ClusterIP" && internal_local {
                &BOTH[..1]
            } else {
                &BOTH[..]
            };
            check(&what("a pod"), pair.clients[0].place(), target, pods, &[&pod]);
            check(&what("the node"), pair.nodes[0].host(), target, pods, &[&node]);
        }
    }
}

#[test]
fn policies_choose_backends_and_addresses_for_every_kind_of_frontend_and_client() {
    let pair = Pair::new();
    route(&pair);
    policies(&pair, &json!({}), false, false);
    policies(&pair, &json!({"internalTrafficPolicy": "Local"}), true, false);
    policies(&pair, &json!({"externalTrafficPolicy": "Local"}), false, true);
    let both = json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"});
    policies(&pair, &both, true, true);
}

#[test]
fn masquerade_all_is_for_those_too_who_need_none_by_their_address() {
    let pair = Pair::with(json!({}), |options| {
        // The host outside counts as a pod. Without the other flag a pod elsewhere would answer it itself.
        let mut options = options.flag("--cluster-cidr", "192.0.2.0/24,2001:db8::/64");
        options.flags.push("--masquerade-all".into());
        options
    });
    route(&pair);
    pair.put(every_way(&json!({})), &[true, true]);
    let client = [pair.outside.v4().to_string(), pair.outside.v6().to_string()];
    for family in [0, 1] {
        let node = pair.own_addresses(0)[family].clone();
        for (way, target) in ways(&pair, family) {
            let (client, node) = (client[family].as_str(), node.as_str());
            let seen = match way {
                "ClusterIP" => vec![node],
                _ => vec![client, node],
            };
            check(way, pair.outside.place(), target, &BOTH, &seen);
        }
    }
}

#[test]
fn pods_keep_their_address_on_the_way_to_a_cluster_address_of_both_nodes() {
    let pair = Pair::new();
    for client in &pair.clients {
        for (ip, own) in [V4, V6].into_iter().zip(client.addresses()) {
            let target = SocketAddr::new(ip.parse().unwrap(), 80);
            check("a pod", client.place(), target, &BOTH, &[&own.to_string()]);
        }
    }
}

#[test]
fn a_host_of_another_node_keeps_its_address_with_external_policy_local() {
    let local = json!({"spec": {"externalTrafficPolicy": "Local"}});
    let pair = Pair::with(local.clone(), |o| o);
    pair.put(local, &[true, false]);
    let own = pair.own_addresses(1);
    for (family, own) in own.iter().enumerate() {
        let host = pair.nodes[1].host();
        // the endpoint's node, and the client's own, which takes the short way: the same address in both cases
        for node in [0, 1] {
            let target = pair.node_ports(node, NODE_PORT)[family];
            check(&format!("node {node}"), host, target, &BOTH[..1], &[own]);
        }
        // what has neither endpoint nor client keeps silent
        let other = pair.node_ports(1, NODE_PORT)[family];
        for place in [pair.outside.place(), pair.clients[0].place()] {
            wait_fails(place, other, Mode::Http, &SILENT);
        }
    }
}

#[test]
fn without_endpoints_every_frontend_refuses() {
    let pair = Pair::new();
    route(&pair);
    pair.put(every_way(&json!({})), &[false, false]);
    for family in [0, 1] {
        for (_, target) in ways(&pair, family) {
            for (_, place) in pair.everywhere() {
                wait_fails_within(place, target, Mode::Http, &REFUSED, 2500);
            }
        }
    }
}

/// What answers at one node by each policy; none: nobody, and then either silence or a refusal.
struct Expected {
    cluster: Option<&'static str>,
    local: [Option<&'static str>; 2],
}

#[test]
fn terminating_endpoints_serve_by_each_policy_while_nothing_else_does() {
    let pair = Pair::new();
    let state = |ready: bool, serving: bool, terminating: bool| json!({"ready": ready, "serving": serving, "terminating": terminating});
    let ready = state(true, true, false);
    let terminating = state(false, true, true);
    let gone = state(false, false, true);
    let of = |cluster, local| Expected { cluster, local };
    let (one, two) = (Some(BOTH[0]), Some(BOTH[1]));
    let cases = [
        // what is ready goes first, but a node's own traffic has no ready one here
        (
            vec![(0, ready.clone()), (1, terminating.clone())],
            of(one, [one, two]),
        ),
        (vec![(0, terminating.clone()), (1, ready)], of(two, [one, two])),
        // nothing is ready
        (
            vec![(0, terminating.clone()), (1, gone.clone())],
            of(one, [one, None]),
        ),
        (vec![(0, gone.clone()), (1, terminating)], of(two, [None, two])),
        (vec![(0, gone.clone()), (1, gone)], of(None, [None, None])),
    ];
    for (endpoints, expected) in cases {
        for (internal, external) in [("Cluster", "Cluster"), ("Local", "Local")] {
            let patch =
                json!({"spec": {"internalTrafficPolicy": internal, "externalTrafficPolicy": external}});
            pair.put_with(patch, &endpoints);
            for node in [0, 1] {
                let wanted = if internal == "Local" {
                    expected.local[node]
                } else {
                    expected.cluster
                };
                for family in [0, 1] {
                    let cluster = SocketAddr::new([V4, V6][family].parse().unwrap(), 80);
                    let node_port = pair.node_ports(node, NODE_PORT)[family];
                    let node_place = pair.nodes[node].host();
                    for (place, target) in [
                        (pair.clients[node].place(), cluster),
                        (node_place, cluster),
                        (pair.outside.place(), node_port),
                    ] {
                        let what = format!("{target} with {internal}, {endpoints:?}");
                        match wanted {
                            Some(pod) => {
                                assert_replies(&what, &ask(place, target, Mode::Http, 16), &[pod]);
                            }
                            // dropped packets where there are endpoints elsewhere, a refusal otherwise; sockets cannot
                            // be kept waiting and are refused
                            None if target == cluster || expected.cluster.is_none() => {
                                wait_fails_within(place, target, Mode::Http, &REFUSED, 2500);
                            }
                            None => wait_fails(place, target, Mode::Http, &SILENT),
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn endpoints_that_are_published_unready_serve_and_others_do_not() {
    let pair = Pair::new();
    // as the controller writes them with publishNotReadyAddresses: ready, whatever else they are
    let states = |ready: bool| {
        [
            (0, json!({"ready": ready, "serving": false, "terminating": false})),
            (1, json!({"ready": ready, "serving": false, "terminating": true})),
        ]
    };
    let targets = |pair: &Pair| {
        let cluster = [V4, V6].map(|ip| SocketAddr::new(ip.parse().unwrap(), 80));
        let mut targets = cluster.to_vec();
        targets.extend(pair.node_ports(0, NODE_PORT));
        targets.extend(pair.node_ports(1, NODE_PORT));
        targets
    };
    for ready in [true, false, true] {
        pair.put_with(
            json!({"spec": {"publishNotReadyAddresses": ready}}),
            &states(ready),
        );
        for client in &pair.clients {
            for target in targets(&pair) {
                if ready {
                    let report = ask(client.place(), target, Mode::Http, 48);
                    assert_replies(&target.to_string(), &report, &BOTH);
                } else {
                    wait_fails_within(client.place(), target, Mode::Http, &REFUSED, 2500);
                }
            }
        }
    }
}

#[test]
fn endpoints_in_the_network_of_their_node_serve() {
    let pair = Pair::new();
    let names = ["host-1", "host-2"];
    let _servers: Vec<_> = pair
        .nodes
        .iter()
        .zip(names)
        .map(|(node, name)| {
            let log = node.state().join("echo.log");
            process::echo(node.host(), name, ECHO_PORT, &log).unwrap()
        })
        .collect();
    let slice = |short: &str, family: &str, index: usize| {
        let endpoints: Vec<Value> = pair
            .nodes
            .iter()
            .enumerate()
            .map(|(i, node)| {
                let mut endpoint = endpoint(&pair.own_addresses(i)[index]);
                endpoint["nodeName"] = node.name().into();
                endpoint
            })
            .collect();
        slice_of("web", short, family, &endpoints)
    };
    let put = |policy: &str| {
        let service = Pair::service(json!({"spec": {"internalTrafficPolicy": policy}}));
        pair.put_objects("web", &[service, slice("v4", "IPv4", 0), slice("v6", "IPv6", 1)]);
    };
    put("Cluster");
    for (who, place) in pair.everywhere() {
        for family in [0, 1] {
            let at = |port| SocketAddr::new([V4, V6][family].parse().unwrap(), port);
            let mut targets = vec![
                (pair.node_ports(0, NODE_PORT)[family], Mode::Http),
                (pair.node_ports(1, NODE_PORT)[family], Mode::Http),
                (pair.node_ports(0, NODE_PORT_UDP)[family], Mode::Udp),
            ];
            if who != "outside" {
                targets.extend([(at(80), Mode::Http), (at(53), Mode::Udp)]);
            }
            for (target, mode) in targets {
                let what = format!("{who} to {target} {mode:?}");
                assert_replies(&what, &ask(place, target, mode, 48), &names);
            }
        }
    }
    put("Local");
    for (node, name) in names.iter().enumerate() {
        for place in [pair.clients[node].place(), pair.nodes[node].host()] {
            for ip in [V4, V6] {
                let target = SocketAddr::new(ip.parse().unwrap(), 80);
                assert_replies("Local", &ask(place, target, Mode::Http, 32), &[name]);
            }
        }
    }
}

#[test]
fn hints_keep_traffic_in_its_zone_and_on_its_node() {
    let pair = Pair::new();
    let label = |zones: [&str; 2]| {
        let nodes: Vec<Value> = pair
            .nodes
            .iter()
            .zip(zones)
            .map(|(node, zone)| {
                let mut object = crate::pair::node_object(node);
                object["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": zone});
                object
            })
            .collect();
        pair.put_objects("nodes", &nodes);
    };
    let put = |distribution: &str, hints: [Value; 2]| {
        let slice = |short: &str, family: &str, index: usize| {
            let endpoints: Vec<Value> = (0..2)
                .map(|i| {
                    let mut endpoint = endpoint(&pair.servers[i].addresses()[index].to_string());
                    endpoint["nodeName"] = pair.nodes[i].name().into();
                    endpoint["hints"] = hints[i].clone();
                    endpoint
                })
                .collect();
            slice_of("web", short, family, &endpoints)
        };
        let service = Pair::service(json!({"spec": {"trafficDistribution": distribution}}));
        pair.put_objects("web", &[service, slice("v4", "IPv4", 0), slice("v6", "IPv6", 1)]);
    };
    let check = |what: &str, wanted: [&[&str]; 2]| {
        for (node, wanted) in wanted.into_iter().enumerate() {
            for place in [pair.clients[node].place(), pair.nodes[node].host()] {
                for ip in [V4, V6] {
                    let target = SocketAddr::new(ip.parse().unwrap(), 80);
                    assert_replies(what, &ask(place, target, Mode::Http, 48), wanted);
                }
            }
        }
    };
    let zone = |zone: &str| json!({"forZones": [{"name": zone}]});
    let (one, two, both) = (&BOTH[..1], &BOTH[1..], &BOTH[..]);
    label(["a", "b"]);
    put("PreferSameZone", [zone("a"), zone("b")]);
    check("each in its zone", [one, two]);
    put("PreferSameZone", [zone("b"), zone("a")]);
    check("wherever the hints say", [two, one]);
    // a zone without endpoints uses all, and so does everybody if one endpoint has no hint
    put("PreferClose", [zone("a"), zone("a")]);
    check("the zone without endpoints", [both, both]);
    put("PreferClose", [zone("a"), json!({})]);
    check("an endpoint without a hint", [both, both]);
    // the node first, then the zone, then all
    let node = |i: usize, zone: &str| json!({"forZones": [{"name": zone}], "forNodes": [{"name": pair.nodes[i].name()}]});
    put("PreferSameNode", [node(0, "a"), node(1, "b")]);
    check("each on its node", [one, two]);
    label(["a", "a"]);
    put("PreferSameNode", [node(0, "a"), node(0, "a")]);
    check("none on the second node: its zone", [both, both]);
    // the zone of a node that moves
    put("PreferSameZone", [zone("a"), zone("b")]);
    check("both nodes in one zone", [one, one]);
    label(["b", "a"]);
    check("nodes that changed zones", [two, one]);
}
