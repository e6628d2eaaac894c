//! What clients see: every protocol and family, from pods and from the node itself.

use beeline_tests::client::Mode;

use crate::scene::{Scene, V4, V6, ask, assert_all_fail, assert_spread};

const BOTH: [&str; 2] = ["web-1", "web-2"];

#[test]
fn every_protocol_and_family_from_pods_and_nodes() {
    let scene = Scene::new();
    for place in [scene.client.place(), scene.node.host()] {
        for ip in [V4.to_owned(), format!("[{V6}]")] {
            // beeline-load checks getpeername for TCP and connected UDP, and the source of datagrams for the others.
            assert_spread(&ask(place, &format!("{ip}:80"), Mode::Http, 64), &BOTH);
            assert_spread(&ask(place, &format!("{ip}:53"), Mode::Udp, 64), &BOTH);
            assert_spread(&ask(place, &format!("{ip}:53"), Mode::UdpConnected, 64), &BOTH);
        }
    }
}

#[test]
fn one_connection_stays_with_one_backend() {
    let scene = Scene::new();
    let report = scene.ask(&format!("{V4}:80"), Mode::Hold, 200);
    assert_eq!(
        (report.ok, report.failed, report.replies.len()),
        (200, 0, 1),
        "{report:?}"
    );
}

#[test]
fn a_service_without_backends_refuses_at_once() {
    let scene = Scene::new();
    scene.put_service("web", &[V4, V6], &[]);
    for place in [scene.client.place(), scene.node.host()] {
        for ip in [V4.to_owned(), format!("[{V6}]")] {
            let report = ask(place, &format!("{ip}:80"), Mode::Http, 20);
            assert_all_fail(&report, "connect: ECONNREFUSED");
            assert!(report.slowest_ms < 500.0, "a refusal must not wait: {report:?}");
            assert_all_fail(
                &ask(place, &format!("{ip}:53"), Mode::Udp, 5),
                "sendto: ECONNREFUSED",
            );
            assert_all_fail(
                &ask(place, &format!("{ip}:53"), Mode::UdpConnected, 5),
                "connect: ECONNREFUSED",
            );
        }
    }
    // And back.
    scene.put_service("web", &[V4, V6], &[&scene.servers[1]]);
    assert_spread(&scene.ask(&format!("{V4}:80"), Mode::Http, 16), &["web-2"]);
}

#[test]
fn what_is_no_frontend_passes_untouched() {
    let scene = Scene::new();
    let direct = format!("{}:8080", scene.servers[0].v4());
    for mode in [Mode::Http, Mode::Hold, Mode::Udp, Mode::UdpConnected] {
        assert_spread(&scene.ask(&direct, mode, 8), &["web-1"]);
    }
    // The service's address with a port or protocol that it does not have is not answered by its pods.
    for target in [format!("{V4}:81"), format!("{V4}:53")] {
        assert_eq!(scene.ask(&target, Mode::Http, 1).ok, 0, "{target}");
    }
}

#[test]
fn endpoints_come_and_go() {
    let scene = Scene::new();
    let target = format!("{V4}:80");
    for round in 0..5 {
        let (pod, name) = if round % 2 == 0 {
            (&scene.servers[0], "web-1")
        } else {
            (&scene.servers[1], "web-2")
        };
        scene.put_service("web", &[V4, V6], &[pod]);
        assert_spread(&scene.ask(&target, Mode::Http, 16), &[name]);
    }
    scene.put_service("web", &[V4, V6], &scene.servers.iter().collect::<Vec<_>>());
    assert_spread(&scene.ask(&target, Mode::Http, 64), &BOTH);
}
