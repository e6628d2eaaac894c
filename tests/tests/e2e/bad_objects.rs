//! Objects that no API server should hand out: each is named in the log, and everything else works.

use beeline_tests::client::Mode;
use beeline_tests::objects::{endpoint, service, slice_of};
use serde_json::{Value, json};

use crate::scene::{PROPAGATION, Scene, V4, assert_spread};

const BOTH: [&str; 2] = ["web-1", "web-2"];

/// A change of an object at a JSON pointer.
fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    *object.pointer_mut(pointer).unwrap() = value;
    object
}

#[test]
fn a_bad_object_is_named_and_every_other_service_works() {
    let scene = Scene::new();
    let good = scene.servers[0].v4().to_string();
    let bad_slice = |name: &str, endpoints: &[Value]| slice_of(name, "v4", "IPv4", endpoints);
    let cases: Vec<(&str, Vec<Value>)> = vec![
        (
            "bad-cluster-ip",
            vec![service("bad-cluster-ip", &["10.96.0.999"])],
        ),
        (
            "bad-endpoint-ip",
            vec![
                service("bad-endpoint-ip", &["10.96.1.1"]),
                bad_slice("bad-endpoint-ip", &[endpoint("10.244.1.x"), endpoint(&good)]),
            ],
        ),
        (
            "bad-port",
            vec![with(
                service("bad-port", &["10.96.1.2"]),
                "/spec/ports/0/port",
                json!(0),
            )],
        ),
        (
            "bad-target-port",
            vec![
                service("bad-target-port", &["10.96.1.3"]),
                with(
                    bad_slice("bad-target-port", &[endpoint(&good)]),
                    "/ports/0/port",
                    json!(0),
                ),
            ],
        ),
        (
            "bad-no-service-name",
            vec![with(
                bad_slice("bad-no-service-name", &[endpoint(&good)]),
                "/metadata/labels",
                json!({}),
            )],
        ),
        (
            "bad-duplicates",
            vec![
                service("bad-duplicates", &["10.96.1.4"]),
                bad_slice(
                    "bad-duplicates",
                    &[endpoint(&good), endpoint(&good), endpoint(&good)],
                ),
            ],
        ),
        (
            "bad-labels",
            vec![with(
                service("bad-labels", &["10.96.1.5"]),
                "/metadata",
                json!({"name": "bad-labels", "namespace": "default", "labels": {"\u{fffd}\u{200f}☃": "\u{1f41d}\u{0}\u{7f}é"}}),
            )],
        ),
        (
            "bad-crowd",
            vec![
                service("bad-crowd", &["10.96.1.6"]),
                bad_slice(
                    "bad-crowd",
                    &(0..5000)
                        .map(|n| endpoint(&format!("10.200.{}.{}", n / 250, n % 250 + 1)))
                        .collect::<Vec<_>>(),
                ),
            ],
        ),
    ];
    for (number, (name, objects)) in cases.iter().enumerate() {
        scene.objects.put(name, objects).unwrap();
        scene
            .agent
            .process
            .wait_log(&format!("a warning about {name}"), PROPAGATION, |line| {
                line.contains(name) && (line.contains("WARN") || line.contains("ERROR"))
            })
            .unwrap();
        // What was there works, and what comes afterwards is programmed.
        assert_spread(&scene.ask(&format!("{V4}:80"), Mode::Http, 32), &BOTH);
        let next = format!("10.96.2.{}", number + 1);
        scene.put_service("next", &[&next], &[&scene.servers[1]]);
        assert_spread(&scene.ask(&format!("{next}:80"), Mode::Http, 16), &["web-2"]);
    }
    // What is good in a bad object is used.
    assert_spread(&scene.ask("10.96.1.1:80", Mode::Http, 8), &["web-1"]);
    assert_spread(&scene.ask("10.96.1.4:80", Mode::Http, 8), &["web-1"]);
    // A file that is no YAML at all.
    scene
        .objects
        .put_text("noise", "kind: [Service\n\t\u{0}: :")
        .unwrap();
    scene
        .agent
        .process
        .wait_log("a warning about noise.yaml", PROPAGATION, |line| {
            line.contains("noise.yaml")
        })
        .unwrap();
    assert_spread(&scene.ask(&format!("{V4}:80"), Mode::Http, 32), &BOTH);
}
