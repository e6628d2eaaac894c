//! Datagram flows that never pause follow their service: no backend that is gone keeps them.
//!
//! The cases are those in which connection tracking of a kube-proxy went stale (spec kube-proxy 2.7 and 7.3).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};

use beeline_tests::client::{Mode, Question};
use beeline_tests::{Load, Place};
use serde_json::json;

use crate::pair::{BOTH, NODE_PORT_UDP, Pair, V4, V6, wait_replies};

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
    pair.put(json!({}), &[true, false]);
    wait_replies(place, target, Mode::Udp, &BOTH[..1]);
    let load = sender(place, target, mode);
    pair.put(json!({}), &[false, true]);
    wait_replies(place, target, Mode::Udp, &BOTH[1..]);
    // a second of its own, as promised
    std::thread::sleep(std::time::Duration::from_millis(1000));
    let moved = load.stop().unwrap();
    assert!(
        moved.replies.contains_key(BOTH[0]),
        "{target} {mode:?}: {moved:?}"
    );
    let second = moved.replies.get(BOTH[1]).copied().unwrap_or_default();
    assert!(second >= 10, "{target} {mode:?}: {moved:?}");
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
    std::thread::sleep(std::time::Duration::from_millis(500));
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
    std::thread::sleep(std::time::Duration::from_millis(500));
    let report = held.stop().unwrap();
    assert_eq!((report.failed, report.replies.len()), (0, 1), "{report:?}");
    assert!(report.replies.contains_key(BOTH[0]), "{report:?}");
}
