//! Datagram flows that never pause follow their service: no backend that is gone keeps them.
//!
//! The cases are those in which connection tracking of a kube-proxy went stale (spec kube-proxy 2.7 and 7.3).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use beeline_tests::client::{Mode, Question};
use beeline_tests::objects::{endpoint, slice_of};
use beeline_tests::{Load, Place, Pod, process};
use serde_json::json;

use crate::pair::{BOTH, NODE_PORT_UDP, Pair, V4, V6, slices, wait_replies};

/// A client that asks from one port, again and again. No other has used the port: its flow would be found.
fn sender(place: &Place, target: SocketAddr, mode: Mode) -> Load {
    static PORT: AtomicU16 = AtomicU16::new(12_000);
    let question = Question {
        source_port: PORT.fetch_add(1, Ordering::Relaxed),
        timeout_ms: 200,
        ..mode.into()
    };
    Load::start(place, target, question, 50, 1).unwrap()
}

/// Moves the service from its first pod to its second under a steady sender, and expects the sender to be served by the
/// second to the end.
#[track_caller]
fn follows(pair: &Pair, place: &Place, target: SocketAddr, mode: Mode) {
    let put = |ready: [bool; 2]| pair.put(json!({}), &ready);
    follows_change(
        place,
        target,
        mode,
        BOTH,
        || put([true, false]),
        || put([false, true]),
    );
}

/// The same for two states of a service and who answers in each.
#[track_caller]
fn follows_change(
    place: &Place,
    target: SocketAddr,
    mode: Mode,
    [first, second]: [&str; 2],
    before: impl FnOnce(),
    change: impl FnOnce(),
) {
    before();
    wait_replies(place, target, Mode::Udp, &[first]);
    let load = sender(place, target, mode);
    change();
    wait_replies(place, target, Mode::Udp, &[second]);
    // a second, as promised, and another to be seen in
    std::thread::sleep(Duration::from_secs(2));
    let moved = load.stop().unwrap();
    let answers = |name: &str| moved.replies.get(name).copied().unwrap_or_default();
    assert!(answers(first) > 0, "{target} {mode:?}: {moved:?}");
    assert!(answers(second) >= 10, "{target} {mode:?}: {moved:?}");
}

#[test]
fn node_port_flows_from_outside_follow() {
    let pair = Pair::new();
    for target in pair.node_ports(0, NODE_PORT_UDP) {
        for mode in [Mode::Udp, Mode::UdpStay, Mode::UdpHold] {
            follows(&pair, pair.outside.place(), target, mode);
        }
    }
}

#[test]
fn cluster_address_flows_of_pods_and_hosts_follow() {
    let pair = Pair::new();
    for place in [pair.clients[0].place(), pair.nodes[1].host()] {
        for ip in [V4.to_owned(), format!("[{V6}]")] {
            let target = format!("{ip}:53").parse().unwrap();
            for mode in [Mode::UdpStay, Mode::UdpHold] {
                follows(&pair, place, target, mode);
            }
        }
        follows(&pair, place, pair.node_ports(1, NODE_PORT_UDP)[0], Mode::UdpHold);
    }
}

#[test]
fn flows_to_a_load_balancer_follow() {
    let pair = Pair::new();
    let target: SocketAddr = "203.0.113.10:53".parse().unwrap();
    pair.cluster.route_to(target.ip(), &pair.nodes[0]).unwrap();
    let put = |ready: [bool; 2]| {
        let ingress = json!({"loadBalancer": {"ingress": [{"ip": target.ip()}]}});
        pair.put(
            json!({"spec": {"type": "LoadBalancer"}, "status": ingress}),
            &ready,
        );
    };
    for place in [pair.outside.place(), pair.clients[0].place()] {
        let (before, change) = (|| put([true, false]), || put([false, true]));
        follows_change(place, target, Mode::UdpStay, BOTH, before, change);
    }
}

#[test]
fn flows_follow_a_changed_target_port() {
    let pair = Pair::new();
    let pod = &pair.servers[0];
    let log = pair.nodes[0].state().join("renumbered.log");
    let _renumbered = process::echo(pod.place(), "renumbered", 9090, &log).unwrap();
    let put = |port: u16| {
        let ports = json!([{"name": "dns", "protocol": "UDP", "port": port}]);
        let mut objects = vec![Pair::service(json!({}))];
        objects.extend(slices("web", "a", &ports, &[pod]));
        pair.put_objects("web", &objects);
    };
    let names = ["web-1", "renumbered"];
    for (place, target) in [
        (pair.outside.place(), pair.node_ports(1, NODE_PORT_UDP)[0]),
        (pair.outside.place(), pair.node_ports(0, NODE_PORT_UDP)[1]),
        (pair.clients[1].place(), format!("{V4}:53").parse().unwrap()),
    ] {
        for mode in [Mode::UdpStay, Mode::UdpHold] {
            follows_change(place, target, mode, names, || put(8080), || put(9090));
        }
    }
}

#[test]
fn flows_to_a_nodes_own_pod_follow_when_it_is_made_again() {
    let pair = Pair::new();
    let again = pair.nodes[0].add_echo_pod("again").unwrap();
    let put = |pod: &Pod| {
        let slice = |short, family, index: usize| {
            let mut endpoint = endpoint(&pod.addresses()[index].to_string());
            endpoint["nodeName"] = pair.nodes[0].name().into();
            slice_of("web", short, family, &[endpoint])
        };
        let service = Pair::service(json!({"spec": {"internalTrafficPolicy": "Local"}}));
        pair.put_objects("web", &[service, slice("v4", "IPv4", 0), slice("v6", "IPv6", 1)]);
    };
    for place in [pair.clients[0].place(), pair.nodes[0].host()] {
        for ip in [V4.to_owned(), format!("[{V6}]")] {
            let target = format!("{ip}:53").parse().unwrap();
            let (before, change) = (|| put(&pair.servers[0]), || put(&again));
            follows_change(place, target, Mode::UdpStay, ["web-1", "again"], before, change);
        }
    }
}

#[test]
fn a_flow_that_began_before_there_was_an_endpoint_gets_through() {
    let pair = Pair::new();
    pair.put(json!({}), &[false, false]);
    let [target, _] = pair.node_ports(0, NODE_PORT_UDP);
    let cluster: SocketAddr = format!("{V4}:53").parse().unwrap();
    let question = Question {
        source_port: 12_345,
        timeout_ms: 100,
        ..Mode::UdpStay.into()
    };
    for (place, target) in [(pair.outside.place(), target), (pair.clients[0].place(), cluster)] {
        crate::pair::wait_fails(
            place,
            target,
            Mode::UdpConnected,
            &["connect: ECONNREFUSED", "recv: ECONNREFUSED"],
        );
        // its flow exists by now, if it ever will
        let refused = Load::ask(place, target, question, 20).unwrap();
        assert_eq!(refused.ok, 0, "{refused:?}");
    }
    pair.put(json!({}), &[true, false]);
    for (place, target) in [(pair.outside.place(), target), (pair.clients[0].place(), cluster)] {
        wait_replies(place, target, Mode::Udp, &BOTH[..1]);
        let served = Load::ask(place, target, question, 5).unwrap();
        assert_eq!(served.ok, 5, "{served:?}");
    }
}

#[test]
fn a_terminating_backend_keeps_the_flows_that_it_has() {
    let pair = Pair::new();
    pair.put(json!({}), &[true, false]);
    let [target, _] = pair.node_ports(0, NODE_PORT_UDP);
    wait_replies(pair.outside.place(), target, Mode::Udp, &BOTH[..1]);
    let load = sender(pair.outside.place(), target, Mode::UdpStay);
    let terminating = json!({"ready": false, "serving": true, "terminating": true});
    let ready = json!({"ready": true, "serving": true, "terminating": false});
    pair.put_with(json!({}), &[(0, terminating), (1, ready)]);
    wait_replies(pair.outside.place(), target, Mode::Udp, &BOTH[1..]);
    std::thread::sleep(Duration::from_millis(500));
    let report = load.stop().unwrap();
    assert_eq!((report.failed, report.replies.len()), (0, 1), "{report:?}");
}

#[test]
fn connections_to_a_backend_that_left_go_on_to_their_end() {
    let pair = Pair::new();
    pair.put(json!({}), &[true, false]);
    let [target, _] = pair.node_ports(1, crate::pair::NODE_PORT);
    wait_replies(pair.outside.place(), target, Mode::Http, &BOTH[..1]);
    let held = Load::start(pair.outside.place(), target, Mode::Hold, 100, 4).unwrap();
    pair.put(json!({}), &[false, true]);
    wait_replies(pair.outside.place(), target, Mode::Http, &BOTH[1..]);
    std::thread::sleep(Duration::from_millis(500));
    let report = held.stop().unwrap();
    assert_eq!((report.failed, report.replies.len()), (0, 1), "{report:?}");
    assert!(report.replies.contains_key(BOTH[0]), "{report:?}");
}
