//! Session affinity by client address.

use std::time::Duration;

use beeline_tests::client::Mode;
use serde_json::json;

use crate::pair::{BOTH, NODE_PORT, Pair, V4, ask, assert_replies, wait_replies};

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
    let outside = pair.outside.place();
    let [target, _] = pair.node_ports(0, NODE_PORT);
    let first = ask(outside, target, Mode::Http, 10);
    let pod = first.replies.keys().next().unwrap().clone();
    let other = BOTH.into_iter().find(|name| *name != pod).unwrap();
    let ready = BOTH.map(|name| name == other);
    pair.put(sticky(TIMEOUT), &ready);
    wait_replies(outside, target, Mode::Http, &[other]);
    pair.put(sticky(TIMEOUT), &[true, true]);
    // within the timeout of the last connection it stays
    assert_replies("still", &ask(outside, target, Mode::Http, 10), &[other]);
    // a chance of 2^-12 that it never moves
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..12 {
        std::thread::sleep(Duration::from_millis(u64::from(TIMEOUT) * 1000 + 100));
        seen.extend(ask(outside, target, Mode::Http, 1).replies.into_keys());
        if seen.len() == 2 {
            return;
        }
    }
    panic!("never moved after the timeout: {seen:?}");
}
