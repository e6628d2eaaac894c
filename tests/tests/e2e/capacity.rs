//! A map that is too small: said loudly, and nothing that worked stops working.

use std::net::IpAddr;

use beeline_tests::client::Mode;
use beeline_tests::objects::{service, slice};
use beeline_tests::{agent, wait_for};

use crate::scene::{PROPAGATION, Scene, V4, assert_spread, wait_answered_by};

const BOTH: [&str; 2] = ["web-1", "web-2"];

/// 100 endpoints of which two answer: with any of the others in force, requests would fail.
fn too_many(scene: &Scene) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = scene.servers.iter().map(|pod| pod.v4().into()).collect();
    addresses.extend((2..=99).map(|last| IpAddr::from([10, 244, 99, last])));
    addresses
}

#[test]
fn a_set_that_does_not_fit_is_named_and_the_old_one_stays() {
    for flag in ["--max-slots", "--max-backends"] {
        // Enough for `web` (two pods, TCP and UDP, two families) and a little more.
        let scene = Scene::with_options(|options| options.flag(flag, 32));
        let target = format!("{V4}:80");
        let errors = || {
            agent::metric(&scene.node, "beeline_program_errors_total")
                .unwrap()
                .unwrap_or(0.0)
        };
        assert_eq!(errors(), 0.0);
        scene
            .objects
            .put(
                "web",
                &[service("web", &[V4]), slice("web", "v4", &too_many(&scene))],
            )
            .unwrap();
        scene
            .agent
            .process
            .wait_log("the service's name", PROPAGATION, |line| {
                line.contains("default/web") && is_error(line)
            })
            .unwrap();
        wait_for("the error metric", PROPAGATION, || {
            Ok((errors() > 0.0).then_some(()))
        })
        .unwrap();
        assert_spread(&scene.ask(&target, Mode::Http, 64), &BOTH);
        // Others are programmed all the same, and a set that fits again comes into force.
        scene
            .objects
            .put_service("other", &["10.96.0.11"], &[&scene.servers[0]])
            .unwrap();
        wait_answered_by(scene.client.place(), "10.96.0.11:80", &["web-1"]);
        scene
            .objects
            .put_service("web", &[V4], &[&scene.servers[1]])
            .unwrap();
        wait_answered_by(scene.client.place(), &target, &["web-2"]);
    }
}

fn is_error(line: &str) -> bool {
    line.contains("ERROR") || line.contains("\"level\":\"error\"")
}
