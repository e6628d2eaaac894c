//! Session affinity by client address.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use beeline_tests::client::Mode;
use beeline_tests::objects::{endpoint, slice_of};
use serde_json::json;

use crate::pair::{BOTH, NODE_PORT, Pair, V4, V6, ask, assert_replies, merge};

/// Seconds: longer than a loaded machine needs from one connection to the next.
const TIMEOUT: u32 = 4;

fn sticky(seconds: u32) -> serde_json::Value {
    json!({"spec": {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}})
}

#[test]
fn a_client_stays_with_its_backend_and_may_be_set_free() {
    let pair = Pair::with(sticky(10_800), |o| o);
    let cluster = format!("{V4}:80").parse().unwrap();
    let [node_port, node_port6] = pair.node_ports(0, NODE_PORT);
    for (who, place) in pair.everywhere() {
        for target in [cluster, node_port, node_port6] {
            if who == "outside" && target == cluster {
                continue;
            }
            let report = ask(place, target, Mode::Http, 30);
            assert_eq!(
                (report.failed, report.replies.len()),
                (0, 1),
                "{who} to {target}: {report:?}"
            );
        }
    }
    pair.put(json!({}), &[true, true]);
    for (who, place) in pair.everywhere() {
        assert_replies(who, &ask(place, node_port, Mode::Http, 64), &BOTH);
    }
    pair.put(sticky(10_800), &[true, true]);
    for (who, place) in pair.everywhere() {
        let report = ask(place, node_port, Mode::Http, 30);
        assert_eq!((report.failed, report.replies.len()), (0, 1), "{who}: {report:?}");
    }
}

#[test]
fn a_client_moves_when_its_backend_goes_and_after_the_timeout() {
    let pair = Pair::with(sticky(TIMEOUT), |o| o);
    // through packets, and through sockets
    let ways = [
        (pair.outside.place(), pair.node_ports(0, NODE_PORT)[0]),
        (pair.clients[0].place(), format!("[{V6}]:80").parse().unwrap()),
    ];
    for (place, target) in ways {
        let first = ask(place, target, Mode::Http, 10);
        let pod = first.replies.keys().next().unwrap().clone();
        let other = BOTH.into_iter().find(|name| *name != pod).unwrap();
        let ready = BOTH.map(|name| name == other);
        pair.put(sticky(TIMEOUT), &ready);
        assert_replies("the other", &ask(place, target, Mode::Http, 10), &[other]);
        pair.put(sticky(TIMEOUT), &[true, true]);
        // within the timeout of the last connection it stays
        assert_replies("still", &ask(place, target, Mode::Http, 10), &[other]);
    }
    // a chance of 2^-11 for each that it never moves
    let mut seen = [BTreeSet::new(), BTreeSet::new()];
    for _ in 0..12 {
        std::thread::sleep(Duration::from_millis(u64::from(TIMEOUT) * 1000 + 100));
        for ((place, target), seen) in ways.into_iter().zip(&mut seen) {
            seen.extend(ask(place, target, Mode::Http, 1).replies.into_keys());
        }
        if seen.iter().all(|seen| seen.len() == 2) {
            return;
        }
    }
    panic!("never moved after the timeout: {seen:?}");
}

#[test]
fn a_client_of_a_load_balancer_stays_with_its_backend_by_every_policy() {
    let pair = Pair::new();
    let balancer: SocketAddr = "203.0.113.10:80".parse().unwrap();
    pair.cluster.route_to(balancer.ip(), &pair.nodes[0]).unwrap();
    let outside = pair.outside.place();
    // policy Local leaves one backend to choose on a node: a second one here
    let second = pair.nodes[0].add_echo_pod("web-3").unwrap();
    let put = |policy: &str, sticky_too: bool| {
        let mut patch = json!({
            "spec": {"type": "LoadBalancer", "externalTrafficPolicy": policy},
            "status": {"loadBalancer": {"ingress": [{"ip": balancer.ip()}]}},
        });
        if sticky_too {
            merge(&mut patch, sticky(10_800));
        }
        let endpoints: Vec<_> = [(&pair.servers[0], 0), (&pair.servers[1], 1), (&second, 0)]
            .iter()
            .map(|(pod, node)| {
                let mut object = endpoint(&pod.v4().to_string());
                object["nodeName"] = pair.nodes[*node].name().into();
                object
            })
            .collect();
        pair.put_objects(
            "web",
            &[Pair::service(patch), slice_of("web", "v4", "IPv4", &endpoints)],
        );
    };
    for (policy, all) in [
        ("Cluster", &["web-1", "web-2", "web-3"][..]),
        ("Local", &["web-1", "web-3"][..]),
    ] {
        for _ in 0..2 {
            put(policy, true);
            let report = ask(outside, balancer, Mode::Http, 30);
            assert_eq!(
                (report.failed, report.replies.len()),
                (0, 1),
                "{policy}: {report:?}"
            );
            put(policy, false);
            assert_replies(policy, &ask(outside, balancer, Mode::Http, 96), all);
        }
    }
}
