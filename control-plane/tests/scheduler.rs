//! Pods get nodes, as an administrator and their events see it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{Server, call};
use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/default/pods";

async fn create(client: &Client, path: &str, object: &Value) {
    let (code, answer) = call(client, "POST", path, object).await;
    assert_eq!(code, 201, "{answer}");
}

fn node(name: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "status": {
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn pod(name: &str, cpu: &str) -> Value {
    json!({
        "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": cpu}}}]},
    })
}

/// Watches until `wanted` pods have a node, and returns how many each node has.
async fn placed(client: &Client, wanted: usize) -> BTreeMap<String, usize> {
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let mut changes = watcher(pods, watcher::Config::default())
        .applied_objects()
        .boxed();
    let mut nodes: BTreeMap<String, String> = BTreeMap::new();
    let waiting = async {
        while nodes.len() < wanted {
            let pod = changes.next().await.unwrap().unwrap();
            if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) {
                nodes.insert(pod.name_any(), node);
            }
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(60), waiting).await;
    if done.is_err() {
        let pods = call(client, "GET", &format!("{PODS}?limit=1"), &Value::Null)
            .await
            .1;
        panic!("{} of {wanted} pods have a node\n{pods}", nodes.len());
    }
    let mut counts = BTreeMap::new();
    for node in nodes.into_values() {
        *counts.entry(node).or_default() += 1;
    }
    counts
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_pods_are_spread_over_a_hundred_nodes() {
    let server = Server::start_with(|config| config.cluster_cidrs.clear()).await;
    let client = server.client().await;
    for i in 0..100 {
        create(&client, "/api/v1/nodes", &node(&format!("n{i:02}"))).await;
    }
    stream::iter(0..1000)
        .for_each_concurrent(32, |i| {
            let client = client.clone();
            async move { create(&client, PODS, &pod(&format!("p{i:03}"), "100m")).await }
        })
        .await;
    let counts = placed(&client, 1000).await;
    assert_eq!(counts.len(), 100);
    // All nodes and all pods are alike: none has more than its share.
    assert!(counts.values().all(|pods| *pods == 10), "{counts:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pending_pod_says_why_and_gets_its_node_when_there_is_room() {
    let server = Server::start_with(|_| ()).await;
    let client = server.client().await;
    create(&client, PODS, &pod("a", "3")).await;
    let why = |wanted: &'static str| {
        let client = client.clone();
        async move {
            let pods: Api<Pod> = Api::default_namespaced(client.clone());
            let says = |pod: Option<&Pod>| {
                let status = pod.and_then(|pod| pod.status.as_ref());
                let conditions = status.and_then(|status| status.conditions.as_ref());
                conditions.is_some_and(|conditions| {
                    conditions.iter().any(|condition| {
                        condition.type_ == "PodScheduled"
                            && condition.status == "False"
                            && condition.reason.as_deref() == Some("Unschedulable")
                            && condition.message.as_deref() == Some(wanted)
                    })
                })
            };
            let waiting = kube::runtime::wait::await_condition(pods, "a", says);
            let done = tokio::time::timeout(Duration::from_secs(20), waiting).await;
            assert!(
                done.is_ok(),
                "{}",
                call(&client, "GET", &format!("{PODS}/a"), &Value::Null).await.1
            );
        }
    };
    why("no nodes available to schedule pods").await;
    let mut small = node("small");
    small["status"]["allocatable"]["cpu"] = "1".into();
    create(&client, "/api/v1/nodes", &small).await;
    why("0/1 nodes are available: 1 Insufficient cpu.").await;
    create(&client, "/api/v1/nodes", &node("large")).await;
    assert_eq!(placed(&client, 1).await, [("large".to_owned(), 1)].into());
    // The event comes after the binding.
    let told = async {
        loop {
            let events = call(&client, "GET", "/api/v1/namespaces/default/events", &Value::Null)
                .await
                .1;
            let about: Vec<(String, String)> = events["items"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|event| event["involvedObject"]["name"] == "a")
                .map(|event| (event["reason"].to_string(), event["message"].to_string()))
                .collect();
            let has = |reason: &str, message: &str| {
                about.contains(&(format!("{reason:?}"), format!("{message:?}")))
            };
            if has("FailedScheduling", "0/1 nodes are available: 1 Insufficient cpu.")
                && has("Scheduled", "Successfully assigned default/a to large")
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), told).await.unwrap();
    // Pods of other schedulers are theirs.
    let mut other = pod("other", "1m");
    other["spec"]["schedulerName"] = "mine".into();
    create(&client, PODS, &other).await;
    create(&client, PODS, &pod("b", "1m")).await;
    assert_eq!(placed(&client, 2).await.values().sum::<usize>(), 2);
    let other = call(&client, "GET", &format!("{PODS}/other"), &Value::Null)
        .await
        .1;
    assert!(other["spec"]["nodeName"].is_null(), "{other}");
    server.stop().await;
}
