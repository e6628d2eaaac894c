//! Requests that nobody would send on purpose: bodies of recorded requests, bent in random places, under every content type.
//! Whatever they are, the answer is a Status or an object, never the server's fault, and the server goes on.
//!
//! `BEELINE_RANDOM_REQUESTS` says how many, `BEELINE_RANDOM_SEED` which.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::time::Duration;

use common::{Server, call, send};
use rand::rngs::StdRng;
use rand::seq::{IndexedMutRandom as _, IndexedRandom as _};
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value, json};

const CONTENT_TYPES: [&str; 9] = [
    "application/json",
    "application/yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
    "application/vnd.kubernetes.protobuf",
    "text/plain",
    "application/json; charset=\"",
];
/// Keys and words that mean something somewhere.
const WORDS: [&str; 34] = [
    "",
    "$patch",
    "$retainKeys",
    "$setElementOrder/containers",
    "$setElementOrder/ports",
    "$deleteFromPrimitiveList/finalizers",
    "delete",
    "replace",
    "merge",
    "metadata",
    "managedFields",
    "fieldsV1",
    "f:metadata",
    "k:{\"name\":\"a\"}",
    "v:1",
    "i:0",
    "ownerReferences",
    "finalizers",
    "labels",
    "annotations",
    "generateName",
    "resourceVersion",
    "deletionTimestamp",
    "spec",
    "status",
    "containers",
    "ports",
    "selector",
    "op",
    "path",
    "/metadata/labels/a~1b",
    "/spec/ports/-",
    "/spec/ports/99999999999999999999",
    "2026-13-45T99:99:99Z",
];

/// The recorded requests that have a body, and some patches.
fn corpus() -> Vec<(String, Value)> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/apiserver-1.36");
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    let mut found: Vec<(String, Value)> = files
        .iter()
        .filter_map(|file| {
            let mut recorded: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
            let request = recorded["request"].take();
            let path = request["path"].as_str()?.to_owned();
            (!request["body"].is_null()).then(|| (path, request["body"].clone()))
        })
        .collect();
    let pod = "/api/v1/namespaces/default/pods/target";
    for (path, body) in [
        (
            pod,
            json!([{"op": "copy", "from": "/spec", "path": "/spec/x"}, {"op": "test", "path": "", "value": 1}]),
        ),
        (
            pod,
            json!({"spec": {"containers": [{"name": "c", "$patch": "delete"}], "$setElementOrder/containers": [{"name": "d"}]}}),
        ),
        (
            pod,
            json!({"metadata": {"labels": {"a": null}, "$deleteFromPrimitiveList/finalizers": ["x"]}}),
        ),
        (
            "/api/v1/namespaces/default/pods/target?fieldManager=m&force=true",
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "target"}, "spec": {"containers": [{"name": "c", "image": "j", "ports": [{"containerPort": 80}]}]}}),
        ),
        (
            "/apis/apps/v1/namespaces/default/deployments/target/scale?fieldManager=m",
            json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "spec": {"replicas": 3}}),
        ),
    ] {
        found.push((path.to_owned(), body));
    }
    assert!(found.len() > 20);
    found
}

fn anything(random: &mut StdRng, depth: usize) -> Value {
    match random.random_range(0..if depth == 0 { 9 } else { 11 }) {
        0 => Value::Null,
        1 => random.random::<bool>().into(),
        2 => random.random::<i64>().into(),
        3 => [0, -1, 1, 65536, i64::from(i32::MAX) + 1, i64::MIN]
            .choose(random)
            .copied()
            .into(),
        4 => random.random::<f64>().into(),
        5 => 1e300.into(),
        6 => "x".repeat(random.random_range(0..300)).into(),
        7 => String::from_utf8_lossy(&random.random::<[u8; 12]>())
            .into_owned()
            .into(),
        8 => (*WORDS.choose(random).unwrap()).into(),
        9 => (0..random.random_range(0..4))
            .map(|_| anything(random, depth - 1))
            .collect(),
        _ => {
            let mut map = Map::new();
            for _ in 0..random.random_range(0..4) {
                map.insert(
                    (*WORDS.choose(random).unwrap()).to_owned(),
                    anything(random, depth - 1),
                );
            }
            map.into()
        }
    }
}

/// Changes something somewhere below.
fn bend(value: &mut Value, random: &mut StdRng) {
    let deeper = random.random_range(0..5) > 0;
    match value {
        Value::Object(map) if deeper && !map.is_empty() => {
            let keys: Vec<String> = map.keys().cloned().collect();
            let key = keys.choose(random).unwrap();
            match random.random_range(0..10) {
                0 => drop(map.remove(key)),
                1 => {
                    let moved = map.remove(key).unwrap();
                    map.insert((*WORDS.choose(random).unwrap()).to_owned(), moved);
                }
                2 => drop(map.insert((*WORDS.choose(random).unwrap()).to_owned(), anything(random, 3))),
                _ => bend(map.get_mut(key).unwrap(), random),
            }
        }
        Value::Array(items) if deeper && !items.is_empty() => match random.random_range(0..6) {
            0 => items.extend_from_within(..),
            1 => drop(items.pop()),
            _ => bend(items.choose_mut(random).unwrap(), random),
        },
        other => *other = anything(random, 3),
    }
}

/// Sometimes text that is no JSON at all any more.
fn bytes(value: &Value, random: &mut StdRng) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    match random.random_range(0..12) {
        0 => bytes.truncate(random.random_range(0..=bytes.len())),
        1 => {
            for _ in 0..4 {
                if let Some(byte) = bytes.choose_mut(random) {
                    *byte = random.random();
                }
            }
        }
        2 => bytes = "[".repeat(20_000).into_bytes(),
        3 => bytes = "{\"spec\":".repeat(20_000).into_bytes(),
        4 => bytes = b"a: &a [*a, *a]\nb: !!binary x\n? [c]\n: d\n".to_vec(),
        5 => bytes.splice(0..0, *b"k8s\0").for_each(drop),
        _ => {}
    }
    bytes
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .map_or(otherwise, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_sent_is_the_servers_fault() {
    let (requests, seed) = (
        number("BEELINE_RANDOM_REQUESTS", 1500),
        number("BEELINE_RANDOM_SEED", 1),
    );
    let server = Server::start().await;
    let admin = server.client().await;
    let pod = json!({"metadata": {"name": "target"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let template =
        json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let deployment = json!({
        "metadata": {"name": "target"}, "spec": {"selector": {"matchLabels": {"app": "a"}}, "template": template},
    });
    for (path, object) in [
        ("/api/v1/namespaces", json!({"metadata": {"name": "demo"}})),
        ("/api/v1/namespaces/default/pods", pod),
        ("/apis/apps/v1/namespaces/default/deployments", deployment),
    ] {
        assert_eq!(call(&admin, "POST", path, &object).await.0, 201);
    }
    let corpus = corpus();
    let mut random = StdRng::seed_from_u64(seed);
    let mut taken = 0;
    for at in 0..requests {
        let (path, body) = corpus.choose(&mut random).unwrap();
        let mut body = body.clone();
        for _ in 0..random.random_range(0..4) {
            bend(&mut body, &mut random);
        }
        let method = ["POST", "PUT", "PATCH", "PATCH", "DELETE"]
            .choose(&mut random)
            .unwrap();
        let content_type = CONTENT_TYPES.choose(&mut random).unwrap();
        let bytes = bytes(&body, &mut random);
        let request = http::Request::builder()
            .method(*method)
            .uri(path)
            .header("content-type", *content_type)
            .body(bytes.clone())
            .unwrap();
        let what = || {
            let body = String::from_utf8_lossy(&bytes);
            let shown: String = body.chars().take(2000).collect();
            format!("seed {seed}, request {at}: {method} {path} as {content_type}: {shown}")
        };
        let answer = tokio::time::timeout(Duration::from_secs(60), send(&admin, request))
            .await
            .unwrap_or_else(|_| panic!("no answer: {}", what()));
        let code = answer.status().as_u16();
        let text = String::from_utf8_lossy(answer.body());
        assert!((200..500).contains(&code), "{code} {text}: {}", what());
        let value: Value =
            serde_json::from_slice(answer.body()).unwrap_or_else(|_| panic!("{text}: {}", what()));
        if code < 300 {
            taken += 1;
            assert!(value["kind"].is_string(), "{value}: {}", what());
        } else {
            assert_eq!(
                (&value["kind"], &value["code"]),
                (&json!("Status"), &json!(code)),
                "{}",
                what()
            );
            assert!(
                value["message"].as_str().is_some_and(|text| !text.is_empty()),
                "{value}: {}",
                what()
            );
        }
    }
    assert!(taken > 0, "not one was fine: nothing deep was reached");
    // What is stored can still be read.
    for path in ["pods", "services", "namespaces", "nodes", "endpointslices"] {
        let group = if path == "endpointslices" {
            "/apis/discovery.k8s.io/v1"
        } else {
            "/api/v1"
        };
        assert_eq!(
            call(&admin, "GET", &format!("{group}/{path}"), &Value::Null)
                .await
                .0,
            200,
            "{path}"
        );
    }
    server.stop().await;
}
