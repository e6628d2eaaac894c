//! Ports and types of Services, as they come, go and change.

use std::net::SocketAddr;

use beeline_tests::client::Mode;
use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::process;
use serde_json::{Value, json};

use crate::pair::{
    BOTH, NODE_PORT, NODE_PORT_UDP, Pair, REFUSED, SILENT, UNREACHABLE, V4, V6, ask, assert_fails,
    assert_replies, slices, wait_fails,
};

/// The service's addresses with a port.
pub(crate) fn cluster_ips(port: u16) -> [SocketAddr; 2] {
    [V4, V6].map(|ip| SocketAddr::new(ip.parse().unwrap(), port))
}

fn tcp(name: &str, port: u16) -> Value {
    json!({"name": name, "protocol": "TCP", "port": port})
}

/// Asks the ClusterIPs and node ports from everywhere that can, and expects these to answer.
#[track_caller]
fn served(pair: &Pair, port: u16, node_port: u16, wanted: &[&str]) {
    for (who, place) in pair.everywhere() {
        let mut targets = pair.node_ports(1, node_port).to_vec();
        if who != "outside" {
            targets.extend(cluster_ips(port));
        }
        for target in targets {
            let what = format!("{who} to {target}");
            assert_replies(&what, &ask(place, target, Mode::Http, 48), wanted);
        }
    }
}

#[test]
fn each_named_port_leads_to_its_own_pods() {
    let pair = Pair::new();
    let mut first = tcp("first", 80);
    first["nodePort"] = NODE_PORT.into();
    let mut second = tcp("second", 81);
    second["nodePort"] = 30081.into();
    let service = Pair::service(json!({"spec": {"ports": [first, second]}}));
    let slice = |suffix: &str, port: &str, pod: usize| {
        slices(
            "web",
            suffix,
            &json!([tcp(port, ECHO_PORT)]),
            &[&pair.servers[pod]],
        )
    };
    // different pods behind different ports
    let mut objects = vec![service];
    objects.extend(slice("a", "first", 0));
    objects.extend(slice("b", "second", 1));
    pair.put_objects("web", &objects);
    served(&pair, 80, NODE_PORT, &["web-1"]);
    served(&pair, 81, 30081, &["web-2"]);
    // one pod behind both, by a slice for each
    objects.truncate(3);
    objects.extend(slice("b", "second", 0));
    pair.put_objects("web", &objects);
    served(&pair, 80, NODE_PORT, &["web-1"]);
    served(&pair, 81, 30081, &["web-1"]);
}

#[test]
fn a_named_port_may_have_another_number_on_each_pod() {
    let pair = Pair::new();
    let pod = &pair.servers[1];
    let log = pair.nodes[1].state().join("second.log");
    let _second = process::echo(pod.place(), "second", 9090, &log).unwrap();
    let mut port = tcp("web", 80);
    port["nodePort"] = NODE_PORT.into();
    let mut objects = vec![Pair::service(json!({"spec": {"ports": [port]}}))];
    objects.extend(slices(
        "web",
        "a",
        &json!([tcp("web", ECHO_PORT)]),
        &[&pair.servers[0]],
    ));
    objects.extend(slices("web", "b", &json!([tcp("web", 9090)]), &[pod]));
    pair.put_objects("web", &objects);
    served(&pair, 80, NODE_PORT, &["second", "web-1"]);
}

#[test]
fn ports_are_added_and_removed_while_others_are_served() {
    let pair = Pair::new();
    let client = pair.clients[0].place();
    let put = |ports: &[(&str, u16)]| {
        let of_service: Vec<Value> = ports.iter().map(|(name, port)| tcp(name, *port)).collect();
        let of_slice: Vec<Value> = ports.iter().map(|(name, _)| tcp(name, ECHO_PORT)).collect();
        let mut objects = vec![Pair::service(
            json!({"spec": {"type": "ClusterIP", "ports": of_service}}),
        )];
        let pods: Vec<_> = pair.servers.iter().collect();
        objects.extend(slices("web", "a", &json!(of_slice), &pods));
        pair.put_objects("web", &objects);
    };
    let all = [("one", 80), ("two", 81), ("three", 82)];
    for served in [&all[..1], &all[..], &all[1..], &all[2..]] {
        put(served);
        for (name, port) in all {
            for target in cluster_ips(port) {
                let what = format!("{name} at {target} of {served:?}");
                if served.contains(&(name, port)) {
                    assert_replies(&what, &ask(client, target, Mode::Http, 48), &BOTH);
                } else {
                    // its address is not known to be a service's here
                    assert_fails(&what, &ask(client, target, Mode::Http, 2), &UNREACHABLE);
                }
            }
        }
    }
}

#[test]
fn a_service_turns_into_a_name_and_back() {
    let pair = Pair::new();
    let outside = pair.outside.place();
    let client = pair.clients[1].place();
    let name = json!({"spec": {
        "type": "ExternalName", "externalName": "example.com", "clusterIP": null, "clusterIPs": null,
        "ipFamilies": null, "ipFamilyPolicy": null,
        "ports": [{"name": "web", "protocol": "TCP", "port": 80}],
    }});
    pair.put(name, &[true, true]);
    for target in cluster_ips(80) {
        wait_fails(client, target, Mode::Http, &UNREACHABLE);
    }
    for target in pair.node_ports(0, NODE_PORT) {
        wait_fails(outside, target, Mode::Http, &REFUSED);
    }
    // to a ClusterIP, and to a node port
    let ports = json!([{"name": "web", "protocol": "TCP", "port": 80}]);
    pair.put(
        json!({"spec": {"type": "ClusterIP", "ports": ports}}),
        &[true, true],
    );
    for target in cluster_ips(80) {
        assert_replies("ClusterIP", &ask(client, target, Mode::Http, 48), &BOTH);
    }
    pair.put(json!({}), &[true, true]);
    served(&pair, 80, NODE_PORT, &BOTH);
}

#[test]
fn type_and_ports_change_and_pods_go_and_come() {
    const BALANCER: &str = "203.0.113.10";
    let pair = Pair::new();
    pair.cluster
        .route_to(BALANCER.parse().unwrap(), &pair.nodes[1])
        .unwrap();
    let outside = pair.outside.place();
    for (mode, quick, name, protocol, port) in [
        (Mode::Http, Mode::Http, "web", "TCP", 80),
        (Mode::Udp, Mode::UdpConnected, "dns", "UDP", 53),
    ] {
        let cluster = SocketAddr::new(V4.parse().unwrap(), port);
        let at = |port: u16| pair.node_ports(0, port)[0];
        let balancer = |port: u16| SocketAddr::new(BALANCER.parse().unwrap(), port);
        let put = |kind: &str, port: u16, node_port: Option<u16>, ready: [bool; 2]| {
            let mut entry = json!({"name": name, "protocol": protocol, "port": port});
            if let Some(node_port) = node_port {
                entry["nodePort"] = node_port.into();
            }
            let mut patch = json!({"spec": {"type": kind, "ports": [entry]}});
            if kind == "LoadBalancer" {
                patch["status"] = json!({"loadBalancer": {"ingress": [{"ip": BALANCER, "ipMode": "VIP"}]}});
            }
            pair.put(patch, &ready);
        };
        let works = |what: &str, target| assert_replies(what, &ask(outside, target, mode, 48), &BOTH);
        let inside = |target| {
            let report = ask(pair.clients[0].place(), target, mode, 48);
            assert_replies("inside", &report, &BOTH);
        };
        let ready = [true, true];
        put("ClusterIP", port, None, ready);
        inside(cluster);
        wait_fails(outside, at(NODE_PORT), quick, &REFUSED);
        put("NodePort", port, Some(NODE_PORT), ready);
        works("a node port", at(NODE_PORT));
        put("NodePort", port, Some(30_090), ready);
        works("another node port", at(30_090));
        wait_fails(outside, at(NODE_PORT), quick, &REFUSED);
        put("LoadBalancer", port, Some(30_090), ready);
        works("a balancer", balancer(port));
        works("its node port", at(30_090));
        put("LoadBalancer", port + 1000, Some(30_091), ready);
        works("a changed port", balancer(port + 1000));
        works("a changed node port", at(30_091));
        inside(SocketAddr::new(cluster.ip(), port + 1000));
        wait_fails(outside, at(30_090), quick, &REFUSED);
        // without a node port
        put("LoadBalancer", port, None, ready);
        works("a balancer alone", balancer(port));
        wait_fails(outside, at(30_091), quick, &REFUSED);
        // no pods, and pods again
        put("LoadBalancer", port, Some(30_090), [false, false]);
        wait_fails(outside, balancer(port), quick, &REFUSED);
        wait_fails(outside, at(30_090), quick, &REFUSED);
        put("LoadBalancer", port, Some(30_090), ready);
        works("pods again", balancer(port));
        inside(cluster);
        // back to where it began
        put("ClusterIP", port, None, ready);
        inside(cluster);
        let gone = [
            &["recv: EHOSTUNREACH", "recv: ENETUNREACH"],
            &SILENT[..],
            &UNREACHABLE[..],
        ]
        .concat();
        wait_fails(outside, balancer(port), quick, &gone);
        wait_fails(outside, at(30_090), quick, &REFUSED);
    }
}

#[test]
fn a_deleted_service_releases_its_node_ports() {
    let pair = Pair::new();
    served(&pair, 80, NODE_PORT, &BOTH);
    pair.remove("web");
    for (_, place) in pair.everywhere() {
        for target in pair.node_ports(0, NODE_PORT) {
            wait_fails(place, target, Mode::Http, &REFUSED);
        }
        for target in pair.node_ports(0, NODE_PORT_UDP) {
            wait_fails(place, target, Mode::UdpConnected, &REFUSED);
        }
    }
    // a process of the node may have the port now
    let log = pair.nodes[0].state().join("own.log");
    let own = process::echo(pair.nodes[0].host(), "own", NODE_PORT, &log).unwrap();
    for target in pair.node_ports(0, NODE_PORT) {
        let report = ask(pair.outside.place(), target, Mode::Http, 4);
        assert_replies("a process of the node", &report, &["own"]);
    }
    drop(own);
    // and another service
    let mut other = Pair::service(json!({"metadata": {"name": "other"}}));
    other["spec"]["clusterIP"] = "10.96.0.21".into();
    other["spec"]["clusterIPs"] = json!(["10.96.0.21", "fd00:10:96::15"]);
    let ports = json!([tcp("web", ECHO_PORT)]);
    let mut objects = vec![other];
    objects.extend(slices("other", "a", &ports, &[&pair.servers[1]]));
    pair.put_objects("other", &objects);
    for target in pair.node_ports(0, NODE_PORT) {
        let report = ask(pair.outside.place(), target, Mode::Http, 8);
        assert_replies("another service", &report, &["web-2"]);
    }
}

#[test]
fn a_protocol_without_a_module_is_no_reason_to_load_one() {
    let loaded = || {
        let modules = std::fs::read_to_string("/proc/modules").unwrap_or_default();
        modules.lines().any(|line| line.starts_with("sctp "))
    };
    if loaded() {
        eprintln!("sctp is loaded: that nobody loads it cannot be seen here");
    }
    let before = loaded();
    let pair = Pair::new();
    let sctp = json!({"name": "sctp", "protocol": "SCTP", "port": 80, "nodePort": NODE_PORT});
    let mut web = tcp("web", 80);
    web["nodePort"] = NODE_PORT.into();
    let mut objects = vec![Pair::service(json!({"spec": {"ports": [sctp, web]}}))];
    let ports = json!([tcp("web", ECHO_PORT), {"name": "sctp", "protocol": "SCTP", "port": 9999}]);
    objects.extend(slices(
        "web",
        "a",
        &ports,
        &pair.servers.iter().collect::<Vec<_>>(),
    ));
    pair.put_objects("web", &objects);
    // the same numbers on another protocol are another port
    served(&pair, 80, NODE_PORT, &BOTH);
    let list = beeline_tests::agent::beeline_json(&pair.nodes[0], &["service", "list"]).unwrap();
    let services = list["services"].as_array().unwrap();
    let known = services.iter().filter(|service| service["protocol"] == "SCTP");
    assert_eq!(known.count(), 2, "{list}");
    assert_eq!(loaded(), before);
}
