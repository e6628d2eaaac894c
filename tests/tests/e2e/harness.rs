//! The harness itself: what every other test relies on.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use beeline_tests::client::{Mode, Question};
use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::{Cluster, Load, residue};

#[test]
fn pods_reach_each_other_and_nothing_is_left() {
    let cluster = Cluster::new().unwrap();
    let name = cluster.name().to_owned();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let server = nodes[0].add_echo_pod("server").unwrap();
    let near = nodes[0].add_pod("near").unwrap();
    let far = nodes[1].add_pod("far").unwrap();
    for place in [
        near.place(),
        far.place(),
        nodes[0].host(),
        nodes[1].host(),
        cluster.switch(),
    ] {
        for address in server.addresses() {
            for mode in [Mode::Http, Mode::Hold, Mode::Udp, Mode::UdpConnected] {
                let report = Load::ask(place, SocketAddr::new(address, ECHO_PORT), mode, 3).unwrap();
                assert_eq!(
                    report.replies.get("server"),
                    Some(&3),
                    "{place:?} {address} {mode:?}: {report:?}"
                );
            }
        }
    }
    // A port without a listener must be told apart from an answer.
    let closed = SocketAddr::new(server.v4().into(), 81);
    let report = Load::ask(near.place(), closed, Mode::Http, 2).unwrap();
    assert_eq!(
        (report.ok, report.errors.get("connect: ECONNREFUSED")),
        (0, Some(&2)),
        "{report:?}"
    );

    let made = || {
        let mut lines = residue::made_by(std::process::id()).unwrap();
        lines.retain(|line| line.contains(&name));
        lines
    };
    assert!(made().len() > 10, "{:?}", made());
    drop(cluster);
    assert_eq!(made(), Vec::<String>::new());
}

#[test]
fn a_node_can_be_cut_off_without_a_word() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.add_node().unwrap();
    let outside = cluster.add_outside_host().unwrap();
    let pod = node.add_echo_pod("echo").unwrap();
    let question = Question {
        timeout_ms: 300,
        ..Mode::Http.into()
    };
    let ask = |address: IpAddr| {
        let target = SocketAddr::new(address, ECHO_PORT);
        Load::ask(outside.place(), target, question, 2).unwrap()
    };
    let source = Question {
        source: true,
        ..question
    };
    for (address, client) in pod
        .addresses()
        .into_iter()
        .zip([IpAddr::from(outside.v4()), IpAddr::from(outside.v6())])
    {
        let target = SocketAddr::new(address, ECHO_PORT);
        let seen = Load::ask(outside.place(), target, source, 1).unwrap();
        assert_eq!(seen.replies.keys().next(), Some(&client.to_string()), "{seen:?}");
    }
    cluster.unplug(&node).unwrap();
    for address in pod.addresses() {
        let report = ask(address);
        assert_eq!(report.errors.get("connect: TimedOut"), Some(&2), "{report:?}");
    }
    cluster.plug_in(&node).unwrap();
    for address in pod.addresses() {
        assert_eq!(ask(address).ok, 2);
    }
    let big = Question {
        size: 4000,
        ..Mode::Udp.into()
    };
    let target = SocketAddr::new(pod.v4().into(), ECHO_PORT);
    assert_eq!(Load::ask(outside.place(), target, big, 4).unwrap().ok, 4);
}

#[test]
fn the_page_about_behaviour_names_tests_that_there_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("../docs/service-behaviour.md")).unwrap();
    let mut named = 0;
    for (module, name) in page.split('`').filter_map(|word| word.split_once("::")) {
        let source = fs::read_to_string(root.join(format!("tests/e2e/{module}.rs"))).unwrap();
        // some have further attributes
        let head = |test: &str| {
            test.lines().find(|line| !line.starts_with("#[")) == Some(&format!("fn {name}() {{"))
        };
        let there = name == "*" || source.split("#[test]\n").skip(1).any(head);
        assert!(there, "{module}::{name}");
        named += 1;
    }
    assert!(named > 60, "{named}");
}
